"""Audio: a form whose fields the gateway reads, and whose file it leaves alone.

Proves: what is found is what the parser that vLLM uses would find, or the form is refused; only a named value
changes; a stream is counted without its caller's doing; forms that two readers could read differently, that
are too large or have too many parts get a 4xx that names the field.
"""

from __future__ import annotations

import json
from typing import Any

import families
import httpx
import pytest
from engine import FakeEngine
from families import transcription_events
from http_caller import Answer, ask
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.multipart import boundary_of, find

PATH = "/v1/audio/transcriptions"
B = b"--b"
AUDIO = bytes(range(256)) * 40 + b"\r\n--bb not a boundary\r\n"
NAMES = frozenset({"model", "stream"})


def part(name: str, value: bytes, extra: str = "") -> bytes:
    head = f'\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n'
    return B[:0] + head.encode() + b"\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(B + item for item in parts) + B + b"--\r\n"


FILE = part("file", AUDIO.replace(b"--bb", b"-- b"), '; filename="a.wav"\r\nContent-Type: audio/wav')


async def send(port: int, body: bytes, path: str = PATH, boundary: str = "b") -> Answer:
    return await ask(port, path, body, headers={"content-type": f"multipart/form-data; boundary={boundary}"})


@given(
    st.lists(st.tuples(st.sampled_from(["model", "stream", "file", "x"]), st.binary(max_size=30)), max_size=5)
)
def test_what_clients_write_is_read_back(fields: list[tuple[str, bytes]]) -> None:
    files = [(name, (None, value)) for name, value in fields]
    request = httpx.Request("POST", "http://x", files=files or [("x", (None, b""))])
    body = request.read()
    boundary = boundary_of(request.headers["content-type"].encode())
    given_names = [name for name, _ in fields]
    if any(given_names.count(name) > 1 for name in NAMES):
        with pytest.raises(GatewayError, match="twice"):
            find(body, boundary, NAMES)
        return
    found = find(body, boundary, NAMES)
    assert {name: body[span.start : span.end] for name, span in found.fields.items()} == {
        name: value for name, value in fields if name in NAMES
    }


@given(
    st.lists(
        st.sampled_from(
            [
                B,
                b"--",
                b"\r\n",
                b"\n",
                b'Content-Disposition: form-data; name="model"',
                b"\r\n\r\n",
                b"m",
                b": ",
                b'; filename="x"',
                b" ",
            ]
        ),
        max_size=25,
    )
)
def test_no_bytes_raise_anything_but_a_400(pieces: list[bytes]) -> None:
    try:
        find(b"".join(pieces), b"b", NAMES)
    except GatewayError as error:
        status = error.status
        assert status == 400


@pytest.mark.parametrize("path", [PATH, "/v1/audio/translations"])
async def test_a_file_reaches_the_engine_byte_for_byte(gateway: Any, path: str) -> None:
    body = form(FILE, part("model", b"m"), part("language", b"de"))
    async with FakeEngine(families.script(["Hé", "llo"])) as engine, gateway(engine) as running:
        answer = await send(running.port, body, path)
        assert answer.json()["text"] == "Héllo"
        assert engine.seen[0].body == body
        assert engine.seen[0].headers["content-type"] == 'multipart/form-data; boundary="b"'
        assert engine.seen[0].path == path


async def test_a_stream_is_counted_and_its_caller_sees_what_it_asked_for(gateway: Any) -> None:
    plain = form(FILE, part("model", b"m"), part("stream", b"true"))
    asking = form(part("stream_include_usage", b"true"), part("stream", b"true"), FILE, part("model", b"m"))
    declining = form(part("stream_include_usage", b"false"), FILE, part("stream", b"True"))
    async with FakeEngine(families.script(["a", "b"])) as engine, gateway(engine) as running:
        for body, usage in ((plain, False), (asking, True), (declining, False)):
            answer = await send(running.port, body)
            assert answer.body == b"".join(transcription_events(["a", "b"], with_usage=usage))
        assert engine.seen[1].body == asking
        await running.settled()
        assert running.metric("tokens_total", model="m", key="anonymous", kind="completion") == 6
        assert running.metric("streams_ended_total", model="m", outcome="complete") == 3


DISPOSITION = b'\r\nContent-Disposition: form-data; name="model"\r\n'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form(FILE, part("model", b"m"), part("model", b"other")), "'model' stands twice"),
        (form(FILE, part("model", b"x" * 600)), "'model' is longer"),
        (form(FILE, part("model", b"")), "'model' must be"),
        (form(FILE, part("model", b"\xff")), "'model' is not UTF-8"),
        (form(FILE, part("stream", b"maybe")), "'stream' must be true or false"),
        (form(*[part("x", b"y")] * 101), "more than 100 parts"),
        (form(FILE)[:-6], "last boundary is missing"),
        (b"x" + form(FILE), "does not begin with its boundary"),
        (B + b"\r\n\r\nm\r\n" + B + b"--", "needs one header"),
        (B + DISPOSITION + DISPOSITION[2:] + b"\r\nm\r\n" + B + b"--", "needs one header"),
        (B + DISPOSITION[:-2] + b"; x=1\r\n\r\nm\r\n" + B + b"--", "needs one header"),
        (B + DISPOSITION + b" folded\r\n\r\nm\r\n" + B + b"--", "needs one header"),
        (B + DISPOSITION[:-2] + b"\nx: y\r\n\r\nm\r\n" + B + b"--", "needs one header"),
        (b"", "does not begin"),
    ],
)
async def test_what_can_be_read_in_two_ways_is_refused(gateway: Any, body: bytes, said: str) -> None:
    async with FakeEngine(families.script()) as engine, gateway(engine) as running:
        answer = await send(running.port, body)
        assert answer.status == 400
        assert said in answer.json()["error"]["message"]
        assert not engine.seen


async def test_a_file_has_a_limit_of_its_own(gateway: Any) -> None:
    options = {"limits": {"bodyBytes": 1024, "uploadBytes": 50_000}}
    async with FakeEngine(families.script()) as engine, gateway(engine, options=options) as running:
        assert (await send(running.port, form(FILE, part("model", b"m")))).status == 200
        assert (await send(running.port, form(part("file", b"x" * 60_000)))).status == 413


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "multipart/form-data; boundary="]
)
async def test_another_content_type_is_refused(gateway: Any, kind: str) -> None:
    async with FakeEngine(families.script()) as engine, gateway(engine) as running:
        answer = await ask(running.port, PATH, form(FILE), headers={"content-type": kind})
        assert answer.status == (415 if "json" in kind else 400)
        assert json.loads(answer.body)["error"]["message"]
