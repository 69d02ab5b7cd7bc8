"""The local cluster: a real Kubernetes of one node, whose programs run on this machine."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import claim
import config
import containerd
import golang
import host
import network
import tools
from config import API_URL, NODE
from console import say, step
from health import is_healthy
from kubectl import Kubectl, gpus, set_gpus, wait_ready
from paths import BIN, KUBECONFIG, LOGS, RUNTIME, STATE, cache
from pki import Authority
from process import Supervisor, resident_bytes
from shell import DriverError, debian_packages, find, lock

LOG = LOGS / "driver.log"
HEALTHY_SECONDS = 60.0
MARKER = STATE / "complete"
BEFORE = RUNTIME / "before.json"
PROGRAMS = (golang.KUBERNETES, golang.ETCD, golang.COREDNS, golang.HELM, golang.PAUSE)
COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet")
STARTED = ("containerd", "etcd", "kube-apiserver", *COMPONENTS[1:4], "coredns", "kubelet")
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "socat": "socat",
    "ip": "iproute2",
    "mount": "mount",
    "openssl": "openssl",
}
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
kubectl = Kubectl(BIN / "kubectl", KUBECONFIG)


def up(count: int) -> None:
    """Makes the cluster run: starts what does not, and from nothing where an earlier run did not end well."""
    require_root()
    with serial():
        claim.check()
        install()
        golang.ensure(PROGRAMS)
        if not is_whole() and (claim.owner() or (STATE / "pki").exists()):
            with step("clean up what an earlier run left behind"):
                clean()
        prepare()
        began = time.time()
        new_kubelet = start()
        with step("node is Ready") as work:
            wait_ready(
                kubectl, since=began if new_kubelet else 0
            )  # a kubelet sets foreign resources to 0 once
            set_gpus(kubectl, NODE, count)
            work.note = f"{count} nvidia.com/gpu (pretended)"
        MARKER.touch()


def down() -> None:
    """Removes the cluster and everything that it changed on the machine; images stay in the cache."""
    if not claim.owner() and not STATE.exists():
        say("No cluster of this clone.")
        return
    require_root()
    with serial():
        claim.check()
        with step("remove the cluster"):
            clean()
        shutil.rmtree(RUNTIME)


def status() -> None:
    programs = claim.supervisor()
    if claim.owner() != STATE:
        other = f" Another clone's does: {claim.owner()}." if claim.owner() else ""
        raise DriverError(f"No cluster of this clone runs.{other} Start one: make cluster")
    bad = [name for name in dict.fromkeys((*STARTED, *programs.names())) if not report(programs, name)]
    if bad:
        raise DriverError(f"not healthy: {', '.join(bad)}. To start what is missing: make cluster")
    say(kubectl("get", "nodes", "-o", "wide").rstrip())
    say(f"  nvidia.com/gpu: {gpus(kubectl.get('node', NODE))}")
    say(f"  export KUBECONFIG={KUBECONFIG} PATH={BIN}:$PATH")


def report(programs: Supervisor, name: str) -> bool:
    """Prints a line on a program; False if it is not well."""
    identity = programs.find(name)
    healthy = bool(identity) and is_healthy(name)
    state = "healthy" if healthy else "NOT HEALTHY" if identity else "NOT RUNNING"
    memory = resident_bytes(identity.pid) / 2**20 if identity else 0
    say(f"  {name:<24} {state:<12} {memory:5.0f} MiB  {programs.log(name)}")
    return healthy


def kubeconfig() -> Path:
    return KUBECONFIG


def load(archive: Path) -> None:
    containerd.import_image(archive)


def image_digest(reference: str) -> str | None:
    return containerd.image_digest(containerd.ctr("images", "list"), reference)


def require_root() -> None:
    if sys.platform != "linux":
        raise DriverError("the local cluster needs Linux; elsewhere use Docker (kind) or CLUSTER=existing")
    if os.geteuid() != 0:
        raise DriverError(
            "the local cluster needs root, for the kubelet and containerd.\n"
            "Use sudo -E, or a Docker engine (then kind is used), or CLUSTER=existing with a KUBECONFIG"
        )


def serial() -> AbstractContextManager[None]:
    return lock(RUNTIME / "lock", "another run of the driver")


def install() -> None:
    with step("Debian packages"):
        debian_packages(PACKAGES, LOG)
        if not any((folder / "bridge").exists() for folder in CNI_FOLDERS):
            # By its path: a `bridge` on PATH is iproute2's.
            debian_packages({str(CNI_FOLDERS[0] / "bridge"): "containernetworking-plugins"}, LOG)


def is_whole() -> bool:
    """Whether the cluster is this clone's, came up fully once, and this boot has not lost its network."""
    return claim.owner() == STATE and MARKER.exists() and network.bridge_exists()


def layout() -> config.Layout:
    programs = next(folder for folder in CNI_FOLDERS if (folder / "bridge").exists())
    return config.Layout(STATE, containerd.SOCKET, cache() / "containerd", programs)


def prepare() -> None:
    """Everything that programs need before the first of them starts."""
    if claim.owner() is None:
        refuse_strangers()
        forget()
    claim.take()
    with step("network and certificates"):
        host.save(BEFORE)
        host.set_sysctls()
        network.make_bridge()
        link_programs()
        write_credentials()


def refuse_strangers() -> None:
    """What this machine must not have already, because the cluster would take it over."""
    if host.pod_processes():
        raise DriverError("another kubelet runs pods on this machine (cgroup kubepods). Use CLUSTER=existing")
    if network.bridge_exists():
        raise DriverError(
            f"a network bridge {config.BRIDGE} exists, made by something else. "
            f"If nothing needs it: ip link delete {config.BRIDGE}"
        )
    if routes := network.foreign_routes():
        raise DriverError(
            f"this machine has routes that the cluster's addresses would hide: {', '.join(routes)}"
        )


def link_programs() -> None:
    names = {"etcd": golang.ETCD, "coredns": golang.COREDNS, "helm": golang.HELM}
    tools.link(names | dict.fromkeys((*COMPONENTS, "kubectl"), golang.KUBERNETES))


def write_credentials() -> None:
    authority = Authority(STATE / "pki", LOG)
    authority.create()
    for certificate in config.CERTIFICATES:
        authority.issue(certificate)
    for name in config.CLIENTS:
        write(Path(layout().kubeconfig(name)), authority.kubeconfig(name, API_URL), mode=0o600)
    write(KUBECONFIG, authority.kubeconfig("admin", API_URL), mode=0o600)


def write(path: Path, text: str, mode: int = 0o644) -> bool:
    """Writes a file whole or not at all; True if that changed it."""
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.touch(mode=mode)
    fresh.write_text(text)
    fresh.rename(path)
    return True


def start() -> bool:
    """Starts what does not run; True if the kubelet was among it."""
    files = config.files(layout(), api_qps(), Path("/etc/resolv.conf").read_text())
    programs = {
        name: (command, files.get(name, {}))
        for name, command in config.arguments(layout(), api_qps()).items()
    }
    with step("containerd"):
        start_containerd(*programs.pop("containerd"))
    with step("control plane"):
        for name in ("etcd", "kube-apiserver"):
            start_program(name, *programs.pop(name))
        wait_healthy("kube-apiserver")
        apply(config.objects())
        started = {name for name, (command, texts) in programs.items() if start_program(name, command, texts)}
        for name in programs:
            wait_healthy(name)
    return "kubelet" in started


def stop_one(name: str) -> None:
    """Ends one program and leaves the others alone, as a fault would; `start_one` undoes it."""
    with serial(), step(f"stop {name}"):
        claim.check()
        known_program(name)
        claim.supervisor().stop(name)


def start_one(name: str) -> None:
    with serial(), step(f"start {name}"):
        claim.check()
        known_program(name)
        start_program(name, config.arguments(layout(), api_qps())[name], {})
        wait_healthy(name)


def known_program(name: str) -> None:
    if name not in STARTED:
        raise DriverError(f"{name} is no program of the local cluster. They are: {', '.join(STARTED)}")
    if not is_whole():
        raise DriverError("No cluster of this clone runs. Start one: make cluster")


def wait_healthy(name: str) -> None:
    claim.supervisor().wait(name, lambda: is_healthy(name), HEALTHY_SECONDS)


def start_program(name: str, command: list[str], texts: dict[Path, str]) -> bool:
    changed = [write(path, text) for path, text in texts.items()]
    program = find(name) if name == "containerd" else BIN / name
    return claim.supervisor().ensure(name, [program or name, *command], restart=any(changed))


def start_containerd(command: list[str], texts: dict[Path, str]) -> None:
    programs = claim.supervisor()
    start_program("containerd", command, texts)
    programs.wait("containerd", containerd.answers, 30)
    if not MARKER.exists() and containerd.clear():  # left in its root by a cluster that was not taken down
        programs.stop("containerd")
        start_program("containerd", command, texts)
        programs.wait("containerd", containerd.answers, 30)
    if not image_digest(config.PAUSE_IMAGE):
        archive = STATE / "pause.tar"
        archive.write_bytes(containerd.pause_archive(golang.PAUSE.path().read_bytes()))
        containerd.import_image(archive)
        archive.unlink()


def apply(objects: Sequence[object]) -> None:
    """The API server answers before its own start-up hooks have made every namespace: a refusal is tried
    again.
    """
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    arguments = ("apply", "--server-side", "--force-conflicts", "-f", "-")
    for _ in range(20):
        try:
            kubectl(*arguments, text=text)
        except DriverError:
            time.sleep(0.5)
        else:
            return
    kubectl(*arguments, text=text)


def api_qps() -> int | None:
    """KUBE_API_QPS: the limit that controller-manager and scheduler set themselves (by default 20 and 50 a
    second).
    """
    text = os.environ.get("KUBE_API_QPS", "")
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise DriverError(f"KUBE_API_QPS={text} is not a whole number above 0")
    return int(text)


def clean() -> None:
    """Takes everything down, whatever state it is in.

    In this order: first what starts pods, then the pods, then the rest. Changes to the machine are undone
    only where this boot has a record of them; without one they are not this cluster's.
    """
    owned = claim.owner()
    state = owned or STATE
    MARKER.unlink(missing_ok=True)
    programs = claim.supervisor()
    for name in stop_order(programs.names()):
        if name == "containerd" and programs.find(name):
            containerd.clear()
        programs.stop(name)
    if owned:
        containerd.end_shims()
        host.remove_pod_cgroups()
        host.unmount([state, cache() / "containerd"])
        network.remove()
        host.restore(BEFORE, state)
    forget()
    host.remove_tree(state)


def stop_order(recorded: Iterable[str]) -> list[str]:
    """First what starts pods, then the pods with their runtime, then the rest from the last started to the
    first.
    """
    first = ["kwok", "kubelet", "containerd"]
    known = [*first, *(name for name in reversed(STARTED) if name not in first)]
    return [*known, *sorted(set(recorded) - set(known))]


def forget() -> None:
    """Deletes the machine-wide record, all but the lock that this very run holds."""
    for path in RUNTIME.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
