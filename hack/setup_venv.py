"""Makes .venv: every pinned dependency by hash, then both packages, editable.

Needs Python 3.11 or newer with its `venv` module, and a package index that pip is set up for.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def pip(*arguments: str) -> None:
    command: list[str | Path] = [
        VENV / "bin" / "python",
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
    ]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - runs before anything that says so
        sys.exit(f"vllm-fleet needs Python 3.11 or newer; this is {sys.version.split()[0]}. Set PYTHON=…")
    print("setup: .venv with pinned dependencies (about a minute the first time)", flush=True)
    try:
        venv.create(VENV, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit("Python's venv module has no pip. On Debian: apt-get install python3-venv")
    pip("--require-hashes", "-r", "requirements/dev.txt")
    pip("--no-build-isolation", "--no-deps", "-e", "gateway", "-e", "operator")
    (VENV / "ready").touch()


if __name__ == "__main__":
    main()
