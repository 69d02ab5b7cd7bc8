"""The program of `helm test`, before a gateway and scripted engines.

Proves: it streams a chat and says what came, be it thoughts alone; it names a model when told to; without any
model, or without a key where one is needed, it ends well and says what to do; and it fails, in words, where a
model is not ready, not known or refused, where the stream ends without tokens, with an error or half-way, and
where nothing listens; it shows no key, and takes a certificate for another name only when told to.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from pathlib import Path
from typing import Any, NamedTuple

import engine as fake
import pytest
import trustme
from engine import ENGINE_DIED, ROLE, FakeEngine

from vllm_gateway import smoke
from vllm_gateway.routing.table import Model, Table

KEY = "sk-alice-123456"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def smoke_test(capsys: Any, monkeypatch: Any) -> Any:
    """`await smoke_test(port, *flags, key="")`: how the program ends, and what it prints."""

    async def run(port: int, *flags: str, key: str = "") -> Outcome:
        monkeypatch.setenv("API_KEY", key)
        code = await asyncio.to_thread(smoke.main, [f"http://127.0.0.1:{port}", *flags])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n- {{name: alice, key: {KEY}}}\n")
    return {"auth": {"keysFile": str(path)}}


async def test_a_chat_is_streamed_and_told(raw_gateway: Any, smoke_test: Any) -> None:
    async with FakeEngine(fake.stream(["Hel", "lo"])) as engine, raw_gateway(engine) as running:
        done = await smoke_test(running.port)
    assert (done.code, done.err) == (0, "")
    assert "m streamed 2 tokens in" in done.out
    assert "'Hello'" in done.out
    assert engine.seen[0].json()["max_tokens"] == 16


async def test_thoughts_are_tokens_too(raw_gateway: Any, smoke_test: Any) -> None:
    """Of so few tokens, a model that thinks has nothing else."""
    thoughts = [fake.chat_chunk(delta={"reasoning": text}) for text in ("hm", ", hm")]
    script = fake.pieces([ROLE, *thoughts, fake.finish("length"), fake.DONE])
    async with FakeEngine(script) as engine, raw_gateway(engine) as running:
        done = await smoke_test(running.port)
    assert (done.code, done.err) == (0, "")
    assert "m streamed 2 tokens in" in done.out
    assert "'hm, hm'" in done.out


@pytest.mark.parametrize(("name", "code"), [("m", 0), ("other", 1)])
async def test_a_model_can_be_named(raw_gateway: Any, smoke_test: Any, name: str, code: int) -> None:
    async with FakeEngine() as engine, raw_gateway(engine) as running:
        done = await smoke_test(running.port, f"--model={name}")
    assert done.code == code
    assert not code or "no model is called other; there are" in done.err


async def test_without_a_model_it_says_what_to_apply(raw_gateway: Any, smoke_test: Any) -> None:
    async with FakeEngine(models=[]) as engine, raw_gateway(engine) as running:
        done = await smoke_test(running.port)
    assert done.code == 0
    assert "no chat was streamed" in done.out
    assert "kubectl apply -f k8s/examples/llama-8b.yaml" in done.out


def test_the_example_that_it_names_exists() -> None:
    folder = Path(__file__).resolve().parents[2] / "k8s" / "examples"
    for name in ("llama-8b.yaml", "smollm2.yaml"):
        assert name in smoke.NO_MODEL
        assert (folder / name).exists()


async def test_a_model_that_is_not_ready_fails_with_its_reason(raw_gateway: Any, smoke_test: Any) -> None:
    async with FakeEngine() as engine, raw_gateway(engine, options={"refreshInterval": "1h"}) as running:
        model = Model("m", "m", "default", ("m",), (), reason="InsufficientGPU", message="0/1 nodes")
        running.gateway.holder.put(Table.of([model]))
        done = await smoke_test(running.port)
    assert done.code == 1
    assert "no model is ready: default/m (InsufficientGPU: 0/1 nodes)" in done.err


async def test_where_keys_are_needed(raw_gateway: Any, smoke_test: Any, keys: dict[str, Any]) -> None:
    async with FakeEngine() as engine, raw_gateway(engine, options=keys) as running:
        without = await smoke_test(running.port)
        good = await smoke_test(running.port, key=KEY)
        wrong = await smoke_test(running.port, key="sk-wrong-123456")
    assert without.code == 0
    assert "gateway.test.keySecret.name" in without.out
    assert (good.code, "streamed" in good.out) == (0, True)
    assert wrong.code == 1
    assert "invalid_api_key" in wrong.err
    assert "sk-" not in "".join([*without[1:], *good[1:], *wrong[1:]])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (fake.stream([]), "ended without a token"),
        (fake.pieces([ROLE, ENGINE_DIED]), "ended with an error"),
        (fake.answer(400, {"error": {"message": "no chat template", "code": 400}}), "answers 400"),
    ],
)
async def test_a_stream_that_fails_fails_the_test(
    raw_gateway: Any, smoke_test: Any, script: fake.Script, words: str
) -> None:
    async with FakeEngine(script) as engine, raw_gateway(engine) as running:
        done = await smoke_test(running.port)
    assert done.code == 1
    assert words in done.err


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_stream_that_breaks_off_fails_the_test(smoke_test: Any, reset: bool) -> None:
    """What a proxy in between would do: the gateway itself always writes a last event."""

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)  # else closing resets the connection
        streams = head.split()[1] == b"/chat/stream"
        models = b'{"models": [{"name": "d/m", "names": ["m"], "ready": true}]}'
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + (b'data: {"token": "a"}\n\n' if streams else models))
        if reset and streams:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        done = await smoke_test(server.sockets[0].getsockname()[1])
    assert done.code == 1
    why = " before its last event" if not reset else ": "
    assert done.err.startswith(f"the stream broke off{why}") or (reset and "does not answer" in done.err)


async def test_nothing_listens(smoke_test: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        done = await smoke_test(taken.getsockname()[1])
    assert done.code == 1
    assert "/health does not answer: " in done.err


async def test_over_https_any_certificate_is_taken_only_when_told_to(
    raw_gateway: Any, smoke_test: Any, tmp_path: Path, capsys: Any
) -> None:
    made = trustme.CA().issue_cert("chat.example.com")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    options = {"tls": {"certFile": str(cert), "keyFile": str(key)}}
    async with FakeEngine() as engine, raw_gateway(engine, options=options) as running:
        url = f"https://127.0.0.1:{running.port}"
        assert await asyncio.to_thread(smoke.main, [url]) == 1
        assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
        assert await asyncio.to_thread(smoke.main, [url, "--insecure"]) == 0
        assert "streamed" in capsys.readouterr().out


def test_only_http_is_asked(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        smoke.main(["file:///etc/passwd"])
    assert "must begin with http://" in capsys.readouterr().err
