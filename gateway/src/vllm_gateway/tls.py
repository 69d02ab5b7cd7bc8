"""The gateway's own certificate, read again when its files change: a Secret that cert-manager renews."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from vllm_gateway.settings import BadSettings, TlsSettings

_LOG = logging.getLogger("vllm_gateway.tls")
_POLL_SECONDS = 5.0


class Certificate:
    """A TLS context whose certificate follows its files; open connections keep the one they began with.

    Files that do not fit together leave the certificate that was good, and `problem` says why.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        """Raises BadSettings where the files cannot be used: a gateway never opens without TLS by mistake."""
        self._cert, self._key = cert, key
        self.problem = ""
        self.context = _context()
        self._seen = self._signature()
        if problem := self._load():
            raise BadSettings(problem)

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self.reload()

    async def reload(self) -> None:
        """Takes up files that changed since they were last looked at; bad ones are read again each time."""
        seen = await asyncio.to_thread(self._signature)
        if seen != self._seen or self.problem:
            self._seen = seen
            self._report(await asyncio.to_thread(self._load))

    def _load(self) -> str:
        """Why the files cannot be used; empty where they are in use now."""
        try:
            _context().load_cert_chain(self._cert, self._key)  # elsewhere first: half a change would stay
            self.context.load_cert_chain(self._cert, self._key)
        except (OSError, ssl.SSLError) as error:
            return f"tls: {self._cert} and {self._key} are no certificate with its key: {error}"
        return ""

    def _signature(self) -> object:
        try:
            return [(stat.st_mtime_ns, stat.st_ino) for stat in (self._cert.stat(), self._key.stat())]
        except OSError as error:
            return str(error)

    def _report(self, problem: str) -> None:
        if problem and problem != self.problem:
            _LOG.error(
                "certificate not read; the one from before stays", extra={"fields": {"problem": problem}}
            )
        elif not problem:
            _LOG.info("certificate read", extra={"fields": {"file": str(self._cert)}})
        self.problem = problem


def certificate_of(settings: TlsSettings) -> Certificate | None:
    """None where the gateway speaks plain HTTP. Raises BadSettings."""
    if settings.cert_file is None or settings.key_file is None:
        return None
    return Certificate(Path(settings.cert_file), Path(settings.key_file))


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
