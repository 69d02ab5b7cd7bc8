"""Sockets: bound before anybody listens, so that a taken port is one clear line; given up when unheard."""

from __future__ import annotations

import socket


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound TCP socket. Raises an OSError that names the address where it cannot be had.

    A `shared` port (SO_REUSEPORT) may be bound again by processes of the same user. Those that listen share
    its connections, by the hash of the caller's address on Linux; one that only holds it gets none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio does
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


def give_up_unheard(sock: socket.socket, seconds: float) -> None:
    """Lets the kernel end a connection whose peer acknowledges nothing for so long (RFC 5482)."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
