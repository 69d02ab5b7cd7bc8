"""The keys in force: read at the start, and again whenever their file changes."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping
from pathlib import Path

from vllm_gateway import tasks
from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keys import ANONYMOUS, BadKeys, Caller, Keys, given_key, read_keys, signature
from vllm_gateway.settings import AuthSettings

_LOG = logging.getLogger("vllm_gateway.keys")
_POLL_SECONDS = 2.0


class Keyring:
    """Says who calls. A changed file that cannot be read keeps the keys that were good, and is reported."""

    def __init__(self, settings: AuthSettings, *, poll: float = _POLL_SECONDS) -> None:
        self._path = Path(settings.keys_file) if settings.keys_file else None
        self._anonymous = self._path is None or settings.allow_anonymous
        self._poll = poll
        self._seen: object = None
        self._keys = Keys({})
        self._tasks: list[asyncio.Task[None]] = []
        self.problem = ""
        if self._path is not None:
            self._seen = signature(self._path)
            self._keys = read_keys(self._path)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return not self._anonymous

    @property
    def names(self) -> frozenset[str]:
        """Whose requests there can be, as metrics call them."""
        return self._keys.names

    def authenticate(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Raises a 401. A key is looked at even where none is needed: a wrong one is a mistake to be told."""
        secret = given_key(headers)
        if self._path is None or (secret is None and self._anonymous):
            return ANONYMOUS
        if secret is None:
            text = "Send your API key as 'Authorization: Bearer <key>' or as 'x-api-key: <key>'."
            raise GatewayError(401, "missing_api_key", text)
        caller = self._keys.caller_of(secret)
        if caller is None:
            raise GatewayError(401, "invalid_api_key", "The API key is not known here.")
        return caller

    async def start(self) -> None:
        if self._path is not None:
            self._tasks = [tasks.start("keys", functools.partial(self._follow, self._path))]

    async def stop(self) -> None:
        await tasks.stop(self._tasks)

    async def _follow(self, path: Path) -> None:
        while True:
            await asyncio.sleep(self._poll)
            await asyncio.to_thread(self._refresh, path)

    def _refresh(self, path: Path) -> None:
        """Looks whether the file changed; a bad one is read again until it is good."""
        try:
            seen = signature(path)
            if seen == self._seen and not self.problem:
                return
            self._keys = read_keys(path)
        except BadKeys as error:
            self._report(str(error))
            return
        self._seen, self.problem = seen, ""
        _LOG.info("keys read", extra={"fields": {"keys": len(self._keys)}})

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            _LOG.error("keys not read; those from before stay", extra={"fields": {"problem": problem}})
        self.problem = problem
