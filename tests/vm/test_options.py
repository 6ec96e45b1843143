"""What options change: ids of a server's own, other headers, rates, intervals."""

import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from math import comb

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from vm.conftest import (
    BACK,
    CLIENT,
    FRONT,
    Agent,
    Json,
    Request,
    Server,
    connected,
    fetch,
    head_of,
    read_response,
    serving,
    spans_of_port,
    url_of,
    wait_for,
)
from vm.test_connections import read_head, spans_at, talking

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
FORWARDED = ("x-request-id", "x-b3-traceid", "x-b3-spanid", "x-b3-sampled")


def restarted(agent: Agent, *options: str) -> Iterator[Agent]:
    agent.stop()
    agent.start(*options)
    yield agent
    agent.stop()


@pytest.fixture(scope="module")
def child_agent(session_agent: Agent) -> Iterator[Agent]:
    options = ["--span-ids", "child", "--propagate", "b3multi,b3,tracecontext"]
    options += ["--tcp-interval", "1", "--tags", "otel"]
    yield from restarted(session_agent, *options)


@pytest.fixture(scope="module")
def sampling_agent(session_agent: Agent) -> Iterator[Agent]:
    options = ["--sampling", "30", "--unsampled", "defer"]
    yield from restarted(session_agent, *options)


def halves(spans: list[Json], path: str) -> tuple[Json, Json]:
    (client,) = [s for s in spans if s["kind"] == "CLIENT" and path_of(s) == path]
    (server,) = [s for s in spans if s["kind"] == "SERVER" and path_of(s) == path]
    return client, server


def path_of(span: Json) -> str:
    return re.sub(r"^http://[^/]*", "", url_of(span))


def test_servers_have_ids_of_their_own_and_are_the_parents_of_their_calls(
    child_agent: Agent,
) -> None:
    """Whether the application forwards what it received, or nothing."""
    with serving(BACK) as back:

        def answer(request: Request) -> bytes:
            if "child" in request.path:
                headers = request.headers
                lines = [f"{n}: {headers[n]}" for n in FORWARDED if n in headers]
                forward = lines if "forwarding" in request.path else []
                own = [
                    f"x-b3-traceid: {headers['x-b3-traceid']}",
                    "x-b3-spanid: 00000000000000aa",
                ]
                with connected(back, FRONT) as sock:
                    for path, with_lines in (
                        (f"{request.path}-inner", forward),
                        (f"{request.path}-own-tracer", own),
                    ):
                        sock.sendall(head_of(back, path, *with_lines))
                        read_response(sock)
            return OK

        with serving(FRONT, answer) as front:
            fetch(front, "/child-silent")
            fetch(front, "/child-forwarding")
            spans = child_agent.spans_of("/child-", front)
    for path in ("/child-silent", "/child-forwarding"):
        client, server = halves(spans, path)
        assert "parentId" not in client
        assert server["parentId"] == client["id"] != server["id"]
        assert "shared" not in server
        inner, inner_server = halves(spans, f"{path}-inner")
        assert inner["parentId"] == server["id"]
        assert inner_server["parentId"] == inner["id"]
        own, _ = halves(spans, f"{path}-own-tracer")
        assert own["parentId"] == "00000000000000aa"
        traces = {s["traceId"] for s in (client, server, inner, inner_server, own)}
        assert len(traces) == 1


def test_every_form_of_the_context_says_the_same(child_agent: Agent) -> None:
    with serving(FRONT) as front:
        fetch(front, "/forms/1")
        client, _ = halves(child_agent.spans_of("/forms/", front), "/forms/1")
        (request,) = [r for r in front.requests if r.path == "/forms/1"]
    headers = request.headers
    trace_id, span_id = client["traceId"], client["id"]
    assert (headers["x-b3-traceid"], headers["x-b3-spanid"]) == (trace_id, span_id)
    assert headers["b3"] == f"{trace_id}-{span_id}-1"
    assert headers["traceparent"] == f"00-{trace_id}-{span_id}-01"


def test_opentelemetrys_names_and_tags(child_agent: Agent) -> None:
    with serving(FRONT) as front:
        fetch(front, "/semconv/1?a=b")
        spans = child_agent.spans_of("/semconv/", front)
    client, server = (next(s for s in spans if s["kind"] == k) for k in KINDS)
    assert client["name"] == server["name"] == "GET"
    assert client["tags"]["url.full"].endswith("/semconv/1?a=b")
    assert (server["tags"]["url.path"], server["tags"]["url.query"]) == (
        "/semconv/1",
        "a=b",
    )
    assert client["tags"]["http.response.status_code"] == "200"
    assert "http.url" not in client["tags"]


KINDS = ("CLIENT", "SERVER")


def test_a_long_tcp_connection_gives_a_span_per_interval(child_agent: Agent) -> None:
    def echo(sock: socket.socket) -> None:
        while data := sock.recv(1000):
            sock.sendall(data)

    rounds = 0
    with talking(echo) as server:
        with connected(server) as sock:
            until = time.monotonic() + 3.5
            while time.monotonic() < until:
                sock.sendall(b"*1\r\n$4\r\nPING\r\n")
                assert len(sock.recv(100)) == 14
                rounds += 1
                time.sleep(0.05)
        spans = ended_spans_at(child_agent, server)
    for kind in KINDS:
        parts = [s for s in spans if s["kind"] == kind]
        assert len(parts) >= 3, parts
        ends = Counter(s["tags"]["podspan.end"] for s in parts)
        assert ends["interval"] == len(parts) - 1
        sizes = [int(s["tags"]["podspan.request_bytes"]) for s in parts]
        assert sum(sizes) == 14 * rounds
        assert len({s["id"] for s in parts}) == len(parts)
        assert len({s["traceId"] for s in parts}) == 1


def ended_spans_at(agent: Agent, server: Server) -> list[Json]:
    """All spans of the one connection to this port, once both ends have closed."""
    deadline = time.monotonic() + 60
    while True:
        spans = spans_of_port(agent, server)
        if sum(s["tags"]["podspan.end"].startswith("closed") for s in spans) == 2:
            return spans
        assert time.monotonic() < deadline, spans
        time.sleep(0.05)


def test_both_ends_of_a_tunnel_know_each_other(child_agent: Agent) -> None:
    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n")
        while data := sock.recv(1000):
            sock.sendall(data)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/tunnel/1", "upgrade: x"))
            read_head(sock)
            sock.sendall(b"ping")
            assert sock.recv(10) == b"ping"
        spans = spans_at(child_agent, server, 4)
    by_parent = {s.get("parentId"): s for s in spans}
    root = by_parent[None]
    below = [s for s in spans if s.get("parentId") == root["id"]]
    assert {s["kind"] for s in below} == {"CLIENT", "SERVER"}
    (tunnel,) = [s for s in below if s["kind"] == "CLIENT"]
    assert by_parent[tunnel["id"]]["kind"] == "SERVER"


def test_a_rate_takes_whole_traces(sampling_agent: Agent) -> None:
    """Either all four spans of two calls or none; about so many as the rate says."""
    calls, rate = 300, 0.3
    with serving(BACK) as back:

        def answer(request: Request) -> bytes:
            if "/rate/" in request.path:
                with connected(back, FRONT) as sock:
                    sock.sendall(head_of(back, request.path))
                    read_response(sock)
            return OK

        with serving(FRONT, answer) as front:
            with connected(front) as sock:
                for i in range(calls):
                    sock.sendall(head_of(front, f"/rate/{i}"))
                    read_response(sock)
                for sampled in "10":
                    line = f"x-b3-sampled: {sampled}"
                    sock.sendall(head_of(front, f"/decided/{sampled}", line))
                    read_response(sock)
                sock.sendall(head_of(front, "/debug/1", "x-b3-flags: 1"))
                read_response(sock)
                # Sampled whatever the rate, so that the test knows that all is there.
                sock.sendall(head_of(front, "/last/1", "x-b3-sampled: 1"))
                read_response(sock)
            deadline = time.monotonic() + 60
            while len(urls(sampling_agent, "/last/")) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    by_call = Counter(urls(sampling_agent, "/rate/"))
    assert set(by_call.values()) == {4}
    low, high = binomial_bounds(calls, rate)
    assert low <= len(by_call) <= high
    assert urls(sampling_agent, "/decided/") == ["/decided/1"] * 2
    assert urls(sampling_agent, "/debug/") == ["/debug/1"] * 2
    for request in front.requests:
        told = request.headers.get("x-b3-sampled")
        reason = request.headers["x-request-id"][14]
        if "/rate/" in request.path:
            assert (told, reason) == (
                ("1", "9") if request.path in by_call else (None, "4")
            )
    assert {r.headers.get("x-b3-sampled") for r in back.requests} == {"1", None}


def test_metrics_count_what_is_not_sampled(sampling_agent: Agent) -> None:
    """By both ends of each call, and of each TCP connection."""
    calls = 20

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(1000):
            sock.sendall(data)

    with serving(FRONT) as front, talking(echo) as opaque:
        # Who has which address is learnt from a first exchange of each end.
        fetch(front, "/first/1")
        wait_for(lambda: min(reported("istio_requests_total", EDGE)) > 0, "it is seen")
        host = f"{front.address}:{front.port}".encode()
        with connected(front) as sock:
            for i in range(calls):
                head = head_of(front, f"/not-sampled/{i}", "x-b3-sampled: 0")
                sock.sendall(head.replace(host, b"shop.example:8080"))
                read_response(sock)
            sock.sendall(head_of(front, "/sampled/1", "x-b3-sampled: 1"))
            read_response(sock)
        for _ in range(calls):  # of which the rate takes about a third
            with connected(opaque) as sock:
                sock.sendall(b"*1\r\n$4\r\nPING\r\n")
                assert len(sock.recv(100)) == 14
        # Records come in order: when the last connection's are there, all are.
        closed = "istio_tcp_connections_closed_total"
        wait_for(lambda: min(reported(closed, EDGE)) >= calls, "all are counted")
    called = {**EDGE, "destination_service": "shop.example", "response_code": "200"}
    assert reported("istio_requests_total", called) == [calls] * 2
    assert reported("istio_request_duration_milliseconds_count", called) == [calls] * 2
    assert reported(closed, EDGE) == [calls] * 2
    assert reported("istio_tcp_sent_bytes_total", EDGE) == [14 * calls] * 2
    wait_for(lambda: len(urls(sampling_agent, "/sampled/")) == 2, "the spans")
    assert urls(sampling_agent, "/not-sampled/") == []


EDGE = {"source_workload": CLIENT.name, "destination_workload": FRONT.name}
STATUS_PORT = 15025


def reported(name: str, labels: dict[str, str]) -> list[float]:
    """The sums over these labels by both reporters, source and destination."""
    connection = HTTPConnection("127.0.0.1", STATUS_PORT, timeout=30)
    with closing(connection):
        accept = {"Accept": "application/openmetrics-text"}
        connection.request("GET", "/metrics", headers=accept)
        text = connection.getresponse().read().decode()
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return [
        sum(one.value for one in samples if one.labels["reporter"] == reporter)
        for reporter in ("source", "destination")
    ]


def urls(agent: Agent, token: str) -> list[str]:
    return [path for path in map(path_of, agent.all_spans()) if token in path]


def binomial_bounds(n: int, p: float, outside: float = 0.001) -> tuple[int, int]:
    """The counts between which all but `outside` of the cases lie."""
    below, low = 0.0, 0
    chances = [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    while below + chances[low] <= outside / 2:
        below += chances[low]
        low += 1
    above, high = 0.0, n
    while above + chances[high] <= outside / 2:
        above += chances[high]
        high -= 1
    return low, high
