"""Every way in which an application may send and receive: the same two spans."""

import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm.conftest import CLIENT, FRONT, Agent, Json, Server, connected, serving
from vm.test_connections import spans_at, talking

BODY = bytes(range(256)) * 20  # 5 KB
URING = Path(__file__).parent / "native" / "uring.c"

Send = Callable[[socket.socket, bytes, bytes], None]
Receive = Callable[[socket.socket, int], bytes]


def send_all(sock: socket.socket, head: bytes, body: bytes) -> None:
    sock.sendall(head + body)


def send_by_bytes(sock: socket.socket, head: bytes, body: bytes) -> None:
    """All but the line end at which headers are inserted."""
    for i in range(len(head) - 2):
        sock.send(head[i : i + 1])
    sock.sendall(head[-2:])
    sock.sendall(body)


def send_in_elements(sock: socket.socket, head: bytes, body: bytes) -> None:
    whole = head + body
    pieces = [whole[i : i + 300] for i in range(0, len(whole), 300)]
    assert sock.sendmsg(pieces) == len(whole)


def send_more(sock: socket.socket, head: bytes, body: bytes) -> None:
    """Corked, in the middle of a header."""
    sock.send(head[:30], socket.MSG_MORE)
    sock.send(head[30:], socket.MSG_MORE)
    sock.sendall(body)


def send_file(sock: socket.socket, head: bytes, body: bytes) -> None:
    sock.sendall(head)
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        left = len(body)
        while left:
            left -= os.sendfile(sock.fileno(), file.fileno(), len(body) - left, left)


def send_by_splice(sock: socket.socket, head: bytes, body: bytes) -> None:
    sock.sendall(head)
    out, into = os.pipe()
    try:
        assert os.write(into, body) == len(body)
        left = len(body)
        while left:
            left -= os.splice(out, sock.fileno(), left)
    finally:
        os.close(out)
        os.close(into)


def send_without_waiting(sock: socket.socket, head: bytes, body: bytes) -> None:
    view = memoryview(head + body)
    sock.setblocking(False)
    try:
        while view:
            try:
                view = view[sock.send(view) :]
            except BlockingIOError:
                select.select([], [sock], [])
    finally:
        sock.settimeout(30)


def receive(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = sock.recv(size)
        assert part
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive_by_bytes(sock: socket.socket, size: int) -> bytes:
    return b"".join(sock.recv(1) for _ in range(size))


def receive_at_once(sock: socket.socket, size: int) -> bytes:
    return sock.recv(size, socket.MSG_WAITALL)


def receive_after_peeking(sock: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        peeked = sock.recv(size - len(received), socket.MSG_PEEK)
        taken = sock.recv(len(peeked))
        assert taken == peeked
        received += taken
    return received


def receive_into_elements(sock: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        left = size - len(received)
        buffers = [bytearray(min(100, left - i)) for i in range(0, left, 100)][:30]
        count = sock.recvmsg_into(buffers)[0]
        assert count
        received += b"".join(buffers)[:count]
    return received


def receive_without_waiting(sock: socket.socket, size: int) -> bytes:
    received = b""
    sock.setblocking(False)
    try:
        while len(received) < size:
            try:
                received += sock.recv(size - len(received))
            except BlockingIOError:
                select.select([sock], [], [])
    finally:
        sock.settimeout(30)
    return received


def receive_by_splice(sock: socket.socket, size: int) -> bytes:
    """The head by recv(2): what is spliced past the process can only be body."""
    received = receive(sock, size - len(BODY))
    out, into = os.pipe()
    try:
        left = len(BODY)
        while left:
            count = os.splice(sock.fileno(), into, left)
            assert count
            received += os.read(out, count)
            left -= count
    finally:
        os.close(out)
        os.close(into)
    return received


def receive_and_throw_away(sock: socket.socket, size: int) -> bytes:
    """MSG_TRUNC: tcp(7) discards, and copies nothing."""
    head = receive(sock, size - len(BODY))
    left = len(BODY)
    while left:
        left -= len(sock.recv(left, socket.MSG_TRUNC))
    return head + BODY


SENDERS: tuple[Send, ...] = (
    send_all,
    send_by_bytes,
    send_in_elements,
    send_more,
    send_file,
    send_by_splice,
    send_without_waiting,
)
RECEIVERS: tuple[Receive, ...] = (
    receive_by_bytes,
    receive_at_once,
    receive_after_peeking,
    receive_into_elements,
    receive_without_waiting,
    receive_by_splice,
    receive_and_throw_away,
)
WAYS = [*((send, receive) for send in SENDERS), *((send_all, r) for r in RECEIVERS)]


@pytest.mark.parametrize(
    ("send", "take"),
    WAYS,
    ids=lambda way: way.__name__,
)
def test_both_ends_send_and_receive_in_this_way(
    agent: Agent, send: Send, take: Receive
) -> None:
    calls = 3
    response = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY)

    def talk(sock: socket.socket) -> None:
        for _ in range(calls):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                # Its length is not known beforehand: the kernel adds to it.
                head += sock.recv(1)
            assert b"x-b3-traceid" in head
            assert take(sock, len(BODY)) == BODY
            send(sock, response, BODY)

    with talking(talk) as server:
        with connected(server) as sock:
            for i in range(calls):
                lines = [
                    f"PUT /way/{i} HTTP/1.1",
                    f"host: {server.address}:{server.port}",
                    f"content-length: {len(BODY)}",
                ]
                send(sock, ("\r\n".join(lines) + "\r\n\r\n").encode(), BODY)
                assert take(sock, len(response + BODY)) == response + BODY
        check(spans_at(agent, server, 2 * calls), calls)


def check(spans: list[Json], calls: int, size: int = len(BODY)) -> None:
    for i in range(calls):
        both = [s for s in spans if s["tags"]["http.url"].endswith(f"/{i}")]
        assert {s["kind"] for s in both} == {"CLIENT", "SERVER"}, spans
        assert len({s["id"] for s in both}) == 1, both
        for span in both:
            assert span["tags"]["request_size"] == str(size), span
            assert span["tags"]["response_size"] == str(size), span
            assert "podspan.end" not in span["tags"], span


@pytest.fixture(scope="module")
def uring(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = tmp_path_factory.mktemp("uring") / "uring"
    gcc = shutil.which("gcc")
    assert gcc, "gcc is missing: make setup"
    subprocess.run(
        [gcc, "-O1", "-Wall", "-Werror", URING, "-luring", "-o", program], check=True
    )
    return str(program)


@contextmanager
def uring_server(uring: str) -> Iterator[Server]:
    command = FRONT.command(uring, "server", FRONT.ipv4)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(FRONT, FRONT.ipv4, int(process.stdout.readline()))
        finally:
            process.kill()


def test_io_uring_at_both_ends(agent: Agent, uring: str) -> None:
    with uring_server(uring) as server:
        argv = [uring, "client", server.address, str(server.port), "5", "/uring/"]
        subprocess.run(CLIENT.command(*argv), check=True)
        check(spans_at(agent, server, 10), 5, size=0)


def test_io_uring_against_ordinary_sockets(agent: Agent, uring: str) -> None:
    with serving(FRONT) as server:
        argv = [uring, "client", server.address, str(server.port), "3", "/uring-one/"]
        subprocess.run(CLIENT.command(*argv), check=True)
        spans = agent.spans_of("/uring-one/", server)
        written = {
            r.headers["x-b3-spanid"] for r in server.requests if "uring" in r.path
        }
    assert {s["id"] for s in spans} == written
    assert len(spans) == 6
