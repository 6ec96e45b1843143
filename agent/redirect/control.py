"""What the agent and its workers tell each other: msgpack over SOCK_SEQPACKET.

A message is one packet, a pair of its name and its fields; descriptors go with it.

    agent to worker             worker to agent
    Start   options, maps       Opened       listeners are served
    Open    listeners of a pod  Counted      counters since the last one
    Close   a pod               Finished     exchanges of HTTP/2
    Drain   end                 Overloaded   whether it accepts no connections
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Final, get_args

import msgpack
from podspan.agent.exchange import Exchange, Role
from podspan.agent.kernel.handoff import Tuple
from podspan.agent.redirect.layer import StreamRecord

# A packet has to fit into the socket's buffer: net.core.wmem_max is 208 KiB by default.
PACKET_MAX: Final = 128 << 10
_FDS_MAX: Final = 16
# Of exchanges in one packet; the rest of it is little.
EXCHANGES_MAX: Final = PACKET_MAX - 1024


@dataclass(frozen=True, slots=True)
class Start:
    """First message. Its descriptors: the maps of handoff.py, or none."""

    span_ids: str
    unsampled: str
    propagate: tuple[str, ...]
    sniff_wait_s: float
    grace_s: float


@dataclass(frozen=True, slots=True)
class Open:
    """Serve a pod; without descriptors: other options for one that is served.

    Its descriptors: namespace, the gate's queue where there is one, `outbound`
    listeners, inbound ones.
    """

    netns: int
    gate: bool
    sampling: float
    outbound: int
    transparent: tuple[int, ...]  # families where clients' addresses can be shown


@dataclass(frozen=True, slots=True)
class Close:
    """Accept nothing more in this pod; `gone`: reset what is open, it has no end."""

    netns: int
    gone: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """Accept what is queued, then nothing; exit when all has ended, or after that."""

    within_s: float


@dataclass(frozen=True, slots=True)
class Opened:
    """The pod's listeners are served."""

    netns: int


@dataclass(frozen=True, slots=True)
class Counted:
    """By how much counters have grown, and how many connections are open."""

    counters: dict[str, int]
    open: int


@dataclass(frozen=True, slots=True)
class Finished:
    """Exchanges, each as `pack_exchange` makes it."""

    exchanges: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The worker has no descriptors left (or has again), and accepts nothing."""

    yes: bool


Message = Start | Open | Close | Drain | Opened | Counted | Finished | Overloaded
_BY_NAME: Final[dict[str, type[Message]]] = {
    kind.__name__: kind for kind in get_args(Message)
}


class BadMessage(Exception):
    """The other process speaks another version, or not this protocol at all."""


def encode(message: Message) -> bytes:
    """Return the packet of a message."""
    values = [getattr(message, field.name) for field in fields(message)]
    return bytes(msgpack.packb((type(message).__name__, values)))


def decode(packet: bytes) -> Message:
    """Read a packet. Raises BadMessage."""
    try:
        name, values = msgpack.unpackb(packet, use_list=False)
        return _BY_NAME[name](*values)
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as exc:
        raise BadMessage(f"{len(packet)} bytes: {exc!r}") from exc


def pack_exchange(record: StreamRecord, role: Role, application: Tuple) -> bytes:
    """Return an exchange as bytes: a record, and the end of the connection it is of."""
    # msgpack's numbers have 64 bits.
    trace_id = record.trace_id.to_bytes(16, "big")
    ends = {**asdict(application), "role": int(role), "trace_id": trace_id}
    return bytes(msgpack.packb({**asdict(record), **ends}))


def unpack_exchange(packed: bytes) -> Exchange:
    """Read what `pack_exchange` made. Raises BadMessage."""
    try:
        return Exchange.from_worker(msgpack.unpackb(packed))
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as exc:
        raise BadMessage(f"exchange of {len(packed)} bytes: {exc!r}") from exc


class Channel:
    """One end of a control socket; nothing here waits."""

    BACKLOG: ClassVar[int] = 4096  # messages that wait for room

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.ended = False  # the other process is gone
        self.truncated = 0  # messages whose descriptors found no room
        self._waiting: list[tuple[bytes, tuple[int, ...]]] = []

    def send(self, message: Message, fds: Iterable[int] = ()) -> bool:
        """Send, or keep until `flush`; False where it had to be dropped.

        Descriptors are duplicated: the caller may close its own at once.
        """
        if self.ended or len(self._waiting) >= self.BACKLOG:
            return False
        own = tuple(os.dup(fd) for fd in fds)
        self._waiting.append((encode(message), own))
        self.flush()
        return True

    def flush(self) -> bool:
        """Send what waits; return whether nothing does any more."""
        while self._waiting and not self.ended:
            packet, fds = self._waiting[0]
            try:
                socket.send_fds(self.sock, [packet], fds)
            except BlockingIOError:
                return False
            except OSError:
                self.ended = True
                break
            self._waiting.pop(0)
            _close_all(fds)
        if self.ended:
            self._drop_waiting()
        return True

    def receive(self) -> list[tuple[Message, list[int]]]:
        """Return what has come, with descriptors that are now the caller's.

        Raises BadMessage.
        """
        received = []
        while not self.ended:
            try:
                packet, fds, flags, _ = socket.recv_fds(self.sock, PACKET_MAX, _FDS_MAX)
            except BlockingIOError:
                break
            except OSError:
                packet, fds = b"", []
            if not packet:
                self.ended = True
                break
            for fd in fds:
                os.set_inheritable(fd, False)
            if flags & socket.MSG_CTRUNC:
                # No room for all of them here: a message without them means nothing.
                _close_all(fds)
                self.truncated += 1
                continue
            try:
                received.append((decode(packet), list(fds)))
            except BadMessage:
                _close_all(fds)
                raise
        return received

    def close(self) -> None:
        """Close the socket; the other end sees it."""
        self.ended = True
        self._drop_waiting()
        self.sock.close()

    def _drop_waiting(self) -> None:
        for _, fds in self._waiting:
            _close_all(fds)
        self._waiting.clear()


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a control socket."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET_MAX)
    return ends
