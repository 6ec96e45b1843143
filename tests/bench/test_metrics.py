"""What counting an exchange costs, and telling of all that was counted.

Time is this thread's on a CPU, so that others on the machine disturb less.
"""

import random
import time
import tracemalloc
from dataclasses import replace

from podspan.agent.istio_metrics import MAX_SERIES, RequestMetrics
from podspan.agent.metrics import Format, exposition
from podspan.agent.pods.names import ServiceNames
from podspan.agent.status import _packed, _pieces
from unit.test_istio_metrics import client, connection, server
from unit.test_workloads import of_pod

CALLS = 20_000
ROUNDS = 7
PODS = {
    4026532000 + n: of_pod(f"app{n}", f"10.1.0.{n}") for n in range(1, 111)
}  # as many as a node may have by default


def request_metrics(tmp_path):
    return RequestMetrics(ServiceNames(tmp_path / "none", pods_by_netns=lambda: PODS))


def test_observing(tmp_path):
    kinds = {
        "client, sampled": client(netns=4026532001),
        "client, unsampled": client(netns=4026532001, flags=0),
        "server, sampled": server(netns=4026532002),
        "TCP": connection(netns=4026532001),
    }
    for what, exchange in kinds.items():
        observe = request_metrics(tmp_path).observe
        times_us = []
        for _ in range(ROUNDS):
            start_ns = time.thread_time_ns()
            for _ in range(CALLS):
                observe(exchange)
            times_us.append((time.thread_time_ns() - start_ns) / 1000 / CALLS)
        print(f"{what}: {sorted(times_us)[ROUNDS // 2]:.2f} us")


def test_as_many_series_as_there_may_be(tmp_path):
    tracemalloc.start()
    requests = request_metrics(tmp_path)
    for exchange in exchanges(2 * MAX_SERIES):
        requests.observe(exchange)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{requests.losses()} of {2 * MAX_SERIES} exchanges")
    print(f"{MAX_SERIES} series: {size / 1e6:.1f} MB")
    for form in Format:
        start_s = time.thread_time()
        packed = sum(map(len, _packed(_pieces(exposition(requests.families(), form)))))
        told_s = time.thread_time() - start_s
        text = sum(map(len, exposition(requests.families(), form)))
        print(
            f"{form.name}: {text / 1e6:.0f} MB of text, {packed / 1e6:.1f} MB packed, "
            f"in {told_s:.1f} s"
        )


def exchanges(count):
    """Yield calls between all pods, with durations, sizes and codes of all kinds."""
    chance = random.Random(1)
    one = client()
    for _ in range(count):
        own, peer = chance.sample(range(1, 111), 2)
        took_ns = int(chance.lognormvariate(16, 2))
        yield replace(
            one,
            netns=4026532000 + own,
            peer_addr=f"10.1.0.{peer}",
            host=f"app{peer}",
            status=chance.choice((200, 404, 503)),
            request_bytes=chance.randrange(10**6),
            response_last_ns=one.request_first_ns + took_ns,
        )
