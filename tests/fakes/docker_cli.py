"""A scripted `docker`: the few commands that the driver uses, with images as JSON files in a folder.

    PATH=…/bin:$PATH  DOCKER_STATE=folder       # `install(folder / "bin")` writes the `docker` of that PATH

`docker build` records what it was given, its secrets' text included, in `calls.json`; `docker save` writes an
archive in docker's format whose configuration differs when the labels do. A file `fail-build` in the folder
makes the next builds fail with its text. It is started so often that what one command alone needs is
imported there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def install(folder: Path) -> None:
    """Writes an executable `docker` that runs this file."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "docker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -E -S {Path(__file__).resolve()} "$@"\n')
    program.chmod(0o755)


def calls(state: Path) -> list[dict[str, Any]]:
    """What `docker build`, `save`, `tag` and `push` were asked so far."""
    path = state / "calls.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def record(state: Path, call: dict[str, Any]) -> None:
    (state / "calls.json").write_text(json.dumps([*calls(state), call]))


def image_file(state: Path, name: str) -> Path:
    return state / f"{name.replace('/', '_')}.json"


def build(state: Path, arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    for option in ("--label", "--secret", "--build-arg"):
        parser.add_argument(option, action="append", default=[])
    parser.add_argument("--tag")
    parser.add_argument("--file", type=Path)
    parser.add_argument("context", type=Path)
    given = parser.parse_args(arguments)
    secrets = [dict(part.split("=", 1) for part in secret.split(",")) for secret in given.secret]
    texts = {secret["id"]: Path(secret["src"]).read_text() for secret in secrets}
    record(state, {"do": "build", "name": given.tag, "secrets": texts, "build_args": given.build_arg})
    failure = state / "fail-build"
    if failure.exists():
        print(failure.read_text(), file=sys.stderr)
        return 1
    if not given.file.is_file() or not given.context.is_dir():
        print(f"unable to prepare context: {given.file} or {given.context} not found", file=sys.stderr)
        return 1
    labels = dict(label.split("=", 1) for label in given.label)
    image_file(state, given.tag).write_text(json.dumps({"Config": {"Labels": labels}}))
    return 0


def image(state: Path, arguments: list[str]) -> int:
    """`docker image inspect --format '{{index .Config.Labels "KEY"}}' NAME`."""
    _, _, template, name = arguments
    try:
        labels = json.loads(image_file(state, name).read_text())["Config"]["Labels"]
    except FileNotFoundError:
        print(f"Error response from daemon: No such image: {name}", file=sys.stderr)
        return 1
    print(labels.get(template.split('"')[1], ""))
    return 0


def save(state: Path, arguments: list[str]) -> int:
    import hashlib
    import io
    import tarfile

    _, target, name = arguments
    config = image_file(state, name).read_bytes()
    digest = hashlib.sha256(config).hexdigest()
    manifest = json.dumps([{"Config": f"{digest}.json", "RepoTags": [name], "Layers": []}]).encode()
    record(state, {"do": "save", "name": name})
    with tarfile.open(target, "w") as archive:
        for path, content in {f"{digest}.json": config, "manifest.json": manifest}.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return 0


def other(state: Path, command: str, arguments: list[str]) -> int:
    if command in {"tag", "push"}:
        record(state, {"do": command, "arguments": arguments})
    elif command != "info":
        print(f"docker: '{command}' is not a docker command", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    state = Path(os.environ["DOCKER_STATE"])
    command, *arguments = sys.argv[1:]
    known = {"build": build, "image": image, "save": save}
    if command in known:
        return known[command](state, arguments)
    return other(state, command, arguments)


if __name__ == "__main__":
    sys.exit(main())
