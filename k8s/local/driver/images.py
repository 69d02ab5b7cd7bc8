"""The three images: built where their inputs have changed, loaded where the cluster lacks them.

An image carries a label with the hash of what it was built from. So a second run, also from another clone,
finds nothing to do, and a file that is in no image can change without a build.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import engines
from console import say, step
from paths import ROOT, cache
from shell import DriverError, lock

LABEL = "vllm-fleet.dev/content"
REGISTRY = "docker.io"  # under which containerd and kubelet know a name that has no registry
IGNORED = {"__pycache__"}


@dataclass(frozen=True)
class Image:
    """An image and what it is built from: `inputs` are files and folders below the repository's root."""

    name: str
    dockerfile: str
    context: str
    inputs: tuple[str, ...]
    keep_layers: bool = True
    expect: str = ""
    source: Path | None = None  # instead of this repository's root, such as an older state of it

    @property
    def short(self) -> str:
        """`gateway` of `vllm-fleet/gateway:0.1.0`."""
        return self.name.partition(":")[0].rpartition("/")[2]

    @property
    def root(self) -> Path:
        return self.source or ROOT

    def older(self, source: Path, tag: str) -> Image:
        """This image as another tree makes it, under another tag."""
        return replace(self, name=f"{self.name.partition(':')[0]}:{tag}", source=source)

    def files(self, root: Path) -> Iterator[Path]:
        """Every file that is an input, in a fixed order."""
        for place in sorted({self.dockerfile, *self.inputs}):
            path = root / place
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file() and not IGNORED.intersection(file.parts) and ".egg-info" not in str(file):
                    yield file

    def content(self, root: Path, base: str) -> str:
        """A hash of all inputs and of the image they stand on."""
        seen = hashlib.sha256(f"{self.name} {base}".encode())
        for file in self.files(root):
            body = hashlib.sha256(file.read_bytes()).hexdigest()
            seen.update(f"\n{file.relative_to(root).as_posix()} {body}".encode())
        return seen.hexdigest()[:16]


def python_image(part: str, dockerfile: str) -> Image:
    sources = (f"{part}/pyproject.toml", f"{part}/src", "requirements/build.txt", f"requirements/{part}.txt")
    return Image(f"vllm-fleet/{part}:0.1.0", dockerfile, ".", (".dockerignore", *sources))


IMAGES = {
    "operator": python_image("operator", "operator/Dockerfile"),
    "gateway": python_image("gateway", "Dockerfile.gateway"),
    "vllm-cpu": Image(
        name="vllm-fleet/vllm-cpu:0.32.0",
        dockerfile="k8s/local/vllm-cpu/Dockerfile",
        context="k8s/local/vllm-cpu",
        inputs=tuple(
            f"k8s/local/vllm-cpu/{name}"
            for name in ("requirements.txt", "cuda_stubs.py", "model/requirements.txt", "model/convert.py")
        ),
        keep_layers=False,  # built once a version: layers kept for the next build are gigabytes in vain
        expect="3 to 6 minutes, once",
    ),
}


def older(tree: Path, tag: str) -> list[Image]:
    """Our own two images as another tree of this repository makes them, under another tag."""
    return [IMAGES[name].older(tree, tag) for name in ("operator", "gateway")]


class Runtime(Protocol):
    """The container runtime of a cluster's nodes."""

    def load(self, archive: Path) -> None: ...
    def image_digest(self, reference: str) -> str | None: ...


def folder() -> Path:
    return cache() / "images"


def engine() -> engines.Engine:
    return engines.choose(folder() / "storage")


def build(names: Sequence[str] = tuple(IMAGES)) -> None:
    """Builds those of the named images whose inputs have changed since they were built."""
    with lock(folder() / "lock", "another build of images"):
        builder = engine()
        for name in names:
            build_one(builder, IMAGES[name])


def build_one(builder: engines.Engine, image: Image) -> None:
    content = image.content(image.root, builder.base)
    if builder.label(image.name, LABEL) == content:
        say(f"  ✓ image {image.name} is up to date")
        return
    log = log_of(image)
    builder.prepare(log)
    with step(f"build image {image.name}{image.expect and f' ({image.expect})'}") as work:
        work.follow(log)
        labels = {LABEL: content}
        builder.build(
            engines.Build(
                image.name,
                image.root / image.dockerfile,
                image.root / image.context,
                labels,
                image.keep_layers,
            ),
            log,
        )


def ensure_loaded(runtime: Runtime, wanted: Sequence[Image] = tuple(IMAGES.values())) -> list[str]:
    """Builds what is stale, and loads into the cluster what it lacks or has in another content version.

    Returns the short names of the images that it loaded.
    """
    with lock(folder() / "lock", "another build of images"):
        builder = engine()
        return [image.short for image in wanted if ensure_one(builder, image, runtime)]


def ensure_one(builder: engines.Engine, image: Image, runtime: Runtime) -> bool:
    """Whether it had to be loaded."""
    content = image.content(image.root, builder.base)
    reference = f"{REGISTRY}/{image.name}"
    if known_content(runtime.image_digest(reference)) == content:
        say(f"  ✓ image {image.name} is in the cluster")
        return False
    build_one(builder, image)
    load(builder, image, runtime)
    remember(runtime.image_digest(reference), content)
    return True


def load(builder: engines.Engine, image: Image, runtime: Runtime) -> None:
    """Carries an image over in an archive, which is as large as the image and deleted at once."""
    archive = folder() / f"{image.short}.tar"
    with step(f"load image {image.name} into the cluster") as work:
        try:
            archive.unlink(missing_ok=True)  # buildah adds to an archive that a killed run has left
            work.detail = "write the archive"
            builder.save(image.name, archive, log_of(image))
            work.note = f"{archive.stat().st_size // 1_000_000} MB"
            work.detail = f"import {work.note}"
            runtime.load(archive)
        finally:
            archive.unlink(missing_ok=True)


def known_content(digest: str | None) -> str | None:
    """Which content version a digest of the runtime stands for, as written down when it was loaded."""
    return known().get(digest) if digest else None


def remember(digest: str | None, content: str) -> None:
    if digest is None:
        raise DriverError(
            "The cluster's container runtime does not list an image that was loaded into it just now"
        )
    path = folder() / "loaded.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(known() | {digest: content}, indent=1))
    fresh.replace(path)


def known() -> dict[str, str]:
    try:
        return dict(json.loads((folder() / "loaded.json").read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def push(registry: str, names: Sequence[str]) -> None:
    """Builds, and pushes to `registry`, e.g. `registry.example.com/team`, for clusters that pull images."""
    build(names)
    builder, registry = engine(), registry.rstrip("/")
    for name in names:
        image = IMAGES[name]
        target = f"{registry}/{image.name}"
        with step(f"push {target}") as work:
            work.follow(log_of(image))
            builder.push(image.name, target, log_of(image))
    say(f"Install with: helm upgrade --install vllm-fleet charts/vllm-fleet --set image.registry={registry}")


def explain_existing() -> None:
    say(
        "CLUSTER=existing: images cannot be loaded into a cluster that this driver has not made. If its\n"
        "nodes do not have them yet, push them to a registry that they can pull from:\n"
        "  python3 k8s/local/driver images --push REGISTRY\n"
        "and name it to the chart: --set image.registry=REGISTRY"
    )


def log_of(image: Image) -> Path:
    return folder() / "logs" / f"{image.short}.log"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="k8s/local/driver images", description="Builds the images.")
    parser.add_argument("names", nargs="*", metavar="IMAGE", help=f"of: {', '.join(IMAGES)} (default: all)")
    parser.add_argument(
        "--push", metavar="REGISTRY", help="push them there as well, e.g. registry.example.com/team"
    )
    given = parser.parse_args(arguments)
    names = given.names or list(IMAGES)
    if unknown := set(names) - set(IMAGES):
        parser.error(f"no such image: {', '.join(sorted(unknown))}. There are: {', '.join(IMAGES)}")
    if given.push:
        push(given.push, names)
    else:
        build(names)
