"""What the operator writes to its log: one event a line, and never a secret.

Proves: in both formats, no credential of a variable's value, of the engine's last words, of the API server's
refusal, of another hand's edit or of an exception gets into a line, a status or an Event while the operator
does all of this; a line is one JSON object with time, level, event and facts; long values are clipped.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
from kube_api import VLLM_MODELS
from operator_rig import DEPLOYMENTS, EVENTS, Rig

from vllm_operator import logs

SECRETS = ("hf_AbCdEfGhIjKlMn", "t0psecret", "eyJhbGciOi")


@pytest.fixture(params=["json", "text"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    style: Literal["json", "text"] = request.param
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonFormatter() if style == "json" else logs.TextFormatter())
    root, level = logging.getLogger("vllm_operator"), logging.getLogger("vllm_operator").level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield written
    root.removeHandler(handler)
    root.setLevel(level)


async def test_no_secret_is_told_whatever_happens(rig: Rig, log: io.StringIO) -> None:
    variable = {"name": "MY_MODE", "value": "t0psecret"}
    rig.model(engine={"env": [variable]})
    await rig.reconcile()
    containers = rig.deployment()["spec"]["template"]["spec"]["containers"]
    next(item for item in containers[0]["env"] if item["name"] == "MY_MODE")["value"] = "t0psecret-too"
    containers[0]["args"] = ["--api-key=t0psecret", "--hf-token", "t0psecret"]
    patch = {"spec": {"template": {"spec": {"containers": containers}}}}
    rig.api.patch(DEPLOYMENTS, "ns", "m-engine", patch)
    await rig.reconcile()
    last = {"terminated": {"exitCode": 1, "message": "OSError: 401 for token=t0psecret hf_AbCdEfGhIjKlMn"}}
    crashed = {"name": "engine", "ready": False, "restartCount": 3, "state": {}, "lastState": last}
    rig.pod(ready=False, containerStatuses=[crashed])
    await rig.reconcile()
    words = 'env[0].value: Invalid value: "hf_AbCdEfGhIjKlMn": Authorization: Bearer eyJhbGciOi.x'
    rig.api.fault("PATCH", "/deployments", 422, message=words)
    rig.edit(engine={"env": [variable], "maxModelLen": 64})
    await rig.reconcile()
    assert "drift repaired" in log.getvalue()
    assert "InvalidSpec" in log.getvalue()
    told = log.getvalue() + str(rig.api.objects(EVENTS)) + str(rig.api.get(VLLM_MODELS, "ns", "m")["status"])
    assert "[redacted]" in told
    for secret in SECRETS:
        assert secret not in told


def test_nor_is_one_in_an_exception(log: io.StringIO) -> None:
    logger = logging.getLogger("vllm_operator.test")
    try:
        int("https://user:t0psecret@registry.example/v2")
    except ValueError:
        logger.exception("failed with token=t0psecret", extra={"error": "password: 't0psecret'"})
    assert "ValueError" in log.getvalue()
    assert "t0psecret" not in log.getvalue()


def test_a_line_is_one_event_with_its_facts() -> None:
    facts = {"model": "ns/m", "failures": 2, "detail": "x" * 5000}
    record = logging.makeLogRecord({"name": "n", "levelno": 20, "levelname": "INFO", "msg": "a\nb"} | facts)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["event"], line["model"], line["failures"]) == ("info", "a\nb", "ns/m", 2)
    assert len(line["detail"]) == logs.MAX_VALUE
    assert line["time"].endswith("Z")
