"""B3: the trace context that travels in HTTP headers.

Headers in, context out, and back. The rules (openzipkin/b3-propagation):

- Multi: `x-b3-traceid` (16 or 32 hex digits), `x-b3-spanid` (16),
  `x-b3-parentspanid` (16, or empty, or absent), `x-b3-sampled` (`1` `0`; the legacy
  `true` `false` are read, never written), `x-b3-flags` (`1` is debug, anything else
  is ignored).
- Single: `b3: TRACE-SPAN[-{1|0|d}[-PARENT]]`, or `b3: {1|0|d}` for a decision alone.
- Single beats multi. Of a repeated header the first value counts.
- Hex digits are lower-case; Zipkin refuses others. An id of zeros is no id.
- One of trace id and span id without the other is malformed, and so is any value not
  listed above. Malformed gives no context at all: a wrong parent is worse than none.
- A parent of zeros, or equal to the span itself, is dropped, as Zipkin does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Header = tuple[bytes, bytes]

TRACE_ID = b"x-b3-traceid"
SPAN_ID = b"x-b3-spanid"
PARENT_ID = b"x-b3-parentspanid"
SAMPLED = b"x-b3-sampled"
FLAGS = b"x-b3-flags"
SINGLE = b"b3"

NAMES = frozenset({TRACE_ID, SPAN_ID, PARENT_ID, SAMPLED, FLAGS, SINGLE})

_SAMPLED = {b"1": True, b"true": True, b"0": False, b"false": False}

# The decisions of the single header, as (sampled, debug).
_DECISIONS = {b"1": (True, False), b"0": (False, False), b"d": (True, True)}

_HEX = frozenset(b"0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Context:
    """A place in a trace, and the decision to record it.

    Without ids (both 0) it is a decision alone. `sampled` is None where the decision
    is left to the receiver; `debug` implies `sampled`.
    """

    trace_id: int = 0  # 128 bit
    span_id: int = 0
    parent_id: int | None = None
    sampled: bool | None = None
    debug: bool = False

    @property
    def has_ids(self) -> bool:
        """Whether this is a place in a trace, not a decision alone."""
        return self.span_id != 0


class MalformedContext(ValueError):
    """A B3 header that counts has a value that is none of those listed above."""


def extract(headers: Iterable[Header]) -> Context | None:
    """Return the context that the headers carry; None if none, or malformed."""
    try:
        return parse(headers)
    except MalformedContext:
        return None


def parse(headers: Iterable[Header]) -> Context | None:
    """Return the context that the headers carry, if any; or raise MalformedContext."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        lower = name.lower()
        if lower in NAMES:
            found.setdefault(lower, value)
    if not found:
        return None
    if SINGLE in found:
        return _from_single(found[SINGLE])
    return _from_multi(found)


def multi_headers(context: Context) -> list[Header]:
    """Return the context as multi headers, in the order podspan injects them."""
    headers = []
    if context.has_ids:
        headers.append((TRACE_ID, trace_id_text(context.trace_id).encode()))
        headers.append((SPAN_ID, b"%016x" % context.span_id))
        if context.parent_id is not None:
            headers.append((PARENT_ID, b"%016x" % context.parent_id))
    if context.debug:
        headers.append((FLAGS, b"1"))  # implies accept: no x-b3-sampled beside it
    elif context.sampled is not None:
        headers.append((SAMPLED, b"1" if context.sampled else b"0"))
    return headers


def single_header(context: Context) -> bytes | None:
    """Return the context as the value of the `b3` header; None if it says nothing.

    The grammar has no place for a parent without a decision: it is left out then.
    """
    parts = []
    if context.has_ids:
        parts += [trace_id_text(context.trace_id).encode(), b"%016x" % context.span_id]
    if context.debug:
        parts.append(b"d")
    elif context.sampled is not None:
        parts.append(b"1" if context.sampled else b"0")
    if len(parts) == 3 and context.parent_id is not None:
        parts.append(b"%016x" % context.parent_id)
    return b"-".join(parts) or None


def trace_id_text(trace_id: int) -> str:
    """Return 32 hex digits, or 16 where the high half is zero, as Zipkin shows it."""
    return f"{trace_id:032x}" if trace_id >> 64 else f"{trace_id:016x}"


def _from_multi(found: dict[bytes, bytes]) -> Context | None:
    sampled = None
    if SAMPLED in found:
        sampled = _SAMPLED.get(found[SAMPLED])
        if sampled is None:
            raise MalformedContext("x-b3-sampled is no decision")
    debug = found.get(FLAGS) == b"1"
    if debug:
        sampled = True

    if TRACE_ID in found or SPAN_ID in found:
        trace_id = _trace_id(found.get(TRACE_ID, b""))
        span_id = _span_id(found.get(SPAN_ID, b""))
        # Empty is tolerated: Envoy (PR 6263) broke traces when it was not.
        parent = found.get(PARENT_ID)
        parent_id = _parent_id(parent, span_id) if parent else None
        return Context(trace_id, span_id, parent_id, sampled, debug)
    if found.get(PARENT_ID):
        raise MalformedContext("x-b3-parentspanid without a span")
    return None if sampled is None else Context(sampled=sampled, debug=debug)


def _from_single(value: bytes) -> Context:
    if value in _DECISIONS:
        sampled, debug = _DECISIONS[value]
        return Context(sampled=sampled, debug=debug)
    parts = value.split(b"-")
    if not 2 <= len(parts) <= 4:
        raise MalformedContext("b3 has too few or too many parts")
    trace_id = _trace_id(parts[0])
    span_id = _span_id(parts[1])
    if len(parts) == 2:
        return Context(trace_id, span_id)
    if parts[2] not in _DECISIONS:
        raise MalformedContext("b3 has a wrong decision")
    sampled, debug = _DECISIONS[parts[2]]
    parent_id = _parent_id(parts[3], span_id) if len(parts) == 4 else None
    return Context(trace_id, span_id, parent_id, sampled, debug)


def _hex(digits: bytes) -> int:
    # int() alone is too kind: it takes signs, spaces and underscores.
    if not _HEX.issuperset(digits):
        raise MalformedContext("an id has other than lower-case hex digits")
    return int(digits, 16)


def _trace_id(digits: bytes) -> int:
    if len(digits) not in (16, 32):
        raise MalformedContext("a trace id has neither 16 nor 32 digits")
    trace_id = _hex(digits)
    if trace_id == 0:
        raise MalformedContext("a trace id of zeros")
    return trace_id


def _span_id(digits: bytes) -> int:
    if len(digits) != 16:
        raise MalformedContext("a span id has not 16 digits")
    span_id = _hex(digits)
    if span_id == 0:
        raise MalformedContext("a span id of zeros")
    return span_id


def _parent_id(digits: bytes, span_id: int) -> int | None:
    if len(digits) != 16:
        raise MalformedContext("a parent id has not 16 digits")
    parent_id = _hex(digits)
    return None if parent_id in (0, span_id) else parent_id
