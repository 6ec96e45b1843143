"""Spans as OTLP takes them, read back by its library; and what answers mean."""

import json
from dataclasses import replace
from typing import Any

import orjson
import pytest
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message
from podspan.agent import version
from podspan.agent.exchange import Exchange
from podspan.agent.export.encoder import Outcome
from podspan.agent.export.otlp import ENCODINGS, OtlpEncoder
from podspan.agent.ids import derive_id
from podspan.agent.span import Endpoint, Span, SpanOptions, span_of
from unit.kernel_struct import exchange_record

SERVER = {"role": 2, "link": 1}
SHARED = {**SERVER, "flags": 5}
THREAD, HEADER, UPGRADE = 2, 1, 3
ROOT = 0x48485A3953BB6124  # the trace id's low half, in exchange_record


def span(options=None, service="productpage.shop", **fields) -> Any:
    exchange = Exchange.from_kernel(exchange_record(**fields))
    return span_of(exchange, service, 10**18, options or SpanOptions())


def decoded(encoder, spans):
    """Return what the library reads of an encoder's output."""
    body = encoder.encode(spans)
    if encoder.content_type == "application/x-protobuf":
        return ExportTraceServiceRequest.FromString(body)
    assert encoder.content_type == "application/json"
    request = json.loads(body)
    for group in request["resourceSpans"]:
        for scope in group["scopeSpans"]:
            for one in scope["spans"]:
                check_json_rules(one)
                # The library knows protobuf's JSON, which has base64.
                for key in ("traceId", "spanId", "parentSpanId"):
                    if key in one:
                        one[key] = orjson_base64(one[key])
    return Parse(json.dumps(request), ExportTraceServiceRequest())


def check_json_rules(one):
    """OTLP/JSON: ids in hexadecimal, enums as numbers, 64 bit numbers as text."""
    assert len(one["traceId"]) == 32
    assert len(one["spanId"]) == 16
    assert isinstance(one["kind"], int)
    assert isinstance(one["startTimeUnixNano"], str)
    for attribute in one["attributes"]:
        assert isinstance(attribute["value"].get("intValue", ""), str)


def orjson_base64(digits):
    from base64 import b64encode

    return b64encode(bytes.fromhex(digits)).decode()


def spans_of(request):
    return [
        one
        for group in request.resource_spans
        for scope in group.scope_spans
        for one in scope.spans
    ]


def only(request) -> tuple[Any, Any]:
    """Return the only span, and its resource's attributes."""
    [group] = request.resource_spans
    [scope] = group.scope_spans
    [one] = scope.spans
    return one, attributes(group.resource)


def attributes(message) -> dict[str, Any]:
    found = {
        pair.key: getattr(pair.value, str(pair.value.WhichOneof("value")))
        for pair in message.attributes
    }
    assert len(found) == len(message.attributes)  # no key is there twice
    return found


@pytest.fixture(params=ENCODINGS)
def encoding(request):
    return request.param


def test_a_client_span(encoding):
    one, resource = only(decoded(OtlpEncoder(encoding), [span(parent_id=0x1)]))
    assert resource == {"service.name": "productpage.shop"}
    assert one.trace_id.hex() == "463ac35c9f6413ad48485a3953bb6124"
    assert one.span_id.hex() == "a2fb4a1d1a96d312"
    assert one.parent_span_id.hex() == "0000000000000001"
    assert one.kind == Message.SPAN_KIND_CLIENT
    assert one.name == "details:9080/*"
    assert one.start_time_unix_nano == 10**18 + 5_000_000_000
    assert one.end_time_unix_nano - one.start_time_unix_nano == 4_200_000
    assert not one.HasField("status")
    [event] = one.events
    assert (event.name, event.time_unix_nano) == ("cr", one.end_time_unix_nano)
    assert attributes(one) == {
        **span().tags,
        "network.local.address": "10.1.0.2",
        "network.local.port": 40000,
        "network.peer.address": "10.1.0.3",
        "network.peer.port": 9080,
        "peer.service": "details",
        "http.status_code": 200,
        "podspan.request_us": 0,
        "podspan.wait_us": 3999,
        "podspan.response_us": 200,
    }


def test_a_server_span_of_opentelemetrys_convention(encoding):
    made = span(SpanOptions("otel"), role=2, link=1, parent_id=7)
    one, _ = only(decoded(OtlpEncoder(encoding), [made]))
    assert one.kind == Message.SPAN_KIND_SERVER
    found = attributes(one)
    assert found["http.response.status_code"] == 200
    assert found["network.peer.port"] == 9080
    assert found["server.port"] == 9080
    assert "peer.service" not in found
    assert not one.events


def test_an_error_is_the_spans_status(encoding):
    one, _ = only(decoded(OtlpEncoder(encoding), [span(status=503)]))
    assert one.status.code == 2
    assert "error" not in attributes(one)


def test_a_short_trace_id_is_filled_up_and_a_root_has_no_parent(encoding):
    one, _ = only(decoded(OtlpEncoder(encoding), [span(trace_id_high=0)]))
    assert one.trace_id.hex() == "000000000000000048485a3953bb6124"
    assert one.parent_span_id == b""


def test_spans_are_grouped_by_who_made_them(encoding):
    pod = {"k8s.pod.name": "a-1", "k8s.namespace.name": "shop"}
    plain = span(SpanOptions("otel"), "a", span_id=1)
    in_pod = replace(plain, span_id="2".rjust(16, "0"), tags=plain.tags | pod)
    other = span(SpanOptions("otel"), "", span_id=3)
    request = decoded(OtlpEncoder(encoding), [plain, in_pod, other, plain])
    groups = [
        (
            attributes(group.resource),
            [int.from_bytes(one.span_id, "big") for one in group.scope_spans[0].spans],
        )
        for group in request.resource_spans
    ]
    assert groups == [
        ({"service.name": "a"}, [1, 1]),
        ({"service.name": "a", **pod}, [2]),
        ({"service.name": "unknown_service"}, [3]),
    ]
    [scope] = request.resource_spans[1].scope_spans
    assert (scope.scope.name, scope.scope.version) == ("podspan", version())
    assert not set(pod) & set(attributes(scope.spans[0]))


@pytest.mark.parametrize(
    ("value", "attribute"),
    [
        ("200", 200),
        ("0", 0),
        ("9" * 18, int("9" * 18)),
        ("9" * 19, "9" * 19),
        ("-1", "-1"),
        ("²", "²"),
        ("", ""),
    ],
)
def test_a_number_that_is_none_stays_a_text(encoding, value, attribute):
    made = replace(span(), tags={"http.status_code": value})
    one, _ = only(decoded(OtlpEncoder(encoding), [made]))
    assert attributes(one)["http.status_code"] == attribute


def ids(made, **options):
    """Return the ids that a span gets, the same in both encodings."""
    found = set()
    for encoding in ENCODINGS:
        one, _ = only(decoded(OtlpEncoder(encoding, **options), [made]))
        parent = int.from_bytes(one.parent_span_id, "big")
        found.add((int.from_bytes(one.span_id, "big"), parent))
    [both] = found
    return both


def test_the_server_of_a_shared_id_is_the_clients_child():
    shared = span(**SHARED, span_id=5, parent_id=4)
    for options in ({"shared_ids": True}, {}):
        assert ids(shared, **options) == (derive_id(5), 5)


@pytest.mark.parametrize(
    ("fields", "parent"),
    [
        # The served request's span is the server's half.
        ({"link": THREAD, "parent_id": 5}, derive_id(5)),
        # It may be the trace's root, with the id as it is.
        ({"link": THREAD, "parent_id": ROOT}, ROOT),
        # Whose it is only the application knows.
        ({"link": HEADER, "parent_id": 5}, 5),
        # What was asked to become a tunnel was this end's.
        ({"link": UPGRADE, "parent_id": 5, "protocol": 2}, 5),
        ({"link": 0}, 0),
    ],
)
def test_a_call_has_an_ancestor_that_exists(fields, parent):
    assert ids(span(span_id=9, **fields), shared_ids=True) == (9, parent)
    # With ids of their own the kernel has said all.
    assert ids(span(span_id=9, **fields)) == (9, fields.get("parent_id", 0))


def test_a_root_servers_id_stays():
    made = span(role=2, span_id=ROOT)
    assert ids(made, shared_ids=True) == (ROOT, 0)


def test_a_trace_through_two_servers_hangs_together():
    """Client 1 calls A, whose thread calls B, whose thread calls C."""
    made = [
        span(span_id=1, parent_id=0, link=0),
        span(**SHARED, span_id=1),
        span(span_id=2, parent_id=1, link=THREAD),
        span(**SHARED, span_id=2, parent_id=1),
        span(span_id=3, parent_id=2, link=THREAD),
    ]
    parents = dict(ids(one, shared_ids=True) for one in made)
    assert len(parents) == len(made)  # no id twice
    chain = [3]
    while parent := parents[chain[-1]]:
        chain.append(parent)
    assert chain == [3, derive_id(2), 2, derive_id(1), 1]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
endpoints = st.builds(
    Endpoint, texts, st.sampled_from(["10.0.0.1", "fd00::1"]), st.integers(0, 65535)
)
any_spans = st.builds(
    Span,
    trace_id=st.integers(1, 2**128 - 1).map(lambda number: f"{number:032x}"),
    span_id=st.integers(1, 2**64 - 1).map(lambda number: f"{number:016x}"),
    parent_id=st.one_of(
        st.just(""), st.integers(1, 2**64 - 1).map(lambda number: f"{number:016x}")
    ),
    kind=st.sampled_from(["CLIENT", "SERVER"]),
    name=texts,
    timestamp_us=st.integers(0, 2**50),
    duration_us=st.integers(1, 2**40),
    local=endpoints,
    remote=endpoints,
    shared=st.booleans(),
    tags=st.dictionaries(texts, texts, max_size=30),
    annotations=st.lists(st.tuples(st.integers(0, 2**50), texts), max_size=3).map(
        tuple
    ),
)


@given(st.lists(any_spans, min_size=1, max_size=20), st.booleans())
def test_both_encodings_say_the_same_of_any_spans(spans, shared_ids):
    binary, text = (
        decoded(OtlpEncoder(encoding, shared_ids=shared_ids), spans)
        for encoding in ENCODINGS
    )
    for request in (binary, text):
        for one in spans_of(request):
            one.attributes.sort(key=lambda pair: pair.key)
    assert binary == text
    names = [one.name for one in spans_of(binary)]
    assert sorted(names) == sorted(one.name for one in spans)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.SENT),
        (302, Outcome.SETUP),
        (400, Outcome.REFUSED),
        (401, Outcome.SETUP),
        (408, Outcome.REFUSED),
        (413, Outcome.TOO_LARGE),
        (429, Outcome.RETRY),
        (500, Outcome.REFUSED),
        (501, Outcome.REFUSED),
        (502, Outcome.RETRY),
        (503, Outcome.RETRY),
        (504, Outcome.RETRY),
    ],
)
def test_what_a_status_means(encoding, status, outcome):
    assert OtlpEncoder(encoding).verdict(status, {}, b"").outcome is outcome


def response(encoding, rejected, message):
    if encoding == "json":
        fields = {"rejectedSpans": str(rejected), "errorMessage": message}
        return orjson.dumps({"partialSuccess": fields})
    partial = ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    return ExportTraceServiceResponse(partial_success=partial).SerializeToString()


@pytest.mark.parametrize(
    ("rejected", "message", "outcome", "said"),
    [
        (0, "", Outcome.SENT, ""),
        (3, "too old", Outcome.PARTIAL, "rejected 3 spans: too old"),
        (3, "", Outcome.PARTIAL, "rejected 3 spans: no reason given"),
        (0, "use gRPC", Outcome.SENT, "warns: use gRPC"),
        (-1, "", Outcome.SENT, ""),
    ],
)
def test_a_partial_success_tells_of_those_rejected(
    encoding, rejected, message, outcome, said
):
    body = response(encoding, rejected, message)
    verdict = OtlpEncoder(encoding).verdict(200, {}, body)
    assert (verdict.outcome, verdict.message) == (outcome, said)
    assert verdict.rejected == max(0, rejected) * (outcome is Outcome.PARTIAL)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"{}",
        b'{"partialSuccess":null}',
        b'{"partialSuccess":3}',
        b'{"partialSuccess":{"rejectedSpans":"many"}}',
        b'{"partialSuccess":{"rejectedSpans":null}}',
        b'{"partialSuccess":{"rejectedSpans":[1]}}',
    ],
)
def test_an_answer_that_is_something_else_says_yes(encoding, body):
    assert OtlpEncoder(encoding).verdict(200, {}, body).outcome is Outcome.SENT


@given(st.sampled_from(ENCODINGS), st.integers(100, 599), st.binary())
def test_no_answer_is_too_strange(encoding, status, body):
    verdict = OtlpEncoder(encoding).verdict(status, {}, body)
    assert verdict.rejected >= 0
