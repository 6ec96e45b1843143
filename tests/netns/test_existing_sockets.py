"""Connections that were there first: found, told apart, and put into a sockhash.

The sk_msg program counts; what it counts has passed it.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from netns import injection_fixtures
from netns.conftest import Namespace
from netns.http_peer import DEADLINE_S, FAMILIES
from podspan.agent.kernel import program
from podspan.agent.kernel.enrol import enrol_existing
from podspan.agent.kernel.pidfd import borrowed
from podspan.agent.pods import processes
from podspan.agent.pods.sockets import find_connections

kernel_stays_calm = injection_fixtures.kernel_stays_calm

IPPROTO_MPTCP = 262  # linux/in.h; Python has it where its libc does
BPF_SK_MSG_VERDICT = 7

# A message is known by its sender's port: a cookie cannot be had in sk_msg.
COUNTER = b"""
BPF_SOCKHASH(enrolled, u64, 1024);
BPF_SOCKHASH(full, u64, 1);
BPF_HASH(messages, u32, u64);

int count(struct sk_msg_md *msg)
{
	u32 port = msg->local_port;

	messages.increment(port);
	return SK_PASS;
}
"""

# Does as it is told, a line at a time, and answers with a line.
APPLICATION = """
import os, socket, sys
held, listeners = {}, []

def hold(sock):
    held[sock.getsockname()[1]] = sock
    return sock.getsockname()[1]

def connect(family, protocol, address, port):
    sock = socket.socket(int(family), socket.SOCK_STREAM, int(protocol))
    sock.connect((address, int(port)))
    return hold(sock)

def serve_itself(family, address):
    listener = socket.create_server((address, 0), family=int(family))
    listeners.append(listener)
    client = socket.create_connection(listener.getsockname()[:2])
    listeners.append(listener.accept()[0])
    return hold(client)

def send(port):
    held[int(port)].sendall(b"hello")

def close(port):
    held.pop(int(port)).close()

def replace(port, other):
    os.dup2(held[int(other)].fileno(), held[int(port)].fileno())

for line in sys.stdin:
    name, *arguments = line.split()
    print(globals()[name](*arguments), flush=True)
"""


class Counter:
    """A sockhash, and how many messages passed its program by local port."""

    def __init__(self):
        from bcc import BPF

        os.environ["BCC_KERNEL_SOURCE"] = str(program.SOURCES / "headers")
        self.bpf = BPF(
            text=COUNTER,
            cflags=[
                f"-DPAGE_SIZE={os.sysconf('SC_PAGE_SIZE')}",
                f"-DPODSPAN_KERNEL_VERSION={program.kernel_version()}",
                "-Wno-unused-function",
            ],
        )
        self.map_fd = program.map_fd(self.bpf, "enrolled")
        function = self.bpf.load_func(b"count", BPF.SK_MSG)
        self.bpf.attach_func(function, self.map_fd, BPF_SK_MSG_VERDICT)

    def messages(self, port):
        table = self.bpf[b"messages"]
        key = table.Key(port)
        return table[key].value if key in table else 0


class Application:
    """A process in a namespace that holds connections."""

    def __init__(self, namespace: Namespace):
        self.process: Any = subprocess.Popen(
            namespace.command(sys.executable, "-c", APPLICATION),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self):
        return self.process.pid  # nsenter becomes the program

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, f"{words}: the application ended"
        return None if answer == "None" else int(answer)

    def connect(self, listener, protocol=socket.IPPROTO_TCP):
        return self.tell(
            *("connect", int(listener.family), int(protocol)),
            *listener.getsockname()[:2],
        )

    def end(self):
        self.process.stdin.close()
        self.process.wait(DEADLINE_S)
        self.process.stdout.close()


@contextmanager
def application(namespace):
    started = Application(namespace)
    try:
        yield started
    finally:
        if not started.process.stdin.closed:
            started.end()


@pytest.fixture(scope="module")
def shared_counter():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    counter = Counter()
    yield counter
    counter.bpf.cleanup()


@pytest.fixture
def counter(shared_counter):
    shared_counter.bpf[b"messages"].clear()
    return shared_counter


@pytest.fixture
def pods(two_ns_veth):
    return two_ns_veth


@pytest.fixture
def client(pods):
    with application(pods[0]) as started:
        yield started


@pytest.fixture
def listen(pods):
    """Listen in the second pod; its connections are held by this process."""
    with ExitStack() as stack:

        def listen(version=4, protocol=socket.IPPROTO_TCP):
            server = pods[1]
            with server.inside():
                listener = socket.socket(
                    FAMILIES[version], socket.SOCK_STREAM, protocol
                )
            stack.enter_context(listener)
            listener.bind((server.ipv4 if version == 4 else server.ipv6, 0))
            listener.listen()
            listener.settimeout(DEADLINE_S)
            return listener

        yield listen


def accept(listener):
    accepted, _ = listener.accept()
    accepted.settimeout(DEADLINE_S)
    return accepted


def find(*namespaces):
    return find_connections(frozenset(inode(one) for one in namespaces))


def inode(namespace):
    return namespace.path.stat().st_ino


def receive(sock, count):
    return sock.recv(count, socket.MSG_WAITALL)


@pytest.mark.parametrize("version", [4, 6])
def test_what_a_client_sends_after_it_was_enrolled_passes_the_program(
    counter, pods, client, listen, version
):
    listener = listen(version)
    port = client.connect(listener)
    with accept(listener) as server:
        client.tell("send", port)
        assert counter.messages(port) == 0

        done = enrol_existing(counter.map_fd, find(pods[0]))

        assert str(done) == "seen=1 enrolled=1"
        for _ in range(3):
            client.tell("send", port)
        assert receive(server, 20) == b"hello" * 4
        assert counter.messages(port) == 3


def test_a_connection_is_told_with_its_ends_and_its_holder(pods, client, listen):
    listener = listen()
    port = client.connect(listener)
    with accept(listener):
        [connection] = find(pods[0])
    assert connection.netns == inode(pods[0])
    end = connection.end
    assert (str(end.local), end.local_port) == (pods[0].ipv4, port)
    assert (str(end.peer), end.peer_port) == (pods[1].ipv4, listener.getsockname()[1])
    assert [holder.pid for holder in connection.holders] == [client.pid]
    assert connection.unfit is None


def test_the_application_closes_as_if_nothing_had_been_there(
    counter, pods, client, listen
):
    listener = listen()
    port = client.connect(listener)
    with accept(listener) as server:
        enrol_existing(counter.map_fd, find(pods[0]))
        client.tell("close", port)
        assert server.recv(1) == b""


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0"),
        (socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::"),
    ],
)
def test_within_a_pod_only_the_end_that_opened_is_enrolled(
    counter, one_ns, family, address
):
    with application(one_ns) as both:
        port = both.tell("serve_itself", int(family), address)
        done = enrol_existing(counter.map_fd, find(one_ns))
        assert str(done) == "seen=2 enrolled=1 accepted=1"
        both.tell("send", port)
        assert counter.messages(port) == 1


def test_ipv4_accepted_by_an_ipv6_listener_is_accepted(pods, client):
    with pods[1].inside():
        listener = socket.create_server(
            ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
        )
    with listener:
        listener.settimeout(DEADLINE_S)
        address = pods[1].ipv4, listener.getsockname()[1]
        client.tell("connect", int(socket.AF_INET), 0, *address)
        with accept(listener):
            [connection] = find(pods[1])
    assert connection.end.local.version == 4
    assert connection.unfit == "accepted"


def test_a_socket_of_two_processes_is_enrolled_once(counter, pods, client, listen):
    listener = listen()
    port = client.connect(listener)
    with accept(listener) as server, sharing(client, pods[0]):
        [connection] = find(pods[0])
        assert len(connection.holders) == 2
        assert str(enrol_existing(counter.map_fd, [connection])) == "seen=1 enrolled=1"
        client.tell("send", port)
        assert receive(server, 5) == b"hello"
        assert counter.messages(port) == 1


def test_the_second_holder_serves_where_the_first_has_ended(
    counter, pods, client, listen
):
    listener = listen()
    client.connect(listener)
    with accept(listener), sharing(client, pods[0]) as other:
        [connection] = find(pods[0])
        client.end()
        assert {holder.pid for holder in connection.holders} == {client.pid, other}
        assert str(enrol_existing(counter.map_fd, [connection])) == "seen=1 enrolled=1"


def test_a_process_that_ends_meanwhile_is_no_error(counter, pods, client, listen):
    listener = listen()
    client.connect(listener)
    with accept(listener):
        found = find(pods[0])
        client.end()
        assert str(enrol_existing(counter.map_fd, found)) == "seen=1 enrolled=0 gone=1"


def test_a_descriptor_that_is_another_socket_meanwhile_is_not_enrolled(
    counter, pods, client, listen
):
    listener = listen()
    first, second = client.connect(listener), client.connect(listener)
    with accept(listener), accept(listener):
        found = [one for one in find(pods[0]) if one.end.local_port == first]
        client.tell("replace", first, second)
        assert str(enrol_existing(counter.map_fd, found)) == "seen=1 enrolled=0 gone=1"
        client.tell("send", second)
        assert counter.messages(second) == 0


def test_a_connection_that_is_not_established_any_more_is_gone(
    counter, pods, client, listen
):
    listener = listen()
    client.connect(listener)
    server = accept(listener)
    found = find(pods[0])
    server.close()
    wait_for(lambda: not find(pods[0]))
    assert str(enrol_existing(counter.map_fd, found)) == "seen=1 enrolled=0 gone=1"


def test_what_is_enrolled_already_is_left_as_it_is(counter, pods, client, listen):
    listener = listen()
    port = client.connect(listener)
    with accept(listener) as server:
        enrol_existing(counter.map_fd, find(pods[0]))
        again = enrol_existing(counter.map_fd, find(pods[0]))
        assert str(again) == "seen=1 enrolled=0 in_a_sockhash=1"
        client.tell("send", port)
        assert receive(server, 5) == b"hello"
        assert counter.messages(port) == 1


def test_a_full_sockhash_is_counted(counter, pods, client, listen):
    listener = listen()
    for _ in range(3):
        client.connect(listener)
    full = program.map_fd(counter.bpf, "full")
    with accept(listener), accept(listener), accept(listener):
        done = enrol_existing(full, find(pods[0]))
    assert str(done) == "seen=3 enrolled=1 sockhash_full=2"


def test_mptcp_is_never_enrolled(counter, pods, client, listen):
    listener = listen(protocol=IPPROTO_MPTCP)
    client.connect(listener, IPPROTO_MPTCP)
    with accept(listener):
        done = enrol_existing(counter.map_fd, find(*pods))
    assert str(done) == "seen=2 enrolled=0 accepted=1 mptcp=1"


def test_a_socket_held_only_by_another_pod_is_counted(counter, pods, listen):
    listener = listen()
    with pods[0].inside():
        held_here = socket.socket()
    with held_here:
        held_here.connect(listener.getsockname())
        with accept(listener):
            done = enrol_existing(counter.map_fd, find(pods[0]))
    assert str(done) == "seen=1 enrolled=0 no_holder_found=1"


def test_all_namespaces_are_looked_at_but_our_own(pods, client, listen):
    listener = listen()
    client.connect(listener)
    with (
        accept(listener),
        socket.create_server(("127.0.0.1", 0)) as ours,
        socket.create_connection(ours.getsockname()),
    ):
        found = {connection.netns for connection in find_connections(None)}
    assert {inode(pod) for pod in pods} <= found
    assert processes.own_netns() not in found


@contextmanager
def sharing(client, namespace):
    """Run another process that holds the client's only connection; yield its id."""
    [connection] = find(namespace)
    [holder] = connection.holders
    with borrowed(*holder) as duplicate:
        other: Any = subprocess.Popen(
            namespace.command("cat"), stdin=subprocess.PIPE, pass_fds=[duplicate]
        )
    try:
        wait_for(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "cat\n")
        yield other.pid
    finally:
        other.stdin.close()
        other.wait(DEADLINE_S)


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
