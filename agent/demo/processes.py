"""Start a command inside a namespace, and end it for certain."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType, TracebackType
from typing import IO, Any, BinaryIO

from podspan.agent.demo.bookinfo import CLIENT, SERVICES, Service
from podspan.agent.demo.topology import CLONE_NEWNET, Pod, Topology
from podspan.agent.errors import PodspanError

PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Between the request to stop and the kill: an agent detaches its programs meanwhile.
STOP_S = 20

_libc = ctypes.CDLL(None, use_errno=True)


class ProcessError(PodspanError):
    """A process of the demo ended, or did not do what it was started for."""


# What ends the demo.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(
    stack: ExitStack, name: str, command: Sequence[str], *, pod: Pod | None = None
) -> Child:
    """Start a process that ends with the stack, or when this process dies."""
    # A signal between the start and the entry on the stack would orphan the child.
    with _signals_deferred():
        return stack.enter_context(Child(name, command, pod))


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Deliver the signals that end the demo afterwards.

    Not by a mask: a thread that is just ending may have none and take the signal.
    """
    pending: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: pending.append(number))
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for deferred in pending:
            signal.raise_signal(deferred)


class Child:
    """A process that `start` started.

    What it says on stdout is read here, what it says on stderr is kept to be told if
    it fails. It is in a process group of its own: Ctrl-C reaches this process
    only, which then ends its children in order.
    """

    def __init__(self, name: str, command: Sequence[str], pod: Pod | None) -> None:
        self.name = name
        # A file, because a full pipe would stop a process whose stderr nobody reads.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        try:
            self._process = _spawn(command, self._stderr, pod)
        except (OSError, subprocess.SubprocessError) as exc:
            self._stderr.close()
            raise ProcessError(f"{name} cannot be started: {exc}") from exc

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if self._process.stdout:
            self._process.stdout.close()
        self._stderr.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

    def wait_for(self, line: str, timeout_s: float) -> None:
        """Wait until the process says this first line."""
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 (opened above)
        said = b""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in said:
            left_s = max(0.0, deadline_s - time.monotonic())
            readable, _, _ = select.select([stdout], [], [], left_s)
            if not readable:
                raise self.failure(f"was not {line} within {timeout_s:.0f} s")
            piece = os.read(stdout.fileno(), 4096)
            if not piece:
                self._process.wait()
                raise self.failure("ended before it was " + line)
            said += piece
        if said.decode().partition("\n")[0] != line:
            raise self.failure(f"said {said!r} instead of {line!r}")

    def output(self, timeout_s: float) -> str:
        """Wait for the end of the process, return what it said; it must exit 0."""
        try:
            stdout, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {timeout_s:.0f} s") from None
        if self._process.returncode:
            raise self.failure("failed")
        return str(stdout, "utf-8", "replace")

    def errors(self) -> str:
        """Return what the process wrote on stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read().decode("utf-8", "replace").strip()

    def failure(self, what: str) -> ProcessError:
        """Return the error that says so, with how it ended and its own last words."""
        code = self._process.poll()
        ending = "" if code is None else f" (exit code {code})"
        return ProcessError(f"{self.name} {what}{ending}", self.errors())

    def stop(self) -> int:
        """Ask the process to stop, kill it if it does not; return its exit code."""
        if not self.ended:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()


def _spawn(
    command: Sequence[str], stderr: IO[bytes], pod: Pod | None
) -> subprocess.Popen[bytes]:
    with ExitStack() as stack:
        namespace = stack.enter_context(pod.path.open("rb")) if pod else None
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            process_group=0,
            # Safe: no other thread of ours runs while children are started.
            preexec_fn=_prologue(namespace),  # noqa: PLW1509
        )


def _prologue(namespace: BinaryIO | None) -> Callable[[], None]:
    """Return what the child does between fork and exec."""
    parent = os.getpid()

    def run() -> None:
        if namespace and _libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        # SIGTERM, so that also an orphaned agent detaches its programs.
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return run


# What runs in a pod.
SERVICE_MODULE = "podspan.agent.demo.services"

# In an emulated machine, a Python process takes seconds to start.
START_S = 120
CALL_S = 120


def start_services(
    stack: ExitStack, pods: Topology, *, ipv6: bool = False
) -> list[Child]:
    """Start all services, return when all listen; they end with the stack."""
    children = [
        _start_python(stack, service, pods, ipv6=ipv6) for service in SERVICES.values()
    ]
    for child in children:
        child.wait_for("ready", START_S)
    return children


def call_page(
    stack: ExitStack,
    pods: Topology,
    *,
    ipv6: bool = False,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Let the client call productpage, by default without any context."""
    extra = [f"{name}={value}" for name, value in headers.items()]
    client = _start_python(stack, CLIENT, pods, *extra, ipv6=ipv6)
    return json.loads(client.output(CALL_S))


def _start_python(
    stack: ExitStack, service: Service, pods: Topology, *extra: str, ipv6: bool
) -> Child:
    addresses = [
        f"{callee}={pods[callee].address(ipv6=ipv6)}" for callee in service.calls
    ]
    command = [sys.executable, "-m", SERVICE_MODULE, service.name, *addresses, *extra]
    return start(stack, service.name, command, pod=pods[service.name])
