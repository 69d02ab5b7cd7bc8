"""CustomResourceDefinitions of other projects, from their Go modules as definitions/go.sum pins them.

What is not yet in the cluster is installed for as long as a test needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cluster

import golang

FOLDER = Path(__file__).with_name("definitions")


def module_folder(module: str) -> Path:
    """The sources of a required module, downloaded if need be."""
    go_mod = (FOLDER / "go.mod").read_text()
    command = [golang.find_go(golang.go_version(go_mod)), "mod", "download", "-json", module]
    environment = os.environ | golang.environment()
    done = subprocess.run(
        command, check=False, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{module}: {done.stdout}{done.stderr}"
    return Path(json.loads(done.stdout)["Dir"])


@contextmanager
def installed(module: str, path: str) -> Iterator[None]:
    """A definition file of a module, in the cluster for the length of the block."""
    file = str(module_folder(module) / path)
    if cluster.run(cluster.tool("kubectl"), "get", "-f", file, check=False).returncode == 0:
        yield
        return
    cluster.kubectl("apply", "--server-side", "-f", file)
    try:
        cluster.kubectl("wait", "--for=condition=Established", "-f", file, "--timeout=30s")
        yield
    finally:
        cluster.kubectl("delete", "-f", file)
