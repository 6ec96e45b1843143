"""Backends as processes: started on free ports, asked until they answer, ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import installed

START_S = 120.0
WAIT_S = 30.0

# A span as Zipkin's API has it.
Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A process that answers HTTP."""

    url: str  # of its API
    ports: Mapping[str, int]

    def get(self, path: str, **query: Any) -> Any:
        """Return the JSON of an answer; raise HTTPError of an error."""
        text = urllib.parse.urlencode(query)
        with urllib.request.urlopen(
            f"{self.url}{path}{'?' if text else ''}{text}"
        ) as answer:
            return json.load(answer)

    def port(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"


def wait_for(
    condition: Callable[[], Any], what: str, deadline_s: float = WAIT_S
) -> Any:
    """Return what the condition gives once that is true."""
    until_s = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < until_s, f"not within {deadline_s} s: {what}"
        time.sleep(0.1)
    return found


@contextmanager
def zipkin(folder: Path) -> Iterator[Server]:
    """The real Zipkin, with its memory storage."""
    jar = installed.zipkin_jar()
    port = free_port()
    environment = {"QUERY_PORT": str(port), "STORAGE_TYPE": "mem"}
    command = ["java", "-Xmx400m", "-XX:TieredStopAtLevel=1", "-jar", str(jar)]
    with _running(command, folder / "zipkin.log", f"{port}/health", environment):
        yield Server(f"http://127.0.0.1:{port}", {"zipkin": port})


@contextmanager
def jaeger(folder: Path) -> Iterator[Server]:
    """The real Jaeger, all in one, with its memory storage."""
    program = installed.jaeger()
    names = ("query", "query_grpc", "otlp", "zipkin", "health")
    ports = {name: free_port() for name in names}
    at = {name: {"endpoint": f"127.0.0.1:{port}"} for name, port in ports.items()}
    config = {
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query", "healthcheckv2"],
            "pipelines": {
                "traces": {
                    "receivers": ["otlp", "zipkin"],
                    "exporters": ["jaeger_storage_exporter"],
                }
            },
            "telemetry": {"metrics": {"level": "none"}},
        },
        "extensions": {
            "jaeger_query": {
                "storage": {"traces": "memory"},
                "http": at["query"],
                "grpc": at["query_grpc"],
            },
            "jaeger_storage": {
                "backends": {"memory": {"memory": {"max_traces": 1000}}}
            },
            "healthcheckv2": {"use_v2": True, "http": at["health"]},
        },
        "receivers": {
            "otlp": {"protocols": {"http": at["otlp"]}},
            "zipkin": at["zipkin"],
        },
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
    }
    path = folder / "jaeger.json"  # JSON is YAML
    path.write_text(json.dumps(config))
    command = [str(program), "--config", f"file:{path}"]
    with _running(command, folder / "jaeger.log", f"{ports['health']}/status", {}):
        yield Server(f"http://127.0.0.1:{ports['query']}", ports)


@contextmanager
def store(folder: Path) -> Iterator[Server]:
    """Our own."""
    port = free_port()
    command = [sys.executable, "-m", "podspan.agent", "store"]
    command += ["--listen", f"127.0.0.1:{port}", "--data", str(folder / "traces.db")]
    with _running(command, folder / "store.log", f"{port}/health", {}):
        yield Server(f"http://127.0.0.1:{port}", {"zipkin": port})


@contextmanager
def _running(
    command: list[str], log: Path, health: str, environment: Mapping[str, str]
) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, f"it ended: {log.read_text()[-2000:]}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{health}", timeout=5):
                    return True
            except (urllib.error.URLError, OSError):
                return False

        wait_for(answers, f"{command[0]} answers on {health}", START_S)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
