"""gRPC's own client and server, curl and nginx, through the HTTP/2 layer.

The way through the relay is the fixture `way`: here an event loop of the test that
carries the layer's actions between two sockets.
"""

import asyncio
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
from podspan.agent.exchange import End as How
from podspan.agent.redirect.http2 import Http2
from podspan.agent.redirect.inject import Direction, Propagation
from podspan.agent.redirect.layer import (
    Abort,
    Action,
    Count,
    End,
    Report,
    Send,
    Side,
    StreamRecord,
)

DEADLINE_S = 60
UP, DOWN = Side.UP, Side.DOWN
UNLIMITED = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@dataclass
class Way:
    """Connections to `through(port)` arrive at `port` of this host, relayed."""

    through: Callable[[int], int]
    records: list[StreamRecord] = field(default_factory=list)
    losses: list[Action] = field(default_factory=list)  # Abort and Count
    recorded: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_records(self, count: int) -> list[StreamRecord]:
        """A record is made when the last frame passes, which an end may not await."""
        with self.recorded:
            assert self.recorded.wait_for(
                lambda: len(self.records) >= count, DEADLINE_S
            ), self.records
            return list(self.records)


class Socket(asyncio.Protocol):
    """One side of a relayed connection."""

    def __init__(self, connection, side):
        self.connection = connection
        self.side = side
        self.transport: Any = None

    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # told of each time it is empty
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data):
        self.connection.tell(lambda layer: layer.received(self.side, data))

    def eof_received(self):
        self.connection.tell(lambda layer: layer.ended(self.side))
        return True

    def connection_lost(self, exc):
        if exc is not None:
            self.connection.tell(lambda layer: layer.lost(self.side))

    def resume_writing(self):
        self.connection.tell(lambda layer: layer.drained(self.side))

    def write(self, data):
        self.transport.write(data)
        if not self.transport.get_write_buffer_size():
            asyncio.get_running_loop().call_soon(self.resume_writing)


class Connection:
    """Two sockets and the layer."""

    def __init__(self, way):
        self.way = way
        self.layer = Http2(
            Direction.OUTBOUND,
            Propagation(),
            time.monotonic_ns,
            lambda: int.from_bytes(os.urandom(8)),
        )
        self.sockets = {side: Socket(self, side) for side in Side}
        self.early = []  # what came while there was nobody to send to

    def tell(self, call):
        self.early.append(call)
        if all(each.transport for each in self.sockets.values()):
            early, self.early = self.early, []
            for each in early:
                self.do(each(self.layer))

    def do(self, actions):
        for action in actions:
            match action:
                case Send(side, data):
                    self.sockets[side].write(data)
                case End(side):
                    self.sockets[side].transport.write_eof()
                case Report(record):
                    with self.way.recorded:
                        self.way.records.append(record)
                        self.way.recorded.notify_all()
                case Abort():
                    self.way.losses.append(action)
                    for each in self.sockets.values():
                        each.transport.abort()
                case Count():
                    self.way.losses.append(action)


@pytest.fixture
def way() -> Iterator[Way]:
    loop = asyncio.new_event_loop()
    connections: list[Connection] = []

    async def listen(port: int) -> int:
        async def accept(sock: socket.socket) -> None:
            upstream = socket.socket()
            upstream.setblocking(False)
            try:
                await loop.sock_connect(upstream, ("127.0.0.1", port))
            except ConnectionRefusedError:
                upstream.close()
                sock.close()
                return
            connection = Connection(made)
            connections.append(connection)
            for side, each in ((DOWN, sock), (UP, upstream)):
                await loop.create_connection(
                    lambda side=side: connection.sockets[side],  # type: ignore[misc]
                    sock=each,
                )
            connection.tell(lambda _: [])

        async def serve() -> None:
            while True:
                sock, _ = await loop.sock_accept(listener)
                await accept(sock)

        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        tasks.append(loop.create_task(serve()))
        listeners.append(listener)
        number: int = listener.getsockname()[1]
        return number

    async def close() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in listeners:
            listener.close()
        for connection in connections:
            for each in connection.sockets.values():
                if each.transport is not None:
                    each.transport.abort()
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    listeners: list[socket.socket] = []
    thread = threading.Thread(target=loop.run_forever, name="relay")
    thread.start()

    def through(port: int) -> int:
        return asyncio.run_coroutine_threadsafe(listen(port), loop).result(DEADLINE_S)

    made = Way(through)
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(close(), loop).result(DEADLINE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE_S)
        loop.close()


# The service; messages are bytes.


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Methods by name; `entered` and `left` tell of calls that hang."""

    def __init__(self):
        self.entered = threading.Event()
        self.left = threading.Event()
        self.metadata: dict[str, str | bytes] = {}
        self.go_on = threading.Event()

    def service(self, handler_call_details):
        name = handler_call_details.method.rpartition("/")[2]
        kinds = {
            "Echo": grpc.unary_unary_rpc_method_handler,
            "Fail": grpc.unary_unary_rpc_method_handler,
            "Hang": grpc.unary_unary_rpc_method_handler,
            "Wait": grpc.unary_unary_rpc_method_handler,
            "Many": grpc.unary_stream_rpc_method_handler,
            "Endless": grpc.unary_stream_rpc_method_handler,
            "Sum": grpc.stream_unary_rpc_method_handler,
            "Chat": grpc.stream_stream_rpc_method_handler,
        }
        return kinds[name](getattr(self, name.lower())) if name in kinds else None

    def echo(self, request, context):
        self.metadata = dict(context.invocation_metadata())
        context.send_initial_metadata((("first", "1"),))
        context.set_trailing_metadata((("last", "2"), ("raw-bin", b"\0\xff")))
        return request

    def fail(self, request, context):
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: \u00e9")

    def hang(self, request, context):
        context.add_callback(self.left.set)
        self.entered.set()
        assert self.left.wait(DEADLINE_S)
        return b""

    def wait(self, request, context):
        self.entered.set()
        assert self.go_on.wait(DEADLINE_S)
        return b"done"

    def many(self, request, context):
        for number in range(int(request)):
            yield b"%d" % number * 100

    def endless(self, request, context):
        context.add_callback(self.left.set)
        while context.is_active():
            yield b"more" * 1000

    def sum(self, requests, context):
        return b"%d" % sum(len(request) for request in requests)

    def chat(self, requests, context):
        for request in requests:
            yield request[::-1]


@dataclass
class Rpc:
    service: Service
    server: grpc.Server
    channel: grpc.Channel
    way: Way

    def unary(self, name):
        return self.channel.unary_unary(f"/test.Service/{name}")


@pytest.fixture
def rpc(way: Way) -> Iterator[Rpc]:
    """A server, and a channel to it by way of the relay."""
    service = Service()
    with ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool, handlers=[service], options=UNLIMITED)
        port = way.through(server.add_insecure_port("127.0.0.1:0"))
        server.start()
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED)
        try:
            yield Rpc(service, server, channel, way)
        finally:
            service.go_on.set()
            channel.close()
            server.stop(None).wait(DEADLINE_S)


def test_a_unary_call_with_metadata(rpc):
    sent = (("key", "value"), ("raw-bin", b"\0\x80\xff"))
    reply, call = rpc.unary("Echo").with_call(
        b"hello", metadata=sent, timeout=DEADLINE_S
    )
    assert reply == b"hello"
    assert dict(call.initial_metadata())["first"] == "1"
    assert dict(call.trailing_metadata()) == {"last": "2", "raw-bin": b"\0\xff"}
    seen = rpc.service.metadata
    assert (seen["key"], seen["raw-bin"]) == ("value", b"\0\x80\xff")

    [record] = rpc.way.wait_for_records(1)
    assert seen["x-b3-traceid"] == f"{record.trace_id:032x}"
    assert seen["x-b3-spanid"] == f"{record.span_id:016x}"
    assert seen["x-request-id"] == record.request_id
    assert (record.method, record.target) == ("POST", "/test.Service/Echo")
    assert (record.request_bytes, record.response_bytes) == (10, 10)
    assert (record.status, record.grpc_status, record.end) == (200, "0", How.COMPLETE)
    assert (
        0
        < record.request_first_ns
        <= record.request_last_ns
        <= record.response_first_ns
        <= record.response_last_ns
    )
    assert rpc.way.losses == []


def test_an_error_with_its_text(rpc):
    with pytest.raises(grpc.RpcError) as failed:
        rpc.unary("Fail")(b"", timeout=DEADLINE_S)
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND
    assert failed.value.details() == "no such thing: \u00e9"
    [record] = rpc.way.wait_for_records(1)
    assert record.grpc_status == "5"
    assert record.grpc_message == "no such thing: %C3%A9"


def test_a_method_that_is_not_there(rpc):
    with pytest.raises(grpc.RpcError) as failed:
        rpc.unary("Nothing")(b"", timeout=DEADLINE_S)
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert rpc.way.wait_for_records(1)[0].grpc_status == "12"


def test_the_three_kinds_of_streams(rpc):
    many = rpc.channel.unary_stream("/test.Service/Many")(b"500", timeout=DEADLINE_S)
    assert list(many) == [b"%d" % number * 100 for number in range(500)]

    parts = [b"x" * 1000] * 300
    total = rpc.channel.stream_unary("/test.Service/Sum")
    assert total(iter(parts), timeout=DEADLINE_S) == b"300000"

    asked = iter([b"abc", b"", b"xyz"])
    chat = rpc.channel.stream_stream("/test.Service/Chat")
    assert list(chat(asked, timeout=DEADLINE_S)) == [b"cba", b"", b"zyx"]
    records = rpc.way.wait_for_records(3)
    assert [record.grpc_status for record in records] == ["0"] * 3


def test_a_chat_in_turns(rpc):
    """Each answer is there before the next question is asked."""
    answers = threading.Semaphore(1)

    def questions():
        for number in range(50):
            assert answers.acquire(timeout=DEADLINE_S)
            yield b"%d." % number

    chat = rpc.channel.stream_stream("/test.Service/Chat")
    for number, answer in enumerate(chat(questions(), timeout=DEADLINE_S)):
        assert answer == (b"%d." % number)[::-1]
        answers.release()
    assert number == 49


def test_a_deadline_that_passes(rpc):
    with pytest.raises(grpc.RpcError) as failed:
        rpc.unary("Hang")(b"", timeout=0.3)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # The server's call ends as well, once it has begun.
    if rpc.service.entered.is_set():
        assert rpc.service.left.wait(DEADLINE_S)


def test_a_cancelled_call_reaches_the_server(rpc):
    future = rpc.unary("Hang").future(b"", timeout=DEADLINE_S)
    assert rpc.service.entered.wait(DEADLINE_S)
    future.cancel()
    assert rpc.service.left.wait(DEADLINE_S)
    [record] = rpc.way.wait_for_records(1)
    assert (record.end, record.error, record.status) == (How.CLOSED_HERE, 8, 0)


def test_a_stream_that_is_cancelled_halfway(rpc):
    stream = rpc.channel.unary_stream("/test.Service/Endless")(b"", timeout=DEADLINE_S)
    for _, _part in zip(range(100), stream, strict=False):
        pass
    stream.cancel()
    assert rpc.service.left.wait(DEADLINE_S)
    [record] = rpc.way.wait_for_records(1)
    assert (record.end, record.error, record.status) == (How.CLOSED_HERE, 8, 200)
    # The connection is none the worse.
    assert rpc.unary("Echo")(b"again", timeout=DEADLINE_S) == b"again"


def test_big_messages(rpc):
    body = Random(1).randbytes(8 << 20)
    assert rpc.unary("Echo")(body, timeout=DEADLINE_S) == body
    [record] = rpc.way.wait_for_records(1)
    assert record.request_bytes == record.response_bytes == len(body) + 5
    assert rpc.way.losses == []


def test_calls_at_once_do_not_mix(rpc):
    echo = rpc.unary("Echo")
    bodies = [b"%d" % number * (1 + number * 97) for number in range(200)]
    calls = [echo.future(body, timeout=DEADLINE_S) for body in bodies]
    assert [call.result(DEADLINE_S) for call in calls] == bodies
    records = rpc.way.wait_for_records(200)
    assert len({record.span_id for record in records}) == 200
    assert rpc.way.losses == []


def test_a_server_that_stops_finishes_its_calls(rpc):
    future = rpc.unary("Wait").future(b"", timeout=DEADLINE_S)
    assert rpc.service.entered.wait(DEADLINE_S)
    stopped = rpc.server.stop(DEADLINE_S)
    rpc.service.go_on.set()
    assert future.result(DEADLINE_S) == b"done"
    assert stopped.wait(DEADLINE_S)
    assert rpc.way.wait_for_records(1)[0].grpc_status == "0"


def test_a_server_that_is_not_there(way):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    channel = grpc.insecure_channel(f"127.0.0.1:{way.through(port)}")
    with channel, pytest.raises(grpc.RpcError) as failed:
        channel.unary_unary("/test.Service/Echo")(b"", timeout=DEADLINE_S)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert way.records == []


# Others' HTTP/2: nghttp2's client in curl, nginx's server.

NGINX = """\
daemon off; master_process off; pid {root}/pid; error_log stderr error;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {root}/body; default_type text/plain;
    proxy_temp_path {root}/p; fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u;
    scgi_temp_path {root}/s;
    server {{
        listen 127.0.0.1:{port} http2; root {root};
        location /context {{ return 200 "$http_x_b3_traceid-$http_x_b3_spanid"; }}
        location /gone {{ return 503; }}
    }}
}}
"""


@contextmanager
def nginx(root: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    config = root / "nginx.conf"
    config.write_text(NGINX.format(root=root, port=port))
    process = subprocess.Popen(["nginx", "-p", str(root), "-c", str(config)])
    try:
        give_up = time.monotonic() + DEADLINE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                assert time.monotonic() < give_up
        yield port
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def test_curl_and_nginx(way, tmp_path):
    big = Random(2).randbytes(6 << 20)
    (tmp_path / "big").write_bytes(big)
    with nginx(tmp_path) as port:
        url = f"http://127.0.0.1:{way.through(port)}"
        curl = ["curl", "-sS", "--http2-prior-knowledge", "--max-time", str(DEADLINE_S)]
        context, got, _ = (
            subprocess.run(
                [*curl, f"{url}/{name}"], capture_output=True, check=True
            ).stdout
            for name in ("context", "big", "gone")
        )
    assert got == big
    records = {record.target: record for record in way.wait_for_records(3)}
    asked = records["/context"]
    assert context.decode() == f"{asked.trace_id:032x}-{asked.span_id:016x}"
    assert records["/big"].response_bytes == len(big)
    assert records["/gone"].status == 503
    assert {record.grpc_status for record in records.values()} == {""}
    assert way.losses == []
