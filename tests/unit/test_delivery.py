"""Delivery against a backend that refuses, hangs, throttles, lies and dies."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)
from podspan.agent.errors import UsageError
from podspan.agent.export import delivery
from podspan.agent.export.delivery import BackendExporter
from podspan.agent.export.destination import Destination
from podspan.agent.export.encoder import retry_after_s
from podspan.agent.export.otlp import OtlpEncoder
from podspan.agent.export.spool import Spool
from podspan.agent.export.zipkin import ZipkinEncoder
from podspan.agent.span import zipkin_json
from unit.backend import PATIENCE_S, Backend, Reply, make_identity, spans, until

MEGABYTE = 1024 * 1024
HIDDEN = "s3cret-t0ken"


@pytest.fixture
def backend():
    made = Backend()
    yield made
    made.stop()


def make_exporter(where, spool=None, encoder=None, **options):
    destination = Destination(where) if isinstance(where, str) else where
    quick = {"batch_delay_s": 0.01, "max_backoff_s": 0.02, "setup_retry_s": 0.02}
    return BackendExporter(
        "zipkin", encoder or ZipkinEncoder(), destination, spool, **{**quick, **options}
    )


@contextmanager
def exporting(where, spool=None, *, close_s=PATIENCE_S, **options):
    exporter = make_exporter(where, spool, **options)
    try:
        yield exporter
    finally:
        exporter.close(close_s)


@pytest.fixture
def open_spool(tmp_path):
    """Open the spool, again after an exporter has closed it."""
    opened = []

    def open_it(max_bytes=64 * MEGABYTE, cls=Spool):
        made = cls(tmp_path / "spool", max_bytes=max_bytes, sync="never")
        opened.append(made)
        return made

    yield open_it
    for spool in opened:
        spool.close()


def wait_for(exporter, **expected):
    """Wait until the exporter's counters have these values."""
    until(lambda: exporter.counters() | expected == exporter.counters())


def fates(counters):
    """Return how many spans the counters account for."""
    names = ("sent", "dropped", "failed", "refused", "queued")
    spooled = ("spool_spans", "spool_dropped", "spool_lost")
    return sum(counters.get(name, 0) for name in names + spooled)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nowhere():
    return f"http://127.0.0.1:{free_port()}/api/v2/spans"


# Without a spool.


def test_every_span_arrives_once_and_in_order(backend):
    with exporting(backend.url, batch_spans=10) as exporter:
        for first in range(1, 47, 2):
            exporter.export(spans(2, first))
    assert backend.ids() == list(range(1, 47))
    assert exporter.counters() == {
        "sent": 46,
        "dropped": 0,
        "failed": 0,
        "refused": 0,
        "queued": 0,
    }


def test_a_post_is_what_zipkin_takes_and_asks_not_to_be_traced(backend):
    destination = Destination(backend.url, headers={"X-Scope": "1", "B3": "1"})
    with exporting(destination) as exporter:
        exporter.export(spans(1))
    [request] = backend.requests
    assert request.path == "/api/v2/spans"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-scope"] == "1"
    assert request.headers.get_all("b3") == ["0"]
    assert request.headers["x-b3-sampled"] == "0"
    assert request.headers["content-encoding"] is None
    assert request.body.decode() == f"[{zipkin_json(spans(1)[0])}]"


def test_large_batches_are_compressed_and_connections_are_reused(backend):
    with exporting(backend.url, batch_spans=50, batch_delay_s=60.0) as exporter:
        exporter.export(spans(150))
    assert len(backend.requests) == 3
    assert len(backend.connections) == 1
    assert all(request.headers["content-encoding"] for request in backend.requests)
    assert len(backend.ids()) == 150


def test_a_full_batch_does_not_wait_for_its_time(backend):
    with exporting(backend.url, batch_spans=5, batch_delay_s=3600.0) as exporter:
        exporter.export(spans(7))
        wait_for(exporter, sent=5, queued=2)
    assert exporter.counters()["sent"] == 7


def test_a_small_batch_goes_when_its_time_has_come(backend):
    with exporting(backend.url, batch_spans=1000, batch_delay_s=0.05) as exporter:
        exporter.export(spans(1))
        wait_for(exporter, sent=1)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_trouble_that_passes_is_tried_again(backend, status):
    backend.replies = [Reply(status), Reply(status)]
    with exporting(backend.url) as exporter:
        exporter.export(spans(3))
        wait_for(exporter, sent=3)
    assert backend.ids(status) == [1, 2, 3] * 2
    assert backend.ids() == [1, 2, 3]


def test_what_is_refused_is_not_tried_again(backend):
    backend.replies = [Reply(400)]
    with exporting(backend.url) as exporter:
        exporter.export(spans(3))
        wait_for(exporter, refused=3)
        exporter.export(spans(1, 9))
    assert backend.ids() == [9]
    assert fates(exporter.counters()) == 4


@pytest.mark.parametrize("date", [False, True])
def test_nothing_is_sent_before_the_time_that_was_asked_for(backend, date):
    at_s = int(time.time()) + 2
    backend.replies = [
        Reply(429, headers={"retry-after": formatdate(at_s, usegmt=True)})
        if date
        else Reply(503, headers={"retry-after": "1"})
    ]
    with exporting(backend.url) as exporter:
        exporter.export(spans(1))
        wait_for(exporter, sent=1)
    first, second = backend.requests
    assert second.at_s >= (at_s if date else first.at_s + 1) - 0.01


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        ("9" * 400, 999_999_999),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("1.5", None),
        ("Thu, 99 Jan 1970 00:00:00 GMT", None),
    ],
)
def test_the_time_that_is_asked_for(value, seconds):
    assert retry_after_s(value, 10.0) == seconds


def test_a_backend_that_asks_for_a_year_gets_minutes_and_holds_up_no_exit(backend):
    backend.replies = [Reply(503, headers={"retry-after": "31536000"})]
    with exporting(backend.url, retry_s=3600.0) as exporter:
        exporter.export(spans(1))
        backend.wait(lambda: backend.requests)
        exporter.close(0.0)
    assert exporter.counters()["failed"] == 1
    assert delivery.MAX_RETRY_AFTER_S < 3600


def test_a_batch_that_is_given_up_does_not_shorten_the_wait_of_the_next(backend):
    backend.replies = [Reply(503, headers={"retry-after": "1"})]
    with exporting(backend.url, batch_spans=1, retry_s=0.1) as exporter:
        exporter.export(spans(2))
        wait_for(exporter, failed=1, sent=1)
    first, second = backend.requests
    assert second.at_s >= first.at_s + 1 - 0.01
    assert fates(exporter.counters()) == 2


def test_a_backend_that_refuses_now_and_then_is_told_of_once(backend, caplog):
    caplog.set_level(logging.INFO)
    backend.replies = [Reply(status) for status in [400, 202] * 5]
    with exporting(backend.url, batch_spans=1) as exporter:
        exporter.export(spans(10))
        wait_for(exporter, sent=5, refused=5)
    assert len([line for line in caplog.messages if "refuses spans" in line]) == 1
    assert len([line for line in caplog.messages if "takes spans again" in line]) == 1


def test_what_is_too_large_is_halved_until_it_fits(backend):
    backend.most_spans = 3
    with exporting(backend.url, batch_spans=10, batch_delay_s=60.0) as exporter:
        exporter.export(spans(20))
    assert backend.ids() == list(range(1, 21))
    assert exporter.counters()["sent"] == 20


def test_one_span_that_is_too_large_costs_no_other(backend):
    backend.replies = [Reply(413), Reply(413)]  # both spans, then the first alone
    with exporting(backend.url, batch_delay_s=60.0) as exporter:
        exporter.export(spans(2))
    assert backend.ids() == [2]
    assert exporter.counters() | {"sent": 1, "refused": 1} == exporter.counters()


@pytest.mark.parametrize("encoder", [ZipkinEncoder(), OtlpEncoder()])
def test_one_span_that_cannot_be_encoded_costs_no_other(backend, caplog, encoder):
    made = spans(9)
    made[4] = replace(made[4], tags={"text": "\udce9"})
    with exporting(backend.url, encoder=encoder) as exporter:
        exporter.export(made)
    assert exporter.counters() | {"sent": 8, "refused": 1} == exporter.counters()
    assert "cannot be encoded: " in caplog.text


def test_a_redirect_is_not_followed(backend, caplog):
    elsewhere = Backend()
    backend.usual = Reply(307, headers={"location": elsewhere.url + "?q=1"})
    try:
        with exporting(backend.url, retry_s=0.1) as exporter:
            exporter.export(spans(1))
            wait_for(exporter, failed=1)
    finally:
        elsewhere.stop()
    assert not elsewhere.requests
    assert f"HTTP 307: redirects to {elsewhere.url}'" in caplog.text


def test_a_backend_that_never_comes_is_given_up(caplog):
    with exporting(nowhere(), retry_s=0.3) as exporter:
        exporter.export(spans(3))
        wait_for(exporter, failed=3)
    warnings = [line for line in caplog.messages if "does not take" in line]
    assert len(warnings) == 1  # however many tries there were
    assert "Connection refused" in warnings[0]
    assert "hint=" in warnings[0]
    assert "object at" not in warnings[0]


def test_a_backend_that_comes_late_gets_everything(caplog):
    caplog.set_level(logging.INFO)
    port = free_port()
    with exporting(f"http://127.0.0.1:{port}") as exporter:
        exporter.export(spans(3))
        until(lambda: caplog.messages)
        late = Backend(port)
        try:
            wait_for(exporter, sent=3)
        finally:
            late.stop()
    assert late.ids() == [1, 2, 3]
    assert "takes spans again" in caplog.text


def test_a_backend_that_dies_and_returns_loses_nothing():
    first = Backend()
    with exporting(first.url) as exporter:
        exporter.export(spans(1))
        wait_for(exporter, sent=1)
        first.stop()
        exporter.export(spans(1, 2))
        second = Backend(first.port)
        try:
            wait_for(exporter, sent=2)
        finally:
            second.stop()
    # The old connection may outlive the old server's listener for one answer.
    assert first.ids() + second.ids() == [1, 2]


def test_a_backend_that_hangs_costs_the_oldest_spans_and_no_time(backend):
    backend.hang.clear()
    with exporting(backend.url, batch_spans=1, queue_spans=10) as exporter:
        exporter.export(spans(1))
        backend.wait(lambda: backend.requests)
        started_s = time.monotonic()
        exporter.export(spans(1000, 2))
        assert time.monotonic() - started_s < PATIENCE_S / 4
        assert exporter.counters()["dropped"] == 990
        assert exporter.counters()["queued"] == 11
        backend.hang.set()
    assert backend.ids() == [1, *range(992, 1002)]
    assert fates(exporter.counters()) == 1001


def test_a_backend_that_does_not_answer_in_time_is_asked_again(backend, caplog):
    backend.hang.clear()
    with exporting(backend.url, request_timeout_s=0.05) as exporter:
        exporter.export(spans(1))
        backend.wait(lambda: len(backend.requests) >= 2)
        backend.hang.set()
        wait_for(exporter, sent=1)
    assert "timed out" in caplog.text


def test_an_endless_answer_is_not_read(backend):
    backend.usual = Reply(202, b"x" * MEGABYTE)
    with exporting(backend.url, batch_spans=1) as exporter:
        exporter.export(spans(3))
    assert exporter.counters()["sent"] == 3
    assert len(backend.connections) == 3


def test_an_answer_that_trickles_holds_up_no_batch():
    ends = threading.Event()

    def trickle(listener):
        while True:
            with listener.accept()[0] as connection, suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 202 ok\r\ncontent-length: 9999\r\n\r\n")
                while not ends.wait(0.02):
                    connection.sendall(b"x")
            if ends.is_set():
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        backend = threading.Thread(target=trickle, args=[listener])
        backend.start()
        try:
            with exporting(url, request_timeout_s=0.2, batch_spans=1) as exporter:
                exporter.export(spans(2))
                wait_for(exporter, sent=2)
        finally:
            ends.set()
            socket.create_connection(listener.getsockname()).close()
            backend.join()


def test_an_answer_that_breaks_off_is_an_answer(backend):
    backend.replies = [Reply(202, headers={"content-length": "9"})]
    with exporting(backend.url, request_timeout_s=0.1, batch_spans=1) as exporter:
        exporter.export(spans(2))
    assert backend.ids() == [1, 2]
    assert exporter.counters()["sent"] == 2


def test_close_does_not_outlast_its_time(backend):
    backend.hang.clear()
    exporter = make_exporter(backend.url)
    exporter.export(spans(1))
    backend.wait(lambda: backend.requests)
    started_s = time.monotonic()
    exporter.close(0.05)
    assert time.monotonic() - started_s < delivery.REQUEST_TIMEOUT_S / 2
    assert exporter.counters()["failed"] == 1


def test_close_of_an_idle_exporter_waits_for_nothing():
    exporter = make_exporter(nowhere())
    started_s = time.monotonic()
    exporter.close(3600.0)
    assert time.monotonic() - started_s < PATIENCE_S
    assert exporter.counters()["failed"] == 0


def test_wrong_files_are_said_before_anything_runs(tmp_path):
    threads = set(threading.enumerate())
    with pytest.raises(UsageError):
        make_exporter(Destination(nowhere(), headers_file=tmp_path / "missing"))
    assert not set(threading.enumerate()) - threads


# OTLP.


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
def test_what_a_partial_success_rejects_is_refused_and_not_sent_again(
    backend, caplog, encoding
):
    partial = ExportTracePartialSuccess(rejected_spans=2, error_message="too old")
    message = ExportTraceServiceResponse(partial_success=partial)
    body = message.SerializeToString()
    if encoding == "json":
        fields = {"rejectedSpans": "2", "errorMessage": "too old"}
        body = orjson.dumps({"partialSuccess": fields})
    backend.replies = [Reply(200, body)]
    with exporting(backend.url, encoder=OtlpEncoder(encoding)) as exporter:
        exporter.export(spans(5))
        wait_for(exporter, sent=3, refused=2)
    [request] = backend.requests
    assert request.headers["content-type"] == OtlpEncoder(encoding).content_type
    assert "rejected 2 spans: too old" in caplog.text


def test_otlp_does_not_try_again_what_it_must_not(backend):
    backend.replies = [Reply(503), Reply(500)]
    with exporting(backend.url, encoder=OtlpEncoder()) as exporter:
        exporter.export(spans(2))
        wait_for(exporter, refused=2)
    assert [request.status for request in backend.requests] == [503, 500]


# With a spool.


def test_a_backend_that_is_up_leaves_the_spool_alone(backend, open_spool):
    with exporting(backend.url, open_spool(), batch_spans=10) as exporter:
        exporter.export(spans(50))
    assert backend.ids() == list(range(1, 51))
    assert exporter.counters()["spooled"] == 0


@pytest.mark.parametrize("trouble", [503, 401, 404, 307])
def test_what_fails_goes_to_the_spool_and_is_sent_in_order(
    backend, open_spool, trouble
):
    backend.usual = Reply(trouble)
    with exporting(backend.url, open_spool(), batch_spans=7) as exporter:
        for first in range(1, 100, 5):
            exporter.export(spans(5, first))
        wait_for(exporter, spool_spans=100, queued=0)
        backend.usual = Reply()
        wait_for(exporter, sent=100, spool_spans=0)
        # And past the spool again.
        exporter.export(spans(10, 101))
        wait_for(exporter, sent=110, spooled=100)
    assert backend.ids() == list(range(1, 111))


def test_the_end_keeps_what_is_unsent_for_the_next_run(open_spool):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started_s = time.monotonic()
    with exporting(url, open_spool(), batch_spans=10) as exporter:
        exporter.export(spans(55))
        exporter.close(PATIENCE_S)
    # A backend that is down is no reason to stay.
    assert time.monotonic() - started_s < PATIENCE_S / 2
    assert exporter.counters()["failed"] == 0

    with exporting(url, open_spool(), batch_spans=10) as exporter:
        exporter.export(spans(5, 56))
        wait_for(exporter, queued=0, spool_spans=60)
        late = Backend(port)
        try:
            wait_for(exporter, sent=60)
        finally:
            late.stop()
    assert late.ids() == list(range(1, 61))


def test_the_end_while_the_backend_hangs_keeps_everything(backend, open_spool):
    backend.hang.clear()
    exporter = make_exporter(backend.url, open_spool(), batch_spans=10)
    exporter.export(spans(35))
    backend.wait(lambda: backend.requests)
    exporter.close(0.1)
    assert exporter.counters()["failed"] == 0
    kept = open_spool()
    assert kept.peek() == spans(10)
    assert len(kept) == 35


def test_spans_survive_a_kill(backend, tmp_path, open_spool):
    child = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "spool"), nowhere()],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"spooled 3000\n"
        child.send_signal(signal.SIGKILL)
    with exporting(backend.url, open_spool()) as exporter:
        wait_for(exporter, sent=3000)
    assert backend.ids() == list(range(1, 3001))


def test_a_slow_backend_fills_the_spool_and_loses_nothing(backend, open_spool):
    backend.hang.clear()
    with exporting(
        backend.url, open_spool(), batch_spans=10, queue_spans=100
    ) as exporter:
        for first in range(1, 1000, 10):
            exporter.export(spans(10, first))
            # As fast as a disk is.
            until(lambda: exporter.counters()["queued"] < 80)
        assert exporter.counters()["dropped"] == 0
        # Also the batch that the backend has in hand: it may yet fail.
        wait_for(exporter, spool_spans=1000)
        backend.hang.set()
        wait_for(exporter, sent=1000, spool_spans=0)
    assert backend.ids() == list(range(1, 1001))


def test_a_batch_that_moved_to_the_spool_and_fails_then_is_sent_from_there(
    backend, open_spool
):
    backend.hang.clear()
    backend.replies = [Reply(503)]
    with exporting(
        backend.url, open_spool(), batch_spans=10, queue_spans=30
    ) as exporter:
        exporter.export(spans(10))
        backend.wait(lambda: backend.requests)
        exporter.export(spans(20, 11))
        wait_for(exporter, spool_spans=30)
        backend.hang.set()
        wait_for(exporter, sent=30, spool_spans=0)
    assert backend.ids() == list(range(1, 31))


def test_a_half_that_arrived_is_not_sent_again_from_the_spool(backend, open_spool):
    backend.replies = [Reply(413), Reply(202), Reply(503), Reply(503)]
    with exporting(backend.url, open_spool()) as exporter:
        exporter.export(spans(10))
        wait_for(exporter, sent=10, spool_spans=0)
    assert backend.ids() == list(range(1, 11))


class BadDisk(Spool):
    """Takes nothing while it is full, and nobody's time but its caller's."""

    full: bool | int = False  # a number: for so many batches
    refused = 0
    asked = 0

    def __init__(self, *args, **options):
        self.quick = threading.Event()
        self.quick.set()
        super().__init__(*args, **options)

    def append(self, spans):
        self.asked += 1
        self.quick.wait(PATIENCE_S)
        if self.full:
            self.refused += 1
            if self.full is not True:
                self.full -= 1
            return False
        return super().append(spans)


def test_without_room_on_the_disk_spans_wait_in_memory(
    backend, open_spool, monkeypatch
):
    monkeypatch.setattr(delivery, "SPOOL_AGAIN_S", 0.01)
    backend.usual = Reply(503)
    spool = open_spool(cls=BadDisk)
    spool.full = True
    with exporting(backend.url, spool, batch_spans=10, queue_spans=50) as exporter:
        exporter.export(spans(10))
        until(lambda: spool.refused)
        exporter.export(spans(100, 11))
        assert exporter.counters()["dropped"] == 50
        spool.full = False
        wait_for(exporter, spool_spans=60, queued=0)
        spool.full = True
        exporter.export(spans(40, 111))
        refused = spool.refused
        until(lambda: spool.refused > refused + 1)
        wait_for(exporter, queued=40)
        assert fates(exporter.counters()) == 150
        spool.full = False
        wait_for(exporter, spool_spans=100, queued=0)
        backend.usual = Reply()
        wait_for(exporter, sent=100)
    assert backend.ids() == [*range(1, 11), *range(61, 151)]


def test_a_slow_disk_keeps_the_order_and_holds_up_nobody(backend, open_spool):
    backend.usual = Reply(503)
    spool = open_spool(cls=BadDisk)
    with exporting(backend.url, spool, batch_spans=10) as exporter:
        exporter.export(spans(10))
        wait_for(exporter, spool_spans=10)
        spool.quick.clear()
        asked = spool.asked
        exporter.export(spans(10, 11))
        until(lambda: spool.asked > asked)
        backend.usual = Reply()
        wait_for(exporter, sent=10)
        # What the disk has not yet written is older than this.
        exporter.export(spans(10, 21))
        with backend.changed:
            assert not backend.changed.wait_for(lambda: len(backend.ids()) > 10, 0.1)
        spool.quick.set()
        wait_for(exporter, sent=30)
    assert backend.ids() == list(range(1, 31))


def test_what_the_disk_refuses_once_keeps_its_place(backend, open_spool, monkeypatch):
    monkeypatch.setattr(delivery, "SPOOL_AGAIN_S", 0.01)
    backend.usual = Reply(503)
    spool = open_spool(cls=BadDisk)
    with exporting(backend.url, spool, batch_spans=10) as exporter:
        exporter.export(spans(10))
        wait_for(exporter, spool_spans=10)
        spool.full = 1
        exporter.export(spans(20, 11))
        wait_for(exporter, spool_spans=30)
        assert spool.refused == 1
        backend.usual = Reply()
        wait_for(exporter, sent=30)
    assert backend.ids() == list(range(1, 31))


def test_what_is_answered_while_it_goes_to_the_spool_is_not_sent_again(
    backend, open_spool
):
    backend.hang.clear()
    spool = open_spool(cls=BadDisk)
    with exporting(backend.url, spool, batch_spans=10, queue_spans=30) as exporter:
        exporter.export(spans(10))
        backend.wait(lambda: backend.requests)
        spool.quick.clear()
        exporter.export(spans(20, 11))
        until(lambda: spool.asked)
        backend.hang.set()
        # The answer is there, the batch is not yet on the disk.
        with backend.changed:
            assert not backend.changed.wait_for(lambda: len(backend.requests) > 1, 0.1)
        spool.quick.set()
        wait_for(exporter, sent=30, spool_spans=0)
    assert backend.ids() == list(range(1, 31))


def test_the_end_does_not_wait_for_the_spool_to_empty(backend, open_spool):
    spool = open_spool()
    for number in range(1, 501):
        assert spool.append(spans(1, number))
    exporter = make_exporter(backend.url, spool)
    exporter.close(PATIENCE_S)
    counters = exporter.counters()
    assert counters["spool_spans"] > 0
    assert counters["sent"] + counters["spool_spans"] == 500


def test_the_end_on_a_full_disk_counts_what_it_loses(backend, open_spool, caplog):
    backend.usual = Reply(503)
    spool = open_spool(cls=BadDisk)
    spool.full = True
    with exporting(backend.url, spool) as exporter:
        exporter.export(spans(7))
        backend.wait(lambda: backend.requests)
    assert exporter.counters()["failed"] == 7
    assert fates(exporter.counters()) == 7
    assert "ended with spans unsent: spans=7" in caplog.text


def test_beyond_the_spools_bound_the_oldest_go_and_are_counted(backend, open_spool):
    backend.usual = Reply(503)
    with exporting(backend.url, open_spool(200_000), batch_spans=10) as exporter:
        exporter.export(spans(1000))
        wait_for(exporter, queued=0)
        counters = exporter.counters()
        assert counters["spool_dropped"] > 100
        assert fates(counters) == 1000
        backend.usual = Reply()
        wait_for(exporter, spool_spans=0)
    counters = exporter.counters()
    assert counters["sent"] + counters["spool_dropped"] == 1000
    # The newest, after the batch in hand when the bound was reached.
    arrived = backend.ids()
    assert arrived[10:] == list(range(1011 - counters["sent"], 1001))
    assert arrived == sorted(set(arrived))


replies = st.lists(
    st.sampled_from([202, 202, 400, 401, 404, 413, 429, 500, 503]), max_size=12
)


@settings(max_examples=40, deadline=None)
@given(
    replies,
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 8),
    st.booleans(),
)
def test_whatever_is_answered_every_span_has_one_fate(
    tmp_path_factory, statuses, sizes, batch_spans, keeps
):
    backend = Backend()
    folder = tmp_path_factory.mktemp("spool")
    total = sum(sizes)

    def exporter_of():
        spool = Spool(folder, max_bytes=MEGABYTE, sync="never") if keeps else None
        return exporting(backend.url, spool, batch_spans=batch_spans, retry_s=0.03)

    try:
        backend.replies = [Reply(status) for status in statuses]
        with exporter_of() as exporter:
            first = 1
            for size in sizes:
                exporter.export(spans(size, first))
                first += size
        counters = Counter(exporter.counters())
        assert fates(counters) == total
        assert counters["dropped"] == counters["queued"] == 0
        backend.replies = []
        if keeps:
            assert counters["failed"] == 0
            with exporter_of() as exporter:
                wait_for(exporter, spool_spans=0)
            counters["sent"] += exporter.counters()["sent"]
            assert counters["sent"] + counters["refused"] == total
    finally:
        backend.stop()
    arrived = backend.ids()
    assert arrived == sorted(set(arrived))  # in order, and each of them once
    assert len(arrived) == counters["sent"]


# TLS and credentials.


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A private CA, another one, and what they have issued."""
    folder = tmp_path_factory.mktemp("authority")
    ca, other_ca = make_identity(folder, "ca"), make_identity(folder, "other-ca")
    return {
        "ca": ca,
        "other_ca": other_ca,
        "server": make_identity(folder, "server", ca),
        "other_name": make_identity(folder, "other-name", ca, "DNS:elsewhere"),
        "client": make_identity(folder, "client", ca),
        "stranger": make_identity(folder, "stranger", other_ca),
    }


@contextmanager
def https_backend(server, clients_of=None):
    backend = Backend(tls=server.server_context(clients_of))
    try:
        yield backend
    finally:
        backend.stop()


def test_a_private_ca_is_trusted_when_named(authority):
    with https_backend(authority["server"]) as backend:
        destination = Destination(backend.url, ca_file=authority["ca"].cert)
        with exporting(destination, batch_spans=1) as exporter:
            exporter.export(spans(3))
        assert backend.ids() == [1, 2, 3]
        assert len(backend.connections) == 1


@pytest.mark.parametrize(
    ("server", "ca", "error"),
    [
        ("server", "other_ca", "certificate verify failed"),
        ("server", None, "certificate verify failed"),
        ("other_name", "ca", "IP address mismatch"),
    ],
)
def test_no_span_goes_to_whom_it_does_not_trust(
    authority, open_spool, caplog, server, ca, error
):
    with https_backend(authority[server]) as backend:
        ca_file = authority[ca].cert if ca else None
        destination = Destination(backend.url, ca_file=ca_file)
        with exporting(destination, open_spool()) as exporter:
            exporter.export(spans(1))
            until(lambda: error in caplog.text)
            wait_for(exporter, spool_spans=1)
        assert not backend.requests


def test_a_client_certificate_is_shown(authority, caplog):
    with https_backend(authority["server"], authority["ca"]) as backend:
        destination = Destination(backend.url, ca_file=authority["ca"].cert)
        with exporting(destination, retry_s=0.05) as exporter:
            exporter.export(spans(1))
            wait_for(exporter, failed=1)
        client = authority["client"]
        known = replace(destination, cert_file=client.cert, key_file=client.key)
        with exporting(known) as exporter:
            exporter.export(spans(1, 2))
        assert backend.ids() == [2]


def test_certificates_are_read_again_when_they_change(authority, tmp_path, open_spool):
    cert, key = tmp_path / "cert", tmp_path / "key"

    def mount(identity):
        for source, path in ((identity.key, key), (identity.cert, cert)):
            draft = path.with_suffix(".new")
            draft.write_bytes(source.read_bytes())
            draft.rename(path)

    mount(authority["stranger"])
    with https_backend(authority["server"], authority["ca"]) as backend:
        ca_file = authority["ca"].cert
        destination = Destination(
            backend.url, ca_file=ca_file, cert_file=cert, key_file=key
        )
        with exporting(destination, open_spool()) as exporter:
            exporter.export(spans(1))
            wait_for(exporter, spool_spans=1)
            mount(authority["client"])
            wait_for(exporter, sent=1)


def test_a_token_that_is_put_right_brings_everything(backend, tmp_path, open_spool):
    token = tmp_path / "token"
    token.write_text("Authorization: Bearer old\n")
    backend.authorization = "Bearer new"
    with exporting(
        Destination(backend.url, headers_file=token, headers={"authorization": "env"}),
        open_spool(),
        batch_spans=10,
    ) as exporter:
        exporter.export(spans(30))
        wait_for(exporter, spool_spans=30)
        # Half-way through its change the file says nothing of use.
        token.write_text("nothing")
        asked = len(backend.requests)
        backend.wait(lambda: len(backend.requests) > asked + 1)
        token.write_text("Authorization: Bearer new\n")
        wait_for(exporter, sent=30)
    assert backend.ids() == list(range(1, 31))
    sent = {request.headers["authorization"] for request in backend.requests}
    assert sent == {"Bearer old", "Bearer new"}


def test_no_secret_is_in_the_log(backend, tmp_path, open_spool, caplog):
    caplog.set_level(logging.DEBUG, logger="podspan")
    headers = tmp_path / "headers"
    headers.write_text(f"Authorization: Bearer {HIDDEN}\n")
    backend.authorization = "another"  # the answer repeats the request's headers
    destination = Destination(
        f"{backend.url}?key=query-{HIDDEN}",
        headers_file=headers,
        headers={"x-key": f"user={HIDDEN}"},
    )
    with exporting(destination, open_spool()) as exporter:
        exporter.export(spans(1))
        until(lambda: "HTTP 401 no: " in caplog.text)
        headers.write_text(f"wrong {HIDDEN}")
        until(lambda: "going on as before" in caplog.text)
    assert backend.requests[0].path.endswith(HIDDEN)
    assert HIDDEN not in caplog.text


def test_no_part_of_a_long_secret_is_in_the_log(backend, caplog):
    token = "".join(f"{number:04x}" for number in range(500))
    backend.usual = Reply(401, f"invalid token: {token}, key a/{HIDDEN}".encode())
    destination = Destination(
        f"{backend.url}?tenant=1&key=a%2F{HIDDEN}",
        headers={"authorization": f"Bearer {token}"},
    )
    with exporting(destination, retry_s=0.05) as exporter:
        exporter.export(spans(1))
        wait_for(exporter, failed=1)
    assert "HTTP 401 invalid token: ..., key ..." in caplog.text
    assert token[:16] not in caplog.text
    assert HIDDEN not in caplog.text


if __name__ == "__main__":  # the process that is killed
    folder, url = sys.argv[1:]
    killed = BackendExporter(
        "zipkin",
        ZipkinEncoder(),
        Destination(url),
        Spool(Path(folder), max_bytes=64 * MEGABYTE, sync="never"),
        batch_delay_s=0.01,
    )
    killed.export(spans(3000))
    until(lambda: killed.counters()["spool_spans"] == 3000)
    print("spooled 3000", flush=True)
    time.sleep(PATIENCE_S)
