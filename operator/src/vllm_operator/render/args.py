"""From spec.engine to the arguments of `vllm serve`. Flags and defaults: vLLM 0.32's own parser."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vllm_operator import names
from vllm_operator.api.adapters import adapter_path
from vllm_operator.api.source import MODELS_PATH
from vllm_operator.api.v1alpha1 import Spec, VLLMModel
from vllm_operator.render.storage import CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_PATH

LATEST = (0, 32, 0)
SHUTDOWN_TIMEOUT_SINCE = (0, 18, 0)  # https://github.com/vllm-project/vllm/pull/34730
MEDIA_DOMAINS_SINCE = (0, 11, 1)

# In vLLM an empty list opens every domain; the reserved .invalid never resolves (RFC 2606).
NO_MEDIA_DOMAIN = "media.invalid"

MAX_LORAS = 8

Version = tuple[int, ...]


def engine_version(spec: Spec, image: str) -> Version:
    """`engine.version`, else what the image's tag says, else the latest known. An unknown flag is fatal."""
    found = re.search(r"^([0-9]+)\.([0-9]+)\.([0-9]+)$", spec.engine.version or "") or re.search(
        r":v?([0-9]+)\.([0-9]+)\.([0-9]+)", image
    )
    return tuple(int(part) for part in found.groups()) if found else LATEST


def model_argument(spec: Spec) -> str:
    """What vLLM loads: an id, a path or a URI."""
    if spec.source.s3 is not None:
        return spec.source.s3.uri
    if spec.source.folder is not None:
        return f"{MODELS_PATH}/{spec.source.folder}"
    return spec.model


def engine_args(model: VLLMModel, image: str) -> list[str]:
    """The model first: after a flag with several values it would be taken for one of them."""
    spec, version = model.spec, engine_version(model.spec, image)
    served = dict.fromkeys((model.metadata.name, *model.served_names))
    args = [model_argument(spec), "--served-model-name", *served, "--port", str(names.ENGINE_PORT)]
    for flag, values in _flags(spec, version):
        args += [flag, *values]
    return args + list(spec.engine.extra_args)


def _flags(spec: Spec, version: Version) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _valued(spec)
    yield from _switches(spec)
    yield from _lora(spec)
    if version >= MEDIA_DOMAINS_SINCE:
        yield "--allowed-media-domains", spec.engine.allowed_media_domains or (NO_MEDIA_DOMAIN,)
    if version >= SHUTDOWN_TIMEOUT_SINCE:
        yield "--shutdown-timeout", (str(spec.drain_seconds),)


def _valued(spec: Spec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A flag stands only where the spec says something: what is left out follows vLLM's defaults."""
    engine, hub = spec.engine, spec.source.hugging_face
    values = {
        "--revision": hub.revision if hub else None,
        "--load-format": "runai_streamer" if spec.source.s3 else None,
        "--runner": engine.runner if engine.runner != "auto" else None,
        "--dtype": engine.dtype if engine.dtype != "auto" else None,
        "--max-model-len": engine.max_model_len,
        "--gpu-memory-utilization": engine.gpu_memory_utilization,
        "--quantization": engine.quantization,
        "--tensor-parallel-size": engine.tensor_parallel_size if engine.tensor_parallel_size > 1 else None,
        "--pipeline-parallel-size": engine.pipeline_parallel_size
        if engine.pipeline_parallel_size > 1
        else None,
        "--kv-cache-dtype": engine.kv_cache_dtype,
        "--max-num-seqs": engine.max_num_seqs,
        "--tool-call-parser": engine.tool_call_parser,
        "--reasoning-parser": engine.reasoning_parser,
        "--chat-template": f"{CHAT_TEMPLATE_PATH}/{CHAT_TEMPLATE_FILE}" if engine.chat_template else None,
    }
    yield from ((flag, (str(value),)) for flag, value in values.items() if value is not None)


def _lora(spec: Spec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Several at once: by vLLM's own default, requests for one adapter wait for those of another."""
    if not (adapters := spec.adapters):
        return
    at_once = spec.engine.max_loras or min(len(adapters), MAX_LORAS)
    yield "--enable-lora", ()
    yield (
        "--lora-modules",
        tuple(f"{item.name}={adapter_path(index, item)}" for index, item in enumerate(adapters)),
    )
    yield "--max-loras", (str(at_once),)
    if len(adapters) > at_once:  # else each change of adapter would read from disk again
        yield "--max-cpu-loras", (str(len(adapters)),)
    if spec.engine.max_lora_rank is not None:
        yield "--max-lora-rank", (str(spec.engine.max_lora_rank),)


def _switches(spec: Spec) -> Iterator[tuple[str, tuple[str, ...]]]:
    engine = spec.engine
    switches = {
        "--enable-auto-tool-choice": engine.tool_call_parser is not None,
        "--trust-remote-code": engine.trust_remote_code,
        "--enable-prefix-caching": engine.prefix_caching is True,
        "--no-enable-prefix-caching": engine.prefix_caching is False,
    }
    yield from ((flag, ()) for flag, on in switches.items() if on)
