"""The status port, over loopback."""

import gzip
import http.client
import json
import logging
import socket
import threading
import time
from contextlib import closing, suppress

import pytest
from podspan.agent import status
from podspan.agent.errors import StatusError
from podspan.agent.metrics import GAUGE, Family, Format, Sample, label_text
from podspan.agent.status import StatusServer, open_status
from podspan.agent.values import Address
from unit.test_metrics import CALLS, PROMETHEUS_3, samples, snapshot

ANY = Address("127.0.0.1", 0)
LARGE = Family(
    "large_bytes",
    GAUGE,
    "Of more than one piece.",
    [Sample(label_text({"n": f"{n:08}"}), 1) for n in range(20_000)],
)


class Port:
    """A server whose facts the test sets."""

    def __init__(self):
        self.now = snapshot(updated_s=time.monotonic())
        self.ready = True
        self.more = [CALLS]
        self.server = StatusServer(
            ANY, self.read, lambda: self.ready, lambda: self.more
        )

    def read(self):
        if isinstance(self.now, Exception):
            raise self.now
        return self.now

    def ask(self, path, method="GET"):
        """Return status, content type and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, 20)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            kind = response.headers["Content-Type"]
            return response.status, kind, response.read().decode()
        finally:
            connection.close()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.server.port), 20)

    def raw(self, data):
        """Return all that is answered to these bytes."""
        with self.connect() as sock:
            with suppress(OSError):  # it may have closed already
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            return read_all(sock)


def read_all(sock):
    parts = []
    with suppress(ConnectionResetError):
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture
def port():
    port = Port()
    yield port
    port.server.close()


def test_metrics(port):
    code, kind, text = port.ask("/metrics?name=x")
    assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(text)
    assert found[("podspan_exchanges_total",)] == 23
    assert found[("calls_total",)] == 7


def test_metrics_as_openmetrics_packed(port):
    """As Prometheus asks for it."""
    port.more = [CALLS, *(LARGE for _ in range(4))]
    headers = {"Accept": PROMETHEUS_3, "Accept-Encoding": "gzip"}
    connection = http.client.HTTPConnection("127.0.0.1", port.server.port, 20)
    with closing(connection):
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        assert response.headers["Content-Type"] == Format.OPENMETRICS.value
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Transfer-Encoding"] == "chunked"
        text = gzip.decompress(response.read()).decode()
    assert "calls_total 7 # {trace_id=" in text
    assert text.count("large_bytes{") == 4 * 20_000
    assert text.endswith("# EOF\n")


def test_to_http_1_0_metrics_end_with_the_connection(port):
    port.more = [LARGE]
    head, _, body = port.raw(b"GET /metrics HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.count(b"large_bytes{") == 20_000
    assert body.endswith(b"} 1\n")


def test_to_http_0_9_metrics_are_all_there_is(port):
    assert port.raw(b"GET /metrics\r\n\r\n").startswith(b"# HELP podspan_build_info")


def test_metrics_that_fail_half_way_are_not_taken_for_all(port, caplog):
    def failing():
        yield from [Sample(label_text({"n": str(n)}), 1) for n in range(20_000)]
        raise ValueError("no")

    port.more = [Family("large_bytes", GAUGE, "Large.", failing())]
    with pytest.raises(http.client.IncompleteRead):
        port.ask("/metrics")
    assert "an answer failed" in caplog.text


def test_who_does_not_read_metrics_does_not_hold_a_place(port, monkeypatch):
    monkeypatch.setattr(status, "ANSWER_S", 0.5)
    port.more = [LARGE] * 100
    slow = [port.connect() for _ in range(status.MAX_CONNECTIONS)]
    try:
        for sock in slow:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        deadline_s = time.monotonic() + 20
        while not port.raw(b"GET /healthz HTTP/1.1\r\n\r\n"):
            assert time.monotonic() < deadline_s
    finally:
        for sock in slow:
            sock.close()


@pytest.mark.parametrize(
    ("wish", "packed"),
    [
        ("gzip", True),
        ("deflate, GZIP ;q=1.0, *;q=0.5", True),
        ("gzip;q=0.001", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip;q=x", False),
        ("identity", False),
        ("", False),
    ],
)
def test_metrics_are_packed_for_who_can_unpack_them(port, wish, packed):
    head = f"GET /metrics HTTP/1.1\r\nAccept-Encoding: {wish}\r\n\r\n"
    assert (b"Content-Encoding: gzip" in port.raw(head.encode())) == packed


def test_status_is_json(port):
    code, kind, text = port.ask("/status")
    assert (code, kind) == (200, "application/json")
    assert json.loads(text)["pods"][0]["engine"] == "kernel"


def test_ready_only_once_attached(port):
    port.ready = False
    assert port.ask("/readyz")[0] == 503
    assert port.ask("/healthz")[0] == 200
    port.ready = True
    assert port.ask("/readyz")[::2] == (200, "ready\n")


def test_a_loop_that_no_longer_turns_is_not_healthy(port):
    assert port.ask("/healthz")[::2] == (200, "ok\n")
    port.now = snapshot(updated_s=time.monotonic() - status.STUCK_S - 1)
    code, _, text = port.ask("/healthz")
    assert code == 503
    assert "has not turned for 61 s" in text
    port.ready = False  # it takes as long as it takes to start
    assert port.ask("/healthz")[0] == 200


def test_what_is_not_there_is_said_with_what_is(port):
    code, kind, text = port.ask("/secret<b>")
    assert (code, kind) == (404, "text/plain; charset=utf-8")
    assert "/metrics" in text
    assert "secret" not in text


def test_head_has_no_body(port):
    assert port.ask("/metrics", "HEAD")[::2] == (200, "")


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", b" 501 "),
        (b"\x16\x03\x01\x02\x00\x01\n\n", b"400 "),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", None),
        (b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", b" 431 "),
        (b"GET /metrics HTTP/9.9\r\n\r\n", b"505 "),
        (b"\r\n\r\n", None),
        (b"GET /metrics HTTP/1.1\r\n", None),
        (b"", None),
    ],
)
def test_hostile_requests_are_answered_and_harm_nobody(port, data, answer):
    answered = port.raw(data)
    assert answer in answered if answer else answered == b""
    assert b"podspan_" not in answered
    assert port.ask("/healthz")[0] == 200


def test_an_endless_head_is_read_no_further_than_its_limit(port):
    lines = b"".join(b"x-header: %d\r\n" % i for i in range(10**6))
    with port.connect() as sock, pytest.raises(OSError, match=r"reset|pipe"):
        sock.sendall(lines)
    assert port.ask("/healthz")[0] == 200


def test_slow_clients_take_all_places_only_until_their_time_is_over(port, monkeypatch):
    monkeypatch.setattr(status, "TIMEOUT_S", 0.5)
    slow = [port.connect() for _ in range(status.MAX_CONNECTIONS)]
    try:
        for sock in slow:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n")
        with port.connect() as refused:
            assert read_all(refused) == b""
        # Each is closed without an answer, and its place is another's.
        assert [read_all(sock) for sock in slow] == [b""] * len(slow)
    finally:
        for sock in slow:
            sock.close()
    deadline_s = time.monotonic() + 20
    while not port.raw(b"GET /healthz HTTP/1.1\r\n\r\n"):
        assert time.monotonic() < deadline_s


def test_an_answer_that_fails_ends_its_connection_only(port, caplog):
    port.now = ValueError("no")
    assert port.raw(b"GET /metrics HTTP/1.1\r\n\r\n") == b""
    port.now = snapshot(updated_s=time.monotonic())
    assert port.ask("/metrics")[0] == 200
    assert "an answer failed" in caplog.text


def test_nothing_is_left_after_close():
    before = set(threading.enumerate())
    port = Port()
    port.ask("/metrics")
    port.server.close()
    with pytest.raises(OSError, match="refused"):
        port.connect()
    assert not {t for t in threading.enumerate() if t.name == "podspan-status"} - before


def test_one_agent_after_another_gets_the_same_port():
    first = Port()
    first.ask("/metrics")
    first.server.close()
    address = Address("127.0.0.1", first.server.port)
    StatusServer(address, first.read, lambda: True).close()


def test_an_address_that_is_taken_is_an_error_only_if_the_user_named_it(port, caplog):
    def open_taken(named):
        address = Address("127.0.0.1", port.server.port, named=named)
        return open_status(address, port.read, lambda: True)

    with pytest.raises(StatusError, match="another process has the status port") as it:
        open_taken(named=True)
    assert "--status-address" in it.value.hint
    caplog.set_level(logging.WARNING)
    assert open_taken(named=False) is None
    assert "no status port: another process has" in caplog.text


def test_an_address_that_is_not_ours_is_an_error(port):
    with pytest.raises(StatusError, match=r"192\.0\.2\.1:0"):
        open_status(Address("192.0.2.1", 0), port.read, lambda: True)


def test_none_serves_nowhere(port):
    assert open_status(None, port.read, lambda: True) is None
