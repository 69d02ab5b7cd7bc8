"""What builds images: Docker where an engine answers, else buildah, which needs no daemon, but root."""

from __future__ import annotations

import configparser
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import base_image
from shell import DriverError, debian_packages, find, output, run, succeeds

PYTHON_IMAGE = "python:3.12-slim"
CA_BUNDLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")  # environment variables that name one
SYSTEM_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
    "proxy",
)
PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap", "iptables": "iptables"}


@dataclass(frozen=True)
class Build:
    """What one build needs: absolute paths, the image's name, the labels it gets."""

    name: str
    dockerfile: Path
    context: Path
    labels: Mapping[str, str]
    keep_layers: bool = True

    def arguments(self) -> list[str]:
        labels = [f"--label={key}={value}" for key, value in self.labels.items()]
        return [f"--tag={self.name}", f"--file={self.dockerfile}", *labels]


class Engine(Protocol):
    """Builds images and keeps them. `base` identifies the Python image that they stand on."""

    @property
    def base(self) -> str: ...
    def prepare(self, log: Path) -> None: ...
    def build(self, build: Build, log: Path) -> None: ...
    def label(self, name: str, label: str) -> str | None: ...
    def save(self, name: str, archive: Path, log: Path) -> None: ...
    def push(self, name: str, target: str, log: Path) -> None: ...


class Docker:
    """The Docker engine that `docker` speaks to."""

    base = PYTHON_IMAGE

    def prepare(self, log: Path) -> None:
        """Nothing: Docker pulls the Python image itself."""

    def build(self, build: Build, log: Path) -> None:
        proxies = [f"--build-arg={name}" for name in PROXIES if os.environ.get(name)]
        with secrets() as files:
            given = [f"--secret=id={name},src={file}" for name, file in files.items()]
            options = [*build.arguments(), *proxies, *given]
            run(["docker", "build", *options, build.context], log, env={"DOCKER_BUILDKIT": "1"})

    def label(self, name: str, label: str) -> str | None:
        return inspect(
            ["docker", "image", "inspect", "--format", f'{{{{index .Config.Labels "{label}"}}}}', name]
        )

    def save(self, name: str, archive: Path, log: Path) -> None:
        run(["docker", "save", "--output", archive, name], log)

    def push(self, name: str, target: str, log: Path) -> None:
        run(["docker", "tag", name, target], log)
        run(["docker", "push", target], log)


@dataclass(frozen=True)
class Buildah:
    """buildah in a chroot, with its images in `storage`; the Python image is made from Debian's packages."""

    storage: Path

    @property
    def base(self) -> str:
        return base_image.NAME

    def command(self, *arguments: str | Path) -> list[str | Path]:
        roots = [f"--root={self.storage}", f"--runroot={self.storage}-run", "--storage-driver=overlay"]
        return [find("buildah") or "buildah", *roots, *arguments]

    def prepare(self, log: Path) -> None:
        if os.geteuid() != 0:
            raise DriverError(
                "No Docker engine answers. Without one, images are built by buildah on a base made by\n"
                "debootstrap, and both need root. Run this as root, or start Docker."
            )
        debian_packages(PACKAGES, log)
        self.clear()
        base_image.ensure(self.command, log)

    def clear(self) -> None:
        """Removes what a build that was killed has left: gigabytes of containers and half-written blobs."""
        succeeds(self.command("rm", "--all"))
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    @property
    def scratch(self) -> Path:
        return self.storage.with_name(f"{self.storage.name}-tmp")

    def build(self, build: Build, log: Path) -> None:
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--force-rm", "--format=docker"]
        options += [
            "--layers" if build.keep_layers else "--layers=false",
            f"--build-arg=PYTHON_IMAGE={self.base}",
        ]
        before = self.image_id(build.name)
        with secrets() as files:
            options += [f"--secret=id={name},src={file}" for name, file in files.items()]
            run(
                self.command("bud", *options, *build.arguments(), build.context),
                log,
                env={"TMPDIR": str(self.scratch)},
            )
        if before and before != self.image_id(build.name):
            succeeds(self.command("rmi", before))  # nothing names it any more; gone already is as good

    def image_id(self, name: str) -> str | None:
        return inspect(self.command("inspect", "--type=image", "--format", "{{.FromImageID}}", name))

    def label(self, name: str, label: str) -> str | None:
        template = f'{{{{index .Docker.Config.Labels "{label}"}}}}'
        return inspect(self.command("inspect", "--type=image", "--format", template, name))

    def save(self, name: str, archive: Path, log: Path) -> None:
        run(self.command("push", name, f"docker-archive:{archive}:docker.io/{name}"), log)

    def push(self, name: str, target: str, log: Path) -> None:
        run(self.command("push", name, f"docker://{target}"), log)


def choose(storage: Path) -> Engine:
    return Docker() if find("docker") and succeeds(["docker", "info"]) else Buildah(storage)


def inspect(command: Sequence[str | Path]) -> str | None:
    """What the command prints; None where there is no such image, label or command."""
    if not find(str(command[0])):
        return None
    try:
        return output(command).strip() or None
    except DriverError:
        return None


@contextmanager
def secrets() -> Iterator[dict[str, Path]]:
    """Files for the secrets that every Dockerfile here takes: this machine's CA bundle and pip settings.

    Secrets leave nothing in the image, and a build where one is missing works without it.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        if bundle := ca_bundle():
            found["ca"] = bundle
        if settings := pip_settings():
            found["pip"] = Path(folder, "pip.conf")
            found["pip"].write_text(settings)
        yield found


def ca_bundle() -> Path | None:
    named = [Path(os.environ[name]) for name in CA_BUNDLES if os.environ.get(name)]
    return next((path for path in [*named, SYSTEM_CA_BUNDLE] if path.is_file()), None)


def pip_settings(environment: Mapping[str, str] = os.environ, system: Path = Path("/etc/pip.conf")) -> str:
    """A pip.conf of where this machine's pip gets packages from; empty where nothing is set.

    Files and precedence: https://pip.pypa.io/en/stable/topics/configuration/
    """
    home = Path(environment.get("HOME", "/"))
    named = environment.get("PIP_CONFIG_FILE", "")
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([system, home / ".pip/pip.conf", home / ".config/pip/pip.conf", named])
    kept = []
    for key in PIP_SETTINGS:
        filed = parser.get("global", key, fallback="")
        if value := environment.get(f"PIP_{key.upper().replace('-', '_')}", filed):
            kept.append(f"{key} = {value}")
    return "\n".join(["[global]", *kept, ""]) if kept else ""
