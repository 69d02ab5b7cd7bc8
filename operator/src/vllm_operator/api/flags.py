"""What `engine.extraArgs` may hold: vLLM's flags, less those that a field manages and those that are gone.

argparse takes abbreviations (`--max-model` for `--max-model-len`), vLLM also takes `_` for `-`, and both take
`--flag=value`; each item is brought to its plain form before it is judged. An abbreviation is refused when it
could mean a managed flag: either vLLM would take it as that flag, or it would end with "ambiguous option".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_operator.api.flag_table import FLAGS
from vllm_operator.errors import Problem

if TYPE_CHECKING:
    from vllm_operator.api.v1alpha1 import Spec

_OWN = "the operator sets it"
_PLAIN_HTTP = "the gateway speaks plain HTTP to the engine"
_ONE_POD = "use engine.tensorParallelSize and engine.pipelineParallelSize"

# Flag -> what to use instead. Booleans are listed with their `--no-` form.
MANAGED = {
    "--model": "use spec.model",
    "--served-model-name": "use spec.servedNames",
    "--config": "use the fields of spec.engine and extraArgs",
    "--host": _OWN,
    "--port": _OWN,
    "--uds": _OWN,
    "--root-path": _OWN,
    "--headless": _ONE_POD,
    "--revision": "use source.huggingFace.revision",
    "--hf-token": "use source.huggingFace.tokenSecret; an argument could be read by everyone",
    "--api-key": "the gateway checks keys; an argument could be read by everyone",
    "--runner": "use engine.runner",
    "--dtype": "use engine.dtype",
    "--max-model-len": "use engine.maxModelLen",
    "--gpu-memory-utilization": "use engine.gpuMemoryUtilization",
    "--device-memory-utilization": "use engine.gpuMemoryUtilization",
    "--quantization": "use engine.quantization",
    "-q": "use engine.quantization",
    "--tensor-parallel-size": "use engine.tensorParallelSize",
    "-tp": "use engine.tensorParallelSize",
    "--pipeline-parallel-size": "use engine.pipelineParallelSize",
    "-pp": "use engine.pipelineParallelSize",
    "--data-parallel-size": "use spec.replicas",
    "-dp": "use spec.replicas",
    "--nnodes": _ONE_POD,
    "--node-rank": _ONE_POD,
    "--master-addr": _ONE_POD,
    "--master-port": _ONE_POD,
    "--kv-cache-dtype": "use engine.kvCacheDtype",
    "--max-num-seqs": "use engine.maxNumSeqs",
    "--enable-prefix-caching": "use engine.prefixCaching",
    "--no-enable-prefix-caching": "use engine.prefixCaching",
    "--enable-auto-tool-choice": "use engine.toolCallParser",
    "--no-enable-auto-tool-choice": "use engine.toolCallParser",
    "--tool-call-parser": "use engine.toolCallParser",
    "--reasoning-parser": "use engine.reasoningParser",
    "--enable-lora": "use spec.adapters",
    "--no-enable-lora": "use spec.adapters",
    "--lora-modules": "use spec.adapters",
    "--max-loras": "use engine.maxLoras",
    "--max-lora-rank": "use engine.maxLoraRank",
    "--trust-remote-code": "use engine.trustRemoteCode",
    "--no-trust-remote-code": "use engine.trustRemoteCode",
    "--allowed-media-domains": "use engine.allowedMediaDomains",
    "--shutdown-timeout": "use rollout.drainTimeout",
    "--ssl-keyfile": _PLAIN_HTTP,
    "--ssl-certfile": _PLAIN_HTTP,
    "--ssl-ca-certs": _PLAIN_HTTP,
    "--ssl-cert-reqs": _PLAIN_HTTP,
    "--enable-ssl-refresh": _PLAIN_HTTP,
    "--no-enable-ssl-refresh": _PLAIN_HTTP,
}

# Flag that vLLM 0.32 no longer has -> what became of it. Its parser ends with exit code 2 on each.
REMOVED = {
    "--task": "use engine.runner",
    "--device": "use engine.device",
    "--disable-log-requests": "requests are not logged unless --enable-log-requests is given",
    "--enable-reasoning": "engine.reasoningParser alone turns it on",
    "--swap-space": "see --cpu-offload-gb and --kv-offloading-size",
    "--guided-decoding-backend": "see --structured-outputs-config",
    "--num-scheduler-steps": "the scheduler has no such steps any more",
    "--speculative-model": "see --speculative-config",
    "--num-speculative-tokens": "see --speculative-config",
    "--rope-scaling": "see --hf-overrides",
    "--rope-theta": "see --hf-overrides",
    "--max-seq-len-to-capture": "see --compilation-config",
    "--cuda-graph-sizes": "see --compilation-config",
    "--calculate-kv-scales": "scales come from the checkpoint",
    "--tokenizer-pool-size": "there is no tokenizer pool any more",
    "--preemption-mode": "the scheduler decides",
    "--max-num-partial-prefills": "the scheduler decides",
    "--disable-frontend-multiprocessing": "there is one way to run the frontend",
    "--use-v2-block-manager": "there is one block manager",
    "--worker-use-ray": "see --distributed-executor-backend",
    "--override-pooler-config": "see --pooler-config",
}


def extra_args_problems(spec: Spec) -> Iterator[Problem]:
    """Judges every item that begins with '-'; the others are values, which only vLLM can judge."""
    items = spec.engine.extra_args
    if items and not items[0].startswith("-"):
        yield Problem(
            "spec.engine.extraArgs[0]", "is a value without a flag: begin with the flag, as its own item"
        )
    for index, item in enumerate(items):
        if item.startswith("-") and not _is_number(item):
            flag = normalise(item)
            complaint = next((text for judge in JUDGES if (text := judge(flag))), None)
            if complaint:
                yield Problem(f"spec.engine.extraArgs[{index}]", complaint)


def normalise(item: str) -> str:
    """The plain name of the flag in an item: no value, no underscores, no lower levels of a dotted flag."""
    flag = item.split("=", 1)[0]
    return flag.replace("_", "-").split(".", 1)[0] if flag.startswith("--") else flag


def _ill_formed(flag: str) -> str | None:
    if any(character.isspace() for character in flag):
        return "write the flag and its value as two items, or as --flag=value"
    return f"{flag} ends the flags: leave it out" if not flag.strip("-") else None


def _managed(flag: str) -> str | None:
    return f"{flag} is managed by the operator: {MANAGED[flag]}" if flag in MANAGED else None


def _removed(flag: str) -> str | None:
    return f"vLLM no longer has {flag}: {REMOVED[flag]}" if flag in REMOVED else None


def _abbreviated(flag: str) -> str | None:
    """For argparse, a prefix of a long flag is that flag, unless the prefix is a flag itself."""
    if not flag.startswith("--") or flag in FLAGS:
        return None
    meant = next((managed for managed in MANAGED if managed.startswith(flag)), None)
    return meant and f"{flag} abbreviates {meant}, which is managed by the operator: {MANAGED[meant]}"


def _glued(flag: str) -> str | None:
    """`-tp2` is `-tp 2` for argparse; a longer short flag (`-dpl`) wins over a shorter one (`-dp`)."""
    if flag.startswith("--") or flag in FLAGS:
        return None
    meant = next((managed for managed in ("-tp", "-pp", "-dp", "-q") if flag.startswith(managed)), None)
    return meant and f"{flag} sets {meant}, which is managed by the operator: {MANAGED[meant]}"


JUDGES = (_ill_formed, _managed, _removed, _abbreviated, _glued)


def _is_number(item: str) -> bool:
    try:
        float(item)
    except ValueError:
        return False
    return True
