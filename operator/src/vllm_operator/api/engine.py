"""How vLLM runs: `spec.engine`. Fields map to flags of vLLM (render.args); the rest goes by extraArgs."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vllm_operator.api.source import SecretKey
from vllm_operator.api.values import ObjectName, Rule, Section, Word, text

SECRET_NAME = "(^|_)(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$"  # noqa: S105

# Set by the operator, or read by vLLM in a way that the rest of the chain depends on.
MANAGED_ENV = {
    "HF_TOKEN": "source.huggingFace.tokenSecret",
    "HUGGING_FACE_HUB_TOKEN": "source.huggingFace.tokenSecret",
    "HOME": "a writable folder that the operator mounts",
    "VLLM_API_KEY": "nothing: the gateway is the door, and it checks keys",
    "VLLM_ENGINE_READY_TIMEOUT_S": "startTimeout",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "nothing: the gateway's connection pool depends on it",
    "VLLM_PORT": "nothing: the engine serves on port 8000",
}
_MANAGED = "|".join(MANAGED_ENV)


class ConfigMapKey(Section):
    """A key of a ConfigMap in the model's namespace."""

    name: ObjectName = Field(description="Name of the ConfigMap.")
    key: Annotated[str, text(253, r"^[-._a-zA-Z0-9]+$")] = Field(description="Key in the ConfigMap.")


class ChatTemplate(Section):
    """A Jinja template that turns messages into a prompt."""

    config_map: ConfigMapKey = Field(
        description="Where it stands. vLLM reads it when it starts: a change takes effect in new pods."
    )


class PodField(Section):
    """A field of the pod, by the downward API."""

    field_path: Annotated[str, text(253)] = Field(description="For example status.podIP.")


class EnvSource(Section):
    """Where an environment variable's value comes from: exactly one."""

    secret_key_ref: SecretKey | None = Field(None, description="A Secret's key.")
    config_map_key_ref: ConfigMapKey | None = Field(None, description="A ConfigMap's key.")
    field_ref: PodField | None = Field(None, description="A field of the pod.")

    rules = (
        Rule(
            "[has(self.secretKeyRef), has(self.configMapKeyRef), has(self.fieldRef)].exists_one(set, set)",
            "set exactly one of secretKeyRef, configMapKeyRef and fieldRef",
            lambda env: [env.secret_key_ref, env.config_map_key_ref, env.field_ref].count(None) == 2,
        ),
    )


class EnvVar(Section):
    """One environment variable of the engine."""

    name: Annotated[str, text(128, "^[A-Za-z_][A-Za-z0-9_]*$")] = Field(description="Name of the variable.")
    value: Annotated[str, Field(max_length=4096)] | None = Field(
        None, description="Literal value. Never a secret: those come by valueFrom.secretKeyRef."
    )
    value_from: EnvSource | None = Field(None, description="Where the value comes from.")

    rules = (
        Rule(
            "has(self.value) != has(self.valueFrom)",
            "set either value or valueFrom",
            lambda env: (env.value is None) != (env.value_from is None),
        ),
        Rule(
            f"!has(self.value) || !self.name.matches('{SECRET_NAME}')",
            "looks like a secret: use valueFrom.secretKeyRef, so that it is not readable in the resource",
            lambda env: env.value is None or not re.search(SECRET_NAME, env.name),
            ".value",
        ),
        Rule(
            f"!self.name.matches('^({_MANAGED})$')",
            "is managed by the operator; HF tokens: source.huggingFace.tokenSecret, start time: startTimeout",
            lambda env: env.name not in MANAGED_ENV,
            ".name",
        ),
    )


def _unique_names(env: tuple[EnvVar, ...]) -> tuple[EnvVar, ...]:
    names = [item.name for item in env]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(doubled)} is set more than once")
    return env


ParallelSize = Annotated[int, Field(ge=1, le=64)]
Domain = Annotated[str, text(253, r"^[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?$")]


class Engine(Section):
    """vLLM's own settings."""

    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="Which build of vLLM runs. auto: cpu where gpu.count is 0, else cuda."
    )
    version: Annotated[str, text(32, r"^[0-9]+\.[0-9]+\.[0-9]+$")] | None = Field(
        None,
        description="vLLM's version, for flags that older ones lack. Default: read from the image's tag.",
    )
    runner: Literal["auto", "generate", "pooling"] = Field(
        "auto", description="What the model is served for: generate text, or pooling (embeddings, scores)."
    )
    dtype: Literal["auto", "bfloat16", "float", "float16", "float32", "half"] = Field(
        "auto", description="Type of weights and activations."
    )
    max_model_len: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        None, description="Longest context in tokens. Default: what the model's configuration says."
    )
    gpu_memory_utilization: Annotated[float, Field(ge=0.01, le=1)] | None = Field(
        None, description="Share of each GPU's memory that vLLM takes. Default: vLLM's own, 0.92."
    )
    quantization: Word | None = Field(
        None, description="Method, for example awq or fp8. Default: as the weights say."
    )
    tensor_parallel_size: ParallelSize = Field(1, description="GPUs that share each layer.")
    pipeline_parallel_size: ParallelSize = Field(1, description="Stages that the layers are split into.")
    kv_cache_dtype: Word | None = Field(
        None, description="Type of the KV cache, for example fp8. Default: auto."
    )
    max_num_seqs: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Most sequences in one step. Default: vLLM's own, 256 or 1024 by the GPU's size."
    )
    max_loras: Annotated[int, Field(ge=1, le=32)] | None = Field(
        None,
        description="Most adapters in one step; each takes GPU memory for maxLoraRank. Default: the number "
        "of adapters, at most 8.",
    )
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] | None = Field(
        None, description="Highest rank of the adapters (r in adapter_config.json). Default: vLLM's own, 16."
    )
    prefix_caching: bool | None = Field(
        None, description="Reuse the KV cache of equal prefixes. Default: vLLM's, on."
    )
    tool_call_parser: Word | None = Field(
        None, description="Parser of tool calls, for example hermes; turns automatic tool choice on."
    )
    reasoning_parser: Word | None = Field(
        None, description="Parser of reasoning text, for example deepseek_r1."
    )
    chat_template: ChatTemplate | None = Field(
        None, description="Chat template in place of the model's own. Default: the model's."
    )
    trust_remote_code: bool = Field(
        False, description="Run code from the model's repository. Only for sources you trust."
    )
    allowed_media_domains: tuple[Domain, ...] = Field(
        (),
        max_length=64,
        description="Hosts from which the engine may fetch images, audio and video. Default: none.",
    )
    extra_args: tuple[Annotated[str, text(4096)], ...] = Field(
        (),
        max_length=64,
        description="Further flags of `vllm serve`, one item each for flag and value, or --flag=value. "
        "Flags that a field manages are refused, and by default those that load code, show files or open "
        "administration routes: settings.policy.engineOptions.",
    )
    env: Annotated[tuple[EnvVar, ...], AfterValidator(_unique_names)] = Field(
        (),
        max_length=64,
        description="Environment variables of the engine; settings.policy.engineOptions judges them as "
        "it does extraArgs.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
