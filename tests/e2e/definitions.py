"""CustomResourceDefinitions of other projects, from their Go modules as definitions/go.sum pins them.

What is not yet in the cluster is installed for as long as a test needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cluster
import yaml

import golang
from paths import cache
from shell import lock

FOLDER = Path(__file__).with_name("definitions")
MONITORING = cluster.BIN / "monitoring-crds.yaml"  # the Prometheus Operator's, as the driver built them


def module_file(module: str, path: str) -> str:
    """The text of a file of a required module, which is downloaded if need be."""
    go_mod = (FOLDER / "go.mod").read_text()
    command = [golang.find_go(golang.go_version(go_mod)), "mod", "download", "-json", module]
    environment = os.environ | golang.environment()
    with lock(cache() / "build.lock", "a build, which deletes modules when it is done"):
        done = subprocess.run(
            command, check=False, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{module}: {done.stdout}{done.stderr}"
        return (Path(json.loads(done.stdout)["Dir"]) / path).read_text()


def is_served(definition: cluster.Manifest) -> bool:
    """Whether the API server has its paths, and knows its schema: some time after it is Established."""
    spec, look = definition["spec"], (cluster.tool("kubectl"), "get", "--raw")
    plural = spec["names"]["plural"]
    for version in (version["name"] for version in spec["versions"] if version["served"]):
        path = f"apis/{spec['group']}/{version}"
        known = cluster.run(*look, f"/{path}", check=False).stdout
        schema = cluster.run(*look, f"/openapi/v3/{path}", check=False).stdout
        if f'"name":"{plural}"' not in known or f"/{plural}/" not in schema:
            return False
    return True


@contextmanager
def installed(text: str) -> Iterator[None]:
    """Definitions, in the cluster for the length of the block."""
    look = (cluster.tool("kubectl"), "get", "-f", "-")
    if cluster.run(*look, stdin=text, check=False).returncode == 0:
        yield
        return
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    try:
        for definition in filter(None, yaml.safe_load_all(text)):
            what = f"{definition['metadata']['name']} is served"
            cluster.eventually(partial(is_served, definition), what, 60)
        yield
    finally:
        cluster.kubectl("delete", "-f", "-", stdin=text)
