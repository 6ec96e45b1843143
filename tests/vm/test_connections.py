"""HTTP/1 and TCP as they happen: one test per way in which a connection can go."""

import errno
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from vm.conftest import (
    BACK,
    CLIENT,
    FRONT,
    Agent,
    Json,
    Pod,
    Server,
    connected,
    fetch,
    head_of,
    read_response,
    serving,
    spans_of_port,
    wait_for,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
LINGER_0 = struct.pack("ii", 1, 0)  # struct linger: close sends a reset

Talk = Callable[[socket.socket], None]


@contextmanager
def talking(talk: Talk, pod: Pod = FRONT) -> Iterator[Server]:
    """A server that talks to each client as it likes, then closes."""
    with pod.inside():
        listener = socket.create_server((pod.ipv4, 0))

    def serve(sock: socket.socket) -> None:
        with sock, suppress(ConnectionError):
            talk(sock)

    def accept() -> None:
        with pod.inside(), suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield Server(pod, pod.ipv4, listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()


def read_head(sock: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        if not piece:
            break
        received += piece
    return received


def read_until_end(sock: socket.socket) -> bytes:
    received = b""
    while piece := sock.recv(65536):
        received += piece
    return received


@contextmanager
def losing_every(nth: int, pod: Pod, port: int) -> Iterator[None]:
    """Of the packets that reach the pod from this port every nth gets lost; 1: all.

    Not where they are sent: there TCP is told, and waits instead of sending again.
    """
    rule = ["INPUT", "-p", "tcp", "--sport", str(port), "-m", "statistic"]
    rule += ["--mode", "nth", "--every", str(nth), "--packet", "0", "-j", "DROP"]

    def iptables(action: str) -> None:
        command = pod.command("iptables", action, *rule)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    iptables("-A")
    try:
        yield
    finally:
        iptables("-D")


def spans_at(agent: Agent, server: Server, count: int) -> list[Json]:
    """The spans of the connections to this server's port, `count` of them."""
    wait_for(
        lambda: len(spans_of_port(agent, server)) >= count,
        f"{count} spans",
        agent.process,
    )
    with serving(FRONT) as marker:
        agent.spans_of("nothing", marker)
    spans = spans_of_port(agent, server)
    assert len(spans) == count, spans
    return spans


def by_kind(spans: list[Json]) -> dict[str, list[Json]]:
    return {
        kind: [span for span in spans if span["kind"] == kind]
        for kind in ("CLIENT", "SERVER")
    }


@pytest.mark.parametrize("together", [True, False], ids=["one send", "one by one"])
def test_pipelined_requests_get_their_own_responses(
    agent: Agent, together: bool
) -> None:
    """RFC 9112 section 9.3.2."""
    name = f"/pipelined-{together}"
    calls = 5
    responses = [
        b"HTTP/1.1 %d OK\r\ncontent-length: %d\r\n\r\n" % (400 + i, i) + b"x" * i
        for i in range(calls)
    ]

    def talk(sock: socket.socket) -> None:
        for _ in range(calls):
            read_head(sock)
        for response in responses:
            sock.sendall(response)
        read_until_end(sock)

    with talking(talk) as server:
        with connected(server) as sock:
            heads = [head_of(server, f"{name}/{i}") for i in range(calls)]
            for piece in [b"".join(heads)] if together else heads:
                sock.sendall(piece)
            left = len(b"".join(responses))
            while left:
                left -= len(sock.recv(left))
        spans = spans_at(agent, server, 2 * calls)
    for i in range(calls):
        both = [s for s in spans if s["tags"]["http.url"].endswith(f"{name}/{i}")]
        assert len(both) == 2, spans
        assert len({s["id"] for s in both}) == 1
        assert {s["tags"]["http.status_code"] for s in both} == {str(400 + i)}
        assert {s["tags"]["response_size"] for s in both} == {str(i)}
        assert not any("podspan.end" in s["tags"] for s in both)
    assert len({s["traceId"] for s in spans}) == calls


def test_what_a_pipelining_server_calls_has_no_certain_parent(agent: Agent) -> None:
    with serving(BACK) as back:

        def talk(sock: socket.socket) -> None:
            read_head(sock)
            read_head(sock)
            fetch(back, "/pipelined-inner/1", FRONT)
            sock.sendall(OK + OK)
            read_until_end(sock)

        with talking(talk) as server, connected(server) as sock:
            sock.sendall(head_of(server, "/outer/1") + head_of(server, "/outer/2"))
            read_response(sock)
        spans = agent.spans_of("/pipelined-inner/", back, FRONT)
    links = {s["tags"]["podspan.link"] for s in spans if s["kind"] == "CLIENT"}
    assert links == {"none"}


def test_a_response_before_the_request_has_ended(agent: Agent) -> None:
    """RFC 9110 section 15.5.14: 413 while the body is still on its way."""

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        left = 100_000
        while left:
            left -= len(sock.recv(min(left, 65536)))
        read_head(sock)
        sock.sendall(OK)
        read_until_end(sock)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(
                head_of(server, "/early/1", "content-length: 100000", method="PUT")
            )
            assert read_response(sock).startswith(b"HTTP/1.1 413")
            sock.sendall(bytes(100_000))
            sock.sendall(head_of(server, "/early/2"))
            assert read_response(sock).endswith(b"ok")
        spans = spans_at(agent, server, 4)
    statuses = sorted(s["tags"]["http.status_code"] for s in spans)
    assert statuses == ["200", "200", "413", "413"]
    assert not any("podspan.end" in s["tags"] for s in spans)


def test_websocket_becomes_a_tcp_exchange_after_101(agent: Agent) -> None:
    """RFC 9110 section 7.8: what follows the upgrade is a child of the request."""

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n"
            b"connection: upgrade\r\n\r\nhello"
        )
        while frame := sock.recv(1000):
            sock.sendall(frame * 2)

    with talking(talk) as server:
        with connected(server) as sock:
            lines = ("connection: upgrade", "upgrade: websocket")
            sock.sendall(head_of(server, "/upgrade/1", *lines))
            assert read_head(sock).startswith(b"HTTP/1.1 101")
            assert sock.recv(5) == b"hello"
            for _ in range(3):
                sock.sendall(b"GET / HTTP/1.1\r\nhost: inner\r\n\r\n")
                assert len(sock.recv(1000)) == 62
        spans = spans_at(agent, server, 4)
    http = [s for s in spans if "http.url" in s["tags"]]
    tcp = [s for s in spans if "http.url" not in s["tags"]]
    assert len(http) == len(tcp) == 2
    assert len({s["id"] for s in http}) == len({s["id"] for s in tcp}) == 1
    assert {s["parentId"] for s in tcp} == {http[0]["id"]}
    assert {s["tags"]["podspan.link"] for s in tcp} == {"upgrade"}
    assert {s["tags"]["http.status_code"] for s in http} == {"101"}
    for span in tcp:
        assert span["tags"]["request_size"] == str(3 * 31)
        assert span["tags"]["response_size"] == str(5 + 3 * 62)
        assert "error" not in span["tags"]


def test_connect_makes_a_tunnel(agent: Agent) -> None:
    """RFC 9110 section 9.3.6: a 2xx to CONNECT has no body, whatever follows."""

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        while data := sock.recv(1000):
            sock.sendall(data)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(b"CONNECT far.away:443 HTTP/1.1\r\nhost: far.away:443\r\n\r\n")
            assert read_head(sock).startswith(b"HTTP/1.1 200")
            sock.sendall(b"\x16\x03\x01 not a head")
            assert sock.recv(1000) == b"\x16\x03\x01 not a head"
        spans = spans_at(agent, server, 4)
    http = [s for s in spans if s["tags"].get("http.method") == "CONNECT"]
    tcp = [s for s in spans if s not in http]
    assert len(http) == len(tcp) == 2
    assert {s["parentId"] for s in tcp} == {http[0]["id"]}
    assert {s["tags"]["request_size"] for s in tcp} == {"14"}


def test_another_protocol_gives_one_tcp_span_per_end(agent: Agent) -> None:
    """The client speaks first."""

    def talk(sock: socket.socket) -> None:
        while data := sock.recv(1000):
            sock.sendall(data + data)

    with talking(talk) as server:
        with connected(server) as sock:
            for _ in range(10):
                sock.sendall(b"*1\r\n$4\r\nPING\r\n")
                assert len(sock.recv(1000)) == 28
        spans = spans_at(agent, server, 2)
    kinds = by_kind(spans)
    assert len(kinds["CLIENT"]) == len(kinds["SERVER"]) == 1
    for span in spans:
        assert span["name"] == f"tcp:{server.port}"
        assert span["tags"]["request_size"] == "140"
        assert span["tags"]["response_size"] == "280"
        assert "http.method" not in span["tags"]
        assert "error" not in span["tags"]
    assert int(kinds["CLIENT"][0]["tags"]["podspan.connect_us"]) > 0
    assert kinds["CLIENT"][0]["tags"]["podspan.end"] == "closed-here"
    assert kinds["SERVER"][0]["tags"]["podspan.end"] == "closed-there"


def test_a_server_that_speaks_first(agent: Agent) -> None:
    """MySQL and SMTP do."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(b"220 mail ESMTP\r\n")
        assert sock.recv(100) == b"QUIT\r\n"
        sock.sendall(b"221 bye\r\n")

    with talking(talk) as server:
        with connected(server) as sock:
            assert sock.recv(100).startswith(b"220")
            sock.sendall(b"QUIT\r\n")
            assert read_until_end(sock) == b"221 bye\r\n"
        spans = spans_at(agent, server, 2)
    for span in spans:
        assert span["tags"]["request_size"] == "6"
        assert span["tags"]["response_size"] == "25"


def test_a_tcp_call_of_a_serving_thread_is_its_child(agent: Agent) -> None:
    def echo(sock: socket.socket) -> None:
        while data := sock.recv(1000):
            sock.sendall(data)

    with talking(echo, BACK) as database:

        def talk(sock: socket.socket) -> None:
            read_head(sock)
            with connected(database, FRONT) as query:
                query.sendall(b"\x03SELECT 1")
                query.recv(1000)
            sock.sendall(OK)

        with talking(talk) as server:
            with connected(server) as sock:
                sock.sendall(head_of(server, "/with-database/1"))
                read_response(sock)
            (front,) = [s for s in spans_at(agent, server, 2) if s["kind"] == "SERVER"]
        spans = spans_at(agent, database, 2)
    (query_span,) = [s for s in spans if s["kind"] == "CLIENT"]
    assert query_span["parentId"] == front["id"]
    assert query_span["traceId"] == front["traceId"]
    assert query_span["tags"]["podspan.link"] == "thread"


def test_a_refused_connection_is_an_error_span_of_its_caller(agent: Agent) -> None:
    def talk(sock: socket.socket) -> None:
        read_head(sock)
        with FRONT.inside(), socket.socket() as refused:
            assert refused.connect_ex((BACK.ipv4, 1)) == errno.ECONNREFUSED
        sock.sendall(OK)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/refused/1"))
            read_response(sock)
        (front,) = [s for s in spans_at(agent, server, 2) if s["kind"] == "SERVER"]
    (failed,) = [s for s in agent.all_spans() if s["remoteEndpoint"]["port"] == 1]
    assert failed["parentId"] == front["id"]
    assert failed["kind"] == "CLIENT"
    assert failed["remoteEndpoint"]["ipv4"] == BACK.ipv4
    assert failed["tags"]["error"] == "true"
    assert failed["tags"]["podspan.error"] == "ECONNREFUSED"
    assert failed["tags"]["podspan.end"] == "connect-failed"


def test_an_unreachable_network_is_an_error_span(agent: Agent) -> None:
    """No route: connect(2) fails before any connection is begun."""
    with CLIENT.inside(), socket.socket() as sock:
        assert sock.connect_ex(("203.0.113.7", 80)) == errno.ENETUNREACH
    with CLIENT.inside(), socket.socket(socket.AF_INET6) as sock:
        assert sock.connect_ex(("2001:db8::7", 81)) == errno.ENETUNREACH
    with serving(FRONT) as marker:
        agent.spans_of("nothing", marker)
    spans = agent.all_spans()
    (v4,) = [s for s in spans if s["remoteEndpoint"].get("ipv4") == "203.0.113.7"]
    (v6,) = [s for s in spans if s["remoteEndpoint"].get("ipv6") == "2001:db8::7"]
    assert (v4["remoteEndpoint"]["port"], v6["remoteEndpoint"]["port"]) == (80, 81)
    for span in (v4, v6):
        assert span["tags"]["podspan.error"] == "ENETUNREACH"
        assert span["tags"]["error"] == "true"


def test_a_connect_that_is_given_up(agent: Agent) -> None:
    """Nobody answers: the application closes before the kernel does."""
    with CLIENT.inside(), socket.socket() as sock:
        # An address of the wire's network that nobody has: ARP goes unanswered.
        sock.setblocking(False)
        assert sock.connect_ex(("10.98.0.99", 80)) == errno.EINPROGRESS
    with serving(FRONT) as marker:
        agent.spans_of("nothing", marker)
    (span,) = [
        s for s in agent.all_spans() if s["remoteEndpoint"].get("ipv4") == "10.98.0.99"
    ]
    assert span["tags"]["podspan.end"] == "connect-failed"
    assert span["tags"]["error"] == "true"


def test_a_client_that_ends_its_sending_gets_the_answer(agent: Agent) -> None:
    """RFC 9112 section 9.6: half-close."""

    def talk(sock: socket.socket) -> None:
        assert read_until_end(sock).endswith(b"body")
        sock.sendall(OK)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(
                head_of(server, "/half/1", "content-length: 4", method="POST") + b"body"
            )
            sock.shutdown(socket.SHUT_WR)
            assert read_until_end(sock).endswith(b"ok")
        spans = spans_at(agent, server, 2)
    assert len({s["id"] for s in spans}) == 1
    for span in spans:
        assert span["tags"]["http.status_code"] == "200"
        assert span["tags"]["request_size"] == "4"
        assert "podspan.end" not in span["tags"]


RESETS = {
    "before the response": b"",
    "in the response's head": b"HTTP/1.1 200 OK\r\ncont",
    "in the response's body": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
    "in a chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf",
    "in a body without length": b"HTTP/1.1 200 OK\r\n\r\nhalf",
}


@pytest.mark.parametrize("start", RESETS.values(), ids=RESETS.keys())
def test_a_reset_is_an_error_on_both_ends(agent: Agent, start: bytes) -> None:
    received = threading.Event()

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        if start:
            sock.sendall(start)
            assert received.wait(60)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/reset/1"))
            left = len(start)
            while left:
                left -= len(sock.recv(left))
            received.set()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        spans = spans_at(agent, server, 2)
    kinds = by_kind(spans)
    (client,), (served,) = kinds["CLIENT"], kinds["SERVER"]
    assert client["id"] == served["id"]
    assert client["tags"]["podspan.end"] == "reset"
    assert client["tags"]["podspan.error"] == "ECONNRESET"
    assert client["tags"]["error"] == "true"
    status = "200" if b"\r\n\r\n" in start else "0"
    assert client["tags"]["http.status_code"] == status
    assert served["tags"]["http.status_code"] == status


def test_a_request_without_a_response(agent: Agent) -> None:
    """The client has no patience."""
    gone = threading.Event()

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        assert gone.wait(60)
        assert sock.recv(1) == b""

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/impatient/1"))
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
        gone.set()
        spans = spans_at(agent, server, 2)
    kinds = by_kind(spans)
    assert kinds["CLIENT"][0]["tags"]["podspan.end"] == "closed-here"
    assert {s["tags"]["http.status_code"] for s in spans} == {"0"}
    assert {s["tags"]["error"] for s in spans} == {"true"}


def test_a_peer_that_vanishes_is_an_error_with_its_reason(agent: Agent) -> None:
    """The kernel gives up: ETIMEDOUT, by TCP_USER_TIMEOUT (tcp(7))."""

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(OK)
        read_until_end(sock)

    with talking(talk) as server:
        with connected(server) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
            sock.sendall(head_of(server, "/vanished/1"))
            read_response(sock)
            with losing_every(1, CLIENT, server.port):
                sock.sendall(head_of(server, "/vanished/2"))
                with pytest.raises(OSError, match="timed out") as caught:
                    sock.recv(1)
                assert caught.value.errno == errno.ETIMEDOUT
        (span,) = [
            s
            for s in spans_at(agent, server, 3)
            if s["kind"] == "CLIENT" and s["tags"]["http.url"].endswith("/2")
        ]
    assert span["tags"]["podspan.error"] == "ETIMEDOUT"
    assert span["tags"]["error"] == "true"


def test_a_connect_that_times_out_is_an_error_with_its_reason(agent: Agent) -> None:
    with CLIENT.inside(), socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
        # An address of the wire's network that nobody has.
        error = sock.connect_ex(("10.98.0.98", 80))
    with serving(FRONT) as marker:
        agent.spans_of("nothing", marker)
    (span,) = [
        s for s in agent.all_spans() if s["remoteEndpoint"].get("ipv4") == "10.98.0.98"
    ]
    assert error in (errno.ETIMEDOUT, errno.EHOSTUNREACH)
    assert span["tags"]["podspan.error"] == errno.errorcode[error]
    assert span["tags"]["error"] == "true"
    assert span["duration"] > 500_000


def test_responses_without_a_request_end_the_tracing_of_a_connection(
    agent: Agent,
) -> None:
    """After its keep-alive time a server may say 408 and close: RFC 9110 15.5.9."""

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(OK)
        sock.sendall(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")

    with talking(talk) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/idle/1"))
            assert b"408" in read_until_end(sock)
        spans = spans_at(agent, server, 2)
    assert {s["tags"]["http.status_code"] for s in spans} == {"200"}
    assert not any("error" in s["tags"] for s in spans)


def test_http_1_0_and_absolute_form(agent: Agent) -> None:
    """RFC 9112 section 3.2.2; RFC 1945: no Host, a body until the end."""

    def talk(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\nuntil the end")

    with talking(talk) as server:
        for target in ("/one-zero", "http://user:secret@host.example/absolute"):
            with connected(server) as sock:
                sock.sendall(f"GET {target} HTTP/1.0\r\n\r\n".encode())
                assert read_until_end(sock).endswith(b"until the end")
        spans = spans_at(agent, server, 4)
    urls = sorted(s["tags"]["http.url"] for s in spans)
    assert urls[0].endswith("/one-zero")
    assert urls[2].endswith("@host.example/absolute")
    assert "secret" not in str(spans)
    assert {s["tags"]["http.protocol"] for s in spans} == {"HTTP/1.0"}
    assert {s["tags"]["response_size"] for s in spans} == {"13"}
    assert {s["tags"]["podspan.end"] for s in spans} == {"eof"}


def retransmits_of(sock: socket.socket) -> int:
    """tcpi_total_retrans of tcp(7)'s struct tcp_info."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, 100)[0])


def test_retransmits_are_counted_where_they_happen(agent: Agent) -> None:
    """Of a response: those until its last bytes are handed to the kernel.

    The kernel may send again also where nothing is lost (a tail loss probe, on a slow
    machine), so the server asks it before and after each hand-over.
    """
    body = bytes(400_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    seen: list[int] = []

    def talk(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        for _ in range(2):
            read_head(sock)
            seen.append(retransmits_of(sock))
            sock.sendall(head)
            for _ in range(19):
                sock.sendall(body[:20_000])
            seen.append(retransmits_of(sock))
            sock.sendall(body[:20_000])
            seen.append(retransmits_of(sock))
        read_until_end(sock)

    with talking(talk) as server:
        with connected(server) as sock:
            with losing_every(5, CLIENT, server.port):
                sock.sendall(head_of(server, "/lossy/1"))
                assert len(read_response(sock)) == len(head + body)
            sock.sendall(head_of(server, "/lossless/1"))
            assert len(read_response(sock)) == len(head + body)
        spans = spans_at(agent, server, 4)
    counts = {
        (s["kind"], s["tags"]["http.url"].rpartition(":")[2].partition("/")[2]): int(
            s["tags"].get("podspan.retransmits", 0)
        )
        for s in spans
    }
    lossy, lossless = counts["SERVER", "lossy/1"], counts["SERVER", "lossless/1"]
    assert 0 < seen[1] <= lossy <= seen[2], (seen, counts)
    assert seen[4] - seen[3] <= lossless <= seen[5] - seen[2], (seen, counts)
