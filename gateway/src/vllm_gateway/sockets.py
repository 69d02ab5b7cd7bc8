"""Sockets: bound before anybody listens, so that a taken port is one clear line; what the kernel is told."""

from __future__ import annotations

import fcntl
import resource
import socket

_DESCRIPTORS = 16_384  # 128 KiB of the kernel's


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


def notice_dead_peers(listener: socket.socket, seconds: float) -> None:
    """Lets the kernel end a connection whose peer vanished without a word (RFC 9293, RFC 5482).

    The connections that `listener` accepts have its options. `seconds` are those without an acknowledgement.
    """
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    give_up_unheard(listener, seconds)
    if hasattr(socket, "TCP_KEEPIDLE"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(seconds / 2)))


def accept_with_data(listener: socket.socket) -> None:
    """Has the kernel hand over a connection with its first bytes, which saves a turn of the loop a request.

    One without any is handed over a second later (tcp(7), TCP_DEFER_ACCEPT).
    """
    if hasattr(socket, "TCP_DEFER_ACCEPT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)


def acknowledge_less(sock: socket.socket) -> None:
    """Has the kernel acknowledge every second small read, instead of each one as it is read.

    An event is a segment of its own, and reading one from a connection that only receives sends an
    acknowledgement, in the reader's time (tcp(7), TCP_QUICKACK; Linux, tcp_cleanup_rbuf). Where one is kept
    waiting for 40 ms the kernel goes back to that by itself: so with events that are further apart, and once,
    with that pause, with an engine that holds back small writes (Nagle's algorithm; vLLM does not).
    """
    if hasattr(socket, "TCP_QUICKACK"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)


def reserve_descriptors() -> None:
    """Has the kernel make room for many descriptors, which it does at once before there are threads.

    Its table doubles as it fills, and in a process with threads whoever opens the descriptor too many waits
    until all processors have let go of the old one (Linux, expand_fdtable: synchronize_rcu): with 256, 512
    and 1,024 descriptors open all streams stood still for 5 to 20 ms.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, _DESCRIPTORS)
    with socket.socket() as sock:
        socket.close(fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, most - 1))
