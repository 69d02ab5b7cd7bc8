"""The Anthropic-compatible `/v1/messages`: named events, an end without `[DONE]`, errors in their shape.

vLLM 0.32 counts tokens in every stream of this route (`message_delta`), so nothing is asked for or taken out.
https://docs.anthropic.com/en/api/messages-streaming
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from vllm_gateway.errors import GatewayError, anthropic_body
from vllm_gateway.settings import RequestLimits
from vllm_gateway.upstream import sse
from vllm_gateway.web.dialect import Account
from vllm_gateway.web.openai import count_whole, json_object


class AnthropicStream:
    """Events pass as they are; the message's own, and errors, are looked into."""

    def __init__(self) -> None:
        self.account = Account()

    def block(self, block: bytes) -> bytes:
        # A text that holds these words costs a parse and nothing else.
        if b"message_" in block or b'"error"' in block:
            for event in sse.split(block):
                self._read(event)
        return block

    def has_token(self, block: bytes) -> bool:
        return b"content_block_delta" in block or self.account.done or self.account.failure is not None

    def end(self) -> bytes:
        return b""  # `message_stop` is the end, or vLLM's own `error` event, which nothing follows

    def failed(self, error: GatewayError) -> bytes:
        return b"event: error\ndata: " + json.dumps(anthropic_body(error)).encode() + b"\n\n"

    def _read(self, event: bytes) -> None:
        document = json_object(sse.data_of(event)) or {}
        kind = document.get("type")
        if kind == "message_start":
            message = document.get("message")
            self.account.read_usage(message.get("usage") if isinstance(message, dict) else None)
        elif kind == "message_delta":
            self.account.read_usage(document.get("usage"))
            self._read_stop(document.get("delta"))
        elif kind == "message_stop":
            self.account.done = True
        elif kind == "error":
            self.account.failure = "in_band_error"

    def _read_stop(self, delta: object) -> None:
        """VLLM at SIGTERM stops a message without a reason: it looks like an end and is none."""
        if isinstance(delta, dict) and "stop_reason" in delta:
            reason = delta["stop_reason"]
            self.account.finish_reason = reason if isinstance(reason, str) else "abort"
            if reason is None:
                self.account.failure = "abort"


@dataclass(frozen=True, slots=True)
class AnthropicDialect:
    """One request in Anthropic's words."""

    limits: RequestLimits

    def stream(self, _engine: str = "", /) -> AnthropicStream:
        return AnthropicStream()

    def unary(self, body: bytes, account: Account) -> bytes:
        count_whole(body, account, self.limits)
        return body

    def refusal(self, status: int, body: bytes) -> bytes | None:  # noqa: ARG002
        return None  # vLLM's error types are not Anthropic's
