"""How long `podspan replay` takes for a capture of 100 MB, and how much memory.

pytest -s tests/bench/test_replay.py prints it. The captures: small calls whose packets
are as small as HTTP's get, with acknowledgements between; and downloads of 100 kB.
"""

import resource
import subprocess
import sys

import pytest
from unit.replay_wire import (
    B3,
    START_NS,
    Talk,
    captured,
    pcapng_bytes,
    request,
    response,
)

SIZE = 100_000_000
PROGRAM = """
import sys
from pathlib import Path
from podspan.agent.replay.command import main
main(sys.argv[1:])
# getrusage(2) would count what this process was before exec(2).
status = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
print(int(status["VmHWM"].split()[0]) >> 10)
"""
CONNECTIONS = 50

COOKIE = b"Cookie: " + b"c" * 300 + b"\r\n"
KINDS = {
    "small calls": (request("/reviews/7", more=B3), response(body=b"x" * 40)),
    "usual calls": (
        request("/reviews/7", more=B3 + COOKIE),
        response(body=b"x" * 2000),
    ),
    "downloads": (request("/big", more=B3), response(body=b"x" * 100_000)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_replay_of_100_mb(kind, tmp_path):
    asked, answered = KINDS[kind]
    path = tmp_path / "capture"
    packets = write(path, asked, answered)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), "--json", str(tmp_path / "spans")],
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"\n{kind}: {path.stat().st_size / 1e6:.0f} MB, {cpu_s:.1f} s of CPU, "
        f"{cpu_s / packets * 1e6:.1f} us a packet, at most {done.stdout.strip()} MB"
        f"\n{done.stderr.strip()}"
    )


def write(path, asked, answered):
    """Write SIZE bytes of keep-alive connections, and return how many packets."""
    written = count = serial = 0
    at_ns = START_NS
    with path.open("wb") as file:
        while written < SIZE:
            talks = []
            for port in range(CONNECTIONS):
                serial += 1
                talk = Talk(
                    ("10.0.0.1", 40000 + port), isn=(serial, ~serial), at_ns=at_ns
                )
                talk.handshake()
                for _ in range(20):
                    talk.exchange(asked, answered)
                talks.append(talk.bye())
            at_ns = max(talk.at_ns for talk in talks)
            packets = captured(*talks)
            data = pcapng_bytes(packets)
            written += file.write(data)
            count += len(packets)
    return count
