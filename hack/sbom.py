"""Writes what a release is made of into dist/sbom, as CycloneDX 1.6.

gateway.cdx.json, operator.cdx.json  Python packages of the image, from its lock file with hashes
images.cdx.json                      images that ours are built on, and those that the defaults run

What Debian's packages inside the base image are is only known when an image has been built: the release
workflow has BuildKit attach that list to each image.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm
from vllm_operator.settings import Settings

FOLDER = helm.ROOT / "dist" / "sbom"
TOOL = helm.ROOT / ".venv" / "release" / "bin" / "cyclonedx-py"
DOCKERFILES = ("Dockerfile.gateway", "operator/Dockerfile")


def python_packages(component: str) -> Path:
    target = FOLDER / f"{component}.cdx.json"
    command = [str(TOOL), "requirements", f"requirements/{component}.txt", "--output-reproducible"]
    flags = ["--pyproject", f"{component}/pyproject.toml", "--spec-version", "1.6", "-o", str(target)]
    # It warns that a lock file does not say who needs what.
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    subprocess.run([*command, *flags], cwd=helm.ROOT, check=True, env=quiet)
    return target


def base_images() -> Iterator[str]:
    """The default of every image that a Dockerfile is built on."""
    for dockerfile in DOCKERFILES:
        yield from re.findall(r"^ARG \w+_IMAGE=(\S+)$", (helm.ROOT / dockerfile).read_text(), re.MULTILINE)


def inventory() -> dict[str, Any]:
    """The images as a CycloneDX document."""
    engines = Settings().images
    version = str(helm.facts(helm.CHART)["version"])
    images = dict.fromkeys(base_images(), "required")
    images |= {engines.cuda: "optional", engines.cpu: "optional"}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "vllm-fleet", "version": version}},
        "components": [_component(image, scope) for image, scope in sorted(images.items())],
    }


def _component(image: str, scope: str) -> dict[str, str]:
    name, _, tag = image.rpartition(":")
    purl = f"pkg:docker/{name}@{tag}"
    return {"type": "container", "bom-ref": purl, "name": name, "version": tag, "scope": scope, "purl": purl}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    images = FOLDER / "images.cdx.json"
    images.write_text(json.dumps(inventory(), indent=2) + "\n")
    for path in (python_packages("gateway"), python_packages("operator"), images):
        count = len(json.loads(path.read_text())["components"])
        print(f"{path.relative_to(helm.ROOT)}: {count} components")


if __name__ == "__main__":
    main()
