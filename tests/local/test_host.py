"""What the driver undoes on the machine, and what it must not touch.

- Mounts are those below its own folders: not a folder whose name only starts alike, not the folder's
  parent.
- Log links and CNI notes of other clusters stay; a folder that holds a file is not removed as empty.
- The machine's state is written down once, so a second `up` does not take the changed values for the old.
- A route that the cluster's addresses would hide is seen; the default route and IPv6 are none.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import host
import network

MOUNTINFO = r"""22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
30 22 0:25 / /proc rw - proc proc rw
40 22 0:30 / /home/me/fleet/.cluster/kubelet rw - tmpfs tmpfs rw
41 40 0:31 / /home/me/fleet/.cluster/kubelet/pods/1/volumes/token rw - tmpfs tmpfs rw
42 22 0:32 / /home/me/fleet/.cluster-old/kubelet rw - tmpfs tmpfs rw
43 22 0:33 / /home/me/my\040fleet/.cluster/shm rw - tmpfs tmpfs rw
"""


def test_mounts_below_a_folder_deepest_first() -> None:
    state = Path("/home/me/fleet/.cluster")
    assert host.mount_points(MOUNTINFO, [state]) == [
        f"{state}/kubelet/pods/1/volumes/token",
        f"{state}/kubelet",
    ]


def test_mounts_in_a_folder_with_a_space() -> None:
    state = Path("/home/me/my fleet/.cluster")
    assert host.mount_points(MOUNTINFO, [state]) == [f"{state}/shm"]


def test_a_mount_on_the_folder_itself_counts() -> None:
    assert host.mount_points(MOUNTINFO, [Path("/proc")]) == ["/proc"]


def test_sysctls_are_written_down_once_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SYSCTL", tmp_path / "sys")
    monkeypatch.setattr(host, "FIXED_FOLDERS", (tmp_path / "made", tmp_path / "kept"))
    monkeypatch.setattr(host, "KUBELET_SOCKET", tmp_path / "none")
    forward = tmp_path / "sys/net/ipv4/ip_forward"
    forward.parent.mkdir(parents=True)
    forward.write_text("0\n")
    (tmp_path / "kept").mkdir()
    record = tmp_path / "run" / "before.json"
    host.save(record)
    forward.write_text("1\n")
    host.save(record)
    assert json.loads(record.read_text())["sysctls"] == {"net/ipv4/ip_forward": "0"}
    (tmp_path / "made" / "results").mkdir(parents=True)
    host.restore(record, tmp_path / ".cluster")
    assert forward.read_text().strip() == "0"
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "kept").exists()
    assert not record.exists()


def test_links_and_notes_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CNI_NOTES", (tmp_path / "notes", tmp_path / "none"))
    monkeypatch.setattr(host, "LOG_LINKS", tmp_path / "links")
    (tmp_path / "notes").mkdir()
    (tmp_path / "links").mkdir()
    state = tmp_path / ".cluster"
    for name, folder in (("ours", state), ("theirs", tmp_path / ".cluster-old")):
        (tmp_path / "notes" / name).write_text(json.dumps({"sandbox": f"{folder}/netns/cni-1"}))
        (tmp_path / "links" / f"{name}.log").symlink_to(folder / "pods" / "0.log")
    host.remove_cni_notes(state)
    host.remove_log_links(state)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["theirs"]
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["theirs.log"]


def test_a_folder_with_a_file_is_not_removed_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "theirs").touch()
    host.remove_empty(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["c", "c/theirs"]


def test_a_tree_is_removed_and_one_that_is_not_there_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    (folder / "a").mkdir(parents=True)
    host.remove_tree(folder)
    host.remove_tree(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("destination", "hidden"),
    [
        ("10.244.0.0/16", True),
        ("10.96.0.10", True),
        ("10.0.0.0/8", True),
        ("10.245.0.0/24", False),
        ("192.0.2.0/24", False),
        ("default", False),
        ("fd00::/64", False),
    ],
)
def test_routes_that_the_cluster_would_hide(destination: str, *, hidden: bool) -> None:
    assert bool(network.overlaps([destination])) is hidden
