"""What the guard's policies say, on real connections between two pods with rules."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
from netns.redirect_pods import (
    DEADLINE_S,
    EVERYTHING,
    FAMILIES,
    NEVER_STALE_NS,
    OTHER_PORT,
    SERVICE_PORT,
    Pods,
    init_apply,
    inode,
    podspan,
)
from podspan.agent.kernel import program
from podspan.agent.kernel.guard import PROGRAM, Guard, Want
from podspan.init.plan import INBOUND_PORT, OUTBOUND_PORT

ALL_OUT = Want(inbound=False, port=None)
ALL_IN = Want(inbound=True, port=None)

CLIENTS_LISTENER = ("client", OUTBOUND_PORT)
SERVERS_LISTENER = ("server", INBOUND_PORT)
SERVICE = ("server", SERVICE_PORT)
OTHER_SERVICE = ("server", OTHER_PORT)

IPOPT_NOP = b"\1"
# RFC 8200, 4.6: the next header is filled in, no more than 8 bytes, PadN of six.
DESTINATION_OPTIONS = b"\0\0\1\4\0\0\0\0"
IPV6_DSTOPTS = 59

GRACE_NS = 1_000_000_000
ANSWERS = ("agent", "service")
LOAD_THREADS = 4
PAUSE_S = 0.001  # so that a namespace's 28,000 ports last


@pytest.fixture(scope="module")
def pinned_guard(bpffs):
    guard = Guard.open(bpffs / "policy", grace_ns=NEVER_STALE_NS)
    yield guard
    guard.close()
    guard.unpin()


@pytest.fixture
def guard(pinned_guard, pods):
    """A guard with a fresh heartbeat, asked by rules in both pods; wants nothing."""
    for pod in (pods.client, pods.server):
        init_apply(pod, pinned_guard)
    pinned_guard.beat(time.monotonic_ns())
    yield pinned_guard
    for pod in (pods.client, pods.server):
        pinned_guard.forget(inode(pod))


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def version(request):
    return request.param


@pytest.fixture
def pods(version, two_ns_veth):
    with Pods(version, *two_ns_veth) as pods:
        yield pods


def test_a_fresh_heartbeat_alone_redirects_nothing(pods, guard):
    assert pods.connect()[0] == SERVICE


def test_each_direction_has_its_own_policy(pods, guard):
    client, server = inode(pods.client), inode(pods.server)
    guard.want(client, [ALL_IN])
    guard.want(server, [ALL_OUT])
    assert pods.connect()[0] == SERVICE

    guard.want(server, [ALL_IN])
    assert pods.connect()[0] == SERVERS_LISTENER

    guard.want(client, [ALL_OUT])
    assert pods.connect()[0] == CLIENTS_LISTENER


def test_each_pod_has_its_own_policy(pods, guard):
    guard.want(inode(pods.client), [ALL_OUT])

    assert pods.connect(pods.client)[0] == CLIENTS_LISTENER
    assert pods.connect(pods.server, pods.client_address)[0] == ("client", SERVICE_PORT)

    guard.want(inode(pods.server), [ALL_OUT])
    guard.forget(inode(pods.client))

    assert pods.connect(pods.client)[0] == SERVICE
    back, _ = pods.connect(pods.server, pods.client_address)
    assert back == ("server", OUTBOUND_PORT)


@pytest.mark.parametrize("inbound", [False, True], ids=["outbound", "inbound"])
def test_each_port_has_its_own_policy(pods, guard, inbound):
    pod, listener = (
        (pods.server, SERVERS_LISTENER) if inbound else (pods.client, CLIENTS_LISTENER)
    )

    guard.want(inode(pod), [Want(inbound, SERVICE_PORT)])
    assert pods.connect(port=SERVICE_PORT)[0] == listener
    assert pods.connect(port=OTHER_PORT)[0] == OTHER_SERVICE

    guard.want(inode(pod), [Want(inbound, OTHER_PORT)])
    assert pods.connect(port=SERVICE_PORT)[0] == SERVICE
    assert pods.connect(port=OTHER_PORT)[0] == listener

    guard.want(inode(pod), [Want(inbound, None)])
    assert pods.connect(port=SERVICE_PORT)[0] == listener
    assert pods.connect(port=OTHER_PORT)[0] == listener


def test_a_port_whose_bytes_are_another_ones_swapped_is_not_redirected(pods, guard):
    swapped = int.from_bytes(SERVICE_PORT.to_bytes(2, "big"), "little")
    guard.want(inode(pods.client), [Want(False, swapped)])

    assert pods.connect()[0] == SERVICE


@pytest.mark.parametrize("version", [4], indirect=True)
def test_the_port_is_found_behind_ip_options(pods, guard):
    guard.want(inode(pods.client), [Want(False, SERVICE_PORT)])
    options = (socket.IPPROTO_IP, socket.IP_OPTIONS, IPOPT_NOP * 8)

    assert pods.connect(option=options)[0] == CLIENTS_LISTENER
    assert pods.connect(option=options, port=OTHER_PORT)[0] == OTHER_SERVICE


@pytest.mark.parametrize("version", [6], indirect=True)
def test_extension_headers_are_not_redirected(pods, guard):
    for pod in (pods.client, pods.server):
        guard.want(inode(pod), EVERYTHING)
    options = (socket.IPPROTO_IPV6, IPV6_DSTOPTS, DESTINATION_OPTIONS)

    assert pods.connect(option=options)[0] == SERVICE
    assert pods.connect()[0] == CLIENTS_LISTENER


def test_what_a_dead_agent_wanted_does_not_come_alive_with_the_next(pods, guard):
    guard.want(inode(pods.client), [ALL_OUT])
    assert pods.connect()[0] == CLIENTS_LISTENER

    successor = Guard.open(guard.path.parent, grace_ns=NEVER_STALE_NS)
    successor.beat(time.monotonic_ns())
    assert pods.connect()[0] == SERVICE

    successor.want(inode(pods.client), [ALL_OUT])
    assert pods.connect()[0] == CLIENTS_LISTENER
    successor.forget(inode(pods.client))
    successor.close()


def test_rules_with_an_older_program_stop_when_it_is_replaced(
    pods, pin_dir, monkeypatch
):
    with monkeypatch.context() as older:
        source = program.read_source("redirect_guard.c")
        assert "return 1;" in source
        text = source.replace("return 1;", "return 2;")
        older.setattr(program, "read_source", lambda _: text)
        old = Guard.open(pin_dir, grace_ns=NEVER_STALE_NS)
    init_apply(pods.client, old)
    old.want(inode(pods.client), [ALL_OUT])
    old.beat(time.monotonic_ns())
    assert pods.connect()[0] == CLIENTS_LISTENER
    old.close()

    new = Guard.open(pin_dir, grace_ns=NEVER_STALE_NS)
    new.want(inode(pods.client), [ALL_OUT])
    new.beat(time.monotonic_ns())
    assert pods.connect()[0] == SERVICE

    init_apply(pods.client, new)
    assert pods.connect()[0] == CLIENTS_LISTENER
    new.close()


def test_without_a_guard_no_policy_is_asked_and_no_heartbeat(pods, guard):
    guard.beat(1)
    podspan(pods.client, "init", "apply", "--guard", "none")

    assert pods.connect()[0] == CLIENTS_LISTENER


AGENT = """
import sys
import threading
import time
from pathlib import Path
from podspan.agent.kernel.guard import Guard, Want

pin_dir, grace_ns, netns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
guard = Guard.open(pin_dir, grace_ns=grace_ns)
guard.want(netns, [Want(inbound=False, port=None)])
guard.beat(time.monotonic_ns())
print("redirecting", flush=True)
while True:
    threading.Event().wait(grace_ns / 1e9 / 8)
    guard.beat(time.monotonic_ns())
"""


@pytest.mark.parametrize("listener_dies", [False, True], ids=["stays", "dies"])
def test_an_agent_killed_under_load_costs_no_connection_after_the_grace(
    two_ns_veth, pin_dir, version, listener_dies
):
    client, server = two_ns_veth
    address = server.ipv4 if version == 4 else server.ipv6
    with ExitStack() as stack:
        with client.inside():
            ours = stack.enter_context(new_listener(version, OUTBOUND_PORT))
        with server.inside():
            service = stack.enter_context(new_listener(version, SERVICE_PORT))
        stack.enter_context(answering(service, b"service"))
        agent = stack.enter_context(running_agent(pin_dir, inode(client)))
        argv = ("--guard", str(pin_dir / PROGRAM), "--gate", "off")
        podspan(client, "init", "apply", *argv)
        ends = stack.enter_context(ExitStack())
        ends.enter_context(answering(ours, b"agent"))
        load = stack.enter_context(Load(client, version, (address, SERVICE_PORT)))
        load.wait_for(lambda _, outcome: outcome == "agent", 50)

        agent.send_signal(signal.SIGKILL)
        agent.wait()
        killed_ns = time.monotonic_ns()
        if listener_dies:
            ends.close()
        gone_ns = killed_ns + GRACE_NS
        load.wait_for(lambda begun_ns, _: begun_ns > gone_ns, 50)

    after = {outcome for begun_ns, outcome in load.outcomes() if begun_ns > gone_ns}
    failures = load.failures()
    print(
        f"of {len(load.outcomes())} connections failed {failures.total()}: {failures}"
    )
    assert after == {"service"}
    if not listener_dies:
        assert not failures


def new_listener(version, port):
    listener = socket.socket(FAMILIES[version], socket.SOCK_STREAM)
    listener.bind(("", port))
    listener.listen(128)
    return listener


@contextmanager
def running_agent(pin_dir, netns):
    """A process whose guard redirects what the namespace opens."""
    argv = [sys.executable, "-c", AGENT, pin_dir, str(GRACE_NS), str(netns)]
    agent = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"redirecting\n"
        yield agent
    finally:
        agent.kill()
        agent.communicate()


@contextmanager
def answering(listener, name):
    """Tell everybody who connects by whom they are served; closed in the end."""

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # it is shut down
                return
            with connection:
                connection.sendall(name)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


class Load:
    """Short connections from a namespace, one after the other in each of some threads.

    An outcome is when the connection was begun, of CLOCK_MONOTONIC, and who answered or
    the error's name.
    """

    def __init__(self, namespace, version, address):
        self._namespace = namespace
        self._version = version
        self._address = address
        self._outcomes = []
        self._changed = threading.Condition()
        self._ends = threading.Event()
        self._threads = [
            threading.Thread(target=self._run) for _ in range(LOAD_THREADS)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info):
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, condition, count):
        """Wait until so many outcomes fulfil a condition."""
        deadline_s = time.monotonic() + DEADLINE_S
        seen = found = 0
        while found < count:
            with self._changed:
                while len(self._outcomes) == seen:
                    assert self._changed.wait(deadline_s - time.monotonic())
                new = self._outcomes[seen:]
            seen += len(new)
            found += sum(condition(*outcome) for outcome in new)
            assert time.monotonic() < deadline_s, self.failures()

    def outcomes(self):
        with self._changed:
            return list(self._outcomes)

    def failures(self):
        """Count the connections that nobody answered, by what happened to them."""
        return Counter(
            outcome for _, outcome in self.outcomes() if outcome not in ANSWERS
        )

    def _run(self):
        with self._namespace.inside():
            while not self._ends.wait(PAUSE_S):
                begun_ns = time.monotonic_ns()
                outcome = self._connect()
                with self._changed:
                    self._outcomes.append((begun_ns, outcome))
                    self._changed.notify()

    def _connect(self):
        with socket.socket(FAMILIES[self._version], socket.SOCK_STREAM) as client:
            client.settimeout(DEADLINE_S)
            try:
                client.connect(self._address)
                return client.recv(16).decode() or "nothing"
            except OSError as exc:
                return type(exc).__name__
