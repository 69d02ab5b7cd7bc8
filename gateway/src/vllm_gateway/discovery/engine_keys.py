"""The key that each engine asks for: the same derivation as the operator's (docs/architecture.md)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

_LOG = logging.getLogger("vllm_gateway.engine_keys")
_POLL_SECONDS = 2.0
_FORMER_SECONDS = 24 * 3600.0


class MasterKey:
    """The file with the master key, read again when it changes. No file, no keys.

    A file that cannot be read leaves the key that was good, and `problem` says why. The key from before a
    change is kept for a day, in memory: engines are restarted with the new one by and by.
    """

    def __init__(
        self, path: str | None, *, poll: float = _POLL_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = Path(path) if path else None
        self._poll = poll
        self._clock = clock
        self._master = b""
        self._former = b""
        self._changed_at = 0.0
        self.problem = ""
        self.refresh()

    def of(self, namespace: str, name: str, uid: str) -> str | None:
        """HMAC-SHA256 of `namespace/name/uid` as 64 hexadecimal digits."""
        return _derived(self._master, namespace, name, uid)

    def both(self, namespace: str, name: str, uid: str) -> tuple[str | None, str | None]:
        """The same, and that of the master key from before, if it changed within the last day."""
        recent = self._clock() - self._changed_at < _FORMER_SECONDS
        former = _derived(self._former, namespace, name, uid) if recent else None
        return self.of(namespace, name, uid), former

    def refresh(self) -> bool:
        """True if the key is another than before."""
        if self._path is None:
            return False
        try:
            master = self._path.read_bytes().strip()
        except OSError as error:
            return self._report(f"the engines' master key cannot be read: {error}")
        if not master:
            return self._report(f"the engines' master key is empty: {self._path}")
        changed, self.problem = master != self._master, ""
        if changed:
            self._former, self._master, self._changed_at = self._master, master, self._clock()
        return changed

    async def follow(self, changed: Callable[[], None]) -> None:
        while self._path is not None:
            await asyncio.sleep(self._poll)
            if await asyncio.to_thread(self.refresh):
                changed()

    def _report(self, problem: str) -> bool:
        if problem != self.problem:
            _LOG.error(problem)
        self.problem = problem
        return False


def _derived(master: bytes, namespace: str, name: str, uid: str) -> str | None:
    if not master:
        return None
    return hmac.new(master, f"{namespace}/{name}/{uid}".encode(), hashlib.sha256).hexdigest()
