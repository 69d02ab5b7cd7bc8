"""Values: documented, used, and refused when wrong.

Proves: each value changes what is rendered; the schema refuses unknown keys at every level and wrong types,
and says which; a value that has moved fails with advice instead; a parent chart can depend on this one; the
defaults are valid; config files are what the two programs accept; the operator's keys are among the
gateway's; the matrix that is rendered and tried on an API server has each switch in each position.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import chart_values
import helm
from vllm_gateway.settings import load
from vllm_operator.settings import load_settings

Values = dict[str, Any]
TREE = chart_values.read_values((helm.CHART / "values.yaml").read_text())
LEAVES = [value for top in TREE for value in top.walk() if not value.children]
SECTIONS = [value for top in TREE for value in top.walk() if value.children]

# Another value than the default, by the type that the schema states.
OTHER: dict[str, Any] = {
    "#/$defs/labels": {"example.com/changed": "yes"},
    "#/$defs/object": {"changed": "yes"},
    "#/$defs/objects": [{"name": "changed"}],
    "#/$defs/namespaces": ["changed"],
    "#/$defs/objectReferences": [{"name": "changed"}],
    "#/$defs/resources": {"requests": {"cpu": "7"}},
    "#/$defs/digest": f"sha256:{'0' * 64}",
    "#/$defs/promDuration": "7s",
    "#/$defs/routeDuration": "7s",
    "#/$defs/operatorConfig/properties/networkPolicy/properties/allowFrom": [
        {"podLabels": {"changed": "yes"}}
    ],
    "#/$defs/alerts": ["VLLMQueueFilling"],
    "#/$defs/operatorConfig": {"logLevel": "debug"},
    "#/$defs/gatewayConfig": {"logLevel": "debug"},
}
PATTERNED = {"gateway.autoscaling.targetCPU": "300m"}
# Under which every value has its effect, and what one needs beside itself.
EVERYTHING_ON: Values = {
    "operator": {"replicas": 2},
    "gateway": {
        "keysSecret": "keys",
        "ingress": {"enabled": True},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
        "test": {"keySecret": {"name": "key"}},
    },
    "networkPolicy": {"egress": {"enabled": True}},
    "monitoring": {"monitors": True, "rules": {"enabled": True}},
}
BESIDE: dict[str, Values] = {
    "gateway.serviceAccount.create": {"gateway": {"serviceAccount": {"name": "mine"}}},
    "operator.serviceAccount.create": {"operator": {"serviceAccount": {"name": "mine"}}},
    **{
        f"gateway.autoscaling.{key}": {"gateway": {"autoscaling": {"enabled": True}}}
        for key in ("minReplicas", "maxReplicas", "targetCPU", "behavior")
    },
}


def nest(path: str, value: Any) -> Values:
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def merge(one: Values, other: Values) -> Values:
    """`other` over `one`, at every level."""
    both = {
        key: merge(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)
    }
    return one | other | both


def at(values: Any, path: str, default: Any) -> Any:
    """What stands at a dotted path."""
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return default
        values = values[key]
    return values


def another(value: chart_values.Value, current: Any) -> Any:
    if reference := value.annotation.get("$ref"):
        return OTHER[reference]
    if choices := value.annotation.get("enum"):
        return next(choice for choice in choices if choice != current)
    if value.annotation.get("items", {}).get("type") == "string":
        return ["changed"]
    others = {bool: not current, int: 7, str: "changed", list: [7]}
    return PATTERNED.get(value.path, others[type(value.default)])


@pytest.mark.parametrize("value", LEAVES, ids=lambda value: value.path)
def test_every_value_changes_what_is_rendered(chart: helm.Helm, value: chart_values.Value) -> None:
    def rendered(values: Values) -> str:
        return chart.template(values, helm.Release()) + chart.notes(values, helm.Release())

    base = merge(EVERYTHING_ON, BESIDE.get(value.path, {}))
    current = at(base, value.path, value.default)
    assert rendered(base) != rendered(merge(base, nest(value.path, another(value, current))))


@pytest.mark.parametrize("value", SECTIONS, ids=lambda value: value.path)
def test_unknown_values_are_refused_by_name(chart: helm.Helm, value: chart_values.Value) -> None:
    with pytest.raises(helm.HelmError, match="nonsense"):
        chart.template(nest(f"{value.path}.nonsense", 1), helm.Release())


def test_an_unknown_value_at_the_top_is_refused(chart: helm.Helm) -> None:
    with pytest.raises(helm.HelmError, match="nonsense"):
        chart.template({"nonsense": 1}, helm.Release())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gateway.replicas", "two"),
        ("gateway.replicas", -1),
        ("gateway.service.type", "Loadbalancer"),
        ("gateway.service.port", 70000),
        ("gateway.image.digest", "latest"),
        ("gateway.config.drainTimeout", "10 minutes"),
        ("gateway.config.drainTimeout", 600),
        ("gateway.config.drainTimeout", None),
        ("gateway.config.drainTimout", "10m"),
        ("gateway.config.limits.bodyByte", 1),
        ("gateway.resources.request", {}),
        ("operator.config.logLevel", "verbose"),
        ("operator.config.nonsense", 1),
        ("watchNamespaces", "default"),
        ("watchNamespaces", ["Not_A_Namespace"]),
        ("image.pullSecrets", ["just-a-name"]),
        ("monitoring.monitors", "yes"),
        ("monitoring.interval", "soon"),
        ("monitoring.rules.disabled", ["VLLMQueueFiling"]),
        ("commonLabels", {"replicas": 1}),
    ],
)
def test_wrong_values_are_refused_and_named(chart: helm.Helm, path: str, value: Any) -> None:
    with pytest.raises(helm.HelmError) as refused:
        chart.template(nest(path, value), helm.Release())
    assert path.rpartition(".")[2] in str(refused.value)


MOVED = yaml.safe_load((helm.CHART / "moved-values.yaml").read_text())


@pytest.mark.parametrize("path", MOVED)
@pytest.mark.parametrize("value", [1, "text", [], ["a"], {}, False])
def test_a_value_that_moved_fails_with_advice(chart: helm.Helm, path: str, value: Any) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(f"{path} cannot be set: {MOVED[path]}")):
        chart.template(nest(path, value), helm.Release())


def test_a_parent_chart_can_depend_on_this_one(chart: helm.Helm) -> None:
    assert chart.template({"global": {"any": "thing"}, "enabled": True}, helm.Release())


@pytest.mark.parametrize("config", [{}, {"logLevel": "debug"}])
@pytest.mark.parametrize("namespaces", [[], ["a", "b"]])
def test_config_files_are_what_the_programs_read(
    find: Any, tmp_path: Path, config: Values, namespaces: list[str]
) -> None:
    values = {"watchNamespaces": namespaces, "operator": {"config": config}, "gateway": {"config": config}}
    for component in ("operator", "gateway"):
        config_map = find("ConfigMap", f"vllm-fleet-{component}", values)
        (tmp_path / component).write_text(config_map["data"][f"{component}.yaml"])
    for settings in (load_settings(tmp_path / "operator"), load(str(tmp_path / "gateway"), {})):
        assert settings.watch_namespaces == tuple(namespaces)
        assert settings.management_port == 9090
        assert settings.log_level == config.get("logLevel", "info")


def test_a_service_account_that_is_not_created_needs_a_name(chart: helm.Helm) -> None:
    with pytest.raises(helm.HelmError, match=r"gateway\.serviceAccount\.name is needed"):
        chart.template({"gateway": {"serviceAccount": {"create": False}}}, helm.Release())


def test_siblings_have_the_same_keys() -> None:
    keys = {top.path: {child.path.partition(".")[2] for child in top.children} for top in TREE}
    assert keys["operator"] <= keys["gateway"]


MATRIX: dict[str, Values] = yaml.safe_load(Path(__file__).with_name("matrix.yaml").read_text())
SWITCHES = [value for value in LEAVES if isinstance(value.default, bool) or "enum" in value.annotation]


@pytest.mark.parametrize("value", SWITCHES, ids=lambda value: value.path)
def test_the_matrix_has_every_feature_on_and_off(value: chart_values.Value) -> None:
    taken = [at(values, value.path, value.default) for values in MATRIX.values()]
    assert [each for each in value.annotation.get("enum", [True, False]) if each not in taken] == []
