"""HTTP through the redirect engine: real servers, clients and headers."""

import hashlib
import os
import re
import socket
import subprocess
from contextlib import contextmanager

import pytest
from netns.http_peer import (
    DEADLINE_S,
    FORWARDED,
    SPAN_ID,
    TRACE_ID,
    headers_of,
    make_head,
    read_request,
)
from netns.redirect_fixtures import (
    SERVICE_PORT,
    Maps,
    accepts,
    both_families,
    connected,
    inode,
    maps,
    plan_of,
    redirect_inbound,
    redirect_outbound,
    redirection,
    wait_until,
)
from podspan.agent.exchange import FLAG_SAMPLED, Link, Role
from podspan.agent.kernel import syscall
from podspan.agent.kernel.handoff import HANDED, HANDED_KEY, ROOT_KEY, Tuple

__all__ = ["maps"]  # a fixture

NGINX = """
user root; worker_processes 1; daemon off; pid {dir}/pid; error_log {dir}/errors;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000;
  client_max_body_size 0; client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
  server {{
    listen {port}; listen [::]:{port}; root {dir};
    location /file {{ }}
    location /trace {{ return 200 "$http_x_b3_traceid $http_x_b3_spanid"; }}
    location / {{ return 200 "hello\\n"; }}
  }}
  server {{ listen 82 http2; location / {{ return 200 "$http_x_b3_traceid"; }} }}
}}
"""


@pytest.fixture
def pods(two_ns_veth, maps):
    """The client's requests leave through the engine."""
    client, server = two_ns_veth
    redirect_outbound(client)
    with redirection(handoff_fds=maps.fds) as engine:
        engine.serve(client)
        yield client, server, engine


@pytest.fixture
def inbound_pods(two_ns_veth, maps):
    """The server's requests arrive through it."""
    client, server = two_ns_veth
    redirect_inbound(server)
    with redirection(handoff_fds=maps.fds) as engine:
        engine.serve(server)
        yield client, server, engine


@both_families
def test_a_request_gets_the_context_that_the_kernel_decided(pods, maps, version):
    client, server, engine = pods
    with connected(client, server, version) as (ours, theirs):
        for number in (1, 2):
            head = make_head(target=b"/%d" % number)
            give(maps, client, ours, number * len(head), span_id=number)
            ours.sendall(head)
            headers = headers_of(read_request(theirs))
            assert headers[b"x-b3-traceid"] == TRACE_ID
            assert int(headers[b"x-b3-spanid"], 16) == number
            assert headers[b"x-b3-sampled"] == b"1"
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
            theirs.sendall(answer)
            assert ours.recv(1000) == answer

    assert maps.keys(maps.handed) == []
    engine.until_counted(requests_outbound=2, no_context=0)


def test_a_request_of_which_the_kernel_knows_nothing_passes_untouched(pods):
    client, server, engine = pods
    head = make_head(size=3000)
    with connected(client, server) as (ours, theirs):
        ours.sendall(head)
        assert read_request(theirs) == head

    engine.until_counted(no_context=1)


def test_a_request_that_enters_without_context_becomes_a_root(inbound_pods, maps):
    client, server, _ = inbound_pods
    with connected(client, server) as (ours, theirs):
        ours.sendall(make_head())
        headers = headers_of(read_request(theirs))

    span_id = int(headers[b"x-b3-spanid"], 16)
    assert len(headers[b"x-b3-traceid"]) == 32
    assert headers[b"x-b3-sampled"] == b"1"
    assert b"x-b3-parentspanid" not in headers
    assert maps.keys(maps.roots) == [ROOT_KEY.pack(span_id, inode(server))]


def test_a_request_that_enters_with_context_is_untouched(inbound_pods, maps):
    client, server, _ = inbound_pods
    head = make_head(*FORWARDED)
    with connected(client, server) as (ours, theirs):
        ours.sendall(head)
        assert read_request(theirs) == head

    assert maps.keys(maps.roots) == []


def test_a_pods_own_sampling_rate_decides_its_roots(inbound_pods):
    client, server, engine = inbound_pods

    def decision():
        with connected(client, server) as (ours, theirs):
            ours.sendall(make_head())
            return headers_of(read_request(theirs))[b"x-b3-sampled"]

    assert decision() == b"1"
    engine.engine.serve({inode(server): plan_of(server, sampling=0.0)})
    engine.until(lambda: decision() == b"0")


def test_load_on_kept_connections_ends_without_an_error(two_ns_veth, tmp_path, maps):
    client, server = two_ns_veth
    redirect_outbound(client)
    redirect_inbound(server)
    with (
        nginx(server, tmp_path),
        redirection(workers=2, handoff_fds=maps.fds) as engine,
    ):
        engine.serve(client, server)
        url = f"http://{server.ipv4}:{SERVICE_PORT}/"
        said = client.run("wrk", "-t1", "-c32", "-d2", "--timeout", "20s", url).stdout

    assert "Socket errors" not in said, said
    assert "Non-2xx" not in said, said
    [requests] = re.findall(r"(\d+) requests in", said)
    assert int(requests) > 100


def test_a_file_that_the_server_sends_with_sendfile_arrives_whole(pods, tmp_path):
    client, server, _ = pods
    content = os.urandom(32 << 20)
    (tmp_path / "file").write_bytes(content)
    url = f"http://{server.ipv4}:{SERVICE_PORT}/file"
    with nginx(server, tmp_path):
        for _ in range(2):
            got = subprocess.run(
                client.command("curl", "-sS", url), capture_output=True, check=True
            ).stdout
            assert digest(got) == digest(content)


def test_a_large_upload_with_expect_is_taken(pods, tmp_path):
    client, server, _ = pods
    (tmp_path / "upload").write_bytes(os.urandom(8 << 20))
    url = f"http://{server.ipv4}:{SERVICE_PORT}/"
    with nginx(server, tmp_path):
        said = client.run(
            *("curl", "-sS", "-H", "Expect: 100-continue", "-w", "%{http_code}"),
            *("--data-binary", f"@{tmp_path / 'upload'}", url),
        ).stdout

    assert said == "hello\n200"


def test_a_request_head_that_comes_byte_by_byte_gets_its_headers(inbound_pods):
    client, server, _ = inbound_pods
    with connected(client, server) as (ours, theirs):
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in make_head():
            ours.send(bytes([byte]))
        assert b"x-b3-traceid" in headers_of(read_request(theirs))


def test_http2_is_claimed_gets_headers_and_its_exchange_is_told(
    inbound_pods, maps, tmp_path
):
    client, server, engine = inbound_pods
    url = f"http://{server.ipv4}:82/hello?a=b"
    with nginx(server, tmp_path):
        said = client.run("curl", "-sS", "--http2-prior-knowledge", url).stdout
        engine.until(lambda: engine.records)

    [exchange] = engine.records
    assert said == f"{exchange.trace_id:032x}"
    assert exchange.role is Role.SERVER
    assert (exchange.netns, exchange.local_port) == (inode(server), 82)
    assert (exchange.method, exchange.target) == ("GET", "/hello?a=b")
    assert exchange.status == 200
    [claim] = maps.keys(maps.claims)
    tuple_ = Tuple(
        inode(server),
        exchange.local_addr,
        exchange.local_port,
        exchange.peer_addr,
        exchange.peer_port,
    )
    assert claim == tuple_.pack()


def give(maps: Maps, namespace, sock, offset, *, span_id=int(SPAN_ID, 16)):
    """Do what the kernel does before the application's head leaves its socket."""
    ends = (*sock.getsockname()[:2], *sock.getpeername()[:2])
    trace_id = int(TRACE_ID, 16)
    value = HANDED.pack(
        trace_id >> 64,
        trace_id & (1 << 64) - 1,
        span_id,
        0,
        Link.NONE,
        FLAG_SAMPLED,
        b"",
    )
    key = HANDED_KEY.pack(Tuple(inode(namespace), *ends).pack(), offset)
    syscall.map_update(maps.handed, key, value)


@contextmanager
def nginx(namespace, directory):
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(dir=directory, port=SERVICE_PORT))
    command = ["nginx", "-c", str(config), "-e", str(directory / "errors")]
    process = subprocess.Popen(namespace.command(*command))
    try:
        with namespace.inside():
            wait_until(lambda: accepts("127.0.0.1", SERVICE_PORT))
        yield
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def digest(data):
    return hashlib.sha256(data).hexdigest()
