"""traceparent: what is read, what is refused, what is written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.traceparent import TraceParent, parse, write

TRACE = b"0af7651916cd43dd8448eb211c80319c"
SPAN = b"b7ad6b7169203331"
SAMPLED = TraceParent(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)

parents = st.builds(
    TraceParent,
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
)


@given(parents)
def test_what_is_written_is_read_back(parent):
    value = write(parent)
    assert len(value) == 55
    assert parse(value) == parent


def test_the_example_of_section_3_1():
    value = b"-".join([b"00", TRACE, SPAN, b"01"])
    assert parse(value) == SAMPLED
    assert write(SAMPLED) == value


@pytest.mark.parametrize(
    ("flags", "sampled"),
    [(b"00", False), (b"01", True), (b"09", True), (b"ff", True), (b"fe", False)],
)
def test_the_lowest_flag_is_the_decision(flags, sampled):
    parent = parse(b"-".join([b"00", TRACE, SPAN, flags]))
    assert parent == TraceParent(SAMPLED.trace_id, SAMPLED.span_id, sampled)


@pytest.mark.parametrize("more", [b"", b"-", b"-what-the-future-will-be-like", b"-\n"])
def test_a_later_version_may_go_on(more):
    assert parse(b"-".join([b"cc", TRACE, SPAN, b"01"]) + more) == SAMPLED


@pytest.mark.parametrize(
    "parts",
    [
        (b"ff", TRACE, SPAN, b"01"),
        (b"0", TRACE, SPAN, b"01"),
        (b"0A", TRACE, SPAN, b"01"),
        (b"00", TRACE.upper(), SPAN, b"01"),
        (b"00", TRACE[1:], SPAN, b"01"),
        (b"00", b"0" * 32, SPAN, b"01"),
        (b"00", TRACE, b"0" * 16, b"01"),
        (b"00", TRACE, SPAN + b"0", b"01"),
        (b"00", TRACE, SPAN, b"1"),
        (b"00", TRACE, SPAN, b"0G"),
        (b"00", TRACE, SPAN),
        (b"00", TRACE, SPAN, b"01", b""),
        (b"00", TRACE, SPAN, b"01", b"what"),
        (b"cc", TRACE, SPAN, b"01.what"),
        (b"cc", TRACE, SPAN, b"011"),
        (b"00" + TRACE, SPAN, b"01"),
        (b"",),
    ],
)
def test_malformed_is_no_parent(parts):
    assert parse(b"-".join(parts)) is None
