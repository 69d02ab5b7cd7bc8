"""Kubernetes Events for people: one for each change of what a model's conditions say, and no more."""

from __future__ import annotations

import datetime
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from vllm_operator import names
from vllm_operator.api.status import Reason, Status
from vllm_operator.api.v1alpha1 import Metadata
from vllm_operator.errors import ApiError, clip
from vllm_operator.kinds import EVENTS, Body, Kind

log = logging.getLogger(__name__)

_GOOD = {
    Reason.SERVING,
    Reason.SCALED_TO_ZERO,
    Reason.ACCEPTED,
    Reason.ROLLING_OUT,
    Reason.PAUSED,
    Reason.UPGRADE_PENDING,
}
REPEAT_AFTER = datetime.timedelta(minutes=10)
PASSING = {
    Reason.STARTING,
    Reason.PULLING,
    Reason.DOWNLOADING,
    Reason.LOADING,
    Reason.DRAINING,
    Reason.FORMER_OBJECT,
}


@dataclass(frozen=True)
class Event:
    type: str  # Normal or Warning
    reason: str
    message: str
    repeats: bool = False  # what may happen over and over


def transitions(before: Status, after: Status) -> Iterator[Event]:
    """What is worth an Event: another reason of Ready, a refusal, a rollout's trouble. Not passing steps."""
    for kind in ("Accepted", "Ready", "Reconciling", "Stalled"):
        old, new = before.condition(kind), after.condition(kind)
        if new is None or (old is not None and (old.status, old.reason) == (new.status, new.reason)):
            continue
        reason = Reason(new.reason)
        told = kind != "Ready" and after_ready_tells(after, reason)
        routine = reason in PASSING or (kind != "Ready" and reason in _GOOD)
        if not told and not routine:
            yield Event("Normal" if reason in _GOOD else "Warning", reason.value, new.message)


def after_ready_tells(after: Status, reason: Reason) -> bool:
    """Whether Ready has the same reason, so that one Event is enough for both conditions."""
    ready = after.condition("Ready")
    return ready is not None and ready.reason == reason.value


class Creator(Protocol):
    async def create(self, kind: Kind, body: Body) -> Body: ...


class Recorder:
    """Posts Events; one that cannot be posted is lost, since nothing depends on it.

    The same about the same model is posted once in REPEAT_AFTER: two controllers that fight over a field
    would else fill the store.
    """

    def __init__(self, api: Creator) -> None:
        self._api = api
        self._posted: dict[tuple[str, Event], datetime.datetime] = {}

    async def record(self, meta: Metadata, event: Event, now: datetime.datetime) -> None:
        if event.repeats and not self._is_news((meta.uid, event), now):
            return
        try:
            await self._api.create(EVENTS, event_body(meta, event, now))
        except ApiError as error:
            log.info("event not posted", extra={"model": str(meta.key), "error": error.message})

    def _is_news(self, event: tuple[str, Event], now: datetime.datetime) -> bool:
        self._posted = {item: at for item, at in self._posted.items() if now - at < REPEAT_AFTER}
        return self._posted.setdefault(event, now) is now


def event_body(meta: Metadata, event: Event, now: datetime.datetime) -> Body:
    moment = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{meta.name}.{uuid.uuid4().hex[:16]}", "namespace": meta.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": clip(event.message, 1000),
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }
