"""HTTP/1 through the proxy: what is edited, what is not, and what is let pass."""

import random
from itertools import pairwise

import pytest
from fuzz.generator import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from podspan.agent.http_head import MAX_HEAD, MalformedHead, parse_request
from podspan.agent.redirect.http1 import MAX_PIPELINED, Http1
from podspan.agent.redirect.inject import Direction, Propagation
from podspan.agent.redirect.layer import Send, Side, Skip
from unit.context_rows import SPAN, TRACE
from unit.redirect_relay import Relay
from unit.redirect_streams import (
    ALL_LINES,
    BAD_CHUNKS,
    BAD_RESPONSES,
    GIVEN,
    MALFORMED,
    Builder,
    cut,
    edited_heads,
    heads_that_count,
    play,
)

# Always the same examples: a failure is a change's, not the day's.
FUZZ = settings(derandomize=True, deadline=None, max_examples=400)

DOWN, UP = Side.DOWN, Side.UP
OUTBOUND, INBOUND = Direction.OUTBOUND, Direction.INBOUND
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
INSERTED = b"".join(line + b"\r\n" for line in ALL_LINES)
GET_ARRIVES = GET[:-2] + INSERTED + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def always(offset, headers):
    return GIVEN


def never(offset, headers):
    return None


def http1(give=always, direction=OUTBOUND):
    return Http1(direction, give, Propagation())


def written(head):
    return head[:-2] + INSERTED + b"\r\n"


def test_a_call_on_a_kept_connection_is_one_send_each_way():
    layer = http1()
    for _ in range(3):
        assert layer.received(DOWN, GET) == [Send(UP, GET_ARRIVES)]
        [sent] = layer.received(UP, OK)
        assert sent == Send(DOWN, OK)
        assert isinstance(sent, Send)
        assert sent.data is OK


def test_what_is_not_edited_is_not_copied():
    layer = http1(never)
    [_, sent] = layer.received(DOWN, GET)
    assert isinstance(sent, Send)
    assert sent.data == GET


def test_a_body_that_is_to_come_is_skipped():
    head = b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n"
    layer = http1()
    assert layer.received(DOWN, head + b"abc") == [
        Send(UP, written(head) + b"abc"),
        Skip(DOWN, 999_997),
    ]
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\nabc"
    assert layer.received(UP, response + chunk) == [
        Send(DOWN, response + chunk),
        Skip(UP, 0x10000 - 3),
    ]
    assert layer.received(UP, b"\r\n0\r\n\r\n") == [Send(DOWN, b"\r\n0\r\n\r\n")]


def test_the_offset_counts_what_was_skipped():
    offsets = []

    def give(offset, headers):
        offsets.append(offset)
        return GIVEN

    head = b"PUT / HTTP/1.1\r\nContent-Length: 100\r\n\r\n"
    relay = Relay(http1(give))
    for piece in (head, b"x" * 60, b"x" * 40, b"\r\n" + GET[:9], GET[9:]):
        relay.feed(DOWN, piece)
    assert offsets == [len(head), len(head) + 100 + 2 + len(GET)]


# --- inbound ---

B3 = b"X-B3-TraceId: %b\r\nX-B3-SpanId: %b\r\n" % (TRACE, SPAN)
W3C = b"traceparent: 00-%b-%b-01\r\n" % (TRACE, SPAN)


@pytest.mark.parametrize(
    "lines",
    [B3, W3C, b"b3: %b-%b\r\n" % (TRACE, SPAN), b"b3: junk\r\n", b"x-b3-spanid: 1\r\n"],
)
def test_an_inbound_request_with_context_or_a_wrong_one_passes_untouched(lines):
    head = GET[:-2] + lines + b"\r\n"
    relay = Relay(http1(lambda *_: pytest.fail("asked"), INBOUND))
    relay.feed(DOWN, head)
    assert relay.arrived[UP] == head
    assert not relay.counts


@pytest.mark.parametrize("lines", [b"", b"x-b3-sampled: 1\r\n", b"traceparent: 00\r\n"])
def test_an_inbound_request_without_ids_gets_some(lines):
    head = GET[:-2] + lines + b"\r\n"
    relay = Relay(http1(always, INBOUND))
    relay.feed(DOWN, head)
    assert b"x-b3-spanid: %016x\r\n" % GIVEN.span_id in relay.arrived[UP]


def test_a_request_without_context_is_counted():
    relay = Relay(http1(never))
    relay.feed(DOWN, GET * 2)
    assert relay.arrived[UP] == GET * 2
    assert relay.counts == {"no_context": 2}


# --- ends ---


def test_fin_passes_behind_what_was_held():
    relay = Relay(http1())
    relay.feed(DOWN, GET[:-1])
    assert relay.arrived[UP] == b""
    relay.end(DOWN)
    assert relay.arrived[UP] == GET[:-1]
    assert relay.ended == {UP}
    relay.end(UP)
    assert relay.ended == {UP, DOWN}


def test_a_response_after_half_close_passes():
    relay = Relay(http1())
    relay.feed(DOWN, GET)
    relay.end(DOWN)
    relay.feed(UP, OK)
    relay.end(UP)
    assert relay.arrived == {UP: GET_ARRIVES, DOWN: OK}
    assert relay.ended == {UP, DOWN}


@pytest.mark.parametrize("side", Side)
def test_a_reset_is_passed_on(side):
    relay = Relay(http1())
    relay.feed(DOWN, GET)
    relay.lose(side)
    assert relay.aborted == ["reset"]
    assert http1().drained(side) == []


def test_a_head_of_16_kb_is_edited_and_a_longer_one_is_let_pass():
    start, end = b"GET / HTTP/1.1\r\nA: ", b"\r\n\r\n"
    head = start + b"a" * (MAX_HEAD - len(start) - len(end)) + end
    relay = Relay(http1())
    relay.feed(DOWN, head)
    assert relay.arrived[UP] == written(head)
    longer = start + b"a" + head[len(start) :]
    for pieces in ([longer], [longer[:-2], longer[-2:]], [longer[:-1], longer[-1:]]):
        relay = Relay(http1())
        for piece in pieces:
            relay.feed(DOWN, piece)
        assert relay.arrived[UP] == longer
        assert relay.counts == {"request_unparsed": 1}
        assert relay.opaque


@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_no_more_than_16_kb_of_a_head_are_held(piece):
    head = b"GET / HTTP/1.1\r\nA: ".ljust(MAX_HEAD, b"a")
    relay = Relay(http1())
    for at in range(0, MAX_HEAD, piece):
        relay.feed(DOWN, head[at : min(at + piece, MAX_HEAD)])
    assert relay.arrived[UP] == b""
    relay.feed(DOWN, b"a")
    assert relay.arrived[UP] == head + b"a"
    assert relay.opaque


def test_a_connect_has_no_body():
    head = b"CONNECT a:1 HTTP/1.1\r\nContent-Length: 7\r\n\r\n"
    assert http1().received(DOWN, head) == [Send(UP, written(head))]


def test_a_slow_head_of_16_kb_costs_no_more_than_its_bytes():
    lines = b"A: b\r\n" * ((MAX_HEAD - 18) // 6)
    head = b"GET / HTTP/1.1\r\n" + lines + b"\r\n"
    parsed = []

    def counting(data):
        parsed.append(len(data))
        return parse_request(data)

    layer = http1()
    layer._requests._parse = counting
    relay = Relay(layer)
    for at in range(len(head)):
        relay.feed(DOWN, head[at : at + 1])
    assert relay.arrived[UP] == written(head)
    assert max(parsed) < 64


def test_so_many_requests_may_be_unanswered_and_no_more():
    relay = Relay(http1())
    relay.feed(DOWN, GET * MAX_PIPELINED)
    assert not relay.counts
    relay.feed(DOWN, GET)
    assert relay.opaque
    assert relay.counts == {"pipelined": 1}
    assert relay.arrived[UP] == GET_ARRIVES * MAX_PIPELINED + GET


def test_an_expected_body_that_came_before_the_answer_is_no_doubt():
    head = b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    relay = Relay(http1())
    relay.feed(DOWN, head)
    assert not relay.skipped
    relay.feed(DOWN, b"h")
    relay.feed(UP, OK)
    relay.feed(DOWN, b"i" + GET)
    assert relay.arrived[UP] == written(head) + b"hi" + GET_ARRIVES


def test_a_refused_expectation_without_a_body_is_no_doubt():
    head = b"GET / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n"
    relay = Relay(http1())
    relay.feed(DOWN, head)
    relay.feed(UP, OK)
    relay.feed(DOWN, GET)
    assert relay.arrived[UP] == written(head) + GET_ARRIVES


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_a_malformed_head_is_let_pass_at_its_first_wrong_byte(piece):
    wrong = b"GET / HTTP/1.1\r\nHost: a\r\nNo colon"
    relay = Relay(http1())
    for at in range(0, len(wrong), piece):
        relay.feed(DOWN, wrong[at : at + piece])
    assert relay.opaque
    assert relay.arrived[UP] == wrong
    first = wrong.index(b"No ") + 3
    if piece == 1:
        assert relay.calls == first


def short(wrong):
    return wrong[-40:].decode("latin-1")


@pytest.mark.parametrize("wrong", MALFORMED, ids=short)
def test_behind_a_malformed_request_nothing_is_written(wrong):
    relay = Relay(http1())
    relay.feed(DOWN, GET + wrong + GET)
    assert relay.arrived[UP] == GET_ARRIVES + wrong + GET
    assert relay.counts == {"request_unparsed": 1}
    assert relay.opaque


@pytest.mark.parametrize("wrong", BAD_CHUNKS, ids=short)
def test_behind_a_malformed_chunk_nothing_is_written(wrong):
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"2\r\nab\r\n" + wrong
    relay = Relay(http1())
    relay.feed(DOWN, head + body + GET)
    assert relay.arrived[UP] == written(head) + body + GET
    assert relay.counts == {"request_unparsed": 1}
    assert relay.opaque


@pytest.mark.parametrize("wrong", BAD_RESPONSES, ids=short)
def test_behind_a_malformed_response_nothing_is_written(wrong):
    relay = Relay(http1())
    relay.feed(DOWN, GET * 2 + GET[:9])
    relay.feed(UP, OK + wrong)
    relay.feed(DOWN, GET[9:])
    assert relay.arrived == {UP: GET_ARRIVES * 2 + GET, DOWN: OK + wrong}
    assert relay.counts == {"response_unparsed": 1}
    assert relay.opaque


# --- conversations ---


@FUZZ
@given(seed=st.integers(0, 2**48))
def test_any_conversation_arrives_as_the_model_says(seed):
    it = Builder(seed).build()
    relay = Relay(http1(it.give))
    play(it, relay, random.Random(seed))
    assert relay.opaque == it.opaque
    if it.vague_from is None or it.opaque:
        assert relay.arrived[UP] == it.arrives
    relay.end(DOWN)
    relay.end(UP)
    assert relay.arrived == {UP: it.arrives, DOWN: it.up}
    assert relay.ended == {UP, DOWN}
    assert relay.counts == it.counts
    assert it.given == it.asked
    check_skips(relay, it)


def check_skips(relay, it):
    """No Skip goes beyond the message in which it was said."""
    for side, at, size in relay.skipped:
        if size is None:
            assert it.opaque
            continue
        borders = sorted(it.borders[side])
        [last] = [end for begin, end in pairwise(borders) if begin <= at < end] or [at]
        assert at + size <= last


def test_all_kinds_of_conversations_are_met():
    reasons: set[str] = set()
    tunnels = 0
    for seed in range(300):
        it = Builder(seed).build()
        reasons.update(it.counts)
        tunnels += it.opaque and not set(it.counts) - {"no_context"}
    assert reasons == {
        *("no_context", "request_unparsed", "response_unparsed", "response_unasked"),
        *("request_early", "request_refused"),
    }
    assert tunnels > 20


# --- hostile ---


@pytest.mark.parametrize("seed", ["redirect 1", "redirect 2"])
def test_hostile_requests_are_edited_where_they_are_well_formed(seed):
    requests = [case for case in cases(seed, 2000) if not case.is_response]
    heads = 0
    for case in requests:
        ends = heads_that_count(case)
        assert edited_heads(case) == ends, case
        heads += len(ends)
    assert heads > 500


def test_hostile_streams_arrive_the_same_however_they_are_cut():
    for case in cases("redirect 3", 600):
        side = UP if case.is_response else DOWN
        results = []
        for cuts in ((), case.cuts, tuple(range(min(len(case.data), 700)))):
            relay = Relay(http1())
            if side is UP:
                asked = b"HEAD / HTTP/1.1\r\n\r\n" if case.after_head else GET
                relay.feed(DOWN, asked * 20)
            for piece in cut(case.data, cuts):
                relay.feed(side, piece)
            relay.end(side)
            results.append((relay.arrived[UP], relay.arrived[DOWN]))
            if side is UP:
                assert relay.arrived[DOWN] == case.data
        assert results[0] == results[1] == results[2], case


def test_no_million_of_random_bytes_raises():
    rng = random.Random(20250601)
    words = [
        *(
            b"GET ",
            b"/ ",
            b"HTTP/1.1",
            b"\r\n",
            b"\r\n\r\n",
            b"A: b\r\n",
            b"0\r\n",
            b"5",
        ),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Length: ",
            b" 200 ",
            b"\n",
            b":",
        ),
        *(b"\0", b"CONNECT ", b"Upgrade: a\r\n", b"101", GET, OK),
        *[b"a" * size for size in (20, 20, 20, 3000)],
    ]
    total = 0
    while total < 1_000_000:
        relay = Relay(http1(direction=rng.choice([*Direction])))
        came = {DOWN: b"", UP: b""}
        for _ in range(rng.randrange(1, 40)):
            side = rng.choice([DOWN, UP])
            if rng.random() < 0.3:
                piece = rng.randbytes(rng.randrange(1, 200))
            else:
                piece = b"".join(rng.choices(words, k=rng.randrange(1, 8)))
            came[side] += piece
            total += len(piece)
            relay.feed(side, piece)
        relay.end(DOWN)
        relay.end(UP)
        assert relay.arrived[DOWN] == came[UP]
        without = relay.arrived[UP].replace(INSERTED, b"")
        assert without == came[DOWN]


@FUZZ
@given(data=st.binary(max_size=60), start=st.sampled_from([b"", GET[:20], GET[:-2]]))
def test_a_head_is_found_where_the_strict_parser_finds_it(data, start):
    found = []

    def give(offset, headers):
        found.append((offset, headers))

    stream = start + data + b"\r\n\r\n"
    Relay(http1(give)).feed(DOWN, stream)
    try:
        head = parse_request(stream)
    except MalformedHead:
        head = None
    first = found[0] if found else None
    if head and not {name.lower() for name, _ in head.headers} & FRAMING:
        assert first == (head.size, head.headers)
    if head is None:
        assert first is None


FRAMING = {b"content-length", b"transfer-encoding"}
