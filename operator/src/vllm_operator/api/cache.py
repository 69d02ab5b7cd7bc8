"""Where downloaded weights stay: `spec.cache`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vllm_operator.api.values import ObjectName, Quantity, Rule, Section


class Cache(Section):
    """A claim for what is downloaded from the Hugging Face Hub, and for vLLM's compiled kernels.

    With `size` the claim is the operator's, `<model>-cache`. It goes when the model is deleted, and not when
    this field is taken out: weights are costly to get back, and an edit is easily made. What is to outlive
    the model, or to serve several, is a claim of your own: `claimName`.
    """

    size: Quantity | None = Field(
        None, description="Size of a claim that the operator makes; may grow later where its class allows it."
    )
    claim_name: ObjectName | None = Field(
        None,
        description="A PersistentVolumeClaim of yours in the model's namespace, instead of size. It is never "
        "changed or deleted.",
    )
    storage_class_name: ObjectName | None = Field(
        None, description="StorageClass of the claim. Default: the cluster's default class."
    )
    access_modes: tuple[Literal["ReadWriteOnce", "ReadWriteMany"], ...] = Field(
        (),
        max_length=2,
        description="Access modes of the claim; with claimName, those that it has. ReadWriteOnce serves one "
        "replica, whose rollouts are in place. Default: ReadWriteOnce.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    prefetch: bool = Field(
        False,
        description="Download in a Job before the pods start, so that no GPU waits for it and running pods "
        "serve on. The engine then starts with HF_HUB_OFFLINE=1; where it downloads something else as well "
        "(a draft model, another tokenizer), set that to 0 in engine.env.",
    )

    rules = (
        Rule(
            "has(self.size) != has(self.claimName)",
            "set either size or claimName",
            lambda cache: (cache.size is None) != (cache.claim_name is None),
        ),
        Rule(
            "!has(self.storageClassName) || has(self.size)",
            "is for a claim that the operator makes: set size, or leave it out with claimName",
            lambda cache: cache.storage_class_name is None or cache.size is not None,
            ".storageClassName",
        ),
    )

    @property
    def is_shared(self) -> bool:
        """Whether several nodes can mount it at once."""
        return "ReadWriteMany" in self.access_modes
