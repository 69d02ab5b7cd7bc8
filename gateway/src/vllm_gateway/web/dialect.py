"""What differs between the API families once a request has been understood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_gateway.errors import GatewayError

_ANTHROPIC_CACHE = ("cache_read_input_tokens", "cache_creation_input_tokens")


@dataclass(slots=True)
class Account:
    """What an answer was, as far as it has been seen. `failure` is an in-band one, by its metric label."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_events: int = 0
    finish_reason: str | None = None
    failure: str | None = None
    done: bool = False

    def read_usage(self, usage: object) -> None:
        """A usage object of vLLM, OpenAI or Anthropic; anything else is ignored."""
        if not isinstance(usage, dict):
            return
        if "input_tokens" in usage:
            # Anthropic counts what a cache had beside its `input_tokens`, OpenAI within them.
            cached = sum(_count(usage.get(key), 0) for key in _ANTHROPIC_CACHE)
            self.prompt_tokens = _count(usage["input_tokens"], self.prompt_tokens) + cached
            self.completion_tokens = _count(usage.get("output_tokens"), self.completion_tokens)
        else:
            prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(prompt, int) and prompt >= 0:
                self.prompt_tokens = prompt
            if isinstance(completion, int) and completion >= 0:
                self.completion_tokens = completion


def _count(value: object, default: int) -> int:
    return value if isinstance(value, int) and value >= 0 else default


@dataclass(frozen=True, slots=True)
class Shape:
    """What a dialect makes of one ordinary token event: `head`, the text as the engine wrote it, `foot`.

    `fits` says of a text (the inside of a JSON string) whether that is all there is to do.
    """

    head: bytes
    foot: bytes
    fits: Callable[[bytes], object]
    around: int  # the length of head and foot


class Shortcut:
    """A stream dialect that has no need to see ordinary token events: those that differ in their text only.

    `verbatim` ones let them pass as they are. Others make their own of the texts, each the inside of a JSON
    string; `key` says where in vLLM's event it stood (`content`, `reasoning`, `text`). While a dialect
    `holds` something back, every event comes to `block`.
    """

    verbatim = True
    holds = False

    def rewrite(self, key: str, texts: Sequence[bytes]) -> bytes:
        raise NotImplementedError(key, texts)

    def shape(self, key: str) -> Shape | None:  # noqa: ARG002 - of those that are not verbatim
        """The same for one text, where it is that simple."""
        return None


class StreamDialect(Protocol):
    """Turns an engine's events into what the caller gets. A block is one or more whole events."""

    account: Account

    def block(self, block: bytes) -> bytes:
        """What is sent for a block; may be nothing."""
        ...

    def has_token(self, block: bytes) -> bool:
        """Whether a block is more than an opening formality: then the first token has come."""
        ...

    def end(self) -> bytes:
        """What is sent after the last block of a stream that ended well."""
        ...

    def failed(self, error: GatewayError) -> bytes:
        """One error event and the family's terminator."""
        ...


class Dialect(Protocol):
    """One request's side of a family."""

    def stream(self, engine: str = "", /) -> StreamDialect:
        """For one stream, of the engine with this endpoint's id."""
        ...

    def unary(self, body: bytes, account: Account) -> bytes:
        """The body for the caller, from the engine's. Raises GatewayError where it cannot be read."""
        ...

    def refusal(self, status: int, body: bytes) -> bytes | None:
        """The engine's error body if it may go to the caller as it is."""
        ...
