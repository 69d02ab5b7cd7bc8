"""Metrics (the catalogue is docs/reference/metrics.md) and the access log.

Labels are bounded: a model is its key from the table or `unknown`, a route is one of ours or `other`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

UNKNOWN_MODEL = "unknown"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 300)
REFUSALS = frozenset(  # codes of errors.py and policy; an engine's own words never become a label
    {
        *("missing_api_key", "invalid_api_key", "rate_limit_exceeded"),
        *("model_not_found", "model_not_allowed", "model_not_ready"),
        *("queue_full", "queue_timeout", "shutting_down"),
    }
)
_GAP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 60)


class Gaps:
    """Inter-token gaps of one model: a histogram that costs two list writes an observation.

    prometheus-client's takes a lock and several calls, about 1.5 µs, which would be a tenth of what
    relaying an event costs. Only the request loop writes; the scrape reads.
    """

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0] * (len(_GAP_BOUNDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float, events: int = 1) -> None:
        """One gap; further events that came in the same read followed it without any."""
        self._counts[bisect_left(_GAP_BOUNDS, seconds)] += 1
        self.total += seconds
        if events > 1:
            self._counts[0] += events - 1

    def buckets(self) -> list[tuple[str, float]]:
        bounds = [*map(str, map(float, _GAP_BOUNDS)), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))


class Readings(Collector):
    """What is read at scrape time instead of being counted: gauges and the gaps."""

    def __init__(self) -> None:
        self.gaps: dict[str, Gaps] = {}
        self.in_flight: Callable[[], Mapping[str, int]] = dict
        self.queued: Callable[[], Mapping[str, int]] = dict
        self.endpoints: Callable[[], Mapping[str, int]] = dict
        self.ejected: Callable[[], Mapping[str, int]] = dict
        self.key_problem: Callable[[], str] = str
        self.certificate_problem: Callable[[], str] = str
        self.connections: Callable[[], int] = int
        self.table_age: Callable[[], float] = float

    def collect(self) -> Iterable[Metric]:
        yield _by_model("in_flight", "Requests at engines now.", self.in_flight())
        yield _by_model("queued", "Requests that wait for a place or a first endpoint.", self.queued())
        yield _by_model("endpoints", "Ready endpoints in the table, ejected ones too.", self.endpoints())
        yield _by_model("ejected_endpoints", "Endpoints left alone since they failed.", self.ejected())
        yield GaugeMetricFamily(
            "vllm_gateway_key_file_failed",
            "1 while the file of API keys cannot be read and older keys are in force.",
            value=float(bool(self.key_problem())),
        )
        yield GaugeMetricFamily(
            "vllm_gateway_certificate_failed",
            "1 while the TLS certificate's files cannot be read and an older certificate is in force.",
            value=float(bool(self.certificate_problem())),
        )
        yield GaugeMetricFamily(
            "vllm_gateway_connections", "Open connections of callers.", value=self.connections()
        )
        yield GaugeMetricFamily(
            "vllm_gateway_table_age_seconds",
            "Seconds since discovery last heard from its source.",
            value=self.table_age(),
        )
        gaps = HistogramMetricFamily(
            "vllm_gateway_inter_token_seconds",
            "Gap between two reads of a stream that carried tokens.",
            labels=["model"],
        )
        for model, observed in dict(self.gaps).items():
            gaps.add_metric([model], observed.buckets(), sum_value=observed.total)
        yield gaps


def _by_model(name: str, text: str, counts: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"vllm_gateway_{name}", text, labels=["model"])
    for model, count in counts.items():
        family.add_metric([model], count)
    return family


class _QuickCounter(Counter):
    """Finds what it has labelled before by one look-up: prometheus-client's own takes a lock and 2 µs."""

    def labels(self, *values: str) -> Counter:  # type: ignore[override]
        children = self.__dict__.setdefault("_quick", {})
        child: Counter | None = children.get(values)
        if child is None:
            child = children[values] = super().labels(*values)
        return child


class _QuickHistogram(Histogram):
    """The same for histograms."""

    def labels(self, *values: str) -> Histogram:  # type: ignore[override]
        children = self.__dict__.setdefault("_quick", {})
        child: Histogram | None = children.get(values)
        if child is None:
            child = children[values] = super().labels(*values)
        return child


class Metrics:
    """Every metric, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.readings = Readings()
        self.registry.register(self.readings)
        self.requests = self._counter("requests", "Requests answered.", "model", "route", "code")
        self.duration = self._histogram(
            "request_duration_seconds",
            "From the request's head to the answer's end.",
            _SECONDS,
            "model",
            "route",
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the request's head to the first token.",
            _FIRST_TOKEN,
            "model",
        )
        self.tokens = self._counter("tokens", "Tokens, as the engine counts them.", "model", "key", "kind")
        self.streams_ended = self._counter(
            "streams_ended",
            "Streams by how they ended: complete, client_closed, write_stall, draining, a reason of "
            "upstream_errors, or, for those that had only waited, the error's code; refused is what the "
            "engine refused then.",
            "model",
            "outcome",
        )
        self.upstream_errors = self._counter("upstream_errors", "Failures of engines.", "model", "reason")
        self.retries = self._counter("retries", "Requests tried again elsewhere.")
        self._refusals = self._counter(
            "refusals", "Requests that the gateway itself refused, by the error's code.", "code"
        )
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "How long requests waited that had to wait.", _SECONDS, "model"
        )
        self.cache_requests = self._counter(
            "cache_requests", "Requests for models with a response cache: hit, miss or bypass.", "result"
        )

    def gaps_of(self, model: str) -> Gaps:
        return self.readings.gaps.setdefault(model, Gaps())

    def upstream_error(self, model: str, reason: str) -> None:
        self.upstream_errors.labels(model, reason).inc()

    def refused(self, code: str) -> None:
        """Counts an error that is the gateway's own decision; other codes (a bad body) are no refusal."""
        if code in REFUSALS:
            self._refusals.labels(code).inc()

    def retry(self) -> None:
        self.retries.inc()

    def count_tokens(self, model: str, key: str, prompt: int, completion: int) -> None:
        """`key` is the name of an API key, never the key."""
        if prompt:
            self.tokens.labels(model, key, "prompt").inc(prompt)
        if completion:
            self.tokens.labels(model, key, "completion").inc(completion)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return _QuickCounter(f"vllm_gateway_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return _QuickHistogram(
            f"vllm_gateway_{name}", text, labels, buckets=list(buckets), registry=self.registry
        )


# Whatever a reader of the log may take for the end of a line, or for a terminal's command.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class LineFormatter(logging.Formatter):
    """One line a record, as JSON or as text; a record's `fields` are its keys."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._second, self._moment = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if (second := int(record.created)) != self._second:
            self._second, self._moment = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        moment = self._moment
        stamp = f"{moment}.{int(record.msecs):03d}Z"
        if self._as_json:
            head = {"time": stamp, "level": record.levelname.lower(), "logger": record.name}
            return json.dumps(head | {"message": record.getMessage()} | fields)
        trace = fields.pop("exception", "")
        pairs = "".join(f" {key}={value}" for key, value in fields.items())
        line = f"{stamp} {record.levelname:<7} {record.getMessage()}{pairs}"
        return _CONTROL.sub(_escaped, line) + (f"\n{trace}" if trace else "")


def configure_logging(level: str, *, as_json: bool) -> None:
    """Sends every log line to standard output. The access log is the logger `vllm_gateway.access`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter(as_json=as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What no line of ours shows need not be found out for each (Python's logging HOWTO, "Optimization").
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False  # Python 3.12
    for name in ("uvicorn", "asyncio"):  # their news are in our words: listening, draining, stopped
        logging.getLogger(name).setLevel("WARNING")
