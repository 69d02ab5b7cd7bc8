"""A reader of the log that stops reading.

Proves: streams and requests go on, and the process ends in time; what is over the bound is lost, and counted
in a line when the reader is back; nothing is lost otherwise, and lines stay whole and in order, those
of several processes on one pipe too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import DONE, FakeEngine
from gateway_process import running_process
from http_caller import ask

from vllm_gateway.output import Output
from vllm_gateway.telemetry import LineFormatter

PATH = "/v1/chat/completions"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
SOON = {"shutdownDelay": "0s"}
PIPE_BYTES = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's ends for reading and writing; it holds little."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield reading, writing
    for number in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(number)


async def test_a_log_that_is_not_read_holds_up_nobody(tmp_path: Path, pipe: tuple[int, int]) -> None:
    _, writing = pipe
    async with FakeEngine() as engine, running_process(tmp_path, engine, **SOON, stdout=writing) as gateway:
        for _ in range(100):  # a line each, of some 250 bytes: the pipe is full after 16
            assert (await ask(gateway.port, PATH, CHAT)).body.endswith(DONE)
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0


async def test_every_line_comes_when_the_reader_is_back(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    async with FakeEngine() as engine, running_process(tmp_path, engine, **SOON, stdout=writing) as gateway:
        os.close(writing)
        ids = [f"r{number}" for number in range(100)]
        for name in ids:
            await ask(gateway.port, PATH, CHAT, headers={"x-request-id": name})
        read = asyncio.create_task(asyncio.to_thread(read_all, reading))
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        lines = [json.loads(line) for line in (await read).splitlines()]
    requests = [line for line in lines if line["message"] == "request" and line["route"] == PATH]
    assert [line["request_id"] for line in requests] == ids
    assert lines[-1]["message"] == "stopped"


def read_all(number: int) -> bytes:
    with open(number, "rb", closefd=False) as file:
        return file.read()


def test_what_is_over_the_bound_is_lost_and_counted(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    output = Output(writing, most=1000)
    handler = logging.StreamHandler(output)
    handler.setFormatter(LineFormatter(as_json=True))
    logger = logging.getLogger("vllm_gateway.output")
    logger.addHandler(handler)
    try:
        output.write("x" * 2 * PIPE_BYTES + "\n")  # over the bound by itself
        whole = [f"line {number:03d} {'.' * 90}\n" for number in range(200)]
        for line in whole:
            output.write(line)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_all(reading)))
        reader.start()
        output.close(10)
        os.close(writing)
        reader.join(10)
    finally:
        logger.removeHandler(handler)
    lines = b"".join(got).decode().splitlines(keepends=True)
    said = [json.loads(line) for line in lines if line.startswith("{")]
    kept = [line for line in lines if not line.startswith("{")]
    assert kept == [line for line in whole if line in kept]
    assert 0 < len(kept) < len(whole)
    assert sum(line["lines"] for line in said) == 1 + len(whole) - len(kept)


def test_lines_of_two_processes_on_one_pipe_stay_whole(pipe: tuple[int, int]) -> None:
    """As those of `--workers` are: many lines are handed over at once, and the reader is behind."""
    reading, writing = pipe
    one, other = Output(writing), Output(writing)
    said = {letter: [f"{number:04d}{letter}" * 60 for number in range(640)] for letter in "ab"}
    for first in range(0, 640, 64):
        for output, whole in zip((one, other), said.values(), strict=True):
            output.write("".join(f"{line}\n" for line in whole[first : first + 64]))
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_all(reading)))
    reader.start()
    one.close(30)
    other.close(30)
    os.close(writing)
    reader.join(30)
    lines = b"".join(got).decode().splitlines()
    for letter, whole in said.items():
        assert [line for line in lines if line[4] == letter] == whole
    assert len(lines) == 2 * 640


def test_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.close(reading)
    output = Output(writing)
    output.write("a\n")
    output.write("b\n")
    output.close(10)
    assert not output._thread.is_alive()
