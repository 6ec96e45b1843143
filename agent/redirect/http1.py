"""HTTP/1: write into the heads of requests, and follow both streams of a connection.

Bytes in, actions out (layer.py). Apart from what is edited every byte goes on as it
came, at once: only the head of a request waits, until it has ended.

- Grammar and framing are those of agent/http_head.py, and as in bpf/scanner.h the one
  transfer coding is `chunked`, alone. Where a message's end is in any doubt the
  connection becomes opaque: a server may see other borders than we do, and then what
  looks like a head to us is a body, or another's request.
- Opaque: nothing held back, nothing read any more, on either side. It is not an error
  after CONNECT or 101, and where a response goes on until close; else it is counted:
      request_unparsed   no request, or its end is in doubt; also a head over 16 KB
      response_unparsed  the same of a response
      response_unasked   a response without a request
      request_early      bytes behind a CONNECT or Upgrade that is not yet answered:
                         may be requests, may be the other protocol
      request_refused    the answer to `Expect` came before the body: the next bytes
                         may be that body, may be a request
      pipelined          more requests ahead of their responses than are kept
- A request whose context is not known passes untouched: `no_context`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

from podspan.agent.context import read_context
from podspan.agent.http_body import BodyReader
from podspan.agent.http_head import (
    MAX_HEAD,
    MAX_METHOD,
    Body,
    Framing,
    Headers,
    MalformedHead,
    RequestHead,
    ResponseHead,
    body_framing,
    parse_request,
    parse_response,
    values,
)
from podspan.agent.redirect.inject import (
    Direction,
    Edit,
    Given,
    Propagation,
    edit_for,
)
from podspan.agent.redirect.layer import Abort, Action, Count, End, Send, Side, Skip

# More than any client is known to send ahead, and some kilobytes.
MAX_PIPELINED = 512

_OWS = b" \t"
_HEAD_END = b"\r\n\r\n"

# A whole head at once, ten times as fast as http_head.py, which says the same of it.
# Possessive: what does not match is looked at once.
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_LINES = rb"\r\n(?:" + _TOKEN + rb"++:[^\x00\r\n]*+\r\n)*\r\n"
_REQUEST = re.compile(
    rb"(?P<method>%b{1,%d}+) [\x21-\x7e\x80-\xff]++ HTTP/1\.(?P<minor>[0-9])%b"
    % (_TOKEN, MAX_METHOD, _LINES)
)
_RESPONSE = re.compile(
    rb"HTTP/1\.(?P<minor>[0-9]) (?P<status>[0-9]{3})(?: [^\x00\r\n]*+)?%b" % _LINES
)

_NO_BODY = Framing(Body.NONE)
_NO_CONTEXT = Count("no_context")

Give = Callable[[int, Headers], Given | None]


class _Opaque(Exception):
    """This connection is followed no further. Never leaves this module."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason  # a counter's name; empty: nothing is lost


class Http1:
    """The layer of one connection.

    `give(offset, headers)` returns the context of a request, None where it is not
    known; `offset` counts the bytes from DOWN up to the end of its head. It is not
    asked where an INBOUND request has a context, or one that is malformed.
    """

    __slots__ = (
        "_asked",
        "_direction",
        "_expects",
        "_give",
        "_opaque",
        "_options",
        "_passed",
        "_requests",
        "_responses",
        "_wants_tunnel",
    )

    def __init__(self, direction: Direction, give: Give, options: Propagation) -> None:
        self._direction = direction
        self._give = give
        self._options = options
        self._requests = _Messages(_REQUEST, parse_request, b"* * HTTP/1.1\r\n")
        self._responses = _Messages(_RESPONSE, parse_response, b"HTTP/1.1 200\r\n")
        self._passed = 0  # bytes from DOWN before those that are looked at
        self._asked: deque[bytes] = deque()  # methods of requests not yet answered
        self._wants_tunnel = False  # the last of them does
        self._expects = False  # and its body, none of which has come, waits for 100
        self._opaque = False

    def received(self, side: Side, data: bytes) -> list[Action]:
        """Return what to do with these bytes."""
        if self._opaque:
            return [Send(side.other, data)]
        if side is Side.DOWN:
            return self._from_down(data)
        return self._from_up(data)

    def ended(self, side: Side) -> list[Action]:
        """Return what a FIN brings: another, behind a head that did not end."""
        if self._opaque:
            return []
        actions: list[Action] = []
        if side is Side.DOWN and (held := self._requests.released()):
            actions.append(Send(Side.UP, held))
        actions.append(End(side.other))
        return actions

    def lost(self, side: Side) -> list[Action]:  # noqa: ARG002
        """Return what a RST brings: another."""
        return [Abort("reset")]

    def drained(self, side: Side) -> list[Action]:  # noqa: ARG002
        """Nothing waits for room."""
        return []

    def _from_down(self, data: bytes) -> list[Action]:
        requests = self._requests
        data = requests.released() + data
        actions: list[Action] = []
        pieces: list[bytes] = []
        copied = at = 0  # up to there `data` is in `pieces`, and is dealt with
        opaque = None
        try:
            while at < len(data):
                end, edited = self._request_part(data, at, actions)
                if edited is not None:
                    pieces += [data[copied:at], edited]
                    copied = end
                at = end
        except _Opaque as exc:
            opaque = exc
        except MalformedHead:
            opaque = _Opaque("request_unparsed")
        end = len(data) - len(requests.head)
        pieces.append(data[copied:end])
        if sent := b"".join(pieces):
            actions.append(Send(Side.UP, sent))
        if opaque:
            return actions + self._become_opaque(opaque)
        self._passed += end
        if not self._expects and (left := requests.skipped()):
            self._passed += left
            actions.append(Skip(Side.DOWN, left))
        return actions

    def _request_part(
        self, data: bytes, at: int, actions: list[Action]
    ) -> tuple[int, bytes | None]:
        """Return where what begins at `at` ends, and what takes its place."""
        requests = self._requests
        if requests.in_body:
            self._expects = False
            return requests.body(data, at), None
        if self._wants_tunnel:
            raise _Opaque("request_early")
        if data.startswith(b"\r\n", at):  # RFC 9112 section 2.2
            return at + 2, None
        head = requests.next_head(data, at)
        if head is None:
            return len(data), None
        end = head.end()
        lines = head[0].split(b"\r\n")
        headers = _headers_of(lines)
        self._begin_request(head, headers)
        if self._direction is Direction.INBOUND:
            context = read_context(headers)
            if context.has_ids or context.malformed:
                return end, None
        given = self._give(self._passed + end, headers)
        if given is None:
            actions.append(_NO_CONTEXT)
            return end, None
        return end, _edited(lines, edit_for(headers, given, self._options))

    def _begin_request(self, head: re.Match[bytes], headers: Headers) -> None:
        method = head["method"]
        names = {name.lower() for name, _ in headers}
        framing = _framing(method, None, head, headers)
        if len(self._asked) == MAX_PIPELINED:
            raise _Opaque("pipelined")
        self._asked.append(method)
        # What follows a CONNECT is no body, whatever it says.
        is_connect = method == b"CONNECT"
        self._requests.begin_body(_NO_BODY if is_connect else framing)
        self._wants_tunnel = is_connect or b"upgrade" in names
        self._expects = b"expect" in names and self._requests.in_body

    def _from_up(self, data: bytes) -> list[Action]:
        responses = self._responses
        actions: list[Action] = [Send(Side.DOWN, data)]
        data = responses.released() + data
        at = 0
        try:
            while at < len(data):
                at = self._response_part(data, at)
        except _Opaque as opaque:
            return actions + self._become_opaque(opaque)
        except MalformedHead:
            return actions + self._become_opaque(_Opaque("response_unparsed"))
        if left := responses.skipped():
            actions.append(Skip(Side.UP, left))
        return actions

    def _response_part(self, data: bytes, at: int) -> int:
        """Return where what begins at `at` ends."""
        responses = self._responses
        if responses.in_body:
            return responses.body(data, at)
        if not self._asked:
            raise _Opaque("response_unasked")
        head = responses.next_head(data, at)
        if head is None:
            return len(data)
        self._begin_response(head)
        return head.end()

    def _begin_response(self, head: re.Match[bytes]) -> None:
        status = int(head["status"])
        if 100 <= status <= 199:
            if status == 101:
                raise _Opaque
            if status == 100:
                self._expects = False
            return
        method = self._asked.popleft()
        if method == b"CONNECT" and 200 <= status <= 299:
            raise _Opaque
        if not self._asked:
            if self._expects:
                raise _Opaque("request_refused")
            self._wants_tunnel = False
        headers = _headers_of(head[0].split(b"\r\n"))
        framing = _framing(method, status, head, headers)
        if framing.body is Body.UNTIL_CLOSE:
            raise _Opaque
        self._responses.begin_body(framing)

    def _become_opaque(self, opaque: _Opaque) -> list[Action]:
        self._opaque = True
        actions: list[Action] = []
        if held := self._requests.released():
            actions.append(Send(Side.UP, held))
        if opaque.reason:
            actions.append(Count(opaque.reason))
        return [*actions, Skip(Side.DOWN, None), Skip(Side.UP, None)]


class _Messages:
    """One side's stream: where its heads are, and where bodies end."""

    __slots__ = ("_body", "_checked", "_parse", "_pattern", "_start_line", "head")

    def __init__(
        self,
        pattern: re.Pattern[bytes],
        parse: Callable[[bytes], RequestHead | ResponseHead | None],
        start_line: bytes,
    ) -> None:
        self._pattern = pattern
        self._parse = parse
        self._start_line = start_line  # the shortest: checked lines may be as short
        self.head = b""  # of which the end has not come
        self._checked = 0  # bytes of its lines that have ended
        self._body = BodyReader(_NO_BODY)

    def released(self) -> bytes:
        """Return what there is of a head, and keep it no longer."""
        head, self.head = self.head, b""
        return head

    def next_head(self, data: bytes, at: int) -> re.Match[bytes] | None:
        """Return the head that begins at `at`; None: it is kept until it ends.

        Raises MalformedHead.
        """
        end = data.find(_HEAD_END, at + max(self._checked - 2, 0)) + 4
        if end < 4:
            self._check(data, at)
            self.head = data[at:]
            return None
        self._checked = 0
        head = self._pattern.fullmatch(data, at, end)
        if head is None or end - at > MAX_HEAD:
            raise MalformedHead("no HTTP/1.x head")
        return head

    def _check(self, data: bytes, at: int) -> None:
        """Raise unless it may still become a head. Each line is looked at once."""
        if len(data) - at > MAX_HEAD:
            raise MalformedHead(f"head is longer than {MAX_HEAD} bytes")
        begin = at + self._checked
        rest = data[begin:]
        self._parse(self._start_line + rest if self._checked else rest)
        end = data.rfind(b"\r\n", begin)
        if end >= 0:
            self._checked = end + 2 - at

    @property
    def in_body(self) -> bool:
        """Whether the message goes on behind its head."""
        return not self._body.done

    def begin_body(self, framing: Framing) -> None:
        """What follows now is the body."""
        self._body = BodyReader(framing)

    def body(self, data: bytes, at: int) -> int:
        """Return up to where the bytes from `at` on are the body's, or more of it.

        Raises MalformedHead where a chunked one is malformed.
        """
        return self._body.take(data, at)

    def skipped(self) -> int:
        """Return how many bytes need not be looked at; they are not told of again."""
        return self._body.skip()


def _headers_of(lines: list[bytes]) -> Headers:
    """Names and values of a head's lines, of which the last two are empty."""
    parts = [line.partition(b":") for line in lines[1:-2]]
    return tuple([(name, value.strip(_OWS)) for name, _, value in parts])


def _framing(
    method: bytes, status: int | None, head: re.Match[bytes], headers: Headers
) -> Framing:
    """Where the body ends; raises MalformedHead where that is in doubt."""
    framing = body_framing(method, status, headers)
    codings = values(headers, b"transfer-encoding")
    if not codings or framing.body is Body.NONE:
        return framing
    if [coding.lower() for coding in codings] != [b"chunked"]:
        raise MalformedHead("a transfer coding other than chunked")
    # RFC 9112 section 6.1: either may be an attack on who reads it otherwise.
    if head["minor"] == b"0" or values(headers, b"content-length"):
        raise MalformedHead("a transfer coding where another framing counts")
    return framing


def _edited(lines: list[bytes], edit: Edit) -> bytes:
    """The head of these lines after the edit: of what stays, every byte."""
    pending = dict(edit.values)
    touched = edit.remove.union(pending)
    after = lines[:1]
    for line in lines[1:-2]:
        name, _, rest = line.partition(b":")
        lower = name.lower()
        if lower not in touched:
            after.append(line)
        elif lower in pending:
            at = len(line) - len(rest.lstrip(_OWS))
            end = at + len(rest.strip(_OWS))
            after.append(line[:at] + pending.pop(lower) + line[end:])
    after += [b"%b: %b" % header for header in pending.items()]
    after += lines[-2:]
    return b"\r\n".join(after)
