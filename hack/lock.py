"""Pins each list of requirements (*.in) to a .txt beside it, with hashes and without index addresses.

uv resolves once for all Python versions and platforms (`--universal`), so that one file serves a laptop
and an image. It is fetched into a throw-away environment: nothing else here needs it.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("requirements/*.in", "k8s/local/vllm-cpu/**/*.in")
UV = "uv==0.13.9"
FLAGS = [
    "--quiet",
    "--universal",
    "--python-version=3.11",
    "--generate-hashes",
    "--no-emit-index-url",
    "--no-emit-find-links",
    "--no-annotate",
    "--custom-compile-command=make lock",
]


def compile_file(uv: Path, source: Path) -> None:
    target = source.with_suffix(".txt")
    command: list[str | Path] = [uv, "pip", "compile", *FLAGS, "-o", target.name, source.name]
    subprocess.run(command, cwd=source.parent, check=True, env=os.environ | {"UV_PYTHON_DOWNLOADS": "never"})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin_folder = Path(folder) / "bin"
        subprocess.run([bin_folder / "pip", "-q", "install", UV], check=True)
        for source in sorted(source for pattern in SOURCES for source in ROOT.glob(pattern)):
            compile_file(bin_folder / "uv", source)


if __name__ == "__main__":
    main()
