"""A client pod whose requests get headers from the kernel, and a server pod.

This kernel has no kprobes and fails the agent's self-test (FIONREAD), so bpf/ is
loaded without the agent: requests are injected, responses are not seen. So records come
when the connection closes, and no connection takes more than 17 requests.
"""

import os
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from netns.conftest import IFA_F_NODAD, Namespace, new_namespaces
from netns.http_peer import DEADLINE_S, FAMILIES, read_all
from podspan.agent.exchange import Exchange
from podspan.agent.kernel.options import POLICY_ENROL, POLICY_TRACE, Options
from podspan.agent.kernel.tracer import Programs
from pyroute2 import NetNS

MAX_CONNECTIONS = 4096
DEFAULTS = Options()
DEADLINE = struct.pack("ll", DEADLINE_S, 0)  # struct timeval
KERNEL_TROUBLE = re.compile(r"WARNING: |BUG: |Oops|refcount_t|general protection")


class Injection:
    """Connections from the client's pod to the server's; what the kernel says."""

    def __init__(
        self, client: Namespace, server: Namespace, options: Options = DEFAULTS
    ) -> None:
        self.options = options
        self.client = client
        self.server = server
        self._stack = ExitStack()
        self._listeners: dict[tuple[str, int, int], socket.socket] = {}
        self._taken: list[Exchange] = []

    def __enter__(self):
        with self._stack as stack:
            self.programs = Programs(MAX_CONNECTIONS, self.options)
            stack.callback(self.programs.close)
            self._ring = self.programs.bpf[b"exchanges"]
            self._ring.open_ring_buffer(self._take)
            self.programs.attach_requests()
            self.sample(None)
            self._losses_before = self.programs.losses()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def sample(self, percent):
        """Let the client's pod have a rate of its own; None: that of the options."""
        inode = self.client.path.stat().st_ino
        self.programs.set_policy(inode, POLICY_TRACE | POLICY_ENROL, percent)

    def connect(self, version=4, *, here=None, there=None, sndbuf=0, rcvbuf=0):
        """Return a client's socket and the server's; `here` is the client's pod."""
        here, there = here or self.client, there or self.server
        listener = self._listener(there, version, rcvbuf)
        with here.inside():
            client = socket.socket(FAMILIES[version])
        # Python makes a socket with a time limit non-blocking, which is another test.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, DEADLINE)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sndbuf:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        client.connect(listener.getsockname()[:2])
        server, _ = listener.accept()
        server.settimeout(DEADLINE_S)
        return client, server

    def send(self, *pieces, **where):
        """Send the pieces on a connection of their own; return what arrives."""

        def send_pieces(sock):
            for piece in pieces:
                sock.sendall(piece)

        return self.send_by(send_pieces, small=sum(map(len, pieces)) < 20000, **where)

    def send_by(self, send, *, small=False, **where):
        """Run `send(socket)` on a connection of its own; return what arrives."""
        client, server = self.connect(**where)
        failed = []

        def run():
            with client:
                try:
                    send(client)
                except BaseException as exc:
                    failed.append(exc)

        with server:
            if small:  # the receive buffer takes all
                run()
                received = read_all(server)
            else:
                sender = threading.Thread(target=run)
                sender.start()
                received = read_all(server)
                sender.join(DEADLINE_S)
        if failed:
            raise failed[0]
        return received

    def records(self):
        """Return the exchanges that have finished since the last look."""
        self.programs.bpf.ring_buffer_consume()
        taken, self._taken = self._taken, []
        return taken

    def record(self):
        [record] = self.records()
        return record

    def losses(self):
        """Return what was lost since the last look, by reason."""
        before, self._losses_before = self._losses_before, self.programs.losses()
        return {
            reason: count - before[reason]
            for reason, count in self._losses_before.items()
            if count != before[reason]
        }

    def _take(self, _context, data, _size):
        self._taken.append(Exchange.from_kernel(self._ring.event(data)))
        return 0

    def _listener(self, namespace, version, rcvbuf):
        key = (namespace.name, version, rcvbuf)
        if key not in self._listeners:
            address = namespace.ipv4 if version == 4 else namespace.ipv6
            with namespace.inside():
                listener = socket.create_server(
                    (address, 0), family=FAMILIES[version], backlog=512
                )
            if rcvbuf:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            listener.settimeout(DEADLINE_S)
            self._listeners[key] = self._stack.enter_context(listener)
        return self._listeners[key]


@contextmanager
def two_pods() -> Iterator[tuple[Namespace, Namespace]]:
    """As `two_ns_veth`, for longer than one test."""
    addresses = [("10.78.0.1", "fd78::1"), ("10.78.0.2", "fd78::2")]
    with new_namespaces(addresses) as [client, server]:
        with NetNS(client.name) as inside:
            peer = {"ifname": "eth0", "net_ns_fd": server.name}
            inside.link("add", ifname="eth0", kind="veth", peer=peer)
        for pod in (client, server):
            with NetNS(pod.name) as inside:
                [link] = inside.link_lookup(ifname="eth0")
                inside.addr("add", index=link, address=pod.ipv4, prefixlen=24)
                inside.addr(
                    *("add",),
                    index=link,
                    address=pod.ipv6,
                    prefixlen=64,
                    flags=IFA_F_NODAD,
                )
                inside.link("set", index=link, state="up")
        yield client, server


@pytest.fixture(scope="module")
def shared_injection() -> Iterator[Injection]:
    """Loading takes three seconds, so all tests of the module share it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with two_pods() as pods, Injection(*pods) as injection:
        yield injection


@pytest.fixture
def injection(shared_injection: Injection) -> Iterator[Injection]:
    """Nothing left over from the test before."""
    shared_injection.records()
    shared_injection.losses()
    yield shared_injection
    # Whatever a test did, these never happen.
    left = shared_injection.programs.losses()
    assert not left["inject_memory"]
    assert not left["inject_dropped"]
    assert not left["enrol_failed"]


def kernel_trouble() -> list[str]:
    """Return the warnings and worse in the kernel's log."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True)
    return [line for line in log.stdout.splitlines() if KERNEL_TROUBLE.search(line)]


@pytest.fixture(scope="module", autouse=True)
def kernel_stays_calm() -> Iterator[None]:
    """No warning of the kernel's while the module's tests run."""
    before = kernel_trouble()
    yield
    new = [line for line in kernel_trouble() if line not in before]
    assert not new, "\n".join(new)
