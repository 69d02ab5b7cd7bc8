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
    """A node, what no pod on it has asked for and what it has in all, in the units of render.requests."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Taint, ...]
    schedulable: bool
    free: Mapping[str, int]
    offers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Holder:
    """A pod that holds some of a node's resource, and how much."""

    namespace: str
    name: str
    count: int


@dataclass(frozen=True)
class GoodTemplate:
    """A pod template that has served, as it stood in the Deployment, and of which generation it was."""

    generation: int
    template_hash: str
    template: Manifest


@dataclass(frozen=True)
class RolledBack:
    """The pod template that failed and was taken back, of which generation it was, and why."""

    template_hash: str
    generation: int
    why: str


@dataclass(frozen=True)
class LiveDeployment:
    """What stands in the cluster, and what earlier decisions left there. See annotations.py for those."""

    template_hash: str
    strategy: Mapping[str, Any]
    why: str = ""
    template: Manifest | None = None
    good: GoodTemplate | None = None
    rolled_back: RolledBack | None = None
    upgrade: str = ""
    secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)


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

    `failed`: the live pod template has just been found to fail, with nothing else serving. `unedited`: the
    spec has not changed since it was last acted on, and pods serve; so what changes them is the operator's.
    `secrets`: resourceVersion by name of the namespace's Secrets, None where the operator may not see them.
    `engine_key` is empty where engines ask for none.
    """

    nodes: tuple[Node, ...] | None = None
    live: LiveDeployment | None = None
    pin: ImagePin | None = None
    failed: RolledBack | None = None
    unedited: bool = False
    secrets: Mapping[str, str] | None = None
    claim: LiveClaim | None = None
    jobs: Mapping[str, LiveJob] = field(default_factory=dict)
    engine_key: str = field(default="", repr=False)


NOTHING_KNOWN = Facts()
