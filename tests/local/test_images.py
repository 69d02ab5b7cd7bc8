"""What `make images` builds and loads, and above all what it does not build again.

Proved here, with a scripted `docker` program and a runtime that reads real archives:
- an image is built when one of its inputs changes, and at no other change;
- nothing in a Dockerfile can be copied that is no input, or left out of the build context that is one;
- what the cluster holds is loaded again only if its content is another, however it came there;
- an older tree's images stand beside the present ones, under their own tag;
- a failed build or load says why, leaves no archive behind, and the next run goes on from there;
- the machine's CA bundle and package index reach the build as secrets, never as build arguments;
- each image runs as a number that is not root, with its program as process 1.
Not proved here: buildah and debootstrap (run by `make test-e2e` on machines without Docker), Docker and kind.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path

import docker_cli
import pytest

import engines
import images
from paths import ROOT
from shell import DriverError

ALL = list(images.IMAGES)
NAMES = [image.name for image in images.IMAGES.values()]
GATEWAY = "vllm-fleet/gateway:0.1.0"
GATEWAY_CODE = "gateway/src/vllm_gateway/__init__.py"


class Runtime:
    """A containerd of one dictionary: digests by name, read from the archives that it is given."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.loaded: list[str] = []
        self.broken = False

    def load(self, archive: Path) -> None:
        if self.broken:
            raise DriverError("ctr failed: no space left on device")
        with tarfile.open(archive) as content:
            member = content.extractfile("manifest.json")
            assert member is not None
            (manifest,) = json.loads(member.read())
        for name in manifest["RepoTags"]:
            self.loaded.append(name)
            self.held[f"docker.io/{name}"] = (
                "sha256:" + hashlib.sha256(manifest["Config"].encode()).hexdigest()
            )

    def image_digest(self, reference: str) -> str | None:
        return self.held.get(reference)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the images are built from, which a test may edit."""
    root = tmp_path / "clone"
    for image in images.IMAGES.values():
        for file in image.files(ROOT):
            target = root / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    monkeypatch.setattr(images, "ROOT", root)
    return root


@pytest.fixture
def docker(tmp_path: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a `docker` that answers, with an empty cache for the driver."""
    state = tmp_path / "docker"
    state.mkdir()
    docker_cli.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("DOCKER_STATE", str(state))
    monkeypatch.setenv("VLLM_FLEET_CACHE", str(tmp_path / "cache"))
    return state


def built(docker: Path) -> list[str]:
    return [call["name"] for call in docker_cli.calls(docker) if call["do"] == "build"]


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n# edited\n")


def archives() -> list[Path]:
    return list(images.folder().glob("*.tar"))


# Building


def test_everything_is_built_once(docker: Path) -> None:
    images.build()
    images.build()
    assert built(docker) == NAMES


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (GATEWAY_CODE, [GATEWAY]),
        ("requirements/gateway.txt", [GATEWAY]),
        ("Dockerfile.gateway", [GATEWAY]),
        ("operator/pyproject.toml", ["vllm-fleet/operator:0.1.0"]),
        ("requirements/build.txt", ["vllm-fleet/operator:0.1.0", GATEWAY]),
        ("k8s/local/vllm-cpu/cuda_stubs.py", ["vllm-fleet/vllm-cpu:0.32.0"]),
    ],
)
def test_a_changed_input_rebuilds_its_images_only(
    docker: Path, clone: Path, changed: str, expected: list[str]
) -> None:
    images.build()
    edit(clone / changed)
    images.build()
    assert built(docker)[len(NAMES) :] == expected


def test_new_renamed_and_deleted_files_count(clone: Path) -> None:
    image = images.IMAGES["gateway"]
    seen = {image.content(clone, "base")}
    extra = clone / "gateway/src/vllm_gateway/extra.py"
    extra.write_text("")
    seen.add(image.content(clone, "base"))
    extra.rename(extra.with_name("other.py"))
    seen.add(image.content(clone, "base"))
    (clone / GATEWAY_CODE).unlink()
    seen.add(image.content(clone, "base"))
    assert len(seen) == 4


def test_another_base_image_is_another_content(clone: Path) -> None:
    image = images.IMAGES["gateway"]
    assert image.content(clone, "python:3.12-slim") != image.content(clone, "python:3.13-slim")


@pytest.mark.parametrize(
    "path", ["README.md", "charts/values.yaml", "gateway/src/vllm_gateway/__pycache__/x.pyc"]
)
def test_files_that_are_in_no_image_rebuild_nothing(docker: Path, clone: Path, path: str) -> None:
    images.build()
    (clone / path).parent.mkdir(parents=True, exist_ok=True)
    (clone / path).write_text("text")
    images.build()
    assert built(docker) == NAMES


def test_a_failed_build_shows_its_last_words_and_is_tried_again(docker: Path) -> None:
    (docker / "fail-build").write_text("ERROR: No matching distribution found for fastapi==0.165.0")
    with pytest.raises(DriverError, match="No matching distribution found for fastapi"):
        images.build(["gateway"])
    (docker / "fail-build").unlink()
    images.build(["gateway"])
    assert built(docker) == [GATEWAY, GATEWAY]


def test_an_unknown_name_is_refused_with_the_known_ones(
    docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        images.main(["gatway"])
    assert refused.value.code == 2
    assert "no such image: gatway. There are: operator, gateway, vllm-cpu" in capsys.readouterr().err
    assert built(docker) == []


def test_pushing_names_the_registry_to_the_chart(docker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.main(["gateway", "--push", "registry.example.com/team/"])
    target = f"registry.example.com/team/{GATEWAY}"
    pushed = [call["arguments"] for call in docker_cli.calls(docker) if call["do"] in {"tag", "push"}]
    assert pushed == [[GATEWAY, target], [target]]
    assert "--set image.registry=registry.example.com/team\n" in capsys.readouterr().out


def test_without_docker_and_root_it_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(DriverError, match=r"(?s)No Docker engine answers.*Run this as root, or start Docker"):
        engines.Buildah(tmp_path / "storage").prepare(tmp_path / "log")


# Loading


def test_the_cluster_gets_each_image_once_and_no_archive_stays(docker: Path) -> None:
    runtime = Runtime()
    images.ensure_loaded(runtime)
    images.ensure_loaded(runtime)
    assert runtime.loaded == NAMES
    assert built(docker) == NAMES
    assert archives() == []


def test_an_edit_loads_that_image_only(docker: Path, clone: Path) -> None:
    runtime = Runtime()
    images.ensure_loaded(runtime)
    edit(clone / GATEWAY_CODE)
    images.ensure_loaded(runtime)
    assert runtime.loaded == [*NAMES, GATEWAY]


def test_an_edit_taken_back_is_loaded_again(docker: Path, clone: Path) -> None:
    runtime = Runtime()
    images.ensure_loaded(runtime)
    original = (clone / GATEWAY_CODE).read_text()
    edit(clone / GATEWAY_CODE)
    images.ensure_loaded(runtime)
    (clone / GATEWAY_CODE).write_text(original)
    images.ensure_loaded(runtime)
    assert runtime.loaded == [*NAMES, GATEWAY, GATEWAY]


def test_a_new_cluster_is_loaded_without_a_build(docker: Path) -> None:
    images.ensure_loaded(Runtime())
    fresh = Runtime()
    images.ensure_loaded(fresh)
    assert fresh.loaded == NAMES
    assert built(docker) == NAMES


def test_an_image_that_another_put_under_the_name_is_replaced(docker: Path) -> None:
    runtime = Runtime()
    images.ensure_loaded(runtime)
    runtime.held[f"docker.io/{GATEWAY}"] = "sha256:" + "0" * 64
    images.ensure_loaded(runtime)
    assert runtime.loaded == [*NAMES, GATEWAY]


def test_a_failed_load_leaves_no_archive_and_is_tried_again_without_a_build(docker: Path) -> None:
    runtime = Runtime()
    runtime.broken = True
    with pytest.raises(DriverError, match="no space left on device"):
        images.ensure_loaded(runtime)
    assert archives() == []
    runtime.broken = False
    images.ensure_loaded(runtime)
    assert runtime.loaded == NAMES
    assert built(docker) == NAMES


def test_an_older_tree_is_loaded_beside_the_present_one(docker: Path, clone: Path, tmp_path: Path) -> None:
    runtime = Runtime()
    images.ensure_loaded(runtime)
    tree = tmp_path / "older"
    shutil.copytree(clone, tree)
    edit(tree / GATEWAY_CODE)
    for _ in range(2):
        images.ensure_loaded(runtime, images.older(tree, "previous"))
        images.ensure_loaded(runtime)
    older = ["vllm-fleet/operator:previous", "vllm-fleet/gateway:previous"]
    assert runtime.loaded == [*NAMES, *older]
    assert built(docker) == [*NAMES, *older]
    assert runtime.held[f"docker.io/{GATEWAY}"] != runtime.held["docker.io/vllm-fleet/gateway:previous"]


def test_a_damaged_record_costs_one_more_load(docker: Path) -> None:
    runtime = Runtime()
    images.ensure_loaded(runtime)
    (images.folder() / "loaded.json").write_text('{"sha256:')
    images.ensure_loaded(runtime)
    images.ensure_loaded(runtime)
    assert runtime.loaded == [*NAMES, *NAMES]


# Secrets


def test_the_ca_bundle_is_a_secret_and_no_argument(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "company.pem"
    bundle.write_text("-----BEGIN CERTIFICATE-----")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    for name in engines.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    images.build(["gateway"])
    (call,) = docker_cli.calls(docker)
    assert call["secrets"]["ca"] == "-----BEGIN CERTIFICATE-----"
    assert call["build_args"] == ["HTTPS_PROXY"]


def test_pip_settings_are_where_packages_come_from_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text(
        "[global]\nindex-url = https://pypi.example.com/100%/simple\ntimeout = 5\ncert = company.pem\n"
    )
    environment = {"HOME": str(tmp_path), "PIP_TIMEOUT": "60", "PIP_USER": "1", "PIP_CONFIG_FILE": ""}
    assert engines.pip_settings(environment, tmp_path / "none") == (
        "[global]\nindex-url = https://pypi.example.com/100%/simple\ntimeout = 60\n"
    )


def test_no_pip_settings_are_no_file(tmp_path: Path) -> None:
    assert engines.pip_settings({"HOME": str(tmp_path)}, tmp_path / "none") == ""


# Dockerfiles


@pytest.mark.parametrize("name", ALL)
def test_what_a_dockerfile_copies_is_an_input(name: str) -> None:
    image = images.IMAGES[name]
    inputs = {file.relative_to(ROOT) for file in image.files(ROOT)}
    for source in copied(image):
        path = Path(image.context, source)
        assert any(file == path or path in file.parents for file in inputs), f"{path} is no input of {name}"


@pytest.mark.parametrize("name", ["operator", "gateway"])
def test_every_input_passes_the_dockerignore(name: str) -> None:
    passing = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    places = {place for place in images.IMAGES[name].inputs if place != ".dockerignore"}
    assert places <= passing
    assert passing <= {place for image in images.IMAGES.values() for place in image.inputs}


@pytest.mark.parametrize("name", ALL)
def test_it_runs_as_a_number_and_its_program_is_process_1(name: str) -> None:
    final = dockerfile(images.IMAGES[name]).rpartition("\nFROM ")[2]
    assert "\nUSER 65532:65532\n" in final
    program = {"vllm-cpu": "vllm"}.get(name, f"vllm-{name}")
    assert f'\nENTRYPOINT ["{program}"]\n' in final


@pytest.mark.parametrize("name", ALL)
def test_the_tag_is_the_version_in_the_label(name: str) -> None:
    image = images.IMAGES[name]
    (version,) = re.findall(r'image\.version="([^"]+)"', dockerfile(image))
    assert image.name.endswith(f":{version}")


@pytest.mark.parametrize("part", ["operator", "gateway"])
def test_the_tag_is_the_version_of_the_package(part: str) -> None:
    project = (ROOT / part / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "([^"]+)"$', project, re.MULTILINE)
    assert images.IMAGES[part].name == f"vllm-fleet/{part}:{version}"


def dockerfile(image: images.Image) -> str:
    return (ROOT / image.dockerfile).read_text()


def copied(image: images.Image) -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile(image), re.MULTILINE)
    return [source for line in lines for source in line.split()]
