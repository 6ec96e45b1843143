"""Put the segments of one direction of a TCP connection back in order.

Segments in, pieces out: bytes in the order in which they were sent, each once. Of bytes
that were captured again the first copy counts, as at a receiver. What comes too early
waits, within bounds. What the capture lost is told as such, as soon as it is certain:
the other end acknowledges bytes that are not here, or more waits than may.

Sequence numbers count modulo 2**32 (RFC 9293 section 3.4); here they go on counting.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

_MODULUS = 1 << 32
_HALF = 1 << 31

# RFC 7323 section 2.3: no window is larger, so nothing beyond can be acknowledged.
_LARGEST_WINDOW = 1 << 30

# What may wait in one stream, and in all of them.
MAX_HELD = 4 << 20
MAX_HELD_IN_ALL = 64 << 20
_HELD_OVERHEAD = 256  # bytes that Python needs around a segment's data


class Piece(NamedTuple):
    """Bytes of a stream, or that some are missing."""

    at_ns: int
    start: int  # sequence number of the first byte, not wrapped
    data: bytes
    lost: int = 0  # bytes; then there is no data


class Room:
    """What waits in all streams together."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0


class _Held(NamedTuple):
    start: int
    at_ns: int
    data: bytes


class Stream:
    """One direction. `first` is None until a sequence number is known."""

    __slots__ = ("_end", "_held", "_held_bytes", "_room", "first", "next", "repeated")

    def __init__(self, room: Room) -> None:
        self.first: int | None = None
        self.next = 0  # sequence number up to which all is dealt with
        self.repeated = 0  # segments with bytes that were here before
        self._end: int | None = None  # sequence number of the FIN
        self._held: list[_Held] = []  # in order, without overlap
        self._held_bytes = 0
        self._room = room

    @property
    def ended(self) -> bool:
        """Whether the FIN has come, and all before it."""
        return self._end is not None and self.next > self._end

    def begin(self, seq: int) -> None:
        """The first byte that can be expected has this number."""
        self.first = self.next = seq

    def add(self, at_ns: int, seq: int, data: bytes) -> list[Piece]:
        """Take the data of a segment; return what is in order now."""
        if self.first is None:
            self.begin(seq)
        start = self._unwrapped(seq)
        if start == self.next and not self._held:
            self.next += len(data)
            self._pass_end()
            return [Piece(at_ns, start, data)]
        if start < self.next:
            self.repeated += 1
            data = data[self.next - start :]
            start = self.next
        self._hold(at_ns, start, data)
        pieces = self._in_order()
        while self._held_bytes > MAX_HELD or (
            self._held and self._room.held > MAX_HELD_IN_ALL
        ):
            pieces += self._lose(self._held[0].start)
        return pieces

    def finish(self, seq: int) -> None:
        """The stream ends before this number, which is the FIN's."""
        if self.first is None:
            self.begin(seq)
        if self._end is None:
            self._end = self._unwrapped(seq)
        self._pass_end()

    def acknowledged(self, at_ns: int, ack: int) -> list[Piece]:
        """The other end has all before this number: what is not here is lost."""
        if self.first is None:
            self.begin(ack)
        missing = (ack - self.next) % _MODULUS
        if not 0 < missing <= _LARGEST_WINDOW:
            return []
        until = self.next + missing
        return self._lose(until if self._end is None else min(until, self._end), at_ns)

    def flush(self) -> list[Piece]:
        """Return what waits, and what is missing before it: nothing more comes."""
        pieces: list[Piece] = []
        while self._held:
            pieces += self._lose(self._held[0].start)
        return pieces

    def close(self) -> None:
        """Give back what waits."""
        self._room.held -= self._held_bytes
        self._held_bytes = 0
        self._held = []

    def _unwrapped(self, seq: int) -> int:
        return self.next + (seq - self.next + _HALF) % _MODULUS - _HALF

    def _hold(self, at_ns: int, start: int, data: bytes) -> None:
        """Keep those bytes that no segment before has brought."""
        held = self._held
        at = bisect_right(held, start, key=lambda one: one.start)
        if at and (before := held[at - 1]).start + len(before.data) > start:
            self.repeated += 1
            covered = before.start + len(before.data) - start
            data = data[covered:]
            start += covered
        while data:
            room = held[at].start - start if at < len(held) else len(data)
            if part := data[:room]:
                held.insert(at, _Held(start, at_ns, part))
                self._count(len(part) + _HELD_OVERHEAD)
                at += 1
            if room >= len(data):
                return
            self.repeated += 1
            covered = room + len(held[at].data)
            data = data[covered:]
            start += covered
            at += 1

    def _count(self, held: int) -> None:
        self._held_bytes += held
        self._room.held += held

    def _in_order(self) -> list[Piece]:
        """Return what follows without a gap."""
        pieces = []
        taken = 0
        for start, at_ns, data in self._held:
            if start > self.next:
                break
            taken += 1
            self._count(-len(data) - _HELD_OVERHEAD)
            pieces.append(Piece(at_ns, start, data))
            self.next = start + len(data)
        del self._held[:taken]
        self._pass_end()
        return pieces

    def _lose(self, until: int, at_ns: int = 0) -> list[Piece]:
        """Give up what is missing before a number; return what waited for it."""
        pieces = self._in_order()
        while self.next < until:
            end = min(until, self._held[0].start) if self._held else until
            when = at_ns or self._held[0].at_ns
            pieces.append(Piece(when, self.next, b"", end - self.next))
            self.next = end
            pieces += self._in_order()
        return pieces

    def _pass_end(self) -> None:
        if self.next == self._end:
            self.next += 1
