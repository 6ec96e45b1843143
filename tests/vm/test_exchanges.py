"""HTTP/1.1 as it is framed: one row per way, the same verdict on both ends."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from vm.conftest import (
    CLIENT,
    FRONT,
    Agent,
    Json,
    Request,
    Server,
    connected,
    head_of,
    read_response,
    serving,
    wait_for,
)

BODY = bytes(range(256)) * 4096  # 1 MB

# Request method and body, response; then the status and response body size as told.
ROWS = {
    "length": (
        "GET",
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        200,
        5,
    ),
    "empty": ("GET", b"", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, 0),
    "chunked": (
        "GET",
        b"",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n3;x=y\r\nabc\r\n0\r\ntrailer: 1\r\n\r\n",
        200,
        8,
    ),
    "head": ("HEAD", b"", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n", 200, 0),
    "204": ("GET", b"", b"HTTP/1.1 204 No Content\r\n\r\n", 204, 0),
    "304": ("GET", b"", b"HTTP/1.1 304 X\r\ncontent-length: 9\r\n\r\n", 304, 0),
    "404": ("GET", b"", b"HTTP/1.1 404 No\r\ncontent-length: 1\r\n\r\n-", 404, 1),
    "500": ("GET", b"", b"HTTP/1.1 500 No\r\ncontent-length: 1\r\n\r\n-", 500, 1),
    "post": (
        "POST",
        b"x" * 100,
        b"HTTP/1.1 201 OK\r\ncontent-length: 0\r\n\r\n",
        201,
        0,
    ),
    "large": (
        "PUT",
        BODY,
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY,
        200,
        len(BODY),
    ),
    "head-like": (
        "POST",
        b"GET /fake HTTP/1.1\r\nhost: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\nHTTP/1.1 404 Fake\r\n",
        200,
        19,
    ),
}

KINDS = ("CLIENT", "SERVER")


def test_every_framing_on_one_connection(agent: Agent) -> None:
    """Keep-alive: where one row's end is misjudged, the next rows are lost."""

    def answer(request: Request) -> bytes:
        row = ROWS.get(request.path.rpartition("/")[2])
        return row[2] if row else b"HTTP/1.1 204 No Content\r\n\r\n"

    with serving(FRONT, answer) as server:
        with connected(server) as sock:
            for name, (method, body, response, _, _) in ROWS.items():
                lines = [f"content-length: {len(body)}"] if body else []
                sock.sendall(head_of(server, f"/row/{name}", *lines, method=method))
                sock.sendall(body)
                received = b""
                while len(received) < len(response):
                    piece = sock.recv(65536)
                    assert piece, name
                    received += piece
                assert received == response
        bodies = {r.path.rpartition("/")[2]: r.body for r in server.requests}
        spans = agent.spans_of("/row/", server)

    halves = sorted(
        (s["tags"]["http.url"].rpartition("/")[2], s["kind"]) for s in spans
    )
    assert halves == sorted((name, kind) for name in ROWS for kind in KINDS)
    for name, (method, body, _, status, size) in ROWS.items():
        both = [s for s in spans if s["tags"]["http.url"].endswith(f"/row/{name}")]
        assert len({s["id"] for s in both}) == 1, name
        assert {s["kind"] for s in both} == {"CLIENT", "SERVER"}, name
        assert bodies[name] == body
        for span in both:
            tags = span["tags"]
            assert tags["http.method"] == method
            assert tags["http.status_code"] == str(status)
            assert tags["response_size"] == str(size), (name, span)
            assert tags["request_size"] == str(len(body)), (name, span)
            assert tags.get("error") == ("true" if status >= 500 else None)
            assert "podspan.end" not in tags, (name, span)


def test_expect_continue_is_one_exchange(agent: Agent) -> None:
    with serving(FRONT) as server:
        with connected(server) as sock:
            sock.sendall(
                head_of(
                    server,
                    "/expect/1",
                    "content-length: 4",
                    "expect: 100-continue",
                    method="POST",
                )
            )
            assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
            sock.sendall(b"body")
            assert read_response(sock).endswith(b"/expect/1")
        spans = agent.spans_of("/expect/", server)
    assert [s["tags"]["http.status_code"] for s in spans] == ["200", "200"]
    assert [s["tags"]["request_size"] for s in spans] == ["4", "4"]


def test_a_body_that_ends_with_the_connection(agent: Agent) -> None:
    def until_eof(request: Request) -> bytes:
        if "eof" not in request.path:
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        return b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"z" * 5000

    with serving(FRONT, until_eof) as server:
        with connected(server) as sock:
            sock.sendall(head_of(server, "/eof/1", "connection: close"))
            assert read_response(sock).endswith(b"z" * 5000)
        spans = agent.spans_of("/eof/", server)
    assert len(spans) == 2
    assert {s["tags"]["podspan.end"] for s in spans} == {"eof"}
    assert {s["tags"]["response_size"] for s in spans} == {"5000"}
    assert not any("error" in s["tags"] for s in spans)


@pytest.mark.parametrize("size", [1000, 4100, 8200, 16000])
def test_a_long_head_in_one_piece_and_byte_by_byte(agent: Agent, size: int) -> None:
    with serving(FRONT) as server:
        padding = f"x-padding: {'p' * (size - 200)}"
        whole = head_of(server, f"/long-{size}/1", padding)
        pieces = head_of(server, f"/long-{size}/2", padding)
        with connected(server) as sock:
            sock.sendall(whole)
            read_response(sock)
            # Cut where it hurts: within the line end that ends the head.
            for start, end in ((0, 7), (7, -3), (-3, None)):
                sock.sendall(pieces[start:end])
            read_response(sock)
        spans = agent.spans_of(f"/long-{size}/", server)
    assert len(spans) == 4
    assert len({s["id"] for s in spans}) == 2
    for request in server.requests:
        if "long" in request.path:
            assert request.headers["x-padding"] == "p" * (size - 200)
            assert "x-b3-traceid" in request.headers


def test_a_head_sent_at_once_arrives_at_once(agent: Agent) -> None:
    """TCP promises nothing, but there are servers that read once and answer."""
    with FRONT.inside():
        listener = socket.create_server((FRONT.ipv4, 0))
    server = Server(FRONT, FRONT.ipv4, listener.getsockname()[1])
    with listener:
        for i in range(40):
            with connected(server) as client:
                client.sendall(head_of(server, f"/at-once/{i}"))
                accepted, _ = listener.accept()
                with accepted:
                    received = accepted.recv(65536)
            assert b"x-b3-traceid" in received
            assert received.endswith(b"\r\n\r\n"), (i, received)


def test_nginx_and_curl(agent: Agent, tmp_path: Path) -> None:
    nginx, curl = shutil.which("nginx"), shutil.which("curl")
    assert nginx, "nginx is missing: make setup"
    assert curl, "curl is missing: make setup"
    page = tmp_path / "static" / "page.bin"
    page.parent.mkdir()
    page.write_bytes(BODY)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"""
        daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;
        events {{ }}
        http {{ access_log off; sendfile on; keepalive_requests 1000;
          client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path};
          fastcgi_temp_path {tmp_path}; uwsgi_temp_path {tmp_path};
          scgi_temp_path {tmp_path};
          server {{ listen {FRONT.ipv4}:8080; root {tmp_path};
            location = /text {{ return 200 "text"; }} }} }}
        """
    )
    process = subprocess.Popen(FRONT.command(nginx, "-c", str(config), "-p", "/"))
    try:
        wait_for((tmp_path / "pid").exists, "nginx is up")
        url = f"http://{FRONT.ipv4}:8080"
        # One connection for all: the static file goes by sendfile.
        calls = [f"{url}/text", f"{url}/static/page.bin", f"{url}/text?3"]
        done = subprocess.run(
            CLIENT.command(curl, "-sS", "--fail", *calls),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == b"text" + BODY + b"text"
        with serving(FRONT) as marker:
            spans = agent.spans_of(":8080/", marker)
    finally:
        process.terminate()
        process.wait()
    assert len(spans) == 6, spans
    for call in calls:
        both = [s for s in spans if s["tags"]["http.url"] == call]
        assert len({s["id"] for s in both}) == 1, both
        assert {s["kind"] for s in both} == {"CLIENT", "SERVER"}, both
        size = len(BODY) if "static" in call else 4
        assert {s["tags"]["response_size"] for s in both} == {str(size)}, both
        assert not any("error" in s["tags"] for s in both), both


def test_wrk_gives_two_spans_a_call(agent: Agent) -> None:
    wrk = shutil.which("wrk")
    assert wrk, "wrk is missing: make setup"
    with serving(FRONT) as server:
        url = f"http://{server.address}:{server.port}/wrk"
        subprocess.run(
            CLIENT.command(wrk, "-t1", "-c8", "-d2s", url),
            check=True,
            capture_output=True,
        )
        spans = agent.spans_of("/wrk", server)
        served = sum(r.path == "/wrk" for r in server.requests)
    _check_pairs(server, spans, served)


def _check_pairs(server: Server, spans: list[Json], served: int) -> None:
    servers = [s for s in spans if s["kind"] == "SERVER"]
    clients = {s["id"]: s for s in spans if s["kind"] == "CLIENT"}
    assert served > 20
    assert len(servers) == served
    assert len(clients) == len([s for s in spans if s["kind"] == "CLIENT"])
    # wrk closes its connections while the last calls are under way.
    assert {s["id"] for s in servers} <= set(clients)
    on_wire = {r.headers["x-b3-spanid"] for r in server.requests if r.path == "/wrk"}
    assert on_wire == {s["id"] for s in servers}
