"""What the cluster changes on the machine beside its network, and how each change is undone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shell import DriverError, find, output, succeeds

SYSCTL = Path("/proc/sys")
CGROUPS = Path("/sys/fs/cgroup")
WANTED_SYSCTLS = {"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1"}
KUBELET_SYSCTLS = (  # the kubelet sets these when it starts
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
KUBELET_SOCKET = Path("/var/lib/kubelet/device-plugins/kubelet.sock")
CNI_NOTES = (Path("/var/lib/cni/results"), Path("/var/lib/cni/cache/results"))
LOG_LINKS = Path("/var/log/containers")
FIXED_FOLDERS = (Path("/var/lib/kubelet"), Path("/var/lib/cni"), LOG_LINKS, Path("/run/containerd"))


def save(record: Path) -> None:
    """Writes down what the machine was like, once: a second call must not take the changed for the old."""
    if record.exists():
        return
    names = [name for name in (*WANTED_SYSCTLS, *KUBELET_SYSCTLS) if (SYSCTL / name).exists()]
    before = {
        "sysctls": {name: (SYSCTL / name).read_text().strip() for name in names},
        "absent": [str(folder) for folder in FIXED_FOLDERS if not folder.exists()],
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    fresh = record.with_suffix(".new")
    fresh.write_text(json.dumps(before))
    fresh.rename(record)


def set_sysctls() -> None:
    if not (SYSCTL / "net/bridge").exists():
        succeeds([find("modprobe") or "modprobe", "br_netfilter"])
    for name, value in WANTED_SYSCTLS.items():
        try:
            write_sysctl(name, value)
        except OSError as error:
            raise DriverError(
                f"cannot set sysctl {name.replace('/', '.')}={value}: {error.strerror}"
            ) from None


def restore(record: Path, state: Path) -> None:
    """Sets the machine back to what `save` wrote down, as far as the cluster in `state` changed it."""
    if not record.exists():
        return
    before = json.loads(record.read_text())
    for name, value in before["sysctls"].items():
        write_sysctl(name, value)
    remove_cni_notes(state)
    remove_log_links(state)
    KUBELET_SOCKET.unlink(missing_ok=True)
    for folder in before["absent"]:
        remove_empty(Path(folder))
    record.unlink()


def write_sysctl(name: str, value: str) -> None:
    path = SYSCTL / name
    if path.read_text().strip() != value:
        path.write_text(value)


def mount_points(mountinfo: str, folders: Iterable[Path]) -> list[str]:
    """The mount points below the folders, deepest and latest first, from the text of /proc/self/mountinfo."""
    found = [unescape(line.split()[4]) for line in mountinfo.splitlines()]
    roots = tuple(f"{folder}/" for folder in folders)
    return [point for point in reversed(found) if f"{point}/".startswith(roots)]


def unescape(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field)


def current_mounts(folders: Iterable[Path]) -> list[str]:
    return mount_points(Path("/proc/self/mountinfo").read_text(), folders)


def unmount(folders: Iterable[Path]) -> None:
    roots = tuple(folders)
    for point in current_mounts(roots):
        output(["umount", "--lazy", point])
    left = current_mounts(roots)
    if left:
        raise DriverError(f"still mounted: {', '.join(left)}. Unmount them, then try again")


def remove_tree(folder: Path) -> None:
    """Deletes a folder, but never through a mount: behind one lies what a pod has mounted, not ours to
    delete.
    """
    unmount([folder])
    if folder.exists():
        shutil.rmtree(folder)


def pod_cgroups() -> list[Path]:
    """The kubelet's cgroups: one for each controller where the machine has cgroup v1."""
    return [path for path in (CGROUPS / "kubepods", *CGROUPS.glob("*/kubepods")) if path.is_dir()]


def pod_processes() -> set[int]:
    found: set[int] = set()
    for cgroup in pod_cgroups():
        for path in cgroup.rglob("cgroup.procs"):
            with suppress(OSError):  # the cgroup is gone by now, and its processes with it
                found.update(map(int, path.read_text().split()))
    return found


def remove_pod_cgroups() -> None:
    """Ends what is still in the kubelet's cgroups, then removes them; they hold nothing but this cluster's
    pods.
    """
    for _ in range(50):
        left = pod_processes()
        if not left:
            break
        for pid in left:
            kill(pid)
        time.sleep(0.1)
    for cgroup in pod_cgroups():
        for path in sorted((x for x in (cgroup, *cgroup.rglob("*")) if x.is_dir()), reverse=True):
            remove_cgroup(path)


def remove_cgroup(path: Path) -> None:
    """Removes an empty cgroup; the kernel takes a moment to let go of processes that have just ended."""
    for _ in range(50):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise DriverError(f"cgroup {path} cannot be removed; what is in it: cat {path}/cgroup.procs")


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def remove_cni_notes(state: Path) -> None:
    """Deletes what libcni noted of our pods; a note names the pod's network namespace, in our folder."""
    for folder in CNI_NOTES:
        for path in folder.glob("*"):
            if f'"{state}/' in path.read_text(errors="replace"):
                path.unlink()


def remove_log_links(state: Path) -> None:
    """The kubelet links each container's log in /var/log/containers; ours point into the state folder."""
    for path in LOG_LINKS.glob("*.log"):
        if path.is_symlink() and path.readlink().is_relative_to(state):
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Deletes a folder and those in it, as far as they hold no file."""
    for path in sorted((x for x in (folder, *folder.rglob("*")) if x.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
