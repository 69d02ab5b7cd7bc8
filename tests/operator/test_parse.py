"""`parse` takes what is right, and names every bad field with how to mend it.

Proves: defaults; each row of the table of invalid models is refused with its field; all problems at once;
advice in the messages (a near field, the type found, a duration's form); nulls; no input is quoted that could
be a secret; profiles lie under what a model says;
derived values (device, GPUs, replicas, seconds); an unreadable status, and the definition's default of one,
count as none.
Left out: that the API server refuses the same rows, which needs a real one (tests/e2e).
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm_models import InvalidCase, invalid_cases, model_body

from vllm_operator.api.crd import UNSEEN
from vllm_operator.api.parsing import identify, parse, previous_status
from vllm_operator.api.status import Status
from vllm_operator.api.values import seconds
from vllm_operator.errors import SpecError
from vllm_operator.settings import parse_settings


def problems(**spec: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse(model_body(**spec))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("case", list(invalid_cases()), ids=lambda case: case.name)
def test_invalid_models_are_refused_by_field(case: InvalidCase) -> None:
    with pytest.raises(SpecError) as caught:
        parse(case.body)
    assert any(problem.field.startswith(case.field) for problem in caught.value.problems), str(caught.value)


def test_the_table_names_each_case_once() -> None:
    names = [case.name for case in invalid_cases()]
    assert len(names) == len(set(names)) > 70


def test_a_minimal_model_gets_the_documented_defaults() -> None:
    model = parse(model_body())
    spec = model.spec
    assert (spec.device, spec.gpu_count, spec.wanted_replicas) == ("cuda", 1, 1)
    assert (spec.start_seconds, spec.drain_seconds) == (1800, 600)
    assert spec.source.hugging_face is not None
    assert model.served_names == ("m",)
    assert not model.paused


def test_all_problems_are_told_at_once() -> None:
    found = problems(replicas="3", image="a b", engine={"device": "tpu"})
    assert {item.split(":")[0] for item in found} == {"spec.replicas", "spec.image", "spec.engine.device"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"engine": {"maxModelLenght": 1}},
            "spec.engine.maxModelLenght: is no field; did you mean maxModelLen?",
        ),
        ({"replica": 1}, "spec.replica: is no field; did you mean replicas?"),
        ({"replicas": "3"}, "spec.replicas: must be an integer, not a string"),
        ({"replicas": -1}, "spec.replicas: must be greater than or equal to 0"),
        ({"startTimeout": "10 minutes"}, "spec.startTimeout: must be a duration such as 90s, 30m or 1h30m"),
        ({"gpu": {"count": 2}}, "spec.gpu.count: must be engine.tensorParallelSize times engine.pipeline"),
        (
            {"engine": {"extraArgs": ["--task=x"]}},
            "spec.engine.extraArgs[0]: vLLM no longer has --task: use engine.runner",
        ),
        ({"model": None, "replicas": 2}, "spec.model: is required"),
    ],
)
def test_messages_say_how_to_mend_it(spec: dict[str, Any], message: str) -> None:
    assert problems(**spec)[0].startswith(message)


def test_a_null_is_named_wherever_it_stands() -> None:
    body = model_body(engine={"env": [{"name": "A", "value": None}]})
    with pytest.raises(SpecError, match=r"spec\.engine\.env\[0\]\.value: must not be null"):
        parse(body)


def test_another_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="kind: must be VLLMModel"):
        parse(model_body() | {"kind": "Deployment"})
    with pytest.raises(SpecError, match="spec: is required"):
        parse({"apiVersion": "vllm-fleet.dev/v1alpha1", "kind": "VLLMModel", "metadata": {"name": "m"}})


def test_a_secret_in_the_wrong_place_is_not_quoted() -> None:
    found = problems(engine={"env": [{"name": "HF_TOKEN", "value": "hf_verysecret", "valeu": "hf_other"}]})
    assert not [item for item in found if "hf_" in item]


@pytest.mark.parametrize(
    ("spec", "device", "gpus"),
    [
        ({}, "cuda", 1),
        ({"gpu": {"count": 0}}, "cpu", 0),
        ({"engine": {"device": "cpu"}}, "cpu", 0),
        ({"engine": {"device": "cpu"}, "gpu": {"count": 1}}, "cpu", 1),
        ({"engine": {"device": "cuda"}, "gpu": {"count": 0}}, "cuda", 0),
        ({"engine": {"tensorParallelSize": 4, "pipelineParallelSize": 2}}, "cuda", 8),
    ],
)
def test_device_and_gpus_follow_from_each_other(spec: dict[str, Any], device: str, gpus: int) -> None:
    model = parse(model_body(**spec))
    assert (model.spec.device, model.spec.gpu_count) == (device, gpus)


@pytest.mark.parametrize(
    ("spec", "replicas"),
    [({"replicas": 0}, 0), ({"replicas": 3}, 3), ({"autoscaling": {"minReplicas": 0, "maxReplicas": 4}}, 1)],
)
def test_wanted_replicas(spec: dict[str, Any], replicas: int) -> None:
    assert parse(model_body(**spec)).spec.wanted_replicas == replicas


@pytest.mark.parametrize(
    ("duration", "wanted"), [("90s", 90), ("1h30m", 5400), ("1500ms", 1.5), ("1m1ms", 60.001), ("0s", 0)]
)
def test_durations(duration: str, wanted: float) -> None:
    assert seconds(duration) == pytest.approx(wanted)


PROFILES = parse_settings(
    {
        "profiles": {
            "h100": {
                "gpu": {"product": "H100", "count": 2},
                "resources": {"requests": {"cpu": "8", "memory": "64Gi"}},
                "scheduling": {
                    "nodeSelector": {"pool": "h100", "zone": "a"},
                    "tolerations": [{"key": "h100", "operator": "Exists"}],
                },
            },
            "cpu": {"gpu": {"count": 0}},
        }
    },
    "test",
).profiles


def test_a_profile_lies_under_what_the_model_says() -> None:
    own: dict[str, Any] = {
        "engine": {"tensorParallelSize": 2},
        "resources": {"requests": {"cpu": 4}},
        "scheduling": {"nodeSelector": {"zone": "b"}, "tolerations": []},
    }
    spec = parse(model_body(profile="h100", **own), PROFILES).spec
    assert (spec.gpu.product, spec.gpu_count) == ("H100", 2)
    assert spec.resources.requests == {"cpu": 4, "memory": "64Gi"}
    assert spec.scheduling.node_selector == {"pool": "h100", "zone": "b"}
    assert spec.scheduling.tolerations == ()
    assert parse(model_body(profile="cpu"), PROFILES).spec.device == "cpu"


def test_what_comes_of_a_profile_is_judged_as_a_whole() -> None:
    with pytest.raises(SpecError, match=r"spec\.gpu\.count: must be engine\.tensorParallelSize"):
        parse(model_body(profile="h100"), PROFILES)
    with pytest.raises(SpecError, match=r"spec\.gpu: must be an object, not a list"):
        parse(model_body(profile="h100", gpu=[]), PROFILES)


def test_an_unknown_profile_is_named_with_those_that_exist() -> None:
    with pytest.raises(SpecError, match=r"spec\.profile: is no profile .* \(known: cpu, h100\)"):
        parse(model_body(profile="a100"), PROFILES)
    assert problems(profile="a100")[0].startswith(
        "spec.profile: is no profile of the operator's settings (known: none)"
    )


def test_a_model_that_was_never_applied_has_placeholders() -> None:
    body = model_body()
    del body["metadata"]["namespace"]
    meta = identify(body)
    assert meta.key == ("default", "m")
    assert set(meta.uid) == {"0", "-"}


def test_a_status_that_cannot_be_read_counts_as_none() -> None:
    assert previous_status(model_body() | {"status": {"conditions": "broken"}}) == Status()
    assert previous_status(model_body() | {"status": {"replicas": 2, "later": 1}}).replicas == 2


def test_the_definitions_default_of_a_status_counts_as_none() -> None:
    assert previous_status(model_body() | {"status": UNSEEN}) == Status()


def test_the_annotation_pauses_unless_it_says_false() -> None:
    for value, paused in (("true", True), ("until friday", True), ("false", False)):
        body = model_body()
        body["metadata"]["annotations"] = {"vllm-fleet.dev/paused": value}
        assert parse(body).paused is paused
