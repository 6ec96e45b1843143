"""What exporting costs: `pytest -s tests/bench/test_export.py`.

Spans encoded per second of CPU, by encoder. And ten minutes without a backend, at 1000
spans a second: all through the real exporter and its spool, as fast as it goes; then
the backend is there, and not one may be missing or come twice.
"""

import gzip
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import orjson
import pytest
from podspan.agent.exchange import Exchange
from podspan.agent.export.delivery import BackendExporter
from podspan.agent.export.destination import Destination
from podspan.agent.export.encoder import Encoder
from podspan.agent.export.otlp import OtlpEncoder
from podspan.agent.export.spool import SYNCS, Spool
from podspan.agent.export.zipkin import ZipkinEncoder
from podspan.agent.pods.pod import pod_of
from podspan.agent.span import SpanOptions, span_of
from unit.kernel_struct import exchange_record

ROUNDS = 5
SPANS = 20_000
BATCH = 1000

OUTAGE_SPANS = 600_000
PATIENCE_S = 300.0

POD = pod_of(
    {
        "metadata": {
            "uid": "0b9f6c7e-6a44-4f0e-9c3d-1a2b3c4d5e6f",
            "name": "reviews-v2-7d9c5b6f4-x2x9z",
            "namespace": "shop",
            "labels": {"app": "reviews", "version": "v2"},
        },
        "status": {"podIPs": [{"ip": "10.1.0.2"}]},
    }
)


def busy_nodes_spans(count, tags="istio"):
    """Return spans as a node makes them: few services, no two times alike."""
    chance = random.Random(1)
    made = []
    for number in range(1, count + 1):
        start_ns = 5_000_000_000 + number * 50_000
        asked_ns = start_ns + chance.randrange(100_000)
        answered_ns = asked_ns + chance.randrange(20_000_000)
        server = number % 2
        there = 1024 + chance.randrange(60_000)
        record = exchange_record(
            span_id=number,
            parent_id=number + 1,
            trace_id_low=chance.getrandbits(64) | 1,
            role=1 + server,
            link=1 + server,
            request_first_ns=start_ns,
            request_last_ns=asked_ns,
            response_first_ns=answered_ns,
            response_last_ns=answered_ns + chance.randrange(1_000_000),
            local_port=9080 if server else there,
            peer_port=there if server else 9080,
            response_bytes=chance.randrange(5000),
            target=b"/details/%d?u=1" % chance.randrange(500),
            request_id=b"%08x-0f5a-4f0e-9c3d-1a2b3c4d5e6f" % chance.getrandbits(32),
        )
        exchange = Exchange.from_kernel(record)
        options = SpanOptions(tags)
        made.append(span_of(exchange, "reviews.shop", 10**18, options, POD))
    return made


@pytest.mark.parametrize("tags", ["istio", "otel"])
def test_spans_encoded_per_second(tags):
    spans = busy_nodes_spans(SPANS, tags)
    encoders: dict[str, Encoder] = {
        "zipkin": ZipkinEncoder(),
        "otlp protobuf": OtlpEncoder(),
        "otlp protobuf, shared ids": OtlpEncoder(shared_ids=True),
        "otlp json": OtlpEncoder("json"),
    }
    best = dict.fromkeys(encoders, 0.0)
    size = {}
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            started_s = time.process_time()
            lots = [
                encoder.encode(spans[first : first + BATCH])
                for first in range(0, SPANS, BATCH)
            ]
            best[name] = max(best[name], SPANS / (time.process_time() - started_s))
            size[name] = sum(map(len, lots)) // SPANS
    print(
        f"\n{tags}, {len(spans[0].tags)} tags: spans per second of CPU, and bytes each"
    )
    for name, per_s in best.items():
        print(f"  {name}: {per_s:,.0f}, {size[name]}")


@pytest.mark.parametrize("sync", SYNCS)
def test_ten_minutes_without_a_backend(tmp_path, sync):
    lot = busy_nodes_spans(BATCH)
    ids = itertools.count(1)
    port = free_port()
    exporter = BackendExporter(
        "zipkin",
        ZipkinEncoder(),
        Destination(f"http://127.0.0.1:{port}/api/v2/spans"),
        Spool(tmp_path / "spool", max_bytes=4 * 1024**3, sync=sync),
        max_backoff_s=0.1,
    )

    started_s = time.monotonic()
    for _ in range(OUTAGE_SPANS // BATCH):
        exporter.export([replace(span, span_id=f"{next(ids):016x}") for span in lot])
        until(lambda: exporter.counters()["queued"] <= 2 * BATCH)
    until(lambda: exporter.counters()["queued"] == 0)
    down_s = time.monotonic() - started_s
    size = exporter.counters()["spool_bytes"]

    started_s = time.monotonic()
    command = [sys.executable, __file__, str(port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    ) as backend:
        try:
            until(lambda: exporter.counters()["sent"] == OUTAGE_SPANS)
            up_s = time.monotonic() - started_s
        finally:
            exporter.close(10)
            backend.terminate()
        assert backend.stdout is not None
        answer = backend.stdout.read()

    counters = exporter.counters()
    assert counters["dropped"] == counters["failed"] == counters["spool_dropped"] == 0
    assert answer == f"{OUTAGE_SPANS} in order\n"
    print(
        f"\nfsync {sync}: {OUTAGE_SPANS:,} spans, {size >> 20} MB, to disk in "
        f"{down_s:.1f} s, {OUTAGE_SPANS / down_s:,.0f} a second; sent from there in "
        f"{up_s:.1f} s, {OUTAGE_SPANS / up_s:,.0f} a second"
    )


def until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port):
    """Be a Zipkin server that remembers ids; at SIGTERM tell how many came in order."""
    seen = itertools.count(1)
    in_order = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            nonlocal in_order
            body = self.rfile.read(int(self.headers["content-length"]))
            for span in orjson.loads(gzip.decompress(body)):
                in_order += int(span["id"], 16) == next(seen)
            self.send_response(202)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    def end(*_):
        print(f"{in_order} in order", flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
