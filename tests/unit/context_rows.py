"""What a request's head says of its trace: the table that Python and C have to satisfy.

Sources. B3: openzipkin/b3-propagation, README. Istio: its behaviour as ISTIO.md records
it, by section. W3C: Trace Context level 1. DESIGN: DESIGN.md.
"""

from typing import NamedTuple

from podspan.agent.b3 import Header
from podspan.agent.context import Decision, HeadContext

TRACE = b"463ac35c9f6413ad48485a3953bb6124"
TRACE_ID = 0x463AC35C9F6413AD48485A3953BB6124
SHORT = TRACE[16:]
SHORT_ID = TRACE_ID % 2**64
SPAN = b"a2fb4a1d1a96d312"
SPAN_ID = 0xA2FB4A1D1A96D312
PARENT = b"0020000000000001"
PARENT_ID = 0x0020000000000001
W3C_TRACE = b"0af7651916cd43dd8448eb211c80319c"
W3C_SPAN = b"b7ad6b7169203331"
W3C_IDS = (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
UUID = b"7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f"

IDS = [(b"X-B3-TraceId", TRACE), (b"X-B3-SpanId", SPAN)]
SHORT_IDS = [(b"X-B3-TraceId", SHORT), IDS[1]]
W3C = [(b"traceparent", b"-".join([b"00", W3C_TRACE, W3C_SPAN, b"01"]))]

WRONG_SAMPLED = (
    *(b"", b"-", b"2", b"d", b"True", b"tru", b"truex", b"fals", b"falsetto"),
    *(b"1x", b"10", b"0 0", b"true false", b"\xb1", b"fals\xe5"),
)
WRONG_TRACES = (
    *(b"", b"-", TRACE[1:], TRACE + b"0", TRACE * 2, TRACE.upper(), b"0" * 32),
    *(b"0" * 16, SHORT + b"0", SHORT[1:], b"0x" + TRACE[2:]),
    SHORT + b" " * 15 + b"1",
)
WRONG_SINGLES = (
    *(b"", b"-", b"2", b"D", b"true", b"00", b"1-", b"1 -", TRACE, SHORT),
    *(TRACE + b"-", TRACE + SPAN, TRACE + b"--" + SPAN, TRACE + b"_" + SPAN),
    *(b"-".join([trace, SPAN]) for trace in (TRACE[1:], TRACE + b"0", SHORT + b"0")),
    *(b"-".join([TRACE, span]) for span in (SPAN[1:], SPAN + b"0", SPAN.upper())),
    *(b"-".join([trace, SPAN]) for trace in (TRACE.upper(), b"0" * 32, b"0" * 16)),
    *(b"-".join([trace, b"0" * 16]) for trace in (TRACE, SHORT)),
    *(b"-".join([TRACE, SPAN, end]) for end in (b"", b"2", b"true", b"1-", PARENT)),
    *(b"-".join([SHORT, SPAN, end]) for end in (b"", b"2", b"true", b"1-", PARENT)),
    *(b"-".join([TRACE, SPAN, b"", PARENT]), b"-".join([TRACE, SPAN + b"_1"])),
    b"-".join([TRACE, SPAN, b"1_" + PARENT]),
    *(
        b"-".join([TRACE, SPAN, b"1", parent])
        for parent in (PARENT[1:], PARENT + b"0", PARENT + b"-1", b"G" * 16)
    ),
    b"-".join([TRACE, SPAN, b"1", PARENT]) + b" " * 20 + b"-",
)
WRONG_TRACEPARENTS = (
    *(b"", b"00", b"00-" + W3C_TRACE + b"-" + W3C_SPAN),
    *(
        b"-".join([version, W3C_TRACE, W3C_SPAN, b"01"])
        for version in (b"ff", b"0A", b"0g", b"g0", b"0", b"000")
    ),
    *(
        b"-".join([b"00", trace, W3C_SPAN, b"01"])
        for trace in (W3C_TRACE.upper(), b"0" * 32, W3C_TRACE[1:])
    ),
    *(
        b"-".join([b"00", W3C_TRACE, span, b"01"])
        for span in (W3C_SPAN.upper(), b"0" * 16, W3C_SPAN + b"0")
    ),
    *(
        b"-".join([b"00", W3C_TRACE, W3C_SPAN, end])
        for end in (b"0G", b"G0", b"1", b"01-", b"01-what")
    ),
    *(
        b"-".join([b"cc", W3C_TRACE, W3C_SPAN, end])
        for end in (b"1", b"01.what", b"01 -", b"011")
    ),
    b"_".join([b"00", W3C_TRACE, W3C_SPAN, b"01"]),
)

NOTHING = HeadContext()
MALFORMED = HeadContext(malformed=True)
DENY, ACCEPT, DEBUG = Decision.DENY, Decision.ACCEPT, Decision.DEBUG


def single(*parts: bytes) -> Header:
    return b"b3", b"-".join(parts)


def w3c(*parts: bytes) -> Header:
    return b"traceparent", b"-".join(parts)


def sampled(value: bytes) -> Header:
    return b"X-B3-Sampled", value


def reason(char: bytes, uuid: bytes = UUID) -> Header:
    return b"X-Request-Id", uuid[:14] + char + uuid[15:]


def of_multi(
    trace_id: int = TRACE_ID,
    parent_id: int = 0,
    decision: Decision = Decision.NONE,
    **facts: bool,
) -> HeadContext:
    return HeadContext(trace_id, SPAN_ID, parent_id, decision, **facts)


def of_single(
    trace_id: int = TRACE_ID,
    decision: Decision = Decision.NONE,
    parent_id: int = 0,
    **facts: bool,
) -> HeadContext:
    is_long = trace_id > SHORT_ID
    return HeadContext(
        trace_id, SPAN_ID, parent_id, decision, b3_ids=True, b3_long=is_long, **facts
    )


def of_w3c(decision: Decision = ACCEPT, **facts: bool) -> HeadContext:
    return HeadContext(*W3C_IDS, 0, decision, traceparent=True, **facts)


class Row(NamedTuple):
    """What `headers` say, and who says so."""

    name: str
    source: str
    headers: list[Header]
    says: HeadContext


ROWS = [
    Row("no header", "B3: defer", [], NOTHING),
    Row("other headers", "B3", [(b"X-B3", b"1"), (b"B3-", b"0")], NOTHING),
    # --- multi ---
    Row("ids", "B3 Multiple Headers", IDS, of_multi()),
    Row("ids of 64 bit", "B3 TraceId", SHORT_IDS, of_multi(SHORT_ID)),
    *(
        Row(
            f"trace id {trace.decode()}",
            "B3 TraceId: not all zeros",
            [(b"X-B3-TraceId", trace), IDS[1]],
            HeadContext(int(trace, 16), SPAN_ID),
        )
        for trace in (b"0" * 16 + SHORT, SHORT + b"0" * 16, b"8" + b"0" * 15)
    ),
    Row(
        "all of multi",
        "B3 Multiple Headers",
        [*IDS, (b"X-B3-ParentSpanId", PARENT), sampled(b"1")],
        of_multi(TRACE_ID, PARENT_ID, ACCEPT),
    ),
    Row(
        "names in any case",
        "RFC 9110 section 5.1",
        [(name.upper(), value) for name, value in IDS],
        of_multi(),
    ),
    Row(
        "sampled 1", "B3 Sampling State", [sampled(b"1")], HeadContext(decision=ACCEPT)
    ),
    Row("sampled 0", "B3 Sampling State", [sampled(b"0")], HeadContext(decision=DENY)),
    Row("sampled true", "B3: legacy", [sampled(b"true")], HeadContext(decision=ACCEPT)),
    Row("sampled false", "B3: legacy", [sampled(b"false")], HeadContext(decision=DENY)),
    Row("denied ids", "B3", [*IDS, sampled(b"0")], of_multi(decision=DENY)),
    *(
        Row(f"sampled {value!r}", "Istio 1", [*IDS, sampled(value)], MALFORMED)
        for value in WRONG_SAMPLED
    ),
    Row(
        "debug",
        "B3 Debug Flag",
        [*IDS, (b"X-B3-Flags", b"1")],
        of_multi(decision=DEBUG),
    ),
    Row(
        "debug alone",
        "B3 Debug Flag",
        [(b"X-B3-Flags", b"1")],
        HeadContext(decision=DEBUG),
    ),
    *(
        Row(
            f"debug beside sampled {value!r}",
            "B3: debug implies accept",
            [sampled(value), *IDS, (b"X-B3-Flags", b"1")],
            of_multi(decision=DEBUG),
        )
        for value in (b"0", b"1", b"false")
    ),
    Row(
        "debug beside a malformed decision",
        "Istio 1: junk is malformed",
        [sampled(b"x"), (b"X-B3-Flags", b"1")],
        MALFORMED,
    ),
    *(
        Row(f"flags {value!r}", "B3", [*IDS, (b"X-B3-Flags", value)], of_multi())
        for value in (b"0", b"", b"11", b"1x", b"true", b"1 1", b"\xb1")
    ),
    Row("trace id alone", "b3-propagation#3", IDS[:1], MALFORMED),
    Row("span id alone", "b3-propagation#3", IDS[1:], MALFORMED),
    Row("parent alone", "B3", [(b"X-B3-ParentSpanId", PARENT)], MALFORMED),
    Row("empty parent alone", "envoy#6263", [(b"X-B3-ParentSpanId", b"")], NOTHING),
    Row(
        "empty parent",
        "envoy#6263",
        [*IDS, (b"X-B3-ParentSpanId", b"")],
        of_multi(),
    ),
    Row(
        "parent of zeros",
        "Istio 4: Span.java",
        [*IDS, (b"X-B3-ParentSpanId", b"0" * 16)],
        of_multi(),
    ),
    Row(
        "parent of itself",
        "Istio 4: Span.java",
        [*IDS, (b"X-B3-ParentSpanId", SPAN)],
        of_multi(),
    ),
    *(
        Row(f"{name.decode()} {value!r}", "B3", [*others, (name, value)], MALFORMED)
        for name, others, values in [
            (b"X-B3-TraceId", IDS[1:], WRONG_TRACES),
            (
                b"X-B3-SpanId",
                IDS[:1],
                [b"", SPAN[1:], SPAN + b"0", SPAN.upper(), b"0" * 16, b"g" * 16],
            ),
            (
                b"X-B3-ParentSpanId",
                IDS,
                [b"1", PARENT[1:], PARENT + b"0", b"G" * 16, b"-", b" \t 0"],
            ),
        ]
        for value in values
    ),
    Row(
        "repeated",
        "B3: the first value wins",
        [*IDS, (b"x-b3-traceid", b"junk"), (b"x-b3-spanid", PARENT)],
        of_multi(),
    ),
    Row(
        "repeated after a malformed one",
        "B3: the first value wins",
        [(b"x-b3-traceid", b""), *IDS],
        MALFORMED,
    ),
    Row(
        "one malformed decision",
        "DESIGN: a wrong parent is worse than none",
        [sampled(b"maybe")],
        MALFORMED,
    ),
    # --- single ---
    Row("b3: 0", "B3 Single Header", [single(b"0")], HeadContext(decision=DENY)),
    Row("b3: 1", "B3 Single Header", [single(b"1")], HeadContext(decision=ACCEPT)),
    Row("b3: d", "B3 Single Header", [single(b"d")], HeadContext(decision=DEBUG)),
    Row("single", "B3 Single Header", [single(TRACE, SPAN)], of_single()),
    Row("single short", "B3", [single(SHORT, SPAN)], of_single(SHORT_ID)),
    *(
        Row(
            f"single {char.decode()}{' short' if trace == SHORT else ''}",
            "B3 Single Header",
            [single(trace, SPAN, char)],
            of_single(trace_id, decision, b3_decided=True),
        )
        for char, decision in [(b"0", DENY), (b"1", ACCEPT), (b"d", DEBUG)]
        for trace, trace_id in [(TRACE, TRACE_ID), (SHORT, SHORT_ID)]
    ),
    *(
        Row(
            f"single with a parent {parent.decode()}",
            "B3 Single Header; Istio 4: Span.java",
            [single(TRACE, SPAN, b"1", parent)],
            of_single(TRACE_ID, ACCEPT, parent_id, b3_decided=True, b3_parent=True),
        )
        for parent, parent_id in [(PARENT, PARENT_ID), (SPAN, 0), (b"0" * 16, 0)]
    ),
    Row(
        "single short with a parent",
        "B3 Single Header",
        [single(SHORT, SPAN, b"d", PARENT)],
        of_single(SHORT_ID, DEBUG, PARENT_ID, b3_decided=True, b3_parent=True),
    ),
    *(
        Row(
            f"single {value!r}",
            "Istio 2: a bad b3 is NullSpan",
            [(b"b3", value)],
            MALFORMED,
        )
        for value in WRONG_SINGLES
    ),
    Row(
        "a decision beats the ids of multi",
        "B3: single beats multi",
        [*IDS, single(b"0")],
        HeadContext(decision=DENY),
    ),
    Row(
        "single beats multi",
        "B3: single beats multi",
        [single(SHORT, SPAN), *IDS, sampled(b"0"), (b"X-B3-Flags", b"1")],
        of_single(SHORT_ID),
    ),
    Row(
        "single beats malformed multi",
        "B3: single beats multi",
        [sampled(b"x"), (b"X-B3-SpanId", b"x"), single(TRACE, SPAN)],
        of_single(),
    ),
    Row(
        "malformed single beats multi",
        "Istio 2",
        [*IDS, sampled(b"1"), single(b"junk")],
        MALFORMED,
    ),
    Row(
        "the first single",
        "B3: the first value wins",
        [single(b"0"), single(TRACE, SPAN)],
        HeadContext(decision=DENY),
    ),
    # --- traceparent ---
    Row("traceparent", "W3C 3.1", W3C, of_w3c()),
    *(
        Row(
            f"flags {flags.decode()}",
            "W3C 3.2.2.5",
            [w3c(b"00", W3C_TRACE, W3C_SPAN, flags)],
            of_w3c(decision),
        )
        for flags, decision in [
            (b"00", DENY),
            (b"01", ACCEPT),
            (b"02", DENY),
            (b"09", ACCEPT),
            (b"fe", DENY),
            (b"ff", ACCEPT),
            (b"1a", DENY),
        ]
    ),
    *(
        Row(
            f"a later version, {parts[0].decode()}-{parts[4:]}",
            "W3C 3.2.4",
            [w3c(*parts)],
            of_w3c(),
        )
        for parts in [
            (b"01", W3C_TRACE, W3C_SPAN, b"01"),
            (b"cc", W3C_TRACE, W3C_SPAN, b"01", b""),
            (b"fe", W3C_TRACE, W3C_SPAN, b"01", b"what-will-be"),
            (b"10", W3C_TRACE, W3C_SPAN, b"01", b"x" * 300),
        ]
    ),
    *(
        Row(
            f"malformed traceparent {value!r}",
            "W3C 3.2.2 to 3.2.4",
            [w3c(value)],
            NOTHING,
        )
        for value in WRONG_TRACEPARENTS
    ),
    Row(
        "a trace id of half zeros",
        "W3C 3.2.2.3",
        [w3c(b"00", b"0" * 16 + W3C_TRACE[16:], W3C_SPAN, b"01")],
        HeadContext(W3C_IDS[0] % 2**64, W3C_IDS[1], 0, ACCEPT, traceparent=True),
    ),
    Row(
        "the other half",
        "W3C 3.2.2.3",
        [w3c(b"00", W3C_TRACE[:16] + b"0" * 16, W3C_SPAN, b"00")],
        HeadContext(W3C_IDS[0] >> 64 << 64, W3C_IDS[1], 0, DENY, traceparent=True),
    ),
    Row("B3 ids first", "Istio 2", [*W3C, *IDS], of_multi(traceparent=True)),
    Row(
        "single ids first",
        "Istio 2",
        [single(TRACE, SPAN), *W3C],
        of_single(traceparent=True),
    ),
    Row(
        "a malformed traceparent beside B3",
        "Istio 2",
        [*IDS, w3c(b"00")],
        of_multi(),
    ),
    *(
        Row(
            f"{header[0].decode()}: {header[1].decode()} and traceparent",
            "B3: a decision may travel without ids",
            [header, *W3C],
            of_w3c(decision),
        )
        for header, decision in [
            (sampled(b"0"), DENY),
            (sampled(b"1"), ACCEPT),
            ((b"X-B3-Flags", b"1"), DEBUG),
            (single(b"0"), DENY),
            (single(b"d"), DEBUG),
        ]
    ),
    Row(
        "B3 accepts what traceparent denies",
        "B3: a decision may travel without ids",
        [sampled(b"1"), w3c(b"00", W3C_TRACE, W3C_SPAN, b"00")],
        of_w3c(ACCEPT),
    ),
    *(
        Row(
            f"malformed {header[0].decode()} and traceparent",
            "DESIGN: a wrong parent is worse than none",
            [*W3C, header],
            HeadContext(malformed=True, traceparent=True),
        )
        for header in [single(b"junk"), sampled(b"x"), IDS[0]]
    ),
    Row(
        "the first traceparent",
        "as B3",
        [w3c(b"00"), *W3C],
        NOTHING,
    ),
    # --- forced ---
    *(
        Row(
            f"reason {char.decode()}",
            "Istio 2",
            [reason(char)],
            HeadContext(forced=True),
        )
        for char in (b"9", b"a", b"b")
    ),
    *(
        Row(f"reason {char!r}", "Istio 2", [reason(char)], NOTHING)
        for char in (b"4", b"7", b"8", b"c", b"A", b"-", b"0")
    ),
    *(
        Row(
            f"a request id of {len(uuid)}",
            "Istio 2: envoy#7718",
            [(b"x-request-id", uuid)],
            NOTHING,
        )
        for uuid in [b"9" * 35, b"9" * 37, b"9" * 32, b"9" * 50, b"9" * 20, b""]
    ),
    Row(
        "an empty client trace id",
        "Istio 2: is it there",
        [(b"X-Client-Trace-Id", b"")],
        HeadContext(forced=True),
    ),
    Row(
        "a client trace id",
        "Istio 2",
        [(b"X-Client-Trace-Id", b"7f1c"), *IDS, sampled(b"0")],
        of_multi(decision=DENY, forced=True),
    ),
    Row(
        "forced beside malformed",
        "Istio 2",
        [reason(b"9"), single(b"junk")],
        HeadContext(malformed=True, forced=True),
    ),
    Row(
        "forced beside traceparent",
        "Istio 2",
        [reason(b"a"), *W3C],
        of_w3c(forced=True),
    ),
]
