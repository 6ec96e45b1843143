"""bpf/b3.h against the table and agent/context.py: the same facts of the same head."""

import re
import struct
from collections.abc import Iterable, Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from podspan.agent.b3 import Header
from podspan.agent.context import Decision, HeadContext, read_context
from podspan.agent.http_head import parse_request
from podspan.agent.kernel import grammar
from unit.context_rows import (
    IDS,
    PARENT,
    ROWS,
    SHORT,
    SHORT_IDS,
    SPAN,
    TRACE,
    UUID,
    W3C,
    W3C_SPAN,
    W3C_TRACE,
    reason,
    sampled,
    single,
    w3c,
)
from unit.native.scanner import B3_SOURCE, Native

# Always the same examples: a failure is a change's, not the day's.
FUZZ = settings(derandomize=True, deadline=None, max_examples=800)


def head_of(headers: Iterable[Header], after: bytes = b"") -> bytes:
    """A head with these headers, each value followed by `after`: spaces and tabs."""
    lines = b"".join(name + b": " + value + after + b"\r\n" for name, value in headers)
    return b"GET / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n"


def expected_of(head: bytes) -> HeadContext:
    parsed = parse_request(head)
    assert parsed is not None
    return read_context(parsed.headers)


# `struct head_context`.
LAYOUT = struct.Struct("<4Q9B7s")


def native_of(native: Native, head: bytes) -> HeadContext:
    found = native.read_context(head)
    assert found is not None
    high, low, span, parent, has_ids, *facts, reserved = LAYOUT.unpack(found)
    context = HeadContext(high << 64 | low, span, parent, *facts)
    assert has_ids == context.has_ids
    assert has_ids or not (context.trace_id or parent)
    assert not any(reserved)
    return context


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return Native(tmp_path_factory.mktemp("context"))


def test_decisions_have_their_numbers():
    assert grammar.enumerators(B3_SOURCE, "decision") == {
        f"DECISION_{member.name}": member.value for member in Decision
    }


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_head_says_what_the_table_says(native, row):
    assert native_of(native, head_of(row.headers)) == row.says


# --- heads that are nearly right ---

RIGHT = [
    [*IDS, (b"X-B3-ParentSpanId", PARENT), sampled(b"1"), (b"X-B3-Flags", b"1")],
    [*SHORT_IDS, (b"X-B3-ParentSpanId", b""), sampled(b"true"), reason(b"9")],
    [sampled(b"false"), (b"X-B3-Flags", b"0"), *W3C],
    [single(TRACE, SPAN, b"1", PARENT), *W3C],
    [single(SHORT, SPAN, b"0", PARENT), *IDS],
    [single(TRACE, SPAN), reason(b"4")],
    [single(SHORT, SPAN, b"d")],
    [single(b"0"), (b"x-client-trace-id", b"1")],
    [w3c(b"01", W3C_TRACE, W3C_SPAN, b"01", b"x")],
    [w3c(b"cc", W3C_TRACE, W3C_SPAN, b"00", b""), reason(b"b")],
]
OTHER_BYTES = [bytes([byte]) for byte in b"019afgA- /:`\xff"]


def nearly(headers: list[Header]) -> Iterator[list[Header]]:
    """`headers`, a byte of a value changed, gone or too many, or without a line."""
    for i, (name, value) in enumerate(headers):
        before, after = headers[:i], headers[i + 1 :]
        yield before + after
        for at in range(len(value) + 1):
            for byte in OTHER_BYTES:
                yield [*before, (name, value[:at] + byte + value[at + 1 :]), *after]
                yield [*before, (name, value[:at] + byte + value[at:]), *after]
            yield [*before, (name, value[:at] + value[at + 1 :]), *after]
            yield [*before, (name, value[:at]), *after]


@cache
def cases() -> dict[bytes, HeadContext]:
    """Heads, and what they say: the table, what is right, and what is nearly right."""
    heads = [head_of(row.headers) for row in ROWS]
    heads += [head_of(row.headers, b"\t \t") for row in ROWS]
    for right in RIGHT:
        heads += [head_of(right), *map(head_of, nearly(right))]
    return {head: expected_of(head) for head in heads}


def differing(native: Native) -> Iterator[bytes]:
    for head, expected in cases().items():
        try:
            if native_of(native, head) == expected:
                continue
        except AssertionError:  # ids without has_ids
            pass
        yield head


def test_the_kernel_says_the_same_of_every_value_that_is_nearly_right(native):
    assert next(differing(native), None) is None


def test_most_that_is_nearly_right_is_wrong():
    wrong = sum(not context.has_ids for context in cases().values())
    assert len(cases()) // 3 < wrong < len(cases())


# --- generated heads ---

hex_digits = st.sampled_from(b"0123456789abcdef")
ids16 = st.lists(hex_digits, min_size=16, max_size=16).map(bytes)
ids16 |= st.sampled_from([SPAN, PARENT, b"0" * 16, b"f" * 16])
ids32 = st.tuples(ids16, ids16).map(b"".join)
traces = ids16 | ids32
decisions = st.sampled_from([b"0", b"1", b"d"])
octets = st.tuples(hex_digits, hex_digits).map(bytes) | st.sampled_from([b"00", b"ff"])


def joined(*parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(*parts).map(b"-".join)


VALUES = {
    b"x-b3-traceid": traces,
    b"x-b3-spanid": ids16,
    b"x-b3-parentspanid": ids16 | st.just(b""),
    b"x-b3-sampled": st.sampled_from([b"0", b"1", b"true", b"false"]),
    b"x-b3-flags": st.sampled_from([b"1", b"0", b"3"]),
    b"b3": decisions
    | joined(traces, ids16)
    | joined(traces, ids16, decisions)
    | joined(traces, ids16, decisions, ids16),
    b"traceparent": joined(octets, ids32, ids16, octets)
    | joined(octets, ids32, ids16, octets, st.sampled_from([b"", b"x-y"])),
    b"x-request-id": st.sampled_from(
        [UUID, reason(b"9")[1], reason(b"a")[1], b"9" * 30]
    ),
    b"x-client-trace-id": st.sampled_from([b"", b"7f1c"]),
    b"accept": st.just(b"*/*"),
}
FIELD = [*range(0x20, 0x7F), *range(0x80, 0x100), 0x09]
field_bytes = st.sampled_from([b"-", b" ", b"0", b"1", b"A", b"g"])
field_bytes |= st.sampled_from(FIELD).map(lambda byte: bytes([byte]))
blank = st.sampled_from([b"", b" ", b"\t ", b"   "])


@st.composite
def lines(draw, names):
    name = draw(names)
    # Seldom a value that is another header's.
    value = draw(VALUES[draw(names) if draw(st.integers(0, 19)) == 0 else name])
    for _ in range(draw(st.sampled_from([0] * 8 + [1, 2]))):
        at = draw(st.integers(0, len(value)))
        gone = draw(st.integers(0, 2))
        value = value[:at] + draw(st.just(b"") | field_bytes) + value[at + gone :]
    spelt = draw(st.sampled_from([name, name.upper(), name.title()]))
    return spelt + b":" + draw(blank) + value + draw(blank) + b"\r\n"


MULTI = st.sampled_from([name for name in VALUES if name.startswith(b"x-b3-")])


@st.composite
def heads(draw):
    """Of any headers; or of all of multi, perhaps others, in any order."""
    chosen = draw(st.lists(lines(st.sampled_from(list(VALUES))), max_size=5))
    if draw(st.booleans()):
        for name in (b"x-b3-traceid", b"x-b3-spanid"):
            chosen.append(draw(lines(st.just(name))))
        chosen += draw(st.lists(lines(MULTI), max_size=3))
    if draw(st.booleans()):
        chosen = draw(st.permutations(chosen))
    return b"GET / HTTP/1.1\r\n" + b"".join(chosen) + b"\r\n"


@FUZZ
@given(heads())
def test_generated_heads_say_what_the_reference_says(native, head):
    assert native_of(native, head) == expected_of(head)


# --- the tests are able to fail ---

SPAN_LENGTH = "bad |= nonzero(s->length_of[HEADER_SPAN_ID] ^ 16);"
OF_ITSELF = "x->parent_id &= where(nonzero(x->parent_id ^ x->span_id));"
IDS_SEEN = "1U << HEADER_TRACE_ID | 1U << HEADER_SPAN_ID"
UNDECIDED = "taken &= same(x->decision, DECISION_NONE);"
HAS_B3 = "has_header(s, HEADER_B3)"
BESIDE = "(x->has_ids | x->malformed) ^ 1"
VALID = "x->traceparent = bad ^ 1;"
FLAG_1 = "length_of[HEADER_FLAGS], '1', 1)"
ID_128 = "x->trace_id_high | x->trace_id_low, 0"
SOURCE_MUTANTS = {
    "ids of one bit": ("(a | minus) >> 63", "(a ^ minus) >> 63"),
    "half a byte": ("(64 - 8 * size)", "(65 - 8 * size)"),
    "tabs after a word": ("(64 - 8 * size)", "(63 - 8 * size)"),
    "upper-case digits": ("(c - 'a') | ('f' - c)", "(c - 'A') | ('f' - c)"),
    "digit g": ("('f' - c)", "('g' - c)"),
    "digit :": ("('9' - c)", "(':' - c)"),
    "digit /": ("(c - '0') |", "(c - '/') |"),
    "one digit is enough": (
        "*bad |= no_digit & no_letter",
        "*bad = no_digit & no_letter",
    ),
    "bytes of one digit": ("hex_value(from[0], bad) << 4 |", ""),
    "debug is accept": ("DECISION_DEBUG * debug;", "DECISION_ACCEPT * debug;"),
    "spaces count": ("<< (64 - 8 * size)", "<< 0"),
    "words by their beginning": (" & same(length, size)", ""),
    "half a trace id": (
        "& where(is_long);\n\tx->trace_id_low",
        "& 0;\n\tx->trace_id_low",
    ),
    "16 digits twice": (
        "hex_read(digits, &bad) & where(is_long)",
        "hex_read(digits, &bad)",
    ),
    "the first half is the low one": ("digits + (low_at & 16)", "digits"),
    "a parent that is malformed": ("bad |= bad_parent & has_parent;", ""),
    "a parent where none is": ("bad_parent & has_parent", "bad_parent"),
    "a parent of nothing": ("& where(has_parent);", ";"),
    "a parent of itself": (OF_ITSELF, ""),
    "trace ids of zeros": ("same(x->trace_id_high | x->trace_id_low, 0) |", ""),
    "trace ids of half zeros": (ID_128, "x->trace_id_low, 0"),
    "of the other half": (ID_128, "x->trace_id_high, 0"),
    "span ids of zeros": ("| same(x->span_id, 0)", ""),
    "no 0": ("is_word(t->sampled, length, '0', 1) |", ""),
    "no false": ("'f', 'a', 'l', 's', 'e'", "'f', 'a', 'l', 's', 'o'"),
    "no 1": ("is_word(t->sampled, length, '1', 1) |", ""),
    "no true": ("'t', 'r', 'u', 'e'", "'t', 'r', 'u', 'a'"),
    "any flags": (FLAG_1, "length_of[HEADER_FLAGS], 0, 0)"),
    "flag 3": (FLAG_1, "length_of[HEADER_FLAGS], '0', 1)"),
    "any decision": ("has_header(s, HEADER_SAMPLED) ^ (deny | accept)", "0"),
    "a decision in every head": ("has_header(s, HEADER_SAMPLED) ^", "1 ^"),
    "a parent alone": ("return bad | has_parent;", "return bad;"),
    "a trace id alone": (IDS_SEEN, "1U << HEADER_SPAN_ID"),
    "a span id alone": (IDS_SEEN, "1U << HEADER_TRACE_ID"),
    "any parent's length": ("bad |= has_parent & nonzero(length ^ 16);", ""),
    "no empty parent": ("has_parent = nonzero(length);", "has_parent = 1;"),
    "any span's length": (SPAN_LENGTH, ""),
    "longer trace ids": ("nonzero(length ^ 16) & nonzero(length ^ 32)", "0"),
    "no short trace ids": ("nonzero(length ^ 16) & nonzero", "nonzero"),
    "no long trace ids": ("& nonzero(length ^ 32)", ""),
    "a decision of any length": ("if (length == 1)", "if (length <= 2)"),
    "no decision alone": ("if (length == 1)", "if (0)"),
    "any decision alone": ("return same(x->decision, DECISION_NONE);", "return 0;"),
    "b3 of any length": ("bad = has_parent & nonzero(left ^ 19);", "bad = 0;"),
    "b3 of its parent only": ("decided & nonzero(left ^ 2)", "decided"),
    "no dash after the trace id": ("bad |= nonzero(b3[16] ^ '-');", ""),
    "no dash before the decision": ("(nonzero(b3[33] ^ '-') |", "("),
    "no dash before the parent": ("bad |= has_parent & nonzero(b3[35] ^ '-');", ""),
    "any decision in b3": ("| same(x->decision, DECISION_NONE))", ")"),
    "a decision where none is": ("bad |= decided & (", "bad |= ("),
    "short b3 only": ("more = is_long * 16,", "more = 0,"),
    "long b3 only": ("is_long = nonzero(t->b3[16] ^ '-')", "is_long = 1"),
    "b3_ids unsaid": ("x->b3_ids = 1;", ""),
    "b3_long unsaid": ("x->b3_long = is_long;", ""),
    "b3_decided unsaid": ("x->b3_decided = decided;", ""),
    "b3_parent unsaid": ("x->b3_parent = has_parent;", ""),
    "no dashes": ("(text[2] ^ '-') | (text[35] ^ '-') | (text[52] ^ '-')", "0"),
    "no first dash": ("(text[2] ^ '-') |", ""),
    "no second dash": ("(text[35] ^ '-') |", ""),
    "no third dash": ("| (text[52] ^ '-')", ""),
    "version ff": ("same(version, 0xff) |", ""),
    "traces of zeros": ("same(high | low, 0)", "0"),
    "traces of half zeros": ("same(high | low, 0)", "same(low, 0)"),
    "traces of the other half": ("same(high | low, 0)", "same(high, 0)"),
    "spans of zeros": ("| same(span, 0)", ""),
    "version 00 goes on": ("same(version, 0) |", ""),
    "later versions do not": ("other_length & (same(version, 0) |", "other_length | ("),
    "no fourth dash": ("| nonzero(text[55] ^ '-'))", ")"),
    "it counts, or is not valid": (VALID, "x->traceparent = (bad | x->has_ids) ^ 1;"),
    "beside B3 ids": (BESIDE, "x->malformed ^ 1"),
    "beside malformed B3": (BESIDE, "x->has_ids ^ 1"),
    "all its flags": ("(flags & 1) ^ 1, flags & 1", "!flags, !!flags"),
    "its decision first": (UNDECIDED, "x->decision &= ~where(taken);"),
    "its decision alone": (UNDECIDED, "taken = same(x->decision, DECISION_NONE);"),
    "multi beats single": (HAS_B3, f"{HAS_B3} && !has_header(s, HEADER_SPAN_ID)"),
    "malformed, and yet": ("keep = where(bad ^ 1);", "keep = ~0ULL;"),
    "malformed unsaid": ("x->malformed = bad;", ""),
    **{
        f"malformed with {field}": (f"x->{field} &= keep;", "")
        for field in (
            *("trace_id_high", "trace_id_low", "span_id", "parent_id", "has_ids"),
            *("decision", "b3_ids", "b3_long", "b3_decided", "b3_parent"),
        )
    },
    "what was there before": ("__builtin_memset(x, 0, sizeof(*x));", ""),
    "no client": ("has_header(s, HEADER_CLIENT_TRACE_ID) |", ""),
    "request ids of any length": ("same(s->length_of[HEADER_REQUEST_ID], 36) &", ""),
    "reason 9": ("same(reason, '9') |", ""),
    "reason a": ("| same(reason, 'a')", ""),
    "reason b": ("| same(reason, 'b')", ""),
    "the reason's place": ("t->request_id[14]", "t->request_id[15]"),
}


@pytest.mark.parametrize(("old", "new"), SOURCE_MUTANTS.values(), ids=SOURCE_MUTANTS)
def test_a_mutant_of_the_source_is_found(tmp_path, old, new):
    assert old in B3_SOURCE
    # A part that a mutant does not use is no reason not to build it.
    mutant = re.sub(r"\A", '#pragma GCC diagnostic ignored "-Wunused"\n', B3_SOURCE)
    assert next(differing(Native(tmp_path, b3_source=mutant.replace(old, new))), None)
