"""The Zipkin exporter against a collector that refuses, hangs and dies."""

import gzip
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from podspan.agent.errors import UsageError
from podspan.agent.exchange import Exchange
from podspan.agent.export.zipkin import ZipkinExporter, zipkin_endpoint
from podspan.agent.span import span_of, zipkin_json
from unit.kernel_struct import exchange_record

PATIENCE_S = 20.0


def spans(count, first=1):
    return [
        span_of(Exchange.from_kernel(exchange_record(span_id=number)), "a", 0)
        for number in range(first, first + count)
    ]


class Collector:
    """Answers POSTs as told, and remembers them."""

    def __init__(self, port=0):
        self.statuses: list[int] = []  # of the next answers; then 202
        self.hang = threading.Event()  # cleared: requests wait for it
        self.hang.set()
        self.requests: list[Any] = []
        self.connections: set[Any] = set()
        self.changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                with collector.changed:
                    collector.connections.add(self.client_address)
                    statuses = collector.statuses
                    status = statuses.pop(0) if statuses else 202
                    collector.requests.append((self.path, self.headers, body, status))
                    collector.changed.notify_all()
                collector.hang.wait(PATIENCE_S)
                answer = b"" if status == 202 else b"no,\nthanks"
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request, client_address):
                pass  # the exporter gave up on an answer: that is what is tested

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()

    def ids(self, status=202):
        """Return the ids of all spans that were answered with this status."""
        return [
            int(span["id"], 16)
            for _, headers, body, answered in self.requests
            if answered == status
            for span in json.loads(
                gzip.decompress(body) if headers["content-encoding"] else body
            )
        ]

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def stop(self):
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def collector():
    made = Collector()
    yield made
    made.stop()


@contextmanager
def exporting(url, close_s=PATIENCE_S, **settings):
    exporter = ZipkinExporter(url, **{"batch_delay_s": 0.01, **settings})
    try:
        yield exporter
    finally:
        exporter.close(close_s)


def until(exporter, **expected):
    """Wait until the exporter's counters have these values."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        counters = exporter.counters()
        if {name: counters[name] for name in expected} == expected:
            return
        assert time.monotonic() < deadline_s, counters
        threading.Event().wait(0.002)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_span_arrives_once_and_in_order(collector):
    with exporting(collector.url, batch_spans=10) as exporter:
        for first in range(1, 47, 2):
            exporter.export(spans(2, first))
    assert collector.ids() == list(range(1, 47))
    assert exporter.counters() == {
        "sent": 46,
        "dropped": 0,
        "failed": 0,
        "refused": 0,
        "queued": 0,
    }


def test_a_post_is_what_zipkin_takes_and_asks_not_to_be_traced(collector):
    with exporting(collector.url) as exporter:
        exporter.export(spans(1))
    [(path, headers, body, _)] = collector.requests
    assert path == "/api/v2/spans"
    assert headers["content-type"] == "application/json"
    assert headers["b3"] == "0"
    assert headers["x-b3-sampled"] == "0"
    assert headers["content-encoding"] is None
    assert body.decode() == f"[{zipkin_json(spans(1)[0])}]"


def test_large_batches_are_compressed_and_connections_are_reused(collector):
    with exporting(collector.url, batch_spans=50, batch_delay_s=60.0) as exporter:
        exporter.export(spans(150))
    assert len(collector.requests) == 3
    assert len(collector.connections) == 1
    assert all(headers["content-encoding"] for _, headers, _, _ in collector.requests)
    assert len(collector.ids()) == 150


def test_a_full_batch_does_not_wait_for_its_time(collector):
    with exporting(collector.url, batch_spans=5, batch_delay_s=3600.0) as exporter:
        exporter.export(spans(7))
        until(exporter, sent=5, queued=2)
    assert exporter.counters()["sent"] == 7


def test_a_small_batch_goes_when_its_time_has_come(collector):
    with exporting(collector.url, batch_spans=1000, batch_delay_s=0.05) as exporter:
        exporter.export(spans(1))
        until(exporter, sent=1)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_trouble_that_passes_is_tried_again(collector, status):
    collector.statuses = [status, status]
    with exporting(collector.url) as exporter:
        exporter.export(spans(3))
    assert collector.ids(status) == [1, 2, 3] * 2
    assert collector.ids() == [1, 2, 3]
    assert exporter.counters()["sent"] == 3


@pytest.mark.parametrize("status", [400, 404, 413, 301])
def test_what_is_refused_is_not_tried_again(collector, status):
    collector.statuses = [status]
    with exporting(collector.url) as exporter:
        exporter.export(spans(3))
        until(exporter, refused=3)
        exporter.export(spans(1, 9))
    assert collector.ids() == [9]
    assert exporter.counters()["refused"] == 3


def test_a_collector_that_never_comes_is_given_up(caplog):
    with exporting(f"http://127.0.0.1:{free_port()}", retry_s=0.3) as exporter:
        exporter.export(spans(3))
        until(exporter, failed=3)
    warnings = [line for line in caplog.messages if "does not take" in line]
    assert len(warnings) == 1  # however many tries there were
    assert "Connection refused" in warnings[0]
    assert "hint=" in warnings[0]
    assert "object at" not in warnings[0]


def test_a_collector_that_comes_late_gets_everything(caplog):
    caplog.set_level(logging.INFO)
    port = free_port()
    with exporting(f"http://127.0.0.1:{port}") as exporter:
        exporter.export(spans(3))
        deadline_s = time.monotonic() + PATIENCE_S
        while not caplog.messages:
            assert time.monotonic() < deadline_s
            threading.Event().wait(0.002)
        late = Collector(port)
        try:
            until(exporter, sent=3)
        finally:
            late.stop()
    assert late.ids() == [1, 2, 3]
    assert "takes spans again" in caplog.text


def test_a_collector_that_dies_and_returns_loses_nothing():
    first = Collector()
    with exporting(first.url) as exporter:
        exporter.export(spans(1))
        until(exporter, sent=1)
        first.stop()
        exporter.export(spans(1, 2))
        second = Collector(first.port)
        try:
            until(exporter, sent=2)
        finally:
            second.stop()
    # The old connection may outlive the old server's listener for one answer.
    assert first.ids() + second.ids() == [1, 2]


def test_a_collector_that_hangs_does_not_hold_up_the_agent(collector):
    collector.hang.clear()
    with exporting(
        collector.url, close_s=0.1, batch_spans=1, queue_bytes=20_000
    ) as exporter:
        exporter.export(spans(1))
        collector.wait(lambda: collector.requests)
        started_s = time.monotonic()
        exporter.export(spans(1000, 2))
        assert time.monotonic() - started_s < PATIENCE_S / 4
        counters = exporter.counters()
        assert counters["dropped"] > 900
        assert counters["queued"] > 10
        assert counters["dropped"] + counters["queued"] == 1001
    after = exporter.counters()
    assert after["queued"] == 0
    assert after["failed"] == counters["queued"]
    assert sum(after.values()) == 1001


def test_a_collector_that_does_not_answer_in_time_is_asked_again(collector, caplog):
    collector.hang.clear()
    with exporting(collector.url, request_timeout_s=0.05) as exporter:
        exporter.export(spans(1))
        collector.wait(lambda: len(collector.requests) >= 2)
        collector.hang.set()
        until(exporter, sent=1)
    assert "timed out" in caplog.text


def test_close_does_not_outlast_its_time(collector):
    collector.hang.clear()
    exporter = ZipkinExporter(collector.url, batch_delay_s=0.0)
    exporter.export(spans(1))
    collector.wait(lambda: collector.requests)
    started_s = time.monotonic()
    exporter.close(0.05)
    # REQUEST_TIMEOUT_S is 5.
    assert time.monotonic() - started_s < 4
    assert exporter.counters()["failed"] == 1


def test_close_of_an_idle_exporter_waits_for_nothing():
    exporter = ZipkinExporter("http://127.0.0.1:9")
    started_s = time.monotonic()
    exporter.close(3600.0)
    assert time.monotonic() - started_s < PATIENCE_S
    assert exporter.counters()["failed"] == 0


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://z:9411", "http://z:9411/api/v2/spans"),
        ("http://z:9411/", "http://z:9411/api/v2/spans"),
        ("https://z/zipkin/api/v2/spans?t=1", "https://z/zipkin/api/v2/spans?t=1"),
        ("http://[::1]:9411#x", "http://[::1]:9411/api/v2/spans"),
    ],
)
def test_endpoint(url, endpoint):
    assert zipkin_endpoint(url) == endpoint


@pytest.mark.parametrize(
    "url",
    [
        "",
        "z",
        "z:9411",
        "ftp://z",
        "http://",
        "http://:9411",
        "http://z:x",
        "http://z:0",
        "http://z:99999",
        "http://[::1",
        "http://a b",
        "http://a\nb",
        "http://u:p@z",
    ],
)
def test_what_is_no_url_is_said_before_anything_runs(url):
    threads = set(threading.enumerate())
    with pytest.raises(UsageError) as caught:
        ZipkinExporter(url)
    assert caught.value.hint or "user name" in str(caught.value)
    assert not set(threading.enumerate()) - threads
