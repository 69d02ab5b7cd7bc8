"""What the cluster changes on the machine, and how each change is undone: sysctls, bridge, nft tables,
mounts, cgroups.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from config import BRIDGE, BRIDGE_ADDRESS, POD_SUBNET, SERVICE_SUBNET
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
NFT_TABLES = ("ip vllm-fleet", "ip kube-proxy", "ip6 kube-proxy")
FORWARD_RULES = tuple(
    ["FORWARD", flag, BRIDGE, "-m", "comment", "--comment", "vllm-fleet", "-j", "ACCEPT"]
    for flag in ("-i", "-o")
)
MASQUERADE = f"""
table ip vllm-fleet
delete table ip vllm-fleet
table ip vllm-fleet {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr {POD_SUBNET} ip daddr != {{ {POD_SUBNET}, {SERVICE_SUBNET}, 224.0.0.0/4 }} masquerade
  }}
}}
"""


def save_sysctls(record: Path) -> None:
    """Writes down what the cluster will change, once: a second call must not take the changed values for
    the old.
    """
    if record.exists():
        return
    names = [name for name in (*WANTED_SYSCTLS, *KUBELET_SYSCTLS) if (SYSCTL / name).exists()]
    record.parent.mkdir(parents=True, exist_ok=True)
    fresh = record.with_suffix(".new")
    fresh.write_text(json.dumps({name: (SYSCTL / name).read_text().strip() for name in names}))
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


def restore_sysctls(record: Path) -> None:
    if not record.exists():
        return
    for name, value in json.loads(record.read_text()).items():
        write_sysctl(name, value)
    record.unlink()


def write_sysctl(name: str, value: str) -> None:
    path = SYSCTL / name
    if path.read_text().strip() != value:
        path.write_text(value)


def make_bridge() -> None:
    """The bridge before everything else: its address is the node's, and the API server listens on it."""
    ip = find("ip") or "ip"
    if not bridge_exists():
        output([ip, "link", "add", BRIDGE, "address", "0a:58:0a:f4:00:01", "type", "bridge"])
    output([ip, "address", "replace", BRIDGE_ADDRESS, "dev", BRIDGE])
    output([ip, "link", "set", BRIDGE, "up"])
    output([find("nft") or "nft", "-f", "-"], text=MASQUERADE)
    allow_forwarding()


def bridge_exists() -> bool:
    return Path("/sys/class/net", BRIDGE).exists()


def allow_forwarding() -> None:
    """Lets pods through a firewall that drops forwarded packets by default, as Docker sets it up; touches
    no other.
    """
    iptables = find("iptables")
    if not iptables or "-P FORWARD DROP" not in output([iptables, "-S", "FORWARD"]):
        return
    for rule in FORWARD_RULES:
        if not succeeds([iptables, "-C", *rule]):
            output([iptables, "-I", *rule])


def remove_network() -> None:
    iptables, nft, ip = find("iptables"), find("nft"), find("ip") or "ip"
    if iptables and "vllm-fleet" in output([iptables, "-S", "FORWARD"]):
        for rule in FORWARD_RULES:
            succeeds([iptables, "-D", *rule])
    tables = output([nft, "list", "tables"]) if nft else ""
    for table in NFT_TABLES:
        if f"table {table}\n" in tables:
            output([nft or "nft", "delete", "table", *table.split()])
    if bridge_exists():
        output([ip, "link", "delete", BRIDGE])


def overlaps(addresses: Iterable[str]) -> list[str]:
    """Which of the machine's routes (`ip -j route` destinations) the cluster's subnets would hide."""
    import ipaddress

    ours = [ipaddress.ip_network(subnet) for subnet in (POD_SUBNET, SERVICE_SUBNET)]
    theirs = [ipaddress.ip_network(x, strict=False) for x in addresses if re.match(r"[\d.]+(/\d+)?$", x)]
    return [str(network) for network in theirs if any(network.overlaps(subnet) for subnet in ours)]


def foreign_routes() -> list[str]:
    routes = json.loads(output([find("ip") or "ip", "-j", "-4", "route"]))
    return overlaps(route["dst"] for route in routes if route.get("dev") != BRIDGE)


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
    return {
        int(pid)
        for cgroup in pod_cgroups()
        for path in cgroup.rglob("cgroup.procs")
        for pid in path.read_text().split()
    }


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
        for path in sorted((x for x in cgroup.rglob("*") if x.is_dir()), reverse=True):
            path.rmdir()
        cgroup.rmdir()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def remove_cni_results() -> None:
    """libcni keeps each attachment's result in a folder that no setting moves; ours are named after our
    network.
    """
    for folder in (Path("/var/lib/cni/results"), Path("/var/lib/cni/cache/results")):
        for path in folder.glob("vllm-fleet-*"):
            path.unlink()
        for parent in (folder, *folder.parents[:2]):
            if parent.name in {"results", "cache", "cni"} and parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def remove_log_links(pods: Path) -> None:
    """The kubelet links each container's log in /var/log/containers; ours point into the pods' log folder."""
    folder = Path("/var/log/containers")
    for path in folder.glob("*.log"):
        if path.is_symlink() and path.readlink().is_relative_to(pods):
            path.unlink()
