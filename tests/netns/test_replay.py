"""Real tcpdump of real nginx and curl, replayed: the spans of what nginx's log says."""

import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from ipaddress import ip_address

import pytest
from podspan.agent.ids import derive_id

REPLAY = "import sys; from podspan.agent.replay.command import main; main(sys.argv[1:])"

DEADLINE_S = 20
PORT = 8080
TRACE = "463ac35c9f6413ad48485a3953bb6124"
BIG = 3_000_000

NGINX = """\
daemon off; pid {dir}/pid; worker_processes 1; error_log {dir}/errors;
events {{ worker_connections 64; }}
http {{
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/p; default_type text/plain;
    fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
    log_format facts escape=json '{{'
        '"trace":"$http_x_b3_traceid","span":"$http_x_b3_spanid",'
        '"parent":"$http_x_b3_parentspanid","sampled":"$http_x_b3_sampled",'
        '"method":"$request_method","target":"$request_uri","status":$status,'
        '"sent":$body_bytes_sent,"client":"$remote_addr","port":$remote_port}}';
    access_log {dir}/access facts;
    client_max_body_size 100m;
    server {{
        listen {port}; listen [::]:{port}; root {dir}/files;
        gzip on; gzip_min_length 1; gzip_types *; gzip_http_version 1.1;
        location = /empty {{ return 204; }}
        location = /fails {{ return 503 "no"; }}
        location = /old {{ keepalive_timeout 0; return 200 "closed by the server"; }}
        location = /upload {{ proxy_pass http://127.0.0.1:{port}/taken; }}
        location = /taken {{ return 200 "taken"; }}
    }}
}}
"""


def wait_until(condition, what):
    give_up_s = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < give_up_s, what
        time.sleep(0.02)
    return found


@contextmanager
def running(*command, **how):
    process = subprocess.Popen(command, **how)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@contextmanager
def nginx(namespace, folder):
    files = folder / "files"
    files.mkdir()
    (files / "page").write_text("hello\n" * 200)
    (files / "big").write_bytes(bytes(BIG))
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(dir=folder, port=PORT))
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)  # its worker is nobody
    command = namespace.command("nginx", "-c", config, "-e", folder / "errors")
    with running(*command):
        with namespace.inside():
            wait_until(accepts, "nginx does not listen")
        yield


def accepts():
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", PORT)) == 0


@contextmanager
def tcpdump(namespace, path, *options):
    """Capture; stops only when all that is waited for is in the file."""
    if shutil.which("tcpdump") is None:
        pytest.skip("no tcpdump: apt install tcpdump")
    # Not --immediate-mode: its buffer has a slot of the snapshot length for each
    # packet, which makes 64 here, and drops what comes meanwhile.
    words = namespace.command(
        *("tcpdump", "-i", "any", "-U", "-B", "16384", "-Z", "root"),
        *("-s", "0", "-w", path, *options),
    )
    said = path.with_suffix(".said")
    with said.open("wb") as out, running(*words, stderr=out):
        wait_until(lambda: b"listening" in said.read_bytes(), "tcpdump does not listen")
        yield


def replayed(path, *options):
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, path, "--json", "-", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def is_whole(path, spans):
    """Whether tcpdump has written all of the calls, their ends included."""
    found, summary = replayed(path)
    return len(found) == spans and "end_unseen" not in summary


def curl(namespace, *words):
    namespace.run("curl", "-sS", "-m", str(DEADLINE_S), *words)


def b3(number, sampled="1"):
    return [
        *("-H", f"X-B3-TraceId: {TRACE}", "-H", f"X-B3-SpanId: {number:016x}"),
        *("-H", f"X-B3-ParentSpanId: {number + 0x1000:016x}"),
        *("-H", f"X-B3-Sampled: {sampled}"),
    ]


def call_all(namespace, address):
    url = f"http://{f'[{address}]' if ':' in address else address}:{PORT}"
    out = ["-o", "/dev/null"]
    keep_alive = [
        word
        for number, name in enumerate(("page", "fails", "empty", "absent", "old"), 1)
        for word in [*b3(number), *out, f"{url}/{name}", "--next"]
    ]
    curl(namespace, *keep_alive, *b3(6), *out, f"{url}/page?again=yes")
    curl(namespace, *b3(7), "--compressed", *out, f"{url}/page")  # chunked
    curl(namespace, *b3(8), *out, f"{url}/big")
    curl(namespace, *b3(9), "-I", *out, f"{url}/big")
    upload = ["-d", "x" * 100_000, *out, f"{url}/upload"]
    curl(namespace, *b3(10), *upload)
    chunked = ["-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue"]
    curl(namespace, *b3(11), *chunked, *upload)
    curl(namespace, *b3(12), "-0", *out, f"{url}/page")  # until close
    curl(namespace, *b3(13, sampled="0"), *out, f"{url}/page")
    curl(namespace, *out, f"{url}/page?no=context")


def logged(folder):
    rows = (folder / "access").read_text().splitlines()
    return [json.loads(row) for row in rows]


def facts(span):
    """What nginx's log has too; of the server's end."""
    tags = span["tags"]
    address = ip_address(span["remoteEndpoint"].get("ipv6") or (
        span["remoteEndpoint"]["ipv4"]
    ))  # fmt: skip
    return (
        tags["http.method"],
        tags["http.url"].partition("://")[2].partition("/")[2],
        int(tags["http.status_code"]),
        address,
        span["remoteEndpoint"]["port"],
    )


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("where", ["client", "server"])
def test_the_spans_are_those_of_nginxs_log(two_ns_veth, tmp_path, version, where):
    client, server = two_ns_veth
    address = server.ipv4 if version == 4 else server.ipv6
    at = client if where == "client" else server
    path = tmp_path / "capture"
    # The proxy's own loop back is left out: its calls are another test's.
    only = ("tcp", "port", str(PORT), "and", "not", "net", "127.0.0.0/8")
    with nginx(server, tmp_path), tcpdump(at, path, *only):
        call_all(client, address)
        rows = wait_until(
            lambda: [row for row in logged(tmp_path) if row["client"] != "127.0.0.1"],
            "nginx logs nothing",
        )
        rows = wait_until(lambda: whole(tmp_path), "nginx's log is not whole")
        wait_until(lambda: is_whole(path, 2 * 13), replayed(path)[1])
    spans, summary = replayed(path)
    assert "unsampled 1" in summary
    assert "out_of_step" not in summary

    known = {
        (
            *(row["method"], row["target"].removeprefix("/"), row["status"]),
            *(ip_address(row["client"]), row["port"]),
        ): row
        for row in rows
        if row["sampled"] != "0"
    }
    servers = {facts(span): span for span in spans if span["kind"] == "SERVER"}
    assert servers.keys() == known.keys()
    clients = {span["id"]: span for span in spans if span["kind"] == "CLIENT"}
    for key, row in known.items():
        span = servers[key]
        assert span["shared"] is True
        assert clients[span["id"]]["traceId"] == span["traceId"]
        # nginx counts chunks' framing, and a 100 (Continue).
        if row["target"] not in ("/upload", "/page"):
            assert int(span["tags"]["response_size"]) == row["sent"]
        if not row["trace"]:
            assert span["tags"]["podspan.link"] == "none"
            continue
        assert span["traceId"] == row["trace"]
        assert (span["id"], span["parentId"]) == (row["span"], row["parent"])
        assert span["tags"]["podspan.link"] == "header"
    uploads = [one for one in spans if one["tags"]["http.url"].endswith("/upload")]
    assert {one["tags"]["request_size"] for one in uploads} == {"100000"}


def whole(folder):
    rows = [row for row in logged(folder) if row["client"] != "127.0.0.1"]
    return rows if len(rows) == 14 else []


def test_a_forwarding_proxy_on_loopback_is_its_callers_parent(one_ns, tmp_path):
    """nginx hands on the headers that it got, as any proxy does."""
    path = tmp_path / "capture"
    url = f"http://127.0.0.1:{PORT}/upload"
    with nginx(one_ns, tmp_path), tcpdump(one_ns, path, "tcp", "port", str(PORT)):
        curl(one_ns, *b3(1), "-o", "/dev/null", url)
        wait_until(lambda: is_whole(path, 4), "two calls are not there")
    spans, _ = replayed(path, "--span-ids", "child")
    by_name = {
        (span["kind"], span["tags"]["http.url"].rpartition("/")[2]): span
        for span in spans
    }
    assert {span["traceId"] for span in spans} == {TRACE}
    outer = by_name["SERVER", "upload"]
    assert outer["id"] == f"{derive_id(1):016x}"
    assert outer["parentId"] == f"{1:016x}"
    assert by_name["CLIENT", "taken"]["parentId"] == outer["id"]
    assert by_name["SERVER", "taken"]["parentId"] == by_name["CLIENT", "taken"]["id"]
