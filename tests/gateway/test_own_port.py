"""The port that a test keeps to itself.

Proves: connections are refused before a server listens there, answered while it does, refused again after it,
and it can listen once more; nobody is handed the port meanwhile, and it is given back with its object.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest
from own_port import OwnPort


async def answered(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


async def test_it_is_refused_but_while_a_server_listens() -> None:
    port = OwnPort()
    for _ in range(2):
        assert not await answered(port.number)
        async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port.number):
            assert await answered(port.number)
    assert not await answered(port.number)


def test_on_linux_nobody_else_is_handed_it() -> None:
    port = OwnPort()
    with socket.socket() as other:
        if sys.platform == "linux":
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port.number))
        else:
            other.bind(("127.0.0.1", port.number))


def test_it_is_given_back_with_its_object() -> None:
    port = OwnPort()
    number = port.number
    del port
    with socket.create_server(("127.0.0.1", number)):
        pass
