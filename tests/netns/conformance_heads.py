"""Heads for what writes contexts, pure: those of conformance_rows.py, and generated."""

import re

from hypothesis import strategies as st
from unit import context_rows

START = b"GET /reviews HTTP/1.1\r\nHost: reviews:9080\r\n"


def head_of(text):
    """A request with these header lines; what indents them is none of theirs."""
    lines = [line.lstrip(" ") for line in text.split("\n")]
    return START + "".join(f"{line}\r\n" for line in lines if line).encode() + b"\r\n"


# What the kernel chooses, as parts that have names.
PARTS = {
    "<trace>": ("high", "low"),
    "<low>": ("low",),
    "<span>": ("span",),
}
TOKEN = re.compile(r"(<trace>|<low>|<span>|<uuid(.)>)")
DIGITS = "[0-9a-f]{16}"


def pattern_of(row):
    """A regular expression of the head that `row` lets arrive."""
    named: set[str] = set()

    def part(name, digits):
        if name in named:
            return f"(?P={name})"
        named.add(name)
        return f"(?P<{name}>{digits})"

    def token(match):
        if match[2]:
            tail = f"{match[2]}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
            return part("uuid", f"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{tail}")
        return "".join(part(name, DIGITS) for name in PARTS[match[1]])

    # What marks a token is nothing to a regular expression.
    text = re.escape(head_of(row.arrives).decode())
    return re.compile(TOKEN.sub(token, text))


NAMES = (
    *(b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled"),
    *(b"x-b3-flags", b"b3", b"traceparent", b"x-request-id", b"x-client-trace-id"),
    *(b"cookie", b"x-b3", b"tracestate"),
)
VALUES = sorted(
    {value for row in context_rows.ROWS for _, value in row.headers}
    | {b"0", b"1", b"d", b"true", b"false", context_rows.UUID, context_rows.PARENT}
)
SPACE = st.sampled_from([b"", b" ", b"\t", b"  \t"])
VALID = st.sampled_from(
    [
        *(context_rows.IDS, context_rows.SHORT_IDS, context_rows.W3C),
        [context_rows.single(context_rows.TRACE, context_rows.SPAN)],
        [context_rows.single(context_rows.SHORT, context_rows.SPAN, b"1")],
    ]
)


@st.composite
def heads(draw):
    """Up to nine lines of headers that matter, or nearly, valid or not."""
    headers = draw(
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=6)
    )
    for group in draw(st.lists(VALID, max_size=2)):
        headers += group
    lines = []
    for name, value in draw(st.permutations(headers)):
        spelled = draw(st.sampled_from([name, name.upper(), name.title()]))
        lines.append(spelled + b":" + draw(SPACE) + value + draw(SPACE) + b"\r\n")
    return START + b"".join(lines) + b"\r\n"
