"""The trace context that a request's head carries, of whichever headers.

Headers in, facts out; bpf/b3.h tells the same in the kernel. Of a repeated header the
first counts.

- B3 first (agent/b3.py). Where one of its headers is malformed no context is taken,
  from any header: a wrong parent is worse than none.
- Where B3 carries no ids, those of `traceparent` (agent/traceparent.py), and its
  decision unless B3 has one.
- Without a decision, Envoy's overrides ask for sampling: `x-client-trace-id`, and a
  `x-request-id` of 36 characters whose trace reason, the 15th of them, is 9, a or b
  (Envoy looks at no more of it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from podspan.agent import b3, traceparent

REQUEST_ID = b"x-request-id"
CLIENT_TRACE_ID = b"x-client-trace-id"

_UUID_LENGTH = 36
_REASON = slice(14, 15)
# Sampled, forced by a service, forced by the client: E request_id/uuid.
_FORCING_REASONS = (b"9", b"a", b"b")


class Decision(IntEnum):
    """Whether to record; `enum decision` of bpf/b3.h."""

    NONE = 0
    DENY = 1
    ACCEPT = 2
    DEBUG = 3


@dataclass(frozen=True, slots=True)
class HeadContext:
    """The same facts as `struct head_context` of bpf/b3.h."""

    trace_id: int = 0  # 128 bit; the ids are 0 unless has_ids
    span_id: int = 0
    parent_id: int = 0  # 0: none, or not known
    decision: Decision = Decision.NONE
    forced: bool = False  # to be sampled where there is no decision
    malformed: bool = False
    b3_ids: bool = False  # the header b3 is valid and has ids; then:
    b3_long: bool = False  # its trace id has 32 digits, not 16
    b3_decided: bool = False
    b3_parent: bool = False  # it has a place for the parent, perhaps of none
    traceparent: bool = False  # it is valid, whether or not it counts

    @property
    def has_ids(self) -> bool:
        """Whether this is a place in a trace."""
        return self.span_id != 0


def read_context(headers: Iterable[b3.Header]) -> HeadContext:
    """Return what the headers of a request say."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found.setdefault(name.lower(), value)

    parent = traceparent.parse(found.get(traceparent.NAME, b""))
    context = HeadContext(forced=_forced(found), traceparent=parent is not None)
    try:
        context = _with_b3(context, found)
    except b3.MalformedContext:
        return replace(context, malformed=True)
    if parent is None or context.has_ids:
        return context
    decision = Decision.ACCEPT if parent.sampled else Decision.DENY
    return replace(
        context,
        trace_id=parent.trace_id,
        span_id=parent.span_id,
        decision=context.decision or decision,
    )


def _with_b3(context: HeadContext, found: dict[bytes, bytes]) -> HeadContext:
    carried = b3.parse(found.items())
    if carried is None:
        return context
    parts = found.get(b3.SINGLE, b"").split(b"-")
    ids_in_single = len(parts) > 1
    return replace(
        context,
        trace_id=carried.trace_id,
        span_id=carried.span_id,
        parent_id=carried.parent_id or 0,
        decision=_decision(carried),
        b3_ids=ids_in_single,
        b3_long=ids_in_single and len(parts[0]) == 32,
        b3_decided=len(parts) > 2,
        b3_parent=len(parts) > 3,
    )


def _decision(carried: b3.Context) -> Decision:
    if carried.debug:
        return Decision.DEBUG
    if carried.sampled is None:
        return Decision.NONE
    return Decision.ACCEPT if carried.sampled else Decision.DENY


def _forced(found: dict[bytes, bytes]) -> bool:
    request_id = found.get(REQUEST_ID, b"")
    return CLIENT_TRACE_ID in found or (
        len(request_id) == _UUID_LENGTH and request_id[_REASON] in _FORCING_REASONS
    )
