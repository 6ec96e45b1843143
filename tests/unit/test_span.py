"""Exchange to span: ids, times, endpoints, JSON. What it says is in test_tags.py."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.exchange import Exchange
from podspan.agent.pods.pod import pod_of
from podspan.agent.span import Endpoint, SpanOptions, span_of, zipkin_json
from podspan.agent.tags import CONVENTIONS
from unit.kernel_struct import exchange_record

OFFSET_NS = 1_700_000_000_000_000_000
SERVER = {"role": 2, "flags": 5, "link": 1}


def span(options=None, **fields):
    exchange = Exchange.from_kernel(exchange_record(**fields))
    return span_of(exchange, "productpage", OFFSET_NS, options or SpanOptions())


# ISTIO.md section 3; OpenTelemetry's semconv, resource, Kubernetes.
PODS_TAGS = {
    "istio": {
        "node_id": "sidecar~10.1.0.2~pod-1.shop~shop.svc.cluster.local",
        "istio.canonical_service": "reviews",
        "istio.canonical_revision": "v2",
        "istio.namespace": "shop",
    },
    "otel": {
        "k8s.pod.name": "pod-1",
        "k8s.pod.uid": "uid-1",
        "k8s.namespace.name": "shop",
    },
}


@pytest.mark.parametrize("tags", PODS_TAGS)
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_span_made_in_a_pod_says_in_which(tags, protocol):
    fields = {
        "metadata": {
            "uid": "uid-1",
            "name": "pod-1",
            "namespace": "shop",
            "labels": {"app": "reviews", "version": "v2"},
        },
        "status": {"podIPs": [{"ip": "10.1.0.2"}]},
    }
    exchange = Exchange.from_kernel(exchange_record(protocol=protocol))
    options = SpanOptions(tags=tags)
    made = span_of(exchange, "reviews.shop", OFFSET_NS, options, pod_of(fields))
    plain = span_of(exchange, "reviews.shop", OFFSET_NS, options)
    assert made is not None
    assert plain is not None
    assert made.tags == plain.tags | PODS_TAGS[tags]


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
        "downstream_cluster": "-",
        "guid:x-request-id": "7f1c5b6e-0f5a-4f0e-9c3d-1a2b3c4d5e6f",
        "http.method": "GET",
        "http.protocol": "HTTP/1.1",
        "http.status_code": "200",
        "http.url": "http://details:9080/details/0?u=1",
        "peer.address": "10.1.0.2",
        "podspan.link": "thread",
        "podspan.request_us": "0",
        "podspan.response_us": "200",
        "podspan.wait_us": "3999",
        "request_size": "0",
        "response_flags": "-",
        "response_size": "178",
        "upstream_address": "10.1.0.3:9080",
        "upstream_cluster": "outbound|9080||details",
        "upstream_cluster.name": "outbound|9080||details",
        "user_agent": "python",
    }


def test_a_server_span_shares_the_ids_of_its_caller():
    made = span(**SERVER, peer_addr="fd00::2")
    assert made.kind == "SERVER"
    assert made.shared
    assert made.span_id == "a2fb4a1d1a96d312"
    assert made.remote == Endpoint("", "fd00::2", 9080)
    assert made.tags["podspan.link"] == "header"


def test_a_server_span_with_an_id_of_its_own_shares_nothing():
    made = span(role=2, flags=1, link=1, span_id=2, parent_id=1)
    assert (made.span_id, made.parent_id) == ("0" * 15 + "2", "0" * 15 + "1")
    assert not made.shared


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
    ("fields", "service"),
    [
        ({"host": b"Reviews:9080"}, "reviews"),
        ({"host": b"10.0.0.1:80"}, ""),
        ({"host": b"x" * 96}, ""),  # bpf/exchange.h: it may go on
        ({"target": b"http://b/"}, "b"),
        # RFC 9110 section 9.3.6: it goes to a proxy.
        ({"method": b"CONNECT", "target": b"db:443"}, ""),
        (SERVER, ""),
        ({"protocol": 2}, ""),
    ],
)
def test_a_client_knows_whom_it_called_if_it_did_by_name(fields, service):
    assert span(**fields).remote.service == service


def test_a_name_that_is_no_text_is_made_one():
    # The file name of a network namespace, as os.listdir gives it.
    exchange = Exchange.from_kernel(exchange_record())
    for service, text in (("caf\udce9", "caf?"), ("caf\u00e9", "caf\u00e9")):
        made = span_of(exchange, service, OFFSET_NS)
        assert made is not None
        assert made.local.service == text


def test_options_reach_the_tags():
    options = SpanOptions(tags="otel", max_path=5, query=False)
    made = span(options, target=b"/path/x?q")
    assert made.tags["url.full"] == "http://details:9080/path"
    assert span(SpanOptions(query=False)).tags["http.url"].endswith("/details/0")


@pytest.mark.parametrize(
    ("fields", "annotations"),
    [
        ({}, ((1_700_000_005_004_200, "cr"),)),
        (SERVER, ((1_700_000_005_004_200, "ss"),)),
        ({"response_last_ns": 0}, ()),
        # The response's last moment is not the span's.
        ({"response_last_ns": 1}, ()),
        ({"protocol": 2}, ()),
    ],
)
def test_envoys_annotations_are_at_the_last_byte(fields, annotations):
    # ISTIO.md section 3; Envoy's span_buffer.cc keeps them in v2.
    assert span(**fields).annotations == annotations
    assert span(SpanOptions("otel"), **fields).annotations == ()


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


@pytest.mark.parametrize(
    ("fields", "start_us", "duration_us"),
    [
        ({}, 5_000_000, 4200),
        ({"connect_start_ns": 4_000_000_000}, 4_000_000, 1_004_200),
        ({"connect_end_ns": 4_000_000_000}, 4_000_000, 1_004_200),
        # One end only listens.
        ({"response_first_ns": 0, "response_last_ns": 0}, 5_000_000, 1),
        # The serving end has the first word.
        ({"response_first_ns": 4_000_000_000}, 4_000_000, 1_004_200),
        # Or the caller the last one.
        ({"request_last_ns": 9_000_000_000}, 5_000_000, 4_000_000),
    ],
)
def test_a_connection_lasts_from_connecting_to_its_last_byte(
    fields, start_us, duration_us
):
    made = span(protocol=2, **fields)
    assert made.timestamp_us == 1_700_000_000_000_000 + start_us
    assert made.duration_us == duration_us


moments = st.integers(0, 10**10)


@given(st.sampled_from([1, 2]), moments, moments, moments, moments)
def test_whatever_moments_there_are_a_span_lasts(protocol, first, last, answer, end):
    made = span(
        protocol=protocol,
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
        "annotations": [{"timestamp": 1_700_000_005_004_200, "value": "ss"}],
    }


# The kernel's record ends a text at its first NUL.
texts = st.binary(max_size=40).map(lambda text: text.replace(b"\0", b""))


@given(
    st.sampled_from(sorted(CONVENTIONS)),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.fixed_dictionaries(
        {
            "method": texts.map(lambda text: text[:16]),
            "target": st.one_of(texts, texts.map(lambda text: b"http://" + text)),
            "host": texts,
            "user_agent": texts,
            "request_id": texts,
            "client_trace_id": texts,
        }
    ),
)
def test_hostile_texts_give_one_line_of_json(convention, protocol, role, hostile):
    made = span(SpanOptions(convention), protocol=protocol, role=role, **hostile)
    text = zipkin_json(made)
    assert text.isascii()
    assert text.isprintable()
    fields = json.loads(text)
    assert fields["tags"] == made.tags
    assert fields["name"] == made.name
    assert fields["remoteEndpoint"].get("serviceName", "") == made.remote.service


HIDDEN = "s3cret"


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("role", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"target": f"http://user:{HIDDEN}@b/".encode()},
        {"target": f"/?sig={HIDDEN}".encode()},
        {"method": b"CONNECT", "target": f"user:{HIDDEN}@b:443".encode()},
        {"host": f"user:{HIDDEN}@b".encode()},
        {"target": f"user:{HIDDEN}@b".encode()},
        {"target": f"http://user:{HIDDEN}{'x' * 300}@b/".encode()[:256]},
    ],
)
def test_no_secret_is_in_any_text_of_the_span(convention, role, fields):
    made = span(SpanOptions(convention), role=role, **fields)
    assert HIDDEN not in zipkin_json(made)
