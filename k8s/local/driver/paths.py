"""Where things lie.

Three places: what is built, outside the clone, so that a second clone does not build again; the state of
this clone's cluster, inside it; and what there can be only one of on a machine, under /run, which a reboot
empties.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LOCAL = ROOT / "k8s" / "local"
STATE = ROOT / ".cluster"
BIN = STATE / "bin"
LOGS = STATE / "logs"
KUBECONFIG = STATE / "kubeconfig"
RUNTIME = Path("/run/vllm-fleet")


def cache() -> Path:
    named = os.environ.get("VLLM_FLEET_CACHE")
    return Path(named).absolute() if named else Path.home() / ".cache" / "vllm-fleet"
