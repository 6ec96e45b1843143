"""What an exchange's span says, in Envoy's words and in OpenTelemetry's.

One row per rule: its source, the record's fields, what the tags must be ("": absent).
"""

import errno

import pytest
from podspan.agent.exchange import End, Exchange, Link, Protocol, Role
from podspan.agent.span import SpanOptions, span_of
from podspan.agent.tags import CONVENTIONS
from unit.kernel_struct import exchange_record
from unit.stream_wire import stream_wire

SERVER = {"role": 2, "flags": 5, "link": 1, "local_port": 9080, "peer_port": 40000}
TCP = {
    "protocol": Protocol.TCP,
    "method": b"",
    "target": b"",
    "host": b"",
    "user_agent": b"",
    "request_id": b"",
    "request_minor": 0,
    "status": 0,
    "peer_port": 3306,
    "request_bytes": 30,
    "response_bytes": 1000,
}
TCP_SERVER = TCP | {"role": 2, "local_port": 3306, "peer_port": 40000}
REFUSED = TCP | {
    "end": End.CONNECT_FAILED,
    "error": errno.ECONNREFUSED,
    "connect_start_ns": 5_000_000_000,
    "connect_end_ns": 5_000_300_000,
    "request_first_ns": 0,
    "request_last_ns": 0,
    "response_first_ns": 0,
    "response_last_ns": 0,
    "request_bytes": 0,
    "response_bytes": 0,
}
UNSEEN_REQUEST = {"method": b"", "target": b"", "host": b"", "request_first_ns": 0}


def span(convention, **fields):
    exchange = Exchange.from_kernel(exchange_record(**fields))
    made = span_of(exchange, "productpage", 0, SpanOptions(convention))
    assert made is not None
    return made


def check(convention, source, fields, expected):
    tags = span(convention, **fields).tags
    got = {name: tags.get(name, "") for name in expected}
    assert got == expected, source


# Not Istio: Envoy itself (snapshots of ISTIO.md's header).
ENVOY = "Envoy tracer_impl.cc"
ISTIO = "ISTIO.md section 3"
FLAGS = "Envoy access log, response flags"
HTTP_SPANS = "semconv HTTP spans"


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        (ISTIO, {}, {"component": "proxy", "downstream_cluster": "-"}),
        (ISTIO, {}, {"http.method": "GET", "http.status_code": "200"}),
        (ISTIO, {"status": 0}, {"http.status_code": "0"}),
        (ISTIO, {}, {"http.protocol": "HTTP/1.1"}),
        (ISTIO, {"request_minor": 0}, {"http.protocol": "HTTP/1.0"}),
        (ISTIO, {}, {"http.url": "http://details:9080/details/0?u=1"}),
        (ISTIO, {}, {"user_agent": "python"}),
        (ISTIO, {"user_agent": b""}, {"user_agent": "-"}),
        (ISTIO, {"request_bytes": 7}, {"request_size": "7", "response_size": "178"}),
        (ISTIO, {"request_id": b"r"}, {"guid:x-request-id": "r"}),
        (ISTIO, {"client_trace_id": b"c"}, {"guid:x-client-trace-id": "c"}),
        # Downstream is who called: the client's own address, the server's peer.
        (ISTIO, {}, {"peer.address": "10.1.0.2"}),
        (ISTIO, SERVER, {"peer.address": "10.1.0.3"}),
        (ISTIO, SERVER | {"peer_addr": "fd00::2"}, {"peer.address": "fd00::2"}),
        # Upstream is who was called.
        (ENVOY, {}, {"upstream_address": "10.1.0.3:9080"}),
        (ENVOY, {"peer_addr": "fd00::2"}, {"upstream_address": "[fd00::2]:9080"}),
        (ENVOY, SERVER, {"upstream_address": "10.1.0.2:9080"}),
        (ISTIO, {}, {"upstream_cluster": "outbound|9080||details"}),
        (ISTIO, {"host": b"a"}, {"upstream_cluster.name": "outbound|80||a"}),
        (ISTIO, {"target": b"http://b:1/"}, {"upstream_cluster": "outbound|1||b"}),
        (ISTIO, SERVER, {"upstream_cluster": "inbound|9080||"}),
        (ISTIO, SERVER, {"upstream_cluster.name": "inbound|9080||"}),
        # Empty values are dropped.
        (ISTIO, {"host": b""}, {"upstream_cluster": "", "upstream_cluster.name": ""}),
        (ISTIO, {"host": b"x" * 96}, {"upstream_cluster": ""}),
        (ISTIO, {"request_id": b""}, {"guid:x-request-id": ""}),
        (ISTIO, {}, {"guid:x-client-trace-id": ""}),
        (ISTIO, UNSEEN_REQUEST, {"http.method": "", "http.url": ""}),
        (ISTIO, UNSEEN_REQUEST, {"http.protocol": "", "http.status_code": "200"}),
        # No usable Host: the address that was called.
        (
            "RFC 9112 3.3",
            {"host": b""},
            {"http.url": "http://10.1.0.3:9080/details/0?u=1"},
        ),
        (
            "RFC 9112 3.3",
            SERVER | {"host": b"", "local_addr": "fd00::1"},
            {"http.url": "http://[fd00::1]:9080/details/0?u=1"},
        ),
        (
            "RFC 9112 3.3",
            {"host": b"x" * 96, "target": b"/a"},
            {"http.url": "http://10.1.0.3:9080/a"},
        ),
        (
            "RFC 9112 3.2.3",
            {"method": b"CONNECT", "target": b"db:443"},
            {"http.url": "http://db:443"},
        ),
        # Errors: no response, or 5xx; not 4xx.
        (ISTIO, {}, {"error": ""}),
        (ISTIO, {"status": 404}, {"error": ""}),
        (ISTIO, {"status": 500}, {"error": "true"}),
        (ISTIO, {"status": 599}, {"error": "true"}),
        (ISTIO, {"status": 0, "end": End.CLOSED_THERE}, {"error": "true"}),
        (ISTIO, {"status": 0, "end": End.NEXT_REQUEST}, {"error": "true"}),
        ("half a response is none", {"end": End.CLOSED_HERE}, {"error": "true"}),
        ("half a response is none", {"end": End.CLOSED_THERE}, {"error": "true"}),
        ("half a response is none", {"end": End.RESET}, {"error": "true"}),
        ("RFC 9112 6.3", {"end": End.EOF}, {"error": ""}),
        ("it may have gone well", {"end": End.NEXT_REQUEST}, {"error": ""}),
        ("it may have gone well", {"status": 0, "end": End.UNSEEN}, {"error": ""}),
        (ISTIO, {"status": 500, "end": End.UNSEEN}, {"error": "true"}),
        # Who is to blame.
        (FLAGS, {}, {"response_flags": "-"}),
        (FLAGS, {"end": End.EOF}, {"response_flags": "-"}),
        (FLAGS, {"end": End.CLOSED_HERE}, {"response_flags": "DC"}),
        (FLAGS, {"end": End.CLOSED_THERE}, {"response_flags": "UC"}),
        (FLAGS, {"end": End.RESET}, {"response_flags": "UC"}),
        (FLAGS, SERVER | {"end": End.CLOSED_HERE}, {"response_flags": "UC"}),
        (FLAGS, SERVER | {"end": End.CLOSED_THERE}, {"response_flags": "DC"}),
        (FLAGS, SERVER | {"end": End.RESET}, {"response_flags": "DC"}),
        # TCP: Envoy has no spans of it, so only what its access log has.
        (ISTIO, TCP, {"component": "proxy", "peer.address": "10.1.0.2"}),
        (ISTIO, TCP, {"request_size": "30", "response_size": "1000"}),
        (ISTIO, TCP, {"upstream_address": "10.1.0.3:3306", "upstream_cluster": ""}),
        (ISTIO, TCP_SERVER, {"upstream_cluster": "inbound|3306||"}),
        (ISTIO, TCP_SERVER, {"peer.address": "10.1.0.3"}),
        (ISTIO, TCP, {"http.status_code": "", "user_agent": "", "http.url": ""}),
        (
            FLAGS + ": UC and DC are HTTP's",
            TCP | {"end": End.RESET},
            {"response_flags": "-", "error": "true"},
        ),
        (FLAGS, REFUSED, {"response_flags": "UF", "error": "true"}),
    ],
)
def test_istio(source, fields, expected):
    check("istio", source, fields, expected)


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        (HTTP_SPANS, {}, {"http.request.method": "GET"}),
        (HTTP_SPANS, {"method": b"QUERY"}, {"http.request.method": "QUERY"}),
        (
            HTTP_SPANS,
            {"method": b"PURGE"},
            {"http.request.method": "_OTHER", "http.request.method_original": "PURGE"},
        ),
        (
            HTTP_SPANS + ": case-sensitive",
            {"method": b"get"},
            {"http.request.method": "_OTHER", "http.request.method_original": "get"},
        ),
        (HTTP_SPANS, {}, {"http.request.method_original": ""}),
        # The client's URL is in one piece, the server's in parts.
        (HTTP_SPANS, {}, {"url.full": "http://details:9080/details/0?u=1"}),
        (HTTP_SPANS, {}, {"url.path": "", "url.query": "", "url.scheme": ""}),
        (HTTP_SPANS, SERVER, {"url.full": "", "url.scheme": "http"}),
        (HTTP_SPANS, SERVER, {"url.path": "/details/0", "url.query": "u=1"}),
        (HTTP_SPANS, SERVER | {"target": b"/p"}, {"url.path": "/p", "url.query": ""}),
        (
            HTTP_SPANS,
            SERVER | {"target": b"https://b"},
            {"url.path": "/", "url.scheme": "https"},
        ),
        (HTTP_SPANS, SERVER | {"target": b"*"}, {"url.path": "*"}),
        (
            HTTP_SPANS,
            SERVER | {"method": b"CONNECT", "target": b"db:443"},
            {"url.path": "", "server.address": "db", "server.port": "443"},
        ),
        (
            HTTP_SPANS,
            {"method": b"CONNECT", "target": b"db:443"},
            {"url.full": "http://db:443"},
        ),
        (
            HTTP_SPANS,
            {"target": b"http://u:p@b/"},
            {"url.full": "http://REDACTED:REDACTED@b/", "server.address": "b"},
        ),
        # As the caller named it, on both sides; else by address.
        (HTTP_SPANS, {}, {"server.address": "details", "server.port": "9080"}),
        (HTTP_SPANS, SERVER, {"server.address": "details", "server.port": "9080"}),
        (HTTP_SPANS, {"host": b"a"}, {"server.address": "a", "server.port": "80"}),
        (
            HTTP_SPANS,
            {"host": b"[fd00::1]:8"},
            {"server.address": "fd00::1", "server.port": "8"},
        ),
        (
            HTTP_SPANS,
            {"target": b"https://b/"},
            {"server.address": "b", "server.port": "443"},
        ),
        (
            HTTP_SPANS,
            {"host": b""},
            {"server.address": "10.1.0.3", "server.port": "9080"},
        ),
        (
            HTTP_SPANS,
            SERVER | {"host": b""},
            {"server.address": "10.1.0.2", "server.port": "9080"},
        ),
        (
            HTTP_SPANS,
            {"host": b"x" * 96},
            {
                "server.address": "10.1.0.3",
                "url.full": "http://10.1.0.3:9080/details/0?u=1",
            },
        ),
        (
            HTTP_SPANS,
            {},
            {"network.peer.address": "10.1.0.3", "network.peer.port": "9080"},
        ),
        (
            HTTP_SPANS,
            SERVER,
            {"client.address": "10.1.0.3", "network.peer.port": "40000"},
        ),
        (HTTP_SPANS, {}, {"client.address": ""}),
        (
            HTTP_SPANS,
            {},
            {"network.protocol.name": "http", "network.protocol.version": "1.1"},
        ),
        (HTTP_SPANS, {"request_minor": 0}, {"network.protocol.version": "1.0"}),
        (HTTP_SPANS, {}, {"http.response.status_code": "200"}),
        (HTTP_SPANS, {"status": 0}, {"http.response.status_code": ""}),
        (
            HTTP_SPANS,
            {"request_bytes": 7},
            {"http.request.body.size": "7", "http.response.body.size": "178"},
        ),
        (HTTP_SPANS, {}, {"user_agent.original": "python"}),
        (HTTP_SPANS, {"user_agent": b""}, {"user_agent.original": ""}),
        (
            HTTP_SPANS,
            UNSEEN_REQUEST,
            {
                "http.request.method": "_OTHER",
                "url.full": "",
                "network.protocol.version": "",
            },
        ),
        # Errors: 5xx for both, 4xx for the caller only.
        (HTTP_SPANS, {}, {"error": "", "error.type": ""}),
        (HTTP_SPANS, {"status": 399}, {"error": "", "error.type": ""}),
        (HTTP_SPANS, {"status": 404}, {"error": "true", "error.type": "404"}),
        (HTTP_SPANS, SERVER | {"status": 404}, {"error": "", "error.type": ""}),
        (HTTP_SPANS, {"status": 500}, {"error": "true", "error.type": "500"}),
        (HTTP_SPANS, SERVER | {"status": 500}, {"error": "true", "error.type": "500"}),
        (HTTP_SPANS, {"status": 500, "end": End.RESET}, {"error.type": "500"}),
        (
            HTTP_SPANS,
            {"end": End.RESET, "error": errno.ECONNRESET},
            {"error": "true", "error.type": "ECONNRESET"},
        ),
        (
            HTTP_SPANS,
            SERVER | {"end": End.CLOSED_THERE},
            {"error": "true", "error.type": "closed-there"},
        ),
        (
            HTTP_SPANS,
            {"status": 0, "end": End.NEXT_REQUEST},
            {"error": "true", "error.type": "next-request"},
        ),
        ("it may have gone well", {"status": 0, "end": End.UNSEEN}, {"error": ""}),
        # TCP: the general attributes.
        (
            "semconv general",
            TCP,
            {"network.transport": "tcp", "http.request.method": ""},
        ),
        ("semconv general", TCP, {"server.address": "10.1.0.3", "server.port": "3306"}),
        ("semconv general", TCP, {"network.peer.port": "3306", "client.address": ""}),
        (
            "semconv general",
            TCP_SERVER,
            {"server.address": "10.1.0.2", "server.port": "3306"},
        ),
        ("semconv general", TCP_SERVER, {"client.address": "10.1.0.3"}),
        (
            "ours",
            TCP,
            {"podspan.request_bytes": "30", "podspan.response_bytes": "1000"},
        ),
        ("semconv error.type", TCP, {"error": "", "error.type": ""}),
        ("semconv error.type", TCP | {"end": End.RESET}, {"error.type": "reset"}),
        (
            "semconv error.type",
            REFUSED,
            {"error": "true", "error.type": "ECONNREFUSED"},
        ),
    ],
)
def test_otel(source, fields, expected):
    check("otel", source, fields, expected)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        *(({"link": link}, {"podspan.link": link.name.lower()}) for link in Link),
        ({}, {"podspan.end": "", "podspan.error": "", "podspan.retransmits": ""}),
        *(
            ({"end": end}, {"podspan.end": end.name.lower().replace("_", "-")})
            for end in End
            if end is not End.COMPLETE
        ),
        ({"error": errno.ETIMEDOUT}, {"podspan.error": "ETIMEDOUT"}),
        ({"error": 4095}, {"podspan.error": "4095"}),
        ({"retransmits": 3}, {"podspan.retransmits": "3"}),
        # Times, and what is missing without the moments they need.
        (
            {"request_last_ns": 5_000_250_000},
            {
                "podspan.connect_us": "",
                "podspan.request_us": "250",
                "podspan.wait_us": "3750",
                "podspan.response_us": "200",
            },
        ),
        (
            {"connect_start_ns": 4_999_000_000, "connect_end_ns": 4_999_500_999},
            {"podspan.connect_us": "500"},
        ),
        ({"connect_start_ns": 4_999_000_000}, {"podspan.connect_us": ""}),
        ({"connect_end_ns": 4_999_000_000}, {"podspan.connect_us": ""}),
        (
            {"request_first_ns": 0},
            {"podspan.request_us": "", "podspan.wait_us": "3999"},
        ),
        ({"request_last_ns": 0}, {"podspan.request_us": "", "podspan.wait_us": ""}),
        ({"response_first_ns": 0}, {"podspan.wait_us": "", "podspan.response_us": ""}),
        (
            {"response_last_ns": 0},
            {"podspan.wait_us": "3999", "podspan.response_us": ""},
        ),
        # An early response: before the request's last byte.
        ({"request_last_ns": 5_005_000_000}, {"podspan.wait_us": "0"}),
        # A connection's first response.
        (TCP, {"podspan.first_response_us": "4000", "podspan.wait_us": ""}),
        (TCP | {"response_first_ns": 0}, {"podspan.first_response_us": ""}),
        ({}, {"podspan.first_response_us": ""}),
        # The serving end speaks first (MySQL, SMTP, SSH): since it was connected.
        (
            TCP | {"connect_end_ns": 5_000_000_000, "request_first_ns": 5_005_000_000},
            {"podspan.first_response_us": "4000"},
        ),
        (
            TCP | {"connect_end_ns": 5_003_000_000, "request_first_ns": 0},
            {"podspan.first_response_us": "1000"},
        ),
        (TCP | {"request_first_ns": 0}, {"podspan.first_response_us": ""}),
        (REFUSED, {"podspan.connect_us": "300", "podspan.end": "connect-failed"}),
        (REFUSED, {"podspan.error": "ECONNREFUSED", "podspan.request_us": ""}),
    ],
)
def test_ours_in_every_convention(convention, fields, expected):
    check(convention, fields, fields, expected)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("end", "error", "failed"),
    [
        (End.COMPLETE, 0, False),
        (End.EOF, 0, False),
        (End.CLOSED_HERE, 0, False),
        (End.CLOSED_THERE, 0, False),
        (End.UNSEEN, 0, False),
        (End.INTERVAL, 0, False),
        (End.RESET, 0, True),
        (End.RESET, errno.ETIMEDOUT, True),
        (End.CLOSED_HERE, errno.EPIPE, True),
        (End.CONNECT_FAILED, errno.EHOSTUNREACH, True),
        (End.CONNECT_FAILED, 0, True),
    ],
)
def test_a_connection_that_is_closed_has_not_failed(convention, end, error, failed):
    tags = span(convention, **TCP, end=end, error=error).tags
    assert tags.get("error") == ("true" if failed else None)


@pytest.mark.parametrize(
    ("convention", "fields", "name"),
    [
        # Istio's GetRouteOperation, for whoever the caller named.
        ("istio", {}, "details:9080/*"),
        ("istio", SERVER, "details:9080/*"),
        ("istio", {"host": b"Reviews"}, "reviews:80/*"),
        ("istio", {"host": b"10.0.0.1:81"}, "10.0.0.1:81/*"),
        ("istio", {"host": b"[fd00::1]"}, "[fd00::1]:80/*"),
        ("istio", {"host": b"x" * 96}, "x" * 96 + "/*"),
        ("istio", {"host": b"u:p@a"}, "a:80/*"),
        ("istio", {"target": b"https://b/"}, "b:443/*"),
        ("istio", {"method": b"CONNECT", "target": b"db:443"}, "db:443/*"),
        ("istio", {"host": b""}, "get"),
        ("istio", UNSEEN_REQUEST, "http"),
        # semconv HTTP spans, name: there is no low-cardinality target.
        ("otel", {}, "GET"),
        ("otel", SERVER, "GET"),
        ("otel", {"method": b"PURGE"}, "HTTP"),
        ("otel", UNSEEN_REQUEST, "HTTP"),
        *((each, TCP, "tcp:3306") for each in CONVENTIONS),
        *((each, TCP_SERVER, "tcp:3306") for each in CONVENTIONS),
        *((each, REFUSED, "tcp:3306") for each in CONVENTIONS),
    ],
)
def test_names(convention, fields, name):
    assert span(convention, **fields).name == name


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("role", [Role.CLIENT, Role.SERVER])
@pytest.mark.parametrize("texts", [{}, TCP, UNSEEN_REQUEST])
def test_empty_tags_are_left_out(convention, role, texts):
    tags = span(convention, **{**texts, "role": role}).tags
    assert all(tags.values())


def stream_span(convention, **fields):
    exchange = Exchange.from_worker(stream_wire(**fields))
    made = span_of(exchange, "productpage", 0, SpanOptions(convention))
    assert made is not None
    return made


def as_server(**fields):
    return {"role": 2, "local_port": 50051, "peer_port": 40000, **fields}


CANCEL, REFUSED_STREAM = 8, 7
NO_GRPC = {"grpc_status": "", "method": "GET", "target": "/details/0?u=1"}
GRPC_SPANS = "semconv gRPC spans"


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        (ISTIO, {}, {"http.protocol": "HTTP/2", "http.status_code": "200"}),
        (ISTIO, {}, {"http.url": "http://reviews:50051/shop.Reviews/Get"}),
        (ISTIO, {}, {"grpc.path": "/shop.Reviews/Get", "grpc.status_code": "0"}),
        (ISTIO, {}, {"grpc.authority": "Reviews:50051", "grpc.message": ""}),
        (ISTIO, {"grpc_message": "no%20such"}, {"grpc.message": "no%20such"}),
        (ISTIO, NO_GRPC, {"http.protocol": "HTTP/2", "grpc.path": ""}),
        (ISTIO, {}, {"upstream_cluster": "outbound|50051||reviews", "error": ""}),
        (ISTIO, as_server(), {"upstream_cluster": "inbound|50051||"}),
        *(
            (ISTIO, {"grpc_status": str(code)}, {"error": "true"})
            for code in (2, 4, 8, 12, 13, 14, 15)
        ),
        *(
            (ISTIO, {"grpc_status": str(code)}, {"error": ""})
            for code in (1, 3, 5, 6, 7, 9, 10, 11, 16, 99)
        ),
        (ISTIO, {"status": 503, "grpc_status": ""}, {"error": "true"}),
        # A stream that was reset, by either end, or a connection that was lost.
        (FLAGS, {}, {"response_flags": "-"}),
        (FLAGS, {"end": 5, "error": CANCEL}, {"response_flags": "UR"}),
        (FLAGS, {"end": 5, "error": 0}, {"response_flags": "UR"}),
        (FLAGS, {"end": 3, "error": CANCEL}, {"response_flags": "DR"}),
        (FLAGS, {"end": 3}, {"response_flags": "DC"}),
        (FLAGS, {"end": 4}, {"response_flags": "UC"}),
        (FLAGS, {"end": 5, "error": errno.ECONNRESET}, {"response_flags": "UC"}),
        (FLAGS, as_server(end=5, error=CANCEL), {"response_flags": "DR"}),
        (FLAGS, as_server(end=3, error=CANCEL), {"response_flags": "UR"}),
        (FLAGS, as_server(end=4), {"response_flags": "DC"}),
        ("ours", {"end": 5, "error": CANCEL}, {"podspan.error": "CANCEL"}),
        (
            "ours",
            {"end": 5, "error": errno.ECONNRESET},
            {"podspan.error": "ECONNRESET"},
        ),
        ("half a response is none", {"end": 5, "error": CANCEL}, {"error": "true"}),
    ],
)
def test_istio_of_http2(source, fields, expected):
    tags = stream_span("istio", **fields).tags
    assert {name: tags.get(name, "") for name in expected} == expected, source
    assert all(tags.values())


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        (HTTP_SPANS, {}, {"network.protocol.version": "2"}),
        (HTTP_SPANS, NO_GRPC, {"rpc.system.name": "", "error": ""}),
        (GRPC_SPANS, {}, {"rpc.system.name": "grpc", "rpc.method": "shop.Reviews/Get"}),
        (GRPC_SPANS, {}, {"rpc.response.status_code": "OK", "error.type": ""}),
        (GRPC_SPANS, {"grpc_status": "99"}, {"rpc.response.status_code": "99"}),
        (GRPC_SPANS, {}, {"server.address": "reviews", "server.port": "50051"}),
        *(
            (GRPC_SPANS, {"grpc_status": str(code)}, {"error.type": name})
            for code, name in ((1, "CANCELLED"), (5, "NOT_FOUND"), (13, "INTERNAL"))
        ),
        *(
            (GRPC_SPANS, as_server(grpc_status=str(code)), {"error.type": name})
            for code, name in (
                (1, ""),
                (2, "UNKNOWN"),
                (3, ""),
                (4, "DEADLINE_EXCEEDED"),
                (5, ""),
                (8, ""),
                (12, "UNIMPLEMENTED"),
                (13, "INTERNAL"),
                (14, "UNAVAILABLE"),
                (15, "DATA_LOSS"),
                (16, ""),
            )
        ),
        (
            HTTP_SPANS,
            {"end": 5, "error": REFUSED_STREAM, "status": 0, "grpc_status": ""},
            {"error.type": "REFUSED_STREAM"},
        ),
    ],
)
def test_otel_of_http2(source, fields, expected):
    tags = stream_span("otel", **fields).tags
    assert {name: tags.get(name, "") for name in expected} == expected, source
    assert tags.get("error", "") == ("true" if tags.get("error.type") else "")


@pytest.mark.parametrize(
    ("convention", "fields", "name"),
    [
        ("istio", {}, "reviews:50051/*"),
        ("otel", {}, "shop.Reviews/Get"),
        ("otel", NO_GRPC, "GET"),
    ],
)
def test_names_of_http2(convention, fields, name):
    assert stream_span(convention, **fields).name == name
