"""What `render` and `observe` may know of the cluster, read beforehand and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Taint:
    key: str
    value: str
    effect: str


@dataclass(frozen=True)
class Node:
    """A node and what no pod on it has asked for, in the units of render.requests."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Taint, ...]
    schedulable: bool
    free: Mapping[str, int]


@dataclass(frozen=True)
class LiveDeployment:
    """What a rollout in progress was decided on: the pod template's hash and the strategy as it stands."""

    template_hash: str
    strategy: Mapping[str, Any]
    why: str = ""


@dataclass(frozen=True)
class ImagePin:
    """The default image that a model got when it first ran, and the device that it was the default for."""

    device: str
    image: str


@dataclass(frozen=True)
class LiveClaim:
    """A cache's claim as it stands. `created` is a timestamp; `least` the smallest size it can ask for."""

    created: str
    storage_class: str
    access_modes: tuple[str, ...]
    least: str


@dataclass(frozen=True)
class LiveJob:
    """A prefetch Job: of which pod template it was made, and whether it has done its work."""

    created: str
    template_hash: str
    is_complete: bool


@dataclass(frozen=True)
class Facts:
    """`nodes` is None where the operator may not list nodes or does not count GPUs. `jobs` are by name.
    `engine_key` is empty where engines ask for none.
    """

    nodes: tuple[Node, ...] | None = None
    live: LiveDeployment | None = None
    pin: ImagePin | None = None
    claim: LiveClaim | None = None
    jobs: Mapping[str, LiveJob] = field(default_factory=dict)
    engine_key: str = field(default="", repr=False)


NOTHING_KNOWN = Facts()
