"""Where things lie: run state inside the clone, what is built outside it, so that a second clone does not build again."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LOCAL = ROOT / "k8s" / "local"
STATE = ROOT / ".cluster"
LOGS = STATE / "logs"
KUBECONFIG = STATE / "kubeconfig"


def cache() -> Path:
    named = os.environ.get("VLLM_FLEET_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "vllm-fleet"
