"""What real backends say of the demo's trace, and whether our store says the same."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from peers.conftest import feed
from peers.servers import Json, Server, wait_for
from podspan.agent.export.otlp import OtlpEncoder
from podspan.agent.export.zipkin import ZipkinEncoder
from podspan.agent.ids import derive_id
from podspan.agent.span import Span

HOUR_MS = 60 * 60 * 1000


@pytest.fixture(scope="module")
def fed(zipkin: Server, store: Server, demo: list[Span]) -> tuple[Server, Server]:
    """Zipkin and our store, with the demo's spans in them."""
    for server in (zipkin, store):
        feed(demo, ZipkinEncoder(), server.url)
        trace = f"/api/v2/trace/{demo[0].trace_id}"
        wait_for(partial(_has, server, trace, len(demo)), f"{server.url} has the trace")
    return zipkin, store


def _has(server: Server, path: str, spans: int) -> bool:
    try:
        return len(server.get(path)) == spans
    except OSError:  # HTTPError: 404 as yet
        return False


def test_every_span_comes_back_as_it_was_sent(fed, demo):
    for server in fed:
        trace = server.get(f"/api/v2/trace/{demo[0].trace_id}")
        assert {(s["id"], s["kind"]): s for s in trace} == {
            (span.span_id, span.kind): expected(span) for span in demo
        }


def expected(span: Span) -> Json:
    """A span in Zipkin's model."""
    fields: Json = {
        "traceId": span.trace_id,
        "id": span.span_id,
        "kind": span.kind,
        "name": span.name.lower(),
        "timestamp": span.timestamp_us,
        "duration": span.duration_us,
        "localEndpoint": endpoint(span.local),
        "remoteEndpoint": endpoint(span.remote),
        "tags": span.tags,
    }
    if span.parent_id:
        fields["parentId"] = span.parent_id
    if span.shared:
        fields["shared"] = True
    if span.annotations:
        fields["annotations"] = [
            {"timestamp": at_us, "value": what} for at_us, what in span.annotations
        ]
    return fields


def endpoint(one: Any) -> Json:
    family = "ipv6" if ":" in one.address else "ipv4"
    named = {"serviceName": one.service.lower()} if one.service else {}
    return {**named, family: one.address, "port": one.port}


def test_both_draw_the_same_dependencies(fed, demo):
    zipkin, store = fed
    links = [
        sorted(
            server.get("/api/v2/dependencies", endTs=now_ms(), lookback=24 * HOUR_MS),
            key=lambda link: (link["parent"], link["child"]),
        )
        for server in (zipkin, store)
    ]
    assert links[0] == links[1]
    assert {(link["parent"], link["child"]) for link in links[0]} >= {
        ("client", "productpage"),
        ("productpage", "details"),
        ("productpage", "reviews"),
        ("reviews", "ratings"),
    }


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("services", {}),
        ("spans", {"serviceName": "productpage"}),
        ("remoteServices", {"serviceName": "productpage"}),
    ],
)
def test_both_give_the_same_lists(fed, path, query):
    zipkin, store = (server.get(f"/api/v2/{path}", **query) for server in fed)
    assert zipkin == store
    assert zipkin


@pytest.mark.parametrize(
    ("found", "query"),
    [
        (True, {}),
        (True, {"serviceName": "ratings"}),
        (False, {"serviceName": "nobody"}),
        (True, {"serviceName": "reviews", "remoteServiceName": "ratings"}),
        (False, {"serviceName": "ratings", "remoteServiceName": "reviews"}),
        (True, {"serviceName": "reviews", "annotationQuery": "http.method=GET"}),
        (True, {"annotationQuery": "podspan.link and http.status_code=200"}),
        (False, {"annotationQuery": "http.status_code=503"}),
        (False, {"annotationQuery": "error"}),
        (True, {"serviceName": "client", "minDuration": 1}),
        (False, {"serviceName": "client", "minDuration": 60_000_000}),
        (True, {"minDuration": 1, "maxDuration": 60_000_000}),
        (False, {"endTs": 1_000_000_000_000, "lookback": HOUR_MS}),
    ],
)
def test_both_find_the_trace_or_do_not(fed, demo, found, query):
    for server in fed:
        traces = server.get("/api/v2/traces", **{"lookback": 24 * HOUR_MS, **query})
        ids = {span["traceId"] for trace in traces for span in trace}
        assert ids == ({demo[0].trace_id} if found else set()), server.url


def with_own_ids(spans: list[Span]) -> list[Span]:
    """The same trace as the kernel makes it with `--span-ids child`."""
    served = {span.span_id for span in spans if span.shared}

    def server_id(span_id: str) -> str:
        return f"{derive_id(int(span_id, 16)):016x}"

    def own(span: Span) -> Span:
        if span.shared:
            own_id = server_id(span.span_id)
            return replace(span, span_id=own_id, parent_id=span.span_id, shared=False)
        if span.parent_id in served:
            return replace(span, parent_id=server_id(span.parent_id))
        return span

    return [own(span) for span in spans]


def whole_trace(jaeger: Server, demo: list[Span]) -> Any:
    path = f"/api/traces/{demo[0].trace_id}"
    wait_for(
        lambda: jaeger_spans(jaeger, path) == len(demo), "Jaeger has the whole trace"
    )
    [trace] = jaeger.get(path)["data"]
    return trace


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
def test_jaeger_shows_shared_ids_by_otlp_below_an_ancestor(jaeger, demo, encoding):
    feed(demo, OtlpEncoder(encoding, shared_ids=True), jaeger.port("otlp"))
    trace = whole_trace(jaeger, demo)
    by_id = {span["spanID"]: span for span in trace["spans"]}
    assert len(by_id) == len(demo)
    assert trace["warnings"] is None
    for span in trace["spans"]:
        if (parent := parent_of(span, by_id)) is not None:
            end_us = parent["startTime"] + parent["duration"]
            assert parent["startTime"] <= span["startTime"]
            assert span["startTime"] + span["duration"] <= end_us


@pytest.mark.parametrize(
    ("encoder", "port", "made"),
    [
        (ZipkinEncoder, "zipkin", list),
        (lambda: OtlpEncoder("protobuf"), "otlp", with_own_ids),
        (lambda: OtlpEncoder("json"), "otlp", with_own_ids),
    ],
    ids=["zipkin", "otlp-protobuf", "otlp-json"],
)
def test_jaeger_shows_every_span_under_its_parent(
    jaeger,
    demo,
    encoder: Callable[[], Any],
    port,
    made: Callable[[list[Span]], list[Span]],
):
    feed(made(demo), encoder(), jaeger.port(port))
    trace = whole_trace(jaeger, demo)
    services = {key: one["serviceName"] for key, one in trace["processes"].items()}
    by_id = {span["spanID"]: span for span in trace["spans"]}
    assert len(by_id) == len(demo)

    def who(span: Json | None) -> tuple[str, str] | None:
        if span is None:
            return None
        return tag(span, "span.kind").upper(), services[span["processID"]]

    parents = sorted(
        (who(span), span["operationName"], who(parent_of(span, by_id)))
        for span in trace["spans"]
        if parent_of(span, by_id)
    )
    roots = [who(span) for span in trace["spans"] if not span["references"]]
    assert roots == [("CLIENT", "client")]
    assert parents == sorted(
        ((span.kind, span.local.service), span.name, parent)
        for span in demo
        for parent in [expected_parent(span, demo)]
        if parent
    )
    assert all(tag(span, "podspan.link") for span in trace["spans"])


def jaeger_spans(jaeger: Server, path: str) -> int:
    try:
        return sum(len(trace["spans"]) for trace in jaeger.get(path)["data"])
    except OSError:
        return 0


def parent_of(span: Json, by_id: dict[str, Json]) -> Json | None:
    return next((by_id[ref["spanID"]] for ref in span["references"]), None)


def tag(span: Json, key: str) -> str:
    return next(str(one["value"]) for one in span["tags"] if one["key"] == key)


def expected_parent(span: Span, spans: list[Span]) -> tuple[str, str] | None:
    """Return kind and service: of a server its client, of a client who served."""
    halves = {(one.span_id, one.kind): one for one in spans}
    if span.shared:
        parent = halves[span.span_id, "CLIENT"]
    elif not span.parent_id:
        return None
    else:
        parent = halves[span.parent_id, "SERVER"]
    return parent.kind, parent.local.service


def test_jaeger_and_the_store_draw_the_same_graph(jaeger, store, fed, demo):
    feed(with_own_ids(demo), OtlpEncoder("protobuf"), jaeger.port("otlp"))
    query = {"endTs": now_ms(), "lookback": 24 * HOUR_MS}

    def edges() -> Any:
        return jaeger.get("/api/dependencies", **query)["data"]

    wait_for(edges, "Jaeger has a graph")
    ours = store.get("/api/v2/dependencies", **query)
    # Jaeger counts a service's calls of itself: its client under its server.
    assert {
        (edge["parent"], edge["child"], edge["callCount"])
        for edge in wait_for(edges, "Jaeger has a graph")
        if edge["parent"] != edge["child"]
    } == {(link["parent"], link["child"], link["callCount"]) for link in ours}


def now_ms() -> int:
    return int(time.time() * 1000) + HOUR_MS
