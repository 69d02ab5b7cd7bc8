"""The checks and descriptions of a release.

Proves: release-check is content with this tree; it names each of the places when that one alone disagrees, a
changelog without a date, and a tag that is another version; audit tells a flaw, a package that could not be
looked up and a broken tool apart, by exit code and in words; the inventory of images is the Dockerfiles' and
the operator's; both charts are packed whole; compose.yaml runs the gateway and the engine that the rest of
this repository names, and lets streams finish.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import audit
import helm
import release_check
import sbom
from vllm_gateway.settings import Settings as GatewaySettings
from vllm_gateway.settings import parse_duration
from vllm_operator.settings import Settings

PLACES = [
    ("charts/vllm-fleet/Chart.yaml", r"(?m)^appVersion: .*", "appVersion: 9.9.9"),
    ("charts/vllm-models/Chart.yaml", r"(?m)^version: .*", "version: 9.9.9"),
    ("charts/vllm-models/Chart.yaml", r"(?m)^appVersion: .*", "appVersion: 9.9.9"),
    ("operator/pyproject.toml", r'(?m)^version = ".*"', 'version = "9.9.9"'),
    ("gateway/pyproject.toml", r'(?m)^version = ".*"', 'version = "9.9.9"'),
    ("operator/src/vllm_operator/__init__.py", r'__version__ = ".*"', '__version__ = "9.9.9"'),
    ("gateway/src/vllm_gateway/__init__.py", r'__version__ = ".*"', '__version__ = "9.9.9"'),
    ("operator/Dockerfile", r'image\.version="[^"]*"', 'image.version="9.9.9"'),
    ("Dockerfile.gateway", r'image\.version="[^"]*"', 'image.version="9.9.9"'),
    ("Dockerfile.gateway", r"vllm-fleet/gateway:\S+", "vllm-fleet/gateway:9.9.9"),
    ("operator/Dockerfile", r"vllm-fleet/operator:\S+", "vllm-fleet/operator:9.9.9"),
    ("k8s/install.yaml", r"vllm-fleet/gateway:[\d.]+", "vllm-fleet/gateway:9.9.9"),
    ("k8s/install.yaml", r"vllm-fleet/operator:[\d.]+", "vllm-fleet/operator:9.9.9"),
    ("k8s/compose.yaml", r"vllm-fleet/gateway:[\d.]+", "vllm-fleet/gateway:9.9.9"),
    ("k8s/compose.yaml", r"vllm-fleet/gateway:[\d.]+", "another/image:1"),
    ("CHANGELOG.md", r"(?m)^## .*", "## 9.9.9 (unreleased)"),
    ("charts/vllm-fleet/Chart.yaml", r"(?m)^version: .*", "version: latest"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the files that carry the version."""
    files = {"CHANGELOG.md", *(file for file, _, _ in PLACES), *release_check.IMAGES}
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(helm.ROOT / file, tmp_path / file)
    return tmp_path


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1, path
    path.write_text(text)


def version() -> str:
    return str(helm.facts(helm.CHART)["version"])


def test_this_tree_agrees() -> None:
    assert list(release_check.complaints(helm.ROOT)) == []


@pytest.mark.parametrize(("file", "pattern", "replacement"), PLACES, ids=lambda value: str(value)[:40])
def test_each_place_is_looked_at(tree: Path, file: str, pattern: str, replacement: str) -> None:
    edit(tree / file, pattern, replacement)
    found = list(release_check.complaints(tree))
    assert found
    assert any(file in complaint for complaint in found)


def test_a_tag_asks_for_a_date_and_its_own_version(tree: Path) -> None:
    edit(tree / "CHANGELOG.md", r"(?m)^## .*", f"## {version()} (unreleased)")
    (undated,) = release_check.complaints(tree, f"v{version()}")
    assert "has no date" in undated
    edit(tree / "CHANGELOG.md", r"(?m)^## .*", f"## {version()} (2026-12-01)")
    assert list(release_check.complaints(tree, f"v{version()}")) == []
    assert list(release_check.complaints(tree, "v9.9.9")) == [f"the tag v9.9.9 is not v{version()}"]


CLEAN = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


@pytest.mark.parametrize(
    ("dependencies", "code", "words"),
    [
        ([CLEAN], 0, "1 packages, no known vulnerability"),
        ([CLEAN, FLAWED], 1, "b 2: CVE-1, fixed in 3"),
        ([CLEAN, UNKNOWN], 2, "1 packages could not be looked up: c"),
        ([FLAWED, UNKNOWN], 1, "1 packages could not be looked up: c"),
    ],
)
def test_audit_tells_what_it_could_not_show(
    tmp_path: Path, capsys: Any, dependencies: list[Any], code: int, words: str
) -> None:
    """Around pip-audit's own output format, as version 2.10 writes it."""
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"dependencies": dependencies, "fixes": []}))
    says = [sys.executable, "-c", f"print(open({str(report)!r}).read())"]
    assert audit.main(["requirements/gateway.txt"], says) == code
    assert words in capsys.readouterr().out


def test_an_audit_that_breaks_is_no_success(capsys: Any) -> None:
    breaks = [sys.executable, "-c", "import sys; sys.exit('no route to host')"]
    assert audit.main([], breaks) == 2
    assert "pip-audit gave no report: no route to host" in capsys.readouterr().err


def test_the_inventory_names_the_images_that_are_used() -> None:
    components = {c["name"]: c for c in sbom.inventory()["components"]}
    engines = Settings().images
    named = {f"{c['name']}:{c['version']}" for c in components.values()}
    assert named == {"python:3.12-slim", engines.cuda, engines.cpu}
    assert components["python"]["scope"] == "required"


@pytest.mark.parametrize("chart", [helm.CHART, helm.MODELS_CHART], ids=lambda chart: chart.name)
def test_a_packed_chart_is_whole(tmp_path: Path, chart: Path) -> None:
    archive = helm.package(chart, tmp_path)
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    present = {str(path.relative_to(chart)) for path in chart.rglob("*") if path.is_file()}
    assert names == present
    assert archive.name == f"{chart.name}-{version()}.tgz"


def compose() -> Any:
    return yaml.safe_load((helm.ROOT / "k8s" / "compose.yaml").read_text())["services"]


def test_compose_runs_the_same_images() -> None:
    assert compose()["gateway"]["image"] == f"vllm-fleet/gateway:{version()}"
    assert compose()["vllm"]["image"] == Settings().images.cuda
    build = compose()["gateway"]["build"]
    assert (helm.ROOT / "k8s" / build["context"] / build["dockerfile"]).resolve().exists()


def test_compose_points_the_gateway_at_the_engine_and_lets_streams_finish() -> None:
    services, settings = compose(), GatewaySettings()
    assert services["gateway"]["environment"]["VLLM_URL"] == "http://vllm:8000"
    assert services["gateway"]["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert f":{settings.management_port}/readyz" in services["gateway"]["healthcheck"]["test"][-1]
    grace = parse_duration(services["gateway"]["stop_grace_period"])
    assert grace > settings.shutdown_delay + settings.drain_timeout
    drain = services["vllm"]["command"][services["vllm"]["command"].index("--shutdown-timeout") + 1]
    assert parse_duration(services["vllm"]["stop_grace_period"]) > float(drain)


def test_compose_uses_flags_that_vllm_has() -> None:
    flags = json.loads((helm.ROOT / "tests" / "golden" / "vllm-0.32.0-flags.json").read_text())
    given = {word for word in compose()["vllm"]["command"] if word.startswith("--")}
    assert given <= flags.keys()
