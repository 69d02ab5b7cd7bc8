"""Alerts and recording rules before Prometheus' own promtool. Needs no cluster, only what
`python3 k8s/local/driver prometheus` fetches.

Proves: the rules are valid; every case of tests/rules holds; every alert has a case that fires and one that
is quiet; promtool runs the cases indeed, since one that is changed fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cluster
import pytest
import yaml

import promql

pytestmark = pytest.mark.e2e
CASES = cluster.ROOT / "tests" / "rules" / "vllm-fleet.yaml"
SOURCE = promql.ALERTS / "vllm-fleet.yaml"


def checks() -> list[dict[str, Any]]:
    """What is expected of each alert at some time."""
    groups = yaml.safe_load(CASES.read_text())["tests"]
    return [check for group in groups for check in group.get("alert_rule_test", ())]


def test_the_rules_are_valid() -> None:
    out = cluster.run(cluster.tool("promtool"), "check", "rules", str(SOURCE)).stdout
    assert f"SUCCESS: {len(promql.rules())} rules found" in out


def promtool_tests(folder: Path, text: str) -> bool:
    path = folder / "cases.yaml"
    path.write_text(text.replace("[RULES]", f"[{SOURCE}]"))
    return cluster.run(cluster.tool("promtool"), "test", "rules", str(path), check=False).returncode == 0


def test_every_case_holds_and_a_changed_one_fails(tmp_path: Path) -> None:
    text = CASES.read_text()
    assert promtool_tests(tmp_path, text)
    assert not promtool_tests(tmp_path, text.replace("pod: hangs", "pod: works"))


def test_every_alert_fires_and_is_quiet_in_some_case() -> None:
    alerts = {rule["alert"] for rule in promql.rules() if "alert" in rule}
    assert {check["alertname"] for check in checks() if check["exp_alerts"]} == alerts
    assert {check["alertname"] for check in checks() if not check["exp_alerts"]} == alerts
