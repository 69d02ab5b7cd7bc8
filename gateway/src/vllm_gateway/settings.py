"""The gateway's settings: one YAML file (`CONFIG_FILE`), a few environment variables, the same as flags.

A flag beats the environment, the environment beats the file, the file beats the defaults. Unknown keys are
refused. Every key of the file is camelCase; durations are strings such as `10s` or `1h30m`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

_DURATION = re.compile(r"([0-9]+(h|ms|m|s))+")
_DURATION_PART = re.compile(r"(\d+)(h|ms|m|s)")
_UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def parse_duration(text: object) -> float:
    """`1h30m`, `10s`, `250ms` as seconds: the durations of the VLLMModel API."""
    if not isinstance(text, str) or not _DURATION.fullmatch(text):
        raise ValueError("write a duration such as 10s, 5m or 1h30m")
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError("must be longer than 0s")
    return seconds


def _backend_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("write a URL such as http://127.0.0.1:8000")
    if parts.username or parts.query or parts.fragment:
        raise ValueError("a backend's URL has no user, query or fragment")
    _ = parts.port  # raises ValueError where the port is no port
    return url.rstrip("/").removesuffix("/v1")


_AS_TEXT = WithJsonSchema({"type": "string", "pattern": f"^{_DURATION.pattern}$"})
Duration = Annotated[float, BeforeValidator(parse_duration), _AS_TEXT]
PositiveDuration = Annotated[float, BeforeValidator(parse_duration), AfterValidator(_positive), _AS_TEXT]
Routing = Literal["LeastLoad", "PrefixHash", "Session"]
Port = Annotated[int, Field(ge=0, le=65535)]
BackendUrl = Annotated[str, AfterValidator(_backend_url)]


_CONFIG = ConfigDict(
    extra="forbid",
    alias_generator=to_camel,
    populate_by_name=True,
    validate_default=True,
    use_attribute_docstrings=True,
)


class _Section(BaseModel):
    """A part of the file; the docstring under a field describes it in docs/reference/gateway-settings.md.

    What each request asks for is in dataclasses: a field of theirs is found at once, one of a BaseModel with
    three lookups (it has a `__getattr__`). Each default there is a `Field`: pydantic lists such fields first.
    """

    model_config = ConfigDict(frozen=True, **_CONFIG)


class Cors(_Section):
    """Cross-origin requests. Open by default, since a browser's chat page rarely shares the API's origin;
    without credentials, so an open API gives no page more than any program has.
    """

    allow_origins: tuple[str, ...] = ("*",)
    """Origins whose pages may call, such as https://chat.example.com; `*` is every origin."""
    allow_methods: tuple[str, ...] = ("GET", "POST", "OPTIONS")
    """Methods that they may use."""
    allow_headers: tuple[str, ...] = ("*",)
    """Request headers that they may send; `*` is every header."""
    allow_credentials: bool = False
    """Whether browsers may send cookies and HTTP authentication."""
    max_age: Duration = "10m"  # type: ignore[assignment]
    """How long a browser may keep the answer to its preflight request."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CONFIG)
class RequestLimits:
    """What a request may be. A body of 16 MiB holds a few images as base64 or four million tokens of text."""

    body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    """The largest body that is JSON."""
    upload_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    """The largest body that carries a file (audio); vLLM takes files of 25 MB unless told otherwise."""
    body_timeout: PositiveDuration = Field(default="30s")  # type: ignore[assignment]
    """How long a body may take to arrive."""
    header_bytes: int = Field(default=32 * 1024, ge=1024, le=1024 * 1024)
    """All headers together."""
    header_count: int = Field(default=100, ge=10, le=1000)
    """The most headers."""
    header_timeout: PositiveDuration = Field(default="10s")  # type: ignore[assignment]
    """How long the headers may take to arrive, and before them the TLS handshake."""
    url_bytes: int = Field(default=8 * 1024, ge=256, le=64 * 1024)
    """The longest request target."""
    json_depth: int = Field(default=100, ge=4, le=1000)
    """How deep the arrays and objects of a body may nest."""
    json_items: int = Field(default=200_000, ge=1000)
    """Strings, arrays and objects in a body: bounds the time that reading it takes (about 0.1 s)."""
    held_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """Bodies of requests until an engine answers, and answers that are no streams, together; one more gets a
    503. A body may be in memory three times for a moment, so this goes with the memory of the process.
    """
    answer_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """The largest answer that is not a stream: it is held until it is whole, so that it is never cut."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CONFIG)
class Timeouts:
    """Seconds to wait for an engine or a caller. A model's own `spec.gateway` beats firstToken and idle."""

    connect: PositiveDuration = Field(default="5s")  # type: ignore[assignment]
    """Until an engine accepts a connection."""
    first_token: PositiveDuration = Field(default="5m")  # type: ignore[assignment]
    """Until the first token of a stream."""
    idle: PositiveDuration = Field(default="60s")  # type: ignore[assignment]
    """Between tokens of one stream; comments do not count, since a hung engine can send them for ever."""
    unary: PositiveDuration = Field(default="10m")  # type: ignore[assignment]
    """A whole answer that is not a stream; the OpenAI clients give up after ten minutes too."""
    write_stall: PositiveDuration = Field(default="60s")  # type: ignore[assignment]
    """How long a caller may read nothing, or less than 16 KiB, of what waits for it."""
    keep_alive: PositiveDuration = Field(default="75s")  # type: ignore[assignment]
    """How long a caller's idle connection is kept; above the 60 s of common load balancers."""
    upstream_keep_alive: PositiveDuration = Field(default="30s")  # type: ignore[assignment]
    """How long an idle connection to an engine is kept."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CONFIG)
class RoutingSettings:
    """Which endpoint of a model a request goes to. A model's own `spec.gateway.routing` beats `strategy`."""

    strategy: Routing = Field(default="LeastLoad")
    """LeastLoad: fewest requests. PrefixHash: prompts that begin alike go together. Session: by header."""
    session_header: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] = Field(default="x-session-id")
    """The request header that names a session, in lower case; it also decides between weighted models."""


class EjectionSettings(_Section):
    """When a failing endpoint gets no requests for a while. Callers' own mistakes never count."""

    failures: int = Field(default=3, ge=1)
    """So many failures in a row."""
    base: PositiveDuration = "10s"  # type: ignore[assignment]
    """For how long the first time; twice as long each further time."""
    longest: PositiveDuration = "5m"  # type: ignore[assignment]
    """For how long at most."""
    max_share: float = Field(default=0.5, ge=0, le=1)
    """At most this share of a model's endpoints, rounded down, so never the only one; 0 ejects none."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CONFIG)
class QueueSettings:
    """How many requests run and wait, for models whose `spec.gateway` does not say."""

    max_in_flight: int = Field(default=1024, ge=1)
    """Requests at one endpoint, for each gateway process. vLLM has a queue of its own behind this one."""
    max_queue: int = Field(default=1024, ge=0)
    """Requests that wait for one model, for each gateway process; one more gets a 429, or a 503 while the
    model has no endpoint yet.
    """
    queue_timeout: Duration = Field(default="1m")  # type: ignore[assignment]
    """How long a request waits while the model serves or is about to; then it gets a 503."""
    cold_start_timeout: Duration = Field(default="0s")  # type: ignore[assignment]
    """How long it waits while there is none in any case; a model that scales from zero says so itself."""
    keep_alive: PositiveDuration = Field(default="5s")  # type: ignore[assignment]
    """After so long a waiting stream gets its head and a comment, and again each time."""


class AuthSettings(_Section):
    """Who may call. Without `keysFile` everyone may."""

    keys_file: str | None = None
    """A YAML file of keys, or a folder of them (a mounted Secret); read again when it changes."""
    allow_anonymous: bool = False
    """Whether requests without a key are served too; a wrong key is refused all the same."""


class TlsSettings(_Section):
    """The gateway's own certificate. Without one it speaks plain HTTP, for an Ingress or a mesh in front."""

    cert_file: str | None = None
    """The certificate with its chain, PEM; read again when it changes."""
    key_file: str | None = None
    """Its private key, PEM."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("certFile and keyFile belong together: give both, or none")
        return self


class EngineKeySettings(_Section):
    """Keys that engines in the cluster ask for; static backends have `apiKeyFile`."""

    master_key_file: str | None = None
    """A file with the master key that each model's key is derived from; read again when it changes."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CONFIG)
class CacheSettings:
    """Answers of repeated deterministic requests, for models whose `spec.gateway.responseCache` says so."""

    ttl: Duration = Field(default="0s")  # type: ignore[assignment]
    """How long an answer is kept for models that do not say; 0s keeps none."""
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=0)
    """All answers together, in the memory of each gateway process."""
    entry_bytes: int = Field(default=1024 * 1024, ge=1)
    """The largest answer that is kept."""
    shared_by: Literal["key", "everyone"] = Field(default="key")
    """Whose answers a caller may get: those of the same API key, or anyone's, which tells who asked what."""


class RedisSettings(_Section):
    """A Redis or Valkey that several gateways share limits and cached answers through."""

    url: Annotated[str, Field(pattern=r"^(redis|rediss|valkey|valkeys)://[^\s@]+$")] | None = None
    """Such as redis://valkey:6379/0, without a password. Without it each gateway process counts alone."""
    username: str | None = None
    """The user, if not the default one."""
    password_file: str | None = None
    """A file that holds the password; read for each new connection."""
    timeout: PositiveDuration = "250ms"  # type: ignore[assignment]
    """How long a request waits for it. While it is away each gateway counts alone again."""


class TracingSettings(_Section):
    """OpenTelemetry traces over OTLP, one span a request. OTEL_EXPORTER_OTLP_HEADERS goes with them."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = None
    """Such as http://otel-collector:4318/v1/traces (HTTP with protobuf). Without it nothing is traced."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """The share of requests that is traced, where the caller's own trace does not say."""
    service_name: Annotated[str, Field(min_length=1, max_length=128)] = "vllm-gateway"
    """The service's name in the traces."""


class Backend(_Section):
    """A static backend: any server with vLLM's OpenAI-compatible API."""

    url: BackendUrl
    """Its base URL, with or without /v1."""
    api_key_file: str | None = None
    """A file that holds the key to send to it; read again each `refreshInterval`."""


class Settings(_Section):
    """Everything that can be set."""

    host: str = "0.0.0.0"  # noqa: S104 - a gateway in a pod is reached on the pod's address
    """Address to listen on."""
    port: Port = 3000
    """Port of the API."""
    management_port: Port = 9090
    """Port of /metrics, /livez, /readyz and /load."""
    workers: int = Field(default=1, ge=1, le=256)
    """Processes that share the port, for a single machine; in Kubernetes it is one, and more pods. Queues and
    counts of requests are each process's own.
    """
    backends: tuple[Backend, ...] = ()
    """Static backends, which replace discovery in the cluster."""
    refresh_interval: PositiveDuration = "10s"  # type: ignore[assignment]
    """How often static backends are asked for their models; a sixth of it while one does not answer."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose models are served; empty means all, which needs a ClusterRole."""
    default_model: str | None = None
    """What `/chat` and `/chat/stream` use where a request names no model; else the only one there is."""
    shutdown_delay: Duration = "10s"  # type: ignore[assignment]
    """After SIGTERM: how long to go on accepting, until every load balancer has noticed."""
    drain_timeout: Duration = "10m"  # type: ignore[assignment]
    """Then: how long running streams may go on, before each ends with an error event."""
    cors: Cors = Cors()
    """Cross-origin requests."""
    limits: RequestLimits = RequestLimits()
    """What a request may be."""
    timeouts: Timeouts = Timeouts()
    """How long to wait for engines and callers."""
    routing: RoutingSettings = RoutingSettings()
    """Which endpoint a request goes to."""
    ejection: EjectionSettings = EjectionSettings()
    """When a failing endpoint is left alone."""
    queue: QueueSettings = QueueSettings()
    """How many requests run and wait."""
    tls: TlsSettings = TlsSettings()
    """HTTPS on the API's port."""
    auth: AuthSettings = AuthSettings()
    """Who may call."""
    engine_keys: EngineKeySettings = EngineKeySettings()
    """What the gateway shows the engines."""
    response_cache: CacheSettings = CacheSettings()
    """Answers that are kept."""
    redis: RedisSettings = RedisSettings()
    """What several gateways share."""
    tracing: TracingSettings = TracingSettings()
    """Traces of requests."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is logged."""
    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or text for people."""


_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
# What PyYAML raises beside its own errors, for a date that is none (2024-13-01) or `!!int x`, say.
NOT_YAML = (ValueError, LookupError, AttributeError, RecursionError)


class BadSettings(Exception):
    """One line for a person: which setting, from where, and what is wrong with it."""


def load(file: str | None, overrides: Mapping[str, object]) -> Settings:
    """The settings of `file`, with `overrides` (by the file's keys) on top."""
    document = _read(file) if file else {}
    try:
        return Settings.model_validate(document | dict(overrides))
    except ValidationError as error:
        raise BadSettings(describe_errors(error)) from error


def describe_errors(error: ValidationError, *, with_values: bool = True) -> str:
    """One line for a person: each setting and what is wrong with it; without values where they are secret."""
    return "; ".join(_line(item, with_values=with_values) for item in error.errors())


def split_urls(text: str) -> list[dict[str, str]]:
    """`VLLM_URL`: one URL, or several with commas."""
    return [{"url": url.strip()} for url in text.split(",") if url.strip()]


def _read(file: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSettings(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, *NOT_YAML) as error:
        raise BadSettings(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise BadSettings(f"{file}: the top level must be a mapping of settings")
    return document


def _line(item: Mapping[str, Any], *, with_values: bool) -> str:
    unknown = item["type"] in _UNKNOWN
    location = (
        item["loc"][:-1] if unknown and not with_values else item["loc"]
    )  # a key may be a value misplaced
    where = ".".join(str(part) for part in location) or "settings"
    message = str(item["msg"]).removeprefix("Value error, ")
    if unknown:
        message = "unknown setting"
    value = item.get("input")
    shown = f" (got {value!r})" if with_values and isinstance(value, str | int | float | bool) else ""
    return f"{where}: {message}{shown}"
