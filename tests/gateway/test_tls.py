"""The gateway over TLS, with certificates of an authority made for the test.

Proves: streams and plain answers over HTTPS, and the same bytes as over HTTP; a caller that leaves frees the
engine; a renewed certificate is taken up by new connections while open streams go on; files that do not fit
together keep the old certificate, are reported and tried again; a gateway does not start without a usable
one; a bad head is refused over TLS too; old versions of the protocol are not spoken; who never ends its
handshake is cut; who reads a large answer slowly gets all of it, also of a gateway that stops, for as long as
it may drain; who has read everything and says no goodbye is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine as fake
import pytest
import trustme
from engine import FakeEngine, chat_events
from gateway_process import running_process
from http_caller import Caller, until

from vllm_gateway import app
from vllm_gateway.settings import BadSettings, TlsSettings
from vllm_gateway.tls import Certificate, certificate_of

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Files:
    """A certificate for 127.0.0.1 in a folder, as a mounted Secret has it."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.cert, self.key = folder / "tls.crt", folder / "tls.key"
        self.renew()

    def renew(self) -> None:
        made = self.authority.issue_cert("127.0.0.1")
        self.key.write_bytes(made.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))

    @property
    def options(self) -> dict[str, Any]:
        return {"tls": {"certFile": str(self.cert), "keyFile": str(self.key)}}

    @property
    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    async def connect(self, port: int, *, receive_buffer: int | None = None) -> Caller:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        name = "127.0.0.1"
        return Caller(
            *await asyncio.open_connection(sock=sock, limit=2**16, ssl=self.trust, server_hostname=name)
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def serial(caller: Caller) -> str:
    return str(caller.writer.get_extra_info("peercert")["serialNumber"])


async def test_streams_and_answers_over_tls(gateway: Any, files: Files) -> None:
    script = fake.stream(["a", "é", "😀"])
    async with FakeEngine(script) as engine, gateway(engine, options=files.options) as running:
        async with await files.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            answer = await caller.answer()
            assert answer.body == b"".join(chat_events(["a", "é", "😀"], with_usage=False))
            caller.send("/models", method="GET")  # on the same connection
            assert (await caller.answer()).json()["models"]
        await running.settled()


async def test_a_caller_that_leaves_over_tls_frees_the_engine(gateway: Any, files: Files) -> None:
    script = fake.stream(["x"] * 500, delay=0.01)
    async with FakeEngine(script) as engine, gateway(engine, options=files.options) as running:
        async with await files.connect(running.port) as caller:
            caller.send("/v1/chat/completions", CHAT)
            await caller.head()
            assert running.in_flight == 1
        await running.settled()


async def test_a_renewed_certificate_is_taken_up_and_streams_go_on(gateway: Any, files: Files) -> None:
    script = fake.stream(["x"] * 40, delay=0.01)
    async with (
        FakeEngine(script) as engine,
        gateway(engine, options=files.options) as running,
        await files.connect(running.port) as old,
    ):
        old.send("/v1/chat/completions", CHAT)
        files.renew()
        await running.gateway.certificate.reload()
        async with await files.connect(running.port) as new:
            assert serial(new) != serial(old)
        assert b"[DONE]" in (await old.answer()).body


def test_files_that_do_not_fit_keep_what_was_good(files: Files) -> None:
    certificate = Certificate(files.cert, files.key)
    files.key.write_text("nonsense")
    asyncio.run(certificate.reload())
    assert "are no certificate with its key" in certificate.problem
    files.key.unlink()
    asyncio.run(certificate.reload())
    assert "No such file" in certificate.problem
    files.renew()
    asyncio.run(certificate.reload())
    assert certificate.problem == ""


def test_files_that_did_not_fit_are_read_again_though_nothing_tells_of_a_change(files: Files) -> None:
    """What kept them from being read may lie elsewhere, and a file's time may be as coarse as a second."""
    certificate = Certificate(files.cert, files.key)
    good = files.key.read_text()
    files.key.write_text("nonsense")
    os.utime(files.key, ns=(0, 0))
    asyncio.run(certificate.reload())
    assert certificate.problem
    files.key.write_text(good)
    os.utime(files.key, ns=(0, 0))
    asyncio.run(certificate.reload())
    assert certificate.problem == ""


def test_it_does_not_start_without_a_usable_certificate(files: Files) -> None:
    files.cert.write_text("")
    with pytest.raises(BadSettings, match="are no certificate with its key"):
        certificate_of(TlsSettings(cert_file=str(files.cert), key_file=str(files.key)))
    with pytest.raises(ValueError, match="belong together"):
        TlsSettings(cert_file=str(files.cert))
    assert certificate_of(TlsSettings()) is None


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00" + b"\x01" * 1000], ids=["nothing", "trickles"])
async def test_a_handshake_that_does_not_end_is_cut(raw_gateway: Any, files: Files, sent: bytes) -> None:
    options = files.options | {"limits": {"headerTimeout": "200ms"}}
    async with (
        FakeEngine() as engine,
        raw_gateway(engine, options=options) as running,
        await Caller.connect(running.port) as caller,
    ):
        async with asyncio.timeout(3):
            ended = asyncio.ensure_future(caller.reader.read())
            for byte in sent:
                caller.raw(bytes([byte]))
                await asyncio.wait((ended,), timeout=0.02)
                if ended.done():
                    break
            with contextlib.suppress(ConnectionError):
                assert await ended == b""


async def test_a_bad_head_over_tls_is_refused(raw_gateway: Any, files: Files) -> None:
    async with (
        FakeEngine() as engine,
        raw_gateway(engine, options=files.options) as running,
        await files.connect(running.port) as caller,
    ):
        caller.writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 5000 + b"\r\n")
        assert (await caller.answer()).status == 431


def test_old_versions_of_tls_are_not_spoken(files: Files) -> None:
    assert Certificate(files.cert, files.key).context.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_the_metric_tells_of_a_certificate_that_cannot_be_read(gateway: Any, files: Files) -> None:
    async with FakeEngine() as engine, gateway(engine, options=files.options) as running:
        assert running.metric("certificate_failed") == 0
        files.cert.write_text("")
        await running.gateway.certificate.reload()
        await until(lambda: running.metric("certificate_failed") == 1)


SIZE = 16_000_000  # far more than the kernel takes


async def ask_for_much(caller: Caller, **headers: str) -> int:
    """The size of the answer, whose head is here."""
    caller.send("/v1/embeddings", {"model": "m", "input": "x"}, headers=headers)
    return int((await caller.head()).headers["content-length"])


async def test_a_slow_reader_of_a_large_answer_gets_all_of_it_at_a_drain(
    files: Files, tmp_path: Path
) -> None:
    settings = files.options | {"shutdownDelay": "0s", "drainTimeout": "30s"}
    async with (
        FakeEngine(fake.answer(200, {"embedding": "0" * SIZE})) as engine,
        running_process(tmp_path, engine, ready=":/readyz", **settings) as gateway,
    ):
        async with await files.connect(gateway.port, receive_buffer=64 * 1024) as caller:
            size = await ask_for_much(caller)
            gateway.signal(signal.SIGTERM)
            await asyncio.sleep(2.5)
            assert len(await caller.reader.readexactly(size)) > SIZE
        assert await gateway.ended() == 0


@pytest.mark.parametrize(("drain", "whole"), [("300ms", False), ("20s", True)])
async def test_a_closed_connection_has_the_time_of_a_drain_for_what_is_unread(
    raw_gateway: Any, files: Files, monkeypatch: pytest.MonkeyPatch, drain: str, whole: bool
) -> None:
    monkeypatch.setattr(app, "_LEAST_TLS_CLOSE_SECONDS", 0.1)
    async with (
        FakeEngine(fake.answer(200, {"embedding": "0" * SIZE})) as engine,
        raw_gateway(engine, options=files.options | {"drainTimeout": drain}) as running,
        await files.connect(running.port, receive_buffer=64 * 1024) as caller,
    ):
        size = await ask_for_much(caller, connection="close")
        await asyncio.sleep(1.5)
        try:
            assert len(await caller.reader.readexactly(size)) > SIZE
        except (asyncio.IncompleteReadError, ConnectionError):
            assert not whole
        else:
            assert whole


class Rude:
    """A caller over TLS that never says goodbye: unlike asyncio, which does so by itself."""

    def __init__(self, plain: Caller, trust: ssl.SSLContext) -> None:
        self._plain = plain
        self._read, self._written = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = trust.wrap_bio(self._read, self._written, server_hostname="127.0.0.1")

    async def do(self, step: Callable[[ssl.SSLObject], object]) -> object:
        """A step of TLS, with the reads and writes that it takes."""
        while True:
            try:
                return step(self._tls)
            except ssl.SSLWantReadError:
                self._plain.raw(self._written.read())
                self._read.write(await self._plain.reader.read(65536))
            finally:
                self._plain.raw(self._written.read())


async def test_who_has_read_everything_and_says_no_goodbye_is_not_waited_for(
    raw_gateway: Any, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_GOODBYE_SECONDS", 0.1)
    async with (
        FakeEngine() as engine,
        raw_gateway(engine, options=files.options | {"drainTimeout": "20s"}) as running,
        await Caller.connect(running.port) as plain,
    ):
        rude = Rude(plain, files.trust)
        await rude.do(lambda tls: tls.do_handshake())
        await rude.do(lambda tls: tls.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
        assert str(await rude.do(lambda tls: tls.read())).startswith("b'HTTP/1.1 200")
        assert len(running.server.server_state.connections) == 1
        await until(lambda: not running.server.server_state.connections)
