"""Try on sockets of our own what an application needs of a socket that we enrol.

Some kernels break sockets in a sockhash: FIONREAD answers 0 (929e30f93125, in stable
6.6.128, 6.12.75 and 6.18.14), inserting at the end of a message fails or corrupts it
(before 15ab0548e310, 2024-12). Whoever enrols an application's socket there breaks the
application, so the programs are first run on these.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

TIMEOUT_S = 5.0
BODY = bytes(range(256)) * 256  # 64 KB
PIECES = 20
INSERTED = (
    b"x-request-id",
    b"x-b3-traceid",
    b"x-b3-spanid",
    b"x-b3-parentspanid",
    b"x-b3-sampled",
    b"x-b3-flags",
    b"b3",
    b"traceparent",
)


class Fault(Exception):
    """What an application would see go wrong."""


def find_fault(trace: Callable[[int], None]) -> str | None:
    """Run every trial in a network namespace of its own; say what failed, or None.

    `trace` is called with that namespace's inode before any socket is made there.
    """
    found: list[str | None] = []

    def run() -> None:
        try:
            trace(_new_netns())
            for trial in TRIALS:
                _run(trial)
            found.append(None)
        except Fault as fault:
            found.append(str(fault))
        except OSError as exc:
            found.append(str(exc))

    thread = threading.Thread(target=run, name="selftest")
    thread.start()
    thread.join()
    return found[0] if found else "the self-test itself failed"


def _run(trial: Callable[[socket.socket, socket.socket], None]) -> None:
    try:
        with _connection() as (client, server):
            trial(client, server)
    except OSError as exc:
        raise Fault(f"{trial.__name__.strip('_')}: {exc}") from exc


def _fionread(client: socket.socket, server: socket.socket) -> None:
    server.sendall(bytes(100))
    _readable(client)
    answer = bytearray(4)
    fcntl.ioctl(client, termios.FIONREAD, answer)
    (count,) = struct.unpack("i", answer)
    if count != 100:
        raise Fault(f"FIONREAD answers {count} where 100 bytes wait")


def _echo(client: socket.socket, server: socket.socket) -> None:
    _in_background(client.sendall, BODY)
    _expect("echo", _receive(server, len(BODY)), BODY)
    _in_background(server.sendall, BODY)
    _expect("echo", _receive(client, len(BODY)), BODY)


def _edge_triggered(client: socket.socket, server: socket.socket) -> None:
    with select.epoll() as epoll:
        epoll.register(client, select.EPOLLIN | select.EPOLLET)
        for _ in range(3):
            server.sendall(b"edge")
            if not epoll.poll(TIMEOUT_S):
                raise Fault("edge-triggered epoll does not report new data")
            _expect("epoll", _receive(client, 4), b"edge")


def _insertion(client: socket.socket, server: socket.socket) -> None:
    """Into the middle of a message."""
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 65536\r\n\r\n"
    _in_background(client.sendall, head + BODY)
    _expect_injected(server, head, BODY)


def _insertion_at_end(client: socket.socket, server: socket.socket) -> None:
    head = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
    client.sendall(head)
    _expect_injected(server, head, b"")


def _pieces(client: socket.socket, server: socket.socket) -> None:
    """A head and a body in one writev of many elements."""
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n"
    whole = head + BODY[:1000]
    size = len(whole) // PIECES + 1
    sent = os.writev(
        client.fileno(), [whole[i : i + size] for i in range(0, len(whole), size)]
    )
    _expect("writev", sent, len(whole))
    _expect_injected(server, head, BODY[:1000])


def _sendfile(client: socket.socket, server: socket.socket) -> None:
    head = b"PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 65536\r\n\r\n"
    client.send(head, socket.MSG_MORE)
    with tempfile.TemporaryFile() as file:
        file.write(BODY)
        file.flush()
        _in_background(client.sendfile, file, 0, len(BODY))
        _expect_injected(server, head, BODY)


TRIALS = (
    _fionread,
    _echo,
    _edge_triggered,
    _insertion,
    _insertion_at_end,
    _pieces,
    _sendfile,
)


def _expect(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise Fault(f"{what}: the bytes that arrive are not those that were sent")


def _expect_injected(server: socket.socket, head: bytes, body: bytes) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        received += server.recv(1)
    lines = received.split(b"\r\n")
    ours = [line for line in lines if line.partition(b":")[0] in INSERTED]
    _expect("head", b"\r\n".join(line for line in lines if line not in ours), head)
    if not ours:
        raise Fault("the headers were not inserted")
    _expect("body", _receive(server, len(body)), body)


def _receive(sock: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = sock.recv(min(count, 65536))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _readable(sock: socket.socket) -> None:
    if not select.select([sock], [], [], TIMEOUT_S)[0]:
        raise Fault("select does not report new data")


def _in_background(call: Callable[..., object], *args: object) -> None:
    """Send without waiting for the reader; a failure shows in what is received.

    ValueError: Socket.sendfile() seeks in the file once more, which may be closed then.
    """

    def run() -> None:
        with suppress(OSError, ValueError):
            call(*args)

    threading.Thread(target=run, daemon=True).start()


@contextmanager
def _connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), TIMEOUT_S)
        with client:
            server, _ = listener.accept()
            with server:
                server.settimeout(TIMEOUT_S)
                yield client, server


def _new_netns() -> int:
    """Put this thread into a new network namespace, loopback up; return its inode."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    return Path("/proc/thread-self/ns/net").stat().st_ino
