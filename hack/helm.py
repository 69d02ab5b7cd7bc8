"""Renders and lints a chart offline, by Helm as a library or by a `helm` binary.

The library (PyPI's helm-python-sdk, Helm 4 behind ctypes) lets `make test` and `make generate` run on a
machine that has Python only. It is young, so nothing outside this module knows of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "vllm-fleet"
MODELS_CHART = ROOT / "charts" / "vllm-models"
OLDEST_KUBERNETES = "v1.30.0"
Values = Mapping[str, Any]
Manifest = dict[str, Any]


class HelmError(Exception):
    """Helm refused the values or could not render; the text is Helm's own."""


@dataclass(frozen=True)
class Release:
    """What a render knows of release and cluster; `api_versions` are those beside Kubernetes' own."""

    name: str = "vllm-fleet"
    namespace: str = "vllm-fleet"
    api_versions: tuple[str, ...] = ()
    kube_version: str = OLDEST_KUBERNETES


@dataclass(frozen=True)
class Helm:
    """`template`: a stream of YAML documents; `notes`: NOTES.txt; `lint`: what `helm lint --strict` says."""

    template: Callable[[Values, Release], str]
    notes: Callable[[Values, Release], str]
    lint: Callable[[Values], list[str]]


def find_helm(chart: Path = CHART) -> Helm:
    """The library, whose version is pinned; else, as it has no wheel for every platform, a binary."""
    try:
        return library_helm(chart)
    except ImportError:
        return binary_helm(find_binary(), chart)


def find_binary() -> str:
    """The cluster driver's helm, else the one on PATH."""
    own = ROOT / ".cluster" / "bin" / "helm"
    binary = str(own) if own.exists() else shutil.which("helm")
    if binary is None:
        raise HelmError("neither the package helm-python-sdk nor a helm on PATH")
    return binary


def manifests(text: str) -> list[Manifest]:
    """The objects of a rendered stream, in its order; documents that hold only comments are left out."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is
    return [document for document in yaml.load_all(text, loader) if document]


def binary_helm(binary: str, chart: Path = CHART) -> Helm:
    """Helm as the command that users have."""

    def run(values: Values, *arguments: str) -> str:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            # Without a kubeconfig: nothing here may depend on a cluster.
            command = [binary, *arguments, "--values", file.name]
            environment = os.environ | {"KUBECONFIG": os.devnull}
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=60, env=environment
            )
        if done.returncode:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout

    def template(values: Values, release: Release) -> str:
        flags = ["--namespace", release.namespace, "--kube-version", release.kube_version]
        flags += [f"--api-versions={version}" for version in release.api_versions]
        return run(values, "template", release.name, str(chart), *flags)

    def notes(values: Values, release: Release) -> str:
        flags = ["--namespace", release.namespace, "--dry-run=client", "--output=json"]
        installed = json.loads(run(values, "install", release.name, str(chart), *flags))
        return str(installed["info"]["notes"])

    def lint(values: Values) -> list[str]:
        try:
            run(values, "lint", "--strict", str(chart))
        except HelmError as error:
            return str(error).splitlines()
        return []

    return Helm(template, notes, lint)


def library_helm(chart: Path = CHART) -> Helm:
    """Helm as a library, with the same results."""
    import helm_python
    from helm_python import _native

    loaded = helm_python.Chart.load(chart)

    def render(values: Values, release: Release) -> dict[str, str]:
        options = {
            "name": release.name,
            "namespace": release.namespace,
            "kube_version": release.kube_version,
            "api_versions": list(release.api_versions),
        }
        try:
            # Chart.render() does not pass api_versions on, which the native call takes.
            arguments = (loaded._raw(), json.dumps(values), json.dumps(options))  # noqa: SLF001
            return dict(json.loads(_native.call_string("helm_render", *arguments)))
        except helm_python.HelmError as error:
            raise HelmError(str(error)) from error

    def template(values: Values, release: Release) -> str:
        rendered = sorted(render(values, release).items())
        return "\n---\n".join(text for path, text in rendered if path.endswith((".yaml", ".yml")))

    def notes(values: Values, release: Release) -> str:
        return next(text for path, text in render(values, release).items() if path.endswith("NOTES.txt"))

    def lint(values: Values) -> list[str]:
        report = helm_python.lint(chart, dict(values), strict=True)
        worse = [message for message in report["messages"] if message["severity"] > 1]
        return [f"{message['path']}: {message['error']}" for message in worse] + list(report["errors"])

    return Helm(template, notes, lint)
