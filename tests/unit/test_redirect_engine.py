"""The engine with workers that do what the test wants, and a relay between sockets."""

import errno
import logging
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

import pytest
from podspan.agent.redirect import engine as engine_module
from podspan.agent.redirect import relay as relay_module
from podspan.agent.redirect.engine import (
    RESTART_MAX_S,
    RESTART_MIN_S,
    STEADY_S,
    RedirectEngine,
    WorkerOptions,
)
from podspan.agent.redirect.loop import Loop
from podspan.agent.redirect.relay import Relay, Shared
from podspan.agent.redirect.sniff import HTTP2_PREFACE
from podspan.agent.redirect.sniff import Protocol as Spoken
from podspan.agent.redirect.sockets import prepare_accepted, unacknowledged

DEADLINE_S = 20


class Time:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(engine_module, "time", clock)
    return clock


@pytest.fixture
def engine_of(monkeypatch):
    """Make an engine whose workers run this Python."""
    made = []

    def make(script, workers=1):
        command = (sys.executable, "-c", script)
        monkeypatch.setattr(engine_module, "WORKER_COMMAND", command)
        warnings: list[str] = []
        engine = RedirectEngine(
            workers=workers,
            handoff_fds=(),
            options=WorkerOptions(),
            on_record=print,
            on_warning=warnings.append,
        )
        made.append(engine)
        return engine, warnings

    yield make
    for engine in made:
        for worker in engine._workers():
            worker.process.kill()
        engine.close(0)


def die(engine):
    """Wait for the worker to end, and let the engine see it."""
    [worker] = engine._workers()
    worker.process.wait(DEADLINE_S)
    engine.poll()


def test_a_worker_that_dies_is_replaced_at_once_and_then_with_growing_pauses(
    engine_of, clock
):
    engine, warnings = engine_of("raise SystemExit(3)")
    die(engine)
    assert len(engine.pids) == 1
    pause_s = RESTART_MIN_S
    for _ in range(10):
        die(engine)
        assert engine.pids == []
        clock.now += pause_s - 0.01
        engine.poll()
        assert engine.pids == []
        clock.now += 0.02
        engine.poll()
        assert len(engine.pids) == 1
        pause_s = min(2 * pause_s, RESTART_MAX_S)

    assert engine.counters()["redirect_workers_died"] == 11
    assert len(warnings) == 11


def test_a_worker_that_was_steady_is_replaced_at_once(engine_of, clock):
    engine, _ = engine_of("raise SystemExit(3)")
    for _ in range(3):
        clock.now += STEADY_S
        die(engine)
        assert len(engine.pids) == 1


def test_a_worker_that_speaks_another_protocol_is_replaced(engine_of):
    engine, warnings = engine_of("import os; os.write(0, b'what?'); os.read(0, 1)")
    [first] = engine.pids
    [worker] = engine._workers()
    while not warnings:
        engine.poll()
    worker.process.wait(DEADLINE_S)
    while engine.pids == [first]:
        engine.poll()

    assert f"redirect worker pid={first}" in warnings[0]


def test_a_worker_that_does_not_end_in_time_is_killed(engine_of, monkeypatch):
    monkeypatch.setattr(engine_module, "EXIT_S", 0.05)
    engine, _ = engine_of("import time; time.sleep(600)")
    [worker] = engine._workers()

    engine.close(0)

    assert worker.process.returncode == -9


class Relays:
    """A worker's loop in a thread, relaying to an echo server."""

    def __init__(self, choose):
        self.loop = Loop()
        self.counters: Counter[str] = Counter()
        self.open = 0
        self.rounds = 0  # of the loop
        self._choose = choose
        self._shared = Shared(self.loop, self.counters, self._closed, print, 1.0)

    def run(self):
        def over():
            self.rounds += 1
            return not self.open

        self.loop.run(over)

    def _closed(self, _relay):
        self.open -= 1

    def start(self, down, destination):
        up = socket.socket()
        prepare_accepted(up)
        prepare_accepted(down)
        self.open += 1
        Relay(self._shared, down, up, self._choose, None).start(destination)


@contextmanager
def relayed(choose, connections):
    """Yield clients of as many relayed connections, the servers' ends, the relays."""
    relays = Relays(choose)
    with (
        socket.create_server(("127.0.0.1", 0)) as front,
        socket.create_server(("127.0.0.1", 0)) as back,
    ):
        clients, servers = [], []
        for _ in range(connections):
            clients.append(socket.create_connection(front.getsockname(), DEADLINE_S))
            relays.start(front.accept()[0], back.getsockname())
            servers.append(back.accept()[0])
            servers[-1].settimeout(DEADLINE_S)
        thread = threading.Thread(target=relays.run)
        thread.start()
        try:
            yield clients, servers, relays
        finally:
            for sock in (*clients, *servers):
                sock.close()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def test_a_fault_in_one_connection_costs_that_one(caplog):
    def choose(_relay, _spoken):
        if faults:
            raise faults.pop()

    faults = [ZeroDivisionError]
    with (
        caplog.at_level(logging.CRITICAL),
        relayed(choose, 2) as (clients, servers, relays),
    ):
        clients[0].sendall(b"\0")
        for sock in (clients[0], servers[0]):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        clients[1].sendall(b"\0hello")
        assert servers[1].recv(6, socket.MSG_WAITALL) == b"\0hello"

    assert relays.counters["connections_crashed"] == 1


SETTINGS = b"\0\0\x06\x04\0\0\0\0\0" + bytes(6)


@pytest.mark.parametrize(
    ("first", "then", "spoken"),
    [
        (SETTINGS, HTTP2_PREFACE, Spoken.HTTP2),
        (SETTINGS, b"GET / HTTP/1.1\r\n", Spoken.HTTP1),
        (SETTINGS, b"\0", Spoken.OPAQUE),
        (b"220 ready\r\n", b"HELO a\r\n", Spoken.OPAQUE),
    ],
)
def test_a_server_that_speaks_first_may_speak_http2(first, then, spoken):
    chosen: list[Spoken] = []
    with relayed(lambda _, each: chosen.append(each), 1) as ([client], [server], _):
        server.sendall(first)
        if first is not SETTINGS:
            assert client.recv(len(first), socket.MSG_WAITALL) == first
        client.sendall(then)
        assert server.recv(len(then), socket.MSG_WAITALL) == then
        if first is SETTINGS:
            assert client.recv(len(first), socket.MSG_WAITALL) == first
    assert chosen == [spoken]


def test_a_server_that_might_speak_http2_waits_for_its_client_so_long():
    with relayed(lambda *_: None, 1) as ([client], [server], _):
        server.sendall(SETTINGS)
        assert client.recv(len(SETTINGS), socket.MSG_WAITALL) == SETTINGS


def test_a_reset_is_seen_while_its_data_waits_for_a_slow_reader():
    with relayed(lambda *_: None, 1) as ([client], [server], relays):
        client.sendall(b"\0")
        server.recv(1)
        server.settimeout(0.2)
        with suppress(TimeoutError):  # nobody reads: everything is full
            while True:
                server.send(bytes(1 << 16))
        reset(server)
        before = relays.rounds
        time.sleep(0.1)  # in which a loop that is told again and again runs thousands
        assert relays.rounds - before < 500
        received = 0
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                received += len(part)
            pytest.fail("an end, where there was a reset")
        assert received > 1 << 16

    assert relays.counters["reset_by_up"] == 1


def test_what_came_before_a_reset_is_delivered_before_it(monkeypatch):
    monkeypatch.setattr(relay_module, "RESET_WAIT_S", DEADLINE_S)
    size = 200_000
    with relayed(lambda *_: None, 1) as ([client], [server], _):
        # Most of it is still ours to deliver when the reset comes.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        client.sendall(b"\0")
        server.recv(1)
        server.sendall(bytes(size))
        deadline_s = time.monotonic() + DEADLINE_S
        while unacknowledged(server):
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        reset(server)
        received = 0
        while received < size:
            received += len(client.recv(1 << 16))
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("code", [errno.ECONNREFUSED])
def test_a_connection_that_cannot_be_made_is_counted_by_its_error(code):
    relays = Relays(lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as front:
        client = socket.create_connection(front.getsockname(), DEADLINE_S)
        with socket.socket() as nobody, client:
            nobody.bind(("127.0.0.1", 0))
            relays.start(front.accept()[0], nobody.getsockname())
            relays.loop.run(lambda: not relays.open)
            with pytest.raises(ConnectionResetError):
                client.recv(1)

    name = f"connect_failed_{errno.errorcode[code].lower()}"
    assert relays.counters[name] == 1
    assert relays.counters == {"connect_failed_econnrefused": 1}
