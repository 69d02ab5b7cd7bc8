"""What the chart renders, over a matrix of values.

Proves: `helm lint --strict` is content; every object is labelled and stands in the release's namespace; no
name is too long; the gateway's grace period is shutdownDelay + drainTimeout + 15 s; images by registry, tag
and digest; a changed configuration rolls its pods and no others; a new chart version alone rolls none;
budgets only where two pods make them hold; monitors only where their API is, or where asked for; each
monitor's and Service's port exists in the pods that it selects; the engine's labels and port are the
operator's; what the demo's pods ask for fits on two cores, and the autoscaler does not depend on it; pull
secrets and placement reach every pod; the definition is kept on uninstall; NOTES name what was installed and
the next three commands.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import helm
import promql
from vllm_operator import names

Values = dict[str, Any]
PLAIN = helm.Release()
MATRIX: dict[str, Values] = yaml.safe_load(Path(__file__).with_name("matrix.yaml").read_text())


@pytest.fixture(params=list(MATRIX.values()), ids=list(MATRIX))
def values(request: pytest.FixtureRequest) -> Values:
    return dict(request.param)


def test_lint_is_strictly_content(chart: helm.Helm, values: Values) -> None:
    assert chart.lint(values) == []


def test_every_object_is_labelled_and_in_a_namespace(render: Any, values: Values) -> None:
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    for manifest in render(values):
        metadata = manifest["metadata"]
        where = {"vllm-fleet", *values.get("watchNamespaces", ())}
        assert manifest["kind"] in cluster_wide or metadata["namespace"] in where, metadata
        assert metadata["labels"]["app.kubernetes.io/instance"] == "vllm-fleet"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "vllm-fleet"
        assert metadata["labels"]["app.kubernetes.io/component"]
        assert values.get("commonLabels", {}).items() <= metadata["labels"].items()


def test_no_object_is_rendered_twice(render: Any, values: Values) -> None:
    ids = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in render(values)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["r", "vllm-fleet", "a-release-name-of-fifty-three-characters-which-is-all"])
def test_names_hold_the_release_and_fit(render: Any, name: str) -> None:
    for manifest in render({}, helm.Release(name=name)):
        full = manifest["metadata"]["name"]
        assert len(full) <= 63
        assert full.startswith(name[:30]) or manifest["kind"] == "CustomResourceDefinition"


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        ({}, 10 + 600 + 15),
        ({"shutdownDelay": "5s"}, 5 + 600 + 15),
        ({"shutdownDelay": "0s", "drainTimeout": "1h30m"}, 5400 + 15),
        ({"shutdownDelay": "1m30s", "drainTimeout": "24h"}, 90 + 86400 + 15),
    ],
)
def test_grace_period_is_the_sum_of_what_stopping_takes(find: Any, config: Values, seconds: int) -> None:
    deployment = find("Deployment", "vllm-fleet-gateway", {"gateway": {"config": config}})
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == seconds


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, "vllm-fleet/gateway:0.1.0"),
        ({"tag": "1.2.3"}, "vllm-fleet/gateway:1.2.3"),
        ({"tag": "1.2.3", "digest": f"sha256:{'a' * 64}"}, f"vllm-fleet/gateway@sha256:{'a' * 64}"),
        ({"repository": "mine/gw"}, "mine/gw:0.1.0"),
    ],
)
@pytest.mark.parametrize("registry", ["", "ghcr.example.com", "ghcr.example.com/mirror/"])
def test_image_by_registry_tag_and_digest(find: Any, image: Values, expected: str, registry: str) -> None:
    values = {"image": {"registry": registry}, "gateway": {"image": image}}
    (container,) = find("Deployment", "vllm-fleet-gateway", values)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == (f"{registry.rstrip('/')}/{expected}" if registry else expected)


def test_a_changed_config_rolls_its_own_pods_only(pods: Any) -> None:
    before = dict(pods())
    after = dict(pods({"gateway": {"config": {"drainTimeout": "11m"}}}))
    assert before["vllm-fleet-operator"] == after["vllm-fleet-operator"]
    checksums = [
        p["vllm-fleet-gateway"]["metadata"]["annotations"]["checksum/config"] for p in (before, after)
    ]
    assert checksums[0] != checksums[1]


def test_a_pod_template_holds_no_chart_version(pods: Any) -> None:
    for _, template in pods():
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & template["metadata"]["labels"].keys()


def test_rollout_of_the_gateway_never_takes_a_serving_pod_first(find: Any) -> None:
    strategy = find("Deployment", "vllm-fleet-gateway")["spec"]["strategy"]
    assert strategy == {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_budgets_only_where_they_can_hold(render: Any) -> None:
    def budgets(values: Values) -> set[str]:
        return {m["metadata"]["name"] for m in render(values) if m["kind"] == "PodDisruptionBudget"}

    assert budgets({}) == {"vllm-fleet-gateway"}
    assert budgets({"gateway": {"replicas": 1}}) == set()
    assert budgets({"operator": {"replicas": 2}}) == {"vllm-fleet-gateway", "vllm-fleet-operator"}


@pytest.mark.parametrize(
    ("wanted", "release", "rendered"),
    [
        ("auto", helm.Release(api_versions=("monitoring.coreos.com/v1",)), True),
        ("auto", PLAIN, False),
        (True, PLAIN, True),
        (False, helm.Release(api_versions=("monitoring.coreos.com/v1",)), False),
    ],
)
def test_monitors_where_their_api_is_or_where_asked_for(
    render: Any, wanted: object, release: helm.Release, rendered: bool
) -> None:
    def kinds(monitoring: Values, *kinds: str) -> list[str]:
        found = [m["kind"] for m in render({"monitoring": monitoring}, release)]
        return sorted(kind for kind in found if kind in kinds)

    monitors = ["PodMonitor", "ServiceMonitor", "ServiceMonitor"]
    assert kinds({"monitors": wanted}, *monitors) == (monitors if rendered else [])
    rules = {"monitors": False, "rules": {"enabled": wanted}}
    assert kinds(rules, *monitors, "PrometheusRule") == (["PrometheusRule"] if rendered else [])


def test_rules_are_whole_but_for_what_is_disabled(find: Any) -> None:
    source = yaml.safe_load((helm.ROOT / "grafana" / "alerts" / "vllm-fleet.yaml").read_text())
    assert find("PrometheusRule", "vllm-fleet-rules")["spec"] == source
    base = "https://git.example.com/"
    values = {"rules": {"disabled": ["VLLMQueueFilling"], "runbooks": base, "labels": {"a": "b"}}}
    rendered = find("PrometheusRule", "vllm-fleet-rules", {"monitoring": values})
    assert rendered["metadata"]["labels"]["a"] == "b"
    before, after = (
        {rule["alert"]: rule for group in spec["groups"] for rule in group["rules"] if "alert" in rule}
        for spec in (source, rendered["spec"])
    )
    assert before.keys() - after.keys() == {"VLLMQueueFilling"}
    for name, rule in after.items():
        assert rule["annotations"]["runbook_url"] == base + before[name]["annotations"]["runbook_url"]


def matches(selector: Values, labels: Values) -> bool:
    return selector.items() <= labels.items()


def test_services_and_monitors_reach_ports_that_exist(render: Any, pods: Any, values: Values) -> None:
    templates = [template for _, template in pods(values)]
    manifests = render(values)
    for service in (m for m in manifests if m["kind"] == "Service"):
        (template,) = [t for t in templates if matches(service["spec"]["selector"], t["metadata"]["labels"])]
        named = {port["name"] for container in template["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
    for monitor in (m for m in manifests if m["kind"] == "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [
            m for m in manifests if m["kind"] == "Service" and matches(selector, m["metadata"]["labels"])
        ]
        named = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= named


def test_secrets_are_mounted_by_their_names_and_by_the_gateway_only(pods: Any) -> None:
    secrets = [{"name": "api-keys"}, {"name": "redis"}]
    for name, pod in pods({"gateway": {"secrets": secrets}}):
        spec = pod["spec"]
        volumes = {item["name"]: item["secret"]["secretName"] for item in spec["volumes"] if "secret" in item}
        mounts = {
            item["mountPath"]: volumes[item["name"]]
            for item in spec["containers"][0]["volumeMounts"]
            if item["name"] in volumes and item["readOnly"]
        }
        path = "/etc/vllm-fleet-secrets"
        wanted = {f"{path}/api-keys": "api-keys", f"{path}/redis": "redis"}
        wanted["/etc/vllm-fleet-engine-keys"] = "vllm-fleet-engine-keys"
        assert mounts == (wanted if name.endswith("gateway") else {})


def test_probes_use_ports_that_exist(pods: Any) -> None:
    for _, template in pods():
        (container,) = template["spec"]["containers"]
        named = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in named


def test_a_node_without_cpu_to_spare_restarts_nothing(pods: Any) -> None:
    """An engine on the same node can keep a container of small weight from answering for half a minute."""
    for name, template in pods():
        (container,) = template["spec"]["containers"]
        live, ready = container["livenessProbe"], container["readinessProbe"]
        assert live["periodSeconds"] * live["failureThreshold"] >= 120
        assert ready["periodSeconds"] * ready["failureThreshold"] <= 10
        wanted = "200m" if name.endswith("operator") else "250m"
        assert container["resources"]["requests"]["cpu"] == wanted
        assert "cpu" not in container["resources"]["limits"]


def test_the_demo_fits_on_two_cores_through_a_rollout(pods: Any) -> None:
    """Of the gateways, one more while they are replaced; of the engine, its successor. Not both at once."""
    asked = {name: cpu(template["spec"]["containers"][0]) for name, template in pods()}
    example = yaml.safe_load((helm.ROOT / "k8s" / "examples" / "smollm2.yaml").read_text())
    engine, gateway, operator = (
        cpu(example["spec"]),
        asked["vllm-fleet-gateway"],
        asked["vllm-fleet-operator"],
    )
    standing = engine + 2 * gateway + operator
    assert standing + gateway + operator <= 2000
    assert standing + engine <= 2000


def cpu(container: Values) -> int:
    """The millicores that it requests."""
    return int(container["resources"]["requests"]["cpu"].removesuffix("m"))


def test_the_autoscaler_does_not_depend_on_the_request(find: Any) -> None:
    values = {"gateway": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": "1"}}}}
    (metric,) = find("HorizontalPodAutoscaler", "vllm-fleet-gateway", values)["spec"]["metrics"]
    assert metric["resource"]["target"] == {"type": "AverageValue", "averageValue": "700m"}


def test_metrics_are_never_on_the_service_that_is_exposed(find: Any) -> None:
    values = {"gateway": {"service": {"type": "LoadBalancer"}, "keysSecret": "api-keys"}}
    exposed = find("Service", "vllm-fleet-gateway", values)
    assert [port["port"] for port in exposed["spec"]["ports"]] == [3000]


def test_the_pod_monitor_selects_what_the_operator_labels(find: Any) -> None:
    spec = find("PodMonitor", "vllm-fleet-engine")["spec"]
    assert spec["selector"]["matchLabels"].items() <= names.labels("m", "uid").items()
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] == names.ENGINE_PORT_NAME
    (relabeling,) = endpoint["relabelings"]
    escaped = names.LABEL_MODEL.replace(".", "_").replace("-", "_").replace("/", "_")
    assert relabeling["sourceLabels"][-1] == f"__meta_kubernetes_pod_label_{escaped}"


def test_monitors_follow_the_watched_namespaces(find: Any) -> None:
    assert find("PodMonitor", "vllm-fleet-engine")["spec"]["namespaceSelector"] == {"any": True}
    narrowed = find("PodMonitor", "vllm-fleet-engine", {"watchNamespaces": ["a"]})
    assert narrowed["spec"]["namespaceSelector"] == {"matchNames": ["a"]}


@pytest.mark.parametrize("file", promql.dashboards())
def test_dashboards_are_labelled_for_the_sidecar_and_whole(find: Any, file: str) -> None:
    config_map = find("ConfigMap", f"vllm-fleet-dashboard-{file.removesuffix('.json')}")
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config_map["metadata"]["annotations"] == {"grafana_folder": "vLLM Fleet"}
    source = (helm.ROOT / "grafana" / "dashboards" / file).read_text()
    assert config_map["data"][f"vllm-fleet-{file}"].strip() == source.strip()


def test_every_pod_has_the_pull_secrets(render: Any) -> None:
    secrets = [{"name": "mirror"}]
    manifests = render({"image": {"pullSecrets": secrets}})
    specs = [m["spec"].get("template", m)["spec"] for m in manifests if m["kind"] in {"Deployment", "Pod"}]
    assert [spec["imagePullSecrets"] for spec in specs] == [secrets] * 3


@pytest.mark.parametrize("component", ["operator", "gateway"])
def test_pods_are_placed_as_asked(pods: Any, component: str) -> None:
    given = {
        "priorityClassName": "p",
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k"}],
        "affinity": {"nodeAffinity": {}},
    }
    spec = dict(pods({component: given}))[f"vllm-fleet-{component}"]["spec"]
    assert {key: spec.get(key) for key in given} == given


def test_without_definitions_none_is_rendered(render: Any) -> None:
    assert "CustomResourceDefinition" not in {m["kind"] for m in render({"crds": {"enabled": False}})}


@pytest.mark.parametrize("folder", [helm.CHART, helm.MODELS_CHART], ids=lambda folder: folder.name)
def test_the_charts_name_the_oldest_kubernetes(folder: Path) -> None:
    oldest = helm.OLDEST_KUBERNETES.removeprefix("v")
    assert helm.facts(folder)["kubeVersion"] == f">={oldest.rpartition('.')[0]}-0"


def test_notes_have_the_next_three_commands(chart: helm.Helm) -> None:
    notes = chart.notes({}, PLAIN)
    applied = re.search(r"kubectl apply -f (\S+)", notes)
    assert applied
    assert (helm.ROOT / applied[1]).is_file()
    assert "kubectl get vllm --all-namespaces --watch" in notes
    assert len(re.findall(r"^  \d\. ", notes, re.MULTILINE)) == 3


@pytest.mark.parametrize(
    ("keep", "annotations"), [(True, {"helm.sh/resource-policy": "keep"}), (False, None)]
)
def test_the_definition_is_kept_on_uninstall_if_asked(find: Any, keep: bool, annotations: object) -> None:
    crd = find("CustomResourceDefinition", "vllmmodels.vllm-fleet.dev", {"crds": {"keep": keep}})
    assert crd["metadata"].get("annotations") == annotations


def test_spread_constraints_select_their_own_component(pods: Any) -> None:
    own = {"matchLabels": {"other": "label"}}
    constraint = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    values = {"gateway": {"topologySpreadConstraints": [constraint, constraint | {"labelSelector": own}]}}
    template = dict(pods(values))["vllm-fleet-gateway"]
    filled, given = template["spec"]["topologySpreadConstraints"]
    assert filled["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert given["labelSelector"] == own


def test_the_config_files_are_the_values_and_what_the_chart_decides(find: Any) -> None:
    values = {"watchNamespaces": ["a"], "gateway": {"config": {"logLevel": "debug"}}}
    for component, port in (("gateway", {"port": 3000}), ("operator", {})):
        data = find("ConfigMap", f"vllm-fleet-{component}", values)["data"]
        file = yaml.safe_load(data[f"{component}.yaml"])
        assert file.items() >= {"watchNamespaces": ["a"], "managementPort": 9090, **port}.items()


def test_notes_name_what_was_installed(chart: helm.Helm) -> None:
    values = {"watchNamespaces": ["a"], "gateway": {"service": {"port": 80}}, "crds": {"enabled": False}}
    notes = chart.notes(values, helm.Release(name="prod", namespace="ml"))
    assert "kubectl -n ml port-forward svc/prod-vllm-fleet-gateway 3000:80" in notes
    assert "of: a." in notes
    assert "helm test prod -n ml" in notes
    assert "crds.enabled is false" in notes
