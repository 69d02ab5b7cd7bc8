"""Which cluster is used, and whose it is.

- CLUSTER decides; without it the last choice holds, so that an engine started later does not orphan a
  cluster.
- A live cluster of another clone is refused with its folder and the command to remove it; a dead one, one
  of an earlier boot, and one whose folder is gone are not.
- Numbers from the environment are refused by name when they make no sense.
- One program of the local cluster can be stopped and started; an unknown one is refused with the list, and
  other clusters' programs are left alone.
- Images: what `ctr` lists is read by exact name, and the pause image is the same bytes every time.
"""

from __future__ import annotations

import calendar
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import claim
import clusters
import config
import containerd
import kubectl
import kwok
import local
from paths import STATE
from process import Supervisor, boot_id
from shell import DriverError, lock


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clusters, "CHOICE", tmp_path / "choice")
    monkeypatch.setattr(claim, "OWNER", tmp_path / "owner.json")
    monkeypatch.setattr(clusters, "GPU_COUNT", tmp_path / "gpus")
    for name in ("CLUSTER", "GPUS", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_last_choice_holds_and_the_environment_beats_it(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state / "choice").write_text("kind\n")
    assert clusters.choose() == "kind"
    monkeypatch.setenv("CLUSTER", "local")
    assert clusters.choose() == "local"


def test_without_a_docker_engine_the_cluster_is_local(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state / "docker").write_text("#!/bin/sh\nexit 1\n")
    (state / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(state), prepend=":")
    assert clusters.choose() == "local"
    (state / "docker").write_text("#!/bin/sh\nexit 0\n")
    assert clusters.choose() == "kind"


def test_a_local_cluster_that_never_came_up_is_still_the_choice(state: Path) -> None:
    claim.OWNER.write_text(json.dumps({"state": str(STATE), "boot": boot_id()}))
    assert not (state / "choice").exists()
    assert clusters.choose() == "local"


@pytest.mark.usefixtures("state")
def test_an_unknown_kind_of_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER", "minikube")
    with pytest.raises(DriverError, match="CLUSTER=minikube is none of: existing, kind, local"):
        clusters.choose()


def test_only_programs_of_the_local_cluster_are_stopped(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state / "choice").write_text("kind\n")
    for act in (clusters.stop_program, clusters.start_program):
        with pytest.raises(DriverError, match="for the programs of the local cluster"):
            act("kube-apiserver")
    monkeypatch.setenv("CLUSTER", "local")
    monkeypatch.setattr(local, "RUNTIME", state)
    for act in (clusters.stop_program, clusters.start_program):
        with pytest.raises(
            DriverError, match=r"redis is no program of the local cluster\. They are: containerd"
        ):
            act("redis")
        with pytest.raises(DriverError, match="No cluster of this clone runs"):
            act("kube-apiserver")


def test_a_program_is_stopped_and_started_as_it_was(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = ["/bin/sleep", "60"]
    programs = Supervisor(state / "pids", state / "logs")
    monkeypatch.setenv("CLUSTER", "local")
    monkeypatch.setattr(local, "RUNTIME", state)
    monkeypatch.setattr(local, "is_whole", lambda: True)
    monkeypatch.setattr(local, "layout", lambda: None)
    monkeypatch.setattr(claim, "supervisor", lambda: programs)
    monkeypatch.setattr(config, "arguments", lambda *_: {"coredns": sleep[1:], "etcd": sleep[1:]})
    monkeypatch.setattr(local, "BIN", state)
    monkeypatch.setattr(local, "is_healthy", lambda _: True)
    for name in ("coredns", "etcd"):
        (state / name).symlink_to(sleep[0])
        programs.start(name, [state / name, *sleep[1:]])
    before = programs.find("etcd")
    try:
        clusters.stop_program("coredns")
        assert programs.find("coredns") is None
        clusters.start_program("coredns")
        assert programs.find("coredns")
        assert programs.find("etcd") == before
    finally:
        for name in ("coredns", "etcd"):
            programs.stop(name, seconds=0.1)


def test_gpu_count_from_the_environment_then_the_last_request_then_two(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clusters.gpu_count() == 2
    (state / "gpus").write_text("5")
    assert clusters.gpu_count() == 5
    monkeypatch.setenv("GPUS", "0")
    assert clusters.gpu_count() == 0


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("text", ["two", "-1", "65", "1.5"])
def test_a_bad_gpu_count_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUS", text)
    with pytest.raises(DriverError, match=f"GPUS={text}"):
        clusters.gpu_count()


def test_a_folder_that_is_no_older_tree_is_refused(state: Path) -> None:
    with pytest.raises(DriverError, match="no tree of this repository"):
        clusters.load_older(state, "previous")


def test_an_existing_cluster_is_never_changed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER", "existing")
    with pytest.raises(DriverError, match="changes no node"):
        clusters.set_gpu_count(1)
    monkeypatch.setenv("KUBECONFIG", str(state / "missing"))
    with pytest.raises(DriverError, match="there is no kubeconfig"):
        clusters.kubeconfig()
    archive = state / "a.tar"
    archive.touch()
    with pytest.raises(DriverError, match="registry"):
        clusters.load(archive)


def test_a_gpu_patch_escapes_the_name() -> None:
    operations = json.loads(kubectl.gpu_patch(3))
    assert [x["path"] for x in operations] == [
        "/status/capacity/nvidia.com~1gpu",
        "/status/allocatable/nvidia.com~1gpu",
    ]
    assert {x["value"] for x in operations} == {"3"}


@pytest.mark.parametrize(
    ("status", "heartbeat", "ready"),
    [
        ("True", "2026-11-22T10:00:00Z", True),
        ("True", "2026-11-22T09:59:59Z", False),
        ("False", "2026-11-22T10:00:00Z", False),
    ],
)
def test_a_node_is_ready_by_word_of_its_present_kubelet(status: str, heartbeat: str, *, ready: bool) -> None:
    conditions = [
        {"type": "DiskPressure", "status": "False"},
        {"type": "Ready", "status": status, "lastHeartbeatTime": heartbeat},
    ]
    since = calendar.timegm((2026, 11, 22, 10, 0, 0))
    assert kubectl.is_ready({"status": {"conditions": conditions}}, since) is ready
    assert not kubectl.is_ready({"status": {}})


def test_a_fake_node_takes_only_pods_that_tolerate_it() -> None:
    node = kwok.fake_node(7, 8)
    assert node["spec"]["taints"] == [kwok.TAINT]
    assert node["metadata"]["annotations"] == {"kwok.x-k8s.io/node": "fake"}
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "8"


class Machine:
    """The machine-wide record in a folder of its own, with one program that runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = Supervisor(folder / "pids", folder / "logs")
        self.programs.start("kubelet", ["/bin/sleep", "60"])

    def owned_by(self, state: Path, boot: str | None = None) -> None:
        (self.folder / "owner.json").write_text(json.dumps({"state": str(state), "boot": boot or boot_id()}))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(tmp_path / "run")
    monkeypatch.setattr(claim, "OWNER", machine.folder / "owner.json")
    monkeypatch.setattr(claim, "PIDS", machine.folder / "pids")
    monkeypatch.setattr(claim, "STATE", tmp_path / "mine")
    yield machine
    machine.programs.stop("kubelet")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs" / ".cluster"
    folder.mkdir(parents=True)
    return folder


def test_a_live_cluster_of_another_clone_is_refused(machine: Machine, other: Path) -> None:
    machine.owned_by(other)
    with pytest.raises(DriverError, match=f"(?s){other}.*make -C {other.parent} cluster-down"):
        claim.check()


def test_a_dead_cluster_of_another_clone_is_not(machine: Machine, other: Path) -> None:
    machine.owned_by(other)
    machine.programs.stop("kubelet")
    claim.check()
    assert claim.owner() == other


def test_nor_one_whose_folder_is_gone(machine: Machine, tmp_path: Path) -> None:
    machine.owned_by(tmp_path / "deleted" / ".cluster")
    claim.check()


def test_nor_ones_own(machine: Machine, tmp_path: Path) -> None:
    machine.owned_by(tmp_path / "mine")
    claim.check()


def test_a_record_of_an_earlier_boot_or_a_broken_one_is_none(machine: Machine, other: Path) -> None:
    machine.owned_by(other, boot="an earlier one")
    assert claim.owner() is None
    claim.OWNER.write_text("{")
    assert claim.owner() is None


LISTING = """REF TYPE DIGEST SIZE PLATFORMS LABELS
docker.io/vllm-fleet/operator:0.1.0 application/vnd.oci.image.manifest.v1+json sha256:aa 9.9 MiB linux/amd64 -
docker.io/vllm-fleet/operator:0.1.0-old application/vnd.oci.image.manifest.v1+json sha256:bb 9 MiB - -
"""


def test_an_image_is_found_by_its_exact_name() -> None:
    assert containerd.image_digest(LISTING, "docker.io/vllm-fleet/operator:0.1.0") == "sha256:aa"
    assert containerd.image_digest(LISTING, "docker.io/vllm-fleet/operator") is None


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (
            ["/usr/bin/containerd-shim-runc-v2", "-namespace", "k8s.io", "-address", str(containerd.SOCKET)],
            True,
        ),
        (["/usr/bin/containerd-shim-runc-v2", "-address", "/run/containerd/containerd.sock"], False),
        (["/usr/bin/ctr", "-address", str(containerd.SOCKET)], False),
        ([], False),
    ],
)
def test_a_shim_is_ours_by_its_socket(arguments: list[str], *, ours: bool) -> None:
    assert containerd.is_shim(arguments) is ours


def test_the_pause_image_is_whole_and_reproducible() -> None:
    archive = containerd.pause_archive(b"program")
    assert archive == containerd.pause_archive(b"program")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        blobs = {member.name: read(tar, member) for member in tar.getmembers()}
    manifest = follow(blobs, json.loads(blobs["index.json"])["manifests"][0])
    config = follow(blobs, json.loads(manifest)["config"])
    layer = follow(blobs, json.loads(manifest)["layers"][0])
    assert json.loads(config)["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert [(member.name, member.mode) for member in tar.getmembers()] == [("pause", 0o755)]


def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    assert content
    return content.read()


def follow(blobs: dict[str, bytes], descriptor: dict[str, Any]) -> bytes:
    blob = blobs[f"blobs/{descriptor['digest'].replace(':', '/')}"]
    assert descriptor["size"] == len(blob)
    assert descriptor["digest"] == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    return blob


def test_a_lock_whose_file_was_deleted_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock(path, "nobody"):
        path.unlink()
        with lock(path, "nobody"):
            assert path.exists()
