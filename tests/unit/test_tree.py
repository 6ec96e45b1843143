"""Trees as people see them."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.exchange import End, Exchange
from podspan.agent.span import Endpoint, Span, SpanOptions, span_of
from podspan.agent.tags import CONVENTIONS
from podspan.agent.tree import render
from unit.kernel_struct import exchange_record

TRACE = "57cb7d45ff07b57a7f4a3f4c45f5b7d3"
NOWHERE = Endpoint("", "10.0.0.1", 80)


def half(
    kind,
    service,
    ids,
    at_us=0,
    lasts_us=1000,
    *,
    trace_id=TRACE,
    target="/",
    status="200",
    **tags,
):
    """Return a half-span; `ids` is "SPAN" or "SPAN<PARENT", tags are podspan's."""
    span_id, _, parent_id = ids.partition("<")
    return Span(
        trace_id=trace_id,
        span_id=span_id,
        parent_id=parent_id,
        kind=kind,
        name="a:80/*",
        timestamp_us=1_700_000_000_000_000 + at_us,
        duration_us=lasts_us,
        local=Endpoint(service, "10.0.0.1", 80),
        remote=NOWHERE,
        shared=kind == "SERVER",
        tags={
            "http.method": "GET",
            "http.url": f"http://host:80{target}",
            "http.status_code": status,
            "podspan.link": "thread" if kind == "CLIENT" else "header",
            **{f"podspan.{tag}": text for tag, text in tags.items()},
        },
    )


BOOKINFO = [
    half("CLIENT", "curl", "a1", 0, 12_000, target="/productpage", link="none"),
    half("SERVER", "productpage", "a1", 400, 11_200, target="/productpage"),
    half("CLIENT", "productpage", "b1<a1", 1000, 3000, target="/details/0"),
    half("SERVER", "details", "b1<a1", 1500, 2000, target="/details/0"),
    half("CLIENT", "productpage", "c1<a1", 5000, 6000, target="/reviews/0"),
    half("SERVER", "reviews", "c1<a1", 5200, 5600, target="/reviews/0"),
    half("CLIENT", "reviews", "d1<c1", 7000, 3000, target="/ratings/0", status="503"),
    half("SERVER", "ratings", "d1<c1", 7500, 1, target="/ratings/0", status="503"),
]

BOOKINFO_TREE = """\
trace 57cb7d45ff07b57a7f4a3f4c45f5b7d3: 8 spans, 5 services, 12.0 ms
client curl           GET /productpage  200  12.000 ms  none    ██████████████████
server productpage    GET /productpage  200  11.200 ms  header  █████████████████▍
  client productpage  GET /details/0    200   3.000 ms  thread   █████
  server details      GET /details/0    200   2.000 ms  header    ███▎
  client productpage  GET /reviews/0    200   6.000 ms  thread         █████████▌
  server reviews      GET /reviews/0    200   5.600 ms  header         █████████▏
    client reviews    GET /ratings/0    503   3.000 ms  thread            █████
    server ratings    GET /ratings/0    503   0.001 ms  header             ▎
"""


def test_bookinfo():
    assert render(BOOKINFO, 82) == BOOKINFO_TREE


@given(st.permutations(BOOKINFO))
def test_the_order_of_arrival_does_not_matter(spans):
    assert render(spans, 82) == BOOKINFO_TREE


ORPHAN_TREE = """\
trace 57cb7d45ff07b57a7f4a3f4c45f5b7d3: 2 spans, 1 service, 2.0 ms
server details    GET /  200  2.000 ms  header  ████████████████████  parent a1 not seen
  client details  GET /  200  1.000 ms  thread  ██████████
"""


def test_an_unknown_parent_is_marked():
    spans = [
        half("SERVER", "details", "b1<a1", 0, 2000),
        half("CLIENT", "details", "c1<b1", 0, 1000),
    ]
    assert render(spans, 68) == ORPHAN_TREE


def test_how_a_span_ended_stands_beside_its_status():
    spans = [
        half("CLIENT", "a", "a1", status="0", end="closed-there"),
        half("SERVER", "b", "a1", end="reset"),
        half("CLIENT", "c", "b1", end="eof", at_us=10),
    ]
    statuses = [line[line.index("GET / ") :].split("  ")[1:2] for line in
                render(spans).splitlines()[1:]]  # fmt: skip
    assert statuses == [["- closed-there"], ["200 reset"], ["200"]]


def of(convention, at_us=0, **fields):
    """Return the span of a record as the kernel makes it."""
    exchange = Exchange.from_kernel(exchange_record(trace_id_low=1, **fields))
    made = span_of(exchange, "app", at_us * 1000, SpanOptions(convention))
    assert made is not None
    return made


TCP = {"protocol": 2, "status": 0, "method": b"", "target": b"", "host": b""}
TCP |= {"user_agent": b"", "request_id": b"", "peer_port": 3306}
TCP_RECORDS = (
    {"span_id": 1, "host": b"ratings:9080", "target": b"/ratings/0"},
    TCP | {"span_id": 2, "parent_id": 1, "link": 2, "end": End.CLOSED_HERE},
    TCP | {"span_id": 3, "parent_id": 1, "link": 2, "end": End.INTERVAL},
    TCP | {"span_id": 4, "parent_id": 1, "link": 2, "end": End.CONNECT_FAILED,
           "error": errno.ECONNREFUSED},
)  # fmt: skip

TCP_TREE = """\
trace 463ac35c9f6413ad0000000000000001: 4 spans, 1 service, 4.2 ms
client app    GET /ratings/0  200                          4.200 ms  none    ████████
  client app  tcp:3306        closed-here                  4.200 ms  thread  ████████
  client app  tcp:3306        interval                     4.200 ms  thread  ████████
  client app  tcp:3306        connect-failed ECONNREFUSED  4.200 ms  thread  ████████
"""


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_connections_and_those_that_failed(convention):
    spans = [of(convention, **fields) for fields in TCP_RECORDS]
    assert render(spans, 80) == TCP_TREE


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("role", [1, 2])
@pytest.mark.parametrize(
    ("fields", "request_"),
    [
        ({}, "GET /details/0?u=1"),
        ({"target": b"/a"}, "GET /a"),
        ({"target": b"http://b/a"}, "GET /a"),
        ({"method": b"PURGE"}, "PURGE /details/0?u=1"),
        ({"method": b"OPTIONS", "target": b"*"}, "OPTIONS *"),
        ({"method": b"CONNECT", "target": b"db:443"}, "CONNECT db:443"),
    ],
)
def test_a_request_reads_the_same_in_every_convention(
    convention, role, fields, request_
):
    line = render([of(convention, role=role, **fields)]).splitlines()[1]
    assert line.split("  ")[1:3] == [request_, "200"]


def test_traces_are_printed_apart_the_earliest_first():
    spans = [
        half("CLIENT", "a", "a1", at_us=20, trace_id="2" * 32),
        half("CLIENT", "a", "a1", at_us=10, trace_id="1" * 32),
    ]
    titles = [line for line in render(spans).split("\n") if line.startswith("trace")]
    assert [title[6:7] for title in titles] == ["1", "2"]
    assert "\n\ntrace 2" in render(spans)


def test_a_cycle_is_printed_once_and_marked():
    spans = [
        half("CLIENT", "a", "a1<b1"),
        half("CLIENT", "b", "b1<a1", 10),
        half("CLIENT", "c", "c1<c1", 20),
    ]
    lines = render(spans).splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["a", "b", "c"]
    assert [line.endswith("cycle") for line in lines] == [True, False, True]


def test_a_thousand_generations_neither_overflow_nor_hide_the_columns():
    spans = [
        half("CLIENT", "a", f"{depth}<{depth - 1}", depth) for depth in range(1000)
    ]
    lines = render(spans).splitlines()
    assert len(lines) == 1001
    assert max(map(len, lines)) <= 120


def test_what_could_steer_a_terminal_is_not_printed():
    text = render([half("CLIENT", "a\x1b[2J", "a1", target="/\x1b]0;\x07\n")])
    assert text.count("\n") == 2
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_long_target_is_cut():
    text = render([half("CLIENT", "a", "a1", target="/" + "x" * 500)])
    assert "GET /" + "x" * 34 + "…  200" in text


@pytest.mark.parametrize("width", [1, 40, 80, 120, 500])
def test_bars_stay_within_their_column(width):
    lines = render(BOOKINFO, width).splitlines()[1:]
    assert len({line.index("ms") for line in lines}) == 1
    assert max(map(len, lines)) <= max(width, 75)


ids = st.sampled_from(["", "a", "b", "c", "d", "e"])


@given(
    st.lists(
        st.builds(
            half,
            st.sampled_from(["CLIENT", "SERVER", "OTHER"]),
            st.sampled_from(["x", "y", ""]),
            st.builds("{}<{}".format, ids.filter(bool), ids),
            st.integers(0, 1000),
            st.integers(1, 1000),
        ),
        max_size=12,
    )
)
def test_every_span_is_printed_exactly_once(spans):
    lines = [line for line in render(spans).splitlines() if " ms  " in line]
    assert len(lines) == len(spans)
