"""Fields with objects or names of their own, reconciled one step at a time against the fake API server.

Proves: an adapter's name is granted or denied like a model's.
"""

from __future__ import annotations

from kube_api import VLLM_MODELS
from operator_rig import Rig
from vllm_models import model_body


async def test_an_adapters_name_is_granted_by_the_same_rule(rig: Rig) -> None:
    old = model_body("old", "a", servedNames=["sql"])
    old["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    rig.api.create(VLLM_MODELS, "a", old)
    rig.model(adapters=[{"name": name, "source": {"local": {"path": "/a"}}} for name in ("sql", "chat")])
    await rig.reconcile()
    assert rig.status()["adapters"] == ["chat"]
    assert rig.status()["servedNames"] == ["m"]
    assert rig.condition("Accepted")[:2] == ("False", "NameConflict")
    assert (
        "sql is held by the older model a/old. Ask for ns/m (ns/m:<adapter>" in rig.condition("Accepted")[2]
    )
    args = rig.deployment()["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"sql=/a", "chat=/a"} <= set(args)  # by its full name the engine still has it
