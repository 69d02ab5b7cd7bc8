"""A stand-in for python:3.12-slim where no image registry can be reached: Debian 12 with its Python 3.11.

The images' Dockerfiles take either (`ARG PYTHON_IMAGE`), and so both packages run on 3.11 and later.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from console import step
from shell import find, output, run, succeeds

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
# Left out: what apt has downloaded, documentation and translations. They are half of what debootstrap makes.
DROPPED = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "var/log",
)
SOURCES = "etc/apt/sources.list"
RECIPE = hashlib.sha256(repr((SUITE, PACKAGES, DROPPED, 1)).encode()).hexdigest()[:12]
NAME = f"localhost/vllm-fleet/python-debian:{SUITE}-{RECIPE}"

Command = Callable[..., list[str | Path]]


def ensure(buildah: Command, log: Path) -> None:
    """Makes the image NAME unless it is there. `buildah` turns arguments into a command on its storage."""
    if succeeds(buildah("inspect", "--type=image", NAME)):
        return
    with step(f"base image: Debian {SUITE} with Python, by debootstrap") as work:
        work.follow(log)
        container = output(buildah("from", "scratch")).strip()
        try:
            root = Path(output(buildah("mount", container)).strip())
            fill(root, log)
            work.note = f"{megabytes(root)} MB"
            run(buildah("config", "--cmd=python3", container), log)
            run(buildah("commit", "--format=docker", container, NAME), log)
        finally:
            run(buildah("rm", container), log)


def fill(root: Path, log: Path) -> None:
    include = f"--include={','.join(PACKAGES)}"
    run([find("debootstrap") or "debootstrap", "--variant=minbase", include, SUITE, root], log)
    for folder in DROPPED:
        for entry in (root / folder).iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def megabytes(folder: Path) -> int:
    """What the files of a folder take on disk, in units of 10^6 bytes."""
    return sum(entry.lstat().st_blocks * 512 for entry in folder.rglob("*")) // 1_000_000
