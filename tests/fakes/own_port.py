"""A port that stays a test's own, also before its server listens and after it has gone.

port = OwnPort()
port.number          # connections to it are refused until a server listens there, and again afterwards

A number that was merely free a moment ago may be handed to another process at any time: to another worker of
pytest-xdist, for one.
"""

from __future__ import annotations

import socket
import sys
import weakref


class OwnPort:
    """Bound on 127.0.0.1 as long as this object lives, and never listening.

    Linux lets a listening socket have the address of a bound one where both have SO_REUSEADDR, as the servers
    of asyncio, uvicorn and Valkey have. Elsewhere the port is only likely to stay free.
    """

    def __init__(self) -> None:
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        self.number: int = held.getsockname()[1]
        if sys.platform == "linux":
            weakref.finalize(self, held.close)
        else:
            held.close()
