"""Real runtimes on both ends: what they send and receive is their own affair."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm.conftest import CLIENT, FRONT, Agent, Server, serving

PROGRAMS = Path(__file__).parent / "clients"

# Command, the Debian package that has it.
RUNTIMES = {
    "node": ("node", "echo.js", "nodejs"),
    "ruby": ("ruby", "echo.rb", "ruby"),
    "java": ("java", "Echo.java", "default-jdk-headless"),
}

# Path, method, bytes of the body.
CALLS = {"get": ("GET", 0), "post": ("POST", 100_000), "chunked": ("PUT", 5000)}


def command_of(runtime: str, *argv: str) -> list[str]:
    program, source, package = RUNTIMES[runtime]
    path = shutil.which(program)
    assert path, f"{program} is missing: make setup ({package})"
    return [path, str(PROGRAMS / source), *argv]


@contextmanager
def served_by(runtime: str) -> Iterator[Server]:
    command = FRONT.command(*command_of(runtime, "server", FRONT.ipv4))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(FRONT, FRONT.ipv4, int(process.stdout.readline()))
        finally:
            process.kill()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_at_both_ends(agent: Agent, runtime: str) -> None:
    with served_by(runtime) as server:
        argv = command_of(runtime, "client", server.address, str(server.port))
        done = subprocess.run(
            CLIENT.command(*argv), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        answers = [line.split() for line in done.stdout.splitlines()]
        with serving(FRONT) as marker:
            spans = agent.spans_of(f":{server.port}/client/", marker)
    assert len(spans) == 2 * len(CALLS), spans
    for (name, (method, size)), answer in zip(CALLS.items(), answers, strict=True):
        both = [s for s in spans if s["tags"]["http.url"].endswith(f"/client/{name}")]
        assert {s["kind"] for s in both} == {"CLIENT", "SERVER"}
        assert {s["id"] for s in both} == {answer[0]}, "the id that the server saw"
        assert answer[1] == str(size)
        for span in both:
            assert span["tags"]["http.method"] == method
            assert span["tags"]["http.status_code"] == "200"
            assert span["tags"]["request_size"] == str(size), span
            assert "podspan.end" not in span["tags"]
            assert "error" not in span["tags"]
