"""Nothing is lost in silence: spans + counted losses = calls made, exactly."""

import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

from vm.conftest import (
    CLIENT,
    FRONT,
    Agent,
    Request,
    Server,
    connected,
    head_of,
    read_response,
    serving,
    wait_for,
)

# The ring holds some 11,000 records; a call leaves two.
CALLS = 7000
CONNECTIONS = 16


def ab(server: Server, calls: int, *options: str) -> None:
    """ApacheBench makes exactly as many calls as it is told."""
    command = shutil.which("ab")
    assert command, "ab is missing: make setup (apache2-utils)"
    url = f"http://{server.address}:{server.port}/overload"
    argv = [command, "-q", "-n", str(calls), "-c", str(CONNECTIONS), *options, url]
    done = subprocess.run(
        CLIENT.command(*argv), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"Complete requests: +{calls}\n", done.stdout), done.stdout
    assert "Failed requests:        0" in done.stdout


def losses_of(agent: Agent) -> dict[str, int]:
    """What the agent said it lost altogether, when it ended."""
    lines = [line for line in agent.log().splitlines() if "lost altogether: " in line]
    assert lines, "nothing was lost"
    pairs = re.findall(r"(\w+)=(\d+)", lines[-1].partition("lost altogether: ")[2])
    return {reason: int(count) for reason, count in pairs}


def spans_by_end(agent: Agent) -> dict[str, int]:
    ours = [
        s for s in agent.all_spans() if "/overload" in s["tags"].get("http.url", "")
    ]
    return {
        kind: sum(span["kind"] == kind for span in ours)
        for kind in ("CLIENT", "SERVER")
    }


def test_an_agent_that_does_not_come_to_reading_counts_what_it_misses(
    agent: Agent,
) -> None:
    def answer(request: Request) -> bytes:
        # ab goes on only where it is told that it may.
        return b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n"

    with serving(FRONT, answer) as server:
        assert agent.process is not None
        agent.process.send_signal(signal.SIGSTOP)
        try:
            ab(server, CALLS, "-k")
        finally:
            agent.process.send_signal(signal.SIGCONT)
        # Before there is room in the ring, the marker's records would be lost as well.
        wait_for(lambda: sum(spans_by_end(agent).values()) > 0, "reading goes on")
        agent.spans_of("/overload", server)
        served = sum(r.path == "/overload" for r in server.requests)
        agent.stop()
    ends = spans_by_end(agent)
    losses = losses_of(agent)
    assert served == CALLS
    assert losses["ring_full"] > 0
    assert sum(ends.values()) + losses["ring_full"] == 2 * CALLS, (ends, losses)


def test_connections_that_find_no_room_are_counted(session_agent: Agent) -> None:
    """A connection a call: each that has no entry costs one span at its end.

    ApacheBench would not do: near its end it begins more connections than there are
    calls left to make, and leaves them unused.
    """
    calls, agent = 500, session_agent
    agent.stop()
    agent.start("--max-connections", "8")
    try:
        with serving(FRONT) as server:
            head = head_of(server, "/overload", "connection: close")

            def call() -> None:
                with connected(server) as sock:
                    sock.sendall(head)
                    assert read_response(sock).startswith(b"HTTP/1.1 200 ")

            with ThreadPoolExecutor(CONNECTIONS) as pool:
                for done in [pool.submit(call) for _ in range(calls)]:
                    done.result()
            served = sum(r.path == "/overload" for r in server.requests)
    finally:
        agent.stop()
    ends = spans_by_end(agent)
    losses = losses_of(agent)
    assert served == calls
    assert losses["connections_full"] > 0
    assert sum(ends.values()) + losses["connections_full"] == 2 * calls, (ends, losses)
