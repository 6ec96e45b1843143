"""Which headers a request's context becomes, as bpf/request.c would write them.

Headers in, edits out. Every value is the kernel's; what differs is where it stands:

- The kernel writes over a value that has the size of the new one, else hides the line
  and inserts a new one. Here the line gets the value, whatever its size.
- A line that the kernel hides by writing over its name is removed here, and no number
  of them is too large.

tests/unit/test_redirect_inject.py holds this against the same rows as the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from podspan.agent import b3, traceparent
from podspan.agent.b3 import Header
from podspan.agent.context import (
    CLIENT_TRACE_ID,
    REQUEST_ID,
    Decision,
    HeadContext,
    read_context,
)
from podspan.agent.exchange import (
    FLAG_ACCEPTED_DEBUG,
    FLAG_SAMPLED,
    FLAG_SHARED,
    Link,
)
from podspan.agent.ids import derive_id, sample_hash

_MULTI = b3.NAMES - {b3.SINGLE}
_64_BITS = (1 << 64) - 1

# The value of each name's first line; names in lower case.
_First = dict[bytes, bytes]


class Direction(Enum):
    """Which way a redirected connection crosses the pod's border."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


@dataclass(frozen=True, slots=True)
class Given:
    """A context that is decided: by the kernel (`struct handed`), or here."""

    trace_id: int  # 128 bit
    span_id: int
    parent_id: int  # 0: root
    flags: int  # FLAG_ of agent/exchange.py
    link: int
    request_id: bytes = b""  # 36 characters; none where the head has its own


@dataclass(frozen=True, slots=True)
class Propagation:
    """What the user can choose of the headers: see agent/config.py."""

    span_ids: str = "shared"
    unsampled: str = "0"
    propagate: frozenset[str] = frozenset({"b3multi"})
    sampling: float = 100.0  # per cent, the pod's


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to a head; names are in lower case.

    Of each name in `values` the first line gets the value and further ones go; where
    there is none, one is appended, in this order. All lines of a name in `remove` go.
    """

    values: tuple[Header, ...]
    remove: frozenset[bytes]


def edit_for(headers: Iterable[Header], given: Given, options: Propagation) -> Edit:
    """Return what bpf/request.c would have written for this context."""
    first = _first_of(headers)
    context = read_context(first.items())
    # Deferring is our own decision's; the caller's is passed on.
    told = (
        options.unsampled != "defer"
        or given.flags & FLAG_SAMPLED != 0
        or context.decision is not Decision.NONE
    )
    values: list[Header] = []
    remove = set()
    if given.request_id and REQUEST_ID not in first:
        values.append((REQUEST_ID, given.request_id))
    # Who sends one form of B3 is answered in that form too: half of it, or an old one,
    # would travel on otherwise.
    if "b3multi" in options.propagate or not _MULTI.isdisjoint(first):
        for name, value in _multi(first, context, given, told):
            if value is not None:
                values.append((name, value))
            elif name in first:
                remove.add(name)
    if "b3" in options.propagate or b3.SINGLE in first:
        values.append((b3.SINGLE, _single(context, given, told)))
    if "tracecontext" in options.propagate:
        sampled = given.flags & FLAG_SAMPLED != 0
        parent = traceparent.TraceParent(given.trace_id, given.span_id, sampled)
        values.append((traceparent.NAME, traceparent.write(parent)))
    return Edit(tuple(values), frozenset(remove))


def apply_to_headers(headers: Iterable[Header], edit: Edit) -> list[Header]:
    """Return the headers after the edit; a line that stays is the same object."""
    values = dict(edit.values)
    written = set()
    after = []
    for header in headers:
        name = header[0].lower()
        if name in values:
            if name not in written:
                written.add(name)
                value = values[name]
                after.append(header if header[1] == value else (header[0], value))
        elif name not in edit.remove:
            after.append(header)
    after += [header for header in edit.values if header[0] not in written]
    return after


def new_root(
    headers: Iterable[Header], options: Propagation, random64: Callable[[], int]
) -> Given:
    """Return a new trace for a head without ids, which may still have a decision."""
    first = _first_of(headers)
    return _root(first, read_context(first.items()), options, random64)


def context_of_stream(
    headers: Iterable[Header],
    direction: Direction,
    options: Propagation,
    random64: Callable[[], int],
    was_received: Callable[[int], bool] = lambda _: False,
) -> Given:
    """Return the context of an HTTP/2 request, as bpf/context.h decides it.

    Of an INBOUND request with ids (Link.HEADER) nothing is to be written.

    `was_received`, for `span_ids` child: whether an INBOUND request brought this span
    id into the pod. An application that forwards one means the span that served it.
    """
    first = _first_of(headers)
    context = read_context(first.items())
    if not context.has_ids:
        return _root(first, context, options, random64)
    child = options.span_ids == "child"
    flags = _decide(context, context.trace_id, options)
    if direction is Direction.OUTBOUND:
        parent_id = context.span_id
        if child and was_received(parent_id):
            parent_id = derive_id(parent_id)
        span_id = _nonzero(random64)
        request_id = _request_id(first, flags, random64)
    elif child:
        parent_id, span_id = context.span_id, derive_id(context.span_id)
        request_id = b""
    else:
        parent_id, span_id = context.parent_id, context.span_id
        request_id = b""
        flags |= FLAG_SHARED
    return Given(context.trace_id, span_id, parent_id, flags, Link.HEADER, request_id)


def _first_of(headers: Iterable[Header]) -> _First:
    first: _First = {}
    for name, value in headers:
        first.setdefault(name.lower(), value)
    return first


def _root(
    first: _First,
    context: HeadContext,
    options: Propagation,
    random64: Callable[[], int],
) -> Given:
    span_id = _nonzero(random64)
    # The span has the trace's low half, as Envoy's: E zipkin/tracer.cc.
    trace_id = _nonzero(random64) << 64 | span_id
    flags = _decide(context, trace_id, options)
    request_id = _request_id(first, flags, random64)
    return Given(trace_id, span_id, 0, flags, Link.NONE, request_id)


def _nonzero(random64: Callable[[], int]) -> int:
    return random64() or 1


def _decide(context: HeadContext, trace_id: int, options: Propagation) -> int:
    """FLAG_ bits of a trace: what its head says, else what the rate says of its id."""
    if context.decision is Decision.DEBUG:
        return FLAG_SAMPLED | FLAG_ACCEPTED_DEBUG
    if context.decision is Decision.DENY:
        return 0
    if context.decision is Decision.ACCEPT or context.forced:
        return FLAG_SAMPLED
    below = round(options.sampling / 100 * 2**32)
    return FLAG_SAMPLED if sample_hash(trace_id) < below else 0


def _request_id(first: _First, flags: int, random64: Callable[[], int]) -> bytes:
    """A new x-request-id where the head has none.

    A random UUID, variant 10 (RFC 9562 section 5.4). In place of the version stands
    Envoy's trace reason: 4 (the version) none, 9 sampled, b by the client.
    """
    if REQUEST_ID in first:
        return b""
    reason = b"9" if flags & FLAG_SAMPLED else b"4"
    if CLIENT_TRACE_ID in first:
        reason = b"b"
    high = b"%016x" % random64()
    low = b"%016x" % (random64() & _64_BITS >> 2 | 1 << 63)
    rest = (high[8:12], reason + high[13:], low[:4], low[4:])
    return b"-".join((high[:8], *rest))


def _multi(
    first: _First, context: HeadContext, given: Given, told: bool
) -> Iterator[tuple[bytes, bytes | None]]:
    """The multi headers in the order of bpf/request.c; None: there is none."""
    there = first.get(b3.TRACE_ID)
    if there is not None and context.has_ids and b3.SINGLE not in first:
        yield b3.TRACE_ID, there  # the one adopted, with all its digits
    elif there is not None and len(there) == 32:
        yield b3.TRACE_ID, b"%032x" % given.trace_id
    else:
        yield b3.TRACE_ID, b3.trace_id_text(given.trace_id).encode()
    yield b3.SPAN_ID, b"%016x" % given.span_id
    yield b3.PARENT_ID, b"%016x" % given.parent_id if given.parent_id else None

    # Debug implies accept, which is then not sent along. What the caller wrote stays
    # where it means the same.
    debug = given.flags & FLAG_ACCEPTED_DEBUG
    sampled = b"1" if given.flags & FLAG_SAMPLED else b"0"
    if debug and len(first.get(b3.SAMPLED, b"")) != 1:
        told = False
    yield b3.SAMPLED, sampled if told else None
    if debug:
        yield b3.FLAGS, b"1"
    else:
        yield b3.FLAGS, b"0" if len(first.get(b3.FLAGS, b"")) == 1 else None


def _single(context: HeadContext, given: Given, told: bool) -> bytes:
    """The header b3: in the form that the caller wrote, or with all there is to say."""
    is_long, decided, has_parent = True, told, told and given.parent_id != 0
    # Without a place for it, the decision would be made again behind us.
    if context.b3_ids and (context.b3_decided or not told):
        is_long = context.b3_long or given.trace_id >> 64 != 0
        decided, has_parent = context.b3_decided, context.b3_parent
    value = b"%0*x-%016x" % (32 if is_long else 16, given.trace_id, given.span_id)
    if decided:
        if given.flags & FLAG_ACCEPTED_DEBUG:
            value += b"-d"
        else:
            value += b"-1" if given.flags & FLAG_SAMPLED else b"-0"
    if has_parent:
        value += b"-%016x" % given.parent_id
    return value
