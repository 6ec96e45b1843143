"""From packets to spans: whose they are, in which trace, and how they ended."""

from dataclasses import replace

import pytest
from netns.http_peer import FORWARDED, REQUEST_ID, make_head
from netns.injection_model import Chosen, plan_of
from podspan.agent.ids import derive_id
from podspan.agent.kernel.options import Options
from unit.replay_wire import (
    B3,
    PARENT,
    SPAN,
    START_NS,
    STEP_NS,
    TRACE,
    Talk,
    captured,
    chunked,
    replayed,
    request,
    response,
)

ASKED, ANSWERED = request("/reviews", more=B3), response()


def one_call(asked=ASKED, answered=ANSWERED, **options):
    talk = Talk().handshake().exchange(asked, answered).bye()
    return replayed(captured(talk), **options)


def hex_id(number):
    return f"{number:016x}"


def test_both_halves_share_the_ids_on_the_wire():
    (client, server), summary = one_call()
    assert (client.kind, server.kind) == ("CLIENT", "SERVER")
    for half in (client, server):
        assert (half.trace_id, half.span_id, half.parent_id) == (TRACE, SPAN, PARENT)
        assert half.tags["podspan.link"] == "header"
    assert (client.shared, server.shared) == (False, True)
    assert (summary.exchanges, summary.spans, summary.skipped) == (1, 2, {})


def test_the_servers_half_may_be_a_child_as_the_kernel_derives_it():
    (client, server), _ = one_call(child_ids=True)
    assert (client.span_id, client.parent_id) == (SPAN, PARENT)
    assert server.span_id == hex_id(derive_id(int(SPAN, 16)))
    assert server.parent_id == SPAN
    assert not server.shared


def test_times_and_sizes_are_those_of_the_capture():
    (client, server), _ = one_call(
        request("/", more=B3, body=b"12345"), response(body=b"1234567")
    )
    first_us = (START_NS + 4 * STEP_NS) // 1000  # behind the handshake
    for half in (client, server):
        assert half.timestamp_us == first_us
        assert half.duration_us == 2 * STEP_NS // 1000  # an acknowledgement between
        assert half.tags["request_size"] == "5"
        assert half.tags["response_size"] == "7"
        assert half.tags["podspan.wait_us"] == str(2 * STEP_NS // 1000)
    assert client.tags["podspan.connect_us"] == str(STEP_NS // 1000)
    assert "podspan.connect_us" not in server.tags


CONVENTIONS = [
    Options(),
    Options(propagate=frozenset({"b3"})),
    Options(propagate=frozenset({"tracecontext"})),
    Options(propagate=frozenset({"b3multi", "b3", "tracecontext"})),
    Options(span_ids="child"),
]


@pytest.mark.parametrize("options", CONVENTIONS)
@pytest.mark.parametrize(
    "forwarded", [(), ((b"B3", b"%b-%b-1" % (TRACE.encode(), b"b" * 16)),), FORWARDED]
)
def test_ids_that_the_kernel_injected_come_out_as_its_record_has_them(
    options, forwarded
):
    head = make_head(*forwarded)
    chosen = Chosen(
        int(TRACE, 16),
        int("c" * 16, 16),
        REQUEST_ID,
    )
    plan = plan_of(head, chosen, options)
    (client, server), summary = one_call(
        plan.applied(head), child_ids=options.span_ids == "child"
    )
    assert int(client.trace_id, 16) == chosen.trace_id
    assert client.span_id == hex_id(chosen.span_id)
    # The caller's b3 had no place for it, nor has traceparent: then it is not guessed.
    told = "b3multi" in options.propagate or forwarded is FORWARDED
    assert client.parent_id == (hex_id(plan.parent_id) if forwarded and told else "")
    assert client.tags["guid:x-request-id"] == chosen.request_id.decode()
    if options.span_ids == "child":
        assert server.span_id == hex_id(derive_id(chosen.span_id))
    else:
        assert server.span_id == client.span_id
    assert summary.skipped == {}


def test_without_context_a_call_begins_a_trace_and_each_replay_gives_the_same():
    (client, server), _ = one_call(request("/"))
    assert client.parent_id == server.parent_id == ""
    assert client.tags["podspan.link"] == server.tags["podspan.link"] == "none"
    assert client.trace_id == server.trace_id
    assert client.trace_id.endswith(client.span_id)  # as the kernel's roots
    assert one_call(request("/"))[0] == [client, server]


def test_connecting_is_the_first_calls():
    talk = Talk().handshake().exchange(ASKED, ANSWERED).exchange(ASKED, ANSWERED)
    spans, _ = replayed(captured(talk.bye()))
    assert ["podspan.connect_us" in span.tags for span in spans] == [
        True,
        False,
        False,
        False,
    ]


def test_two_calls_without_context_are_two_traces():
    talk = Talk().handshake()
    talk.exchange(request("/"), ANSWERED).exchange(request("/"), ANSWERED).bye()
    spans, _ = replayed(captured(talk))
    assert len({span.trace_id for span in spans}) == 2


@pytest.mark.parametrize(
    ("more", "skipped"),
    [
        (b"X-B3-Sampled: 0\r\n", {"unsampled": 1}),
        (B3[:-3] + b"0\r\n", {"unsampled": 1}),
        (b"b3: 0\r\n", {"unsampled": 1}),
        (b"X-B3-TraceId: nonsense\r\n", {"context_malformed": 1}),
        (b"X-B3-Flags: 1\r\n", {}),
    ],
)
def test_decisions_are_the_callers(more, skipped):
    spans, summary = one_call(request("/", more=more))
    assert summary.skipped == skipped
    assert summary.exchanges == ("unsampled" not in skipped)
    assert len(spans) == (0 if "unsampled" in skipped else 2)


def test_an_application_that_hands_on_its_callers_ids_is_their_parent():
    outer = Talk(("10.0.0.1", 40000), ("10.0.0.2", 9080)).handshake()
    outer.say("c", ASKED)
    inner = Talk(("10.0.0.2", 40001), ("10.0.0.3", 80), at_ns=outer.at_ns).handshake()
    inner.exchange(request("/ratings", more=B3), ANSWERED).bye()
    outer.at_ns = inner.at_ns
    outer.say("s", ANSWERED).bye()
    for child_ids in (False, True):
        spans, _ = replayed(captured(outer, inner), child_ids=child_ids)
        [calling] = [s for s in spans if s.kind == "CLIENT" and s.remote.port == 80]
        [served] = [s for s in spans if s.kind == "SERVER" and s.local.port == 9080]
        assert calling.trace_id == TRACE
        assert calling.parent_id == served.span_id
        assert calling.span_id != SPAN


def test_a_call_made_again_with_the_same_ids_keeps_them():
    talk = Talk().handshake().exchange(ASKED, response(503))
    talk.exchange(ASKED, ANSWERED).bye()
    spans, _ = replayed(captured(talk))
    assert {(span.span_id, span.parent_id) for span in spans} == {(SPAN, PARENT)}


def test_calls_of_one_loopback_connection_are_not_each_others_parents():
    talk = Talk(("127.0.0.1", 40000), ("127.0.0.1", 9080)).handshake()
    talk.exchange(ASKED + ASKED, ANSWERED + ANSWERED).bye()
    spans, _ = replayed(captured(talk))
    assert {(span.span_id, span.parent_id) for span in spans} == {(SPAN, PARENT)}


def test_equal_calls_of_one_client_at_the_same_time_are_two():
    """Though a simple client begins to count at the same number each time."""
    talks = [Talk(("10.0.0.1", port)).handshake() for port in (40000, 40001)]
    for talk in talks:
        talk.exchange(request("/"), ANSWERED).bye()
    spans, summary = replayed(captured(*talks))
    assert len(spans) == 4
    assert summary.skipped == {}


def test_a_call_before_and_behind_an_address_translation_is_one():
    before = Talk(server=("10.96.0.1", 80)).handshake()
    behind = Talk(server=("10.0.0.2", 9080), at_ns=START_NS + 10).handshake()
    for talk in (before, behind):
        talk.exchange(request("/"), ANSWERED).bye()
    spans, summary = replayed(captured(before, behind))
    assert len(spans) == 2
    assert summary.skipped == {"seen_elsewhere": 1}


def test_services_are_named_by_hosts_file_then_host_then_address():
    (client, server), _ = one_call()
    assert (client.local.service, server.local.service) == ("10.0.0.1", "reviews")
    hosts = {"10.0.0.1": "productpage", "10.0.0.2": "reviews-v2"}
    (client, server), _ = one_call(hosts=hosts)
    assert client.local.service == "productpage"
    assert server.local.service == "reviews-v2"
    assert client.remote.service == "reviews"  # as its Host says
    (_, server), _ = one_call(request("/", host="10.0.0.2:9080"))
    assert server.local.service == "10.0.0.2"


def test_a_server_that_calls_has_the_name_by_which_it_is_called():
    first = Talk(server=("10.0.0.2", 9080)).handshake().exchange(ASKED, ANSWERED)
    second = Talk(("10.0.0.2", 40009), ("10.0.0.3", 80), at_ns=first.at_ns)
    second.handshake().exchange(request("/x", host="ratings"), ANSWERED)
    spans, _ = replayed(captured(first, second))
    assert [span.local.service for span in spans if span.kind == "CLIENT"] == [
        "10.0.0.1",
        "reviews",
    ]


def test_loopback_has_no_name_of_its_own():
    """All services of a machine share it."""
    first = Talk(("127.0.0.1", 40000), ("127.0.0.1", 9080)).handshake()
    first.exchange(ASKED, ANSWERED)
    second = Talk(("127.0.0.1", 40009), ("127.0.0.1", 80), at_ns=first.at_ns)
    second.handshake().exchange(request("/x", host="ratings"), ANSWERED)
    spans, _ = replayed(captured(first, second))
    clients = {span.local.service for span in spans if span.kind == "CLIENT"}
    assert clients == {"127.0.0.1"}


def test_an_address_with_two_names_has_none():
    first = Talk(server=("10.0.0.2", 80)).handshake()
    first.exchange(request("/", host="a"), ANSWERED)
    first.exchange(request("/", host="b"), ANSWERED)
    second = Talk(("10.0.0.2", 40009), ("10.0.0.3", 80), at_ns=first.at_ns)
    second.handshake().exchange(request("/", host="c"), ANSWERED)
    spans, _ = replayed(captured(first, second))
    assert spans[-2].kind == "CLIENT"
    assert spans[-2].local.service == "10.0.0.2"


def tcp_talk():
    return Talk(server=("10.0.0.2", 3306)).handshake()


def test_what_is_no_http_is_one_exchange_of_tcp():
    talk = tcp_talk().say("s", b"\x0amysql").say("c", b"x" * 3000).say("s", b"ok")
    (client, server), summary = replayed(captured(talk.bye("s")))
    assert client.name == server.name == "tcp:3306"
    assert (client.tags["request_size"], client.tags["response_size"]) == ("3000", "8")
    assert client.tags["podspan.end"] == "closed-there"
    assert server.tags["podspan.end"] == "closed-here"
    assert client.trace_id == server.trace_id
    assert client.timestamp_us == (START_NS + STEP_NS) // 1000  # the handshake's
    assert summary.exchanges == 1


def test_a_connection_that_goes_on_says_so():
    (client, _), _ = replayed(captured(tcp_talk().say("c", b"\x00")))
    assert client.tags["podspan.end"] == "interval"


def test_a_tunnels_ids_are_those_that_the_kernel_derives():
    talk = Talk().handshake()
    asked = request("/ws", more=B3 + b"Upgrade: websocket\r\n")
    talk.exchange(asked, b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\nab")
    talk.say("c", b"cde").bye()
    for child_ids in (False, True):
        spans, _ = replayed(captured(talk), child_ids=child_ids)
        tunnel = [span for span in spans if span.name.startswith("tcp:")]
        client, server = sorted(tunnel, key=lambda span: span.kind)
        span_id = derive_id(~int(SPAN, 16) & ((1 << 64) - 1))
        assert (client.trace_id, client.parent_id) == (TRACE, SPAN)
        assert client.span_id == hex_id(span_id)
        assert client.tags["podspan.link"] == "upgrade"
        assert client.tags["request_size"] == "3"
        assert client.tags["response_size"] == "2"
        derived = derive_id(span_id) if child_ids else span_id
        assert server.span_id == hex_id(derived)
        assert server.parent_id == (hex_id(span_id) if child_ids else SPAN)


def test_a_refused_connection_is_the_clients_alone():
    talk = Talk()
    talk.segment("c", 0x02)
    talk._next["c"] += 1
    talk.rst("s")
    [client], _ = replayed(captured(talk))
    assert client.kind == "CLIENT"
    assert client.tags["podspan.end"] == "connect-failed"
    assert client.tags["podspan.error"] == "ECONNREFUSED"


def test_a_reset_is_told_to_the_end_that_got_it():
    talk = Talk().handshake().say("c", ASKED).rst("s")
    (client, server), _ = replayed(captured(talk))
    assert client.tags["podspan.end"] == "reset"
    assert client.tags["podspan.error"] == "ECONNRESET"
    assert server.tags["podspan.end"] == "closed-here"
    assert client.tags["response_flags"] == "UC"


def test_a_capture_that_ends_before_the_response_says_so():
    (client, _), summary = replayed(captured(Talk().handshake().say("c", ASKED)))
    assert client.tags["podspan.end"] == "unseen"
    assert summary.skipped == {"end_unseen": 1}


def test_opentelemetrys_tags_are_the_agents():
    from podspan.agent.span import SpanOptions

    (client, server), _ = one_call(options=SpanOptions(tags="otel"))
    assert client.tags["http.request.method"] == "GET"
    assert server.tags["url.path"] == "/reviews"


def test_ipv6_gives_the_same_but_for_the_addresses():
    talk = Talk(("fd00::1", 40000), ("fd00::2", 9080)).handshake()
    spans, _ = replayed(captured(talk.exchange(ASKED, ANSWERED).bye()))
    plain, _ = one_call()
    for span, other in zip(spans, plain, strict=True):
        assert span.local.address.startswith("fd00::")
        same = replace(span, local=other.local, remote=other.remote, tags={})
        assert same == replace(other, tags={})


def test_bodies_of_any_framing_are_followed_to_the_next_call():
    talk = Talk().handshake()
    chunks = b"Transfer-Encoding: chunked\r\n"
    talk.exchange(
        request("/a", method="POST", more=B3 + chunks) + chunked(b"x" * 9000),
        b"HTTP/1.1 200 OK\r\n" + chunks + b"\r\n" + chunked(b"y" * 70_000, b"z"),
    )
    talk.exchange(request("/b", more=B3), b"HTTP/1.0 200 OK\r\n\r\nall that follows")
    spans, _ = replayed(captured(talk.bye("s")))
    sizes = [(s.tags["request_size"], s.tags["response_size"]) for s in spans]
    assert sizes == [("9000", "70001")] * 2 + [("0", "16")] * 2
    assert [span.tags.get("podspan.end") for span in spans[2:]] == ["eof", "eof"]
