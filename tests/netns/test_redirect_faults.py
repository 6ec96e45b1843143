"""What fails around redirected connections, and what must not fail with it."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from netns.http_peer import DEADLINE_S, make_head, read_request
from netns.redirect_fixtures import (
    OPAQUE,
    SERVICE_PORT,
    connect,
    connected,
    echo,
    inode,
    plan_of,
    read_exactly,
    redirect_inbound,
    redirect_outbound,
    redirection,
    reset,
    serving,
    wait_until,
)
from podspan.agent.redirect import engine as engine_module
from podspan.agent.redirect.engine import PodPlan
from podspan.agent.redirect.worker import FDS_PER_CONNECTION, SPARE_FDS

IDLE = int(os.environ.get("PODSPAN_TEST_IDLE", "2000"))
GRACE_S = 0.3

AGENT = """
import sys, time
from pathlib import Path
from podspan.agent.redirect.engine import PodPlan, RedirectEngine, WorkerOptions

path = Path(sys.argv[1])
netns = path.stat().st_ino
engine = RedirectEngine(
    workers=1, handoff_fds=(), options=WorkerOptions(grace_s=float(sys.argv[2])),
    on_record=print, on_warning=print,
)
engine.serve({netns: PodPlan(netns, path)})
while not engine.serving():
    engine.poll()
    time.sleep(0.005)
print(*engine.pids, flush=True)
while True:
    engine.poll()
    time.sleep(0.01)
"""


@pytest.fixture
def pods(two_ns_veth):
    """The client's connections are redirected where they leave."""
    client, server = two_ns_veth
    redirect_outbound(client)
    return client, server


def test_a_killed_worker_costs_what_it_carried_and_nothing_that_waits(pods):
    client, server = pods
    with redirection(deaths=1) as engine, serving(server, echo):
        engine.serve(client)
        carried = [opened_echo(client, server) for _ in range(5)]
        engine.until_counted(connections_open=5)

        os.kill(engine.engine.pids[0], signal.SIGKILL)
        for sock in carried:
            with sock, pytest.raises(ConnectionResetError):
                sock.recv(1)
        # Nobody serves; the listener is there all the same, and so is its queue.
        waiting = [connect(client, server) for _ in range(5)]
        for sock in waiting:
            sock.sendall(OPAQUE + b"late")
        engine.until_counted(workers_died=1, connections_cut=5)
        engine.until(lambda: engine.engine.serving() == {inode(client)})
        for sock in waiting:
            with sock:
                assert read_exactly(sock, 5) == OPAQUE + b"late"


def test_under_load_a_killed_worker_fails_only_calls_that_it_carried(pods):
    client, server = pods
    clients, failed, served = 8, [], []
    stop = threading.Event()

    def call_on():
        while not stop.is_set():
            with connect(client, server) as sock:
                try:
                    sock.sendall(OPAQUE + b"call")
                    read_exactly(sock, 5)
                    served.append(time.monotonic())
                except OSError as exc:
                    failed.append(exc)

    with redirection(deaths=1, workers=2) as engine, serving(server, echo):
        engine.serve(client)
        threads = [threading.Thread(target=call_on) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            engine.until(lambda: len(served) > 100)
            os.kill(engine.engine.pids[0], signal.SIGKILL)
            killed_at = time.monotonic()
            engine.until(
                lambda: len(engine.engine.pids) == 2 and served[-1] > killed_at
            )
            enough = len(served) + 100
            engine.until(lambda: len(served) > enough)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    # Each client has one call at a time, so a death cuts at most one of each.
    assert len(failed) <= clients
    assert all(isinstance(exc, ConnectionResetError) for exc in failed)


def test_connections_outlive_a_killed_agent_and_then_the_worker_ends(pods):
    client, server = pods
    with serving(server, echo), agent(client, GRACE_S) as (process, worker):
        before = opened_echo(client, server)
        process.kill()
        process.wait()
        within_grace = opened_echo(client, server)

        wait_until(lambda: not listens(client))
        for sock in (before, within_grace):
            sock.sendall(b"still here")
            assert read_exactly(sock, 10) == b"still here"
            assert not ended(worker)
            sock.close()
        wait_until(lambda: ended(worker))


def test_a_worker_without_connections_ends_with_its_agent(pods):
    client, _ = pods
    with agent(client, 0.0) as (process, worker):
        process.kill()
        process.wait()
        wait_until(lambda: ended(worker))


def test_a_drain_lets_connections_end(pods):
    client, server = pods
    with redirection(drain_s=DEADLINE_S) as engine, serving(server, echo):
        engine.serve(client)
        sock = opened_echo(client, server)
        closing = threading.Thread(target=engine.engine.close, args=(DEADLINE_S,))
        closing.start()
        wait_until(lambda: not listens(client))
        sock.sendall(b"last words")
        assert read_exactly(sock, 10) == b"last words"
        sock.close()
        closing.join(DEADLINE_S)
        assert not closing.is_alive()


def test_a_drain_that_takes_too_long_is_cut_by_reset(pods):
    client, server = pods
    with redirection() as engine, serving(server, echo):
        engine.serve(client)
        with opened_echo(client, server) as sock:
            engine.engine.close(0.05)
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            assert engine.counter("drain_over") == 1


def test_connections_of_a_pod_that_is_no_longer_wanted_go_on(pods):
    client, server = pods
    process = subprocess.Popen(client.command("sleep", "600"))
    try:
        with redirection() as engine, serving(server, echo):
            engine.serve(client)
            with opened_echo(client, server) as sock:
                engine.serve()
                wait_until(lambda: not listens(client))
                sock.sendall(b"still here")
                assert read_exactly(sock, 10) == b"still here"
            engine.until_counted(connections_open=0, pods=0)
            assert not holds(engine.engine.pids[0], inode(client))
    finally:
        process.kill()
        process.wait()


def test_connections_of_a_pod_that_is_gone_are_reset(two_ns_veth):
    client, server = two_ns_veth
    redirect_inbound(server)
    with redirection() as engine:
        engine.serve(server)
        with connected(client, server) as (ours, _):
            ours.sendall(OPAQUE)
            engine.until_counted(connections_open=1)
            engine.serve()
            with pytest.raises(ConnectionResetError):
                ours.recv(1)
        engine.until_counted(pod_gone=1, connections_open=0)
        wait_until(lambda: not holds(engine.engine.pids[0], inode(server)))
        assert not holds(os.getpid(), inode(server))


def test_a_pod_that_is_another_by_now_is_not_served(two_ns_veth):
    client, server = two_ns_veth
    wrong = {inode(server): PodPlan(inode(server), client.path)}
    with redirection() as engine:
        engine.engine.serve(wrong)
        engine.engine.serve(wrong)

        [warning] = engine.warnings
        assert f"is {inode(client)}, expected {inode(server)}" in warning
        assert engine.counter("pods_failed") == 2
        assert engine.engine.serving() == frozenset()


def test_a_port_that_the_pod_uses_itself_is_said(pods):
    client, _ = pods
    with client.inside():
        taken = socket.create_server(("", 15001))
    with taken, redirection() as engine:
        engine.engine.serve({inode(client): plan_of(client)})
        [warning] = engine.warnings
        assert "port 15001" in warning
        assert engine.engine.serving() == frozenset()


@pytest.mark.parametrize("known", ["by count", "by EMFILE"])
def test_without_descriptors_connections_go_direct(pods, known, monkeypatch):
    client, server = pods
    with ExitStack() as stack:
        room = 4
        if known == "by count":
            limit = SPARE_FDS + room * FDS_PER_CONNECTION
            command = ("prlimit", f"--nofile={limit}", *engine_module.WORKER_COMMAND)
            monkeypatch.setattr(engine_module, "WORKER_COMMAND", command)
        engine = stack.enter_context(redirection())
        stack.enter_context(serving(server, echo))
        engine.serve(client)
        if known == "by EMFILE":
            [worker] = engine.engine.pids
            used = len(list(Path(f"/proc/{worker}/fd").iterdir()))
            limit = used + room * FDS_PER_CONNECTION
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))

        served = [
            stack.enter_context(opened_echo(client, server)) for _ in range(room + 3)
        ]
        for sock in served:
            sock.sendall(b"still here")
            assert read_exactly(sock, 10) == b"still here"
        engine.until_counted(connections_outbound=room, gate_no_socket_emfile=3)


@pytest.mark.parametrize("known", ["by count", "by EMFILE"])
def test_without_descriptors_and_gate_connections_wait_and_are_then_served(
    two_ns_veth, known, monkeypatch
):
    client, server = two_ns_veth
    redirect_outbound(client, gate=False)
    with ExitStack() as stack:
        room = 4
        if known == "by count":
            limit = SPARE_FDS + room * FDS_PER_CONNECTION
            command = ("prlimit", f"--nofile={limit}", *engine_module.WORKER_COMMAND)
            monkeypatch.setattr(engine_module, "WORKER_COMMAND", command)
        engine = stack.enter_context(redirection())
        stack.enter_context(serving(server, echo))
        engine.serve(client)
        if known == "by EMFILE":
            # One of the next connections finds room for one socket, not for two.
            [worker] = engine.engine.pids
            used = len(list(Path(f"/proc/{worker}/fd").iterdir()))
            limit = used + room * FDS_PER_CONNECTION + 1
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))

        served = [opened_echo(client, server) for _ in range(room)]
        waiting = [connect(client, server) for _ in range(3)]
        for sock in waiting:
            sock.sendall(OPAQUE + b"late")
        engine.until(lambda: engine.engine.serving() == frozenset())
        for sock in served:
            sock.sendall(b"still here")
            assert read_exactly(sock, 10) == b"still here"
            sock.close()
        for sock in waiting:
            with sock:
                assert read_exactly(sock, 5) == OPAQUE + b"late"
        engine.until(lambda: engine.engine.serving() == {inode(client)})
        engine.until_counted(connections_open=0, connections_outbound=room + 3)


def test_slow_clients_and_servers_cost_one_connection_each(pods):
    client, server = pods
    with redirection() as engine, ExitStack() as stack:
        engine.serve(client)
        stopped = threading.Event()
        stack.callback(stopped.set)

        def read_nothing(_sock):
            stopped.wait(DEADLINE_S)

        stack.enter_context(serving(server, read_nothing, port=81))
        stack.enter_context(serving(server, echo))
        for number in range(20):
            slow = stack.enter_context(connect(client, server))
            slow.sendall(make_head()[: 10 + number])
            full = stack.enter_context(connect(client, server, port=81))
            full.setblocking(False)
            fill(full)
        with opened_echo(client, server) as fast:
            for _ in range(50):
                fast.sendall(b"quick")
                assert read_exactly(fast, 5) == b"quick"
        engine.until_counted(connections_open=40)


def test_idle_connections_stay_and_cost_little(pods):
    client, server = pods
    with many_descriptors(), ExitStack() as stack:
        engine = stack.enter_context(redirection())
        engine.serve(client)
        [worker] = engine.engine.pids
        before = resident(worker)
        listener = stack.enter_context(listening_service(server))
        ours = []
        for _ in range(IDLE):
            ours.append(stack.enter_context(connect(client, server)))
            stack.enter_context(listener.accept()[0])
        engine.until_counted(connections_open=IDLE)
        each = (resident(worker) - before) / IDLE
        print(f"{each:.0f} bytes of memory for each of {IDLE} idle connections")

        with opened_echo(client, server, port=81, stack=stack) as busy:
            busy.sendall(b"served")
            assert read_exactly(busy, 6) == b"served"
        # A kilobyte or two of Python; a read buffer for each would be a hundred.
        assert each < 16_000


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_server_that_goes_in_mid_body_is_seen_to_go(pods, how):
    client, server = pods
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500
    with redirection() as engine:
        engine.serve(client)
        with connected(client, server) as (ours, theirs):
            ours.sendall(make_head())
            read_request(theirs)
            theirs.sendall(start)
            assert read_exactly(ours, len(start)) == start
            if how == "end":
                theirs.close()
                assert ours.recv(1) == b""
            else:
                reset(theirs)
                with pytest.raises(ConnectionResetError):
                    ours.recv(1)
        engine.until_counted(connections_open=0)


@contextmanager
def agent(namespace, grace_s):
    """A process with the engine, and its worker's id."""
    command = [sys.executable, "-c", AGENT, str(namespace.path), str(grace_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = None
    try:
        worker = int(process.stdout.readline())
        yield process, worker
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if worker is not None and not ended(worker):
            os.kill(worker, signal.SIGKILL)


def opened_echo(client, server, port=SERVICE_PORT, stack=None):
    """Return a connection on which a byte has come back."""
    if stack is not None:
        stack.enter_context(serving(server, echo, port=port))
    sock = connect(client, server, port=port)
    sock.sendall(OPAQUE)
    assert read_exactly(sock, 1) == OPAQUE
    return sock


@contextmanager
def listening_service(namespace):
    with namespace.inside():
        listener = socket.create_server((namespace.ipv4, SERVICE_PORT), backlog=4096)
    with listener:
        listener.settimeout(DEADLINE_S)
        yield listener


def listens(namespace):
    """Whether anything listens for redirected connections."""
    return ":15001" in namespace.run("ss", "-Hltn").stdout


def ended(pid):
    """Whether a process has, also where nobody waits for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def holds(pid, netns):
    """Whether a process keeps a network namespace by a descriptor."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(fd.readlink()) == f"net:[{netns}]":
                return True
        except FileNotFoundError:
            continue
    return False


def resident(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextmanager
def many_descriptors():
    """As many as two ends of each idle connection need."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = max(before[1], 2 * IDLE + 1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, enough))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def fill(sock):
    """Send until nothing more is taken."""
    try:
        while True:
            sock.send(OPAQUE * (1 << 16))
    except BlockingIOError:
        pass
