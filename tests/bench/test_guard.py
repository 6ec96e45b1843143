"""What the redirect guard costs a connection: `pytest -s tests/bench/test_guard.py`.

Connections per second of CPU as ratios of those without rules, in turns in one run:
with rules that end before the guard is asked, and with a guard that says no. What the
first cost is the nat table's and connection tracking's. And the guard's own time by
the kernel's count.
"""

import os
import socket
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

from netns.conftest import bpffs, pin_dir, two_ns_veth  # noqa: F401
from netns.redirect_pods import NEVER_STALE_NS, init_apply, inode, podspan
from podspan.agent.kernel import syscall
from podspan.agent.kernel.guard import Guard, Want

ROUNDS = 7
CONNECTIONS = 1000
STATS_ENABLED = Path("/proc/sys/kernel/bpf_stats_enabled")


def test_what_the_guard_costs_a_connection(two_ns_veth, pin_dir):  # noqa: F811
    client, server = two_ns_veth
    guard = Guard.open(pin_dir, grace_ns=NEVER_STALE_NS)
    guard.beat(time.monotonic_ns())
    # The dearest answer: neither this port nor every port.
    guard.want(inode(client), [Want(inbound=False, port=1)])
    with server.inside():
        listener = socket.create_server((server.ipv4, 8080))
    with listener, client.inside():
        ratios: dict[str, list[float]] = {"rules": [], "guard": []}
        for _ in range(ROUNDS):
            podspan(client, "init", "clean")
            without = connections_per_s(listener)
            init_apply(client, guard, "-x", server.ipv4)
            ratios["rules"].append(connections_per_s(listener) / without)
            init_apply(client, guard)
            ratios["guard"].append(connections_per_s(listener) / without)
        with counting(guard) as count:
            connections_per_s(listener)
    guard.close()

    print(f"\nconnections: {without:.0f} per second of CPU without rules; of that")
    for name, values in ratios.items():
        middle = statistics.median(values)
        print(f"  {name}: {middle:.3f} ({min(values):.3f} to {max(values):.3f})")
    print(
        f"guard: {count['ns'] / count['runs']:.0f} ns in each of {count['runs']} runs"
    )


def connections_per_s(listener):
    begun_s = time.process_time()
    for _ in range(CONNECTIONS):
        with socket.create_connection(listener.getsockname()):
            # The server's end closes first: the client's ports are free at once.
            listener.accept()[0].close()
    return CONNECTIONS / (time.process_time() - begun_s)


@contextmanager
def counting(guard):
    """Yield a dictionary that gets the guard's runs and nanoseconds of the block."""
    before = STATS_ENABLED.read_text()
    fd = syscall.obj_get(guard.path)
    count: dict[str, int] = {}
    STATS_ENABLED.write_text("1")
    try:
        yield count
        info = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
        count["ns"] = int(info[info.index("run_time_ns:") + 1])
        count["runs"] = int(info[info.index("run_cnt:") + 1])
    finally:
        STATS_ENABLED.write_text(before)
        os.close(fd)
