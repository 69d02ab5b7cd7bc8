"""Answers of repeated deterministic requests: at temperature 0, with a seed, or without any sampling.

What is kept is what the caller got, byte for byte, so that a stream is replayed as the stream it was. A key
covers everything that the answer depends on, and whose answers a caller may get.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cachetools import TLRUCache

from vllm_gateway.policy.keys import Caller
from vllm_gateway.policy.shared import Shared
from vllm_gateway.settings import CacheSettings

_PREFIX = "vllm-fleet/answer/"
_OVERHEAD = 512  # bytes that an entry takes beside its body, about
_MOST_PUTS = 64  # at once; each holds its answer
_NO_SAMPLING = frozenset(
    {
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/score",
        "/score",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with status 200: its content type and its whole body."""

    kind: bytes
    body: bytes


class Store(Protocol):
    """Where answers are kept."""

    async def get(self, key: str) -> Answer | None: ...
    def put(self, key: str, answer: Answer, ttl: float) -> None:
        """Not awaited: the caller has the answer, and what its request holds is not to wait for a server."""
        ...

    async def stop(self) -> None:
        """Waits for what is still to be kept."""
        ...


def cache_key(model: str, route: str, body: bytes, caller: Caller, settings: CacheSettings) -> str | None:
    """The key of a deterministic request; None where its answer must not be used again.

    `body` is the caller's, as JSON; the order of its keys and its white space do not matter.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not _deterministic(route, document):
        return None
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    scope = caller.name if settings.shared_by == "key" else "*"
    parts = "\0".join((scope, model, route, canonical))
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


def _deterministic(route: str, document: dict[str, object]) -> bool:
    if route in _NO_SAMPLING:
        return True
    temperature, seed = document.get("temperature"), document.get("seed")
    cold = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0
    return cold or (isinstance(seed, int) and not isinstance(seed, bool))


@dataclass(frozen=True, slots=True)
class _Kept:
    answer: Answer
    ttl: float


class MemoryStore:
    """The least recently used go first where `max_bytes` would be exceeded."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept: TLRUCache[str, _Kept] = TLRUCache(
            maxsize=max_bytes,
            ttu=lambda _, kept, now: now + kept.ttl,
            timer=clock,
            getsizeof=lambda kept: len(kept.answer.body) + _OVERHEAD,
        )

    async def get(self, key: str) -> Answer | None:
        kept = self._kept.get(key)
        return kept.answer if kept is not None else None

    def put(self, key: str, answer: Answer, ttl: float) -> None:
        if len(answer.body) + _OVERHEAD <= self._kept.maxsize:
            self._kept[key] = _Kept(answer, ttl)

    async def stop(self) -> None:
        """There is nothing to wait for."""

    @property
    def size(self) -> float:
        """Bytes in use."""
        return float(self._kept.currsize)


class SharedStore:
    """Answers in Redis or Valkey, which drops them by itself. Where it is away there are none, and where it
    is slower than answers come some are not kept.
    """

    def __init__(self, shared: Shared) -> None:
        from redis.asyncio import Redis

        self._redis = Redis(connection_pool=shared.pool)
        self._shared = shared
        self._puts: set[asyncio.Task[None]] = set()

    async def get(self, key: str) -> Answer | None:
        raw = await self._shared.attempt(lambda: self._redis.get(_PREFIX + key), _nothing)
        if not isinstance(raw, bytes):
            return None
        kind, separator, body = raw.partition(b"\n")
        return Answer(kind, body) if separator else None

    def put(self, key: str, answer: Answer, ttl: float) -> None:
        if len(self._puts) < _MOST_PUTS:
            task = asyncio.ensure_future(self._put(key, answer, ttl))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)

    async def stop(self) -> None:
        await asyncio.gather(*self._puts, return_exceptions=True)

    async def _put(self, key: str, answer: Answer, ttl: float) -> None:
        value = answer.kind + b"\n" + answer.body
        milliseconds = max(1, int(ttl * 1000))

        async def put() -> object:
            return await self._redis.set(_PREFIX + key, value, px=milliseconds)

        await self._shared.attempt(put, _nothing)


def make_store(settings: CacheSettings, shared: Shared) -> Store:
    """Where answers are kept: with the others if a server is set, else in this process."""
    return MemoryStore(settings.max_bytes) if shared.pool is None else SharedStore(shared)


async def _nothing() -> object:
    return None


class Recorder:
    """Collects an answer while it is sent; one over the limit is let go."""

    __slots__ = ("_left", "_pieces")

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._pieces: list[bytes] | None = []

    def add(self, piece: bytes) -> None:
        self._left -= len(piece)
        if self._left < 0:
            self._pieces = None
        elif self._pieces is not None:
            self._pieces.append(piece)

    def body(self) -> bytes | None:
        """All that was added; None where it was too much."""
        return b"".join(self._pieces) if self._pieces is not None else None
