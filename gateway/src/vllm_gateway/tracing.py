"""OpenTelemetry traces: one span a request, never anything a token. The extra `otel`; where no endpoint
is set, nothing of it is imported and a request costs one comparison.

Context comes in and goes out as W3C headers (https://www.w3.org/TR/trace-context/). Attributes have the names
of https://opentelemetry.io/docs/specs/semconv/gen-ai/ and of its HTTP conventions. Spans leave in batches,
from a thread of the SDK's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_gateway import __version__
from vllm_gateway.settings import BadSettings, TracingSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Headers = Mapping[bytes, bytes]

_CONTEXT = ("traceparent", "tracestate")
_OPERATIONS = {
    "/chat": "chat",
    "/chat/stream": "chat",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_EXPORT_SECONDS = 3.0  # with all its retries, so that a collector that is away does not hold up the end
_Value = str | int | float


class Trace:
    """One request's span."""

    __slots__ = ("_span", "headers")

    def __init__(self, span: Span, headers: Headers) -> None:
        self._span = span
        self.headers = headers

    def end(self, route: str, model: str, status: int, outcome: str, tokens: tuple[int, int]) -> None:
        """`outcome` is an error's code or how a stream ended; empty or `complete` where all went well.
        `tokens` are what the answer is charged: of the prompt, and of the completion.
        """
        failed = status >= 500 or (outcome not in ("", "complete") and status == 200)
        found: dict[str, _Value] = {
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": tokens[0],
            "gen_ai.usage.output_tokens": tokens[1],
            "http.response.status_code": status,
        }
        if outcome and outcome != "complete":
            found["error.type"] = outcome
        self._span.update_name(f"{_OPERATIONS.get(route, route)} {model}")
        self._span.set_attributes(found)
        if failed:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end()


class Tracing:
    """Makes spans and sends them to `settings.endpoint`. Raises BadSettings without the extra."""

    def __init__(self, settings: TracingSettings) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            text = (
                "tracing.endpoint is set and OpenTelemetry is not installed: pip install vllm-gateway[otel]"
            )
            raise BadSettings(text) from error
        resource = Resource.create({"service.name": settings.service_name, "service.version": __version__})
        sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vllm_gateway", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, route: str, headers: Headers, request_id: str) -> Trace:
        """A span under the caller's, with the headers that carry it on to the engine."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        given = {
            name: headers[key].decode("latin-1") for name in _CONTEXT if (key := name.encode()) in headers
        }
        attributes: dict[str, _Value] = {
            "gen_ai.provider.name": "vllm",
            "gen_ai.operation.name": _OPERATIONS.get(route, route),
            "http.request.method": method,
            "http.route": route,
            "vllm_gateway.request_id": request_id,
        }
        context = self._propagator.extract(given)
        span = self._tracer.start_span(route, context, SpanKind.SERVER, attributes)
        carried: dict[str, str] = {}
        self._propagator.inject(carried, set_span_in_context(span))
        kept = {name: value for name, value in headers.items() if name.decode("latin-1") not in _CONTEXT}
        return Trace(span, kept | {name.encode(): value.encode() for name, value in carried.items()})

    def stop(self) -> None:
        """Sends what is left. Blocks: call it from a thread."""
        self._provider.shutdown()


def make_tracing(settings: TracingSettings) -> Tracing | None:
    return None if settings.endpoint is None else Tracing(settings)
