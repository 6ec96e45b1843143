"""A process that uses a spool until it is killed, and reports each step once done.

Arguments: the folder, the policy of fsync, the number of the first batch. Batches have
the size that their number gives, so that records end anywhere in a page.
"""

import os
import sys
from itertools import count
from pathlib import Path

from podspan.agent.errors import ExportError
from podspan.agent.export.spool import Spool
from podspan.agent.span import Endpoint, Span

MAX_BYTES = 1 << 20
IN_USE = "in-use"


def batch(number):
    here, there = Endpoint("here", "10.0.0.1", 1), Endpoint("there", "10.0.0.2", 2)
    span = Span("1", f"{number:x}", "", "CLIENT", "", number, 1, here, there, False, {})
    return [span] * (1 + number % 7)


def report(*words):
    # One write of less than PIPE_BUF: whole, or not there.
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def main(folder, sync, first):
    try:
        spool = Spool(Path(folder), max_bytes=MAX_BYTES, sync=sync)
    except ExportError:
        report(IN_USE)
        return
    report("opened")
    for number in count(int(first)):
        assert spool.append(batch(number))
        report("appended", number)
        # Slower than the writer, and at times the whole backlog.
        for _ in range(100 if number % 50 == 0 else number % 2):
            if spans := spool.peek():
                report("delivered", spans[0].timestamp_us)
                spool.ack()
                report("acknowledged", spans[0].timestamp_us)


if __name__ == "__main__":
    main(*sys.argv[1:])
