"""The one line of a dead engine's output that says why, fit to be read by all who may read the status."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_operator.api.status import Reason
from vllm_operator.errors import clip

MAX_LINE = 400

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# "(EngineCore pid=71) ERROR 11-22 22:40:02 [core.py:1136] " in front of what was logged
_PREFIX = re.compile(r"^(\([^)]*\)\s*)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s*)?")
_ERROR = re.compile(
    r"\b(\w*(Error|Exception|Interrupt)\b\s*:|error:|CUDA error|out of memory)", re.IGNORECASE
)
# Pydantic's heading says only how many errors there are; below it stand the first one's field, if it has one,
# and its words, before the value that was given. https://docs.pydantic.dev/latest/errors/errors/
_HEADING = re.compile(r"ValidationError: \d+ validation errors? for ")
_GIVEN = re.compile(r" \[type=\w+, input_value=.*$")
_UNHELPFUL = re.compile(
    r"See root cause above|Engine core initialization failed|core proc \w+ failed", re.IGNORECASE
)
_SECRETS = (
    re.compile(r"\b(hf_|sk-|ghp_|glpat-|xox[bp]-|AKIA)[A-Za-z0-9_-]{6,}"),
    re.compile(r"(?i)(?<=bearer )[^\s'\"]+"),
    re.compile(
        r"(?i)((?:token|secret|password|passwd|api[-_]?key|access[-_]?key)['\"]?\s*[=:]\s*['\"]?)[^\s'\",&]+"
    ),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
)


# A flag and its value, in a command line or a JSON list of arguments.
_SECRET_FLAG = re.compile(
    r"(?i)(--[a-z-]*(?:token|secret|password|api[-_]key)['\"]?,?\s+['\"]?)(?!-)[^\s'\",]+"
)


def scrub(text: str) -> str:
    """Without terminal codes and without what looks like a credential."""
    text = _SECRET_FLAG.sub(r"\1[redacted]", _ANSI.sub("", text))
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: f"{found[1] if _keeps_name(found) else ''}[redacted]", text)
    return text


def _keeps_name(found: re.Match[str]) -> bool:
    return bool(found.re.groups) and found[1].rstrip("'\" ").endswith(("=", ":"))


def last_error_line(message: str) -> str:
    """The last line that names an error and does not merely point to one above; else the last line."""
    lines = [_PREFIX.sub("", line.strip()).strip() for line in scrub(message).splitlines()]
    lines = [line for line in lines if line]
    found = [at for at, line in enumerate(lines) if _ERROR.search(line) and not _UNHELPFUL.search(line)]
    if not found:
        return clip((lines or [""])[-1], MAX_LINE)
    return clip(_GIVEN.sub("", _told_at(lines, found[-1])), MAX_LINE)


def _told_at(lines: list[str], at: int) -> str:
    """The line itself, or the first error that a heading of Pydantic's announces, with its field."""
    below = lines[at + 1 : at + 3] if _HEADING.search(lines[at]) else []
    if not below:
        return lines[at]
    return below[0] if _GIVEN.search(below[0]) else ": ".join(below)


@dataclass(frozen=True)
class Cause:
    """What the last words of an engine amount to, and what a person can do about it."""

    pattern: re.Pattern[str]
    reason: Reason
    advice: str


# The first that matches anywhere in the words: the telling line need not be the last one.
CAUSES = (
    # argparse, which vLLM ends with code 2
    Cause(
        re.compile(
            r"error: (unrecognized arguments|argument |ambiguous option|the following arguments are required)"
        ),
        Reason.WRONG_FLAG,
        "mend engine.extraArgs, or the field of that flag",
    ),
    # Also when the weights leave no room for the KV cache: the same fields mend it.
    Cause(
        re.compile(
            r"out of memory|OutOfMemoryError|\bOOM\b|No available memory|available KV cache memory",
            re.IGNORECASE,
        ),
        Reason.OUT_OF_MEMORY,
        "lower engine.maxModelLen, engine.maxNumSeqs or engine.gpuMemoryUtilization, or use more GPUs",
    ),
    # huggingface_hub's GatedRepoError is a 403, or a 401 where there is no token
    Cause(
        re.compile(r"gated repo|GatedRepoError|403 Client Error|is restricted\b.*\baccess", re.IGNORECASE),
        Reason.MODEL_ACCESS_DENIED,
        "accept the model's terms on huggingface.co with the account of source.huggingFace.tokenSecret",
    ),
    # and it answers 401 for a repository that does not exist, too
    Cause(
        re.compile(
            r"401 Client Error|RepositoryNotFoundError|not a valid model identifier|Invalid (user|username)",
            re.IGNORECASE,
        ),
        Reason.MODEL_ACCESS_DENIED,
        "check spec.model, and the token in source.huggingFace.tokenSecret: the model does not exist, or is "
        "not shown to this token",
    ),
)


def cause_of_death(words: str) -> Cause | None:
    return next((cause for cause in CAUSES if cause.pattern.search(words)), None)
