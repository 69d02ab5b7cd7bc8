"""Fails where two places that carry the version of a release disagree.

    python hack/release_check.py [TAG]

The version is the chart's. With a tag (v0.1.0), as in the release workflow, it must be that, and the
changelog must have its date: an untagged tree may say "(unreleased)".
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
OURS = re.compile(r"vllm-fleet/(?:operator|gateway):([\w.-]+)")
SEMVER = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")
COMPONENTS = {"operator": "operator/Dockerfile", "gateway": "Dockerfile.gateway"}
# Files that name our images with a tag.
IMAGES = ("k8s/install.yaml", "k8s/compose.yaml", "k8s/local/driver/images.py", *COMPONENTS.values())


def chart(root: Path, name: str) -> dict[str, str]:
    return dict(yaml.safe_load((root / "charts" / name / "Chart.yaml").read_text()))


def versions(root: Path) -> Iterator[tuple[str, str]]:
    """Each place that carries the version, with what it says; "" where it says nothing."""
    for name in ("vllm-fleet", "vllm-models"):
        for key in ("version", "appVersion"):
            yield f"charts/{name}/Chart.yaml: {key}", str(chart(root, name)[key])
    for component, dockerfile in COMPONENTS.items():
        project = tomllib.loads((root / component / "pyproject.toml").read_text())["project"]
        yield f"{component}/pyproject.toml", project["version"]
        module = f"{component}/src/vllm_{component}/__init__.py"
        yield module, module_version(root / module)
        label = re.search(r'image\.version="([^"]*)"', (root / dockerfile).read_text())
        yield f"{dockerfile}: image.version", label[1] if label else ""
    for path in IMAGES:
        tags = OURS.findall((root / path).read_text())
        yield from ((f"{path}: image tag", tag) for tag in dict.fromkeys(tags))
        if not tags:
            yield f"{path}: image tag", ""


def module_version(path: Path) -> str:
    """`__version__` of a module, which is not imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    return ""


def changelog(root: Path, version: str, *, tagged: bool) -> Iterator[str]:
    """What is wrong with the first entry of CHANGELOG.md."""
    first = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    heading = first[1] if first else ""
    found, _, state = heading.partition(" ")
    if found != version:
        yield f"CHANGELOG.md: the first entry is {heading!r}, not of {version}"
    elif tagged and not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", state):
        yield f"CHANGELOG.md: {heading!r} has no date: write ## {version} (YYYY-MM-DD)"


def complaints(root: Path, tag: str = "") -> Iterator[str]:
    version = str(chart(root, "vllm-fleet")["version"])
    if not SEMVER.fullmatch(version):
        yield f"charts/vllm-fleet/Chart.yaml: {version!r} is no semantic version"
    for place, found in versions(root):
        if found != version:
            yield f"{place}: {found or 'nothing'}, not {version}"
    yield from changelog(root, version, tagged=bool(tag))
    if tag and tag != f"v{version}":
        yield f"the tag {tag} is not v{version}"


def main(arguments: list[str]) -> int:
    found = list(complaints(ROOT, *arguments[:1]))
    print(*found, sep="\n", end="\n" if found else "")
    if not found:
        print(f"release-check: {chart(ROOT, 'vllm-fleet')['version']} everywhere")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
