"""The key that each engine asks for: the same derivation as the operator's (docs/architecture.md)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable
from pathlib import Path

_LOG = logging.getLogger("vllm_gateway.engine_keys")
_POLL_SECONDS = 2.0


class MasterKey:
    """The file with the master key, read again when it changes. No file, no keys.

    A file that cannot be read leaves the key that was good, and `problem` says why.
    """

    def __init__(self, path: str | None, *, poll: float = _POLL_SECONDS) -> None:
        self._path = Path(path) if path else None
        self._poll = poll
        self._master = b""
        self.problem = ""
        self.refresh()

    def of(self, namespace: str, name: str, uid: str) -> str | None:
        """HMAC-SHA256 of `namespace/name/uid` as 64 hexadecimal digits."""
        if not self._master:
            return None
        return hmac.new(self._master, f"{namespace}/{name}/{uid}".encode(), hashlib.sha256).hexdigest()

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
        changed, self._master, self.problem = master != self._master, master, ""
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
