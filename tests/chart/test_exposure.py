"""How callers reach the gateway, and who may.

Proves: an Ingress, an HTTPRoute or a Service beyond the cluster is refused in words while callers need no
key, and by each way to have keys, or to do without, it is not; the key Secret becomes the mounted file that
the gateway reads, and so does the certificate's; the Ingress keeps both nginx controllers from gathering
events and cutting streams, takes bodies as large as the gateway does, and lets the user's annotations win;
the HTTPRoute has no limit of time by default and needs a Gateway; with an autoscaler no replicas are rendered
and the budget follows its least; the pod of `helm test` calls the Service that is there, holds no right, and
shows no key.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

import helm
from vllm_gateway.settings import RequestLimits

Values = dict[str, Any]
EXPOSED: list[Values] = [
    {"ingress": {"enabled": True}},
    {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
    {"service": {"type": "LoadBalancer"}},
    {"service": {"type": "NodePort"}},
]
SAFE: list[Values] = [
    {"keysSecret": "api-keys"},
    {"config": {"auth": {"keysFile": "/etc/vllm-fleet-secrets/mine"}}},
    {"allowAnonymous": True},
]


@pytest.mark.parametrize("exposed", EXPOSED, ids=str)
def test_an_open_api_is_not_exposed(chart: helm.Helm, exposed: Values) -> None:
    with pytest.raises(helm.HelmError) as refused:
        chart.template({"gateway": exposed}, helm.Release())
    words = str(refused.value)
    section = next(iter(exposed))
    assert f"gateway.{section}." in words
    assert "callers need no key" in words
    assert "gateway.keysSecret" in words
    assert "gateway.allowAnonymous: true" in words


@pytest.mark.parametrize("safe", SAFE, ids=str)
@pytest.mark.parametrize("exposed", EXPOSED, ids=str)
def test_with_keys_or_on_demand_it_is(chart: helm.Helm, exposed: Values, safe: Values) -> None:
    assert chart.template({"gateway": exposed | safe}, helm.Release())


def gateway_file(find: Any, values: Values) -> Values:
    config_map = find("ConfigMap", "vllm-fleet-gateway", {"gateway": values})
    return dict(yaml.safe_load(config_map["data"]["gateway.yaml"]))


def test_the_key_secret_is_the_file_that_the_gateway_reads(find: Any, pods: Any) -> None:
    values = {"keysSecret": "api-keys", "secrets": [{"name": "api-keys"}, {"name": "redis"}]}
    path = gateway_file(find, values)["auth"]["keysFile"]
    spec = dict(pods({"gateway": values}))["vllm-fleet-gateway"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    secrets = {v["name"]: v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v}
    assert secrets[mounts[path]] == "api-keys"
    assert sorted(secrets.values()) == ["api-keys", "redis", "vllm-fleet-engine-keys"]


def test_keys_in_two_places_are_refused(chart: helm.Helm) -> None:
    with pytest.raises(helm.HelmError, match="both name the API keys"):
        chart.template({"gateway": SAFE[0] | SAFE[1]}, helm.Release())


@pytest.mark.parametrize("anonymous", [True, False])
def test_anonymous_callers_are_one_switch(find: Any, anonymous: bool) -> None:
    auth = gateway_file(find, {"keysSecret": "k", "allowAnonymous": anonymous})["auth"]
    assert auth["allowAnonymous"] is anonymous


def ingress(find: Any, **values: Any) -> Values:
    gateway = {"keysSecret": "k", **values, "ingress": {"enabled": True} | values.get("ingress", {})}
    return dict(find("Ingress", "vllm-fleet-gateway", {"gateway": gateway}))


def test_nginx_neither_gathers_nor_cuts(find: Any) -> None:
    annotations = ingress(find)["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io"
    assert annotations[f"{prefix}/proxy-buffering"] == "off"
    assert annotations["nginx.org/proxy-buffering"] == "False"
    for key in ("proxy-read-timeout", "proxy-send-timeout"):
        assert annotations[f"{prefix}/{key}"] == "3600"
        assert annotations[f"nginx.org/{key}"] == "3600s"


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        ({}, str(RequestLimits().upload_bytes)),
        ({"bodyBytes": 1048576}, str(RequestLimits().upload_bytes)),
        ({"bodyBytes": 1048576, "uploadBytes": 4096}, "1048576"),
        ({"bodyBytes": 1073741824}, "1073741824"),
    ],
)
def test_bodies_are_as_large_as_the_gateway_takes(find: Any, limits: Values, size: str) -> None:
    """JSON, and forms with a file, which may be larger."""
    config = {"limits": limits} if limits else {}
    annotations = ingress(find, config=config)["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == size
    assert annotations["nginx.org/client-max-body-size"] == size


def test_the_users_annotations_win(find: Any) -> None:
    mine = {"nginx.org/proxy-read-timeout": "60s", "cert-manager.io/issuer": "le"}
    annotations = ingress(find, ingress={"annotations": mine})["metadata"]["annotations"]
    assert mine.items() <= annotations.items()


@pytest.mark.parametrize("hosts", [[], ["chat.example.com", "llm.example.com"]])
def test_every_host_leads_to_the_service(find: Any, hosts: list[str]) -> None:
    spec = ingress(find, ingress={"hosts": hosts}, service={"port": 80})["spec"]
    assert [rule["host"] for rule in spec["rules"] if "host" in rule] == hosts
    assert len(spec["rules"]) == (len(hosts) or 1)
    for rule in spec["rules"]:
        (path,) = rule["http"]["paths"]
        assert path["backend"]["service"] == {"name": "vllm-fleet-gateway", "port": {"number": 80}}
        assert (path["path"], path["pathType"]) == ("/", "Prefix")


def test_a_route_never_times_out_by_itself(find: Any) -> None:
    values = {"gateway": {"keysSecret": "k", **EXPOSED[1]}}
    (rule,) = find("HTTPRoute", "vllm-fleet-gateway", values)["spec"]["rules"]
    assert rule == {
        "timeouts": {"request": "0s"},
        "backendRefs": [{"name": "vllm-fleet-gateway", "port": 3000}],
    }


def test_a_route_needs_a_gateway_to_attach_to(chart: helm.Helm) -> None:
    with pytest.raises(helm.HelmError, match=r"needs gateway\.httpRoute\.parentRefs"):
        chart.template({"gateway": {"keysSecret": "k", "httpRoute": {"enabled": True}}}, helm.Release())


def test_the_autoscaler_owns_the_replicas(find: Any) -> None:
    values = {"gateway": {"autoscaling": {"enabled": True, "maxReplicas": 5}}}
    scaler = find("HorizontalPodAutoscaler", "vllm-fleet-gateway", values)["spec"]
    deployment = find("Deployment", "vllm-fleet-gateway", values)
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert scaler["metrics"][0]["resource"]["target"] == {"type": "AverageValue", "averageValue": "700m"}
    assert find("PodDisruptionBudget", "vllm-fleet-gateway", values)


def test_the_budget_follows_the_least_number(render: Any) -> None:
    values = {"gateway": {"replicas": 5, "autoscaling": {"enabled": True, "minReplicas": 1}}}
    assert "PodDisruptionBudget" not in {manifest["kind"] for manifest in render(values)}


def test_the_test_pod_calls_the_service_that_is_there(find: Any) -> None:
    values = {"gateway": {"service": {"port": 80}, "test": {"model": "m"}}}
    pod = find("Pod", "vllm-fleet-test", values)
    service = find("Service", "vllm-fleet-gateway", values)
    (container,) = pod["spec"]["containers"]
    where = f"{service['metadata']['name']}.{service['metadata']['namespace']}"
    assert container["args"] == [f"http://{where}:{service['spec']['ports'][0]['port']}", "--model=m"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    gateway = find("Deployment", "vllm-fleet-gateway")["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == gateway["image"]


def test_the_test_pod_has_no_rights_and_no_key_in_sight(find: Any) -> None:
    values = {"gateway": {"test": {"keySecret": {"name": "s", "key": "token"}}}}
    spec = find("Pod", "vllm-fleet-test", values)["spec"]
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    reference = {"secretKeyRef": {"name": "s", "key": "token"}}
    assert container["env"] == [{"name": "API_KEY", "valueFrom": reference}]
    assert "token" not in json.dumps(container["args"] + container["command"])


TLS = {"gateway": {"keysSecret": "k", "tls": {"secretName": "cert"}, "ingress": {"enabled": True}}}


def test_with_a_certificate_everyone_is_told_to_speak_https(find: Any, chart: helm.Helm) -> None:
    annotations = find("Ingress", "vllm-fleet-gateway", TLS)["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/backend-protocol"] == "HTTPS"
    assert annotations["nginx.org/ssl-services"] == "vllm-fleet-gateway"
    assert find("Service", "vllm-fleet-gateway", TLS)["spec"]["ports"][0]["appProtocol"] == "https"
    (container,) = find("Pod", "vllm-fleet-test", TLS)["spec"]["containers"]
    assert container["args"] == ["https://vllm-fleet-gateway.vllm-fleet:3000", "--insecure"]
    assert "curl -Nk https://127.0.0.1:3000/chat/stream" in chart.notes(TLS, helm.Release())


def test_the_certificate_is_mounted_where_the_gateway_looks_for_it(find: Any, pods: Any) -> None:
    values = {"gateway": {"tls": {"secretName": "cert"}}}
    config = yaml.safe_load(find("ConfigMap", "vllm-fleet-gateway", values)["data"]["gateway.yaml"])
    spec = dict(pods(values))["vllm-fleet-gateway"]["spec"]
    secrets = {
        volume["name"]: volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume
    }
    mounts = {
        mount["mountPath"]: secrets.get(mount["name"]) for mount in spec["containers"][0]["volumeMounts"]
    }
    for key, file in (("certFile", "tls.crt"), ("keyFile", "tls.key")):
        folder, _, name = config["tls"][key].rpartition("/")
        assert (mounts[folder], name) == ("cert", file)
