"""What a span costs the store's server: `pytest -s tests/bench/test_store_http.py`.

Messages of 1000 spans over loopback, one after the other and from four senders, with
gzip and without. Time is that of this process's CPU as well, senders included.
"""

import gzip
import http.client
import itertools
import threading
import time

import orjson
from bench.traces import traces
from podspan.agent.store.zipkin_v2 import parse_json
from unit.store_server import running_store

MESSAGES = 40
SPANS = 1000


def messages():
    spans = itertools.chain.from_iterable(traces(MESSAGES * SPANS // 8))
    for _ in range(MESSAGES):
        yield orjson.dumps(list(itertools.islice(spans, SPANS)))


def test_a_span_is_parsed_and_stored(tmp_path):
    bodies = list(messages())
    print(f"\n{len(bodies[0]) / SPANS:.0f} bytes a span")
    cost("parse", lambda: [parse_json(body) for body in bodies])
    packed = [gzip.compress(body, 1) for body in bodies]
    for senders in (1, 4):
        for name, sent in (("plain", bodies), ("gzip", packed)):
            folder = tmp_path / f"{name}-{senders}"
            folder.mkdir()
            with running_store(folder) as store:
                label = f"{name}, {senders} at once"
                cost(label, lambda: send(store.port, sent, name, senders))  # noqa: B023


def cost(what, work):
    clock_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    clock_s, cpu_s = time.perf_counter() - clock_s, time.process_time() - cpu_s
    count = MESSAGES * SPANS
    print(
        f"{what:20}{cpu_s / count * 1e6:6.1f} us of CPU a span,"
        f" {count / clock_s:8.0f} spans a second"
    )


def send(port, bodies, form, senders):
    headers = {"Content-Type": "application/json"}
    if form == "gzip":
        headers["Content-Encoding"] = "gzip"

    def run(share):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for body in share:
            connection.request("POST", "/api/v2/spans", body, headers)
            with connection.getresponse() as response:
                response.read()
                assert response.status == 202
        connection.close()

    threads = [
        threading.Thread(target=run, args=(bodies[n::senders],)) for n in range(senders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
