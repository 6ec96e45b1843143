"""Which TCP connections a capture has, from their first segment to their last.

Segments in; calls and connections, as they end, to a Listener. Counted by reason:

    copies             packets that were captured at more than one interface
    gap_bytes          bytes that the capture lacks
    snaplen_bytes      of them, those that the snapshot length cut off
    late               segments with data after the connection's end
    silent             connections without a byte
    unanswered         connections that nobody accepted or refused
    given_up           connections beyond the bound, the longest idle first
    no_request         connections that may speak HTTP: no request of theirs is whole
    role_unknown       of which the capture has no begin, and nothing says who called
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from podspan.agent.exchange import End
from podspan.agent.http_head import RequestHead
from podspan.agent.replay.messages import Call, Conversation, Ending
from podspan.agent.replay.packets import ACK, FIN, RST, SYN, Segment
from podspan.agent.replay.streams import Piece, Room, Stream

# As many as the agent traces by default, and as many again.
MAX_OPEN = 32768
MAX_CLOSED = 16384

# Packets that a copy may be behind: it comes within microseconds.
MAX_MARKS = 8192

# Linux gives clients ports from here on (ip_local_port_range), others higher ones.
FIRST_CLIENT_PORT = 32768


@dataclass(slots=True, eq=False)
class Connection:
    """A connection as far as it has come. Ends, sides and streams go by 0 and 1."""

    ends: tuple[bytes, bytes]
    streams: tuple[Stream, Stream]
    conversation: Conversation = field(init=False)
    connect_start_ns: int = 0
    connect_end_ns: int = 0
    answered: bool = False  # by the server's SYN, or any byte
    first_ns: list[int] = field(default_factory=lambda: [0, 0])  # of each side's bytes
    last_ns: list[int] = field(default_factory=lambda: [0, 0])
    sizes: list[int] = field(default_factory=lambda: [0, 0])
    reported: list[int] = field(default_factory=lambda: [0, 0])  # retransmits
    syns_repeated: int = 0
    fins: list[int] = field(default_factory=list)  # sides whose streams have ended
    tunneled: bool = False

    @property
    def client(self) -> int | None:
        """The side that called; None where that is not known."""
        return self.conversation.client

    @property
    def server(self) -> int:
        """The side that is called; has a meaning where the client is known."""
        return 1 - (self.client or 0)

    @property
    def client_end(self) -> bytes:
        """Address and port of who called."""
        return self.ends[self.client or 0]

    @property
    def server_end(self) -> bytes:
        """Address and port of who was called."""
        return self.ends[self.server]

    def retransmits(self, side: int) -> int:
        """Return how many segments that side has sent again since the last report."""
        since = self.streams[side].repeated - self.reported[side]
        self.reported[side] += since
        return since

    def begin_tunnel(self, at_ns: int) -> None:
        """Count anew: what came until now was HTTP."""
        self.tunneled = True
        for side, size in enumerate(self.conversation.tunnel_sizes):
            self.sizes[side] = size
            self.first_ns[side] = self.last_ns[side] = at_ns if size else 0


class Listener(Protocol):
    """Hears of what is seen, in the order in which it is."""

    def began(
        self, connection: Connection, call: Call, head: RequestHead, text: bytes
    ) -> None:
        """A request's head has come."""

    def finished(self, connection: Connection, call: Call, ending: Ending) -> None:
        """Its call is over."""

    def carried(
        self, connection: Connection, ending: Ending, tunnel: Call | None
    ) -> None:
        """A connection is over that spoke no HTTP/1, or no longer."""

    def refused(self, connection: Connection) -> None:
        """A connection was never made."""


INTERVAL = Ending(End.INTERVAL, End.INTERVAL)
_FIN_OF_CLIENT = Ending(End.CLOSED_HERE, End.CLOSED_THERE)
_FIN_OF_SERVER = Ending(End.CLOSED_THERE, End.CLOSED_HERE)
_RST_OF_CLIENT = Ending(End.CLOSED_HERE, End.RESET)
_RST_OF_SERVER = Ending(End.RESET, End.CLOSED_HERE)

_Key = tuple[bytes, bytes]


class Connections:
    """All connections of a capture. At most `max_open` at the same time."""

    def __init__(
        self, listener: Listener, count: Counter[str], max_open: int = MAX_OPEN
    ) -> None:
        self._listener = listener
        self._count = count
        self._max_open = max_open
        self._room = Room()
        self.seen = 0
        self._open: dict[_Key, Connection] = {}  # the longest idle first
        self._closed: dict[_Key, None] = {}
        self._marks: dict[tuple[bytes, bytes, bytes], None] = {}

    def segment(self, at_ns: int, segment: Segment) -> None:
        """Take the next segment."""
        source, destination, seq, _, flags, data, cut, _ = segment
        if source == destination:
            self._count["malformed"] += 1
            return
        if (data or cut or flags & (SYN | FIN | RST)) and self._is_copy(segment):
            self._count["copies"] += 1
            return
        key = (source, destination) if source < destination else (destination, source)
        side = int(source != key[0])
        connection = self._of(key, side, at_ns, segment)
        if connection is None:
            return
        self._open[key] = connection  # again: now the least idle
        if cut:
            self._count["snaplen_bytes"] += cut
        if flags & ACK:
            self._acknowledge(connection, 1 - side, at_ns, segment.ack)
        if data and not flags & RST:
            at = seq + 1 if flags & SYN else seq
            pieces = connection.streams[side].add(at_ns, at, data)
            self._deliver(connection, side, pieces)
        if flags & FIN:
            connection.streams[side].finish(seq + len(data) + cut)
        if flags & RST:
            self._reset(connection, key, side, at_ns)
        else:
            self._end(connection, key, at_ns)
        if len(self._open) > self._max_open:
            self._count["given_up"] += 1
            self._give_up(next(iter(self._open)))

    def close(self) -> None:
        """The capture is over."""
        while self._open:
            self._give_up(next(iter(self._open)))

    def _of(
        self, key: _Key, side: int, at_ns: int, segment: Segment
    ) -> Connection | None:
        """Return the connection of a segment, taken out of the order of idleness."""
        connection = self._open.pop(key, None)
        if segment.flags & SYN:
            return self._syn(connection, key, side, at_ns, segment)
        if connection is None and (segment.data or segment.cut):
            if key not in self._closed:
                return self._new(key, None)
            self._count["late"] += 1
        return connection  # None: nothing to be seen of it yet

    def _is_copy(self, segment: Segment) -> bool:
        mark = segment.source, segment.destination, segment.mark
        if mark in self._marks:
            return True
        self._marks[mark] = None
        if len(self._marks) > MAX_MARKS:
            del self._marks[next(iter(self._marks))]
        return False

    def _new(self, key: _Key, client: int | None) -> Connection:
        self.seen += 1
        connection = Connection(key, (Stream(self._room), Stream(self._room)))
        connection.conversation = Conversation(
            client,
            self._count,
            lambda call, head, text: self._listener.began(connection, call, head, text),
            lambda call, ending: self._listener.finished(connection, call, ending),
        )
        return connection

    def _syn(
        self,
        connection: Connection | None,
        key: _Key,
        side: int,
        at_ns: int,
        segment: Segment,
    ) -> Connection:
        first = segment.seq + 1
        if connection is not None and _is_another(connection, side, first):
            self._open[key] = connection
            self._give_up(key)
            connection = None
        client = 1 - side if segment.flags & ACK else side
        if connection is None:
            self._closed.pop(key, None)
            connection = self._new(key, client)
        stream = connection.streams[side]
        if segment.flags & ACK:
            connection.answered = True
            connection.connect_end_ns = connection.connect_end_ns or at_ns
        elif stream.first is None:
            connection.connect_start_ns = at_ns
        else:
            connection.syns_repeated += 1
        if stream.first is None:
            stream.begin(first)
        return connection

    def _acknowledge(
        self, connection: Connection, side: int, at_ns: int, ack: int
    ) -> None:
        stream = connection.streams[side]
        if stream.first is None or stream.next & 0xFFFFFFFF != ack:
            self._deliver(connection, side, stream.acknowledged(at_ns, ack))

    def _deliver(self, connection: Connection, side: int, pieces: list[Piece]) -> None:
        for piece in pieces:
            size = len(piece.data) or piece.lost
            if not size:
                continue
            connection.answered = True
            connection.first_ns[side] = connection.first_ns[side] or piece.at_ns
            connection.last_ns[side] = max(connection.last_ns[side], piece.at_ns)
            connection.sizes[side] += size
            self._count["gap_bytes"] += piece.lost
            connection.conversation.received(side, piece)
            if connection.conversation.tunnel is not None and not connection.tunneled:
                connection.begin_tunnel(piece.at_ns)

    def _end(self, connection: Connection, key: _Key, at_ns: int) -> None:
        """See whether streams have come to their FIN; two end the connection."""
        for side, stream in enumerate(connection.streams):
            if stream.ended and side not in connection.fins:
                connection.fins.append(side)
                connection.conversation.ended(side, at_ns)
        if len(connection.fins) == 2:
            by_client = connection.fins[0] == connection.client
            self._finish(
                connection, key, _FIN_OF_CLIENT if by_client else _FIN_OF_SERVER
            )

    def _reset(self, connection: Connection, key: _Key, side: int, at_ns: int) -> None:
        for each in (0, 1):
            self._deliver(connection, each, connection.streams[each].flush())
        if not connection.answered and connection.client == 1 - side:
            connection.connect_end_ns = at_ns
            self._listener.refused(connection)
            self._forget(connection, key)
            return
        connection.conversation.reset(side, at_ns)
        by_client = side == connection.client
        self._finish(connection, key, _RST_OF_CLIENT if by_client else _RST_OF_SERVER)

    def _give_up(self, key: _Key) -> None:
        connection = self._open[key]
        for side in (0, 1):
            self._deliver(connection, side, connection.streams[side].flush())
        self._finish(connection, key, INTERVAL)

    def _finish(self, connection: Connection, key: _Key, ending: Ending) -> None:
        """The connection is over, or will not be seen further."""
        conversation = connection.conversation
        if conversation.heads == 0 or conversation.tunnel is not None:
            if conversation.client is None:
                conversation.client = _client_by_port(connection.ends)
            if reason := _why_no_exchange(connection):
                self._count[reason] += 1
            else:
                self._listener.carried(connection, ending, conversation.tunnel)
        conversation.give_up()
        self._forget(connection, key)

    def _forget(self, connection: Connection, key: _Key) -> None:
        for stream in connection.streams:
            stream.close()
        self._open.pop(key, None)
        self._closed[key] = None
        if len(self._closed) > MAX_CLOSED:
            del self._closed[next(iter(self._closed))]


def _is_another(connection: Connection, side: int, first: int) -> bool:
    """Tell whether a SYN is not this connection's: its ports are used again."""
    known = connection.streams[side].first
    return known is not None and (known - first) & 0xFFFFFFFF != 0


def _why_no_exchange(connection: Connection) -> str:
    """Return why a connection without HTTP is nothing to tell of; "": it is."""
    if connection.conversation.tunnel is not None:
        return ""
    if not any(connection.sizes):
        return "silent" if connection.answered else "unanswered"
    if connection.conversation.may_be_http:
        return "no_request"
    return "role_unknown" if connection.client is None else ""


def _client_by_port(ends: tuple[bytes, bytes]) -> int | None:
    """Return the side whose port only clients have."""
    clients = [
        side
        for side in (0, 1)
        if int.from_bytes(ends[side][-2:], "big") >= FIRST_CLIENT_PORT
    ]
    return clients[0] if len(clients) == 1 else None
