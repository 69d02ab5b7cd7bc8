"""`render`: for each field of the spec, a VLLMModel and the manifests that come of it.

Proves: golden pairs; every field of the CRD occurs in one; every rendered flag exists in vLLM 0.32's own
parser and takes the rendered values; what must hold for every model (owner, labels, probes within the start
budget, a grace period above the drain, no service links, no token, dropped capabilities); the rollout's
choice and that it stays; the pinned image; hashes that change with any field; examples render.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm_models import model_body

from vllm_operator import names
from vllm_operator.api.crd import crd_manifest
from vllm_operator.api.parsing import parse
from vllm_operator.compare import contains
from vllm_operator.offline import to_yaml
from vllm_operator.render import pod_template_of, render
from vllm_operator.render.facts import Facts, ImagePin, LiveDeployment, Node, Taint
from vllm_operator.settings import Settings, parse_settings

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
CHILD_NAMES = defaultdict(
    lambda: "m-engine", Job="m-prefetch-", PersistentVolumeClaim="m-cache", LeaderWorkerSet="m-nodes"
)
INPUTS = sorted((ROOT / "golden" / "operator").glob("*.input.yaml"))
FLAGS: Json = json.loads((ROOT / "golden" / "vllm-0.32.0-flags.json").read_text())


def load(path: Path) -> Json:
    body: Json = yaml.safe_load(path.read_text())
    return body


def settings_of(path: Path) -> Settings:
    """Where a field needs the platform's consent, `NAME.settings.yaml` beside the input gives it."""
    beside = path.with_name(path.name.replace(".input.", ".settings."))
    return parse_settings(load(beside), str(beside)) if beside.exists() else Settings()


def rendered(path: Path) -> tuple[Json, ...]:
    settings = settings_of(path)
    return render(parse(load(path), settings.profiles), settings)


def of_kind(manifests: Iterable[Json], kind: str) -> Json:
    """The only one of its kind."""
    (found,) = [item for item in manifests if item["kind"] == kind]
    return found


def deployment(facts: Facts | None = None, settings: Settings | None = None, /, **spec: Any) -> Json:
    return of_kind(render(parse(model_body(**spec)), settings or Settings(), facts or Facts()), "Deployment")


def engine(manifest: Json) -> Json:
    container: Json = pod_template_of(manifest)["spec"]["containers"][0]
    return container


def workload(manifests: Iterable[Json]) -> Json:
    """What makes the pods."""
    return next(item for item in manifests if item["kind"] in ("Deployment", "LeaderWorkerSet"))


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name.removesuffix(".input.yaml"))
def test_golden_pairs(path: Path, golden: Callable[[Path, str], None]) -> None:
    output = path.with_name(path.name.replace(".input.", ".output."))
    golden(output, to_yaml(rendered(path)))


def test_no_golden_output_without_its_input() -> None:
    outputs = (ROOT / "golden" / "operator").glob("*.output.yaml")
    assert {path.name.replace(".output.", ".input.") for path in outputs} == {path.name for path in INPUTS}


def schema_fields(schema: Json, path: str = "spec") -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        node = inner.get("items", inner)
        yield f"{path}.{name}"
        yield from schema_fields(node, f"{path}.{name}")


def used_fields(value: Any, path: str = "spec") -> Iterator[str]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}.{name}"
        for item in inner if isinstance(inner, list) else [inner]:
            yield from used_fields(item, f"{path}.{name}")


def test_every_field_of_the_spec_has_a_golden_pair() -> None:
    schema = crd_manifest()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    used = {field for path in INPUTS for field in used_fields(load(path)["spec"])}
    assert set(schema_fields(schema)) - used == set()


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name.removesuffix(".input.yaml"))
def test_every_rendered_flag_is_one_of_vllms_and_takes_its_values(path: Path) -> None:
    args = engine(workload(rendered(path)))["args"]
    starts = [index for index, item in enumerate(args) if item.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(args)], strict=True):
        flag, values = args[start], args[start + 1 : end]
        nargs, choices = FLAGS[flag]["nargs"], FLAGS[flag]["choices"]
        assert len(values) >= 1 if nargs == "+" else len(values) == (0 if nargs == 0 else 1), (flag, values)
        assert not choices or set(values) <= {str(choice) for choice in choices}, (flag, values)


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name.removesuffix(".input.yaml"))
def test_what_holds_for_every_model(path: Path) -> None:
    model = parse(load(path), settings_of(path).profiles)
    manifests = rendered(path)
    service, deployed = of_kind(manifests, "Service"), workload(manifests)
    for manifest in manifests:
        assert manifest["metadata"]["name"].startswith(CHILD_NAMES[manifest["kind"]])
        assert manifest["metadata"]["ownerReferences"][0]["controller"] is True
        assert manifest["metadata"]["labels"]["vllm-fleet.dev/model"] == "m"
    pod = pod_template_of(deployed)
    assert contains(pod["metadata"]["labels"], service["spec"]["selector"])
    assert pod["spec"]["enableServiceLinks"] is False
    assert pod["spec"]["automountServiceAccountToken"] is False
    container = engine(deployed)
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= model.spec.start_seconds
    if deployed["kind"] == "Deployment":
        assert contains(pod["metadata"]["labels"], deployed["spec"]["selector"]["matchLabels"])
        assert deployed["spec"]["progressDeadlineSeconds"] > model.spec.start_seconds
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause + model.spec.drain_seconds
    assert contains(pod["spec"], {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]})
    variables = [item["name"] for item in container["env"]]
    assert len(variables) == len(set(variables))


def test_an_old_engine_gets_no_flag_that_it_does_not_know() -> None:
    assert "--shutdown-timeout" in engine(deployment(image="vllm/vllm-openai:v0.18.0"))["args"]
    assert "--shutdown-timeout" not in engine(deployment(image="vllm/vllm-openai:v0.17.9"))["args"]
    assert "--shutdown-timeout" in engine(deployment(image="registry:5000/vllm:nightly"))["args"]


def test_names_fit_at_their_longest() -> None:
    body = model_body("a" * 45, cache={"size": "1Gi", "prefetch": True})
    for manifest in render(parse(body), Settings()):
        assert len(manifest["metadata"]["name"]) <= 63
        assert all(len(value) <= 63 for value in manifest["metadata"]["labels"].values())


# Rollouts


def node(free: int, *taints: Taint, schedulable: bool = True, **labels: str) -> Node:
    return Node("n", labels, taints, schedulable, {"nvidia.com/gpu": free})


def surge(facts: Facts, **spec: Any) -> Any:
    return deployment(facts, **spec)["spec"]["strategy"]["rollingUpdate"]["maxSurge"]


@pytest.mark.parametrize(
    ("nodes", "spec", "wanted"),
    [
        (None, {}, 0),
        ((), {}, 0),
        ((node(0),), {}, 0),
        ((node(1),), {}, 1),
        ((node(1), node(1)), {"engine": {"tensorParallelSize": 2}}, 0),
        ((node(2),), {"engine": {"tensorParallelSize": 2}}, 1),
        ((node(1, schedulable=False),), {}, 0),
        ((node(1, Taint("nvidia.com/gpu", "present", "NoSchedule")),), {}, 1),
        ((node(1, Taint("team", "a", "NoSchedule")),), {}, 0),
        ((node(1, Taint("team", "a", "PreferNoSchedule")),), {}, 1),
        (
            (node(1, Taint("team", "a", "NoSchedule")),),
            {"scheduling": {"tolerations": [{"key": "team", "value": "a"}]}},
            1,
        ),
        ((node(1),), {"scheduling": {"nodeSelector": {"pool": "x"}}}, 0),
        ((node(1, pool="x"),), {"scheduling": {"nodeSelector": {"pool": "x"}}}, 1),
        ((node(1),), {"gpu": {"resource": "amd.com/gpu"}}, 0),
        (None, {"gpu": {"count": 0}}, 1),
        ((node(8),), {"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": "one"}]}, 0),
    ],
)
def test_auto_surges_only_where_a_spare_pod_finds_its_gpus(
    nodes: tuple[Node, ...] | None, spec: Json, wanted: int
) -> None:
    assert surge(Facts(nodes=nodes), **spec) == wanted


def roomy(gpu: int, cpu: int, memory: int, name: str = "n") -> Node:
    return Node(name, {}, (), True, {"nvidia.com/gpu": gpu, "cpu": cpu * 1000, "memory": memory * 2**30})


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ((roomy(1, 4, 32),), ""),
        ((roomy(1, 3, 32),), "no node has room for one more pod; n lacks free cpu"),
        ((roomy(1, 4, 31),), "no node has room for one more pod; n lacks free memory"),
        (
            (roomy(0, 9, 9, "a"), roomy(0, 9, 99, "b")),
            "no node has room for one more pod; b lacks free nvidia.com/gpu",
        ),
        ((roomy(1, 1, 99, "a"), roomy(9, 9, 99, "b")), ""),
        ((), "no node matches the selectors and taints"),
        (None, "free GPUs are not counted"),
    ],
)
def test_auto_says_why_it_does_not_surge(nodes: tuple[Node, ...] | None, why: str) -> None:
    resources = {"requests": {"cpu": "4", "memory": "32Gi"}}
    metadata = deployment(Facts(nodes=nodes), resources=resources)["metadata"]
    assert metadata["annotations"].get(names.ANNOTATION_ROLLOUT, "") == why
    assert surge(Facts(nodes=nodes), resources=resources) == (0 if why else 1)


def test_a_sidecar_of_the_pod_template_needs_room_too() -> None:
    sidecar = {"name": "x", "image": "x:1", "resources": {"requests": {"cpu": "8"}}}
    facts = Facts(nodes=(roomy(1, 4, 32),))
    assert surge(facts) == 1
    assert surge(facts, podTemplate={"spec": {"containers": [sidecar]}}) == 0


def test_a_model_without_gpus_surges_only_where_its_cpu_fits() -> None:
    spec: Json = {"gpu": {"count": 0}, "resources": {"requests": {"cpu": "4"}}}
    assert surge(Facts(nodes=(roomy(0, 4, 1),)), **spec) == 1
    assert surge(Facts(nodes=(roomy(0, 3, 1),)), **spec) == 0


def test_what_was_decided_for_a_template_stays_while_it_is_the_live_one() -> None:
    first = deployment(Facts(nodes=(node(1),)))
    live = LiveDeployment(
        first["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH], first["spec"]["strategy"]
    )
    why = Facts(nodes=())
    full_before = deployment(why)["metadata"]["annotations"]
    kept = LiveDeployment(
        full_before[names.ANNOTATION_TEMPLATE_HASH],
        deployment(why)["spec"]["strategy"],
        full_before[names.ANNOTATION_ROLLOUT],
    )
    assert deployment(Facts(nodes=(node(8),), live=kept)) == deployment(why)
    full = Facts(nodes=(node(0),), live=live)
    assert deployment(full) == first
    assert surge(full, engine={"maxModelLen": 9}) == 0
    assert surge(full, replicas=3) == 1


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("Surge", {"maxSurge": 1, "maxUnavailable": 0}),
        ("Recreate", {"maxSurge": 0, "maxUnavailable": "100%"}),
    ],
)
def test_an_explicit_strategy_is_always_a_rolling_update(strategy: str, wanted: Json) -> None:
    manifest = deployment(rollout={"strategy": strategy})
    assert manifest["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": wanted}


# Devices


@pytest.mark.parametrize(
    ("resource", "label"),
    [
        (None, "nvidia.com/gpu.product"),
        ("nvidia.com/gpu.shared", "nvidia.com/gpu.product"),
        ("amd.com/gpu", "amd.com/gpu.product-name"),
        ("gpu.intel.com/i915", "gpu.intel.com/product"),
        ("example.org/npu", "example.org/gpu.product"),
        ("own.org/npu", "own.org/npu-model"),
    ],
)
def test_a_product_is_looked_for_under_the_vendors_label(resource: str | None, label: str) -> None:
    settings = parse_settings({"gpu": {"productLabels": {"own.org": "own.org/npu-model"}}}, "test")
    gpu = {"product": "P"} | ({"resource": resource} if resource else {})
    pod = deployment(Facts(), settings, gpu=gpu)["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {label: "P"}


def test_a_claimed_device_is_not_hidden_from_the_engine() -> None:
    claims = [{"name": "gpu", "resourceClaimTemplateName": "one"}]
    variables = [item["name"] for item in engine(deployment(resourceClaims=claims, gpu={"count": 0}))["env"]]
    assert "NVIDIA_VISIBLE_DEVICES" not in variables
    hidden = {item["name"]: item.get("value") for item in engine(deployment(gpu={"count": 0}))["env"]}
    assert hidden["NVIDIA_VISIBLE_DEVICES"] == "void"


# Images


def test_a_newer_operator_keeps_the_default_image_that_a_model_runs() -> None:
    newer = parse_settings({"images": {"cuda": "vllm/vllm-openai:v0.33.0"}}, "test")
    pinned = Facts(pin=ImagePin("cuda", "vllm/vllm-openai:v0.32.0"))
    assert deployment(pinned, newer) == deployment()
    assert engine(deployment(pinned, newer, image="own:1"))["image"] == "own:1"
    assert engine(deployment(pinned, newer, engine={"device": "cpu"}))["image"] == newer.images.cpu
    assert engine(deployment(Facts(), newer))["image"] == "vllm/vllm-openai:v0.33.0"


# Hashes


def test_any_change_changes_the_hash_and_nothing_else_does() -> None:
    def stamp(**spec: Any) -> str:
        return str(deployment(**spec)["metadata"]["annotations"][names.ANNOTATION_HASH])

    assert stamp() == stamp()
    assert len({stamp(), stamp(replicas=2), stamp(engine={"maxModelLen": 1}), stamp(startTimeout="31m")}) == 4


def test_the_pod_carries_the_hash_of_its_template() -> None:
    manifest = deployment()
    template = manifest["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        names.ANNOTATION_TEMPLATE_HASH: manifest["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH]
    }
    scaled = deployment(replicas=5)["spec"]["template"]
    assert scaled == template
