"""How fast the spool is: `pytest -s tests/bench/test_spool.py`.

Batches of 1,000 realistic spans in and out again, on the disk of the temporary folder.
"""

import statistics
import time

import pytest
from podspan.agent.exchange import Exchange
from podspan.agent.export.spool import SYNCS, Spool
from podspan.agent.span import span_of
from unit.kernel_struct import exchange_record

ROUNDS = 5
BATCHES = 20
BATCH = [
    span_of(Exchange.from_kernel(exchange_record(span_id=number)), "productpage", 0)
    for number in range(1, 1001)
]


@pytest.mark.parametrize("sync", SYNCS)
def test_spans_a_second_in_and_out(tmp_path, sync):
    spool = Spool(tmp_path, max_bytes=1 << 30, sync=sync)
    rates = [
        (per_second(spool.append, BATCH), per_second(take, spool))
        for _ in range(ROUNDS)
    ]
    assert len(spool) == 0
    spool.close()
    for what, figures in zip(
        ("append", "peek+ack"), zip(*rates, strict=True), strict=True
    ):
        cpu, wall = (statistics.median(each) for each in zip(*figures, strict=True))
        print(f"\n{sync}: {what}: {cpu:,.0f} spans/s of CPU, {wall:,.0f} of the clock")


def take(spool):
    assert len(spool.peek()) == len(BATCH)
    spool.ack()


def per_second(step, argument):
    """Return spans per second of CPU, and of the clock."""
    cpu_s, wall_s = time.process_time(), time.monotonic()
    for _ in range(BATCHES):
        step(argument)
    spans = BATCHES * len(BATCH)
    return spans / (time.process_time() - cpu_s), spans / (time.monotonic() - wall_s)
