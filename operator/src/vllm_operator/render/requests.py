"""What a pod asks of its node, counted as the scheduler counts.

In whole numbers: `cpu` in thousandths of a core, `memory` in bytes, extended resources in pieces; nothing
else. https://kubernetes.io/docs/concepts/scheduling-eviction/pod-overhead/ and, for init containers,
https://kubernetes.io/docs/concepts/workloads/pods/init-containers/#resource-sharing-within-containers
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, Decimal
from typing import Any

_SUFFIXES = {"": Decimal(1), "m": Decimal("0.001"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}
_SUFFIXES |= {letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)}
_SUFFIXES |= {f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e([0-9]{1,2})|([numkMGTPE]|[KMGTPE]i)?)", re.ASCII)


def counted(resources: Mapping[str, Any]) -> dict[str, int]:
    """The resources that are counted; a quantity that cannot be read counts as none."""
    found = {name: _amount(value, 1000 if name == "cpu" else 1) for name, value in resources.items()}
    return {name: value for name, value in found.items() if name in ("cpu", "memory") or "/" in name}


def requested(pod: Mapping[str, Any]) -> dict[str, int]:
    """Of a pod's spec: containers and sidecars together, or the greatest init container if that is more."""
    running = _sum(_of_container(item) for item in pod.get("containers") or ())
    starting: dict[str, int] = {}
    for container in pod.get("initContainers") or ():
        own = _of_container(container)
        if container.get("restartPolicy") == "Always":
            running = _sum((running, own))
            starting = _most(starting, running)
        else:
            starting = _most(starting, _sum((own, _sidecars_before(pod, container))))
    whole = _of_container(pod)  # resources of the pod as a whole, where it has them, stand for the sum
    total = _most(running, starting) | whole
    return _sum((total, counted(pod.get("overhead") or {})))


def _sidecars_before(pod: Mapping[str, Any], container: Mapping[str, Any]) -> dict[str, int]:
    items = pod["initContainers"]
    before = items[: items.index(container)]
    return _sum(_of_container(item) for item in before if item.get("restartPolicy") == "Always")


def _of_container(container: Mapping[str, Any]) -> dict[str, int]:
    """Where no request stands, the API server takes the limit for it."""
    resources = container.get("resources") or {}
    return counted({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def _most(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one.keys() | other.keys()}


def _amount(quantity: Any, scale: int) -> int:
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        return 0
    unit = Decimal(10) ** int(found[2]) if found[2] else _SUFFIXES[found[3] or ""]
    return int((Decimal(found[1]) * unit * scale).to_integral_value(ROUND_CEILING))
