"""A collector of OpenTelemetry traces: OTLP over HTTP with protobuf, on a real socket.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Received:
    """A span with its ids in hex, and the attributes of its resource."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    error: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


class OtlpCollector:
    """Takes `POST /v1/traces` and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/traces"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self._one(reader, writer)
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        first, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers["content-length"]))
        right = first.startswith("post /v1/traces ") and headers["content-type"] == "application/x-protobuf"
        if right:
            self._take(gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body)
        answer = ExportTraceServiceResponse().SerializeToString()
        status = "200 OK" if right else "400 Bad Request"
        kind = "content-type: application/x-protobuf"
        writer.write(
            f"HTTP/1.1 {status}\r\n{kind}\r\ncontent-length: {len(answer)}\r\n\r\n".encode() + answer
        )
        await writer.drain()

    def _take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for of_resource in request.resource_spans:
            resource = _values(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                self.spans += [_received(span, resource) for span in of_scope.spans]


def _received(span: Any, resource: dict[str, Any]) -> Received:
    return Received(
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        error=span.status.code == 2,
        attributes=_values(span.attributes),
        resource=resource,
    )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
