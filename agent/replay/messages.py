"""HTTP/1 of one connection: pieces of both streams in, calls out.

Grammar and framing are those of agent/http_head.py, and what an end means is told as
the agent tells it (bpf/message.h, bpf/lifecycle.h). What differs is that a capture may
lack bytes, and may begin in the middle:

- Out of step, by what is missing: all is passed over until a request begins. It can
  only begin where its end speaks after the other one has, and only a whole request line
  is taken for one: what is taken for a request may else be a body.
- What the peers themselves garbled is followed no further: an end that reads it
  otherwise than we do sees other borders. So with what is no HTTP at all.

Losses are counted by reason; those that the agent also has, by its names:

    request_unparsed, response_unparsed, response_unasked, pipelined
    request_early      bytes behind a CONNECT or Upgrade that is not yet answered
    request_cut        its head had not ended when the connection did
    out_of_step        bytes of a message are missing, or it began before the capture
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from podspan.agent.exchange import End
from podspan.agent.http_body import BodyReader
from podspan.agent.http_head import (
    MAX_HEAD,
    Body,
    Framing,
    MalformedHead,
    RequestHead,
    body_framing,
    parse_request,
    parse_response,
)
from podspan.agent.redirect.sniff import Protocol, sniff
from podspan.agent.replay.streams import Piece

# As bpf/message.h: then a connection that was never in step is taken for one that
# speaks no HTTP.
OLD_TURNS = 16

# More than any client is known to send ahead.
MAX_PIPELINED = 512

_HEAD_END = b"\r\n\r\n"
_REQUEST_LINE = re.compile(
    rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,16}+ [\x21-\x7e\x80-\xff]++ HTTP/1\.[0-9]\r\n"
)
_NO_BODY = Framing(Body.NONE)
_EXPECT = b"expect"
_UPGRADE = b"upgrade"


@dataclass(slots=True, eq=False)
class Call:
    """A request and its response, as far as they have come. Times are the capture's."""

    method: bytes
    position: int  # of its first byte: the sequence number, not wrapped
    request_first_ns: int
    request_last_ns: int
    request: BodyReader
    response_first_ns: int = 0
    response_last_ns: int = 0
    response: BodyReader | None = None  # None: no head of it has come
    status: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended, in the eyes of each end."""

    client: End
    server: End


COMPLETE = Ending(End.COMPLETE, End.COMPLETE)
UNTIL_CLOSE = Ending(End.EOF, End.EOF)
NEXT_REQUEST = Ending(End.NEXT_REQUEST, End.NEXT_REQUEST)
UNSEEN = Ending(End.UNSEEN, End.UNSEEN)
CLOSED_BY_CLIENT = Ending(End.CLOSED_HERE, End.CLOSED_HERE)
CLOSED_BY_SERVER = Ending(End.CLOSED_THERE, End.CLOSED_HERE)
RESET_BY_CLIENT = Ending(End.CLOSED_HERE, End.RESET)
RESET_BY_SERVER = Ending(End.RESET, End.CLOSED_HERE)


@dataclass(slots=True)
class _Half:
    """One side's stream."""

    in_step: bool
    certain: bool  # not by looks only
    head: bytes = b""  # of which the end has not come
    checked: int = 0  # bytes of it that may become a head
    first_ns: int = 0  # when its first byte came
    end: int = 0  # sequence number behind its last byte, not wrapped
    body: BodyReader | None = None  # of the message under way

    def lose_step(self) -> None:
        self.in_step = self.certain = False
        self.head = b""
        self.checked = 0
        self.body = None


@dataclass(slots=True)
class Conversation:
    """What is said on a connection; sides are 0 and 1.

    `began` is told of a call, its head and that head's bytes, `finished` of the call
    and how it ended. `client` is None until it is known who that is: known at once
    where the capture has the connection's start.
    """

    client: int | None
    count: Counter[str]
    began: Callable[[Call, RequestHead, bytes], None]
    finished: Callable[[Call, Ending], None]
    heads: int = 0  # requests understood: it speaks HTTP/1
    opaque: bool = False  # followed no further
    tunnel: Call | None = None  # that made it opaque
    tunnel_sizes: tuple[int, int] = (0, 0)  # bytes of it by side, as far as they came
    _calls: deque[Call] = field(default_factory=deque)  # not finished, oldest first
    _spoke: int | None = None  # the side of the last bytes
    _turns: int = 0  # how often another side spoke
    _closed: bool = False
    _ended: int | None = None  # the side that has sent FIN first
    _refusable: bool = False  # the newest waits for 100 (Continue) with its body
    _wants_tunnel: bool = False  # and so does what follows it: CONNECT, Upgrade
    _requests: _Half = field(init=False)
    _responses: _Half = field(init=False)

    def __post_init__(self) -> None:
        whole = self.client is not None
        self._requests = _Half(whole, whole)
        self._responses = _Half(whole, whole)

    @property
    def speaks_other(self) -> bool:
        """Whether this is certainly no HTTP/1."""
        return self.opaque and not self.heads

    @property
    def may_be_http(self) -> bool:
        """Whether requests may have passed, of which none was seen whole."""
        unsure = not self.opaque and not self._requests.in_step
        return unsure and not self.heads and self._turns < OLD_TURNS

    @property
    def idle(self) -> bool:
        """Whether no call is open."""
        return not self._calls

    def received(self, side: int, piece: Piece) -> None:
        """Take a piece of the stream that `side` sends."""
        if self.opaque or self._closed:
            return
        if piece.lost:
            self._lost(side, piece.lost)
        else:
            self._said(side, piece)
        self._turns += self._spoke != side
        self._spoke = side

    def _said(self, side: int, piece: Piece) -> None:
        if (
            self.client is None
            and self._spoke != side
            and _REQUEST_LINE.match(piece.data)
        ):
            self.client = side
        try:
            if side == self.client:
                self._from_client(side, piece)
            elif self.client is not None:
                self._from_server(piece)
        except MalformedHead:
            self._garbled(side)

    def ended(self, side: int, at_ns: int) -> None:
        """A FIN has come from `side`, after all that it sent."""
        if self.opaque or self._closed or self.client is None:
            return
        if self._ended is None:
            self._ended = side
        if side == self.client:
            return
        ending = CLOSED_BY_SERVER if self._ended == side else CLOSED_BY_CLIENT
        self._close(ending, at_ns)

    def reset(self, side: int, at_ns: int) -> None:
        """A RST has come from `side`."""
        if self.opaque or self._closed or self.client is None:
            return
        by_client = side == self.client
        self._close(RESET_BY_CLIENT if by_client else RESET_BY_SERVER, at_ns)

    def give_up(self) -> None:
        """Nothing more of it will be seen."""
        while self._calls:
            self._finish(UNSEEN)
        self.opaque = True

    # -- what the client says

    def _from_client(self, side: int, piece: Piece) -> None:
        half = self._requests
        if not half.in_step:
            if self._spoke == side or not _REQUEST_LINE.match(piece.data):
                return
            half.in_step = True
        data = half.head + piece.data
        half.end = piece.start + len(piece.data)
        start = half.end - len(data)
        at = 0
        while at < len(data) and not self.opaque:
            if half.body is not None:
                at = self._request_body(half.body, data, at, piece.at_ns)
                continue
            if self._wants_tunnel:
                self._keep(half, data[at:], piece.at_ns, "request_early")
                return
            if data.startswith(b"\r\n", at):  # RFC 9112 section 2.2
                at += 2
                continue
            end = self._head_end(half, data, at, piece.at_ns)
            if not end:
                return
            self._begin_request(data[at:end], start + at, piece.at_ns)
            at = end
        half.head = b""

    def _request_body(self, body: BodyReader, data: bytes, at: int, at_ns: int) -> int:
        self._refusable = False
        at = body.take(data, at)
        call = self._newest
        if call is not None and call.request is body:
            call.request_last_ns = max(call.request_last_ns, at_ns)
        if body.done:
            self._requests.body = None
        return at

    def _begin_request(self, text: bytes, position: int, at_ns: int) -> None:
        half = self._requests
        head = parse_request(text)
        if head is None:
            raise MalformedHead("it does not end where it seems to")
        framing = body_framing(head.method, None, head.headers)
        names = {name.lower() for name, _ in head.headers}
        is_connect = head.method == b"CONNECT"
        body = BodyReader(_NO_BODY if is_connect else framing)

        self._begin_turn()
        if len(self._calls) == MAX_PIPELINED:
            self._stop("pipelined")
            return
        call = Call(head.method, position, half.first_ns or at_ns, at_ns, body)
        half.first_ns = 0
        half.certain = True
        self.heads += 1
        self._calls.append(call)
        half.body = None if body.done else body
        self._wants_tunnel = is_connect or _UPGRADE in names
        self._refusable = _EXPECT in names and half.body is not None
        self.began(call, head, text)

    def _begin_turn(self) -> None:
        """A request begins: what can be known of the responses before it?"""
        responses = self._responses
        if not responses.in_step:
            while self._calls:
                self._finish(UNSEEN)
            responses.in_step = True
        elif responses.body is not None and responses.body.until_close:
            responses.body = None
            self._finish(NEXT_REQUEST)

    # -- what the server says

    def _from_server(self, piece: Piece) -> None:
        half = self._responses
        if not half.in_step:
            return
        data = half.head + piece.data
        at = 0
        while at < len(data) and not self.opaque and half.in_step:
            call = self._calls[0] if self._calls else None
            if call is None:
                self._unasked()
                return
            if half.body is not None:
                call.response_last_ns = max(call.response_last_ns, piece.at_ns)
                at = half.body.take(data, at)
                if half.body.done:
                    half.body = None
                    self._finish(COMPLETE)
                continue
            end = self._head_end(half, data, at, piece.at_ns)
            call.response_first_ns = call.response_first_ns or half.first_ns
            call.response_last_ns = max(call.response_last_ns, piece.at_ns)
            if not end:
                return
            self._begin_response(call, data[at:end], piece.at_ns, len(data) - end)
            at = end
        half.head = b""

    def _begin_response(self, call: Call, text: bytes, at_ns: int, left: int) -> None:
        half = self._responses
        head = parse_response(text)
        if head is None:
            raise MalformedHead("it does not end where it seems to")
        call.response_first_ns = call.response_first_ns or at_ns
        call.response_last_ns = max(call.response_last_ns, at_ns)
        half.first_ns = 0
        half.certain = True
        if 100 <= head.status <= 199 and head.status != 101:
            self._refusable = self._refusable and head.status != 100
            call.response_first_ns = 0  # the response proper is still to come
            call.response_last_ns = 0
            return
        call.status = head.status
        if head.status == 101 or _opens_tunnel(call, head.status):
            self._begin_tunnel(call, left)
            return
        if self._wants_tunnel and len(self._calls) == 1:
            self._no_tunnel()
        framing = body_framing(call.method, head.status, head.headers)
        call.response = BodyReader(framing)
        if self._refusable and len(self._calls) == 1:
            # What follows may be the body all the same, may be another request.
            self._lose_step_of_requests()
        if call.response.done:
            self._finish(COMPLETE)
        else:
            half.body = call.response

    def _begin_tunnel(self, call: Call, left: int) -> None:
        """The response has made a tunnel; `left` bytes of what came follow it."""
        if len(self._calls) == 1:
            self.tunnel = call
            early = len(self._requests.head)
            self.tunnel_sizes = (left, early) if self.client else (early, left)
        self._finish(COMPLETE)
        self.give_up()

    def _no_tunnel(self) -> None:
        """What the client has sent already is requests, after all."""
        half = self._requests
        self._wants_tunnel = False
        if half.head and self.client is not None:
            self._from_client(self.client, Piece(half.first_ns, half.end, b""))

    def _unasked(self) -> None:
        """The server speaks, and nobody has asked."""
        if not self.heads and self._requests.in_step:
            self.opaque = True  # as SMTP's and many others' do
            return
        if self._requests.in_step:
            self.count["response_unasked"] += 1
        self._responses.lose_step()

    # -- both

    def _head_end(self, half: _Half, data: bytes, at: int, at_ns: int) -> int:
        """Return where the head that begins at `at` ends; 0: it is kept until then.

        Raises MalformedHead where it cannot become one.
        """
        end = data.find(_HEAD_END, at + max(half.checked - 3, 0)) + 4
        if end < 4:
            self._check(half, data[at:])
            self._keep(half, data[at:], at_ns, "")
            return 0
        half.checked = 0
        if end - at > MAX_HEAD:
            raise MalformedHead(f"head is longer than {MAX_HEAD} bytes")
        return end

    def _check(self, half: _Half, head: bytes) -> None:
        """Raise unless this may become a head. Not at each of many small pieces."""
        if len(head) > MAX_HEAD:
            raise MalformedHead(f"head is longer than {MAX_HEAD} bytes")
        if len(head) < 2 * half.checked:
            return
        half.checked = len(head)
        if half is self._responses:
            parse_response(head)
            return
        if not self.heads and sniff(head) in (Protocol.OPAQUE, Protocol.HTTP2):
            raise MalformedHead("another protocol")
        parse_request(head)

    def _keep(self, half: _Half, head: bytes, at_ns: int, reason: str) -> None:
        if len(head) > MAX_HEAD:
            self._stop(reason)
            return
        if not half.head or not half.first_ns:
            half.first_ns = at_ns
        half.head = head

    def _lost(self, side: int, count: int) -> None:
        """Bytes of that side are missing in the capture."""
        if self.client is None:
            return
        half = self._requests if side == self.client else self._responses
        if not half.in_step:
            return
        if half.body is not None and half.body.lose(count):
            self._end_lost_body(half)
            return
        self.count["out_of_step"] += 1
        if half is self._requests:
            self._lose_step_of_requests()
        else:
            half.lose_step()

    def _end_lost_body(self, half: _Half) -> None:
        if half.body is None or not half.body.done:
            return
        half.body = None
        if half is self._responses:
            self._finish(COMPLETE)

    def _lose_step_of_requests(self) -> None:
        self._requests.lose_step()
        self._refusable = self._wants_tunnel = False

    def _garbled(self, side: int) -> None:
        of_client = side == self.client
        half = self._requests if of_client else self._responses
        if not half.certain:
            self.count["out_of_step"] += 1
            half.lose_step()
        elif self.heads == 0 and of_client:
            self.opaque = True
        else:
            self._stop("request_unparsed" if of_client else "response_unparsed")

    def _stop(self, reason: str) -> None:
        self.count[reason] += 1
        self.give_up()

    def _close(self, ending: Ending, at_ns: int) -> None:
        body = self._responses.body
        by_fin = End.RESET not in (ending.client, ending.server)
        if by_fin and body is not None and body.until_close:
            self._finish(UNTIL_CLOSE)
        if self.heads and self._requests.head:
            self.count["request_cut"] += 1
        while self._calls:
            # Where bytes are missing, it may have ended well.
            if not self._responses.in_step:
                self._finish(UNSEEN)
                continue
            self._calls[0].response_last_ns = at_ns
            self._finish(ending)
        self._closed = True

    @property
    def _newest(self) -> Call | None:
        return self._calls[-1] if self._calls else None

    def _finish(self, ending: Ending) -> None:
        self.finished(self._calls.popleft(), ending)


def _opens_tunnel(call: Call, status: int) -> bool:
    return call.method == b"CONNECT" and 200 <= status <= 299
