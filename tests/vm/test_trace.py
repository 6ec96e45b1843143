"""Traces of real calls: whole, correlated, timed, and never under a wrong parent."""

import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

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
    headers_of,
    read_response,
    serving,
    wait_for,
)

CALLS = 23
THREADS = 8
CALLS_PER_THREAD = 6


def by_kind(spans: list[Json]) -> tuple[list[Json], list[Json]]:
    return (
        [span for span in spans if span["kind"] == "CLIENT"],
        [span for span in spans if span["kind"] == "SERVER"],
    )


def test_23_calls_give_46_spans_whose_ids_are_on_the_wire(agent: Agent) -> None:
    # Late: under emulation scapy takes many seconds to import.
    from scapy.layers.inet import TCP
    from scapy.sendrecv import AsyncSniffer

    payloads: list[bytes] = []

    def keep(packet: Any) -> None:
        if TCP in packet and packet[TCP].payload:
            payloads.append(bytes(packet[TCP].payload))

    with serving(FRONT) as server:
        listening = threading.Event()
        with FRONT.inside():
            sniffer = AsyncSniffer(
                iface="to-client",
                prn=keep,
                started_callback=listening.set,
                store=False,
            )
            sniffer.start()
            assert listening.wait(60)
        with connected(server) as sock:
            for i in range(CALLS):
                sock.sendall(head_of(server, f"/twenty-three/{i}"))
                read_response(sock)
        spans = agent.spans_of("/twenty-three/", server)
        # The marker call comes last on the wire, too.
        wait_for(lambda: any(b"GET /marker" in p for p in payloads), "all is sniffed")
        sniffer.stop()

    assert len(spans) == 2 * CALLS
    clients, servers = by_kind(spans)
    ids = {
        (span["traceId"], span["id"], span["tags"]["guid:x-request-id"])
        for span in clients
    }
    assert len(ids) == CALLS
    assert ids == {
        (span["traceId"], span["id"], span["tags"]["guid:x-request-id"])
        for span in servers
    }
    assert all(span["shared"] for span in servers)
    assert not any("shared" in span or "parentId" in span for span in clients)

    seen = [request for request in server.requests if "twenty" in request.path]
    assert ids == {context_of(request.headers) for request in seen}
    assert all(request.headers["x-b3-sampled"] == "1" for request in seen)

    wire = b"".join(payloads)
    heads = [head.partition(b"GET /twenty") for head in wire.split(b"\r\n\r\n")]
    on_wire = {context_of(headers_of(head)) for _, begin, head in heads if begin}
    assert on_wire == ids


def context_of(headers: dict[str, str]) -> tuple[str, str, str]:
    return (
        headers["x-b3-traceid"],
        headers["x-b3-spanid"],
        headers["x-request-id"],
    )


def test_a_server_that_sleeps_50_ms_gives_50_to_60_ms(agent: Agent) -> None:
    def sleepy(request: Request) -> bytes:
        if "sleep" in request.path:
            time.sleep(0.050)
        return b"HTTP/1.1 204 No Content\r\n\r\n"

    with serving(FRONT, sleepy) as server:
        with connected(server) as sock:
            for i in range(5):
                sock.sendall(head_of(server, f"/sleep/{i}"))
                read_response(sock, bodiless=True)
        spans = agent.spans_of("/sleep/", server)

    clients, servers = by_kind(spans)
    assert len(clients) == len(servers) == 5
    took = {span["id"]: span["duration"] for span in servers}
    for span in clients:
        assert 50_000 <= took[span["id"]] <= span["duration"], spans
    # The middle one of five: a busy emulator delays single calls.
    for half in (clients, servers):
        assert sorted(span["duration"] for span in half)[2] <= 60_000, spans


def test_eight_threads_never_get_another_calls_parent(agent: Agent) -> None:
    with serving(BACK) as back:

        def forward(request: Request) -> bytes:
            if "marker" not in request.path:
                with connected(back, FRONT) as sock:
                    sock.sendall(head_of(back, request.path))
                    read_response(sock)
            return b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

        with serving(FRONT, forward) as front:

            def call(thread: int) -> None:
                with connected(front) as sock:
                    for i in range(CALLS_PER_THREAD):
                        sock.sendall(head_of(front, f"/parallel/{thread}-{i}"))
                        read_response(sock)

            threads = [threading.Thread(target=call, args=(n,)) for n in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            spans = agent.spans_of("/parallel/", front)

    calls = THREADS * CALLS_PER_THREAD
    assert len(spans) == 4 * calls
    by_call: dict[str, list[Json]] = {}
    for span in spans:
        path = span["tags"]["http.url"].rpartition("/")[2]
        by_call.setdefault(path, []).append(span)
    assert len(by_call) == calls
    for path, four in by_call.items():
        roots = [s for s in four if s["kind"] == "CLIENT" and "parentId" not in s]
        assert len(roots) == 1, (path, four)
        (root,) = roots
        inner = [s for s in four if s["kind"] == "CLIENT" and "parentId" in s]
        assert [s["parentId"] for s in inner] == [root["id"]], (path, four)
        assert {s["traceId"] for s in four} == {root["traceId"]}, (path, four)
        assert inner[0]["tags"]["podspan.link"] == "thread"
        kinds = Counter((s["id"], s["kind"]) for s in four)
        assert len(kinds) == 4, (path, four)
        assert len({s["tags"]["guid:x-request-id"] for s in four}) == 1


def test_an_application_that_forwards_its_headers_keeps_the_trace(
    agent: Agent,
) -> None:
    names = ("x-request-id", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid")
    with serving(BACK) as back:

        def forward(request: Request) -> bytes:
            if "marker" not in request.path:
                lines = [
                    f"{name}: {value}"
                    for name, value in request.headers.items()
                    if name in (*names, "x-b3-sampled")
                ]
                with connected(back, FRONT) as sock:
                    sock.sendall(head_of(back, request.path, *lines))
                    read_response(sock)
            return b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

        with serving(FRONT, forward) as front:
            fetch(front, "/forwarded/1")
            spans = agent.spans_of("/forwarded/", front)

    clients, servers = by_kind(spans)
    (root,) = [span for span in clients if "parentId" not in span]
    (inner,) = [span for span in clients if "parentId" in span]
    assert inner["parentId"] == root["id"]
    assert inner["tags"]["podspan.link"] == "header"
    assert {span["id"] for span in servers} == {root["id"], inner["id"]}
    assert {span["traceId"] for span in spans} == {root["traceId"]}
    (seen,) = back.requests
    assert seen.headers["x-b3-spanid"] == inner["id"]
    assert seen.headers["x-b3-parentspanid"] == root["id"]
    assert seen.head.count(b"x-b3-spanid") == 1


def test_an_event_loop_claims_no_parent_while_it_serves_two(agent: Agent) -> None:
    """One thread takes request B while A is open, then calls for one of the two."""
    with serving(BACK) as back, FRONT.inside():
        listener = socket.create_server((FRONT.ipv4, 0))
        answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        address = Server(FRONT, FRONT.ipv4, listener.getsockname()[1])

        def loop() -> None:
            socks = [listener.accept()[0] for _ in range(2)]
            for sock in socks:
                sock.recv(65536)
            with connected(back, FRONT) as upstream:
                upstream.sendall(head_of(back, "/loop/inner"))
                read_response(upstream)
            for sock in socks:
                sock.sendall(answer)
                sock.close()

        server = threading.Thread(target=loop)
        server.start()
        with connected(address) as a, connected(address) as b:
            a.sendall(head_of(address, "/loop/a"))
            b.sendall(head_of(address, "/loop/b"))
            read_response(a)
            read_response(b)
        server.join()
        listener.close()
        spans = agent.spans_of("/loop/", back, FRONT)
    inner = [s for s in spans if s["tags"]["http.url"].endswith("/loop/inner")]
    assert len(spans) == 6
    assert [s["tags"]["podspan.link"] for s in inner if s["kind"] == "CLIENT"] == [
        "none"
    ]
    assert len({s["traceId"] for s in spans}) == 3


def test_where_threads_hand_work_over_no_parent_is_claimed(
    agent: Agent, tmp_path: Path
) -> None:
    """A process of its own: what is learnt of it is not learnt of the others."""
    with serving(BACK) as back:
        script = tmp_path / "roaming.py"
        script.write_text(ROAMING)
        command = [sys.executable, script, FRONT.ipv4, back.address, back.port]
        with subprocess.Popen(
            FRONT.command(*map(str, command)), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            front = Server(FRONT, FRONT.ipv4, int(process.stdout.readline()))
            for path in ("/roam/1", "/roam/2"):
                with connected(front) as sock:
                    sock.sendall(head_of(front, path))
                    read_response(sock, bodiless=True)
            spans = agent.spans_of("/roam", back, FRONT)
            process.kill()
    inner = [s for s in spans if "/roam-inner/" in s["tags"]["http.url"]]
    links = {
        s["tags"]["http.url"][-1]: s["tags"]["podspan.link"]
        for s in inner
        if s["kind"] == "CLIENT"
    }
    # The thread that received /roam/2 called while another one owned the work.
    assert links["2"] == "none"


# The first request's response is sent by another thread than the one that received it.
ROAMING = """
import socket, sys, threading
host, back, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
listener = socket.create_server((host, 0))
print(listener.getsockname()[1], flush=True)
for n in (1, 2):
    sock, _ = listener.accept()
    sock.recv(65536)
    with socket.create_connection((back, port)) as up:
        head = f"GET /roam-inner/{n} HTTP/1.1\\r\\nhost: b\\r\\n\\r\\n"
        up.sendall(head.encode())
        up.recv(65536)
    answer = b"HTTP/1.1 204 No Content\\r\\n\\r\\n"
    thread = threading.Thread(target=sock.sendall, args=(answer,))
    thread.start()
    thread.join()
    sock.close()
listener.accept()
"""


# One request at a time: calls the back end in the turn that read it, or in a later one.
EVENT_LOOP = """
import select, socket, sys
host, back, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
listener = socket.create_server((host, 0))
print(listener.getsockname()[1], flush=True)
with select.epoll() as epoll:
    sock, _ = listener.accept()
    epoll.register(sock, select.EPOLLIN)
    while epoll.poll():
        request = sock.recv(65536)
        if not request:
            break
        turn = request.split()[1].rpartition(b"/")[2].decode()
        if turn == "later":
            epoll.poll(0.05)
        with socket.create_connection((back, port)) as up:
            head = f"GET /loop-inner/{turn} HTTP/1.1\\r\\nhost: b\\r\\n\\r\\n"
            up.sendall(head.encode())
            up.recv(65536)
        sock.sendall(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
"""


def test_what_an_event_loop_serves_ends_with_its_turn(agent: Agent) -> None:
    """After epoll_wait(2) the loop may call for anybody: a timer, another client."""
    with serving(BACK) as back:
        command = [sys.executable, "-c", EVENT_LOOP, FRONT.ipv4, back.address]
        with subprocess.Popen(
            FRONT.command(*command, str(back.port)), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            front = Server(FRONT, FRONT.ipv4, int(process.stdout.readline()))
            with connected(front) as sock:
                for turn in ("same", "later", "same-again"):
                    sock.sendall(head_of(front, f"/loop-outer/{turn}"))
                    read_response(sock, bodiless=True)
            spans = agent.spans_of("/loop-", back, FRONT)
            process.kill()
    inner = {
        s["tags"]["http.url"].rpartition("/")[2]: s["tags"]["podspan.link"]
        for s in spans
        if s["kind"] == "CLIENT" and "/loop-inner/" in s["tags"]["http.url"]
    }
    assert inner == {"same": "thread", "later": "none", "same-again": "thread"}


def test_a_connection_given_up_is_nobodys_parent(agent: Agent) -> None:
    """A response with bare line feeds: the connection is not followed any longer."""
    with serving(BACK) as back:

        def answer(request: Request) -> bytes:
            if request.path == "/given-up/1":
                return b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok"
            if request.path == "/given-up/2":
                fetch(back, "/given-up/inner", FRONT)
            return b"HTTP/1.1 204 No Content\r\n\r\n"

        with serving(FRONT, answer) as front:
            with connected(front) as sock:
                sock.sendall(head_of(front, "/given-up/1"))
                assert sock.recv(100).endswith(b"ok")
                sock.sendall(head_of(front, "/given-up/2"))
                read_response(sock)
            spans = agent.spans_of("/given-up/", front)
    inner = [s for s in spans if s["tags"]["http.url"].endswith("/inner")]
    assert len(inner) == 2
    assert {s["tags"]["podspan.link"] for s in inner if s["kind"] == "CLIENT"} == {
        "none"
    }
    first = [s for s in spans if s["tags"]["http.url"].endswith("/given-up/1")]
    assert {s["kind"] for s in first} == {"CLIENT", "SERVER"}
    assert {s["tags"]["podspan.end"] for s in first} == {"unseen"}
    assert first[0]["traceId"] != inner[0]["traceId"]


def test_an_unsampled_call_is_passed_on_and_not_recorded(agent: Agent) -> None:
    with serving(FRONT) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/unsampled/1", "x-b3-sampled: 0"))
            read_response(sock)
        assert agent.spans_of("/unsampled/", server) == []
    seen = server.requests[0]
    assert seen.headers["x-b3-sampled"] == "0"
    assert len(seen.headers["x-b3-traceid"]) == 32


def test_ipv6(agent: Agent) -> None:
    with serving(FRONT, address=FRONT.ipv6) as server:
        fetch(server, "/v6/1")
        spans = agent.spans_of("/v6/", server)
    clients, servers = by_kind(spans)
    assert [span["id"] for span in clients] == [span["id"] for span in servers]
    assert clients[0]["remoteEndpoint"]["ipv6"] == FRONT.ipv6
    assert clients[0]["localEndpoint"]["ipv6"] == CLIENT.ipv6
    assert servers[0]["remoteEndpoint"]["ipv6"] == CLIENT.ipv6
    assert servers[0]["localEndpoint"]["port"] == server.port


def test_a_socket_closed_in_mid_response_gives_error_spans(agent: Agent) -> None:
    def broken(request: Request) -> bytes:
        if "broken" not in request.path:
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        request.sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
        request.sock.close()
        raise ConnectionError

    with serving(FRONT, broken) as server:
        assert fetch(server, "/broken/1").endswith(b"half")
        spans = agent.spans_of("/broken/", server)
    clients, servers = by_kind(spans)
    assert [span["id"] for span in clients] == [span["id"] for span in servers]
    assert clients[0]["tags"]["error"] == servers[0]["tags"]["error"] == "true"
    assert clients[0]["tags"]["podspan.end"] == "closed-there"
    assert servers[0]["tags"]["podspan.end"] == "closed-here"
    assert clients[0]["tags"]["response_size"] == "4"
    assert clients[0]["tags"]["http.status_code"] == "200"


def chatter(server: Server, stop: threading.Event, failures: list[str]) -> int:
    """Call on one connection until told to stop; each answer is checked."""
    done = 0
    with connected(server) as sock:
        while not stop.is_set():
            path = f"/chatter/{done}"
            try:
                sock.sendall(head_of(server, path))
                answer = read_response(sock)
            except OSError as exc:
                failures.append(f"{path}: {exc}")
                break
            if not answer.endswith(path.encode()):
                failures.append(f"{path}: {answer!r}")
            done += 1
    return done


def test_killing_the_agent_under_load_fails_no_call(agent: Agent) -> None:
    stop = threading.Event()
    failures: list[str] = []
    counts: list[int] = []
    with serving(FRONT) as server:
        fetch(server, "/before-the-kill/1")

        def wait_for_more(calls: int) -> None:
            wanted = len(server.requests) + calls
            wait_for(
                lambda: len(server.requests) >= wanted or bool(failures),
                f"{calls} more calls; so far {failures}",
            )

        def load() -> None:
            counts.append(chatter(server, stop, failures))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_for_more(50)
            agent.kill()
            wait_for_more(200)
            # And new connections work as well.
            assert fetch(server, "/after-the-kill/1").endswith(b"/after-the-kill/1")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == []
    assert sum(counts) >= 250
    untraced = [r for r in server.requests if "after-the-kill" in r.path]
    assert "x-b3-traceid" not in untraced[0].headers
