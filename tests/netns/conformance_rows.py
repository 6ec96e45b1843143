"""What the kernel writes into a request: one row per rule, with its source.

`sent` and `arrives` are the header lines behind `Host`. In `arrives` stands for what
the kernel chooses: <trace> and <low> the 32 digits of a new trace id and their second
half, <span> a new span id, <uuid9> a UUID whose 15th character is 9.

Sources. B3: openzipkin/b3-propagation, README. Istio: ISTIO.md, by section. W3C: Trace
Context level 1. DESIGN: DESIGN.md. Issue: the list of what podspan has to do, by item.
"""

from typing import NamedTuple

from podspan.agent.kernel.options import Options

TRACE = "463ac35c9f6413ad48485a3953bb6124"
SHORT = "48485a3953bb6124"
SPAN = "a2fb4a1d1a96d312"
PARENT = "0020000000000001"
W3C_TRACE = "0af7651916cd43dd8448eb211c80319c"
W3C_SPAN = "b7ad6b7169203331"
UUID = "7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f"

# Halves of trace ids, and the share of all hashes that is below theirs: agent/ids.py.
HASHES = {"48485a3953bb6156": 0.198, "48485a3953bb612f": 0.814}

OPTIONS = {
    "default": Options(),
    "all, defer": Options(
        span_ids="child",
        unsampled="defer",
        propagate=frozenset({"b3multi", "b3", "tracecontext"}),
        tcp=False,
    ),
    "b3": Options(propagate=frozenset({"b3"})),
    "tracecontext": Options(propagate=frozenset({"tracecontext"})),
}


class Row(NamedTuple):
    """One rule: a request's headers, and all that comes of them."""

    name: str
    source: str
    sent: str
    arrives: str
    child_of: tuple[str, str] | None = None  # trace and span; None: a new root
    sampled: bool = True  # else there is no span
    debug: bool = False
    injected: bool = True
    lost: tuple[str, ...] = ()
    options: str = "default"
    percent: float | None = None  # None: 100
    cut: bool = False  # it stands for a class: is cut at every byte as well


FORWARDED = (TRACE, SPAN)
FROM_W3C = (W3C_TRACE, W3C_SPAN)
MALFORMED = ("context_malformed",)
IDS = f"X-B3-TraceId: {TRACE}\nX-B3-SpanId: {SPAN}"
ID = f"X-Request-Id: {UUID}"

ROOT = """
    x-request-id: <uuid9>
    x-b3-traceid: <trace>
    x-b3-spanid: <low>
    x-b3-sampled: 1
"""
UNSAMPLED_ROOT = """
    x-request-id: <uuid4>
    x-b3-traceid: <trace>
    x-b3-spanid: <low>
    x-b3-sampled: 0
"""
CHILD = f"""
    X-B3-TraceId: {TRACE}
    X-B3-SpanId: <span>
    x-request-id: <uuid9>
    x-b3-parentspanid: {SPAN}
    x-b3-sampled: 1
"""
UNSAMPLED_CHILD = f"""
    X-B3-TraceId: {TRACE}
    X-B3-SpanId: <span>
    x-request-id: <uuid4>
    x-b3-parentspanid: {SPAN}
    x-b3-sampled: 0
"""
W3C_CHILD = f"""
    x-request-id: <uuid9>
    x-b3-traceid: {W3C_TRACE}
    x-b3-spanid: <span>
    x-b3-parentspanid: {W3C_SPAN}
    x-b3-sampled: 1
"""

MULTI = [
    Row("no context", "B3: root; Istio 2: Span IDs", "", ROOT, cut=True),
    Row(
        "all of it forwarded",
        "B3: Multiple Headers; Istio 2: a child of the caller",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: {SPAN}
        X-B3-ParentSpanId: {PARENT}
        X-B3-Sampled: 1
        {ID}
        """,
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-ParentSpanId: {SPAN}
        X-B3-Sampled: 1
        {ID}
        """,
        FORWARDED,
        cut=True,
    ),
    Row(
        "a root forwarded",
        "B3: ParentSpanId is absent on the root",
        f"{IDS}\nX-B3-Sampled: 1",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-Sampled: 1
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        """,
        FORWARDED,
        cut=True,
    ),
    Row(
        "a trace id of 64 bits stays one",
        "B3: TraceId is 64 or 128 bits",
        f"X-B3-TraceId: {SHORT}\nX-B3-SpanId: {SPAN}\nX-B3-Sampled: 1",
        f"""
        X-B3-TraceId: {SHORT}
        X-B3-SpanId: <span>
        X-B3-Sampled: 1
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        """,
        (SHORT, SPAN),
    ),
    Row(
        "a trace id whose high half is zero keeps its digits",
        "B3: TraceId",
        f"X-B3-TraceId: {'0' * 16}{SHORT}\nX-B3-SpanId: {SPAN}\nX-B3-Sampled: 1",
        f"""
        X-B3-TraceId: {"0" * 16}{SHORT}
        X-B3-SpanId: <span>
        X-B3-Sampled: 1
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        """,
        (SHORT, SPAN),
    ),
    Row(
        "names in any case",
        "RFC 9110 section 5.1",
        f"x-B3-tRACEID: {TRACE}\nX-b3-SPANID: {SPAN}\nx-b3-SAMPLED: 1\nX-REQUEST-ID: a",
        f"""
        x-B3-tRACEID: {TRACE}
        X-b3-SPANID: <span>
        x-b3-SAMPLED: 1
        X-REQUEST-ID: a
        x-b3-parentspanid: {SPAN}
        """,
        FORWARDED,
    ),
    Row(
        "spaces and tabs around a value are none of it",
        "RFC 9110 section 5.5",
        f"X-B3-TraceId:{TRACE}\t \nX-B3-SpanId: \t{SPAN}  \nX-B3-Sampled:  1\t",
        f"X-B3-TraceId:{TRACE}\t \nX-B3-SpanId: \t<span>  \nX-B3-Sampled:  1\t\n"
        f"x-request-id: <uuid9>\nx-b3-parentspanid: {SPAN}",
        FORWARDED,
    ),
    Row(
        "an empty parent is none",
        "Istio 2: envoy#6263",
        f"X-B3-ParentSpanId:\n{IDS}",
        f"X-no-ParentSpanId:{CHILD}",
        FORWARDED,
        cut=True,
    ),
    Row(
        "a parent of zeros is none",
        "Istio 4: Span.java",
        f"{IDS}\nX-B3-ParentSpanId: {'0' * 16}",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-ParentSpanId: {SPAN}
        x-request-id: <uuid9>
        x-b3-sampled: 1
        """,
        FORWARDED,
    ),
    Row(
        "of repeated headers the first counts, the others are hidden",
        "B3: the first value wins; Issue 1: nothing stale",
        f"""
        {IDS}
        x-b3-traceid: {W3C_TRACE}
        X-B3-SPANID: {W3C_SPAN}
        x-b3-spanid: junk
        """,
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        x-no-traceid: {W3C_TRACE}
        X-no-SPANID: {W3C_SPAN}
        x-no-spanid: junk
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        """,
        FORWARDED,
        cut=True,
    ),
    Row(
        "four repeated lines can be hidden",
        "DESIGN: never corrupt, never drop, count the reason",
        IDS + "\nb3: 1" * 5,
        """
        X-B3-TraceId: <trace>
        X-B3-SpanId: <low>
        """
        + "no: 1\n" * 5
        + """
        x-request-id: <uuid9>
        x-b3-sampled: 1
        b3: <trace>-<low>-1
        """,
    ),
    Row(
        "more of them, and all passes untouched",
        "DESIGN: never corrupt, never drop, count the reason",
        IDS + "\nx-b3-spanid: a" * 5,
        IDS + "\nx-b3-spanid: a" * 5,
        FORWARDED,
        injected=False,
        lost=("inject_repeated",),
        cut=True,
    ),
]

DECISIONS = [
    Row("ids without a decision", "B3: Sampling State: defer", IDS, CHILD, FORWARDED),
    Row(
        "ids without a decision, at no rate",
        "B3: Sampling State: the receiver decides",
        IDS,
        UNSAMPLED_CHILD,
        FORWARDED,
        sampled=False,
        percent=0,
    ),
    Row(
        "deny with ids",
        "B3: Sampling State: deny is propagated, with ids",
        f"{IDS}\nX-B3-Sampled: 0",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-Sampled: 0
        x-request-id: <uuid4>
        x-b3-parentspanid: {SPAN}
        """,
        FORWARDED,
        sampled=False,
    ),
    Row(
        "accept with ids, at no rate",
        "B3: Sampling State; Issue 3: the caller's decision is respected",
        f"{IDS}\nX-B3-Sampled: 1",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-Sampled: 1
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        """,
        FORWARDED,
        percent=0,
    ),
    Row(
        "deny without ids",
        "B3: a decision may travel without ids",
        "X-B3-Sampled: 0",
        """
        X-B3-Sampled: 0
        x-request-id: <uuid4>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        """,
        sampled=False,
        cut=True,
    ),
    Row(
        "accept without ids, at no rate",
        "B3: a decision may travel without ids",
        "X-B3-Sampled: 1",
        """
        X-B3-Sampled: 1
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        """,
        percent=0,
    ),
    Row(
        "true is read, and 1 written",
        "B3: legacy, may be accepted, never emitted",
        f"X-B3-Sampled: true\n{IDS}",
        f"X-no-Sampled: true{CHILD}",
        FORWARDED,
        percent=0,
        cut=True,
    ),
    Row(
        "false is read, and 0 written",
        "B3: legacy, may be accepted, never emitted",
        f"X-B3-Sampled: false\n{IDS}",
        f"X-no-Sampled: false{UNSAMPLED_CHILD}",
        FORWARDED,
        sampled=False,
    ),
    Row(
        "debug with ids, at no rate",
        "B3: Debug Flag: implies accept, don't also send Sampled",
        f"{IDS}\nX-B3-Flags: 1",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-Flags: 1
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        """,
        FORWARDED,
        debug=True,
        percent=0,
    ),
    Row(
        "debug without ids, at no rate",
        "B3: Debug Flag; Issue 3: always sampled",
        "X-B3-Flags: 1",
        """
        X-B3-Flags: 1
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        """,
        debug=True,
        percent=0,
        cut=True,
    ),
    Row(
        "debug beats deny",
        "B3: Debug Flag implies accept",
        "X-B3-Sampled: 0\nX-B3-Flags: 1",
        """
        X-B3-Sampled: 1
        X-B3-Flags: 1
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        """,
        debug=True,
        cut=True,
    ),
    Row(
        "debug beside true: nothing takes its place",
        "B3: don't also send Sampled",
        "X-B3-Sampled: true\nX-B3-Flags: 1",
        """
        X-no-Sampled: true
        X-B3-Flags: 1
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        """,
        debug=True,
    ),
    Row(
        "no debug",
        "B3: Flags",
        f"X-B3-Flags: 0\n{IDS}",
        f"X-B3-Flags: 0{CHILD}",
        FORWARDED,
    ),
    Row(
        "other flags are ignored, and not passed on",
        "B3: Flags: other values are ignored",
        f"X-B3-Flags: 2\n{IDS}",
        f"X-B3-Flags: 0{CHILD}",
        FORWARDED,
    ),
    Row(
        "flags of another size are hidden",
        "B3: Flags: other values are ignored",
        f"X-B3-Flags: true\n{IDS}",
        f"X-no-Flags: true{CHILD}",
        FORWARDED,
        cut=True,
    ),
]

WRONG = [
    Row(
        "a trace id alone is written over",
        "B3: undefined, b3-propagation#3; Issue 1: nothing malformed travels on",
        f"X-B3-TraceId: {TRACE}",
        """
        X-B3-TraceId: <trace>
        x-request-id: <uuid9>
        x-b3-spanid: <low>
        x-b3-sampled: 1
        """,
        lost=MALFORMED,
        cut=True,
    ),
    Row(
        "a span id alone is written over",
        "B3: undefined, b3-propagation#3",
        f"X-B3-SpanId: {SPAN}",
        """
        X-B3-SpanId: <low>
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-sampled: 1
        """,
        lost=MALFORMED,
    ),
    Row(
        "a parent alone is hidden",
        "B3: ParentSpanId",
        f"X-B3-ParentSpanId: {PARENT}",
        f"X-no-ParentSpanId: {PARENT}{ROOT}",
        lost=MALFORMED,
        cut=True,
    ),
    Row(
        "an empty parent alone is no context",
        "Istio 2: envoy#6263",
        "X-B3-ParentSpanId:",
        f"X-no-ParentSpanId:{ROOT}",
    ),
    *(
        Row(
            f"trace id {wrong or 'empty'}",
            "B3: TraceId is 16 or 32 lower-hex characters",
            f"X-B3-TraceId: {wrong}\nX-B3-SpanId: {SPAN}",
            f"""
            X-no-TraceId: {wrong}
            X-B3-SpanId: <low>
            x-request-id: <uuid9>
            x-b3-traceid: <trace>
            x-b3-sampled: 1
            """,
            lost=MALFORMED,
        )
        for wrong in ("", "-", TRACE[1:], TRACE + "0", SHORT[1:], TRACE * 2)
    ),
    *(
        Row(
            f"trace id {wrong}",
            "B3: TraceId: lower-hex, not all zeros",
            f"X-B3-TraceId: {wrong}\nX-B3-SpanId: {SPAN}",
            """
            X-B3-TraceId: <trace>
            X-B3-SpanId: <low>
            x-request-id: <uuid9>
            x-b3-sampled: 1
            """,
            lost=MALFORMED,
        )
        for wrong in (TRACE.upper(), "0" * 32, "g" + TRACE[1:], "0x" + TRACE[2:])
    ),
    Row(
        "a trace id of 16 zeros",
        "B3: TraceId: not all zeros",
        f"X-B3-TraceId: {'0' * 16}\nX-B3-SpanId: {SPAN}",
        f"""
        X-no-TraceId: {"0" * 16}
        X-B3-SpanId: <low>
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-sampled: 1
        """,
        lost=MALFORMED,
    ),
    *(
        Row(
            f"span id {wrong or 'empty'}",
            "B3: SpanId is 16 lower-hex characters",
            f"X-B3-TraceId: {TRACE}\nX-B3-SpanId: {wrong}",
            f"""
            X-B3-TraceId: <trace>
            X-no-SpanId: {wrong}
            x-request-id: <uuid9>
            x-b3-spanid: <low>
            x-b3-sampled: 1
            """,
            lost=MALFORMED,
        )
        for wrong in ("", "-", SPAN[1:], SPAN + "0", SPAN * 2)
    ),
    *(
        Row(
            f"span id {wrong}",
            "B3: SpanId: lower-hex, not zero",
            f"X-B3-TraceId: {TRACE}\nX-B3-SpanId: {wrong}",
            """
            X-B3-TraceId: <trace>
            X-B3-SpanId: <low>
            x-request-id: <uuid9>
            x-b3-sampled: 1
            """,
            lost=MALFORMED,
        )
        for wrong in (SPAN.upper(), "0" * 16, "z" * 16)
    ),
    *(
        Row(
            f"parent id {wrong}",
            "B3: ParentSpanId is 16 lower-hex characters",
            f"{IDS}\nX-B3-ParentSpanId: {wrong}",
            f"""
            X-B3-TraceId: <trace>
            X-B3-SpanId: <low>
            X-no-ParentSpanId: {wrong}
            x-request-id: <uuid9>
            x-b3-sampled: 1
            """,
            lost=MALFORMED,
        )
        for wrong in ("-", PARENT[1:], PARENT + "0", "G" * 16)
    ),
    *(
        Row(
            f"sampled {wrong or 'empty'}",
            "B3: Sampling State: empty or junk is malformed",
            f"X-B3-Sampled: {wrong}",
            f"X-no-Sampled: {wrong}{ROOT}",
            lost=MALFORMED,
        )
        for wrong in ("", "yes", "True", "10", "truex")
    ),
    *(
        Row(
            f"sampled {wrong}",
            "B3: Sampling State: junk is malformed",
            f"X-B3-Sampled: {wrong}\n{IDS}",
            """
            X-B3-Sampled: 1
            X-B3-TraceId: <trace>
            X-B3-SpanId: <low>
            x-request-id: <uuid9>
            """,
            lost=MALFORMED,
        )
        for wrong in ("2", "-", "d", "T")
    ),
    Row(
        "repeated after a malformed one",
        "B3: the first value wins",
        f"x-b3-traceid: junk\n{IDS}",
        f"""
        x-no-traceid: junk
        X-no-TraceId: {TRACE}
        X-B3-SpanId: <low>
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-sampled: 1
        """,
        lost=MALFORMED,
        cut=True,
    ),
]

SINGLE = [
    Row(
        "single, all of it",
        "B3: Single Header; Istio 2, envoy#47515: rewrite both",
        f"b3: {TRACE}-{SPAN}-1-{PARENT}",
        f"""
        b3: {TRACE}-<span>-1-{SPAN}
        x-request-id: <uuid9>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        """,
        FORWARDED,
        cut=True,
    ),
    Row(
        "single without a place for the parent",
        "B3: Single Header: the parent is optional",
        f"b3: {TRACE}-{SPAN}-0",
        f"""
        b3: {TRACE}-<span>-0
        x-request-id: <uuid4>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 0
        """,
        FORWARDED,
        sampled=False,
        cut=True,
    ),
    Row(
        "single of 64 bits, debug",
        "B3: Single Header: d",
        f"B3: {SHORT}-{SPAN}-d-{PARENT}",
        f"""
        B3: {SHORT}-<span>-d-{SPAN}
        x-request-id: <uuid9>
        x-b3-traceid: {SHORT}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-flags: 1
        """,
        (SHORT, SPAN),
        debug=True,
        percent=0,
        cut=True,
    ),
    Row(
        "single without a decision gets ours",
        "B3: Single Header: defer; Issue 3: decided once",
        f"b3: {TRACE}-{SPAN}",
        f"""
        no: {TRACE}-{SPAN}
        x-request-id: <uuid4>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 0
        b3: {TRACE}-<span>-0-{SPAN}
        """,
        FORWARDED,
        sampled=False,
        percent=0,
        cut=True,
    ),
    *(
        Row(
            f"b3: {decision}",
            "B3: Single Header: a decision alone",
            f"b3: {decision}",
            f"""
            no: {decision}
            x-request-id: <uuid{reason}>
            x-b3-traceid: <trace>
            x-b3-spanid: <low>
            {line}
            b3: <trace>-<low>-{decision}
            """,
            sampled=decision != "0",
            debug=decision == "d",
            percent=100 if decision == "0" else 0,
            cut=decision == "d",
        )
        for decision, reason, line in (
            ("0", "4", "x-b3-sampled: 0"),
            ("1", "9", "x-b3-sampled: 1"),
            ("d", "9", "x-b3-flags: 1"),
        )
    ),
    Row(
        "single beats multi",
        "B3: single wins",
        f"{IDS}\nX-B3-Sampled: 0\nb3: {W3C_TRACE}-{W3C_SPAN}-1",
        f"""
        X-B3-TraceId: {W3C_TRACE}
        X-B3-SpanId: <span>
        X-B3-Sampled: 1
        b3: {W3C_TRACE}-<span>-1
        x-request-id: <uuid9>
        x-b3-parentspanid: {W3C_SPAN}
        """,
        FROM_W3C,
        cut=True,
    ),
    Row(
        "single of 64 bits beats multi of 128",
        "B3: single wins",
        f"{IDS}\nb3: {SHORT}-{SPAN}-1",
        f"""
        X-B3-TraceId: {"0" * 16}{SHORT}
        X-B3-SpanId: <span>
        b3: {SHORT}-<span>-1
        x-request-id: <uuid9>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        """,
        (SHORT, SPAN),
    ),
    Row(
        "single beats malformed multi",
        "B3: single wins",
        f"X-B3-TraceId: junk\nb3: {TRACE}-{SPAN}-1\nX-B3-Sampled: maybe",
        f"""
        X-no-TraceId: junk
        b3: {TRACE}-<span>-1
        X-no-Sampled: maybe
        x-request-id: <uuid9>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        """,
        FORWARDED,
    ),
    Row(
        "a decision in single beats the ids of multi",
        "B3: single wins",
        f"{IDS}\nb3: 1",
        """
        X-B3-TraceId: <trace>
        X-B3-SpanId: <low>
        no: 1
        x-request-id: <uuid9>
        x-b3-sampled: 1
        b3: <trace>-<low>-1
        """,
    ),
    Row(
        "and leaves those of traceparent",
        "B3: a decision may travel without ids",
        f"{IDS}\nb3: 1\ntraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00",
        f"""
        X-B3-TraceId: {W3C_TRACE}
        X-B3-SpanId: <span>
        no: 1
        traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00
        x-request-id: <uuid9>
        x-b3-parentspanid: {W3C_SPAN}
        x-b3-sampled: 1
        b3: {W3C_TRACE}-<span>-1-{W3C_SPAN}
        """,
        FROM_W3C,
    ),
    *(
        Row(
            f"b3: {wrong or 'empty'}",
            "Istio 2: empty, truncated, too long or a bad flag: no context",
            f"b3: {wrong}\n{IDS}",
            f"""
            no: {wrong}
            X-B3-TraceId: <trace>
            X-B3-SpanId: <low>
            x-request-id: <uuid9>
            x-b3-sampled: 1
            b3: <trace>-<low>-1
            """,
            lost=MALFORMED,
            cut=wrong == "junk",
        )
        for wrong in (
            *("", "-", "2", "D", "junk", TRACE, f"{TRACE}-", f"{TRACE}-{SPAN}-"),
            *(f"{TRACE}-{SPAN[1:]}", f"{TRACE[1:]}-{SPAN}", f"{TRACE}-{SPAN}-2"),
            *(f"{TRACE}-{SPAN}-1-", f"{TRACE}-{SPAN}-1-{PARENT}0"),
            *(f"{TRACE.upper()}-{SPAN}-1", f"{TRACE}-{'0' * 16}-1"),
        )
    ),
    Row(
        "repeated single",
        "B3: the first value wins",
        f"b3: {TRACE}-{SPAN}-1\nB3: 0",
        f"""
        b3: {TRACE}-<span>-1
        no: 0
        x-request-id: <uuid9>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        """,
        FORWARDED,
    ),
]

TRACEPARENT = [
    *(
        Row(
            f"traceparent {value}",
            source,
            f"traceparent: {value}",
            f"traceparent: {value}{W3C_CHILD}",
            FROM_W3C,
            percent=0,
        )
        for value, source in (
            (f"00-{W3C_TRACE}-{W3C_SPAN}-01", "W3C 3.2; Issue 1: read"),
            (f"00-{W3C_TRACE}-{W3C_SPAN}-ff", "W3C 3.2.2.5: bit 0"),
            (f"cc-{W3C_TRACE}-{W3C_SPAN}-01", "W3C 3.2.4: a later version"),
            (f"cc-{W3C_TRACE}-{W3C_SPAN}-01-new", "W3C 3.2.4: and longer"),
        )
    ),
    Row(
        "traceparent that was not sampled",
        "W3C 3.2.2.5",
        f"traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00",
        f"""
        traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00
        x-request-id: <uuid4>
        x-b3-traceid: {W3C_TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {W3C_SPAN}
        x-b3-sampled: 0
        """,
        FROM_W3C,
        sampled=False,
    ),
    Row(
        "traceparent with a trace id of half zeros",
        "W3C 3.2.2.3; B3: 64 bits are 16 digits",
        f"traceparent: 00-{'0' * 16}{SHORT}-{SPAN}-01",
        f"""
        traceparent: 00-{"0" * 16}{SHORT}-{SPAN}-01
        x-request-id: <uuid9>
        x-b3-traceid: {SHORT}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        """,
        (SHORT, SPAN),
    ),
    *(
        Row(
            f"traceparent {value}",
            source,
            f"traceparent: {value}",
            f"traceparent: {value}{ROOT}",
        )
        for value, source in (
            (f"ff-{W3C_TRACE}-{W3C_SPAN}-01", "W3C 3.2.2.1: ff is invalid"),
            (f"00-{W3C_TRACE}-{W3C_SPAN}-01-", "W3C 3.2.2: 00 has 55 characters"),
            (f"00-{'0' * 32}-{W3C_SPAN}-01", "W3C 3.2.2.3"),
            (f"00-{W3C_TRACE}-{'0' * 16}-01", "W3C 3.2.2.4"),
            (f"00-{W3C_TRACE.upper()}-{W3C_SPAN}-01", "W3C 3.2.2: lower case"),
        )
    ),
    Row(
        "B3's ids beat traceparent's",
        "Istio 2: W3C is the fallback",
        f"traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00\n{IDS}",
        f"traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00{CHILD}",
        FORWARDED,
    ),
    Row(
        "B3's decision beats traceparent's",
        "B3: a decision may travel without ids",
        f"X-B3-Sampled: 1\ntraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00",
        f"""
        X-B3-Sampled: 1
        traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00
        x-request-id: <uuid9>
        x-b3-traceid: {W3C_TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {W3C_SPAN}
        """,
        FROM_W3C,
    ),
    Row(
        "malformed B3 beside traceparent",
        "DESIGN: a wrong parent is worse than none",
        f"X-B3-Sampled: maybe\ntraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-01",
        f"X-no-Sampled: maybe\ntraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-01{ROOT}",
        lost=MALFORMED,
    ),
]

# Options that propagate other forms.
PROPAGATED = [
    Row(
        "all forms, a root",
        "Issue 1: --propagate b3multi,b3,tracecontext",
        "",
        f"""
        {ROOT}
        b3: <trace>-<low>-1
        traceparent: 00-<trace>-<low>-01
        """,
        options="all, defer",
        cut=True,
    ),
    Row(
        "all forms, a child: every line that there is",
        "Issue 1: --propagate b3multi,b3,tracecontext",
        f"B3: {TRACE}-{SPAN}",
        f"""
        no: {TRACE}-{SPAN}
        x-request-id: <uuid9>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: 1
        b3: {TRACE}-<span>-1-{SPAN}
        traceparent: 00-{TRACE}-<span>-01
        """,
        FORWARDED,
        options="all, defer",
        cut=True,
    ),
    Row(
        "all forms, forwarded in all forms",
        "Issue 1: never left stale",
        f"""
        traceparent: 00-{TRACE}-{SPAN}-00
        b3: {TRACE}-{SPAN}-1-{PARENT}
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: {SPAN}
        X-B3-ParentSpanId: {PARENT}
        X-B3-Sampled: 1
        {ID}
        """,
        f"""
        traceparent: 00-{TRACE}-<span>-01
        b3: {TRACE}-<span>-1-{SPAN}
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-ParentSpanId: {SPAN}
        X-B3-Sampled: 1
        {ID}
        """,
        FORWARDED,
        options="all, defer",
        cut=True,
    ),
    Row(
        "only b3, a root",
        "Issue 1: --propagate b3",
        "",
        "x-request-id: <uuid9>\nb3: <trace>-<low>-1",
        options="b3",
    ),
    Row(
        "only b3, debug",
        "B3: Single Header: d",
        "b3: d",
        "no: d\nx-request-id: <uuid9>\nb3: <trace>-<low>-d",
        debug=True,
        options="b3",
    ),
    Row(
        "only b3, and the caller sent multi",
        "Issue 1: never left stale",
        IDS,
        f"{CHILD}\nb3: {TRACE}-<span>-1-{SPAN}",
        FORWARDED,
        options="b3",
    ),
    Row(
        "only b3, and the caller sent half of multi",
        "Issue 1: nothing malformed travels on",
        f"X-B3-TraceId: {TRACE}",
        """
        X-B3-TraceId: <trace>
        x-request-id: <uuid9>
        x-b3-spanid: <low>
        x-b3-sampled: 1
        b3: <trace>-<low>-1
        """,
        lost=MALFORMED,
        options="b3",
    ),
    Row(
        "only traceparent, a root",
        "Issue 1: --propagate tracecontext",
        "",
        "x-request-id: <uuid9>\ntraceparent: 00-<trace>-<low>-01",
        options="tracecontext",
        cut=True,
    ),
    Row(
        "only traceparent, a root at no rate",
        "W3C 3.2.2.5: not sampled",
        "",
        "x-request-id: <uuid4>\ntraceparent: 00-<trace>-<low>-00",
        sampled=False,
        options="tracecontext",
        percent=0,
    ),
    Row(
        "traceparent forwarded",
        "W3C 3.4: update parent-id",
        f"Traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-01",
        f"""
        Traceparent: 00-{W3C_TRACE}-<span>-01
        x-request-id: <uuid9>
        """,
        FROM_W3C,
        options="tracecontext",
        cut=True,
    ),
    *(
        Row(
            f"traceparent forwarded: {value}",
            source,
            f"traceparent: {value}",
            f"""
            traceparent: 00-{W3C_TRACE}-<span>-01
            x-request-id: <uuid9>
            """,
            FROM_W3C,
            options="tracecontext",
        )
        for value, source in (
            (f"00-{W3C_TRACE}-{W3C_SPAN}-fd", "W3C 3.2.2.5: other flags become 0"),
            (f"cc-{W3C_TRACE}-{W3C_SPAN}-03", "W3C 3.2.4: written in version 00"),
        )
    ),
    Row(
        "a later, longer traceparent",
        "W3C 3.2.4: written in version 00",
        f"traceparent: cc-{W3C_TRACE}-{W3C_SPAN}-00-more",
        f"""
        noaceparent: cc-{W3C_TRACE}-{W3C_SPAN}-00-more
        x-request-id: <uuid4>
        traceparent: 00-{W3C_TRACE}-<span>-00
        """,
        FROM_W3C,
        sampled=False,
        options="tracecontext",
        cut=True,
    ),
    *(
        Row(
            f"malformed traceparent {value}",
            "W3C 3.2.2; Issue 1: nothing malformed travels on",
            f"traceparent: {value}",
            arrives,
            options="tracecontext",
        )
        for value, arrives in (
            (
                "junk",
                """
                noaceparent: junk
                x-request-id: <uuid9>
                traceparent: 00-<trace>-<low>-01
                """,
            ),
            (
                f"ff-{W3C_TRACE}-{W3C_SPAN}-00",
                "traceparent: 00-<trace>-<low>-01\nx-request-id: <uuid9>",
            ),
            (
                f"00-{W3C_TRACE}_{W3C_SPAN}-00",
                "traceparent: 00-<trace>-<low>-01\nx-request-id: <uuid9>",
            ),
        )
    ),
    Row(
        "traceparent twice",
        "DESIGN: the first counts; Issue 1: nothing stale",
        f"traceparent: 00\nTraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00",
        f"""
        noaceparent: 00
        noaceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00
        x-request-id: <uuid9>
        traceparent: 00-<trace>-<low>-01
        """,
        options="tracecontext",
        cut=True,
    ),
    Row(
        "traceparent twice, and not to be written",
        "Issue 1: written on request",
        f"traceparent: 00\nTraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00",
        f"traceparent: 00\nTraceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00{ROOT}",
    ),
    Row(
        "only traceparent, and B3's ids win",
        "Istio 2: W3C is the fallback; Issue 1: never left stale",
        f"traceparent: 00-{W3C_TRACE}-{W3C_SPAN}-00\n{IDS}",
        f"traceparent: 00-{TRACE}-<span>-01{CHILD}",
        FORWARDED,
        options="tracecontext",
    ),
    Row(
        "only traceparent, and the caller sent b3",
        "Issue 1: never left stale",
        f"b3: {TRACE}-{SPAN}-1",
        f"""
        b3: {TRACE}-<span>-1
        x-request-id: <uuid9>
        traceparent: 00-{TRACE}-<span>-01
        """,
        FORWARDED,
        options="tracecontext",
    ),
    Row(
        "only traceparent, and the caller's B3 is malformed",
        "Issue 1: nothing malformed travels on",
        f"X-B3-SpanId: {SPAN}\nX-B3-Sampled: maybe",
        """
        X-B3-SpanId: <low>
        X-no-Sampled: maybe
        x-request-id: <uuid9>
        x-b3-traceid: <trace>
        x-b3-sampled: 1
        traceparent: 00-<trace>-<low>-01
        """,
        lost=MALFORMED,
        options="tracecontext",
    ),
    Row(
        "ids of a child: the caller's span is the parent",
        "Istio 2: egress: a new id, parent = the incoming one",
        f"{IDS}\nX-B3-Sampled: 1\n{ID}",
        f"""
        X-B3-TraceId: {TRACE}
        X-B3-SpanId: <span>
        X-B3-Sampled: 1
        {ID}
        x-b3-parentspanid: {SPAN}
        b3: {TRACE}-<span>-1-{SPAN}
        traceparent: 00-{TRACE}-<span>-01
        """,
        FORWARDED,
        options="all, defer",
    ),
]

OTHERS = f"""
    x-ot-span-context: {SPAN};{SPAN};{"0" * 16};cs
    tracestate: congo=t61rcWkgMzE,rojo=00f067aa0ba902b7
    baggage: userId=alice
    x-datadog-trace-id: 1234567890
    x-datadog-parent-id: 987654321
    x-datadog-sampling-priority: 1
    uber-trace-id: {TRACE}:{SPAN}:0:1
    sw8: 1-dHJhY2U=-c2Vn-3-c2VydmljZQ==
    grpc-trace-bin: AADgIBgQ
    X-Cloud-Trace-Context: {TRACE}/1;o=1
    X-Amzn-Trace-Id: Root=1-67891233-abcdef012345678912345678
    end-user: jason
    x-envoy-force-trace: true
"""
ALIKE = """
    X-B3: 1
    b3-: 0
    -b3: 0
    x-b3-traceid-old: junk
    my-x-b3-spanid: junk
    x-b3-sample: 0
    x-b3-sampledd: 0
    x-b3-parentspanid-of-a-name-too-long: junk
    x-request-id2: junk
    traceparents: junk
    cookie: b3=0; x-b3-sampled: 0
"""
VENDORS = [
    Row("other vendors' headers", "Istio 2, 8: pass-through", OTHERS, OTHERS + ROOT),
    Row(
        "other vendors' headers, all forms",
        "Istio 2, 8: pass-through",
        OTHERS,
        f"""{OTHERS}{ROOT}
        b3: <trace>-<low>-1
        traceparent: 00-<trace>-<low>-01
        """,
        options="all, defer",
    ),
    Row("names that are alike", "RFC 9110 section 5.1", ALIKE, ALIKE + ROOT),
]

REQUEST_IDS = [
    *(
        Row(
            f"x-request-id {value or 'empty'}",
            source,
            f"X-Request-Id: {value}",
            f"""
            X-Request-Id: {value}
            x-b3-traceid: <trace>
            x-b3-spanid: <low>
            x-b3-sampled: 1
            """,
        )
        for value, source in (
            (UUID, "Istio 2: an existing one is kept"),
            (UUID.replace("-", ""), "Istio 2: #17437, nginx's do not end tracing"),
            ("abc", "Istio 2: envoy#7718, nor those of other sizes"),
            ("", "Istio 2: an existing one is kept"),
            ("7" * 100, "Istio 2: an existing one is kept"),
        )
    ),
    Row(
        "x-request-id twice",
        "Istio 2: an existing one is kept",
        f"x-request-id: a\nx-request-id: {UUID}",
        f"""
        x-request-id: a
        x-request-id: {UUID}
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        x-b3-sampled: 1
        """,
    ),
    *(
        Row(
            f"trace reason {reason}, at no rate",
            "Istio 2: sampled, forced by a service or by the client",
            f"x-request-id: {UUID[:14]}{reason}{UUID[15:]}",
            f"""
            x-request-id: {UUID[:14]}{reason}{UUID[15:]}
            x-b3-traceid: <trace>
            x-b3-spanid: <low>
            x-b3-sampled: {int(reason in "9ab")}
            """,
            sampled=reason in "9ab",
            percent=0,
        )
        for reason in "9ab4178"
    ),
    Row(
        "a reason in what is no UUID, at no rate",
        "Istio 2: envoy#7718",
        f"x-request-id: {'9' * 35}",
        f"""
        x-request-id: {"9" * 35}
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        x-b3-sampled: 0
        """,
        sampled=False,
        percent=0,
    ),
    Row(
        "the caller's deny beats a reason",
        "Istio 2: a sampled header decides before the request id",
        f"x-request-id: {UUID[:14]}9{UUID[15:]}\nX-B3-Sampled: 0",
        f"""
        x-request-id: {UUID[:14]}9{UUID[15:]}
        X-B3-Sampled: 0
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        """,
        sampled=False,
    ),
    Row(
        "x-client-trace-id, at no rate",
        "Istio 2: client_sampling=100",
        "x-client-trace-id: 17",
        """
        x-client-trace-id: 17
        x-request-id: <uuidb>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        x-b3-sampled: 1
        """,
        percent=0,
    ),
    Row(
        "no reason in the id of an unsampled request",
        "Istio 2: 4 is none",
        "",
        UNSAMPLED_ROOT,
        sampled=False,
        percent=0,
        cut=True,
    ),
]

SAMPLING = [
    Row(
        f"{trace}, of which {percent} % sample {'this' if sampled else 'others'}",
        "Issue 3; agent/ids.py: the same wherever the trace passes",
        f"X-B3-TraceId: {trace}\nX-B3-SpanId: {SPAN}",
        f"""
        X-B3-TraceId: {trace}
        X-B3-SpanId: <span>
        x-request-id: <uuid{9 if sampled else 4}>
        x-b3-parentspanid: {SPAN}
        x-b3-sampled: {int(sampled)}
        """,
        (trace, SPAN),
        sampled=sampled,
        percent=percent,
    )
    for half, below in HASHES.items()
    for trace in (half, TRACE[:16] + half, W3C_TRACE[:16] + half)
    for percent in (10, 50, 90)
    for sampled in (percent / 100 > below,)
]

DEFERRED = [
    Row(
        "an own no is not told",
        "Istio 2: #45075; Issue 3: defer by option",
        "",
        """
        x-request-id: <uuid4>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        b3: <trace>-<low>
        traceparent: 00-<trace>-<low>-00
        """,
        sampled=False,
        options="all, defer",
        percent=0,
        cut=True,
    ),
    Row(
        "the caller's no is told",
        "B3: deny is propagated",
        "X-B3-Sampled: false",
        """
        X-no-Sampled: false
        x-request-id: <uuid4>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        x-b3-sampled: 0
        b3: <trace>-<low>-0
        traceparent: 00-<trace>-<low>-00
        """,
        sampled=False,
        options="all, defer",
    ),
    Row(
        "a place for the decision that is not told is hidden",
        "Issue 1: nothing malformed travels on",
        "X-B3-Sampled: x",
        """
        X-no-Sampled: x
        x-request-id: <uuid4>
        x-b3-traceid: <trace>
        x-b3-spanid: <low>
        b3: <trace>-<low>
        traceparent: 00-<trace>-<low>-00
        """,
        sampled=False,
        lost=MALFORMED,
        options="all, defer",
        percent=0,
    ),
    Row(
        "single without a decision stays so",
        "B3: Single Header: defer",
        f"b3: {TRACE}-{SPAN}",
        f"""
        b3: {TRACE}-<span>
        x-request-id: <uuid4>
        x-b3-traceid: {TRACE}
        x-b3-spanid: <span>
        x-b3-parentspanid: {SPAN}
        traceparent: 00-{TRACE}-<span>-00
        """,
        FORWARDED,
        sampled=False,
        options="all, defer",
        percent=0,
    ),
]

ROWS = [
    *MULTI,
    *DECISIONS,
    *WRONG,
    *SINGLE,
    *TRACEPARENT,
    *PROPAGATED,
    *VENDORS,
    *REQUEST_IDS,
    *SAMPLING,
    *DEFERRED,
]
