"""Connections that are older than the agent: made before it, or under another one."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vm.conftest import (
    BACK,
    CLIENT,
    FRONT,
    Agent,
    Request,
    Server,
    fetch,
    head_of,
    read_response,
    serving,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

# A process in the pod, as an application is: only such a one's sockets can be enrolled.
CALLER = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print("connected", flush=True)
for line in sys.stdin:
    sock.sendall(line.rstrip("\\n").encode().decode("unicode_escape").encode())
    print(sock.recv(65536).split(b"\\r\\n")[0].decode(), flush=True)
"""


class Caller:
    """A client process with one connection, which calls when it is told to."""

    def __init__(self, process: "subprocess.Popen[str]", server: Server) -> None:
        self._process = process
        self._server = server

    def call(self, path: str) -> str:
        return self.say(head_of(self._server, path).decode())

    def say(self, text: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(text.encode("unicode_escape").decode() + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().rstrip()


@contextmanager
def calling(server: Server) -> Iterator[Caller]:
    command = CLIENT.command(
        sys.executable, "-c", CALLER, server.address, str(server.port)
    )
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        yield Caller(process, server)
        assert process.stdin is not None
        process.stdin.close()


def test_connections_older_than_the_agent(session_agent: Agent) -> None:
    """Observed at once; headers are written once an exchange was seen whole.

    Where a thread waited in recv(2) already when the agent came, what that call reads
    cannot be seen: the server's first exchange here.

    A second connection is found in the middle of a message: a body that looks like
    requests is not written into.
    """
    agent = session_agent
    agent.stop()
    look_alike = "GET /look-alike/9 HTTP/1.1\r\nhost: a\r\n\r\n" * 3
    with (
        serving(FRONT) as server,
        calling(server) as caller,
        calling(server) as uploader,
    ):
        assert caller.call("/before-the-agent/1") == "HTTP/1.1 200 OK"
        upload = ("expect: 100-continue", f"content-length: {len(look_alike)}")
        head = head_of(server, "/upload/1", *upload, method="POST").decode()
        assert uploader.say(head) == "HTTP/1.1 100 Continue"
        agent.start()
        for i in range(1, 5):
            assert caller.call(f"/old/{i}") == "HTTP/1.1 200 OK"
        assert uploader.say(look_alike) == "HTTP/1.1 200 OK"
        for i in range(3):
            assert uploader.call(f"/after-upload/{i}") == "HTTP/1.1 200 OK"
        spans = agent.spans_of("/old/", server)
        assert agent.spans_of("before-the-agent", server) == []
    halves = sorted((s["tags"]["http.url"][-1], s["kind"]) for s in spans)
    kinds = ("CLIENT", "SERVER")
    expected = [(n, kind) for n in "1234" for kind in kinds]
    expected.remove(("1", "SERVER"))
    assert halves == expected
    written = {r.path: r.headers.get("x-b3-spanid") for r in server.requests}
    assert written["/old/1"] is None
    for n in "234":
        both = [s for s in spans if s["tags"]["http.url"].endswith(f"/old/{n}")]
        assert {s["id"] for s in both} == {written[f"/old/{n}"]}
    (uploaded,) = [r for r in server.requests if r.path == "/upload/1"]
    assert uploaded.body.decode() == look_alike
    assert written["/after-upload/0"] is None
    assert written["/after-upload/2"] is not None


@contextmanager
def lasting_connection(server: Server) -> Iterator[socket.socket]:
    """Made in the client's pod, used from here: the agent must not start in there."""
    with CLIENT.inside():
        sock = socket.create_connection((server.address, server.port))
    with sock:
        sock.settimeout(300)
        yield sock


def test_a_call_under_way_keeps_its_trace_when_the_agent_is_killed_and_restarted(
    agent: Agent,
) -> None:
    came, go = threading.Event(), threading.Event()
    with serving(BACK) as back:

        def answer(request: Request) -> bytes:
            if request.path == "/in-flight/1":
                came.set()
                assert go.wait(300)
                fetch(back, "/in-flight-inner/1", FRONT)
            return OK

        with serving(FRONT, answer) as front, lasting_connection(front) as sock:
            sock.sendall(head_of(front, "/in-flight/1"))
            assert came.wait(60)
            agent.kill()
            agent.start()
            go.set()
            assert read_response(sock).endswith(b"ok")
            # And the connection goes on.
            sock.sendall(head_of(front, "/in-flight/2"))
            assert read_response(sock).endswith(b"ok")
            spans = agent.spans_of("/in-flight", front)
    first = [s for s in spans if s["tags"]["http.url"].endswith("/in-flight/1")]
    assert {s["kind"] for s in first} == {"CLIENT", "SERVER"}
    assert len({s["id"] for s in first}) == 1
    assert not any("podspan.end" in s["tags"] for s in first)
    (inner,) = [
        s for s in spans if "inner" in s["tags"]["http.url"] and s["kind"] == "CLIENT"
    ]
    assert inner["traceId"] == first[0]["traceId"]
    assert inner["parentId"] == first[0]["id"]
    assert inner["tags"]["podspan.link"] == "thread"
    assert "taken over from an earlier agent" in agent.log()
