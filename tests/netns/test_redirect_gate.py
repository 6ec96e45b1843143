"""SYNs that wait: what the application's connect(2) says, with a worker and without."""

import errno
import select
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, closing, contextmanager

import pytest
from podspan.agent.redirect.gate import QUEUE_PACKETS, Gate, QueueTaken
from podspan.init.plan import AGENT_MARK, GATE_MARK, OUTBOUND_PORT

SO_MARK = 36
PORT = 8080
CLOSED_PORT = 8081
DEADLINE_S = 20

tables = pytest.mark.parametrize("variant", ["nft", "legacy"])
families = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])


@pytest.fixture
def variant(request):
    return getattr(request, "param", "nft")


@pytest.fixture
def family(request):
    return getattr(request, "param", socket.AF_INET)


@pytest.fixture
def pods(two_ns_veth, variant):
    """A client with the gate's rules, and a server that listens and accepts."""
    client, server = two_ns_veth
    for program in (f"iptables-{variant}", f"ip6tables-{variant}"):
        for rule in (
            f"-m mark --mark {AGENT_MARK:#x} -j RETURN",
            f"-p tcp -m mark --mark {GATE_MARK:#x} "
            f"-j REDIRECT --to-ports {OUTBOUND_PORT}",
            f"-p tcp -j NFQUEUE --queue-num {OUTBOUND_PORT} --queue-bypass",
        ):
            client.run(
                program, "-t", "nat", "-A", "OUTPUT", "-o", "eth0", *rule.split()
            )
    for address in ("192.0.2.1", "2001:db8::1"):
        client.run("ip", "route", "add", "unreachable", address)
    return client, server


@pytest.fixture
def serving(pods, family):
    _, server = pods
    with server.inside():
        listener = socket.create_server(
            (address_of(server, family), PORT), family=family
        )
    with closing(listener):
        yield listener.getsockname()[:2]


@contextmanager
def worker(client, family):
    """What a worker does at the gate, one connection after the other."""
    arrived: list[tuple[str, int]] = []
    stop = threading.Event()
    with client.inside():
        gate = Gate.open(OUTBOUND_PORT)
        listener = socket.create_server(
            ("::" if family == socket.AF_INET6 else "0.0.0.0", OUTBOUND_PORT),
            family=family,
        )

    def accept():
        while True:
            try:
                sock, peer = listener.accept()
            except OSError:
                return
            arrived.append(peer[:2])
            sock.close()

    def serve():
        while not stop.wait(0.01):
            for held in gate.receive():
                flow = held.flow
                assert flow is not None
                with client.inside(), socket.socket(family) as upstream:
                    upstream.setsockopt(socket.SOL_SOCKET, SO_MARK, AGENT_MARK)
                    upstream.settimeout(DEADLINE_S)
                    try:
                        upstream.connect((flow.destination, flow.destination_port))
                    except OSError:
                        gate.direct(held)
                        continue
                    gate.redirect(held)

    threads = [threading.Thread(target=each) for each in (accept, serve)]
    for thread in threads:
        thread.start()
    try:
        yield arrived
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join()
        gate.close()


def address_of(namespace, family):
    return namespace.ipv6 if family == socket.AF_INET6 else namespace.ipv4


def connect(client, family, address, port):
    """Return the errno of a connect(2), and the local address."""
    with client.inside():
        sock = socket.socket(family)
    with sock:
        sock.settimeout(DEADLINE_S)
        try:
            sock.connect((address, port))
        except OSError as exc:
            return exc.errno, None
        return 0, sock.getsockname()[:2]


@tables
@families
def test_connect_says_what_it_would_have_said(pods, family, serving):
    client, _ = pods
    unreachable = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"
    with worker(client, family) as arrived:
        connected = connect(client, family, *serving)
        refused = connect(client, family, serving[0], CLOSED_PORT)
        no_route = connect(client, family, unreachable, PORT)

    assert connected[0] == 0
    assert arrived == [connected[1]]
    assert refused == (errno.ECONNREFUSED, None)
    assert no_route == (errno.EHOSTUNREACH, None)


def test_without_a_worker_connections_go_direct(pods, family, serving):
    client, _ = pods
    assert connect(client, family, *serving)[0] == 0
    assert connect(client, family, serving[0], CLOSED_PORT)[0] == errno.ECONNREFUSED


def test_what_a_killed_worker_held_goes_direct_when_it_is_sent_again(
    pods, family, serving
):
    client, _ = pods
    holder = subprocess.Popen(
        client.command(
            sys.executable,
            "-c",
            "from podspan.agent.redirect.gate import Gate\n"
            f"gate = Gate.open({OUTBOUND_PORT})\n"
            "print('ready', flush=True)\n"
            "import time\n"
            "while not gate.receive(): time.sleep(0.01)\n"
            "print('held', flush=True)\n"
            "time.sleep(60)\n",
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    try:
        assert holder.stdout.readline() == "ready\n"
        with client.inside():
            sock = socket.socket(family)
        with sock:
            sock.setblocking(False)
            assert sock.connect_ex(serving) == errno.EINPROGRESS
            assert holder.stdout.readline() == "held\n"
            holder.kill()
            holder.wait()
            _, writable, _ = select.select([], [sock], [], DEADLINE_S)
            assert writable
            assert sock.getpeername()[:2] == serving
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_what_finds_no_room_in_the_queue_goes_direct(
    pods, family, serving, monkeypatch
):
    client, _ = pods
    monkeypatch.setattr("podspan.agent.redirect.gate.QUEUE_PACKETS", 2)
    assert QUEUE_PACKETS > 2
    with client.inside():
        gate = Gate.open(OUTBOUND_PORT)
    with closing(gate), ExitStack() as stack:
        for _ in range(2):
            with client.inside():
                sock = stack.enter_context(closing(socket.socket(family)))
            sock.setblocking(False)
            assert sock.connect_ex(serving) == errno.EINPROGRESS
        assert connect(client, family, *serving)[0] == 0


def test_one_queue_has_one_holder(one_ns):
    with one_ns.inside(), closing(Gate.open(OUTBOUND_PORT)):
        with pytest.raises(QueueTaken, match="taken") as caught:
            Gate.open(OUTBOUND_PORT)
        assert "nfnetlink_queue" in caught.value.hint
