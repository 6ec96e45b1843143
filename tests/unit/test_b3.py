"""B3: what is read, what is refused, what is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.b3 import Context, extract, multi_headers, single_header

TRACE = b"463ac35c9f6413ad48485a3953bb6124"
TRACE_ID = 0x463AC35C9F6413AD48485A3953BB6124
SPAN = b"a2fb4a1d1a96d312"
SPAN_ID = 0xA2FB4A1D1A96D312
PARENT = b"0020000000000001"
PARENT_ID = 0x0020000000000001
IDS = [(b"x-b3-traceid", TRACE), (b"x-b3-spanid", SPAN)]

span_ids = st.integers(1, 2**64 - 1)
trace_ids = st.integers(1, 2**128 - 1) | st.integers(1, 2**64 - 1)


@st.composite
def contexts(draw):
    debug = draw(st.booleans())
    sampled = True if debug else draw(st.sampled_from([True, False, None]))
    if draw(st.booleans()):
        return Context(sampled=sampled, debug=debug)
    span_id = draw(span_ids)
    parent_id = draw(st.none() | span_ids.filter(lambda parent: parent != span_id))
    return Context(draw(trace_ids), span_id, parent_id, sampled, debug)


@given(contexts())
def test_what_is_written_as_multi_is_read_back(context):
    said_something = context.has_ids or context.sampled is not None
    assert extract(multi_headers(context)) == (context if said_something else None)


@given(contexts())
def test_what_is_written_as_single_is_read_back(context):
    value = single_header(context)
    if value is None:
        assert not context.has_ids
        assert context.sampled is None
        return
    read = extract([(b"b3", value)])
    if context.sampled is None:  # the grammar has no place for the parent then
        assert read == Context(context.trace_id, context.span_id)
    else:
        assert read == context


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-sampled",
                             b"x-b3-parentspanid", b"x-b3-flags", b"host"]),
            st.binary(max_size=70)
            | st.from_regex(rb"[0-9a-fA-F-]{0,70}", fullmatch=True)
            | st.sampled_from([TRACE, SPAN, PARENT, b"0", b"1", b"d"]),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_whatever_comes_the_ids_are_ids_or_there_are_none(headers):
    context = extract(headers)
    if context is None:
        return
    assert (context.trace_id == 0) == (context.span_id == 0)
    assert 0 <= context.trace_id < 2**128
    assert 0 <= context.span_id < 2**64
    assert context.parent_id != context.span_id or context.parent_id is None
    assert context.parent_id != 0
    assert context.sampled or not context.debug


def test_all_multi_headers():
    headers = [
        *IDS,
        (b"x-b3-parentspanid", PARENT),
        (b"x-b3-sampled", b"1"),
    ]
    assert extract(headers) == Context(TRACE_ID, SPAN_ID, PARENT_ID, True)
    assert multi_headers(Context(TRACE_ID, SPAN_ID, PARENT_ID, True)) == headers


def test_a_64_bit_trace_id_is_16_digits():
    headers = [(b"x-b3-traceid", SPAN), (b"x-b3-spanid", SPAN)]
    assert extract(headers) == Context(SPAN_ID, SPAN_ID)
    assert multi_headers(Context(SPAN_ID, SPAN_ID)) == headers


@pytest.mark.parametrize(
    ("text", "sampled"),
    [(b"1", True), (b"true", True), (b"0", False), (b"false", False)],
)
def test_sampled_is_read_with_ids_and_without(text, sampled):
    header = (b"X-B3-Sampled", text)
    assert extract([header]) == Context(sampled=sampled)
    assert extract([*IDS, header]) == Context(TRACE_ID, SPAN_ID, None, sampled)


def test_debug_implies_sampled_and_is_written_without_it():
    headers = [*IDS, (b"x-b3-flags", b"1")]
    context = Context(TRACE_ID, SPAN_ID, None, True, True)
    assert extract(headers) == context
    assert extract([*headers, (b"x-b3-sampled", b"0")]) == context
    assert multi_headers(context) == headers


def test_flags_other_than_debug_are_ignored():
    assert extract([*IDS, (b"x-b3-flags", b"7")]) == Context(TRACE_ID, SPAN_ID)
    assert extract([(b"x-b3-flags", b"0")]) is None


def test_the_first_of_repeated_headers_wins():
    later = [(b"X-B3-SpanId", b"1" * 16), (b"x-b3-traceid", b"junk")]
    assert extract([*IDS, *later]) == Context(TRACE_ID, SPAN_ID)


def test_single_beats_multi_also_when_it_is_malformed():
    assert extract([*IDS, (b"b3", b"0")]) == Context(sampled=False)
    assert extract([*IDS, (b"b3", b"junk")]) is None


@pytest.mark.parametrize(
    ("value", "context"),
    [
        (b"0", Context(sampled=False)),
        (b"1", Context(sampled=True)),
        (b"d", Context(sampled=True, debug=True)),
        (TRACE + b"-" + SPAN, Context(TRACE_ID, SPAN_ID)),
        (TRACE + b"-" + SPAN + b"-0", Context(TRACE_ID, SPAN_ID, None, False)),
        (TRACE + b"-" + SPAN + b"-d", Context(TRACE_ID, SPAN_ID, None, True, True)),
        (
            TRACE + b"-" + SPAN + b"-1-" + PARENT,
            Context(TRACE_ID, SPAN_ID, PARENT_ID, True),
        ),
    ],
)
def test_single(value, context):
    assert extract([(b"B3", value)]) == context


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"-",
        b"2",
        b"true",
        TRACE,
        TRACE + b"-",
        TRACE + b"-" + SPAN + b"-",
        TRACE + b"-" + SPAN + b"-2",
        TRACE + b"-" + SPAN + b"-true",
        TRACE + b"-" + SPAN + b"-" + PARENT,
        TRACE + b"-" + SPAN + b"-1-",
        TRACE + b"-" + SPAN + b"-1-" + PARENT + b"-1",
        TRACE + b"-" + SPAN + b" ",
        TRACE.upper() + b"-" + SPAN,
        b"0" * 32 + b"-" + SPAN,
        TRACE + b"-" + b"0" * 16,
    ],
)
def test_malformed_single_is_no_context(value):
    assert extract([(b"b3", value)]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-b3-traceid", b""),
        (b"x-b3-traceid", b"-"),
        (b"x-b3-traceid", TRACE[1:]),
        (b"x-b3-traceid", TRACE + b"0"),
        (b"x-b3-traceid", TRACE.upper()),
        (b"x-b3-traceid", b"0" * 32),
        (b"x-b3-traceid", b"+" + TRACE[1:]),
        (b"x-b3-traceid", b"0x" + TRACE[2:]),
        (b"x-b3-traceid", TRACE[:15] + b"_" + TRACE[16:]),
        (b"x-b3-spanid", SPAN[1:]),
        (b"x-b3-spanid", b"0" * 16),
        (b"x-b3-spanid", b"g" * 16),
        (b"x-b3-parentspanid", b"1"),
        (b"x-b3-parentspanid", b"G" * 16),
        (b"x-b3-sampled", b""),
        (b"x-b3-sampled", b"yes"),
        (b"x-b3-sampled", b"d"),
    ],
)
def test_one_malformed_value_is_no_context(name, value):
    good = dict([*IDS, (b"x-b3-parentspanid", PARENT), (b"x-b3-sampled", b"1")])
    assert extract(good.items()) is not None
    assert extract({**good, name: value}.items()) is None


@pytest.mark.parametrize("header", [*IDS, (b"x-b3-parentspanid", PARENT)])
def test_some_ids_without_the_others_are_no_context(header):
    assert extract([header]) is None


@pytest.mark.parametrize("parent", [b"", b"0" * 16, SPAN])
def test_a_parent_that_is_none_is_dropped(parent):
    headers = [*IDS, (b"x-b3-parentspanid", parent)]
    assert extract(headers) == Context(TRACE_ID, SPAN_ID)
    assert extract([(b"b3", b"-".join([TRACE, SPAN, b"1", SPAN]))]) == Context(
        TRACE_ID, SPAN_ID, None, True
    )


def test_no_b3_header_is_no_context():
    assert extract([(b"host", b"a"), (b"x-b3", b"1")]) is None
    assert multi_headers(Context()) == []
    assert single_header(Context()) is None
