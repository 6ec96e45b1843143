"""The tracer: bpf/tracer.c loaded, tried, attached, and read.

What it attaches belongs to the process: the kernel undoes it when the agent ends, also
by SIGKILL. Connections then go on as plain TCP.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from podspan.agent.errors import FeatureMissing, ProgramRejected
from podspan.agent.exchange import Exchange, Role
from podspan.agent.kernel import grammar, program, selftest, syscall
from podspan.agent.kernel.enrol import Enrolment, enrol_existing
from podspan.agent.kernel.guard import PIN_DIR, Guard, Want
from podspan.agent.kernel.handoff import HTTP2_KEY, http2_port
from podspan.agent.kernel.options import (
    POLICY_ENROL,
    POLICY_NONE,
    POLICY_REDIRECT,
    POLICY_TRACE,
    Options,
)
from podspan.agent.kernel.state import Inherited, State, only_agent
from podspan.agent.pods.processes import own_netns
from podspan.agent.pods.sockets import Connection, find_connections

if TYPE_CHECKING:
    from bcc import BPF

log = logging.getLogger(__name__)

# 33 tail calls of this many bytes are a head of 16 KB. Each byte costs the verifier
# some thousand instructions of its million.
SCAN_STEP = 576

SETTINGS = {
    "SCAN_STEP": SCAN_STEP,
    "SEGMENTS": 20,  # elements of a writev that one step walks
    "RING_PAGES": 2048,  # 8 MB: 11,000 exchanges between two polls
    "MAX_THREADS": 16384,
    "PARKED_MAX": 16,  # requests that one connection may send ahead of responses
    "MAX_PARKED": 2048,
    "MAX_HTTP2_PORTS": 1024,
}

# Exchanges handed over by one poll: the heartbeat waits no longer than that takes.
POLL_MAX = 8192

POLICY = struct.Struct("=QB7x")  # struct policy of bpf/connection.h
OLD_SOCKET = struct.Struct("=B")

# Kernel function, our program at its entry, whether every kernel has it.
KPROBES = (
    (b"tcp_v4_connect", b"connect_entry", True),
    (b"tcp_v6_connect", b"connect_entry", False),  # CONFIG_IPV6 may be off, or a module
    (b"tcp_sendmsg", b"send_entry", True),
    (b"tcp_sendpage", b"sendpage_entry", False),
    (b"tcp_recvmsg", b"receive_entry", True),
    (b"tcp_cleanup_rbuf", b"receive_copied", True),
)

# System calls with which event loops wait, and what processors put before the name.
WAITS = ("epoll_wait", "epoll_pwait", "epoll_pwait2", "io_uring_enter")
SYSCALL_PREFIXES = ("__x64_sys_", "__arm64_sys_")

# Our programs at a function's return.
RETURNS = {b"connect_entry": b"connect_return"}

# struct template of bpf/request.c: a line, and the size of its field.
TEMPLATE = (
    (b"x-request-id: " + b"_" * 36 + b"\r\n", 56),
    (b"x-b3-traceid: " + b"_" * 32 + b"\r\n", 48),
    (b"x-b3-traceid: " + b"_" * 16 + b"\r\n", 32),
    (b"x-b3-spanid: " + b"_" * 16 + b"\r\n", 32),
    (b"x-b3-parentspanid: " + b"_" * 16 + b"\r\n", 40),
    (b"x-b3-sampled: _\r\n", 24),
    (b"x-b3-flags: 1\r\n", 16),
    (b"b3: " + b"_" * 32 + b"-" + b"_" * 16, 80),
    (b"traceparent: 00-" + b"_" * 32 + b"-" + b"_" * 16 + b"-0_\r\n", 72),
)

BPF_CGROUP_SOCK_OPS = 3
BPF_SK_MSG_VERDICT = 7


class Programs:
    """bpf/tracer.c in the kernel; attached piece by piece, removed by `close`."""

    def __init__(self, max_connections: int, options: Options) -> None:
        """Compile, fill the tables, verify. Nothing is attached yet."""
        self._stack = ExitStack()
        self._sampling = options.sampling
        self.old_sockets_left_out = 0
        settings = {**SETTINGS, **options.defines(), "MAX_CONNECTIONS": max_connections}
        self.bpf: BPF = program.load("tracer.c", settings)
        self._stack.callback(self.bpf.cleanup)
        self._connection = self.bpf[b"connections"].Leaf
        try:
            self._fill_tables()
            steps = ["request_scan", "request_inject", "request_insert"]
            self._chain("request_steps", "SK_MSG", steps)
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
        waits = [
            f"{prefix}{call}".encode() for prefix in SYSCALL_PREFIXES for call in WAITS
        ]
        hooks = [*KPROBES, *((function, b"turn_ends", False) for function in waits)]
        there = kernel_functions({function for function, _, _ in hooks})
        for function, name, everywhere in hooks:
            if not everywhere and function not in there:
                continue
            try:
                self.bpf.attach_kprobe(event=function, fn_name=name)
                if name in RETURNS:
                    self.bpf.attach_kretprobe(event=function, fn_name=RETURNS[name])
            except Exception as exc:  # bcc has no exception type of its own
                raise ProgramRejected(
                    f"cannot attach {name.decode()} to {function.decode()}: {exc}"
                ) from exc

    def close(self) -> None:
        """Detach and unload all."""
        self._stack.close()

    def set_policy(
        self, netns: int, what: int | None, sampling: float | None = None
    ) -> None:
        """What is done in the namespace of this inode; None: as in the others.

        `sampling` is a percentage, None the node's.
        """
        key = struct.pack("=I", netns)
        if what is None:
            syscall.map_delete(program.map_fd(self.bpf, "policies"), key)
        else:
            self._write("policies", key, self._policy(what, sampling))

    def set_other_policy(self, what: int) -> None:
        """What is done in the namespaces that `set_policy` does not name."""
        self._write("other_policy", b"\0" * 4, self._policy(what, None))

    def _policy(self, what: int, sampling: float | None) -> bytes:
        percent = self._sampling if sampling is None else sampling
        return POLICY.pack(round(percent / 100 * 2**32), what)

    def add_old_sockets(self, accepted: Mapping[int, bool]) -> None:
        """Let the sockets of these cookies be followed from their next byte on.

        The value: whether this end accepted the connection. What is followed already
        is left alone.
        """
        followed = {
            self._connection.from_buffer_copy(value).cookie
            for _, value in syscall.map_items(program.map_fd(self.bpf, "connections"))
        }
        table = program.map_fd(self.bpf, "old_sockets")
        for cookie in accepted.keys() - followed:
            role = Role.SERVER if accepted[cookie] else Role.CLIENT
            try:
                syscall.map_update(
                    table, struct.pack("=Q", cookie), OLD_SOCKET.pack(role)
                )
            except syscall.BpfError:  # as many as the table holds
                self.old_sockets_left_out += 1

    def set_roaming(self, come: Iterable[int], gone: Iterable[int]) -> None:
        """Processes (the kernel's tgid) of which no thread is anybody's parent."""
        for pid in come:
            self._write("roaming", struct.pack("=I", pid), b"\1")
        for pid in gone:
            syscall.map_delete(
                program.map_fd(self.bpf, "roaming"), struct.pack("=I", pid)
            )

    def handoff_fds(self) -> tuple[int, int, int]:
        """Descriptors of the tables handed, claims and roots: bpf/handoff.h."""
        handed, claims, roots = (
            program.map_fd(self.bpf, name) for name in ("handed", "claims", "roots")
        )
        return handed, claims, roots

    def http2_ports(self) -> frozenset[tuple[int, int, Role]]:
        """Network namespace, called port and role of the HTTP/2 that was seen."""
        table = program.map_fd(self.bpf, "http2_seen")
        return frozenset(http2_port(key) for key, _ in syscall.map_items(table))

    def forget_http2_ports(self, but: Collection[int]) -> None:
        """Make room: keep what was seen in these namespaces, no other."""
        table = program.map_fd(self.bpf, "http2_seen")
        for netns, port, role in self.http2_ports():
            if netns not in but:
                syscall.map_delete(table, HTTP2_KEY.pack(netns, port, role))

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
        options: Options,
        netns: frozenset[int] | None,
        roaming: Collection[int],
        on_exchange: Callable[[Exchange], None],
        on_warning: Callable[[str], None],
        plans: Mapping[int, int] | None = None,
    ) -> None:
        """`netns` None traces every namespace but the agent's own.

        `roaming` and `plans`: as `set_roaming` and `set_plans`, from the first exchange
        on.
        """
        self.fault: str | None = "not tried"
        self.inherited = Inherited()
        self.enrolment = Enrolment(0, 0, {})
        self._max_connections = max_connections
        self._options = options
        self._netns = netns
        self._roaming = roaming
        self._on_exchange = on_exchange
        self._on_warning = on_warning
        self._stack = ExitStack()
        self._taken = 0
        self._trying = False
        self._losses_of_trial: dict[str, int] = {}
        self._lost_by_restart = 0
        self._sampling: Mapping[int, float] = {}
        self._plans = plans or {}
        self._policies: dict[int, tuple[int, float | None]] = {}

    def __enter__(self) -> Self:
        """Load, try, attach; on failure nothing stays behind."""
        require_kprobes()
        with ExitStack() as stack:
            stack.enter_context(only_agent(PIN_DIR))
            self._programs = Programs(self._max_connections, self._options)
            stack.callback(self._programs.close)
            self._own_netns = own_netns()
            self._ring = self._programs.bpf[b"exchanges"]
            self._ring.open_ring_buffer(self._take)
            self._programs.attach_requests()
            self._try_requests()
            self._guard = Guard.open(grace_ns=self._options.guard_grace_ns)
            stack.callback(self._guard.close)
            state = State(self._programs.bpf, PIN_DIR)
            self.inherited = state.inherit(self._take_inherited)
            self._programs.set_roaming(self._roaming, ())
            self._programs.attach_kprobes()
            if self._netns is None:
                self._programs.set_other_policy(self._what)
            self._set_policies()
            self._take_over(state)
            state.pin()
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
        """Detach and unload; what is pinned waits for the next agent."""
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
        new = netns - (self._netns or frozenset())
        self._netns = netns
        self._set_policies()
        self.enrolment = self._enrol_existing(find_connections(new))

    def set_sampling(self, by_netns: Mapping[int, float]) -> None:
        """Sample these namespaces' traces at rates of their own, in per cent."""
        self._sampling = by_netns
        self._set_policies()

    def set_plans(self, plans: Mapping[int, int]) -> None:
        """Let these namespaces have an engine of their own: POLICY_ bits.

        POLICY_ENROL (where the self-test passed) and POLICY_REDIRECT, or neither: their
        exchanges are seen, and nothing is written. New connections follow; those that
        are enrolled stay so to their end.
        """
        self._plans = plans
        self._set_policies()

    def redirect(self, netns: int, wants: Collection[Want]) -> None:
        """Redirect these connections of a namespace, while the heartbeat is fresh."""
        self._guard.want(netns, wants)

    def handoff_fds(self) -> tuple[int, int, int]:
        """Return what `Handoff` takes; a child inherits it by subprocess's pass_fds.

        The descriptors are the tracer's, and open for as long as it is attached.
        """
        return self._programs.handoff_fds()

    def http2_ports(self, netns: Collection[int]) -> frozenset[tuple[int, int, Role]]:
        """Return where HTTP/2 was seen: namespace, port of the called end, our role.

        What was seen in other namespaces than these is forgotten: the table is small.
        """
        self._programs.forget_http2_ports(but=netns)
        return self._programs.http2_ports()

    def set_roaming(self, come: Iterable[int], gone: Iterable[int]) -> None:
        """Claim no parent by thread in these processes: their work roams."""
        self._programs.set_roaming(come, gone)

    def losses(self) -> dict[str, int]:
        """Return what was lost since the start, by reason."""
        losses = {
            reason: count - self._losses_of_trial[reason]
            for reason, count in self._programs.losses().items()
        }
        losses["restart"] += self._lost_by_restart
        losses["connections_full"] += self._programs.old_sockets_left_out
        return losses

    @property
    def _what(self) -> int:
        enrol = self._options.enrol and self.fault is None
        return POLICY_TRACE | (POLICY_ENROL if enrol else 0)

    def _what_in(self, netns: int) -> int:
        """As `_what`, or as planned for this namespace; never what failed its test."""
        if netns not in self._plans:
            return self._what
        enrol = POLICY_ENROL if self.fault is None else 0
        return POLICY_TRACE | (self._plans[netns] & (enrol | POLICY_REDIRECT))

    def _set_policies(self) -> None:
        """Bring the kernel's table in line with what is selected, planned, sampled."""
        own = self._sampling.keys() | self._plans.keys()
        traced = own if self._netns is None else self._netns
        wanted: dict[int, tuple[int, float | None]] = {
            inode: (self._what_in(inode), self._sampling.get(inode)) for inode in traced
        }
        wanted[self._own_netns] = (POLICY_NONE, None)
        for inode in self._policies.keys() - wanted.keys():
            self._programs.set_policy(inode, None)
        for inode, (what, percent) in wanted.items():
            if self._policies.get(inode) != (what, percent):
                self._programs.set_policy(inode, what, percent)
        self._policies = wanted

    def _take_over(self, state: State) -> None:
        """Follow the connections that are older than this agent."""
        connections = find_connections(self._netns)
        lost = state.keep({connection.end.cookie for connection in connections})
        self._lost_by_restart = self.inherited.lost + lost
        self.enrolment = self._enrol_existing(connections)

    def _enrol_existing(self, connections: Sequence[Connection]) -> Enrolment:
        self._programs.add_old_sockets(
            {one.end.cookie: one.accepted for one in connections}
        )
        fd = program.map_fd(self._programs.bpf, "enrolled")
        return enrol_existing(
            fd, (one for one in connections if self._what_in(one.netns) & POLICY_ENROL)
        )

    def _try_requests(self) -> None:
        tried: list[int] = []

        def trace(netns: int) -> None:
            tried.append(netns)
            self._programs.set_policy(netns, POLICY_TRACE | POLICY_ENROL, 100.0)

        fault = selftest.find_fault(trace)
        for netns in tried:
            self._programs.set_policy(netns, None)
        # What the self-test did is nobody's traffic.
        self._trying = True
        self._programs.bpf.ring_buffer_consume()
        self._trying = False
        self._losses_of_trial = self._programs.losses()
        self.fault = fault

    def _take_inherited(self, data: int) -> None:
        self._on_exchange(Exchange.from_kernel(self._ring.event(data)))

    def _take(self, _context: object, data: int, _size: int) -> int:
        if self._trying:
            return 0
        self._on_exchange(Exchange.from_kernel(self._ring.event(data)))
        self._taken += 1
        # libbpf reads on while records come; a negative answer ends that.
        return -1 if self._taken >= POLL_MAX else 0


def kernel_functions(wanted: Collection[bytes]) -> frozenset[bytes]:
    """Return which of these functions the running kernel has.

    Read line by line: bcc would keep all 200,000 names, 20 MB of them.
    """
    with Path("/proc/kallsyms").open("rb") as lines:
        return frozenset(name for line in lines if (name := line.split()[2]) in wanted)


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
