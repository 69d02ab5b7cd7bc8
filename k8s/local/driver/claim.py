"""One cluster a machine: whose it is, written where every clone looks.

The bridge, the node's address and the kubelet's cgroups exist once. A live cluster of another clone is
refused by name; a dead one (its processes gone, or its folder deleted) is somebody's rest, and the next
`up` cleans it up.
"""

from __future__ import annotations

import json
from pathlib import Path

from paths import RUNTIME, STATE
from process import Supervisor, boot_id
from shell import DriverError

OWNER = RUNTIME / "owner.json"
PIDS = RUNTIME / "pids"


def supervisor(state: Path = STATE) -> Supervisor:
    return Supervisor(PIDS, state / "logs")


def owner() -> Path | None:
    """The state folder of the cluster that this machine has, or had when its driver was last killed.

    None after a reboot, which has ended every process and undone every change to the network.
    """
    try:
        record = json.loads(OWNER.read_text())
        return Path(record["state"]) if record["boot"] == boot_id() else None
    except (OSError, ValueError, KeyError):
        return None


def check() -> None:
    """Raises DriverError if the machine has a live cluster of another clone."""
    other = owner()
    if other is None or other == STATE or not other.is_dir():
        return
    programs = supervisor()
    if any(programs.find(name) for name in programs.names()):
        raise DriverError(
            f"another clone's cluster runs on this machine, and there can be one: {other}\n"
            f"To use it: export CLUSTER=existing KUBECONFIG={other}/kubeconfig\n"
            f"To remove it: make -C {other.parent} cluster-down"
        )


def take() -> None:
    RUNTIME.mkdir(parents=True, exist_ok=True)
    fresh = OWNER.with_suffix(".new")
    fresh.write_text(json.dumps({"state": str(STATE), "boot": boot_id()}))
    fresh.rename(OWNER)
