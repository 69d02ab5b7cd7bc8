"""`crds.keep: false`, which gives up all models with the release. Last, since the others' model goes too.

Proves: a release that was installed with the definition kept takes the other value with an upgrade;
uninstalling it then deletes the definition, every model of every namespace, and what the operator made for
them, though the operator is gone as well. That all of it stays by default is in test_8_releases.py.

Only on the cluster that the driver made, since on another the models would be somebody's.
"""

from __future__ import annotations

from collections.abc import Iterator

import cluster
import pytest
import releases
from operators import model, own_namespace

pytestmark = [pytest.mark.e2e, pytest.mark.local_cluster]
CRD = "vllmmodels.vllm-fleet.dev"
MASTER_KEY = "vllm-fleet-engine-keys"
CHILDREN = "deployments,pods,services,secrets,networkpolicies,poddisruptionbudgets,persistentvolumeclaims"


@pytest.fixture
def given_up(smollm2: str) -> Iterator[None]:
    """The release with crds.keep false; afterwards it and the model are installed anew."""
    releases.install("--set", "crds.keep=false")
    yield
    releases.install()
    cluster.kubectl("wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=60s")
    cluster.apply(cluster.example("smollm2.yaml"))


def children() -> list[str]:
    """What of the operator's making is in the cluster."""
    selector = "app.kubernetes.io/managed-by=vllm-operator"
    return cluster.kubectl("get", CHILDREN, "-A", "-l", selector, "-o", "name").split()


def wait_until_garbage_is_collected(namespace: str) -> None:
    """Of models and of what is made for them, which Kubernetes follows kind by kind, and some kinds only a
    good while after the API server was away.

    What is not followed before the definition goes is left for good: the collector cannot ask for such an
    owner any more. With `foreground` it is the collector that lets the model go, once it has seen it.
    """
    mine = "vllm-fleet.dev/model=gone"
    cluster.apply(model("gone", replicas=0), namespace)
    cluster.eventually(lambda: cluster.get("networkpolicy", "gone-engine", namespace), "it has children", 60)
    cluster.delete("vllmmodel", "gone", namespace, "--cascade=foreground", "--timeout=240s")
    cluster.eventually(lambda: not cluster.items(CHILDREN, mine, namespace), "its children are gone", 240)


def test_without_keep_the_definition_goes_and_all_models_with_it(smollm2: str, given_up: None) -> None:
    with own_namespace() as namespace:
        cluster.apply(model("idle", replicas=0), namespace)
        cluster.eventually(
            lambda: cluster.get("networkpolicy", "idle-engine", namespace), "it has children", 60
        )
        assert f"deployment.apps/{smollm2}-engine" in children()
        wait_until_garbage_is_collected(namespace)
        releases.uninstall()
        cluster.eventually(lambda: not cluster.get("crd", CRD), "the definition is gone", 120)
        left = f"secret/{MASTER_KEY}"  # of no model; charts/vllm-fleet/README.md says why it stays
        cluster.eventually(
            lambda: children() == [left], lambda: f"gone is all that was made for models: {children()}", 240
        )
