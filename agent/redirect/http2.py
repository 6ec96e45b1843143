"""Relay HTTP/2, and with it gRPC, between two connections, and write the context.

Two h2 connections, a server's to DOWN and a client's to UP, with the same stream ids.
h2 is fed frame by frame; what it would answer itself, but only the far end can, never
reaches it. The relay shall not be noticed by what both ends accept:

- headers go as they came, pseudo headers first, never-indexed ones kept so; neither
  their names nor their values are judged here;
- the limits are those of the far end: INITIAL_WINDOW_SIZE, MAX_CONCURRENT_STREAMS,
  MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE and ENABLE_CONNECT_PROTOCOL are passed on, DOWN
  gets its SETTINGS when UP has sent them. HPACK's tables and push are each side's own:
  4096 bytes, and refused;
- PING goes to the far end, and its answer back: a keep-alive of gRPC measures and
  guards the whole way, and a server's "too many pings" counts what the client sent;
- GOAWAY goes through with the last stream's id, the first as the second of a graceful
  shutdown, RST_STREAM with its code, after what was sent before it;
- PRIORITY and frames of extensions are hop by hop, and end here.

Flow control: a stream's window is the receiver's, its credit passed on as it gives it.
So what a slow stream cannot deliver waits at the sender, and takes nothing from others.
The connection's window is the relay's own, CONNECTION_WINDOW: credit comes back when
the far side's socket has taken the bytes (`drained`). That bounds what is held.

A connection that breaks the protocol gets GOAWAY; then both are aborted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ECONNRESET

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import (
    DenialOfServiceError,
    FrameTooLargeError,
    H2Error,
    ProtocolError,
    TooManyStreamsError,
)
from h2.settings import SettingCodes, Settings
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple
from podspan.agent.exchange import FLAG_INJECTED, End, Link
from podspan.agent.redirect import layer
from podspan.agent.redirect.inject import (
    Direction,
    Given,
    Propagation,
    apply_to_headers,
    context_of_stream,
    edit_for,
)
from podspan.agent.redirect.layer import Action, Send, Side, StreamRecord

Headers = list[HeaderTuple]

# As many as bpf/context.h keeps by default; losing one costs a level of the tree.
RECEIVED_IDS_MAX = 16384


class ReceivedIds:
    """Span ids that requests brought into a pod; the latest ones."""

    def __init__(self) -> None:
        self._ids: dict[int, None] = {}

    def add(self, span_id: int) -> None:
        """Remember one, and forget the oldest where there are too many."""
        self._ids[span_id] = None
        if len(self._ids) > RECEIVED_IDS_MAX:
            del self._ids[next(iter(self._ids))]

    def __contains__(self, span_id: int) -> bool:
        """Tell whether a request brought this id lately."""
        return span_id in self._ids


PREFACE_LENGTH = 24  # RFC 9113 section 3.4
FRAME_HEAD = 9  # length in 3 bytes, type, flags, stream id in 4

# RFC 9113 section 6.
DATA, HEADERS, PRIORITY, SETTINGS, PUSH_PROMISE, PING, GOAWAY, CONTINUATION = (
    0, 1, 2, 4, 5, 6, 7, 9
)  # fmt: skip
ACK = 0x1
END_HEADERS = 0x4
LAST_CODE = 0xD  # HTTP_1_1_REQUIRED, the last of RFC 9113 section 7

# What one connection can make the relay hold each way, beside the heads of its streams.
CONNECTION_WINDOW = 1 << 20
# Bytes that a side does not read: its window's DATA and as much again of other frames.
BACKLOG_MAX = 4 << 20
# h2 decodes a head whole before it is judged. Envoy's limit is 60 KiB, Go's 1 MiB.
HEADER_LIST_MAX = 256 << 10
FRAME_SIZE_MAX = 64 << 10
HEADER_TABLE_MAX = 4096
SETTINGS_UNACKNOWLEDGED_MAX = 100

# Rapid reset, Envoy's rule (conn_manager_impl.cc): streams that the client resets young
# and unanswered, when they are half of all, or cannot be less once there are so many.
PREMATURE_NS = 2_000_000_000
PREMATURE_STREAMS = 500

_PASSED_ON = {
    Side.UP: frozenset(
        {
            SettingCodes.INITIAL_WINDOW_SIZE,
            SettingCodes.MAX_FRAME_SIZE,
            SettingCodes.MAX_HEADER_LIST_SIZE,
        }
    ),
    Side.DOWN: frozenset(
        {
            SettingCodes.INITIAL_WINDOW_SIZE,
            SettingCodes.MAX_FRAME_SIZE,
            SettingCodes.MAX_HEADER_LIST_SIZE,
            SettingCodes.MAX_CONCURRENT_STREAMS,
            SettingCodes.ENABLE_CONNECT_PROTOCOL,
        }
    ),
}
_AT_MOST = {
    SettingCodes.MAX_FRAME_SIZE: FRAME_SIZE_MAX,
    SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST_MAX,
}

# A record's texts are cut as the kernel's are (bpf/exchange.h), in bytes.
_REQUEST_TEXTS = {
    b":method": ("method", 16),
    b":path": ("target", 256),
    b":authority": ("authority", 96),
    b"host": ("host", 96),
    b"user-agent": ("user_agent", 96),
    b"x-request-id": ("request_id", 40),
    b"x-client-trace-id": ("client_trace_id", 40),
}
_GRPC_TEXTS = {b"grpc-status": ("grpc_status", 16), b"grpc-message": ("message", 256)}


@dataclass(slots=True)
class _Body:
    data: bytes
    end: bool


@dataclass(slots=True)
class _Trailers:
    headers: Headers


@dataclass(slots=True)
class _Reset:
    code: int


_Waiting = deque[_Body | _Trailers | _Reset]


@dataclass(slots=True)
class _Stream:
    """A stream on both connections; the texts are those of its record."""

    id: int
    given: Given
    first_ns: int
    texts: dict[str, str]
    waiting: dict[Side, _Waiting] = field(
        default_factory=lambda: {Side.DOWN: deque(), Side.UP: deque()}
    )
    ended: dict[Side, bool] = field(  # that side sends no more
        default_factory=lambda: {Side.DOWN: False, Side.UP: False}
    )
    request_last_ns: int = 0
    response_first_ns: int = 0
    response_last_ns: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    status: int = 0
    reported: bool = False


class _Connection(H2Connection):
    """h2's connection, with the relay's limits."""

    MAX_CLOSED_STREAMS = 1024
    DEFAULT_MAX_HEADER_LIST_SIZE = HEADER_LIST_MAX


class _Peer:
    """One side: its connection, and what waits for it."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.client = side is Side.UP  # what we are to it
        self.h2 = _Connection(
            H2Configuration(
                client_side=self.client,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
            )
        )
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.preface_left = 0 if self.client else PREFACE_LENGTH
        self.settled = False  # it has sent its SETTINGS
        self.started = False  # it has been sent ours
        self.in_headers = False
        self.settings_in_doubt = 0
        self.goaway_last: int | None = None
        self.blocked: dict[int, _Stream] = {}  # streams with something `waiting` for it
        self.backlog = 0  # bytes sent to it since it was last drained
        self.undrained = 0  # of these, bytes of DATA
        self.owed = 0  # credit of its connection's window that was not yet given back
        self.finished = False
        self.fin_sent = False


class Http2:
    """The layer for connections that begin with HTTP/2's preface."""

    def __init__(
        self,
        direction: Direction,
        options: Propagation,
        now_ns: Callable[[], int],
        random64: Callable[[], int],
        received_ids: ReceivedIds | None = None,
    ) -> None:
        """`received_ids` are those of all connections that enter the same pod."""
        self._received_ids = ReceivedIds() if received_ids is None else received_ids
        self._direction = direction
        self._options = options
        self._now = now_ns
        self._random64 = random64
        self._application = Side.DOWN if direction is Direction.OUTBOUND else Side.UP
        self._peers = {side: _Peer(side) for side in Side}
        self._streams: dict[int, _Stream] = {}
        self._actions: list[Action] = []
        self._now_ns = 0
        self._closed_streams = 0
        self._premature_resets = 0
        self._first_end: Side | None = None
        self._over = False

    def received(self, side: Side, data: bytes) -> list[Action]:
        """Bytes have come from that side, cut anywhere."""
        if self._over:
            return []
        self._now_ns = self._now()
        peer = self._peers[side]
        peer.incoming += data
        try:
            self._read(peer)
        except H2Error as error:
            self._broken(peer, error)
        return self._take()

    def ended(self, side: Side) -> list[Action]:
        """That side has sent FIN: the other gets it after what waits for it."""
        if self._over:
            return []
        self._now_ns = self._now()
        peer = self._peers[side]
        peer.finished = True
        if self._first_end is None:
            self._first_end = side
        if self._peers[side.other].finished:
            self._finish_all(self._end_by(self._first_end, End.CLOSED_THERE), 0)
        return self._take()

    def lost(self, side: Side) -> list[Action]:
        """That side has sent RST or failed: the last call but for the other side's."""
        if self._over:
            return []
        self._now_ns = self._now()
        self._finish_all(self._end_by(side, End.RESET), ECONNRESET)
        self._over = True
        self._actions.append(layer.Abort("reset"))
        return self._take()

    def drained(self, side: Side) -> list[Action]:
        """What was sent to that side has left our buffer: the other may send on."""
        peer, sender = self._peers[side], self._peers[side.other]
        peer.backlog = 0
        if self._over:
            return []
        self._owe(sender, peer.undrained)
        peer.undrained = 0
        return self._take()

    # Reading.

    def _read(self, peer: _Peer) -> None:
        """Feed h2 with whole frames, each on its own."""
        incoming = peer.incoming
        at = min(peer.preface_left, len(incoming))
        if at:
            peer.h2.receive_data(bytes(incoming[:at]))
            peer.preface_left -= at
        size = len(incoming)
        while size - at >= FRAME_HEAD:
            length = int.from_bytes(incoming[at : at + 3], "big")
            if length > peer.h2.max_inbound_frame_size:
                raise FrameTooLargeError(f"a frame of {length} bytes")
            after = at + FRAME_HEAD + length
            if size < after:
                break
            self._frame(peer, bytes(incoming[at:after]))
            at = after
        del incoming[:at]

    def _frame(self, peer: _Peer, frame: bytes) -> None:
        kind, flags = frame[3], frame[4]
        if not peer.settled and (kind != SETTINGS or flags & ACK):
            raise ProtocolError("SETTINGS are not the first frame")
        other = self._peers[peer.side.other]
        # Between the parts of a head there is no other frame: h2 says so.
        if not peer.in_headers:
            if kind == PING and len(frame) == FRAME_HEAD + 8 and not any(frame[5:9]):
                self._flush(other)
                other.outgoing += frame
                return
            if kind == PRIORITY or kind > CONTINUATION:
                return
        if kind in (HEADERS, PUSH_PROMISE, CONTINUATION):
            peer.in_headers = not flags & END_HEADERS
        if kind == GOAWAY:
            self._flush(peer)
            with _kept_open(peer):
                events = peer.h2.receive_data(frame)
        elif kind == DATA and len(frame) == FRAME_HEAD:
            with _no_debt(peer, int.from_bytes(frame[5:9], "big")):
                events = peer.h2.receive_data(frame)
        else:
            events = peer.h2.receive_data(frame)
        for event in events:
            self._event(peer, other, event)

    def _event(self, peer: _Peer, other: _Peer, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._data(peer, other, event)
        elif isinstance(event, RequestReceived):
            self._request(peer, other, event)
        elif isinstance(event, ResponseReceived):
            self._response(peer, other, event)
        elif isinstance(event, TrailersReceived):
            self._trailers(peer, other, event)
        elif isinstance(event, WindowUpdated):
            self._window_updated(peer, other, event)
        elif isinstance(event, StreamReset):
            self._stream_reset(peer, other, event)
        elif isinstance(event, InformationalResponseReceived):
            self._informational(other, event)
        elif isinstance(event, RemoteSettingsChanged):
            self._settings(peer, other, event)
        elif isinstance(event, SettingsAcknowledged):
            peer.settings_in_doubt = max(0, peer.settings_in_doubt - 1)
            # What it was told is the far end's wish; what we decode is our own limit.
            peer.h2.decoder.max_header_list_size = HEADER_LIST_MAX
        elif isinstance(event, ConnectionTerminated):
            self._goaway(peer, other, event)

    # What h2 made of a frame. `peer` sent it, `other` is to get it.

    def _request(self, peer: _Peer, other: _Peer, event: RequestReceived) -> None:
        headers = _head(event.headers)
        stream_id = event.stream_id
        peer.h2.streams[stream_id]._expected_content_length = None
        last = other.goaway_last
        if last is not None and stream_id > last:
            self._refuse(peer, stream_id)
            return
        given, headers = self._with_context(headers)
        try:
            other.h2.send_headers(
                stream_id, headers, end_stream=event.stream_ended is not None
            )
        except TooManyStreamsError:  # UP allows fewer than DOWN has yet heard of
            self._refuse(peer, stream_id)
            return
        stream = _Stream(
            stream_id, given, self._now_ns, _texts(headers, _REQUEST_TEXTS)
        )
        stream.request_last_ns = self._now_ns
        self._streams[stream_id] = stream
        if event.stream_ended is not None:
            self._end_of(peer, stream)

    def _sending(self, side: Side, stream_id: int | None) -> _Stream | None:
        """Return the stream, unless the far end no longer wants what `side` sends."""
        stream = self._streams.get(stream_id or 0)
        return None if stream is None or stream.ended[side] else stream

    def _refuse(self, peer: _Peer, stream_id: int) -> None:
        _reset(peer, stream_id, ErrorCodes.REFUSED_STREAM)
        self._actions.append(layer.Count("http2_refused"))

    def _with_context(self, headers: Headers) -> tuple[Given, Headers]:
        """Decide the context of a request, and write it where it is not yet."""
        given = context_of_stream(
            headers,
            self._direction,
            self._options,
            self._random64,
            self._received_ids.__contains__,
        )
        if self._direction is Direction.INBOUND and given.link == Link.HEADER:
            self._received_ids.add(given.parent_id)
            return given, headers
        edit = edit_for(headers, given, self._options)
        # A line that stays is the same object. Ours come once and never again: in the
        # tables of the compression they would only push out what does.
        return given, [
            header
            if isinstance(header, HeaderTuple)
            else NeverIndexedHeaderTuple(*header)
            for header in apply_to_headers(headers, edit)
        ]

    def _informational(
        self, other: _Peer, event: InformationalResponseReceived
    ) -> None:
        stream = self._sending(Side.UP, event.stream_id)
        if stream is not None:
            other.h2.send_headers(stream.id, _head(event.headers))

    def _response(self, peer: _Peer, other: _Peer, event: ResponseReceived) -> None:
        peer.h2.streams[event.stream_id]._expected_content_length = None
        stream = self._sending(peer.side, event.stream_id)
        if stream is None:
            return
        headers = _head(event.headers)
        stream.response_first_ns = stream.response_last_ns = self._now_ns
        stream.status = _status(headers)
        stream.texts |= _texts(headers, _GRPC_TEXTS)
        ended = event.stream_ended is not None
        other.h2.send_headers(stream.id, headers, end_stream=ended)
        if ended:
            self._end_of(peer, stream)

    def _trailers(self, peer: _Peer, other: _Peer, event: TrailersReceived) -> None:
        stream = self._sending(peer.side, event.stream_id)
        if stream is None:
            return
        headers = _headers(event.headers)
        if peer.side is Side.UP:
            stream.response_last_ns = self._now_ns
            stream.texts |= _texts(headers, _GRPC_TEXTS)
        else:
            stream.request_last_ns = self._now_ns
        self._wait(other, stream, _Trailers(headers))
        self._end_of(peer, stream)

    def _data(self, peer: _Peer, other: _Peer, event: DataReceived) -> None:
        stream = self._sending(peer.side, event.stream_id)
        data = event.data or b""
        flow = event.flow_controlled_length
        if stream is None:
            self._owe(peer, flow)
            return
        if peer.side is Side.UP:
            stream.response_last_ns = self._now_ns
            stream.response_bytes += len(data)
        else:
            stream.request_last_ns = self._now_ns
            stream.request_bytes += len(data)
        ended = event.stream_ended is not None
        padding = flow - len(data)
        if padding:  # it goes no further
            self._owe(peer, padding)
            if not ended:
                peer.h2.increment_flow_control_window(padding, stream.id)
        if data or ended:
            self._wait(other, stream, _Body(data, ended))
        if ended:
            self._end_of(peer, stream)

    def _stream_reset(self, peer: _Peer, other: _Peer, event: StreamReset) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        code = int(event.error_code or 0)
        self._discard(peer, stream)
        # A server may answer, and then reset what it does not want to read.
        if stream.ended[Side.UP]:
            self._finish(stream, End.COMPLETE, 0)
        else:
            known = code if code <= LAST_CODE else int(ErrorCodes.INTERNAL_ERROR)
            self._finish(stream, self._end_by(peer.side, End.RESET), known)
        stream.ended[Side.DOWN] = stream.ended[Side.UP] = True
        self._wait(other, stream, _Reset(code))
        if peer.side is Side.DOWN:
            self._judge_reset(stream)

    def _judge_reset(self, stream: _Stream) -> None:
        if stream.status or self._now_ns - stream.first_ns >= PREMATURE_NS:
            return
        self._premature_resets += 1
        if self._premature_resets * 2 >= max(self._closed_streams, PREMATURE_STREAMS):
            raise DenialOfServiceError("too many streams are opened and reset")

    def _window_updated(self, peer: _Peer, other: _Peer, event: WindowUpdated) -> None:
        if not event.stream_id:
            self._send_waiting(peer)
            return
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        if not stream.ended[other.side]:
            other.h2.increment_flow_control_window(event.delta or 0, stream.id)
        if stream.id in peer.blocked:
            self._send_waiting(peer)

    def _settings(
        self, peer: _Peer, other: _Peer, event: RemoteSettingsChanged
    ) -> None:
        _bound_table(peer)
        passed: dict[SettingCodes | int, int] = {
            code: min(changed.new_value, _AT_MOST.get(code, changed.new_value))
            for code, changed in event.changed_settings.items()
            if isinstance(code, SettingCodes) and code in _PASSED_ON[other.side]
        }
        if not peer.settled:
            peer.settled = True
            _start(other, passed)
        elif passed:
            self._flush(other)
            other.h2.update_settings(passed)
            other.settings_in_doubt += 1
        if not peer.started:
            peer.settings_in_doubt += 1
        if max(peer.settings_in_doubt, other.settings_in_doubt) > (
            SETTINGS_UNACKNOWLEDGED_MAX
        ):
            raise DenialOfServiceError("too many SETTINGS")
        self._send_waiting(peer)

    def _goaway(self, peer: _Peer, other: _Peer, event: ConnectionTerminated) -> None:
        last = event.last_stream_id or 0
        with _kept_open(other):
            other.h2.close_connection(
                event.error_code or 0, event.additional_data, last
            )
        if peer.side is Side.DOWN:  # it speaks of streams that a server opens
            return
        peer.goaway_last = last
        for stream in [s for s in self._streams.values() if s.id > last]:
            self._discard(peer, stream)
            self._discard(other, stream)
            self._finish(stream, End.RESET, int(ErrorCodes.REFUSED_STREAM))
            _reset(other, stream.id, ErrorCodes.REFUSED_STREAM)
            del self._streams[stream.id]

    # Sending, as far as windows allow.

    def _wait(
        self, to: _Peer, stream: _Stream, what: _Body | _Trailers | _Reset
    ) -> None:
        """Send it after what waits, at once if nothing does and there is room."""
        waiting = stream.waiting[to.side]
        waiting.append(what)
        if len(waiting) == 1:
            while self._send_one(to, stream):
                pass
            if waiting:
                to.blocked[stream.id] = stream

    def _send_waiting(self, to: _Peer) -> None:
        """Send a frame of each stream in turn until there is no room."""
        sent = True
        while sent and to.blocked:
            sent = False
            for stream in list(to.blocked.values()):
                if not self._send_one(to, stream):
                    continue
                sent = True
                del to.blocked[stream.id]
                if stream.waiting[to.side]:
                    to.blocked[stream.id] = stream

    def _send_one(self, to: _Peer, stream: _Stream) -> bool:
        """Send one frame of what waits; False if nothing does, or there is no room."""
        waiting = stream.waiting[to.side]
        if not waiting:
            return False
        what = waiting[0]
        if isinstance(what, _Body) and not _send_body(to, stream.id, what):
            return False
        if isinstance(what, _Trailers):
            if what.headers:
                to.h2.send_headers(stream.id, what.headers, end_stream=True)
            else:
                to.h2.end_stream(stream.id)
        elif isinstance(what, _Reset):
            _reset(to, stream.id, what.code)
        if not (isinstance(what, _Body) and what.data):
            waiting.popleft()
            self._forget_if_done(stream)
        return True

    def _discard(self, to: _Peer, stream: _Stream) -> None:
        """Drop what waits for that side; the other gets its credit back."""
        waiting = stream.waiting[to.side]
        size = sum(len(what.data) for what in waiting if isinstance(what, _Body))
        waiting.clear()
        to.blocked.pop(stream.id, None)
        self._owe(self._peers[to.side.other], size)

    def _owe(self, peer: _Peer, size: int) -> None:
        """Give back credit of the connection's window, in large pieces."""
        peer.owed += size
        if peer.owed >= CONNECTION_WINDOW // 4:
            peer.h2.increment_flow_control_window(peer.owed)
            peer.owed = 0

    # The end of streams and of the connection.

    def _end_of(self, peer: _Peer, stream: _Stream) -> None:
        stream.ended[peer.side] = True
        self._forget_if_done(stream)

    def _forget_if_done(self, stream: _Stream) -> None:
        if not (stream.ended[Side.DOWN] and stream.ended[Side.UP]):
            return
        if stream.waiting[Side.DOWN] or stream.waiting[Side.UP]:
            return
        if self._streams.pop(stream.id, None) is not None:
            self._finish(stream, End.COMPLETE, 0)

    def _end_by(self, side: Side, by_peer: End) -> End:
        """Return how it ended when that side ended it."""
        return End.CLOSED_HERE if side is self._application else by_peer

    def _finish_all(self, end: End, error: int) -> None:
        for stream in self._streams.values():
            if stream.ended[Side.UP]:
                self._finish(stream, End.COMPLETE, 0)
            else:
                self._finish(stream, end, error)
        self._streams.clear()

    def _finish(self, stream: _Stream, end: End, error: int) -> None:
        if stream.reported:
            return
        stream.reported = True
        self._closed_streams += 1
        self._actions.append(layer.Report(_record(stream, self._direction, end, error)))

    def _broken(self, peer: _Peer, error: H2Error) -> None:
        """Tell the side that broke the protocol, and give both up."""
        code = getattr(error, "error_code", ErrorCodes.PROTOCOL_ERROR)
        if peer.h2.state_machine.state is not ConnectionState.CLOSED:
            peer.h2.close_connection(code)
        flood = code == ErrorCodes.ENHANCE_YOUR_CALM
        self._give_up(peer, int(code), "http2_flood" if flood else "http2_malformed")

    def _give_up(self, peer: _Peer, code: int, reason: str) -> None:
        self._finish_all(self._end_by(peer.side, End.RESET), code)
        self._over = True
        if peer.started or not peer.client:
            self._flush(peer)
        self._actions.append(layer.Abort(reason))

    def _flush(self, peer: _Peer) -> None:
        """Take from h2 what it has to send; before our SETTINGS nothing may go."""
        if peer.started or self._over:
            peer.outgoing += peer.h2.data_to_send()

    def _take(self) -> list[Action]:
        """Return what is to be done: bytes first."""
        sends: list[Action] = []
        for peer in self._peers.values():
            if not self._over:
                self._flush(peer)
            if peer.outgoing:
                peer.backlog += len(peer.outgoing)
                sends.append(Send(peer.side, bytes(peer.outgoing)))
                peer.outgoing.clear()
        for peer in self._peers.values():
            if peer.backlog > BACKLOG_MAX and not self._over:
                self._give_up(peer, int(ErrorCodes.ENHANCE_YOUR_CALM), "http2_backlog")
        actions = [*sends, *self._actions]
        self._actions = []
        if not self._over:
            actions += self._fins()
        return actions

    def _fins(self) -> Iterable[Action]:
        for peer in self._peers.values():
            other = self._peers[peer.side.other]
            if peer.finished and not other.fin_sent and not other.blocked:
                other.fin_sent = True
                yield layer.End(other.side)


def _start(peer: _Peer, passed: dict[SettingCodes | int, int]) -> None:
    """Send our SETTINGS, and what h2 had to say before."""
    h2 = peer.h2
    early = h2.data_to_send()
    # Ours hold when they are acknowledged; until then, the protocol's defaults.
    ours = {
        SettingCodes.ENABLE_PUSH: 0,
        SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST_MAX,
    }
    h2.local_settings = Settings(peer.client, ours | passed)  # type: ignore[arg-type]
    h2.initiate_connection()
    h2.local_settings = Settings(peer.client, ours)
    h2.local_settings.update(passed)
    h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
    peer.started = True
    peer.settings_in_doubt = 1
    peer.outgoing += h2.data_to_send() + early


@contextmanager
def _kept_open(peer: _Peer) -> Iterator[None]:
    """Let h2 see a GOAWAY, after which it would close: streams go on."""
    state = peer.h2.state_machine.state
    yield
    peer.h2.state_machine.state = state


@contextmanager
def _no_debt(peer: _Peer, stream_id: int) -> Iterator[None]:
    """Let h2 take an empty DATA frame where a smaller INITIAL_WINDOW_SIZE left a debt.

    It needs no window (RFC 9113 section 6.9.1); h2 4.4 says it does.
    """
    stream = peer.h2.streams.get(stream_id)
    if stream is None:
        yield
        return
    window = stream._inbound_window_manager
    debt = min(window.current_window_size, 0)
    window.current_window_size -= debt
    yield
    window.current_window_size += debt


def _bound_table(peer: _Peer) -> None:
    """Keep our encoder's table small, however much memory the peer would give."""
    encoder = peer.h2.encoder
    if encoder.header_table_size > HEADER_TABLE_MAX:
        encoder.header_table_size = HEADER_TABLE_MAX
        changes = encoder.table_size_changes
        encoder.table_size_changes = [s for s in changes if s <= HEADER_TABLE_MAX]


def _send_body(to: _Peer, stream_id: int, body: _Body) -> bool:
    """Send a frame of it as far as the windows allow; False if they do not."""
    h2 = to.h2
    size = len(body.data)
    if size:
        room = min(h2.local_flow_control_window(stream_id), h2.max_outbound_frame_size)
        if room <= 0:
            return False
        size = min(size, room)
    rest = body.data[size:]
    h2.send_data(stream_id, body.data[:size], end_stream=body.end and not rest)
    to.undrained += size
    body.data = rest
    return True


def _reset(peer: _Peer, stream_id: int, code: int) -> None:
    """Reset the stream, unless it is closed."""
    stream = peer.h2.streams.get(stream_id)
    if stream is not None and not stream.closed:
        peer.h2.reset_stream(stream_id, code)


def _headers(headers: Iterable[object] | None) -> Headers:
    """Return them typed as what h2 gives without an encoding."""
    return [header for header in headers or () if isinstance(header, HeaderTuple)]


def _head(headers: Iterable[object] | None) -> Headers:
    """Return the headers of a request or response: h2 cannot send none."""
    found = _headers(headers)
    if not found:
        raise ProtocolError("a head without a header")
    return found


def _texts(headers: Headers, wanted: dict[bytes, tuple[str, int]]) -> dict[str, str]:
    """Return texts by their record's field; of a repeated name the first counts."""
    found: dict[str, str] = {}
    for name, value in headers:
        if name in wanted:
            key, cut = wanted[name]
            found.setdefault(key, value[:cut].decode("utf-8", "replace").rstrip(" \t"))
    return found


def _status(headers: Headers) -> int:
    for name, value in headers:
        if name == b":status":
            return int(value) if len(value) == 3 and value.isdigit() else 0
    return 0


def _record(
    stream: _Stream, direction: Direction, end: End, error: int
) -> StreamRecord:
    given, texts = stream.given, stream.texts
    outbound = direction is Direction.OUTBOUND
    return StreamRecord(
        trace_id=given.trace_id,
        span_id=given.span_id,
        parent_id=given.parent_id,
        flags=given.flags | (FLAG_INJECTED if outbound else 0),
        link=given.link,
        request_first_ns=stream.first_ns,
        request_last_ns=stream.request_last_ns,
        response_first_ns=stream.response_first_ns,
        response_last_ns=stream.response_last_ns,
        request_bytes=stream.request_bytes,
        response_bytes=stream.response_bytes,
        status=stream.status,
        end=int(end),
        error=error,
        method=texts.get("method", ""),
        target=texts.get("target", "") or texts.get("authority", ""),
        host=texts.get("authority", "") or texts.get("host", ""),
        user_agent=texts.get("user_agent", ""),
        request_id=texts.get("request_id", ""),
        client_trace_id=texts.get("client_trace_id", ""),
        grpc_status=texts.get("grpc_status", ""),
        grpc_message=texts.get("message", ""),
    )
