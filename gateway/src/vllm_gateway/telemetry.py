"""Metrics (the catalogue is docs/reference/metrics.md) and the access log.

Labels are bounded: a model is its key from the table or `unknown`, a route is one of ours or `other`. The
series of a model or an API key that is gone go some time after it, or they would pile up over months.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_gateway.instruments import Absences, Counter, Distribution, Histogram

UNKNOWN_MODEL = "unknown"
_MOST_LINES = 64  # of the access log that wait to be written
KEPT_SECONDS = 900.0  # after what they are about is gone: several scrapes, though a collector was away
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 300)
REFUSALS = frozenset(  # codes of errors.py and policy; an engine's own words never become a label
    {
        *("missing_api_key", "invalid_api_key", "rate_limit_exceeded"),
        *("model_not_found", "model_not_allowed", "model_not_ready"),
        *("queue_full", "queue_timeout", "gateway_full", "shutting_down"),
    }
)
GAP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 60)


class Gaps(Distribution):
    """Inter-token gaps of one model, in seconds. Those that are `add`ed count once `settle` has been called:
    many at once cost a third of what each costs alone, and an event has no time for it.
    """

    __slots__ = ("_added", "add")

    def __init__(self) -> None:
        super().__init__(GAP_BOUNDS)
        self._added: list[float] = []
        self.add: Callable[[float], None] = self._added.append

    def settle(self) -> int:
        """How many it has counted."""
        if not self._added:
            return 0
        gaps = sorted(self._added)
        self._added.clear()
        self.total += sum(gaps)
        below = 0
        for place, bound in enumerate(self.bounds):
            until = bisect_right(gaps, bound, below)
            self.counts[place] += until - below
            below = until
        self.counts[-1] += len(gaps) - below
        return len(gaps)

    def after(self, seconds: float, events: int) -> None:
        """One gap; further events that came in the same read followed it without any.

        A read with no event's end (`events` 0) is one gap too.
        """
        self.observe(seconds)
        if events > 1:
            self.counts[0] += events - 1


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
        self.redis_away: Callable[[], bool] = bool
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
            "vllm_gateway_redis_away",
            "1 while Redis cannot be used, so that this gateway counts alone and shares no answers.",
            value=float(self.redis_away()),
        )
        yield GaugeMetricFamily(
            "vllm_gateway_connections", "Open connections of callers.", value=self.connections()
        )
        yield GaugeMetricFamily(
            "vllm_gateway_table_age_seconds",
            "Seconds since discovery last heard from its source.",
            value=self.table_age(),
        )
        text = "Gap between two reads of a stream that carried tokens."
        gaps = HistogramMetricFamily("vllm_gateway_inter_token_seconds", text, labels=["model"])
        for model, observed in dict(self.gaps).items():
            gaps.add_metric([model], observed.buckets(), sum_value=observed.total)
        yield gaps


def _by_model(name: str, text: str, counts: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"vllm_gateway_{name}", text, labels=["model"])
    for model, count in counts.items():
        family.add_metric([model], count)
    return family


class Metrics:
    """Every metric, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labelled: list[Counter | Histogram] = []
        self._absences = {label: Absences(KEPT_SECONDS) for label in ("model", "key")}
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

    def settle_gaps(self) -> int:
        """Counts the gaps that were added, and says how many these were."""
        return sum([gaps.settle() for gaps in self.readings.gaps.values()])

    def gaps_of(self, model: str) -> Gaps:
        gaps = self.readings.gaps.get(model)
        if gaps is None:
            gaps = self.readings.gaps[model] = Gaps()
        return gaps

    def upstream_error(self, model: str, reason: str) -> None:
        self.upstream_errors.labels(model, reason).inc()

    def refused(self, code: str) -> None:
        """Counts an error that is the gateway's own decision; other codes (a bad body) are no refusal."""
        if code in REFUSALS:
            self._refusals.labels(code).inc()

    def retry(self) -> None:
        self.retries.labels().inc()

    def count_tokens(self, model: str, key: str, prompt: int, completion: int) -> None:
        """`key` is the name of an API key, never the key."""
        if prompt:
            self.tokens.labels(model, key, "prompt").inc(prompt)
        if completion:
            self.tokens.labels(model, key, "completion").inc(completion)

    def forget_absent(self, label: str, present: Collection[str], now: float) -> None:
        """Drops the series of each `model` or `key` that has not been `present` for KEPT_SECONDS. One that
        comes back later begins at 0, as after a restart. `now` is in monotonic seconds.
        """
        gaps = self.readings.gaps if label == "model" else {}
        named = set(gaps).union(*(each.values_of(label) for each in self._labelled))
        gone = self._absences[label].over(named.difference(present), now)
        for each in self._labelled if gone else ():
            each.forget(label, gone)
        for model in gone & gaps.keys():
            del gaps[model]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"vllm_gateway_{name}", text, labels)
        self.registry.register(counter)
        self._labelled.append(counter)
        return counter

    def _histogram(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> Histogram:
        histogram = Histogram(f"vllm_gateway_{name}", text, labels, bounds)
        self.registry.register(histogram)
        self._labelled.append(histogram)
        return histogram


# Whatever a reader of the log may take for the end of a line, or for a terminal's command.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class Lines:
    """One line for each thing that is said, as JSON or as text."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._second, self._moment = -1, ""

    def line(self, at: float, level: str, logger: str, message: str, fields: Mapping[str, object]) -> str:
        """`at` is in seconds since 1970, `level` one of logging's names; without the line's end."""
        if (second := int(at)) != self._second:
            self._second, self._moment = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._moment}.{int((at - second) * 1000):03d}Z"
        if self._as_json:
            head = {"time": stamp, "level": level.lower(), "logger": logger, "message": message}
            return json.dumps({**head, **fields})
        pairs = "".join([f" {key}={value}" for key, value in fields.items()])
        text = f"{stamp} {level:<7} {message}{pairs}"
        return text if text.isprintable() else _CONTROL.sub(_escaped, text)


class LineFormatter(logging.Formatter):
    """A record as a line; its `fields` are the keys. As text, a trace follows in lines of its own."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._lines = Lines(as_json=as_json)

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, "fields", {}))
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if trace and self._as_json:
            fields["exception"], trace = trace, ""
        line = self._lines.line(record.created, record.levelname, record.name, record.getMessage(), fields)
        return line + (f"\n{trace}" if trace else "")


class Written(Protocol):
    """Where lines go."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> None: ...


class AccessLog:
    """A line for each request; `on` where the level is `info` or lower.

    It does not go through the logging module, whose record costs several times what the line does. Lines wait
    for `flush`, a bounded number of them: each write wakes the thread that does it.
    """

    def __init__(self, stream: Written, *, level: str, as_json: bool) -> None:
        self._stream = stream
        self._lines = Lines(as_json=as_json)
        self._said: list[str] = []
        self.on = logging.getLevelNamesMapping()[level.upper()] <= logging.INFO

    def add(self, requests: Iterable[tuple[float, Mapping[str, object]]]) -> None:
        """When each ended, in seconds since 1970, and what there is to say."""
        line = self._lines.line
        self._said += [line(at, "INFO", "vllm_gateway.access", "request", fields) for at, fields in requests]
        if len(self._said) >= _MOST_LINES:
            self.flush()

    def flush(self) -> None:
        said, self._said = self._said, []
        if said:
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more: requests go on
                self._stream.write("\n".join([*said, ""]))
                self._stream.flush()


def configure_logging(level: str, *, as_json: bool) -> None:
    """Sends every log line to standard output, where the access log goes too."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter(as_json=as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # What no line of ours shows need not be found out for each (Python's logging HOWTO, "Optimization").
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False  # Python 3.12
    # Their news are in our words: listening, draining, stopped. The last is asked for its own level.
    for name in ("uvicorn", "asyncio", "uvicorn.error"):
        logging.getLogger(name).setLevel("WARNING")
