"""What `engine.extraArgs` and `engine.env` may do: `settings.policy.engineOptions`.

Proves: each flag and variable that loads code, shows files, loosens URLs or opens routes is refused with its
field, however it is spelt, in a template too; `full` opens them; tuning passes; each judged flag is vLLM's.
"""

from __future__ import annotations

import re

import pytest
from judged import engine_with, pod_of, refusals, settings

from vllm_operator.api.engine import MANAGED_ENV
from vllm_operator.api.flag_table import FLAGS
from vllm_operator.api.flags import MANAGED
from vllm_operator.render.engine_options import ENV_EFFECTS, FLAG_EFFECTS
from vllm_operator.settings import Settings

KV = "--kv-transfer-config"
REFUSED_ARGS: dict[str, tuple[list[str], str]] = {
    "files of the pod": (["--allowed-local-media-path", "/"], "lets callers read files of the pod"),
    "with a value": (["--allowed-local-media-path=/"], "lets callers read files of the pod"),
    "with underscores": (["--allowed_local_media_path", "/"], "lets callers read files of the pod"),
    "abbreviated": (["--allowed-loc=/"], "lets callers read files of the pod"),
    "after others": (["--enforce-eager", "--middleware=x.Y"], "--middleware loads code"),
    "middleware": (["--middleware", "x.Y"], "loads code"),
    "tool parser": (["--tool-parser-plugin", "/models/x.py"], "use engine.toolCallParser"),
    "reasoning parser": (["--reasoning-parser-plugin", "/models/x.py"], "use engine.reasoningParser"),
    "reasoning parser in JSON": (
        ["--structured-outputs-config", '{"reasoning_parser_plugin": "/models/x.py"}'],
        "reasoning_parser_plugin loads code",
    ),
    "logits processor": (["--logits-processors", "x.Y"], "loads code"),
    "output processor": (["--io-processor-plugin", "x"], "loads code"),
    "worker": (["--worker-cls", "x.Y"], "loads code"),
    "worker's extension": (["--worker-extension-cls", "x.Y"], "loads code"),
    "scheduler": (["--scheduler-cls", "x.Y"], "loads code"),
    "model's class": (["--model-class-overrides", '{"A": "x:Y"}'], "loads code"),
    "model's class, dotted": (["--model-class-overrides.A", "x:Y"], "loads code"),
    "connector": ([f'{KV}={{"kv_connector_module_path": "x"}}'], "kv_connector_module_path loads code"),
    "connector, dotted": ([f"{KV}.kv_connector_module_path", "x"], "kv_connector_module_path loads code"),
    "connector, deep": (
        [KV, '{"kv_connector_extra_config": {"tiers": [{"module_path": "x"}]}}'],
        "module_path loads code",
    ),
    "compiler pass": (["-cc.inductor_passes.a=x.y"], "inductor_passes loads code"),
    "drafter": (["--spec-method", "custom_class", "--spec-model", "x.Y"], "custom_class loads code"),
    "drafter in JSON": (["-sc", '{"method": "custom_class", "model": "x.Y"}'], "method loads code"),
    "profiler": (["--profiler-config.profiler", "torch"], "opens routes that change the engine"),
    "fault tolerance": (["--enable-fault-tolerance"], "opens routes that change the engine"),
    "scale-out routes": (["--enable-scale-out"], "opens routes beside those"),
    "a second protocol": (["--grpc"], "serves gRPC"),
}
REFUSED_ENV = {
    "VLLM_SERVER_DEV_MODE": "opens routes that change the engine",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "use spec.adapters",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "loads code",
    "VLLM_LORA_RESOLVER_CACHE_DIR": "use spec.adapters",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "use engine.allowedMediaDomains",
    "VLLM_PLUGINS": "can add routes",
    "PYTHONPATH": "loads code",
    "LD_PRELOAD": "loads code",
    "PATH": "loads code",
}
BY_OPTIONS = 'is refused by settings.policy.engineOptions "safe"'


@pytest.mark.parametrize("row", REFUSED_ARGS)
def test_an_argument_that_is_more_than_tuning_is_refused(row: str) -> None:
    args, effect = REFUSED_ARGS[row]
    found = refusals(Settings(), engine={"extraArgs": args})
    assert found
    for told in found:
        assert re.match(r"spec\.engine\.extraArgs\[\d\]: ", told)
        assert effect in told
        assert told.endswith(BY_OPTIONS)
    pod_of(settings(engineOptions="full"), engine={"extraArgs": args})


@pytest.mark.parametrize("name", REFUSED_ENV)
def test_a_variable_that_is_more_than_tuning_is_refused(name: str) -> None:
    spec = {"engine": {"env": [{"name": "A", "value": "x"}, {"name": name, "value": "1"}]}}
    (told,) = refusals(Settings(), **spec)
    assert told.startswith(f"spec.engine.env[1].name: {name} ")
    assert REFUSED_ENV[name] in told
    assert told.endswith(BY_OPTIONS)
    pod_of(settings(engineOptions="full"), **spec)


def test_a_template_is_no_way_around_the_options() -> None:
    """Where a template may not be "full"; the platform that opens both has opened them."""
    both = {
        "env": [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}],
        "envFrom": [{"configMapRef": {"name": "c"}}],
    }
    template = engine_with(**both)
    variable, anything = refusals(Settings(), podTemplate=template)
    assert variable.startswith(
        "spec.podTemplate.spec.containers[engine].env: VLLM_SERVER_DEV_MODE opens routes"
    )
    assert anything.startswith("spec.podTemplate.spec.containers[engine].envFrom: can set any variable")
    pod_of(settings(engineOptions="full"), podTemplate=template)


@pytest.mark.parametrize(
    "args",
    [
        [KV, '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
        ["-cc.cudagraph_mode", "PIECEWISE"],
        ["--hf-overrides", '{"architectures": ["A"]}'],
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
        ["--structured-outputs-config.backend=xgrammar"],
        ["--chat-template-content-format", "middleware"],
        ["--enable-sleep-mode", "--max-num-batched-tokens", "4096", "--flag-of-a-fork", "{not json"],
    ],
)
def test_tuning_passes(args: list[str]) -> None:
    variables = [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}, {"name": "HF_ENDPOINT", "value": "x"}]
    pod_of(Settings(), engine={"extraArgs": args, "env": variables})


def test_every_judged_flag_is_vllms_own_and_no_other_field_manages_it() -> None:
    assert FLAG_EFFECTS.keys() <= FLAGS
    assert not FLAG_EFFECTS.keys() & MANAGED.keys()
    assert not ENV_EFFECTS.keys() & MANAGED_ENV.keys()
