"""Sockets whose bytes the kernel carries (splice.c), for tests and the bench."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from podspan.agent.kernel import program, syscall

SOURCE = Path(__file__).with_name("splice.c")
SO_COOKIE = 57  # asm-generic/socket.h
BPF_SK_SKB_STREAM_VERDICT = 5  # enum bpf_attach_type


class Splicer:
    """As agent/redirect/relay.py wants it, in fair weather."""

    def __init__(self) -> None:
        from bcc import BPF

        self._bpf = program.load(str(SOURCE))
        self._ends = program.map_fd(self._bpf, "ends")
        self._partners = program.map_fd(self._bpf, "partners")
        carry = self._bpf.load_func("carry", BPF.SK_SKB)
        BPF.attach_func(carry, self._ends, BPF_SK_SKB_STREAM_VERDICT)

    def join(self, down: socket.socket, up: socket.socket) -> bool:
        """Let the kernel carry what comes from now on, both ways."""
        pair = ((down, cookie(down)), (up, cookie(up)))
        for (_, own), (_, other) in (pair, pair[::-1]):
            syscall.map_update(self._partners, own, other)
        for sock, own in pair:
            syscall.map_update(self._ends, own, struct.pack("=Q", sock.fileno()))
        return True

    def part(self, down: socket.socket, up: socket.socket) -> None:
        """Forget both; their close(2) takes them out of the sockhash."""
        for sock in (down, up):
            syscall.map_delete(self._partners, cookie(sock))

    def close(self) -> None:
        self._bpf.cleanup()


def cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)


@contextmanager
def relayed(buffer: int | None = None) -> Iterator[tuple[socket.socket, ...]]:
    """Yield the client, the relay's sockets down and up, and the server.

    `buffer`: bytes that each socket may hold each way, as far as the kernel obeys.
    """
    client, down = connected(buffer)
    up, server = connected(buffer)
    with client, down, up, server:
        yield client, down, up, server


def connected(buffer: int | None) -> tuple[socket.socket, socket.socket]:
    with socket.socket() as listener:
        client = socket.socket()
        for sock in (listener, client):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        return client, listener.accept()[0]
