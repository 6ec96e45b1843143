"""Conversations by their bytes: which calls they are, and how these end."""

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.exchange import End
from podspan.agent.replay.messages import MAX_PIPELINED, Conversation
from podspan.agent.replay.streams import Piece
from unit.replay_wire import chunked, request, response

C, S = 0, 1  # sides
GET, OK = request("/a"), response()
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


class Heard:
    """A conversation and what it told."""

    def __init__(self, client=C):
        self.count: Counter[str] = Counter()
        self.calls = []  # method, target, status, ends, body bytes each way, times
        self.asked = {}
        self.conversation = Conversation(
            client, self.count, self._began, self._finished
        )
        self._at = {C: 0, S: 0}
        self._now_ns = 0

    def _began(self, call, head, text):
        assert text.startswith(head.method)
        self.asked[call] = head.target.decode()

    def _finished(self, call, ending):
        sizes = call.request.size, call.response.size if call.response else 0
        target = self.asked.pop(call)
        self.calls.append((target, call.status, ending.client, ending.server, *sizes))
        self.last = call

    def say(self, side, data, lost=0):
        self._now_ns += 10
        self.conversation.received(
            side, Piece(self._now_ns, self._at[side], data, lost)
        )
        self._at[side] += len(data) + lost
        return self

    def lose(self, side, count):
        return self.say(side, b"", count)

    def fin(self, side):
        self._now_ns += 10
        self.conversation.ended(side, self._now_ns)
        return self

    def rst(self, side):
        self._now_ns += 10
        self.conversation.reset(side, self._now_ns)
        return self


def done(target="/a", status=200, sizes=(0, 5), end=End.COMPLETE):
    return (target, status, end, end, *sizes)


POST = request("/a", method="POST", body=b"12345678")
POST_CHUNKED = request("/a", method="POST", more=CHUNKED) + chunked(b"abc", b"de")
EXPECTING = request("/a", method="PUT", more=b"Expect: 100-continue\r\n", body=b"xyz")

WHOLE = [
    pytest.param([GET], [OK], [done()], id="content-length"),
    pytest.param([b"\r\n\r\n" + GET], [OK], [done()], id="empty lines first"),
    pytest.param([POST], [OK], [done(sizes=(8, 5))], id="request body"),
    pytest.param([POST_CHUNKED], [OK], [done(sizes=(5, 5))], id="chunked request"),
    pytest.param(
        [GET],
        [b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + chunked(b"x" * 5000, b"y")],
        [done(sizes=(0, 5001))],
        id="chunked response",
    ),
    pytest.param(
        [GET],
        [
            b"HTTP/1.1 200 OK\r\n"
            + CHUNKED
            + b"\r\n4;name=v\r\nwiki\r\n0\r\nTrailer: 1\r\n\r\n"
        ],
        [done(sizes=(0, 4))],
        id="extension and trailer",
    ),
    pytest.param([GET], [CONTINUE + CONTINUE + OK], [done()], id="interim responses"),
    pytest.param([EXPECTING], [CONTINUE + OK], [done(sizes=(3, 5))], id="expect"),
    pytest.param(
        [request("/a", method="HEAD")],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"],
        [done(sizes=(0, 0))],
        id="head",
    ),
    pytest.param(
        [GET], [b"HTTP/1.1 204 X\r\n\r\n"], [done(status=204, sizes=(0, 0))], id="204"
    ),
    pytest.param(
        [GET],
        [b"HTTP/1.1 304 X\r\nContent-Length: 5\r\n\r\n"],
        [done(status=304, sizes=(0, 0))],
        id="304",
    ),
    pytest.param(
        [GET, request("/b"), request("/c")],
        [OK, response(404), response(500, b"")],
        [done(), done("/b", 404), done("/c", 500, (0, 0))],
        id="keep-alive",
    ),
    pytest.param(
        [request("/a", more=b"Upgrade: h2c\r\n"), request("/b")],
        [OK, OK],
        [done(), done("/b")],
        id="an upgrade that is not taken",
    ),
]


@pytest.mark.parametrize(("asked", "answered", "calls"), WHOLE)
def test_calls_in_turn(asked, answered, calls):
    heard = Heard()
    for question, answer in zip(asked, answered, strict=True):
        heard.say(C, question).say(S, answer)
    assert heard.calls == calls
    assert not heard.count
    assert heard.conversation.idle


@pytest.mark.parametrize(("asked", "answered", "calls"), WHOLE)
def test_the_calls_are_the_same_byte_by_byte(asked, answered, calls):
    heard = Heard()
    for question, answer in zip(asked, answered, strict=True):
        for side, text in ((C, question), (S, answer)):
            for byte in text:
                heard.say(side, bytes([byte]))
    assert heard.calls == calls
    assert not heard.count


@given(st.integers(0, 1 << 30))
def test_pipelined_calls_are_the_same_however_they_are_cut(seed):
    chance = Random(seed)
    asked = POST + GET + POST_CHUNKED + request("/z", method="HEAD")
    answered = OK + CONTINUE + OK + response(201) + response(body=b"")
    heard = Heard()
    for side, text in ((C, asked), (S, answered)):
        cuts = sorted(chance.choices(range(len(text)), k=9))
        for start, end in pairwise([0, *cuts, len(text)]):
            heard.say(side, text[start:end])
    assert [call[:2] for call in heard.calls] == [
        ("/a", 200),
        ("/a", 200),
        ("/a", 201),
        ("/z", 200),
    ]


def test_times_are_those_of_first_and_last_bytes():
    heard = Heard()
    heard.say(C, POST[:10]).say(C, POST[10:-2]).say(C, POST[-2:])
    heard.say(S, CONTINUE).say(S, OK[:5]).say(S, OK[5:-1]).say(S, OK[-1:])
    call = heard.last
    assert (call.request_first_ns, call.request_last_ns) == (10, 30)
    assert (call.response_first_ns, call.response_last_ns) == (50, 70)


def test_the_second_calls_times_are_its_own():
    heard = Heard().say(C, GET).say(S, OK).say(C, GET).say(S, OK)
    call = heard.last
    assert (call.request_first_ns, call.request_last_ns) == (30, 30)
    assert (call.response_first_ns, call.response_last_ns) == (40, 40)


ENDS = [
    pytest.param([("say", S, UNTIL_CLOSE + b"abc"), ("fin", S)], End.EOF, End.EOF, 200),
    pytest.param(
        [("fin", C), ("say", S, UNTIL_CLOSE), ("fin", S)], End.EOF, End.EOF, 200
    ),
    pytest.param([("fin", S)], End.CLOSED_THERE, End.CLOSED_HERE, 0),
    pytest.param([("fin", C), ("fin", S)], End.CLOSED_HERE, End.CLOSED_HERE, 0),
    pytest.param([("rst", S)], End.RESET, End.CLOSED_HERE, 0),
    pytest.param([("rst", C)], End.CLOSED_HERE, End.RESET, 0),
    pytest.param([("say", S, OK[:-1]), ("rst", S)], End.RESET, End.CLOSED_HERE, 200),
    pytest.param(
        [("say", S, UNTIL_CLOSE), ("rst", C)], End.CLOSED_HERE, End.RESET, 200
    ),
    pytest.param(
        [("say", S, UNTIL_CLOSE), ("say", C, GET)], End.NEXT_REQUEST, None, 200
    ),
    pytest.param([("lose", S, 9), ("fin", S)], End.UNSEEN, End.UNSEEN, 0),
]


@pytest.mark.parametrize(("events", "client", "server", "status"), ENDS)
def test_how_a_call_ends(events, client, server, status):
    heard = Heard().say(C, GET)
    for what, *how in events:
        getattr(heard, what)(*how)
    first = heard.calls[0]
    assert first[1:4] == (status, client, server or client)


def test_what_comes_behind_the_end_changes_nothing():
    heard = Heard().say(C, GET).say(S, UNTIL_CLOSE).fin(S)
    heard.fin(C).fin(S).rst(C).say(C, GET).say(S, OK)
    assert [call[2] for call in heard.calls] == [End.EOF]


def test_a_capture_that_ends_leaves_open_calls_unseen():
    heard = Heard().say(C, GET + request("/b")).say(S, OK[:-1])
    heard.conversation.give_up()
    assert [call[2] for call in heard.calls] == [End.UNSEEN, End.UNSEEN]


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (request("h:443", method="CONNECT"), b"HTTP/1.1 200 OK\r\n\r\n"),
        (
            request("/ws", more=b"Upgrade: x\r\n"),
            b"HTTP/1.1 101 X\r\nUpgrade: x\r\n\r\n",
        ),
    ],
)
def test_a_tunnel_is_no_http(asked, answered):
    heard = Heard().say(C, asked).say(S, answered + b"\x00\x01")
    heard.say(C, GET).say(S, OK)
    assert len(heard.calls) == 1
    assert heard.calls[0][2] is End.COMPLETE
    assert heard.conversation.tunnel is heard.last
    assert heard.conversation.tunnel_sizes == (0, 2)


def test_what_was_sent_before_a_tunnel_was_refused_is_requests():
    heard = Heard().say(C, request("h:443", method="CONNECT") + request("/b"))
    heard.say(S, response(403)).say(S, OK)
    assert [call[:2] for call in heard.calls] == [("h:443", 403), ("/b", 200)]


OTHERS = [
    pytest.param([(C, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")], id="http/2"),
    pytest.param([(C, b"\x16\x03\x01\x02\x00\x01")], id="tls"),
    pytest.param([(S, b"220 mail\r\n"), (C, b"EHLO x\r\n")], id="smtp"),
    pytest.param([(C, b"GET / SIP/2.0\r\n")], id="looks like it at first"),
    pytest.param([(C, b"EHLO x\r\n"), (S, b"250 x\r\n")], id="client speaks first"),
]


@pytest.mark.parametrize("said", OTHERS)
def test_other_protocols_are_told_apart(said):
    heard = Heard()
    for side, data in said:
        heard.say(side, data)
    assert heard.conversation.speaks_other
    assert not heard.calls
    assert not heard.count


GARBLED = [
    pytest.param([(C, GET), (S, b"HTTP/2 200\r\n\r\n")], "response_unparsed"),
    pytest.param(
        [(C, GET), (S, OK), (C, b"GET / HTTP/1.1\nHost: x\n\n")], "request_unparsed"
    ),
    pytest.param(
        [(C, GET), (S, b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\nxyz\r\n")],
        "response_unparsed",
    ),
    pytest.param(
        [(C, GET), (S, b"HTTP/1.1 200 X\r\nA: " + b"x" * 20000)], "response_unparsed"
    ),
    pytest.param([(C, GET), (S, OK + OK)], "response_unasked"),
    pytest.param([(C, GET * (MAX_PIPELINED + 1))], "pipelined"),
    pytest.param(
        [(C, request("/", more=b"Upgrade: x\r\n") + b"\x81" * 20000)], "request_early"
    ),
]


@pytest.mark.parametrize(("said", "reason"), GARBLED)
def test_what_is_garbled_is_counted_and_followed_no_further(said, reason):
    heard = Heard()
    for side, data in said:
        heard.say(side, data)
    assert heard.count == {reason: 1}
    heard.say(S, OK[:3]).say(C, GET).fin(S)
    if reason != "response_unasked":
        assert heard.conversation.opaque
    assert heard.count[reason] == 1


def test_bytes_missing_in_a_body_of_known_length_do_no_harm():
    heard = Heard().say(C, POST[:-4]).lose(C, 4).say(S, OK[:-4]).lose(S, 2)
    heard.say(S, OK[-2:]).say(C, GET).say(S, OK)
    assert heard.calls == [done(sizes=(8, 5)), done()]
    assert not heard.count


def test_bytes_missing_in_a_chunk_do_no_harm():
    answer = b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + chunked(b"x" * 100)
    heard = Heard().say(C, GET).say(S, answer[:-60]).lose(S, 40).say(S, answer[-20:])
    assert heard.calls == [done(sizes=(0, 100))]


def test_bytes_missing_beyond_a_body_may_be_another_message():
    heard = Heard().say(C, GET).say(S, OK[:-4]).lose(S, 9).say(C, request("/b"))
    heard.say(S, OK)
    assert [call[2] for call in heard.calls] == [End.UNSEEN, End.COMPLETE]
    assert heard.count == {"out_of_step": 1}


def test_a_body_that_looks_like_a_request_makes_no_client_of_the_server():
    heard = Heard(client=None).say(S, b"a log:\r\n").say(S, GET)
    heard.say(C, request("/b")).say(S, OK)
    assert heard.conversation.client == C
    assert heard.calls == [done("/b")]


def test_a_body_that_was_asked_for_comes_whatever_the_answer():
    heard = Heard().say(C, EXPECTING[:-3]).say(S, CONTINUE).say(S, response(413))
    heard.say(C, b"{1}" + request("/b")).say(S, OK)
    assert [call[:2] for call in heard.calls] == [("/a", 413), ("/b", 200)]


def test_a_response_that_is_missing_ends_unseen_and_the_next_call_is_seen():
    heard = Heard().say(C, GET).lose(S, len(OK)).say(C, request("/b")).say(S, OK)
    assert heard.calls == [
        done(status=0, sizes=(0, 0), end=End.UNSEEN),
        done("/b"),
    ]
    assert heard.count == {"out_of_step": 1}


def test_a_request_that_is_missing_is_left_out_and_the_next_call_is_seen():
    heard = Heard().say(C, GET).say(S, OK).lose(C, 50).say(S, response(500))
    heard.say(C, request("/b")).say(S, OK)
    assert heard.calls == [done(), done("/b")]
    assert heard.count == {"out_of_step": 1}


def test_what_looks_like_a_request_behind_missing_bytes_may_be_a_body():
    heard = Heard().say(C, POST[:20]).lose(C, 30).say(C, GET).say(S, OK)
    assert heard.calls == []
    heard.say(C, request("/b")).say(S, OK)
    assert heard.calls == [done("/b")]


def test_a_capture_that_begins_in_a_response_finds_the_next_request():
    heard = Heard(client=None).say(S, b"...body\r\n").say(S, b"more")
    heard.say(C, request("/b")).say(S, OK)
    assert heard.conversation.client == C
    assert heard.calls == [done("/b")]


def test_a_capture_that_begins_in_a_request_finds_the_next_one():
    heard = Heard(client=None).say(C, b"body").say(C, GET).say(S, OK)
    assert heard.calls == []
    heard.say(C, request("/b")).say(S, OK)
    assert heard.calls == [done("/b")]


def test_out_of_step_a_head_that_is_none_after_all_changes_nothing():
    heard = Heard(client=None).say(C, b"GET / HTTP/1.1\r\nno header\r\n\r\n")
    heard.say(S, b"rest").say(C, request("/b")).say(S, OK)
    assert heard.calls == [done("/b")]


def test_an_answer_before_its_body_was_asked_for_leaves_the_step_open():
    head = EXPECTING[:-3]
    heard = Heard().say(C, head).say(S, response(417)).say(C, request("/b"))
    heard.say(S, OK)
    assert [call[:2] for call in heard.calls] == [("/a", 417), ("/b", 200)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([C, S]),
            st.sampled_from([GET, OK, POST, POST_CHUNKED, CONTINUE, UNTIL_CLOSE, b"x"]),
            st.integers(0, 9),
        ),
        max_size=12,
    ),
    st.sampled_from([C, None]),
)
def test_whatever_is_said_each_call_ends_once(said, client):
    heard = Heard(client)
    for side, data, lost in said:
        heard.say(side, data)
        if lost == 0:
            heard.lose(side, 3)
        if lost == 1:
            heard.fin(side)
        if lost == 2:
            heard.rst(side)
    heard.conversation.give_up()
    assert not heard.asked
    assert len(heard.calls) == heard.conversation.heads
