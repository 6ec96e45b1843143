"""One redirected connection: two sockets, and a layer that says what passes.

UP is connected as soon as DOWN is accepted: a server that speaks first is heard
without a wait, and a refused connection is known at once. Until DOWN's first bytes
tell the protocol they are held back; where UP speaks first, it is none that we know,
or HTTP/2.

What an end of a direct connection would see, both ends see through the relay:
    data       every byte, in order; a slow reader stops the other side's reading
    FIN        behind the data, each way for itself
    RST        behind what had arrived before it, as a kernel's receive queue gives it
    no server  RST, where the application's connect(2) has already succeeded (gate.py)

Bytes are copied. The kernel could carry opaque streams by sockmap, but would buffer
without limit and let FIN overtake data: tests/netns/test_redirect_splice.py.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import Final

from podspan.agent.redirect import sockets
from podspan.agent.redirect.layer import (
    Abort,
    Action,
    Count,
    End,
    Layer,
    Report,
    Send,
    Side,
    Skip,
    StreamRecord,
)
from podspan.agent.redirect.loop import Loop, Timer
from podspan.agent.redirect.sniff import Protocol as Spoken
from podspan.agent.redirect.sniff import may_be_http2_server, sniff

log = logging.getLogger(__name__)

# Read at once; a stream at full speed costs two system calls for so much.
READ_MAX: Final = 256 << 10

# Above the first the other side is not read, below the second it is again.
HIGH_WATER: Final = 256 << 10
LOW_WATER: Final = 64 << 10

# An HTTP/2 server's SETTINGS, and what it may send along, before the client speaks.
HELD_UP_MAX: Final = 64 << 10

# A layer answers what a side sends (HTTP/2's pings); who does not read the answers
# is not read either.
UNREAD_ANSWERS_MAX: Final = 1 << 20

# How long data may take to be delivered before the RST that came behind it.
RESET_WAIT_S: Final = 1.0
_RESET_POLL_S: Final = 0.005

_TROUBLE: Final = EPOLLERR | EPOLLHUP
_FOR_EVER: Final = -1


@dataclass(slots=True)
class Shared:
    """What the connections of a worker have in common."""

    loop: Loop
    counters: Counter[str]
    closed: Callable[[Relay], None]
    finished: Callable[[Relay, StreamRecord], None]
    sniff_wait_s: float
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(READ_MAX)))


class _End:
    """One side's socket, with what waits to be sent to it."""

    __slots__ = (
        "answered",
        "connecting",
        "ended",
        "error",
        "events",
        "finish",
        "finished",
        "full",
        "gone",
        "other",
        "out",
        "side",
        "skip",
        "sock",
        "stuck",
    )

    other: _End

    def __init__(self, side: Side, sock: socket.socket) -> None:
        self.side = side
        self.sock = sock
        self.out = bytearray()
        self.events: int | None = None  # what epoll reports; None: not registered
        self.skip = 0  # bytes from here that go to the other side as they are
        self.connecting = False
        self.ended = False  # its FIN has come
        self.finish = False  # it shall get FIN behind `out`
        self.finished = False  # and did
        self.full = False  # above the high-water mark, not yet below the low one
        self.answered = False  # the layer has sent to it since it was last drained
        self.error = 0  # errno of a send: what had arrived is still read
        self.gone = False  # RST has come
        self.stuck = False  # shut both ways, with data that the other side cannot take


class Relay:
    """Carries one connection until both sides have ended or one was reset."""

    __slots__ = (
        "_choose",
        "_closed",
        "_down",
        "_held",
        "_held_up",
        "_layer",
        "_resetting",
        "_shared",
        "_sniff_timer",
        "_up",
        "context",
    )

    def __init__(
        self,
        shared: Shared,
        down: socket.socket,
        up: socket.socket,
        choose: Callable[[Relay, Spoken], Layer | None],
        context: object,
    ) -> None:
        """Take both sockets over; `up` is not yet connected.

        `choose` returns the layer of a protocol, None for what is opaque.
        """
        self._shared = shared
        self._choose = choose
        self.context = context
        self._down = _End(Side.DOWN, down)
        self._up = _End(Side.UP, up)
        self._down.other, self._up.other = self._up, self._down
        self._layer: Layer | None = None
        self._held: bytes | None = b""  # DOWN's first bytes; None: protocol is known
        self._held_up = b""  # UP's, where it speaks first as HTTP/2 servers may
        self._sniff_timer: Timer | None = None
        self._resetting = False
        self._closed = False

    @property
    def down(self) -> socket.socket:
        """The socket of who opened the connection."""
        return self._down.sock

    @property
    def up(self) -> socket.socket:
        """The socket to whom it was meant for."""
        return self._up.sock

    def start(self, destination: sockets.Address | None) -> None:
        """Connect, unless that is done already (None), and serve from now on."""
        self._guarded(self._start, destination)

    def abort(self, reason: str) -> None:
        """Send RST both ways now."""
        self._shared.counters[reason] += 1
        self._close()

    # Events

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        """Run a step; a fault of ours costs this connection and no other."""
        if self._closed:
            return
        try:
            step(*arguments)
            if not self._closed:
                self._settle()
        except Exception:
            log.exception("a connection is reset by a fault of the redirect engine")
            self.abort("connections_crashed")

    def _start(self, destination: sockets.Address | None) -> None:
        up = self._up
        if destination is None:
            return
        try:
            up.sock.connect(destination)
        except BlockingIOError:
            up.connecting = True
        except OSError as exc:
            self._not_connected(exc.errno or 0)

    def _on_down(self, events: int) -> None:
        self._guarded(self._on_events, self._down, events)

    def _on_up(self, events: int) -> None:
        self._guarded(self._on_events, self._up, events)

    def _on_events(self, end: _End, events: int) -> None:
        if end.connecting:
            self._connected(end)
            return
        if events & _TROUBLE and self._in_trouble(end):
            return
        if events & EPOLLOUT:
            self._flush(end)
        if events & (EPOLLIN | _TROUBLE) and not end.ended and not self._closed:
            self._read(end)

    def _connected(self, up: _End) -> None:
        error = sockets.pending_error(up.sock)
        if error:
            self._not_connected(error)
            return
        up.connecting = False
        self._flush(up)

    def _not_connected(self, error: int) -> None:
        self._shared.counters[f"connect_failed_{sockets.error_name(error)}"] += 1
        self._close()

    def _in_trouble(self, end: _End) -> bool:
        """Handle EPOLLERR and EPOLLHUP; return whether there is nothing to read."""
        if self._resetting:
            self._close()
            return True
        if end.ended:
            # Both directions are shut: by us, which is no trouble, or by a reset.
            if sockets.pending_error(end.sock) or not end.finished:
                self._lost(end)
            return True
        if not self._may_read(end):
            end.stuck = True
            end.out.clear()
            return True
        return False

    # Bytes in

    def _read(self, end: _End) -> None:
        buffer = self._shared.buffer
        try:
            size = end.sock.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError:
            self._lost(end)
            return
        if not size:
            if end.error:
                self._lost(end)
            else:
                self._ended(end)
            return
        if end.skip == _FOR_EVER:
            self._send(end.other, buffer[:size])
            return
        passed = min(size, end.skip)
        if passed:
            end.skip -= passed
            self._send(end.other, buffer[:passed])
        if size > passed:
            self._received(end, bytes(buffer[passed:size]))

    def _received(self, end: _End, data: bytes) -> None:
        if self._held is None:
            if self._layer is not None:
                self._carry_out(self._layer.received(end.side, data))
            return
        spoken = self._speaks(end.side, data)
        if spoken is not None:
            self._begin(spoken)
        elif self._sniff_timer is None:
            self._sniff_timer = self._shared.loop.after(
                self._shared.sniff_wait_s, self._sniffed_enough
            )

    def _speaks(self, side: Side, data: bytes) -> Spoken | None:
        """Hold first bytes back until they tell the protocol."""
        if side is Side.DOWN:
            self._held = (self._held or b"") + data
            return sniff(self._held)
        self._held_up += data
        if may_be_http2_server(self._held_up) and len(self._held_up) <= HELD_UP_MAX:
            return None
        self._shared.counters["server_first"] += 1
        return Spoken.OPAQUE

    def _sniffed_enough(self) -> None:
        self._sniff_timer = None
        if self._held is not None:
            self._guarded(self._begin, Spoken.OPAQUE)

    def _begin(self, spoken: Spoken) -> None:
        """The protocol is known: what was held back goes its way."""
        if self._sniff_timer is not None:
            self._sniff_timer.cancel()
            self._sniff_timer = None
        held, self._held = self._held or b"", None
        held_up, self._held_up = self._held_up, b""
        self._layer = self._choose(self, spoken)
        if self._layer is None:
            self._down.skip = self._up.skip = _FOR_EVER
            self._send(self._up, held)
            self._send(self._down, held_up)
            return
        if held:
            self._carry_out(self._layer.received(Side.DOWN, held))
        if held_up and not self._closed:
            self._carry_out(self._layer.received(Side.UP, held_up))

    def _ended(self, end: _End) -> None:
        if self._held is not None:
            self._begin(Spoken.OPAQUE)
        end.ended = True
        if self._layer is not None:
            self._carry_out(self._layer.ended(end.side))
        if end.skip == _FOR_EVER:
            end.other.finish = True
            self._flush(end.other)

    def _lost(self, end: _End) -> None:
        """RST has come, or what amounts to it."""
        if self._held is not None:
            self._begin(Spoken.OPAQUE)
        end.gone = True
        self._shared.counters[f"reset_by_{end.side.value}"] += 1
        if self._layer is not None:
            # Abort says here what is done anyway.
            actions = self._layer.lost(end.side)
            self._carry_out([act for act in actions if not isinstance(act, Abort)])
        if self._closed:
            return
        end.out.clear()
        self._register(end, None)
        if end.other.connecting:
            self._close()
            return
        self._resetting = True
        self._reset_when_delivered(RESET_WAIT_S)

    def _reset_when_delivered(self, left_s: float) -> None:
        """Send RST once the peer's kernel has all that came before it."""
        end = self._down if self._up.gone else self._up
        if self._closed:
            return
        with suppress(OSError):
            waits = bool(end.out) or sockets.unacknowledged(end.sock) > 0
            if waits and left_s > 0:
                self._shared.loop.after(
                    _RESET_POLL_S,
                    lambda: self._reset_when_delivered(left_s - _RESET_POLL_S),
                )
                return
        self._close()

    # Bytes out

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if self._closed:
                return
            self._act(action)
        for end in (self._down, self._up):
            self._flush(end)

    def _act(self, action: Action) -> None:
        match action:
            case Send(side, data):
                end = self._end(side)
                end.answered = True
                if not end.out and len(data) >= LOW_WATER:
                    self._send(end, data)
                elif not end.gone and not end.error:
                    end.out += data  # several small ones become one packet
            case Skip(side, None):
                self._end(side).skip = _FOR_EVER
            case Skip(side, count) if count is not None:
                self._end(side).skip = count
            case End(side):
                self._end(side).finish = True
            case Count(reason):
                self._shared.counters[reason] += 1
            case Report(record):
                self._shared.finished(self, record)
            case Abort(reason):
                self.abort(reason)

    def _end(self, side: Side) -> _End:
        return self._down if side is Side.DOWN else self._up

    def _send(self, end: _End, data: bytes | memoryview) -> None:
        if end.gone or end.error:
            return
        if not end.out and not end.connecting:
            try:
                sent = end.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self._cannot_send(end, exc)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        end.out += data

    def _flush(self, end: _End) -> None:
        if end.connecting or end.gone or end.finished:
            return
        if end.out:
            try:
                sent = end.sock.send(end.out)
            except BlockingIOError:
                return
            except OSError as exc:
                self._cannot_send(end, exc)
                return
            del end.out[:sent]
        if end.finish and not end.out:
            end.finished = True
            try:
                end.sock.shutdown(socket.SHUT_WR)
            except OSError as exc:
                self._cannot_send(end, exc)

    def _cannot_send(self, end: _End, exc: OSError) -> None:
        """A reset is seen here first; what came before it is still to be read."""
        end.error = exc.errno or errno.EPIPE
        end.out.clear()
        if end.ended:
            self._lost(end)

    # After each step

    def _settle(self) -> None:
        """Bring epoll and the layer to where the buffers are."""
        self._tell_drained()
        down, up = self._down, self._up
        if self._closed:
            return
        if down.ended and down.finished and up.ended and up.finished:
            for end in (down, up):
                sockets.end_on_close(end.sock)
            self._close()
            return
        for end in (down, up):
            size = len(end.out)
            end.full = size > HIGH_WATER or (end.full and size >= LOW_WATER)
        for end in (down, up):
            self._register(end, self._wanted(end))

    def _tell_drained(self) -> None:
        layer = self._layer
        again = layer is not None
        while again and layer is not None and not self._closed:
            again = False
            for end in (self._down, self._up):
                if end.answered and len(end.out) < LOW_WATER and not end.connecting:
                    end.answered = False
                    self._carry_out(layer.drained(end.side))
                    again = again or self._down.answered or self._up.answered

    def _may_read(self, end: _End) -> bool:
        return not (
            end.ended
            or end.connecting
            or self._resetting
            or end.other.full
            or len(end.out) > UNREAD_ANSWERS_MAX
        )

    def _wanted(self, end: _End) -> int | None:
        """Return the events to wait for; None: none, not even RST."""
        if end.gone or (end.ended and end.finished):
            return None
        if end.connecting:
            return EPOLLOUT
        if self._may_read(end):
            end.stuck = False
            return EPOLLIN | (EPOLLOUT if end.out else 0)
        if end.stuck:  # would be reported again and again
            return None
        return EPOLLOUT if end.out else 0

    def _register(self, end: _End, events: int | None) -> None:
        if events == end.events:
            return
        loop, fd = self._shared.loop, end.sock.fileno()
        if end.events is None:
            loop.add(
                fd, events or 0, self._on_down if end is self._down else self._on_up
            )
        elif events is None:
            loop.remove(fd)
        else:
            loop.modify(fd, events)
        end.events = events

    def _close(self) -> None:
        """Close both sockets; that sends RST, unless they have ended in order."""
        if self._closed:
            return
        self._closed = True
        if self._sniff_timer is not None:
            self._sniff_timer.cancel()
        for end in (self._down, self._up):
            self._register(end, None)
            self._shared.loop.close(end.sock)
        self._layer = None
        self._shared.closed(self)
