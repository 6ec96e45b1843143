"""Make exchanges of calls: a client's and a server's half, as the agent would have.

The ids are those on the wire, which are the client's (bpf/context.h): the server's half
shares them, or derives its own, as the agent's option says. A call without ids begins a
trace of its own, whose ids are derived from its packets, so that they are the same each
time. No parent is guessed, whatever happened at the same time.

An application that hands on, while it serves a request, the ids that came with it means
that request as the parent: that much its headers say. Where a call has the very bytes
of another that is open, it is the same call captured at another place, on the other
side of an address translation; it is counted, and left out.

    unsampled          calls whose headers say so
    seen_elsewhere     calls captured before and behind an address translation
    end_unseen         calls that had not ended when the capture, or what it has, did
    context_malformed  B3 headers that do not parse: the call begins a trace
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from errno import ECONNREFUSED, ECONNRESET
from hashlib import blake2b
from typing import Any, TypeVar

from podspan.agent import b3
from podspan.agent.context import Decision, HeadContext, read_context
from podspan.agent.exchange import (
    FLAG_ACCEPTED_DEBUG,
    FLAG_SAMPLED,
    FLAG_SHARED,
    End,
    Exchange,
    Link,
    Protocol,
    Role,
)
from podspan.agent.http_head import Headers, RequestHead
from podspan.agent.ids import derive_id
from podspan.agent.replay.connections import Connection
from podspan.agent.replay.messages import UNSEEN, Call, Ending
from podspan.agent.replay.names import ServiceNames, named_host
from podspan.agent.replay.packets import address_and_port
from podspan.agent.url import HOST_CUT, TARGET_CUT

_32_BITS = (1 << 32) - 1
_64_BITS = (1 << 64) - 1

# Where one call is captured at most: each address translation adds one.
MAX_PLACES = 8

_Key = TypeVar("_Key", bound=Hashable)

# As the kernel's record cuts them (bpf/exchange.h), in bytes.
_METHOD_CUT = 16
_HEADER_TEXTS = {
    b"host": ("host", HOST_CUT),
    b"user-agent": ("user_agent", 96),
    b"x-request-id": ("request_id", 40),
    b"x-client-trace-id": ("client_trace_id", 40),
}
_NO_TEXTS: dict[str, Any] = {
    "method": "",
    "target": "",
    **{name: "" for name, _ in _HEADER_TEXTS.values()},
}

_NOT_CAPTURED: dict[str, Any] = {"sock": 0, "netns": 0, "pid": 0, "tid": 0, "comm": ""}


@dataclass(frozen=True, slots=True)
class Ids:
    """A call's place in a trace, as its client has it."""

    trace_id: int
    span_id: int
    parent_id: int
    link: Link
    flags: int

    @property
    def sampled(self) -> bool:
        """Whether the call is recorded."""
        return bool(self.flags & FLAG_SAMPLED)


# Of a call, whatever addresses it has: the sequence numbers of both streams where it
# begins, and the hash of its head.
_Look = tuple[int, int, int]


# Trace and span id on the wire, and the address of who got them.
_Carried = tuple[int, int, bytes]


@dataclass(slots=True)
class _Open:
    """A call under way."""

    connection: Connection
    ids: Ids
    carried: _Carried | None
    look: _Look
    elsewhere: bool  # another open call is the same
    minor: int
    texts: dict[str, str]


Report = Callable[[Exchange], None]


class Traces:
    """Hears of calls and connections (a Listener), reports exchanges."""

    def __init__(
        self,
        report: Report,
        names: ServiceNames,
        count: Counter[str],
        *,
        child_ids: bool,
    ) -> None:
        self._report = report
        self._names = names
        self._count = count
        self._child_ids = child_ids
        self._open: dict[Call, _Open] = {}
        # Open calls by what they carry, and by how they look.
        self._by_ids: dict[_Carried, list[_Open]] = {}
        self._by_look: dict[_Look, list[_Open]] = {}
        self._tunnels: dict[Call, _Open] = {}  # that made one

    def began(
        self, connection: Connection, call: Call, head: RequestHead, text: bytes
    ) -> None:
        """Find the place of a call in a trace, by its head."""
        answer_at = connection.streams[connection.server].next
        look = call.position & _32_BITS, answer_at & _32_BITS, hash(text)
        seed = _seed(connection, call.position, text)
        ids, carried = self._ids_of(connection, head, seed)
        elsewhere = any(
            _are_translated(connection, other.connection)
            for other in self._by_look.get(look, ())[:MAX_PLACES]
        )
        texts = _texts_of(head)
        address, _ = address_and_port(connection.server_end)
        self._names.learn(
            address, named_host(texts["method"], texts["target"], texts["host"])
        )
        under_way = _Open(connection, ids, carried, look, elsewhere, head.minor, texts)
        self._open[call] = under_way
        self._by_look.setdefault(look, []).append(under_way)
        if carried is not None:
            self._by_ids.setdefault(carried, []).append(under_way)

    def finished(self, connection: Connection, call: Call, ending: Ending) -> None:
        """Report both halves of a call."""
        under_way = self._forget(call)
        if ending is UNSEEN:
            self._count["end_unseen"] += 1
        if connection.conversation.tunnel is call:
            self._tunnels[call] = under_way
        if under_way.elsewhere:
            self._count["seen_elsewhere"] += 1
        elif not under_way.ids.sampled:
            self._count["unsampled"] += 1
        else:
            response = call.response
            self._both_halves(
                connection,
                under_way.ids,
                ending,
                request_first_ns=call.request_first_ns,
                request_last_ns=call.request_last_ns,
                response_first_ns=call.response_first_ns,
                response_last_ns=call.response_last_ns,
                request_bytes=call.request.size,
                response_bytes=response.size if response else 0,
                status=call.status,
                request_minor=under_way.minor,
                protocol=Protocol.HTTP,
                **under_way.texts,
            )
        # These are the first exchange's, recorded or not.
        connection.connect_start_ns = connection.connect_end_ns = 0

    def carried(
        self, connection: Connection, ending: Ending, tunnel: Call | None
    ) -> None:
        """Report both halves of a connection that is not, or no longer, HTTP/1."""
        if tunnel is None:
            positions = [stream.first or 0 for stream in connection.streams]
            ids = _root(_seed(connection, *positions), FLAG_SAMPLED)
        else:
            made = self._tunnels.pop(tunnel)
            asked = made.ids
            if made.elsewhere or not any(connection.sizes):
                return
            if not asked.sampled:
                self._count["unsampled"] += 1
                return
            # As bpf/tcp.h: both ends find the same id.
            ids = replace(
                asked,
                span_id=derive_id(~asked.span_id & _64_BITS),
                parent_id=asked.span_id,
                link=Link.UPGRADE,
            )
        client, server = connection.client or 0, connection.server
        self._both_halves(
            connection,
            ids,
            ending,
            request_first_ns=connection.first_ns[client],
            request_last_ns=connection.last_ns[client],
            response_first_ns=connection.first_ns[server],
            response_last_ns=connection.last_ns[server],
            request_bytes=connection.sizes[client],
            response_bytes=connection.sizes[server],
            status=0,
            request_minor=0,
            protocol=Protocol.TCP,
            **_NO_TEXTS,
        )

    def refused(self, connection: Connection) -> None:
        """Report a connection that was never made: there is no server's half."""
        client = connection.client or 0
        seed = _seed(connection, connection.streams[client].first or 0)
        self._report(
            Exchange(
                **_place_of(_root(seed, FLAG_SAMPLED)),
                **_ends_of(connection, Role.CLIENT),
                **_NOT_CAPTURED,
                **_NO_TEXTS,
                connect_start_ns=connection.connect_start_ns,
                connect_end_ns=connection.connect_end_ns,
                request_first_ns=0,
                request_last_ns=0,
                response_first_ns=0,
                response_last_ns=0,
                request_bytes=0,
                response_bytes=0,
                retransmits=connection.syns_repeated,
                status=0,
                error=ECONNREFUSED,
                end=End.CONNECT_FAILED,
                request_minor=0,
                protocol=Protocol.TCP,
            )
        )

    def _ids_of(
        self, connection: Connection, head: RequestHead, seed: int
    ) -> tuple[Ids, _Carried | None]:
        context = read_context(head.headers)
        if context.malformed:
            self._count["context_malformed"] += 1
        flags = 0 if context.decision is Decision.DENY else FLAG_SAMPLED
        if context.decision is Decision.DEBUG:
            flags |= FLAG_ACCEPTED_DEBUG
        if not context.has_ids:
            return _root(seed, flags), None
        trace_id, server = context.trace_id, connection.server_end[:-2]
        parent_id = self._served_by(connection, trace_id, context.span_id)
        if parent_id:
            span_id = seed & _64_BITS or 1
        else:
            span_id = context.span_id
            parent_id = context.parent_id or _parent_beside(head.headers, context)
        ids = Ids(trace_id, span_id, parent_id, Link.HEADER, flags)
        return ids, (trace_id, context.span_id, server)

    def _served_by(self, connection: Connection, trace_id: int, span_id: int) -> int:
        """Return the span in which this client serves a call that carries these ids."""
        client = connection.client_end[:-2]
        serving = self._by_ids.get((trace_id, span_id, client), ())
        # A connection to the client itself would serve itself.
        served = next((o for o in serving if o.connection is not connection), None)
        if served is None:
            return 0
        own_id = served.ids.span_id
        return derive_id(own_id) if self._child_ids else own_id

    def _forget(self, call: Call) -> _Open:
        under_way = self._open.pop(call)
        _remove(self._by_look, under_way.look, under_way)
        if under_way.carried is not None:
            _remove(self._by_ids, under_way.carried, under_way)
        return under_way

    def _both_halves(
        self, connection: Connection, ids: Ids, ending: Ending, **what: Any
    ) -> None:
        client = Exchange(
            **_place_of(ids),
            **_ends_of(connection, Role.CLIENT),
            **_NOT_CAPTURED,
            **what,
            connect_start_ns=connection.connect_start_ns,
            connect_end_ns=connection.connect_end_ns,
            retransmits=connection.retransmits(connection.client or 0),
            end=ending.client,
            error=_error(ending.client),
        )
        server = Exchange(
            **_place_of(self._of_server(ids)),
            **_ends_of(connection, Role.SERVER),
            **_NOT_CAPTURED,
            **what,
            connect_start_ns=0,
            connect_end_ns=0,
            retransmits=connection.retransmits(connection.server),
            end=ending.server,
            error=_error(ending.server),
        )
        self._report(client)
        self._report(server)

    def _of_server(self, ids: Ids) -> Ids:
        if not self._child_ids:
            return replace(ids, flags=ids.flags | FLAG_SHARED)
        return replace(ids, span_id=derive_id(ids.span_id), parent_id=ids.span_id)


def _remove(calls: dict[_Key, list[_Open]], key: _Key, call: _Open) -> None:
    calls[key] = [each for each in calls[key] if each is not call]
    if not calls[key]:
        del calls[key]


def _are_translated(one: Connection, other: Connection) -> bool:
    """Tell whether these can be one connection under different addresses."""
    if one is other:
        return False
    same_address = one.client_end[:-2] == other.client_end[:-2]
    return one.client_end == other.client_end or not same_address


def _parent_beside(headers: Headers, context: HeadContext) -> int:
    """Return the parent that `x-b3-` headers tell of the same span.

    The header `b3` stands above them, and need not have a place for it.
    """
    multi = [header for header in headers if header[0].lower() != b3.SINGLE]
    told = b3.extract(multi)
    if told is None or (told.trace_id, told.span_id) != (
        context.trace_id,
        context.span_id,
    ):
        return 0
    return told.parent_id or 0


def _place_of(ids: Ids) -> dict[str, Any]:
    return {
        "trace_id": ids.trace_id,
        "span_id": ids.span_id,
        "parent_id": ids.parent_id,
        "link": ids.link,
        "flags": ids.flags,
    }


def _ends_of(connection: Connection, role: Role) -> dict[str, Any]:
    local, peer = connection.client_end, connection.server_end
    if role is Role.SERVER:
        local, peer = peer, local
    local_addr, local_port = address_and_port(local)
    peer_addr, peer_port = address_and_port(peer)
    return {
        "role": role,
        "local_addr": local_addr,
        "local_port": local_port,
        "peer_addr": peer_addr,
        "peer_port": peer_port,
    }


def _error(end: End) -> int:
    return ECONNRESET if end is End.RESET else 0


def _root(seed: int, flags: int) -> Ids:
    """Return a new trace; its first span has its low half, as bpf/context.h has it."""
    trace_id = seed if seed & _64_BITS else seed | 1
    return Ids(trace_id, trace_id & _64_BITS, 0, Link.NONE, flags)


def _seed(connection: Connection, *what: int | bytes) -> int:
    """Return 128 bits that are as good as random, and the same of the same packets."""
    digest = blake2b(digest_size=16)
    digest.update(connection.client_end + connection.server_end)
    for each in what:
        digest.update(each if isinstance(each, bytes) else b"%d;" % (each & _32_BITS))
    return int.from_bytes(digest.digest(), "big")


def _texts_of(head: RequestHead) -> dict[str, str]:
    texts = {
        **_NO_TEXTS,
        "method": head.method[:_METHOD_CUT].decode("ascii"),
        "target": _text(head.target, TARGET_CUT),
    }
    seen = set()
    for name, value in head.headers:
        field = _HEADER_TEXTS.get(name.lower())
        if field and field[0] not in seen:
            seen.add(field[0])
            texts[field[0]] = _text(value, field[1])
    return texts


def _text(value: bytes, cut: int) -> str:
    return value[:cut].decode("utf-8", "replace").rstrip(" \t")
