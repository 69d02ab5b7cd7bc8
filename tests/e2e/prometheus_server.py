"""A real Prometheus on this machine that scrapes the cluster as the installed monitors say.

The Prometheus Operator's own generator turns the ServiceMonitors and the PodMonitor, read back from the API
server, into a scrape configuration. Three things are changed in it: the targets are those that discovery.py
finds, since Debian's Prometheus is built without Kubernetes; scrapes go through `kubectl proxy`, so that pods
need not be reachable from here; and rules are evaluated every second. Ports, paths, selectors and relabelings
stay as the generator wrote them.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster
import httpx
import yaml
from discovery import Objects, groups

MONITORS = "servicemonitors.monitoring.coreos.com,podmonitors.monitoring.coreos.com"
RULES = "prometheusrules.monitoring.coreos.com"
PATTERN = r"([^;]+);([^;]+);[^;]+:(\d+);(.+)"
THROUGH_PROXY = "/api/v1/namespaces/$1/pods/$2:$3/proxy$4"

# What the operator's config reloader fills in, in the pod.
ENVIRONMENT = {"POD_NAME": "prometheus-0", "SHARD": "0"}


@dataclass(frozen=True)
class Prometheus:
    url: str

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        document = answer.json()
        assert document["status"] == "success", f"{path} {parameters}: {document.get('error')}"
        return document["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query that have a value; a NaN is none."""
        data = self._get("query", query=expr)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return [found for found in data["result"] if not math.isnan(float(found["value"][1]))]

    def targets(self) -> list[dict[str, Any]]:
        return list(self._get("targets", state="active")["activeTargets"])

    def wait_scraped(self) -> None:
        """Until each target has been asked anew, and has answered."""
        began = datetime.datetime.now(datetime.UTC)

        def late() -> list[str]:
            return [
                f"{target['scrapeUrl']} at {target['lastScrape']}: {target['lastError'] or target['health']}"
                for target in self.targets()
                if target["health"] != "up" or datetime.datetime.fromisoformat(target["lastScrape"]) < began
            ]

        cluster.eventually(lambda: not late(), lambda: f"all are scraped; {late()}", 60)

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def names(self) -> set[str]:
        """The names of all series of the gateway, the operator and vLLM."""
        return {name for name in self._get("label/__name__/values") if re.match(r"vllm(:|_)", name)}


def version() -> str:
    out = cluster.run(cluster.tool("prometheus"), "--version")
    found = re.search(r"version (\d+\.\d+\.\d+)", out.stdout + out.stderr)
    assert found, out
    return f"v{found[1]}"


def configuration(monitors: str, objects: Objects, proxy: str, rules: Path) -> dict[str, Any]:
    """The generator's configuration for these monitors and objects, through `proxy` (host:port)."""
    out = cluster.run(cluster.tool("prometheus-config"), version(), stdin=monitors).stdout
    for name, value in ENVIRONMENT.items():
        out = out.replace(f"$({name})", value)
    made: dict[str, Any] = yaml.safe_load(out)
    made["rule_files"] = [str(rules)]
    made["global"] |= {"scrape_interval": "30s", "evaluation_interval": "1s"}
    source = ["__meta_kubernetes_namespace", "__meta_kubernetes_pod_name", "__address__", "__metrics_path__"]
    for job in made["scrape_configs"]:
        discoveries = job.pop("kubernetes_sd_configs")
        job["static_configs"] = [group for found in discoveries for group in groups(found, objects)]
        path = {"target_label": "__metrics_path__", "regex": PATTERN, "replacement": THROUGH_PROXY}
        job["relabel_configs"] += [
            {"source_labels": ["__address__"], "target_label": "instance"},
            {"source_labels": source} | path,
            {"target_label": "__address__", "replacement": proxy},
        ]
    return made


def objects() -> Objects:
    """What of the cluster discovery reads."""

    def every(kind: str) -> tuple[dict[str, Any], ...]:
        return tuple(json.loads(cluster.kubectl("get", kind, "-A", "-o", "json"))["items"])

    return Objects(every("pods"), every("services"), every("endpointslices"))


def rule_file() -> dict[str, Any]:
    """What the installed PrometheusRules say."""
    found = json.loads(cluster.kubectl("get", RULES, "-A", "-o", "json"))["items"]
    return {"groups": [group for item in found for group in item["spec"]["groups"]]}


@contextmanager
def api_proxy() -> Iterator[str]:
    """`kubectl proxy`; yields its host:port."""
    command = [cluster.tool("kubectl"), "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"127\.0\.0\.1:\d+", line)
            assert found, f"kubectl proxy said: {line!r}"
            yield found[0]
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(folder: Path) -> Iterator[Prometheus]:
    """Prometheus over the monitors and rules that are installed now; its data lie in the folder."""
    rules, settings = folder / "rules.yaml", folder / "prometheus.yaml"
    rules.write_text(yaml.safe_dump(rule_file()))
    with api_proxy() as proxy:
        monitors = cluster.kubectl("get", MONITORS, "-A", "-o", "json")
        settings.write_text(yaml.safe_dump(configuration(monitors, objects(), proxy, rules)))
        with process(folder, settings) as prometheus:
            yield prometheus


@contextmanager
def process(folder: Path, settings: Path) -> Iterator[Prometheus]:
    address, log = f"127.0.0.1:{free_port()}", folder / "log"
    flags = [
        f"--config.file={settings}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    prometheus = Prometheus(f"http://{address}")
    with (
        log.open("w") as sink,
        subprocess.Popen([cluster.tool("prometheus"), *flags], stdout=sink, stderr=sink) as child,
    ):
        try:
            cluster.eventually(
                lambda: child.poll() is not None or ready(prometheus), "Prometheus is ready", 120
            )
            assert child.poll() is None, log.read_text()
            yield prometheus
        finally:
            child.terminate()


def ready(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
