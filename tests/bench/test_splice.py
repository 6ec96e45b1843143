"""What a redirected opaque stream costs: `pytest -s tests/bench/test_splice.py`.

The relay as it is, which copies, against the same stream carried by sockmap
(netns/splice.c) and by splice(2) through a pipe, all over loopback, in turns in one
run. CPU is the relay's, both ends' and that of all kernel threads, as these do
sockmap's work.
"""

import fcntl
import os
import select
import signal
import socket
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from netns.conftest import one_ns  # noqa: F401
from netns.splicing import Splicer, relayed
from podspan.agent.redirect.loop import Loop
from podspan.agent.redirect.relay import READ_MAX, Relay, Shared

ROUNDS = 11
STREAM = 512 << 20
MESSAGES = 4000
MESSAGE = bytes(100)
TIMEOUT_S = 60.0
KTHREADD = 2  # parent of the kernel's threads, which empty the lists of sockmap


def test_what_an_opaque_stream_costs(one_ns):  # noqa: F811
    splicer = Splicer()
    ways = {
        "direct": direct,
        "copy": copied,
        "splice(2)": piped,
        "sockmap": lambda: spliced(splicer),
    }
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    with one_ns.inside():
        for _ in range(ROUNDS):
            for name, way in ways.items():
                figures[name].append((*bulk(way), *ping_pong(way)))
    splicer.close()

    print("\nmedian (ratio to copying: its median, lowest, highest)")
    for name, rows in figures.items():
        print(f"  {name}")
        for column, unit in enumerate(("GB/s", "CPU s/GB", "us", "CPU us")):
            values = [row[column] for row in rows]
            ratios = [
                row[column] / copy[column]
                for row, copy in zip(rows, figures["copy"], strict=True)
            ]
            print(
                f"    {statistics.median(values):8.2f} {unit:8} "
                f"({statistics.median(ratios):.2f} {min(ratios):.2f} {max(ratios):.2f})"
            )


def bulk(way):
    """Return gigabytes per second, and seconds of CPU per gigabyte."""

    def send():
        for _ in range(STREAM // READ_MAX):
            client.sendall(piece)

    piece = bytes(READ_MAX)
    with way() as (client, server), child(send):
        buffer = memoryview(bytearray(READ_MAX))
        with clocks() as spent:
            left = STREAM
            while left:
                left -= server.recv_into(buffer)
    return STREAM / 1e9 / spent["s"], spent["cpu_s"] / (STREAM / 1e9)


def ping_pong(way):
    """Return microseconds, and those of CPU, of a message there and back."""

    def answer():
        while message := server.recv(len(MESSAGE)):
            server.sendall(message)

    with way() as (client, server), child(answer), clocks() as spent:
        for _ in range(MESSAGES):
            client.sendall(MESSAGE)
            client.recv(len(MESSAGE))
    return spent["s"] * 1e6 / MESSAGES, spent["cpu_s"] * 1e6 / MESSAGES


@contextmanager
def clocks():
    """Yield a dictionary that gets the block's seconds, and the machine's CPU's."""
    spent: dict[str, float] = {}
    begun_s, begun_cpu_s = time.monotonic(), busy_s()
    yield spent
    spent["s"] = time.monotonic() - begun_s
    spent["cpu_s"] = busy_s() - begun_cpu_s


def busy_s():
    """CPU time of this process, its children and the kernel's threads."""
    pids = [os.getpid(), *children(os.getpid()), *children(KTHREADD)]
    return sum(map(busy_ns, pids)) / 1e9


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def busy_ns(pid):
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0  # a kernel thread that has ended meanwhile


@contextmanager
def child(run):
    """Let another process run it, at most for the time of the block."""
    pid = os.fork()
    if not pid:
        try:
            run()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# Ways: context managers that yield the client's and the server's socket.


@contextmanager
def direct():
    with relayed() as (client, down, _, _):
        ready(client, down)
        yield client, down


@contextmanager
def copied():
    with (
        relayed() as (client, down, up, server),
        child(lambda: serve(down, up)),
    ):
        ready(client, server)
        yield client, server


@contextmanager
def piped():
    with (
        relayed() as (client, down, up, server),
        child(lambda: carry_by_pipes(down, up)),
    ):
        ready(client, server)
        yield client, server


@contextmanager
def spliced(splicer):
    with relayed() as (client, down, up, server):
        splicer.join(down, up)
        ready(client, server)
        yield client, server
        splicer.part(down, up)


def ready(client, server):
    """Return when a message has gone both ways."""
    for sender, receiver in ((client, server), (server, client)):
        for sock in (sender, receiver):
            sock.settimeout(TIMEOUT_S)
        sender.sendall(MESSAGE)
        receiver.recv(len(MESSAGE), socket.MSG_WAITALL)


def serve(down, up):
    """Carry by the relay of the redirect engine, for ever."""
    loop = Loop()
    down.setblocking(False)
    up.setblocking(False)
    shared = Shared(
        loop=loop,
        counters=Counter(),
        closed=lambda relay: None,
        finished=lambda relay, record: None,
        sniff_wait_s=1.0,
    )
    Relay(shared, down, up, lambda relay, spoken: None, None).start(None)
    loop.run(lambda: False)


def carry_by_pipes(down, up):
    """Carry by splice(2), for ever; a fast reader is taken for granted."""
    epoll = select.epoll()
    ways = {}
    for here, there in ((down, up), (up, down)):
        out, into = os.pipe2(os.O_NONBLOCK)
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 1 << 20)
        ways[here.fileno()] = (there.fileno(), out, into)
        epoll.register(here, select.EPOLLIN)
        here.setblocking(False)
    while True:
        for fd, _ in epoll.poll():
            there_fd, out, into = ways[fd]
            left = os.splice(fd, into, 1 << 20, flags=os.SPLICE_F_NONBLOCK)
            while left:
                try:
                    left -= os.splice(out, there_fd, left, flags=os.SPLICE_F_MOVE)
                except BlockingIOError:
                    select.select([], [there_fd], [])
