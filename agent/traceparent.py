"""The `traceparent` header: W3C Trace Context level 1, section 3.2.

`VERSION-TRACE-PARENT-FLAGS` in lower-case hex digits: 2, 32, 16 and 2 of them. No
version is ff, no id is of zeros. Version 00 has these 55 characters; a later one may go
on after a further dash, and is read up to there. Bit 0 of the flags: sampled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME = b"traceparent"

_VALUE = re.compile(
    rb"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})"
    rb"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The caller's place in a trace; its span is called parent-id there."""

    trace_id: int  # 128 bit
    span_id: int
    sampled: bool


def parse(value: bytes) -> TraceParent | None:
    """Return what the header's value says; None if it is malformed."""
    match = _VALUE.fullmatch(value)
    if match is None or match["version"] == b"ff":
        return None
    if match["version"] == b"00" and match["more"] is not None:
        return None
    trace_id, span_id = int(match["trace"], 16), int(match["parent"], 16)
    if trace_id == 0 or span_id == 0:
        return None
    return TraceParent(trace_id, span_id, bool(int(match["flags"], 16) & 1))


def write(parent: TraceParent) -> bytes:
    """Return the header's value, in version 00: section 3.2.4 wants no other."""
    return b"00-%032x-%016x-%02x" % (parent.trace_id, parent.span_id, parent.sampled)
