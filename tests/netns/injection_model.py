"""What bpf/request.c makes of a head, told once more: the head that must arrive.

Pure. The kernel chooses ids by chance; all else follows from the head, the options and
the rate. Written from the rules, not from the C:

- A header is written over in place where its value has the size of the new one. Else it
  is hidden (`b3` in its name, or the first letters of `traceparent`, become `no`), and
  a new line is inserted before the empty line.
- So are further lines of one such header; where these are more than four, nothing is
  written.
- Each form of B3 is written where it is to be propagated, or where the caller sent it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from podspan.agent import b3, traceparent
from podspan.agent.context import (
    CLIENT_TRACE_ID,
    REQUEST_ID,
    Decision,
    HeadContext,
    read_context,
)
from podspan.agent.exchange import (
    FLAG_ACCEPTED_DEBUG,
    FLAG_INJECTED,
    FLAG_SAMPLED,
    Exchange,
    Link,
)
from podspan.agent.ids import sample_hash
from podspan.agent.kernel.options import Options

DEFAULTS = Options()
UUID = rb"[0-9a-f]{8}-[0-9a-f]{4}-%s[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
REPEATED_MAX = 4  # AGAIN_MAX of bpf/scanner.h
MULTI = b3.NAMES - {b3.SINGLE}


class Field(NamedTuple):
    """A header line: its name in lower case, and where name and value begin."""

    name: bytes
    value: bytes
    name_at: int
    value_at: int


class Chosen(NamedTuple):
    """What the kernel chooses by chance."""

    trace_id: int
    span_id: int
    request_id: bytes

    @classmethod
    def of_record(cls, record: Exchange) -> Self:
        return cls(record.trace_id, record.span_id, record.request_id.encode())


@dataclass
class Plan:
    """What is done to one head; bytes at `edits` are written over."""

    context: HeadContext
    sampled: bool
    debug: bool
    parent_id: int
    told: bool = True  # the decision is passed on, even if it is no
    w3c: bool = False  # traceparent is written
    edits: list[tuple[int, bytes]] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    reach: int = 1 << 62  # the first byte that has to be in the head's last message
    repeated: int = 0  # lines beyond the first of their name
    uuid_reason: bytes = b""  # of the x-request-id that is made

    @property
    def passed_on(self) -> Decision:
        """What the next hop reads in B3."""
        if self.debug:
            return Decision.DEBUG
        if self.sampled:
            return Decision.ACCEPT
        return Decision.DENY if self.told else Decision.NONE

    @property
    def refused(self) -> bool:
        return self.repeated > REPEATED_MAX

    @property
    def link(self) -> Link:
        return Link.HEADER if self.context.has_ids else Link.NONE

    @property
    def losses(self) -> dict[str, int]:
        """The counters, where the head comes in one piece."""
        lost = {"context_malformed": 1} if self.context.malformed else {}
        return lost | ({"inject_repeated": 1} if self.refused else {})

    @property
    def flags(self) -> int:
        return (
            FLAG_SAMPLED * self.sampled
            | FLAG_ACCEPTED_DEBUG * self.debug
            | FLAG_INJECTED * (not self.refused)
        )

    def applied(self, head: bytes) -> bytes:
        """Return the head as it must arrive, in one piece or in time."""
        if self.refused:
            return head
        changed = bytearray(head)
        for at, text in self.edits:
            changed[at : at + len(text)] = text
        assert len(changed) == len(head)
        return bytes(changed[:-2]) + b"".join(self.lines) + b"\r\n"


def with_our_headers(
    head: bytes,
    record: Exchange,
    options: Options = DEFAULTS,
    percent: float | None = None,
) -> bytes:
    """Return `head` as it must arrive, for the record that tells of it."""
    plan = plan_of(head, Chosen.of_record(record), options, percent)
    assert record.sampled == plan.sampled
    assert record.parent_id == plan.parent_id
    assert record.link is plan.link
    return plan.applied(head)


def plan_of(
    head: bytes,
    chosen: Chosen,
    options: Options = DEFAULTS,
    percent: float | None = None,
) -> Plan:
    """Return what must be done to a head; `percent` is the rate where it is not
    that of the options."""
    fields = list(fields_of(head))
    first: dict[bytes, Field] = {}
    for one in fields:
        first.setdefault(one.name, one)
    context = read_context((one.name, one.value) for one in fields)
    rate = options.sampling if percent is None else percent
    plan = Plan(
        context,
        sampled=is_sampled(context, chosen.trace_id, rate),
        debug=context.decision is Decision.DEBUG,
        parent_id=context.span_id,
        w3c="tracecontext" in options.propagate,
    )
    written = b3.NAMES | {traceparent.NAME} if plan.w3c else b3.NAMES
    again = [one for one in fields if one.name in written and first[one.name] != one]
    plan.repeated = len(again)
    # Deferring is our own decision's; the caller's is passed on.
    plan.told = options.unsampled != "defer" or plan.sampled or bool(context.decision)
    ids = b3.Context(
        chosen.trace_id,
        chosen.span_id,
        plan.parent_id or None,
        plan.sampled if plan.told else None,
        plan.debug,
    )

    put = _Put(plan, first)
    if REQUEST_ID not in first:
        by_client = CLIENT_TRACE_ID in first
        plan.uuid_reason = b"b" if by_client else b"9" if plan.sampled else b"4"
        plan.lines.append(b"x-request-id: " + chosen.request_id + b"\r\n")
    if "b3multi" in options.propagate or MULTI & first.keys():
        _put_multi(put, ids)
    if "b3" in options.propagate or b3.SINGLE in first:
        _put_single(put, ids)
    if plan.w3c:
        parent = traceparent.TraceParent(ids.trace_id, ids.span_id, plan.sampled)
        put(traceparent.NAME, traceparent.write(parent))
    for one in again:
        put.hide(one)
    return plan


def is_sampled(context: HeadContext, trace_id: int, percent: float) -> bool:
    """Return whether an exchange of this context and trace is to become a span."""
    if context.decision:
        return context.decision is not Decision.DENY
    return context.forced or sample_hash(trace_id) < round(percent / 100 * 2**32)


def check(
    head: bytes,
    arrived: bytes,
    records: list[Exchange],
    losses: dict[str, int],
    options: Options = DEFAULTS,
    percent: float | None = None,
    cut: int = 0,
) -> Plan:
    """Fail unless this is all that comes of one head, sent in two pieces cut there."""
    [record] = records
    chosen = Chosen.of_record(record)
    plan = plan_of(head, chosen, options, percent)
    missed = not plan.refused and cut > min(plan.reach, len(head) - 2)
    injected = not plan.refused and not missed
    assert arrived == (plan.applied(head) if injected else head)
    assert losses == plan.losses | ({"inject_cut": 1} if missed else {})
    if injected:
        check_chosen(chosen, plan)
        check_next_hop(arrived, chosen, plan)
    assert (record.parent_id, record.link) == (plan.parent_id, plan.link)
    assert record.flags == plan.flags - (FLAG_INJECTED if missed else 0)
    if injected:
        sent = [one.value for one in fields_of(arrived) if one.name == REQUEST_ID]
        assert record.request_id == _record_text(sent[0])
    return plan


def check_next_hop(arrived: bytes, chosen: Chosen, plan: Plan) -> None:
    """Fail unless who receives the head reads what was decided, and nothing wrong.

    Also who knows but one form of it.
    """
    headers = [(one.name, one.value) for one in fields_of(arrived)]
    # It has no debug, and cannot leave the decision open.
    in_traceparent = Decision.ACCEPT if plan.sampled else Decision.DENY
    by_form = [
        [header for header in headers if header[0] in form]
        for form in (MULTI, {b3.SINGLE}, {traceparent.NAME})[: 3 if plan.w3c else 2]
    ]
    for form in (headers, *filter(None, by_form)):
        read = read_context(form)
        assert not read.malformed
        assert (read.trace_id, read.span_id) == (chosen.trace_id, chosen.span_id)
        if form in by_form:
            assert len(dict(form)) == len(form)
        is_b3 = any(name in b3.NAMES for name, _ in form)
        assert read.decision is (plan.passed_on if is_b3 else in_traceparent)


def check_chosen(chosen: Chosen, plan: Plan) -> None:
    """Fail unless the ids are such as the kernel may choose."""
    context = plan.context
    if context.has_ids:
        assert chosen.trace_id == context.trace_id
        assert chosen.span_id not in (0, context.span_id, context.parent_id)
    else:
        assert chosen.trace_id >> 64
        assert chosen.span_id == chosen.trace_id % 2**64 != 0
    if plan.uuid_reason:
        uuid = re.compile(UUID % plan.uuid_reason)
        assert uuid.fullmatch(chosen.request_id), chosen.request_id


def _record_text(value: bytes) -> str:
    return value[:40].decode("utf-8", "replace").rstrip(" \t")


def fields_of(head: bytes) -> Iterator[Field]:
    """Return the lines of a head that begins with its request line."""
    at = head.index(b"\r\n") + 2
    for line in head[at : head.index(b"\r\n\r\n") + 2].split(b"\r\n")[:-1]:
        name, _, rest = line.partition(b":")
        value_at = at + len(line) - len(rest.lstrip(b" \t"))
        yield Field(name.lower(), rest.strip(b" \t"), at, value_at)
        at += len(line) + 2


class _Put:
    """Lets a header have a value: in place, or in a line of its own."""

    def __init__(self, plan: Plan, first: dict[bytes, Field]) -> None:
        self.plan = plan
        self.first = first

    def __call__(
        self,
        name: bytes,
        value: bytes | None,
        *others: bytes,
        insert: bool = True,
        fits: bool = True,
    ) -> None:
        """`others` are values of other sizes that mean the same."""
        there = self.first.get(name)
        if there is not None:
            for text in (value, *others) if fits else ():
                if text is not None and len(text) == len(there.value):
                    if len(text) > 1 or text != there.value:
                        self._edit(there.value_at, text, there.value_at)
                    return
            self.hide(there)
        if value is not None and insert:
            self.plan.lines.append(name + b": " + value + b"\r\n")

    def hide(self, there: Field) -> None:
        at = there.name_at + 2 * there.name.startswith(b"x-b3-")
        self._edit(at, b"no", there.name_at)

    def _edit(self, at: int, text: bytes, since: int) -> None:
        self.plan.edits.append((at, text))
        self.plan.reach = min(self.plan.reach, since)


def _put_multi(put: _Put, ids: b3.Context) -> None:
    trace_text = b3.trace_id_text(ids.trace_id).encode()
    adopted = put.plan.context.has_ids and b3.TRACE_ID in put.first
    if not adopted or b3.SINGLE in put.first:
        put(b3.TRACE_ID, trace_text, b"%032x" % ids.trace_id)
    put(b3.SPAN_ID, b"%016x" % ids.span_id)
    put(b3.PARENT_ID, None if ids.parent_id is None else b"%016x" % ids.parent_id)
    # Debug implies accept. Where the caller wrote either digit, it tells the truth.
    sampled = None if ids.sampled is None else b"%d" % ids.sampled
    put(b3.SAMPLED, sampled, insert=not ids.debug)
    put(b3.FLAGS, b"%d" % ids.debug, insert=ids.debug)


def _put_single(put: _Put, ids: b3.Context) -> None:
    long = b"%032x-%016x" % (ids.trace_id, ids.span_id)
    forms = [long]
    if not ids.trace_id >> 64:
        forms.append(b"%016x-%016x" % (ids.trace_id, ids.span_id))
    if ids.sampled is not None:
        decision = b"d" if ids.debug else b"%d" % ids.sampled
        forms = [form + b"-" + decision for form in forms]
        if ids.parent_id is not None:
            parent = b"-%016x" % ids.parent_id
            forms = [form + more for more in (parent, b"") for form in forms]
    # Its parts have places of their own only in one that is valid.
    put(b3.SINGLE, *forms, fits=put.plan.context.b3_ids)
