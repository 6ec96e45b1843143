"""One agent and three pods for all tests of this folder, which needs kprobes.

    client 10.98.0.1 -- 10.98.0.2 front 10.98.1.1 -- 10.98.1.2 back

Spans come as the agent writes them: Zipkin JSON lines. A test names its calls in the
path, and closes with a marker call: when that one's spans are there, all are.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

KPROBES = Path("/sys/bus/event_source/devices/kprobe/type")
CLONE_NEWNET = 0x40000000
START_S = 300.0  # compiling is what emulation is slowest at
DEADLINE_S = 60.0  # emulation is slow; nothing waits that long but a failure

_libc = ctypes.CDLL(None, use_errno=True)
_serial = count(1)

Json = dict[str, Any]  # a span as Zipkin's API has it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if KPROBES.exists() and os.geteuid() == 0:
        return
    reason = "needs root and a kernel with kprobes: make test-vm"
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Pod:
    """A network namespace."""

    name: str
    ipv4: str
    ipv6: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and those it starts, are in the namespace."""
        with (
            Path("/proc/thread-self/ns/net").open() as home,
            Path("/run/netns", self.name).open() as there,
        ):
            assert _libc.setns(there.fileno(), CLONE_NEWNET) == 0
            try:
                yield
            finally:
                assert _libc.setns(home.fileno(), CLONE_NEWNET) == 0

    def command(self, *argv: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", *argv]


CLIENT = Pod("podspan-vm-client", "10.98.0.1", "fd98::1")
FRONT = Pod("podspan-vm-front", "10.98.0.2", "fd98::2")
BACK = Pod("podspan-vm-back", "10.98.1.2", "fd98:1::2")
PODS = (CLIENT, FRONT, BACK)
# Both ends of a wire: pod, device, addresses.
WIRES = (
    (
        (CLIENT, "to-front", "10.98.0.1/24", "fd98::1/64"),
        (FRONT, "to-client", "10.98.0.2/24", "fd98::2/64"),
    ),
    (
        (FRONT, "to-back", "10.98.1.1/24", "fd98:1::1/64"),
        (BACK, "to-front", "10.98.1.2/24", "fd98:1::2/64"),
    ),
)


def ip(*argv: str) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(argv)}: {done.stderr}"


@pytest.fixture(scope="session")
def pods() -> Iterator[None]:
    try:
        for pod in PODS:
            ip("netns", "add", pod.name)
            ip("-n", pod.name, "link", "set", "lo", "up")
        for wire in WIRES:
            (a, a_dev, *_), (b, b_dev, *_) = wire
            ip("-n", a.name, "link", "add", a_dev, "type", "veth")
            ip("-n", a.name, "link", "set", "veth0", "netns", b.name, "name", b_dev)
            for pod, dev, v4, v6 in wire:
                ip("-n", pod.name, "address", "add", v4, "dev", dev)
                ip("-n", pod.name, "address", "add", v6, "dev", dev, "nodad")
                ip("-n", pod.name, "link", "set", dev, "up")
        yield
    finally:
        for pod in PODS:
            with suppress(AssertionError):
                ip("netns", "delete", pod.name)


@dataclass
class Agent:
    """The real agent, as a process."""

    folder: Path
    process: "subprocess.Popen[str] | None" = None
    taken: int = 0
    spans: list[Json] = field(default_factory=list)

    def start(self, *options: str, engine: str = "kernel") -> None:
        if self.process is not None and self.process.poll() is None:
            return
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        self.output.unlink(missing_ok=True)
        self.taken = 0
        self.spans.clear()
        command = [str(Path(sys.executable).with_name("podspan")), "agent"]
        command += ["--netns", "podspan-vm-*", "--json", str(self.output)]
        command += ["--ready-file", str(ready), *options]
        with (self.folder / "agent.log").open("a") as log:
            self.process = subprocess.Popen(command, stderr=log, text=True)
        wait_for(ready.exists, "the agent is ready", self.process, START_S)
        assert f"attached: engine={engine}" in self.log(), self.log()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(60) == 0, self.log()
            print(self.log())

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> Path:
        return self.folder / "spans.jsonl"

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    def all_spans(self) -> list[Json]:
        """Everything written so far, whole lines only."""
        with self.output.open() as lines:
            lines.seek(self.taken)
            for line in iter(lines.readline, ""):
                if not line.endswith("\n"):
                    break
                self.spans.append(json.loads(line))
                self.taken = lines.tell()
        return self.spans

    def spans_of(self, token: str, server: "Server", pod: Pod = CLIENT) -> list[Json]:
        """Spans of the calls with `token` in their path, once all are there."""
        marker = f"marker-{next(_serial)}"
        fetch(server, f"/{marker}", pod)

        def arrived() -> bool:
            return len(spans_with(self.all_spans(), marker)) == 2

        try:
            wait_for(arrived, f"the spans of {marker}", self.process)
        finally:
            print(self.log())
        return spans_with(self.all_spans(), token)


def spans_with(spans: list[Json], token: str) -> list[Json]:
    return [span for span in spans if token in url_of(span)]


def spans_of_port(agent: Agent, server: "Server") -> list[Json]:
    """Spans of the connections to this server that have arrived so far."""
    ours = {"CLIENT": "remoteEndpoint", "SERVER": "localEndpoint"}
    slack_us = 50_000  # of the agent's reckoning between the kernel's clocks
    return [
        span
        for span in agent.all_spans()
        if span[ours[span["kind"]]]["port"] == server.port
        and span["timestamp"] >= server.since_us - slack_us
    ]


def url_of(span: Json) -> str:
    """By either convention; "" of what is not HTTP."""
    tags = span["tags"]
    return str(tags.get("http.url") or tags.get("url.full") or tags.get("url.path", ""))


def wait_for(
    condition: Callable[[], bool],
    what: str,
    process: "subprocess.Popen[str] | None" = None,
    deadline_s: float = DEADLINE_S,
) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert process is None or process.poll() is None, f"the agent died: {what}"
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def session_agent(
    pods: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    agent = Agent(tmp_path_factory.mktemp("agent"))
    try:
        yield agent
        agent.stop()
    finally:
        if agent.process is not None and agent.process.poll() is None:
            agent.kill()


@pytest.fixture(scope="session", autouse=True)
def quiet_kernel() -> Iterator[None]:
    """The kernel found nothing to complain about while the tests ran."""
    before = kernel_complaints()
    yield
    assert kernel_complaints() == before


def kernel_complaints() -> list[str]:
    done = subprocess.run(["dmesg"], capture_output=True, text=True, check=True)
    bad = ("WARNING:", "BUG:", "Oops", "Call Trace", "refcount_t", "stall")
    return [line for line in done.stdout.splitlines() if any(b in line for b in bad)]


@pytest.fixture
def agent(session_agent: Agent) -> Agent:
    """The one agent; started anew only after a test that killed it."""
    session_agent.start()
    return session_agent


Answer = Callable[["Request"], bytes]


@dataclass(frozen=True)
class Request:
    """What a server received, to the byte."""

    head: bytes
    body: bytes
    sock: socket.socket

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    @property
    def headers(self) -> dict[str, str]:
        return headers_of(self.head)


def headers_of(head: bytes) -> dict[str, str]:
    pairs = (line.partition(": ") for line in head.decode().split("\r\n")[1:] if line)
    return {name.lower(): value for name, _, value in pairs}


@dataclass
class Server:
    """A threaded HTTP/1.1 server that answers as its test says, byte for byte."""

    pod: Pod
    address: str
    port: int
    requests: list[Request] = field(default_factory=list)
    # An earlier test's server may have had the same port.
    since_us: int = field(default_factory=lambda: time.time_ns() // 1000)


def _ok(request: Request) -> bytes:
    body = request.path.encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


@contextmanager
def serving(
    pod: Pod, answer: Answer = _ok, address: str | None = None
) -> Iterator[Server]:
    """Serve in `pod`: a thread per connection, keep-alive, until the block ends."""
    family = socket.AF_INET6 if ":" in (address or "") else socket.AF_INET
    with pod.inside():
        listener = socket.create_server(
            (address or pod.ipv4, 0), family=family, backlog=128
        )
    server = Server(pod, address or pod.ipv4, listener.getsockname()[1])
    open_sockets: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        received = b""
        with sock, suppress(ConnectionError, OSError):
            while True:
                while b"\r\n\r\n" not in received:
                    piece = sock.recv(65536)
                    if not piece:
                        return
                    received += piece
                head, _, received = received.partition(b"\r\n\r\n")
                request = Request(head + b"\r\n\r\n", b"", sock)
                if request.headers.get("expect"):
                    sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                size = int(request.headers.get("content-length", 0))
                while len(received) < size:
                    received += sock.recv(65536)
                request = Request(request.head, received[:size], sock)
                received = received[size:]
                server.requests.append(request)
                sock.sendall(answer(request))
                if b"connection: close" in request.head.lower():
                    return

    def accept() -> None:
        # Threads started here inherit the namespace.
        with pod.inside(), suppress(OSError):
            while True:
                sock, _ = listener.accept()
                open_sockets.append(sock)
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for sock in open_sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def connected(server: Server, pod: Pod = CLIENT) -> Iterator[socket.socket]:
    with pod.inside(), socket.create_connection((server.address, server.port)) as sock:
        sock.settimeout(30)
        yield sock


def head_of(server: Server, path: str, *lines: str, method: str = "GET") -> bytes:
    host = f"[{server.address}]" if ":" in server.address else server.address
    text = [f"{method} {path} HTTP/1.1", f"host: {host}:{server.port}", *lines]
    return ("\r\n".join(text) + "\r\n\r\n").encode()


def read_response(sock: socket.socket, *, bodiless: bool = False) -> bytes:
    """One response with a Content-Length, 1xx skipped; or all there is."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = sock.recv(65536)
        if not piece:
            return received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 1"):
        return body or read_response(sock)
    sizes = [
        int(line[16:])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length: ")
    ]
    bodiless = bodiless or head.startswith(b"HTTP/1.1 204")
    while not bodiless and (not sizes or len(body) < sizes[0]):
        piece = sock.recv(65536)
        if not piece:
            break
        body += piece
    return head + b"\r\n\r\n" + body


def fetch(server: Server, path: str, pod: Pod = CLIENT) -> bytes:
    """One call on a connection of its own."""
    with connected(server, pod) as sock:
        sock.sendall(head_of(server, path))
        return read_response(sock)
