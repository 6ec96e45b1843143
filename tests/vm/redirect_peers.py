"""Pods that ran the init step, and gRPC's own client and server in them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vm.conftest import Agent, Json, Pod

PODSPAN = str(Path(sys.executable).with_name("podspan"))

SERVE = """
import sys, grpc, json
from concurrent.futures import ThreadPoolExecutor

class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.echo)

    def echo(self, request, context):
        print(json.dumps(dict(context.invocation_metadata())), flush=True)
        return request

server = grpc.server(ThreadPoolExecutor(2), handlers=(Echo(),))
print(server.add_insecure_port(sys.argv[1] + ":0"), flush=True)
server.start()
sys.stdin.read()
server.stop(0).wait()
"""
CALL = """
import sys, grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    call = channel.unary_unary("/podspan.Echo/Say")
    for word in sys.argv[2:]:
        assert call(word.encode(), timeout=60) == word.encode()
"""


def init(pod: Pod, *argv: str) -> None:
    done = subprocess.run(
        pod.command(PODSPAN, "init", *argv), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@contextmanager
def grpc_serving(pod: Pod) -> Iterator[tuple[str, IO[str]]]:
    """The server's address, and the metadata of each call it gets, a line each."""
    command = pod.command(sys.executable, "-c", SERVE, pod.ipv4)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"{pod.ipv4}:{int(process.stdout.readline())}", process.stdout
        finally:
            process.stdin.close()


def grpc_call(pod: Pod, target: str, *words: str) -> None:
    command = pod.command(sys.executable, "-c", CALL, target, *words)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def spans_of_target(agent: Agent, target: str) -> list[Json]:
    """All spans of connections to an address and port, by kind and time."""
    address, port = target.split(":")
    ends = {"CLIENT": "remoteEndpoint", "SERVER": "localEndpoint"}
    found = [
        span
        for span in agent.all_spans()
        if span[ends[span["kind"]]].get("ipv4") == address
        and span[ends[span["kind"]]]["port"] == int(port)
    ]
    return sorted(found, key=lambda span: (span["kind"], span["timestamp"]))
