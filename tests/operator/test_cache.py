"""`spec.cache`: the claim, the Job that downloads before the pods start, and what waits for it.

Proves: a claim that cannot become what is asked for is refused with what to do, and one that can grow is not;
a cache of one node is rolled out in place; the Job is restricted, has the engine's environment and no token
in its arguments, runs where the engine may, beside it if the claim asks for that; it is named after what it
downloads; it is made anew for another claim and, until it is done, for another template; pods that need it
wait, others do not; each way in which it fails has its reason and words. What it runs: test_prefetch_script.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm_models import model_body

from vllm_operator import names
from vllm_operator.api.parsing import parse
from vllm_operator.api.status import Reason
from vllm_operator.errors import SpecError
from vllm_operator.observe.prefetch import prefetch_finding
from vllm_operator.render import held_back, render
from vllm_operator.render.claim import live_claim
from vllm_operator.render.facts import Facts, LiveClaim, LiveDeployment, LiveJob
from vllm_operator.render.prefetch_script import NO_REVISION, NO_SPACE, NOT_FOUND, REFUSED
from vllm_operator.settings import Settings

Json = dict[str, Any]
CLAIM = LiveClaim("2026-01-01T00:00:00Z", "fast", ("ReadWriteOnce",), "100Gi")
PREFETCH = {"size": "100Gi", "prefetch": True}


def manifests(facts: Facts | None = None, **spec: Any) -> dict[str, Json]:
    made = render(parse(model_body(**spec)), Settings(), facts or Facts())
    return {manifest["kind"]: manifest for manifest in made}


def job(facts: Facts | None = None, **spec: Any) -> Json:
    return manifests(facts, **{"cache": PREFETCH, **spec})["Job"]


def template_hash(manifest: Json) -> str:
    return str(manifest["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH])


# The claim


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        (
            {"size": "50Gi"},
            "spec.cache.size: a claim never shrinks: set 100Gi or more, or delete the claim m-",
        ),
        ({"size": "100Gi", "storageClassName": "slow"}, "spec.cache.storageClassName: a claim's class never"),
        (
            {"size": "100Gi", "accessModes": ["ReadWriteMany"]},
            "spec.cache.accessModes: a claim's modes never change: set [ReadWriteOnce], or delete",
        ),
    ],
)
def test_what_a_claim_can_never_become_is_refused(cache: Json, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        manifests(Facts(claim=CLAIM), cache=cache)
    (problem,) = caught.value.problems
    assert str(problem).startswith(told)


@pytest.mark.parametrize(
    "cache", [{"size": "100Gi"}, {"size": "0.2Ti"}, {"size": "100Gi", "storageClassName": "fast"}]
)
def test_what_it_is_or_can_grow_into_is_not(cache: Json) -> None:
    claim = manifests(Facts(claim=CLAIM), cache=cache)["PersistentVolumeClaim"]
    assert claim["spec"]["resources"]["requests"] == {"storage": cache["size"]}


@pytest.mark.parametrize(
    ("asked", "has", "least"), [("10Gi", "20Gi", "10Gi"), ("20Gi", "10Gi", "10Gi"), ("10Gi", None, "10Gi")]
)
def test_a_claim_may_have_more_than_it_asked_for_and_less(asked: str, has: str | None, least: str) -> None:
    status = {"status": {"capacity": {"storage": has}}} if has else {}
    body = {"metadata": {}, "spec": {"resources": {"requests": {"storage": asked}}}, **status}
    found = live_claim(body)
    assert found is not None
    assert found.least == least
    assert live_claim(None) is None


def test_a_claim_of_ones_own_is_mounted_and_never_made() -> None:
    made = manifests(cache={"claimName": "theirs"})
    assert "PersistentVolumeClaim" not in made
    volumes = made["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "theirs"}} in volumes


def test_a_cache_of_one_node_is_rolled_out_in_place_and_says_why() -> None:
    made = manifests(cache={"size": "1Gi"}, gpu={"count": 0})["Deployment"]
    assert made["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert "ReadWriteOnce" in made["metadata"]["annotations"][names.ANNOTATION_ROLLOUT]
    shared = {"size": "1Gi", "accessModes": ["ReadWriteMany"]}
    assert manifests(cache=shared, gpu={"count": 0})["Deployment"]["spec"]["strategy"]["rollingUpdate"][
        "maxSurge"
    ]


# The Job


def test_the_job_is_restricted_and_its_token_only_in_the_environment() -> None:
    hub = {"huggingFace": {"tokenSecret": {"name": "hf"}}}
    pod = job(source=hub, podTemplate={"spec": {"containers": [{"name": "x", "image": "i"}]}})["spec"][
        "template"
    ]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert [item["name"] for item in (*pod["initContainers"], *pod["containers"])] == ["plan", "fetch"]
    for container in (*pod["initContainers"], *pod["containers"]):
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
        assert "nvidia.com/gpu" not in str(container["resources"])
        env = {item["name"]: item for item in container["env"]}
        assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token"}
        assert env["HF_HUB_OFFLINE"]["value"] == "0"
        assert container["command"][:2] == ["python3", "-c"]
        assert "hf_" not in str(container["args"])


def test_the_engine_is_offline_only_after_a_prefetch() -> None:
    def offline(**spec: Any) -> str:
        container = manifests(**spec)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        return str({item["name"]: item.get("value") for item in container["env"]}.get("HF_HUB_OFFLINE"))

    assert offline(cache={"size": "1Gi"}) == "None"
    assert offline(cache=PREFETCH) == "1"
    assert offline(cache=PREFETCH, engine={"env": [{"name": "HF_HUB_OFFLINE", "value": "0"}]}) == "0"


def test_the_job_has_what_the_platform_gave_the_engine() -> None:
    patch = {
        "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
        "spec": {
            "dnsPolicy": "None",
            "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
            "containers": [
                {
                    "name": "engine",
                    "env": [{"name": "SSL_CERT_FILE", "value": "/ca/ca.crt"}],
                    "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
                }
            ],
        },
    }
    template = job(podTemplate=patch)["spec"]["template"]
    (fetch,) = template["spec"]["containers"]
    assert template["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert template["spec"]["dnsPolicy"] == "None"
    assert {"name": "SSL_CERT_FILE", "value": "/ca/ca.crt"} in fetch["env"]
    mounted = {item["name"] for item in fetch["volumeMounts"]}
    assert mounted == {item["name"] for item in template["spec"]["volumes"]} == {"ca", "cache", "home", "tmp"}


def test_a_mirror_of_the_hub_is_for_the_job_and_for_the_engine() -> None:
    mirror = {"name": "HF_ENDPOINT", "value": "https://hub.example.com"}
    made = manifests(cache=PREFETCH, engine={"env": [mirror]})
    pods = [made[kind]["spec"]["template"]["spec"] for kind in ("Job", "Deployment")]
    containers = [item for pod in pods for item in (*pod.get("initContainers", ()), *pod["containers"])]
    assert [mirror in item["env"] for item in containers] == [True] * 3


def test_it_runs_where_the_engine_may_and_with_a_claim_of_one_node_beside_it() -> None:
    node: Json = {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
    }
    scheduling = {"nodeSelector": {"zone": "a"}, "affinity": {**node, "podAntiAffinity": {"x": []}}}
    pod = job(scheduling=scheduling)["spec"]["template"]
    assert pod["spec"]["nodeSelector"] == {"zone": "a"}
    (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert pod["spec"]["affinity"] == {**node, "podAffinity": pod["spec"]["affinity"]["podAffinity"]}
    assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    shared = job(scheduling=scheduling, cache={**PREFETCH, "accessModes": ["ReadWriteMany"]})
    assert shared["spec"]["template"]["spec"]["affinity"] == node


def test_the_engines_service_does_not_select_it() -> None:
    made = manifests(cache=PREFETCH)
    labels = made["Job"]["spec"]["template"]["metadata"]["labels"]
    assert not made["Service"]["spec"]["selector"].items() <= labels.items()


def test_its_name_is_what_it_downloads_and_nothing_else() -> None:
    def name(**spec: Any) -> str:
        return str(job(**spec)["metadata"]["name"])

    lora = [{"name": "a", "source": {"huggingFace": {"id": "acme/lora"}}}]
    other = [{"name": "b", "source": {"local": {"path": "/x"}}}]
    assert name() == name(engine={"maxModelLen": 9}) == name(image="own:1") == name(adapters=other)
    revision = {"huggingFace": {"revision": "v2"}}
    assert len({name(), name(model="org/other"), name(source=revision), name(adapters=lora)}) == 4


# What waits for what


def facts_with(made: dict[str, Json], *, complete: bool, created: str = "2026-01-02T00:00:00Z") -> Facts:
    live = LiveJob(created, template_hash(made["Job"]), complete)
    return Facts(claim=CLAIM, jobs={made["Job"]["metadata"]["name"]: live})


def test_pods_wait_until_the_job_is_done_and_the_job_then_stays() -> None:
    model, made = parse(model_body(cache=PREFETCH)), manifests(cache=PREFETCH)
    for facts, kept in (
        (Facts(), "Deployment"),
        (facts_with(made, complete=False), "Deployment"),
        (facts_with(made, complete=True), "Job"),
    ):
        found = render(model, Settings(), facts)
        assert [item["kind"] for item in held_back(model.spec, found, facts)] == [kept]


def test_pods_that_run_already_are_not_held_back() -> None:
    model = parse(model_body(cache=PREFETCH))
    running = Facts(live=LiveDeployment(template_hash(manifests(cache=PREFETCH)["Deployment"]), {}))
    assert held_back(model.spec, render(model, Settings(), running), running) == []


def test_a_job_that_is_out_of_date_is_left_out_so_that_it_is_made_anew() -> None:
    made = manifests(cache=PREFETCH)
    other_engine = {"cache": PREFETCH, "engine": {"env": [{"name": "HF_ENDPOINT", "value": "http://m"}]}}
    assert "Job" in manifests(facts_with(made, complete=False), cache=PREFETCH)
    assert "Job" not in manifests(facts_with(made, complete=False), **other_engine)
    assert "Job" in manifests(facts_with(made, complete=True), **other_engine)
    former_claim = facts_with(made, complete=True, created="2025-12-31T00:00:00Z")
    assert "Job" not in manifests(former_claim, cache=PREFETCH)


# What its pod says


def pod(plan: Json | None = None, fetch: Json | None = None, **status: Any) -> Json:
    def container(state: Json | None) -> list[Json]:
        return [{"name": "c", "ready": False, "restartCount": 0, "state": {}} | state] if state else []

    states = {"initContainerStatuses": container(plan), "containerStatuses": container(fetch)}
    meta = {"creationTimestamp": "2026-01-01T00:00:00Z", "labels": {}}
    return {
        "metadata": meta,
        "spec": {},
        "status": {"startTime": meta["creationTimestamp"], **states, **status},
    }


def ended(code: int, message: str = "", **more: Any) -> Json:
    return {"state": {"terminated": {"exitCode": code, "message": message, **more}}}


PLANNED = ended(0, "16.1 GB in 12 files")
WAITS = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}


@pytest.mark.parametrize(
    ("found", "reason", "words"),
    [
        ([], Reason.DOWNLOADING, "about to begin"),
        ([pod(conditions=[WAITS])], Reason.UNSCHEDULABLE, "0/3 nodes"),
        ([pod({"state": {"running": {}}})], Reason.DOWNLOADING, "the Hub is asked"),
        (
            [pod(PLANNED, {"state": {"running": {"startedAt": "2026-01-01T12:01:00Z"}}})],
            Reason.DOWNLOADING,
            "16.1 GB in 12 files since 12:01:00 UTC",
        ),
        (
            [pod(PLANNED, {"state": {"waiting": {"reason": "PodInitializing"}}})],
            Reason.DOWNLOADING,
            "16.1 GB in 12 files",
        ),
        (
            [pod(PLANNED, {"state": {"waiting": {"reason": "CreateContainerError", "message": "no"}}})],
            Reason.ENGINE_ERROR,
            "CreateContainerError: no",
        ),
        ([pod(PLANNED, ended(0))], Reason.DOWNLOADING, "16.1 GB in 12 files are there, and pods may start"),
        ([pod({"state": {"waiting": {"reason": "ErrImagePull"}}})], Reason.IMAGE_PULL_FAILED, "ErrImagePull"),
        (
            [pod(ended(REFUSED, "Hugging Face refuses x"))],
            Reason.MODEL_ACCESS_DENIED,
            "x; check source.huggingFace.tok",
        ),
        ([pod(ended(NOT_FOUND, "no x"))], Reason.MODEL_ACCESS_DENIED, "no x; check spec.model"),
        ([pod(ended(NO_REVISION, "no y"))], Reason.DOWNLOAD_FAILED, "check source.huggingFace.revision"),
        ([pod(PLANNED, ended(NO_SPACE, "the cache is full"))], Reason.DOWNLOAD_FAILED, "raise cache.size"),
        (
            [pod(ended(1, "ConnectError: x"))],
            Reason.DOWNLOADING,
            "failed and is tried again: ConnectError: x",
        ),
        ([pod(ended(137, reason="OOMKilled"))], Reason.DOWNLOADING, "the kernel killed the download"),
        (
            [
                pod(
                    PLANNED,
                    {"state": {"running": {}}, "restartCount": 3, "lastState": ended(1, "e")["state"]},
                )
            ],
            Reason.DOWNLOADING,
            "has been tried 3 times, and is again: e",
        ),
        ([pod(ended(REFUSED, "with hf_abcdefghijkl"))], Reason.MODEL_ACCESS_DENIED, "[redacted]"),
    ],
)
def test_how_far_the_download_is_or_why_there_is_none(found: list[Json], reason: Reason, words: str) -> None:
    finding = prefetch_finding(found)
    assert finding.reason is reason
    assert words in finding.message


def test_a_pod_that_is_being_deleted_is_not_asked() -> None:
    gone = pod(ended(REFUSED, "old"))
    gone["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert prefetch_finding([gone]).reason is Reason.DOWNLOADING
