"""Writes the committed files that are made from others; with --check, fails where one is stale.

typed models of the API       -> charts/vllm-fleet/templates/crds/
grafana/dashboards/            -> charts/vllm-fleet/dashboards/
values.yaml, settings models   -> charts/vllm-fleet/values.schema.json
values.yaml, models of the API -> charts/vllm-models/values.schema.json
the chart with all of these    -> k8s/install.yaml
all of them                    -> docs/reference/
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import chart_files
import reference
import vllm_gateway.settings
import vllm_operator.settings
from chart_files import CHART, Files
from helm import ROOT
from json_schema import settings_schema
from vllm_gateway.telemetry import Metrics as GatewayMetrics
from vllm_operator.api.crd import crd_manifest
from vllm_operator.metrics import Metrics as OperatorMetrics


def generate() -> Files:
    """Every generated file by its path in the repository."""
    crd = crd_manifest()
    operator = settings_schema(vllm_operator.settings.Settings)
    gateway = settings_schema(vllm_gateway.settings.Settings)
    chart = (
        chart_files.crd_template(crd)
        | chart_files.dashboards()
        | chart_files.values_schema(operator, gateway)
        | chart_files.models_schema(crd)
    )
    docs = (
        reference.values_page()
        | reference.crd_page(crd)
        | reference.settings_page("operator", "`vllm-operator run --config FILE` reads", operator)
        | reference.settings_page("gateway", "`CONFIG_FILE` names", gateway)
        | reference.metrics_page(gateway=GatewayMetrics().registry, operator=OperatorMetrics(list).registry)
    )
    return chart | chart_files.install_manifest(chart) | docs


def stale(files: Files) -> Iterable[Path]:
    """The files that are not as generated, and generated ones whose source is gone."""
    for path, text in files.items():
        target = ROOT / path
        if not target.exists() or target.read_text() != text:
            yield path
    present = {*(ROOT / CHART / "dashboards").glob("*"), *reference.generated_pages()}
    yield from sorted({path.relative_to(ROOT) for path in present} - files.keys())


def main(arguments: list[str]) -> int:
    files = generate()
    changed = list(stale(files))
    if "--check" in arguments:
        for path in changed:
            print(f"stale: {path} (run `make generate`)")
        return int(bool(changed))
    chart_files.write(ROOT, files)
    for path in changed:
        if path not in files:
            (ROOT / path).unlink()
        print(f"{'wrote' if path in files else 'removed'} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
