"""The tracer: bpf/tracer.c loaded, tried, attached, and read.

What it attaches belongs to the process: the kernel undoes it when the agent ends, also
by SIGKILL. Connections then go on as plain TCP.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from podspan.agent.errors import FeatureMissing, ProgramRejected
from podspan.agent.exchange import Exchange
from podspan.agent.kernel import grammar, program, selftest, syscall
from podspan.agent.kernel.guard import Guard

if TYPE_CHECKING:
    from bcc import BPF

log = logging.getLogger(__name__)

# 33 tail calls of this many bytes are a head of 16 KB. Each byte costs the verifier
# some thousand instructions of its million.
SCAN_STEP = 576

SETTINGS = {
    "SCAN_STEP": SCAN_STEP,
    "SEGMENTS": 20,  # elements of a writev that one step walks
    "RING_PAGES": 2048,  # 8 MB: 14,000 exchanges between two polls
    "MAX_THREADS": 16384,
}

# Exchanges handed over by one poll: the heartbeat waits no longer than that takes.
POLL_MAX = 8192

POLICY_NONE, POLICY_TRACE, POLICY_ENROL = 0, 1, 2

# Kernel function, our program, whether every kernel has it.
KPROBES = (
    (b"tcp_sendmsg", b"send_entry", True),
    (b"tcp_sendpage", b"sendpage_entry", False),
    (b"tcp_recvmsg", b"receive_entry", True),
    (b"tcp_cleanup_rbuf", b"receive_copied", True),
)

TEMPLATE = (
    (b"x-request-id: " + b"_" * 36 + b"\r\n", 56),
    (b"x-b3-traceid: " + b"_" * 32 + b"\r\n", 48),
    (b"x-b3-spanid: " + b"_" * 16 + b"\r\n", 32),
    (b"x-b3-parentspanid: " + b"_" * 16 + b"\r\n", 40),
    (b"x-b3-sampled: _\r\n", 24),
)

BPF_CGROUP_SOCK_OPS = 3
BPF_SK_MSG_VERDICT = 7


class Programs:
    """bpf/tracer.c in the kernel; attached piece by piece, removed by `close`."""

    def __init__(self, max_connections: int) -> None:
        """Compile, fill the tables, verify. Nothing is attached yet."""
        self._stack = ExitStack()
        settings = {**SETTINGS, "MAX_CONNECTIONS": max_connections}
        self.bpf: BPF = program.load("tracer.c", settings)
        self._stack.callback(self.bpf.cleanup)
        try:
            self._fill_tables()
            self._chain("request_steps", "SK_MSG", ["request_scan", "request_inject"])
            self._chain("bytes_steps", "KPROBE", ["bytes_walk", "bytes_head"])
        except BaseException:
            self.close()
            raise

    def attach_requests(self) -> None:
        """Follow connections, and run request.c on those that are enrolled."""
        cgroup = os.open(cgroup_root(), os.O_RDONLY | os.O_DIRECTORY)
        self._stack.callback(os.close, cgroup)
        message = self._load("request_entry", "SK_MSG")
        enrolled = program.map_fd(self.bpf, "enrolled")
        try:
            self.bpf.attach_func(message, enrolled, BPF_SK_MSG_VERDICT)
            lifecycle = self._load("lifecycle", "SOCK_OPS")
            link = syscall.link_create(lifecycle.fd, cgroup, BPF_CGROUP_SOCK_OPS)
        except Exception as exc:  # bcc has no exception type of its own
            raise ProgramRejected(f"cannot attach request.c: {exc}") from exc
        self._stack.callback(os.close, link)

    def attach_kprobes(self) -> None:
        """See what sockets send and receive."""
        for function, name, everywhere in KPROBES:
            if not everywhere and self.bpf.ksymname(function) < 0:
                continue
            try:
                self.bpf.attach_kprobe(event=function, fn_name=name)
            except Exception as exc:  # bcc has no exception type of its own
                raise ProgramRejected(
                    f"cannot attach {name.decode()} to {function.decode()}: {exc}"
                ) from exc

    def close(self) -> None:
        """Detach and unload all."""
        self._stack.close()

    def set_policy(self, netns: int, policy: int | None) -> None:
        """What is done in the namespace of this inode; None: as in the others."""
        table = self.bpf[b"policies"]
        key = ctypes.c_uint32(netns)
        if policy is None:
            table.pop(key, None)
        else:
            table[key] = ctypes.c_uint8(policy)

    def set_other_policy(self, policy: int) -> None:
        """What is done in the namespaces that `set_policy` does not name."""
        self.bpf[b"other_policy"][ctypes.c_int(0)] = ctypes.c_uint8(policy)

    def losses(self) -> dict[str, int]:
        """Counters of bpf/losses.h, by name in lower case without LOSS_."""
        table = self.bpf[b"losses"]
        return {
            name: sum(table[ctypes.c_int(number)])
            for name, number in self._loss_names.items()
        }

    def _fill_tables(self) -> None:
        scanner = program.read_source("scanner.h")
        self._write("grammar", b"\0" * 4, grammar.table(scanner))
        for name, entry in grammar.names(scanner):
            self._write("header_names", name, entry)
        template = b"".join(line.ljust(size, b"\0") for line, size in TEMPLATE)
        self._write("templates", b"\0" * 4, template)
        losses = grammar.enumerators(program.read_source("losses.h"), "loss")
        del losses["LOSSES"]
        self._loss_names = {
            name.removeprefix("LOSS_").lower(): number
            for name, number in losses.items()
        }

    def _write(self, table: str, key: bytes, value: bytes) -> None:
        syscall.map_update(program.map_fd(self.bpf, table), key, value)

    def _chain(self, table: str, kind: str, names: list[str]) -> None:
        steps = self.bpf[table.encode()]
        for i, name in enumerate(names):
            steps[ctypes.c_int(i)] = ctypes.c_int(self._load(name, kind).fd)

    def _load(self, name: str, kind: str) -> Any:
        try:
            return self.bpf.load_func(name.encode(), getattr(self.bpf, kind))
        except Exception as exc:  # bcc has no exception type of its own
            raise ProgramRejected(
                f"the kernel rejects {name}: {exc}",
                hint="the verifier's words stand above; please report them",
            ) from exc


class Tracer:
    """Exchanges of the traced namespaces, from attach to detach."""

    def __init__(
        self,
        *,
        max_connections: int,
        netns: frozenset[int] | None,
        on_exchange: Callable[[Exchange], None],
        on_warning: Callable[[str], None],
    ) -> None:
        """`netns` None traces every namespace but the agent's own."""
        self.engine = "off"
        self.engine_reason = "not tried"
        self._max_connections = max_connections
        self._netns = netns
        self._on_exchange = on_exchange
        self._on_warning = on_warning
        self._stack = ExitStack()
        self._taken = 0
        self._trying = False
        self._losses_of_trial: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Load, try, attach; on failure nothing stays behind."""
        require_kprobes()
        with ExitStack() as stack:
            self._programs = Programs(self._max_connections)
            stack.callback(self._programs.close)
            self._own_netns = Path("/proc/self/ns/net").stat().st_ino
            self._programs.set_policy(self._own_netns, POLICY_NONE)
            self._ring = self._programs.bpf[b"exchanges"]
            self._ring.open_ring_buffer(self._take)
            self._programs.attach_requests()
            self._try_requests()
            self._programs.attach_kprobes()
            self._guard = Guard.open()
            stack.callback(self._guard.close)
            self._selected: frozenset[int] = frozenset()
            if self._netns is None:
                self._programs.set_other_policy(self._policy)
            else:
                self.select(self._netns)
            # The compiler's memory goes back to the node: 10 MB of 48.
            ctypes.CDLL(None).malloc_trim(0)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach and unload."""
        self._stack.close()

    def poll(self, timeout_ms: int) -> None:
        """Wait, then hand over every exchange that has finished.

        The kernel wakes nobody per record: a call does not pay for waking the agent.
        """
        time.sleep(timeout_ms / 1000)
        self._taken = 0
        self._programs.bpf.ring_buffer_consume()

    def heartbeat(self) -> None:
        """Tell the redirect guard that the agent is alive."""
        self._guard.beat(time.monotonic_ns())

    def select(self, netns: frozenset[int]) -> None:
        """Trace these network namespaces, and no others."""
        for inode in self._selected - netns:
            self._programs.set_policy(inode, None)
        for inode in netns - self._selected - {self._own_netns}:
            self._programs.set_policy(inode, self._policy)
        self._selected = netns

    def losses(self) -> dict[str, int]:
        """Return what was lost since the start, by reason."""
        return {
            reason: count - self._losses_of_trial[reason]
            for reason, count in self._programs.losses().items()
        }

    @property
    def _policy(self) -> int:
        return POLICY_TRACE | (POLICY_ENROL if self.engine == "kernel" else 0)

    def _try_requests(self) -> None:
        tried: list[int] = []

        def trace(netns: int) -> None:
            tried.append(netns)
            self._programs.set_policy(netns, POLICY_TRACE | POLICY_ENROL)

        fault = selftest.find_fault(trace)
        for netns in tried:
            self._programs.set_policy(netns, None)
        # What the self-test did is nobody's traffic.
        self._trying = True
        self._programs.bpf.ring_buffer_consume()
        self._trying = False
        self._losses_of_trial = self._programs.losses()
        if fault is None:
            self.engine, self.engine_reason = "kernel", "self-test passed"
        else:
            self.engine, self.engine_reason = "off", fault
            self._on_warning(
                f"no header is written into requests: self-test failed: {fault}"
            )

    def _take(self, _context: object, data: int, _size: int) -> int:
        if self._trying:
            return 0
        self._on_exchange(Exchange.from_kernel(self._ring.event(data)))
        self._taken += 1
        # libbpf reads on while records come; a negative answer ends that.
        return -1 if self._taken >= POLL_MAX else 0


def require_kprobes() -> None:
    """Raise FeatureMissing where the kernel has no kprobes."""
    if not Path("/sys/bus/event_source/devices/kprobe/type").exists():
        raise FeatureMissing(
            "this kernel has no kprobes",
            hint="podspan needs CONFIG_KPROBES=y and CONFIG_KPROBE_EVENTS=y; "
            "stock distribution kernels have both",
        )


def cgroup_root(mounts: Path = Path("/proc/self/mounts")) -> str:
    """Where the cgroup v2 tree is mounted; FeatureMissing where it is not."""
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return where
    raise FeatureMissing(
        "no cgroup v2 file system is mounted",
        hint="mount -t cgroup2 none /sys/fs/cgroup, or mount the node's into the pod",
    )
