"""What outlives an agent in the kernel: its connections, and records it has not read.

The tables are pinned while the agent runs. The next agent, restarted or upgraded,
copies from them what still holds, so that the traces of calls under way stay whole.
Programs and the sockhash end with the agent: between the two nothing is traced and
every byte passes as if there had never been an agent.

The pins' name carries a hash of the structs: what an agent with other structs has left
is thrown away, and counted as lost.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from podspan.agent.errors import KernelError
from podspan.agent.kernel import program, syscall
from podspan.agent.kernel.guard import require_bpffs
from podspan.agent.kernel.syscall import BpfError

if TYPE_CHECKING:
    from bcc import BPF

PREFIX: Final = "state_"
TABLES: Final = ("connections", "servings", "roaming", "exchanges")

# The headers that declare what is pinned.
STRUCTS: Final = ("scanner.h", "exchange.h", "connection.h")

# What the descriptors of event loops are called in /proc/PID/fd.
LOOPS: Final = ("anon_inode:[eventpoll]", "anon_inode:[io_uring]")

# What stat(5) counts in.
TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Inherited:
    """What an agent before this one has left."""

    connections: int = 0
    open: int = 0  # of them, those with a call under way
    records: int = 0  # exchanges that had ended, and were not read
    lost: int = 0  # calls under way that cannot be followed

    def __bool__(self) -> bool:
        """Whether there was anything."""
        return bool(self.connections or self.records or self.lost)

    def __str__(self) -> str:
        """Return the figures as key=value, for the log."""
        names = self.__dataclass_fields__
        return " ".join(f"{name}={getattr(self, name)}" for name in names)


@contextmanager
def only_agent(pin_dir: Path) -> Iterator[None]:
    """Hold the node's place for an agent: two would each take half of what passes.

    Raises KernelError where another agent is running.
    """
    require_bpffs(pin_dir.parent)
    try:
        pin_dir.mkdir(exist_ok=True)
        fd = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise KernelError(f"cannot open {pin_dir}: {exc.strerror}") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise KernelError(
            f"another agent is running on this node: it holds {pin_dir}",
            hint="stop it first; a DaemonSet has to update with maxSurge: 0",
        ) from None
    try:
        yield
    finally:
        os.close(fd)


class State:
    """The pinned tables; `inherit` once, then `pin`."""

    def __init__(self, bpf: BPF, pin_dir: Path) -> None:
        self._bpf = bpf
        self._pin_dir = pin_dir
        text = "".join((program.SOURCES / name).read_text() for name in STRUCTS)
        self._own = (
            pin_dir / f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        )
        self._entry = bpf[b"connections"].Leaf
        self._serving = bpf[b"servings"].Leaf
        self._copied: set[int] = set()  # cookies

    def inherit(self, take_record: Callable[[int], None]) -> Inherited:
        """Copy what an earlier agent has left; `take_record` gets a record's address.

        What has become of the sockets meanwhile is not asked here: see `keep`.
        """
        try:
            with ExitStack() as stack:
                fds = {name: syscall.obj_get(self._own / name) for name in TABLES}
                for fd in fds.values():
                    stack.callback(os.close, fd)
                records = _drain(fds["exchanges"], take_record)
                return self._copy(fds, records)
        except BpfError as exc:
            if exc.errno == errno.ENOENT:
                return Inherited(lost=self._left_by_others())
            raise KernelError(f"cannot read what an agent has left: {exc}") from exc

    def _left_by_others(self) -> int:
        """Count the connections that agents with other structs have followed."""
        count = 0
        for table in self._pin_dir.glob(f"{PREFIX}*/connections"):
            fd = syscall.obj_get(table)
            try:
                count += sum(1 for _ in syscall.map_items(fd))
            finally:
                os.close(fd)
        return count

    def pin(self) -> None:
        """Let the tables outlive this process; remove what other versions pinned."""
        try:
            for old in self._pin_dir.glob(f"{PREFIX}*"):
                shutil.rmtree(old)
            self._own.mkdir()
            for name in TABLES:
                syscall.obj_pin(program.map_fd(self._bpf, name), self._own / name)
        except OSError as exc:
            raise KernelError(f"cannot pin the agent's tables: {exc}") from exc

    def keep(self, cookies: Collection[int]) -> int:
        """Forget the inherited connections whose socket is none of these.

        Returns how many of them had a call under way.
        """
        fd = program.map_fd(self._bpf, "connections")
        lost = 0
        for key, value in syscall.map_items(fd):
            entry = self._entry.from_buffer_copy(value)
            if entry.cookie in self._copied and entry.cookie not in cookies:
                lost += bool(entry.open or entry.tcp)
                syscall.map_delete(fd, key)
        return lost

    def _copy(self, fds: dict[str, int], records: int) -> Inherited:
        connections = program.map_fd(self._bpf, "connections")
        servings = program.map_fd(self._bpf, "servings")
        copied = under_way = lost = 0
        for key, value in syscall.map_items(fds["connections"]):
            entry = self._entry.from_buffer_copy(value)
            entry.inherited = 1
            # Its sends pass the sockhash again once it is enrolled again.
            entry.enrolled = 0
            # The workers of the agent that is gone cannot see our tables.
            entry.whole = 0
            lost += entry.parked_end - entry.parked_first
            entry.parked_first = entry.parked_end
            try:
                syscall.map_update(connections, key, bytes(entry))
            except BpfError:  # fewer connections are allowed now
                lost += bool(entry.open or entry.tcp)
                continue
            self._copied.add(entry.cookie)
            copied += 1
            under_way += bool(entry.open or entry.tcp)
        for key, _ in syscall.map_items(fds["roaming"]):
            if Path(f"/proc/{int.from_bytes(key, 'little')}").exists():
                syscall.map_update(program.map_fd(self._bpf, "roaming"), key, b"\1")
        for key, value in syscall.map_items(fds["servings"]):
            serving = self._serving.from_buffer_copy(value)
            thread = int.from_bytes(key, "little")
            if _is_still_there(thread, serving.since_ns) and not _loops(thread >> 32):
                syscall.map_update(servings, key, value)
        return Inherited(copied, under_way, records, lost)


def _is_still_there(thread: int, since_ns: int) -> bool:
    """Whether the thread that took a request at `since_ns` lives, not a later namesake.

    `thread` is the kernel's pid_tgid, `since_ns` of CLOCK_MONOTONIC.
    """
    try:
        stat = Path(f"/proc/{thread >> 32}/task/{thread & 0xFFFFFFFF}/stat").read_text()
    except OSError:
        return False
    # Field 22, counted behind the name, which may hold blanks and parentheses.
    started_ns = int(stat[stat.rindex(")") + 2 :].split()[19]) * TICK_NS
    return started_ns <= since_ns + TICK_NS


def _loops(pid: int) -> bool:
    """Whether a process has an event loop: what it took meanwhile is not known."""
    try:
        fds = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True
    for fd in fds:
        with suppress(OSError):  # closed meanwhile
            if str(fd.readlink()) in LOOPS:
                return True
    return False


def _drain(ring: int, take_record: Callable[[int], None]) -> int:
    """Read what is in a ring buffer; return how many records."""
    from bcc import lib  # noqa: PLC0415  importing this file needs no bcc
    from bcc.libbcc import _RINGBUF_CB_TYPE  # noqa: PLC0415

    taken = 0

    def take(_context: object, data: int, _size: int) -> int:
        nonlocal taken
        take_record(data)
        taken += 1
        return 0

    callback = _RINGBUF_CB_TYPE(take)
    manager = lib.bpf_new_ringbuf(ring, callback, None)
    if not manager:
        return 0
    try:
        lib.bpf_consume_ringbuf(manager)
    finally:
        lib.bpf_free_ringbuf(manager)
    return taken
