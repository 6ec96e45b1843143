"""The headers of a context: the kernel's, value for value."""

import re
from ctypes import create_string_buffer
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netns.conformance_heads import START, TOKEN, head_of, heads
from netns.conformance_rows import OPTIONS, ROWS, Row
from netns.injection_model import UUID, Chosen, fields_of, plan_of
from podspan.agent import b3
from podspan.agent.context import read_context
from podspan.agent.exchange import (
    FLAG_ACCEPTED_DEBUG,
    FLAG_SAMPLED,
    FLAG_SHARED,
    Link,
)
from podspan.agent.ids import derive_id, sample_hash
from podspan.agent.redirect.http1 import Http1
from podspan.agent.redirect.inject import (
    Direction,
    Edit,
    Given,
    Propagation,
    apply_to_headers,
    context_of_stream,
    edit_for,
    new_root,
)
from podspan.agent.redirect.layer import Side
from unit import context_rows
from unit.context_rows import (
    IDS,
    PARENT_ID,
    SPAN,
    SPAN_ID,
    TRACE,
    TRACE_ID,
    W3C,
    single,
)
from unit.native.scanner import Native
from unit.redirect_relay import Relay

# Always the same examples: a failure is a change's, not the day's.
FUZZ = settings(derandomize=True, deadline=None, max_examples=400)

OUTBOUND, INBOUND = Direction.OUTBOUND, Direction.INBOUND
REQUEST_ID = b"7f1c5b6e-0f5a-9f0e-9c3d-1a2b3c4d5e6f"
THREAD = Given(TRACE_ID, SPAN_ID, PARENT_ID, FLAG_SAMPLED, Link.THREAD, REQUEST_ID)
DEFAULTS = Propagation()
# Names of lines that the kernel has hidden.
HIDDEN = re.compile(rb"x-no-.*|no|noaceparent")


def propagation_of(options: str, percent: float | None) -> Propagation:
    chosen = OPTIONS[options]
    return Propagation(
        chosen.span_ids,
        chosen.unsampled,
        chosen.propagate,
        chosen.sampling if percent is None else percent,
    )


def numbers():
    """Ids by the row, each with all its digits."""
    return (0x1234567890ABCDEF * n & 2**64 - 1 for n in count(1)).__next__


def through_http1(
    head: bytes, options: str, percent: float | None
) -> tuple[Given, bytes]:
    """The context of a client's request, and its head behind the proxy."""
    given_ = []

    def give(offset, headers):
        assert offset == len(head)
        chosen = propagation_of(options, percent)
        given_.append(context_of_stream(headers, OUTBOUND, chosen, numbers()))
        return given_[-1]

    relay = Relay(Http1(OUTBOUND, give, propagation_of(options, percent)))
    relay.feed(Side.DOWN, head)
    return given_[0], relay.arrived[Side.UP]


def by_name(head: bytes) -> dict[bytes, list[bytes]]:
    """The values of each name in their order, without hidden lines."""
    found: dict[bytes, list[bytes]] = {}
    for one in fields_of(head):
        if not HIDDEN.fullmatch(one.name):
            found.setdefault(one.name, []).append(one.value)
    return found


def filled(text: str, context: Given) -> str:
    """`text` of a row with what was chosen."""

    def token(match):
        if match[2]:
            assert re.fullmatch(UUID % match[2].encode(), context.request_id)
            return context.request_id.decode()
        digits = f"{context.trace_id:032x}"
        return {
            "<trace>": digits,
            "<low>": digits[16:],
            "<span>": f"{context.span_id:016x}",
        }[match[1]]

    return TOKEN.sub(token, text)


# The kernel can hide so many lines and no more; a copy leaves out what it likes.
WRITTEN = [row for row in ROWS if row.injected]


@pytest.mark.parametrize("row", WRITTEN, ids=[row.name for row in WRITTEN])
def test_what_the_kernel_writes_is_written(row: Row):
    context, arrived = through_http1(head_of(row.sent), row.options, row.percent)
    assert by_name(arrived) == by_name(head_of(filled(row.arrives, context)))
    trace_id, parent_id = context.trace_id, 0
    if row.child_of:
        trace_id, parent_id = (int(text, 16) for text in row.child_of)
    assert (context.trace_id, context.parent_id) == (trace_id, parent_id)
    assert context.link is (Link.HEADER if row.child_of else Link.NONE)
    flags = FLAG_SAMPLED * row.sampled | FLAG_ACCEPTED_DEBUG * row.debug
    assert context.flags == flags


def check_model(head: bytes, options: str, percent: float | None) -> None:
    """Fail unless the kernel would have written the same, had it no limit of lines."""
    context, arrived = through_http1(head, options, percent)
    chosen = Chosen(context.trace_id, context.span_id, context.request_id)
    plan = plan_of(head, chosen, OPTIONS[options], percent)
    plan.repeated = 0
    assert by_name(arrived) == by_name(plan.applied(head))
    # Nothing is named as what the kernel hides, and what is no context stays.
    sent_lines, lines = head.split(b"\r\n"), arrived.split(b"\r\n")
    written = {*b3.NAMES, b"traceparent"}
    kept = [line for line in sent_lines if name_of(line) not in written]
    assert [line for line in lines if line in kept] == kept
    assert not any(HIDDEN.fullmatch(name_of(line)) for line in lines)


def name_of(line: bytes) -> bytes:
    return line.partition(b":")[0].lower()


@FUZZ
@given(
    head=heads(),
    options=st.sampled_from(sorted(OPTIONS)),
    percent=st.sampled_from([0, 10, 100]),
)
def test_any_head_becomes_what_the_kernel_makes_of_it(head, options, percent):
    check_model(head, options, percent)


@pytest.mark.parametrize(
    "row", context_rows.ROWS, ids=[row.name for row in context_rows.ROWS]
)
def test_every_context_is_passed_on_in_every_form(row):
    head = START + b"".join(b"%s: %s\r\n" % line for line in row.headers) + b"\r\n"
    for options in OPTIONS:
        for percent in (0, 100):
            check_model(head, options, percent)


@pytest.mark.parametrize("copies", [5, 50])
def test_any_number_of_further_lines_goes(copies):
    head = head_of(f"X-B3-TraceId: {TRACE.decode()}\nX-B3-SpanId: {SPAN.decode()}\n")
    again = head[:-2] + b"x-b3-spanid: a\r\nb3: 1\r\n" * copies + b"\r\n"
    _, arrived = through_http1(again, "default", None)
    found = by_name(arrived)
    assert len(found[b"x-b3-spanid"]) == len(found[b"b3"]) == 1


# --- a context that the kernel found by thread: the head has none ---


def test_a_child_by_thread_has_its_parent_and_the_served_request_id():
    edit = edit_for([(b"host", b"a")], THREAD, DEFAULTS)
    assert edit == Edit(
        (
            (b"x-request-id", REQUEST_ID),
            (b"x-b3-traceid", TRACE),
            (b"x-b3-spanid", SPAN),
            (b"x-b3-parentspanid", b"%016x" % PARENT_ID),
            (b"x-b3-sampled", b"1"),
        ),
        frozenset(),
    )


def test_the_heads_own_request_id_is_kept():
    edit = edit_for([(b"X-Request-Id", b"")], THREAD, DEFAULTS)
    assert b"x-request-id" not in dict(edit.values)


def test_without_a_request_id_none_is_written():
    context = Given(TRACE_ID, SPAN_ID, 0, 0, Link.NONE)
    assert b"x-request-id" not in dict(edit_for([], context, DEFAULTS).values)


@pytest.mark.parametrize(("unsampled", "told"), [("0", b"0"), ("defer", None)])
def test_an_unsampled_trace_is_told_or_deferred(unsampled, told):
    context = Given(TRACE_ID, SPAN_ID, PARENT_ID, 0, Link.THREAD)
    options = Propagation(unsampled=unsampled, propagate=frozenset({"b3multi", "b3"}))
    values = dict(edit_for([], context, options).values)
    assert values.get(b"x-b3-sampled") == told
    ids = b"%032x-%016x" % (TRACE_ID, SPAN_ID)
    parent = b"-0-%016x" % PARENT_ID
    assert values[b"b3"] == (ids + parent if told else ids)


# --- roots ---


def test_a_roots_span_is_the_low_half_of_its_trace():
    context = new_root([], DEFAULTS, numbers())
    assert context.trace_id >> 64
    assert context.span_id == context.trace_id % 2**64
    assert (context.parent_id, context.link) == (0, Link.NONE)
    assert context.flags == FLAG_SAMPLED


def test_no_id_is_zero():
    context = new_root([], DEFAULTS, lambda: 0)
    assert context.span_id == 1
    assert context.trace_id >> 64 == 1
    assert context_of_stream(IDS, OUTBOUND, DEFAULTS, lambda: 0).span_id == 1


@pytest.mark.parametrize("percent", [0.0, 3.5, 50.0, 100.0])
def test_the_rate_samples_by_the_trace_id(percent):
    options = Propagation(sampling=percent)
    random64 = numbers()
    for _ in range(300):
        context = new_root([], options, random64)
        sampled = sample_hash(context.trace_id) < percent / 100 * 2**32
        assert bool(context.flags & FLAG_SAMPLED) == sampled
        reason = b"9" if sampled else b"4"
        assert re.fullmatch(UUID % reason, context.request_id)


@pytest.mark.parametrize(("high", "low"), [(0, 0), (2**64 - 1,) * 2, (2**63 + 5, 77)])
def test_a_request_id_is_written_as_the_kernel_writes_it(high, low, native):
    ids = iter([1, 1, high, low])
    context = new_root([], DEFAULTS, lambda: next(ids))
    assert context.request_id == uuid_of(native, high, low, b"9")


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Native:
    return Native(tmp_path_factory.mktemp("native"))


def uuid_of(native: Native, high: int, low: int, reason: bytes) -> bytes:
    text = create_string_buffer(36)
    native.lib.b3_uuid_write(text, high, low, reason[0])
    return text.raw


# --- streams of HTTP/2 ---


def test_a_shared_server_has_the_clients_ids():
    headers = [*IDS, (b"x-b3-parentspanid", b"%016x" % PARENT_ID)]
    context = context_of_stream(headers, INBOUND, DEFAULTS, numbers())
    flags = FLAG_SAMPLED | FLAG_SHARED
    assert context == Given(TRACE_ID, SPAN_ID, PARENT_ID, flags, Link.HEADER)


def test_a_server_of_its_own_is_the_clients_child():
    options = Propagation(span_ids="child")
    context = context_of_stream(IDS, INBOUND, options, numbers())
    derived = derive_id(SPAN_ID)
    assert context == Given(TRACE_ID, derived, SPAN_ID, FLAG_SAMPLED, Link.HEADER)


@pytest.mark.parametrize(
    ("span_ids", "received", "parent_id"),
    [
        ("shared", True, SPAN_ID),
        ("child", False, SPAN_ID),
        ("child", True, derive_id(SPAN_ID)),
    ],
)
def test_who_forwards_what_it_received_means_its_server(span_ids, received, parent_id):
    options = Propagation(span_ids=span_ids)
    context = context_of_stream(
        IDS, OUTBOUND, options, numbers(), lambda span: received and span == SPAN_ID
    )
    assert (context.trace_id, context.parent_id) == (TRACE_ID, parent_id)
    assert context.span_id not in (SPAN_ID, parent_id)


@pytest.mark.parametrize("headers", [[], [(b"x-b3-traceid", b"junk")], [(b"b3", b"1")]])
@pytest.mark.parametrize("direction", Direction)
def test_a_stream_without_ids_begins_a_trace(headers, direction):
    context = context_of_stream(headers, direction, DEFAULTS, numbers())
    assert context == new_root(headers, DEFAULTS, numbers())


def test_of_a_list_of_headers_the_first_is_set_and_others_go():
    method = (b":method", b"GET")
    headers = [method, (b"b3", b"1"), (b"x", b"y"), (b"b3", b"0"), (b"x", b"z"), *W3C]
    edit = Edit(((b"new", b"1"), (b"b3", b"d")), frozenset({b"traceparent"}))
    after = apply_to_headers(headers, edit)
    assert after == [method, (b"b3", b"d"), (b"x", b"y"), (b"x", b"z"), (b"new", b"1")]
    assert after[0] is method


def test_applying_twice_equals_applying_once():
    headers = [single(TRACE, SPAN, b"1"), *IDS, (b"x-b3-flags", b"true")]
    edit = edit_for(headers, THREAD, DEFAULTS)
    once = apply_to_headers(headers, edit)
    assert apply_to_headers(once, edit) == once
    assert read_context(once).span_id == SPAN_ID
