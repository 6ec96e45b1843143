"""A client pod and a server pod, redirect rules, and the engine with real workers."""

import ctypes
import os
import platform
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from netns.conftest import Namespace
from netns.http_peer import DEADLINE_S, FAMILIES
from podspan.agent.exchange import Exchange
from podspan.agent.kernel import syscall
from podspan.agent.kernel.handoff import HANDED, HANDED_KEY, ROOT_KEY, TUPLE, Handoff
from podspan.agent.redirect.engine import PodPlan, RedirectEngine, WorkerOptions
from podspan.init.plan import GATE_MARK, GATE_QUEUE

MARK = "0x539"
OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
SERVICE_PORT = 9080
DEFAULTS = WorkerOptions()

# Bytes that are the beginning of no protocol that is known.
OPAQUE = b"\0"

both_families = pytest.mark.parametrize("version", [4, 6])

BPF_MAP_CREATE = 0  # linux/bpf.h, as the next
BPF_MAP_TYPE_LRU_HASH = 9

_libc = ctypes.CDLL(None, use_errno=True)


def address_of(namespace: Namespace, version: int = 4) -> str:
    return namespace.ipv4 if version == 4 else namespace.ipv6


def redirect_outbound(namespace: Namespace, *, gate: bool = True) -> None:
    """What `podspan init apply` does to what a pod opens, but for the guard."""
    for iptables in ("iptables", "ip6tables"):
        for rule in (
            ("-m", "mark", "--mark", MARK, "-j", "RETURN"),
            ("-o", "lo", "-j", "RETURN"),
            *_redirected(OUTBOUND_PORT, gate),
        ):
            namespace.run(iptables, "-t", "nat", "-A", "OUTPUT", *rule)


def redirect_inbound(namespace: Namespace) -> None:
    """The same to what reaches it."""
    for iptables in ("iptables", "ip6tables"):
        for rule in (
            ("-m", "mark", "--mark", MARK, "-j", "RETURN"),
            *_redirected(INBOUND_PORT, gate=True),
        ):
            namespace.run(iptables, "-t", "nat", "-A", "PREROUTING", *rule)


def _redirected(port: int, gate: bool) -> tuple[tuple[str, ...], ...]:
    """A SYN that came through the gate is redirected; others wait there."""
    if not gate:
        return (("-p", "tcp", "-j", "REDIRECT", "--to-ports", str(port)),)
    let_in = ("-p", "tcp", "-m", "mark", "--mark", hex(GATE_MARK))
    return (
        (*let_in, "-j", "REDIRECT", "--to-ports", str(port)),
        (
            "-p",
            "tcp",
            "-j",
            "NFQUEUE",
            "--queue-num",
            str(GATE_QUEUE),
            "--queue-bypass",
        ),
    )


def inode(namespace: Namespace) -> int:
    return namespace.path.stat().st_ino


def plan_of(namespace: Namespace, **fields: Any) -> PodPlan:
    return PodPlan(inode(namespace), namespace.path, **fields)


class Redirection:
    """A running engine, and all that it said."""

    def __init__(
        self,
        *,
        workers: int = 1,
        options: WorkerOptions = DEFAULTS,
        handoff_fds: tuple[int, ...] = (),
    ) -> None:
        self.records: list[Exchange] = []
        self.warnings: list[str] = []
        self.engine = RedirectEngine(
            workers=workers,
            handoff_fds=handoff_fds,
            options=options,
            on_record=self.records.append,
            on_warning=self.warnings.append,
        )

    def serve(self, *pods: Namespace | PodPlan) -> None:
        """Return when workers have confirmed that they serve these and no others."""
        plans = [pod if isinstance(pod, PodPlan) else plan_of(pod) for pod in pods]
        self.engine.serve({plan.netns: plan for plan in plans})
        wanted = {plan.netns for plan in plans}
        self.until(lambda: self.engine.serving() == wanted)

    def until(self, done: Callable[[], bool], what: object = "") -> None:
        wait_until(done, self.engine.poll, lambda: (what, self.engine.counters()))

    def counter(self, name: str) -> int:
        return self.engine.counters().get(f"redirect_{name}", 0)

    def until_counted(self, **counters: int) -> None:
        """Wait for counters, which come a moment after what they count."""
        self.until(
            lambda: all(self.counter(name) == n for name, n in counters.items()),
            counters,
        )


def wait_until(
    done: Callable[[], bool],
    step: Callable[[], None] = lambda: None,
    facts: Callable[[], object] = lambda: "",
) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    step()
    while not done():
        assert time.monotonic() < deadline_s, facts()
        time.sleep(0.005)
        step()


@contextmanager
def redirection(
    *, deaths: int = 0, drain_s: float = 0.0, **options: Any
) -> Iterator[Redirection]:
    """An engine of whose workers so many are meant to die."""
    running = Redirection(**options)
    try:
        yield running
    finally:
        running.engine.close(drain_s)
    assert running.counter("workers_died") == deaths, running.warnings
    assert running.counter("connections_crashed") == 0


@contextmanager
def listening(
    namespace: Namespace, version: int = 4, port: int = SERVICE_PORT
) -> Iterator[socket.socket]:
    with namespace.inside():
        listener = socket.create_server(
            (address_of(namespace, version), port),
            family=FAMILIES[version],
            backlog=4096,
        )
    with listener:
        listener.settimeout(DEADLINE_S)
        yield listener


def connect(
    client: Namespace, server: Namespace, version: int = 4, port: int = SERVICE_PORT
) -> socket.socket:
    with client.inside():
        sock = socket.socket(FAMILIES[version])
    sock.settimeout(DEADLINE_S)
    try:
        sock.connect((address_of(server, version), port))
    except OSError:
        sock.close()
        raise
    return sock


@contextmanager
def connected(
    client: Namespace, server: Namespace, version: int = 4
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from pod to pod: the client's socket and the server's."""
    with (
        listening(server, version) as listener,
        connect(client, server, version) as ours,
    ):
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(DEADLINE_S)
            yield ours, theirs


@contextmanager
def serving(
    namespace: Namespace,
    handler: Callable[[socket.socket], None],
    version: int = 4,
    port: int = SERVICE_PORT,
) -> Iterator[None]:
    """Answer each connection by a thread that runs `handler`."""
    stack = ExitStack()

    def serve(sock: socket.socket) -> None:
        with sock, suppress(OSError):
            sock.settimeout(DEADLINE_S)
            handler(sock)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    with listening(namespace, version, port) as listener, stack:
        listener.settimeout(None)
        thread = threading.Thread(target=accept, args=(listener,))
        thread.start()
        stack.callback(thread.join, DEADLINE_S)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 18):
        sock.sendall(data)


def accepts(address: str, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((address, port)) == 0


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, data
        data += part
    return data


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Maps:
    """The tables of bpf/handoff.h, without the programs that fill them."""

    def __init__(self) -> None:
        self.handed = _create(HANDED_KEY.size, HANDED.size)
        self.claims = _create(TUPLE.size, 1)
        self.roots = _create(ROOT_KEY.size, 1)
        self.fds = (self.handed, self.claims, self.roots)
        self.handoff = Handoff(*self.fds)

    def keys(self, fd: int) -> list[bytes]:
        return [key for key, _ in syscall.map_items(fd)]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def maps() -> Iterator[Maps]:
    made = Maps()
    yield made
    made.close()


def _create(key_size: int, value_size: int) -> int:
    attr = struct.pack("=IIII", BPF_MAP_TYPE_LRU_HASH, key_size, value_size, 1024)
    buffer = ctypes.create_string_buffer(attr, len(attr))
    number = syscall.SYS_BPF[platform.machine()]
    fd = _libc.syscall(number, BPF_MAP_CREATE, ctypes.byref(buffer), len(attr))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)
