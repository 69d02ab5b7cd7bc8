"""What of `engine.extraArgs` and `engine.env` is more than tuning: `settings.policy.engineOptions`.

The engine serves everyone who may ask the gateway, with the weights and tokens of its pod. Options that load
code, show files of the pod to callers, or open routes that change the engine are for the platform to allow.
Names and effects: vLLM 0.32's source (entrypoints/launchers, envs.py, utils/import_utils.py), the loader's
(ld.so(8)) and Python's (https://docs.python.org/3/using/cmdline.html#environment-variables).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_operator.api.flag_table import FLAGS
from vllm_operator.api.flags import normalise
from vllm_operator.errors import Problem

_CODE = "loads code into the engine"
_FILES = "lets callers read files of the pod"
_ROUTES = "opens routes that change the engine, and ask for no key"
_ADAPTERS = "lets callers load adapters; use spec.adapters"
_MEDIA = "loosens which URLs the engine fetches; use engine.allowedMediaDomains"

FLAG_EFFECTS = {
    "--allowed-local-media-path": f"{_FILES}; send media as data: URLs, or use engine.allowedMediaDomains",
    "--ec-manager-config": _CODE,
    "--enable-fault-tolerance": _ROUTES,
    "--enable-scale-out": "opens routes beside those that the gateway checks",
    "--grpc": "serves gRPC, which asks for no key, in place of HTTP",
    "--grpc-port": "opens a second port, which asks for no key",
    "--io-processor-plugin": _CODE,
    "--logits-processors": _CODE,
    "--middleware": _CODE,
    "--model-class-overrides": _CODE,
    "--profiler-config": _ROUTES,
    "--reasoning-parser-plugin": f"{_CODE}; use engine.reasoningParser with one of vLLM's own",
    "--scheduler-cls": _CODE,
    "--tool-parser-plugin": f"{_CODE}; use engine.toolCallParser with one of vLLM's own",
    "--worker-cls": _CODE,
    "--worker-extension-cls": _CODE,
}
ENV_EFFECTS = {
    "LD_AUDIT": _CODE,
    "LD_LIBRARY_PATH": _CODE,
    "LD_PRELOAD": _CODE,
    "PATH": _CODE,
    "PYTHONBREAKPOINT": _CODE,
    "PYTHONHOME": _CODE,
    "PYTHONPATH": _CODE,
    "PYTHONPYCACHEPREFIX": _CODE,
    "PYTHONUSERBASE": _CODE,
    "PYTHONWARNINGS": _CODE,
    "VLLM_ALLOW_INSECURE_SERIALIZATION": _CODE,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": _ADAPTERS,
    "VLLM_CUDART_SO_PATH": _CODE,
    "VLLM_LOGGING_CONFIG_PATH": f"{_CODE}; use VLLM_LOGGING_LEVEL",
    "VLLM_LORA_RESOLVER_CACHE_DIR": _ADAPTERS,
    "VLLM_LORA_RESOLVER_HF_REPO_LIST": _ADAPTERS,
    "VLLM_MEDIA_CONNECTOR": _MEDIA,
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": _MEDIA,
    "VLLM_NCCL_SO_PATH": _CODE,
    "VLLM_PLUGINS": "can add routes to the engine",
    "VLLM_RUST_FRONTEND_PATH": _CODE,
    "VLLM_SERVER_DEV_MODE": _ROUTES,
    "VLLM_TORCH_PROFILER_DIR": _ROUTES,  # before --profiler-config
}
# Keys by which vLLM imports modules, of JSON values and of dotted flags such as --kv-transfer-config.….
CODE_KEYS = ("module_path", "encoder_cache_manager_cls", "inductor_passes", "reasoning_parser_plugin")
CUSTOM_DRAFTER = "custom_class"  # --spec-method; its --spec-model is an import path
REFUSED = 'is refused by settings.policy.engineOptions "safe"'


def option_problems(extra_args: Sequence[str], env: Sequence[str]) -> Iterator[Problem]:
    """`env` are the names of the variables that the spec sets."""
    for index, item in enumerate(extra_args):
        if effect := _effect_of_flag(item) or _effect_of_value(item):
            yield Problem(f"spec.engine.extraArgs[{index}]", f"{effect}: {REFUSED}")
    for index, name in enumerate(env):
        if name in ENV_EFFECTS:
            yield Problem(f"spec.engine.env[{index}].name", env_refusal(name))


def env_refusal(name: str) -> str:
    return f"{name} {ENV_EFFECTS[name]}: {REFUSED}"


def _effect_of_flag(item: str) -> str:
    """Of the flag that an item is, or that argparse takes it for. Empty for a value and a harmless one."""
    if not item.startswith("-"):
        return ""
    flag = normalise(item)
    meant = [flag] if flag in FLAGS else [known for known in FLAG_EFFECTS if known.startswith(flag)]
    if found := next((known for known in meant if known in FLAG_EFFECTS), ""):
        return f"{found} {FLAG_EFFECTS[found]}"
    keys = item.split("=", 1)[0].replace("-", "_").split(".")[1:]
    return next((f"{key} {_CODE}" for key in keys if key.endswith(CODE_KEYS)), "")


def _effect_of_value(item: str) -> str:
    """Of an item that is a value, or has one behind `=`."""
    value = item.partition("=")[2] if item.startswith("-") else item
    if value == CUSTOM_DRAFTER:
        return f"{value} {_CODE}"
    try:
        parsed = json.loads(value)
    except ValueError:
        return ""
    return next((f"{key} {_CODE}" for key in _code_in(parsed)), "")


def _code_in(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _code_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key.endswith(CODE_KEYS) or item == CUSTOM_DRAFTER:
                yield key
            yield from _code_in(item)
