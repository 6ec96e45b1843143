"""Exchange to span: ids, times, names, tags, JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.exchange import End, Exchange, Role
from podspan.agent.span import RESPONSE_FLAGS, Endpoint, span_of, zipkin_json
from unit.kernel_struct import exchange_record

OFFSET_NS = 1_700_000_000_000_000_000
SERVER = {"role": 2, "flags": 5, "link": 1}


def span(**fields):
    exchange = Exchange.from_kernel(exchange_record(**fields))
    return span_of(exchange, "productpage", OFFSET_NS)


def test_a_client_span():
    made = span(parent_id=0x1, link=2)
    assert made.trace_id == "463ac35c9f6413ad48485a3953bb6124"
    assert made.span_id == "a2fb4a1d1a96d312"
    assert made.parent_id == "0000000000000001"
    assert made.kind == "CLIENT"
    assert made.name == "details:9080/*"
    assert made.timestamp_us == 1_700_000_005_000_000
    assert made.duration_us == 4200
    assert made.local == Endpoint("productpage", "10.1.0.2", 40000)
    assert made.remote == Endpoint("details", "10.1.0.3", 9080)
    assert not made.shared
    assert made.tags == {
        "component": "proxy",
        "guid:x-request-id": "7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f",
        "http.method": "GET",
        "http.protocol": "HTTP/1.1",
        "http.status_code": "200",
        "http.url": "http://details:9080/details/0?u=1",
        "peer.address": "10.1.0.3",
        "podspan.link": "thread",
        "request_size": "0",
        "response_flags": "-",
        "response_size": "178",
        "upstream_address": "10.1.0.3:9080",
        "user_agent": "python",
    }


def test_a_server_span_shares_the_ids_of_its_caller():
    made = span(**SERVER, peer_addr="fd00::2")
    assert made.kind == "SERVER"
    assert made.shared
    assert made.span_id == "a2fb4a1d1a96d312"
    assert made.remote == Endpoint("", "fd00::2", 9080)
    assert made.tags["podspan.link"] == "header"
    assert "upstream_address" not in made.tags


def test_a_server_span_without_a_traced_caller_shares_nothing():
    assert not span(role=2, flags=1).shared


def test_a_client_span_is_never_shared():
    assert not span(flags=5).shared


@pytest.mark.parametrize("fields", [{"flags": 6}, {"flags": 0}, {"role": 0}])
def test_what_is_not_sampled_or_has_no_role_is_no_span(fields):
    assert span(**fields) is None


def test_a_root_has_no_parent_and_a_64_bit_trace_id_16_digits():
    made = span(trace_id_high=0)
    assert made.trace_id == "48485a3953bb6124"
    assert made.parent_id == ""
    assert "parentId" not in json.loads(zipkin_json(made))


@pytest.mark.parametrize(
    ("host", "name", "service", "url"),
    [
        (b"Reviews:9080", "reviews:9080/*", "reviews", "http://reviews:9080/a"),
        (b"reviews", "reviews:80/*", "reviews", "http://reviews/a"),
        (b"10.0.0.1:80", "10.0.0.1:80/*", "", "http://10.0.0.1:80/a"),
        (b"[fd00::1]:80", "[fd00::1]:80/*", "", "http://[fd00::1]:80/a"),
        (b"[fd00::1]", "[fd00::1]:80/*", "", "http://[fd00::1]/a"),
        (b"", "get", "", "http://10.1.0.3:9080/a"),
        (b"x" * 96, "x" * 96 + "/*", "x" * 96, "http://" + "x" * 96 + "/a"),
    ],
)
def test_the_host_gives_the_name(host, name, service, url):
    made = span(host=host, target=b"/a")
    assert (made.name, made.remote.service) == (name, service)
    assert made.tags["http.url"] == url


@pytest.mark.parametrize(
    ("target", "url"),
    [
        (b"http://other/a", "http://other/a"),
        (b"*", "http://details:9080"),
        (b"db:443", "db:443"),
    ],
)
def test_targets_in_other_forms(target, url):
    assert span(target=target).tags["http.url"] == url


def test_a_server_without_host_goes_by_its_own_address():
    url = span(**SERVER, host=b"", local_addr="fd00::1").tags["http.url"]
    assert url == "http://[fd00::1]:40000/details/0?u=1"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"status": 404}, False),
        ({"status": 500}, True),
        ({"status": 599}, True),
        ({"status": 0, "end": End.CLOSED_THERE}, True),
        ({"status": 200, "end": End.EOF}, False),
        ({"status": 200, "end": End.NEXT_REQUEST}, False),
        ({"status": 0, "end": End.UNSEEN}, False),
        ({"status": 500, "end": End.UNSEEN}, True),
        ({"status": 200, "end": End.CLOSED_HERE}, True),
        ({"status": 200, "end": End.CLOSED_THERE}, True),
        ({"status": 200, "end": End.RESET}, True),
    ],
)
def test_errors_are_5xx_no_answer_and_half_an_answer(fields, error):
    tags = span(**fields).tags
    assert tags.get("error") == ("true" if error else None)
    assert tags["http.status_code"] == str(fields["status"])


def test_every_irregular_end_is_named_and_every_break_has_envoys_flag():
    for role in (Role.CLIENT, Role.SERVER):
        for end in End:
            tags = span(role=role, end=end).tags
            name = end.name.lower().replace("_", "-")
            assert tags.get("podspan.end") == (None if end == 1 else name)
            assert tags["response_flags"] == RESPONSE_FLAGS.get((role, end), "-")
    assert span(end=End.CLOSED_THERE).tags["response_flags"] == "UC"
    assert span(**SERVER, end=End.CLOSED_THERE).tags["response_flags"] == "DC"


@pytest.mark.parametrize(
    ("fields", "start_us", "duration_us"),
    [
        # No time is too short to see.
        ({"response_last_ns": 5_000_000_000}, 5_000_000, 1),
        # No answer: until the last byte of the request.
        ({"response_first_ns": 0, "response_last_ns": 0}, 5_000_000, 1),
        # An answer without an end.
        ({"response_last_ns": 0}, 5_000_000, 4000),
        # The request's begin was missed.
        ({"request_first_ns": 0}, 5_000_000, 4200),
        ({"request_first_ns": 0, "request_last_ns": 0}, 5_004_000, 200),
    ],
)
def test_moments_not_seen_are_replaced_by_the_next_best(fields, start_us, duration_us):
    made = span(**fields)
    assert made.timestamp_us == 1_700_000_000_000_000 + start_us
    assert made.duration_us == duration_us


moments = st.integers(0, 10**10)


@given(moments, moments, moments, moments)
def test_whatever_moments_there_are_a_span_lasts(first, last, answer, end):
    made = span(
        request_first_ns=first,
        request_last_ns=last,
        response_first_ns=answer,
        response_last_ns=end,
    )
    assert made.duration_us >= 1


@given(st.lists(st.integers(1, 10**10), min_size=4, max_size=4, unique=True))
def test_a_child_never_outlasts_its_parent(times):
    a, b, c, d = sorted(times)
    outer = span(request_first_ns=a, response_last_ns=d)
    inner = span(request_first_ns=b, response_last_ns=c)
    assert outer.timestamp_us <= inner.timestamp_us
    # The microsecond given to what is shorter than that may stick out.
    outer_end_us = outer.timestamp_us + outer.duration_us
    assert inner.timestamp_us + inner.duration_us <= outer_end_us + 1


def test_json_is_what_zipkin_reads():
    text = zipkin_json(span(**SERVER, parent_id=0x1, peer_addr="fd00::2"))
    assert "\n" not in text
    fields = json.loads(text)
    tags = fields.pop("tags")
    assert tags["http.method"] == "GET"
    assert fields == {
        "traceId": "463ac35c9f6413ad48485a3953bb6124",
        "id": "a2fb4a1d1a96d312",
        "parentId": "0000000000000001",
        "kind": "SERVER",
        "name": "details:9080/*",
        "timestamp": 1_700_000_005_000_000,
        "duration": 4200,
        "localEndpoint": {
            "serviceName": "productpage",
            "ipv4": "10.1.0.2",
            "port": 40000,
        },
        "remoteEndpoint": {"ipv6": "fd00::2", "port": 9080},
        "shared": True,
    }


# The kernel's record ends a text at its first NUL.
texts = st.binary(max_size=40).map(lambda text: text.replace(b"\0", b""))


@given(texts, texts, texts)
def test_hostile_texts_give_one_line_of_json(target, host, user_agent):
    text = zipkin_json(span(target=target, host=host, user_agent=user_agent))
    assert text.isascii()
    assert "\n" not in text
    tags = json.loads(text)["tags"]
    kept = user_agent.decode("utf-8", "replace").rstrip(" \t")
    assert tags["user_agent"] == (kept or "-")
