"""Whoever reaches the port may send anything: each gets its status, and nothing stays.

A row is what goes over the wire and the status that comes back. After each, the store
answers the next request, and no traceback was logged.
"""

import gzip
import json
import logging
import re
import socket
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from podspan.agent.store.api import MAX_PROTO_BYTES
from podspan.agent.store.request import (
    MAX_BODY_BYTES,
    MAX_MEMBERS,
    MAX_PARAMETERS,
    MAX_UNPACKED_BYTES,
)
from podspan.agent.store.server import MAX_HEAD_BYTES, MAX_READ_BYTES
from podspan.agent.store.zipkin_v2 import MAX_SPANS
from unit.store_server import Store, running_store
from unit.test_store_server import podspan_store

MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with running_store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(autouse=True)
def nothing_is_wrong_afterwards(store, caplog):
    yield
    assert store.get("/health").status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def raw(store, request):
    """Send bytes, and return the status, 0 for a connection that just ends."""
    with socket.create_connection(("127.0.0.1", store.port), 30) as connection:
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        except OSError:  # reset, while we were still sending
            return 0
    found = re.match(rb"HTTP/1\.[01] ([0-9]{3}) ", answer)
    return int(found[1]) if found else 0


def span(text=""):
    return f'[{{"traceId":"a","id":"b"{text}}}]'.encode()


def bomb(piece, count, level=9):
    """Return gzip of `count` times `piece`, in constant memory."""
    packer = zlib.compressobj(level, wbits=31)
    block = piece * 10_000
    packed = b"".join(packer.compress(block) for _ in range(count // 10_000))
    return packed + packer.flush()


BODIES = {
    "nested deeply": (span(',"x":' + "[" * 5000 + "]" * 5000), 400),
    "nested without end": (b"[" * MIB, 400),
    "objects without end": (b'{"a":' * 200_000, 400),
    "a huge integer": (span(',"timestamp":' + "9" * 100_000), 400),
    "a huge exponent": (span(',"timestamp":1e999999999'), 400),
    "a long fraction": (span(',"duration":0.' + "3" * 100_000), 400),
    "NaN": (span(',"timestamp":NaN'), 400),
    "infinity": (span(',"duration":-Infinity'), 400),
    "a time after all": (span(',"timestamp":9223372036854775808'), 400),
    "a port too many": (span(',"localEndpoint":{"port":65536}'), 400),
    "a lone surrogate": (span(r',"name":"\ud800"'), 400),
    "half a pair": (span(r',"tags":{"\udfff":""}'), 400),
    "a NUL": (span(',"name":"\0"'), 400),
    "control characters": (span(',"name":"\x01\x1b[31m"'), 400),
    "invalid UTF-8": (span().replace(b"}", b',"name":"\xc3\x28"}'), 400),
    "overlong UTF-8": (span().replace(b"}", b',"name":"\xc0\x80"}'), 400),
    "UTF-16": (span().decode().encode("utf-16"), 400),
    "a tag that is a number's list": (span(',"tags":{"a":[1]}'), 400),
    "a tag that is null": (span(',"tags":{"a":null}'), 400),
    "a tag that is true": (span(',"tags":{"a":true}'), 400),
    "a trace id of a million digits": (
        span().replace(b'"a"', b'"%s"' % (b"1" * MIB)),
        400,
    ),
    "an id with a slash": (span().replace(b'"b"', b'"../../x"'), 400),
    "version 1": (span(',"binaryAnnotations":[]'), 400),
    "HTML": (b"<script>alert(1)</script>", 400),
    # Legal, if strange: taken as they are.
    "duplicate keys": (span(',"name":"x","name":"y","tags":{"a":"1","a":"2"}'), 202),
    "an escaped NUL": (span(r',"name":"\u0000","tags":{"\u0000":"\u0000"}'), 202),
    "escaped control characters": (span(r',"name":"\u001b[31m\u0007\u202e"'), 202),
    "markup": (span(',"name":"<img src=x onerror=alert(1)>"'), 202),
    "a service named by a quote": (
        span(""","localEndpoint":{"serviceName":"'; DROP TABLE traces; --"}"""),
        202,
    ),
    "a hundred thousand tags": (
        span(',"tags":' + json.dumps({str(n): "" for n in range(100_000)})),
        202,
    ),
    "a hundred thousand annotations": (
        span(
            ',"annotations":'
            + json.dumps([{"timestamp": n, "value": "x"} for n in range(100_000)])
        ),
        202,
    ),
    "a name of a megabyte": (span(',"name":"' + "x" * MIB + '"'), 202),
    "an unknown field of a megabyte": (span(',"x":"' + "x" * MIB + '"'), 202),
    "too many spans": (
        b"[" + b",".join([b'{"traceId":"a","id":"b"}'] * (MAX_SPANS + 1)) + b"]",
        413,
    ),
    "too many values": (b"[" + b"[]," * 3_000_000 + b"1]", 413),
    "too many bytes": (b" " * (MAX_BODY_BYTES + 1), 413),
}


@pytest.mark.parametrize(("body", "status"), BODIES.values(), ids=BODIES)
def test_json(store, body, status):
    answer = store.post(body)
    assert answer.status == status
    assert len(answer.body) < 1000


PROTOBUFS = {
    "cut short": (b"\n\x05\xff\xff", 400),
    "JSON": (b"[]", 400),
    "an endless varint": (b"\xff" * 100, 400),
    "a length of gigabytes": (b"\n\xff\xff\xff\xff\x07", 400),
    "groups without end": (b"\x0b" * 100_000, 400),
    "a name that is not UTF-8": (b"\n\x0a\x0a\x01\x01\x1a\x01\x01\x2a\x01\xff", 400),
    "spans without ids": (b"\n\x00" * 1000, 400),
    "too many bytes": (b"\n\x00" * (MAX_PROTO_BYTES // 2 + 1), 413),
    "too many spans": (b"\n\x00" * (MAX_PROTO_BYTES // 2), 413),
}


@pytest.mark.parametrize(("body", "status"), PROTOBUFS.values(), ids=PROTOBUFS)
def test_protobuf(store, body, status):
    assert store.post(body, Content_Type="application/x-protobuf").status == status


GZIPPED = {
    "not gzip": (span(), 400),
    "cut short": (gzip.compress(span())[:-9], 400),
    "a wrong checksum": (gzip.compress(span())[:-8] + bytes(8), 400),
    "bytes after it": (gzip.compress(span()) + b"x", 400),
    "zlib": (zlib.compress(span()), 400),
    "nothing in it": (gzip.compress(b""), 202),
    "a bomb of blanks": (bomb(b" ", MAX_UNPACKED_BYTES * 4), 413),
    "a bomb of lists": (bomb(b"[],", MAX_UNPACKED_BYTES // 3), 413),
    "a bomb of objects": (bomb(b'{"a":1},', MAX_UNPACKED_BYTES // 8), 413),
    "a bomb in many members": (gzip.compress(b"") * (MAX_MEMBERS + 1), 413),
    "a million members": (gzip.compress(b"", 1) * 700_000, 413),
}


@pytest.mark.parametrize(("body", "status"), GZIPPED.values(), ids=GZIPPED)
def test_gzip(store, body, status):
    assert store.post(body, Content_Encoding="gzip").status == status


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("Content-Type", "text/plain", 415),
        ("Content-Type", "application/x-www-form-urlencoded", 415),
        ("Content-Type", "multipart/form-data; boundary=x", 415),
        ("Content-Type", "application/x-thrift", 415),
        ("Content-Type", "application/json, text/plain", 415),
        ("Content-Type", "x" * 5000, 415),
        ("Content-Encoding", "br", 415),
        ("Content-Encoding", "gzip, gzip", 415),
        ("Content-Encoding", "deflate", 415),
        ("Origin", "http://evil.example", 403),
    ],
)
def test_headers_of_a_post(store, name, value, status):
    headers = {"Content-Type": "application/json", name: value}
    assert store.ask("POST", "/api/v2/spans", span(), headers).status == status


TARGETS = {
    "/api/v2/traces?serviceName=%": 400,
    "/api/v2/traces?serviceName=%zz": 400,
    "/api/v2/traces?serviceName=%ff": 400,
    "/api/v2/traces?serviceName=%c0%ae": 400,
    "/api/v2/traces?serviceName=%ed%a0%80": 400,
    "/api/v2/traces?serviceName=%00": 400,
    "/api/v2/traces?%00=1": 400,
    "/api/v2/traces?limit=1%00": 400,
    "/api/v2/traces?limit=1e3": 400,
    "/api/v2/traces?limit=%D9%A1": 400,
    "/api/v2/traces?limit=" + "9" * 5000: 400,
    "/api/v2/traces?limit=-9223372036854775808": 400,
    "/api/v2/traces?endTs=9223372036854775808": 400,
    "/api/v2/traces?endTs=9223372036854775807": 200,
    "/api/v2/traces?endTs=1&lookback=9223372036854775807": 200,
    "/api/v2/traces?minDuration=9223372036854775807": 200,
    "/api/v2/traces?limit=2147483647": 200,
    "/api/v2/traces?" + "a=1&" * (MAX_PARAMETERS + 1): 400,
    "/api/v2/traces?annotationQuery=" + "a%20and%20" * 500 + "b": 200,
    "/api/v2/traces?annotationQuery=%22*%20OR%20NEAR(": 200,
    "/api/v2/traces?annotationQuery=%27%3B--": 200,
    "/api/v2/traces?serviceName=%F0%9F%92%A9": 200,
    "/api/v2/traces?annotationQuery=%0a%0d%09": 200,
    "/api/v2/traces?;;&&==": 200,
    "/api/v2/dependencies?endTs=9223372036854775807&lookback=9223372036854775807": 200,
    "/api/podspan/v1/tail?after=9223372036854775807": 200,
    "/api/podspan/v1/tail?after=9223372036854775808": 400,
    "/api/podspan/v1/edges?endTs=9223372036854775807": 200,
    "/api/v2/traceMany?traceIds=" + ",".join(f"{n:x}" for n in range(1, 1001)): 200,
    "/api/v2/traceMany?traceIds=" + ",".join(f"{n:x}" for n in range(1, 1002)): 400,
    "/api/v2/traceMany?traceIds=" + "," * 5000: 400,
    "/api/v2/trace/..%2f..%2fetc%2fpasswd": 404,
    "/api/v2/trace/%00": 400,
    "/api/v2/trace/%ff": 400,
    "/api/v2/trace/" + "a" * 5000: 400,
    "/api/v2/autocompleteValues?key=%22%27%60": 200,
    "/static/..%2f..%2fapi.py": 404,
    "/static/%2e%2e%2fapi.py": 404,
    "/static/....//api.py": 404,
    "/static/app.js%00.png": 400,
    "/static/C:%5Cwindows": 404,
    "/../../../etc/passwd": 404,
    "//etc/passwd": 404,
    "/zipkin/traces/%0d%0aSet-Cookie:x": 404,
    "/zipkin/?%0d%0aSet-Cookie:x=1": 302,
    "/%": 400,
    "/%ff": 400,
}


@pytest.mark.parametrize(
    ("target", "status"), TARGETS.items(), ids=lambda v: str(v)[:60]
)
def test_targets(store, target, status):
    answer = store.get(target)
    assert answer.status == status
    assert "Set-Cookie" not in answer.headers


HEAD = b"Host: localhost\r\n"
POST = b"POST /api/v2/spans HTTP/1.1\r\n" + HEAD + b"Content-Type: application/json\r\n"
REQUESTS = {
    "nothing": (b"", {0}),
    "noise": (bytes(range(256)) * 4, {0, 400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {0, 400}),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0, 400, 405, 421}),
    "HTTP/0.9": (b"GET /\r\n\r\n", {200, 400, 404}),
    "a lower-case method": (b"get / HTTP/1.1\r\n" + HEAD + b"\r\n", {400, 405}),
    "a head that is too large": (
        b"GET / HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n",
        {0, 431},
    ),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]", {400}),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", {400}),
    "a length with a sign": (POST + b"Content-Length: +2\r\n\r\n[]", {400}),
    "a length that is too large": (
        POST + b"Content-Length: %d\r\n\r\n" % (MAX_READ_BYTES + 1),
        {413},
    ),
    "a length of 30 digits": (
        POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        {413},
    ),
    "a body that is cut short": (POST + b"Content-Length: 100\r\n\r\n[", {0, 400}),
    "chunks": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n",
        {202},
    ),
    "chunks without sizes": (
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n0\r\n\r\n",
        {400},
    ),
    "a length and chunks": (
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        {202, 400},
    ),
    "an unknown transfer encoding": (
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        {400, 501},
    ),
    "an address instead of a path": (
        b"GET http://localhost/api/v2/services HTTP/1.1\r\n" + HEAD + b"\r\n",
        {200},
    ),
    "bytes that are not ASCII": (
        b"GET /\xff\xfe HTTP/1.1\r\n" + HEAD + b"\r\n",
        {400},
    ),
    "a header without a name": (b"GET / HTTP/1.1\r\n: x\r\n\r\n", {400}),
    "a NUL in a header": (b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", {400, 421}),
    "a line break in a header": (b"GET / HTTP/1.1\r\nHost: a\r b\r\n\r\n", {400}),
    "no host": (b"GET /health HTTP/1.0\r\n\r\n", {200}),
    "a foreign host": (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", {421}),
}


@pytest.mark.parametrize(("request_", "statuses"), REQUESTS.values(), ids=REQUESTS)
def test_requests(store, request_, statuses):
    assert raw(store, request_) in statuses


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
    derandomize=True,
)
@given(
    st.sampled_from(["GET", "POST", "HEAD"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
    st.dictionaries(
        st.sampled_from(
            ["serviceName", "limit", "endTs", "annotationQuery", "key", "x"]
        ),
        st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
    ),
    st.binary(max_size=60),
)
def test_no_request_is_an_internal_error(store, method, path, query, body):
    text = "&".join(f"{name}={value}" for name, value in query.items())
    for folder in ("/", "/api/v2/", "/api/podspan/v1/", "/static/", "/zipkin/"):
        headers = {"Content-Type": "application/json"}
        answer = store.ask(method, f"{folder}{path}?{text}", body, headers)
        assert answer.status < 500


def resident_bytes(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def test_no_memory_is_kept(tmp_path):
    """Each of these takes tens of megabytes while it is looked at.

    A process of its own, whose threads' heaps have grown after some.
    """
    bodies = [
        b"[" + b"[]," * 99_000 + b"1]",
        span(',"x":' + "[" * 1000 + "{}," * 500_000),
        b"[" + b",".join([span(',"name":"x"')[1:-1]] * 10_000) + b",1]",
    ]
    gzipped = bomb(b" ", MAX_UNPACKED_BYTES + 10_000)

    def attack(store):
        for body in bodies:
            assert store.post(body).status == 400
        assert store.post(gzipped, Content_Encoding="gzip").status == 413

    with podspan_store(tmp_path) as (process, url):
        there = Store(urlsplit(url).port, None, None)  # type: ignore[arg-type]
        for _ in range(8):
            attack(there)
        before = resident_bytes(process.pid)
        for _ in range(4):
            attack(there)
        grown = resident_bytes(process.pid) - before
        process.terminate()
    print(f"grown by {grown / MIB:.1f} MiB")
    assert grown < 16 * MIB
