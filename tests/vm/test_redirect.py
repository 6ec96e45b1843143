"""The redirect engine under the real agent: what the application sees, and the spans.

Front and back ran the init step: what they open and what reaches them goes through
workers. The client did not, so its requests come without a context.
"""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm.conftest import (
    BACK,
    CLIENT,
    FRONT,
    Agent,
    Json,
    Pod,
    Request,
    connected,
    fetch,
    head_of,
    read_response,
    serving,
    spans_of_port,
    wait_for,
)
from vm.redirect_peers import grpc_call, grpc_serving, init, spans_of_target
from vm.test_connections import talking

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
ROOT_HEADERS = {"x-b3-traceid", "x-b3-spanid", "x-b3-sampled", "x-request-id"}


def redirecting(agent: Agent, pod: Pod) -> bool:
    inode = Path("/run/netns", pod.name).stat().st_ino
    lines = [line for line in agent.log().splitlines() if f"netns={inode} " in line]
    return bool(lines) and "inbound=all outbound=all" in lines[-1]


@pytest.fixture(scope="module")
def redirect_agent(session_agent: Agent) -> Iterator[Agent]:
    agent = session_agent
    agent.stop()
    agent.start("--engine", "redirect", engine="redirect")
    try:
        for pod in (FRONT, BACK):
            init(pod, "apply")
        wait_for(
            lambda: all(redirecting(agent, pod) for pod in (FRONT, BACK)),
            "workers serve both",
            agent.process,
        )
        yield agent
    finally:
        for pod in (FRONT, BACK):
            init(pod, "clean")
        agent.stop()


def span_of(spans: list[Json], kind: str, path: str) -> Json:
    (found,) = [
        span
        for span in spans
        if span["kind"] == kind and span["tags"]["http.url"].endswith(path)
    ]
    return found


def test_a_request_without_a_context_gets_one_at_the_edge(
    redirect_agent: Agent,
) -> None:
    """And the server's span is a root, with what the application was given."""
    with serving(FRONT) as front:
        fetch(front, "/edge")
        spans = redirect_agent.spans_of("/edge", front)
        [request] = [r for r in front.requests if r.path == "/edge"]
    server = span_of(spans, "SERVER", "/edge")
    headers = request.headers
    assert headers.keys() >= ROOT_HEADERS
    assert server["traceId"] == headers["x-b3-traceid"]
    assert server["id"] == headers["x-b3-spanid"]
    assert "parentId" not in server
    assert "shared" not in server
    assert server["tags"]["podspan.link"] == "none"
    assert server["tags"]["guid:x-request-id"] == headers["x-request-id"]


def test_an_outgoing_call_is_the_child_of_what_its_thread_serves(
    redirect_agent: Agent,
) -> None:
    """Although the application forwards nothing, and both calls go through workers."""
    with serving(BACK) as back:

        def answer(request: Request) -> bytes:
            if request.path.startswith("/linked"):
                with connected(back, FRONT) as sock:
                    for number in range(2):
                        sock.sendall(head_of(back, f"{request.path}/inner{number}"))
                        read_response(sock)
            return OK

        with serving(FRONT, answer) as front:
            with connected(front) as sock:
                sock.sendall(head_of(front, "/linked"))
                read_response(sock)
            spans = redirect_agent.spans_of("/linked", front)
    outer = span_of(spans, "SERVER", "/linked")
    for number in range(2):
        path = f"/linked/inner{number}"
        client = span_of(spans, "CLIENT", path)
        server = span_of(spans, "SERVER", path)
        [request] = [r for r in back.requests if r.path == path]
        assert client["traceId"] == server["traceId"] == outer["traceId"]
        assert client["parentId"] == outer["id"]
        assert client["tags"]["podspan.link"] == "thread"
        assert (server["id"], server["parentId"]) == (client["id"], client["parentId"])
        assert server["shared"] is True
        assert request.headers["x-b3-spanid"] == client["id"]
        assert request.headers["x-request-id"] == client["tags"]["guid:x-request-id"]
    assert len(spans) == 6


def test_spans_have_the_ends_that_the_application_sees(redirect_agent: Agent) -> None:
    """Not the worker's. The pod sees its client's own address."""
    with serving(FRONT) as front:
        fetch(front, "/ends")
        spans = redirect_agent.spans_of("/ends", front)
    client, server = (
        span_of(spans, "CLIENT", "/ends"),
        span_of(spans, "SERVER", "/ends"),
    )
    assert client["remoteEndpoint"]["ipv4"] == FRONT.ipv4
    assert client["remoteEndpoint"]["port"] == front.port
    assert server["localEndpoint"]["ipv4"] == FRONT.ipv4
    assert server["localEndpoint"]["port"] == front.port
    assert server["remoteEndpoint"]["ipv4"] == CLIENT.ipv4


def test_what_is_no_http_is_traced_once(redirect_agent: Agent) -> None:
    def talk(sock: socket.socket) -> None:
        assert sock.recv(100) == b"\0opaque"
        sock.sendall(b"\0answer")
        assert sock.recv(100) == b""

    with talking(talk) as front:
        with connected(front) as sock:
            sock.sendall(b"\0opaque")
            assert sock.recv(100) == b"\0answer"
        wait_for(lambda: len(spans_of_port(redirect_agent, front)) >= 2, "both halves")
    with serving(FRONT) as marker:
        redirect_agent.spans_of("/marker", marker)
    spans = spans_of_port(redirect_agent, front)
    assert sorted(span["kind"] for span in spans) == ["CLIENT", "SERVER"]
    assert all(span["name"].startswith("tcp:") for span in spans)


def test_grpc_is_traced_call_by_call_at_both_ends_and_once(
    redirect_agent: Agent,
) -> None:
    agent = redirect_agent
    with grpc_serving(BACK) as (target, metadata):
        grpc_call(FRONT, target, "one", "two")
        sent = [json.loads(metadata.readline()) for _ in range(2)]
    wait_for(lambda: len(spans_of_target(agent, target)) >= 4, "the spans of two calls")
    with serving(FRONT) as marker:
        agent.spans_of("/marker", marker)
    clients, servers = (
        [span for span in spans_of_target(agent, target) if span["kind"] == kind]
        for kind in ("CLIENT", "SERVER")
    )
    assert len(clients) == len(servers) == 2
    for client, server, call in zip(clients, servers, sent, strict=True):
        assert call["x-b3-traceid"] == client["traceId"] == server["traceId"]
        assert call["x-b3-spanid"] == client["id"] == server["id"]
        assert server["shared"] is True
        assert client["tags"]["http.protocol"] == "HTTP/2"
        assert client["tags"]["grpc.status_code"] == "0"
        assert server["remoteEndpoint"]["ipv4"] == "10.98.1.1"


def test_refused_is_refused(redirect_agent: Agent) -> None:
    """What front's connect(2) says, and the span of it, are those of no engine."""
    with serving(BACK) as back:
        pass
    with pytest.raises(ConnectionRefusedError), connected(back, FRONT):
        pass
    wait_for(lambda: len(spans_of_port(redirect_agent, back)) > 0, "the span")
    [span] = spans_of_port(redirect_agent, back)
    assert span["tags"]["podspan.error"] == "ECONNREFUSED"


def test_when_the_agent_is_killed_no_call_fails(redirect_agent: Agent) -> None:
    """Workers serve what comes to them; after the grace nothing does."""
    agent = redirect_agent
    stop = threading.Event()
    failed: list[Exception] = []
    calls = [0]

    with serving(FRONT) as front:

        def call() -> None:
            while not stop.is_set():
                try:
                    assert fetch(front, "/killed").startswith(b"HTTP/1.1 200 ")
                except (AssertionError, OSError) as exc:
                    failed.append(exc)
                calls[0] += 1

        def direct() -> bool:
            """Whether the last request came as the client has sent it."""
            return "x-b3-traceid" not in front.requests[-1].headers

        threads = [threading.Thread(target=call) for _ in range(2)]
        with connected(front) as in_flight:
            in_flight.sendall(head_of(front, "/in-flight"))
            assert read_response(in_flight)
            for thread in threads:
                thread.start()
            try:
                wait_for(lambda: calls[0] > 10, "calls are made")
                assert not direct()
                agent.kill()
                wait_for(direct, "calls go direct")
                before = calls[0]
                wait_for(lambda: calls[0] > before + 10, "calls are made")
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            in_flight.sendall(head_of(front, "/in-flight/later"))
            assert read_response(in_flight).startswith(b"HTTP/1.1 200 ")
    print(f"calls={calls[0]} failed={len(failed)}")
    assert failed == []
