"""How long a model was not Ready, as the metric counts it.

Proves: it is from the moment that Ready was False to the one that it is True; a model that stays as it was,
that loses its readiness or that is Ready when first seen counts nothing.
"""

from __future__ import annotations

import pytest

from vllm_operator.api.status import Status
from vllm_operator.reconcile import seconds_to_ready


@pytest.mark.parametrize(
    ("before", "after", "seconds"),
    [
        (("False", "01:00:00"), ("True", "01:02:30"), 150),
        (("True", "01:00:00"), ("True", "01:00:00"), None),
        (("True", "01:00:00"), ("False", "01:02:30"), None),
        (None, ("True", "01:02:30"), None),
    ],
)
def test_the_time_to_ready_is_from_unready_to_ready(
    before: tuple[str, str] | None, after: tuple[str, str], seconds: float | None
) -> None:
    def status(told: tuple[str, str] | None) -> Status:
        ready = {"type": "Ready", "reason": "Serving", "status": told and told[0]}
        moment = {"lastTransitionTime": f"2026-11-23T{told[1]}Z"} if told else {}
        return Status.model_validate({"conditions": (ready | moment,) if told else ()})

    assert seconds_to_ready(status(before), status(after)) == seconds
