"""The streams of `/v1/responses`: named events with a number each, and one that ends them.

vLLM 0.32 counts tokens in every answer of this route, so nothing is asked for or taken out.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from vllm_gateway.errors import GatewayError, retry_hint
from vllm_gateway.upstream import sse
from vllm_gateway.web.dialect import Account
from vllm_gateway.web.openai import OpenAIDialect, json_object

_NUMBER = re.compile(rb'"sequence_number"\s*:\s*([0-9]{1,9})\b')
_LAST = frozenset({"response.completed", "response.incomplete", "response.failed"})


class ResponsesStream:
    """Events pass as they are; those about the response as a whole, and errors, are looked into."""

    def __init__(self) -> None:
        self.account = Account()
        self._newest = b""

    def block(self, block: bytes) -> bytes:
        self._newest = block
        if b'"response":' in block or b'"error"' in block:  # quotes are escaped in a model's text
            for event in sse.split(block):
                self._read(event)
        return block

    def has_token(self, block: bytes) -> bool:
        return b".delta" in block or self.account.done or self.account.failure is not None

    def end(self) -> bytes:
        return b""

    def failed(self, error: GatewayError) -> bytes:
        document = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": self._next_number(),
        }
        return b"event: error\ndata: " + json.dumps(document | retry_hint(error)).encode() + b"\n\n"

    def _next_number(self) -> int:
        numbers = _NUMBER.findall(self._newest)
        return int(numbers[-1]) + 1 if numbers else 0

    def _read(self, event: bytes) -> None:
        document = json_object(sse.data_of(event)) or {}
        kind = document.get("type")
        if kind in _LAST:
            response = document.get("response")
            self.account.read_usage(response.get("usage") if isinstance(response, dict) else None)
            self.account.done = True
        if kind in ("error", "response.failed") or (kind is None and document.get("error")):
            self.account.failure = "in_band_error"


@dataclass(slots=True)
class ResponsesDialect(OpenAIDialect):
    """One request of `/v1/responses`; whole answers and errors are as in OpenAI's other routes."""

    def stream(self, _engine: str = "", /) -> ResponsesStream:  # type: ignore[override]
        return ResponsesStream()
