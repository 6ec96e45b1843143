"""The same requests to Zipkin's own server and to the store: the same answers.

Needs java and Zipkin's executable jar: PODSPAN_ZIPKIN_JAR, else Maven's repository
(`mvn dependency:get -Dartifact=io.zipkin:zipkin-server:3.6.1:jar:slim`).
"""

import json
import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from unit.store_server import Store, running_store
from unit.test_store_zipkin_v2 import EXAMPLES, NORMALISED, REFUSED

MAVEN = Path.home() / ".m2/repository/io/zipkin/zipkin-server"
START_S = 120

# What Zipkin takes, and the store does not: a time beyond 64 bits, and digits of other
# scripts.
STRICTER = {"timestamp 9223372036854775808", "timestamp '\uff11'"}

TRACES = 300
QUERIES = 100
SERVICES = ["web", "cart", "mail", "db"]


def jar():
    named = os.environ.get("PODSPAN_ZIPKIN_JAR")
    found = [Path(named)] if named else sorted(MAVEN.glob("*/zipkin-server-*-slim.jar"))
    if not found or not found[-1].is_file():
        pytest.skip("no Zipkin to compare with: set PODSPAN_ZIPKIN_JAR")
    if not shutil.which("java"):
        pytest.skip("no Zipkin to compare with: java is not installed")
    return found[-1]


@pytest.fixture(scope="module")
def zipkin(tmp_path_factory):
    log = tmp_path_factory.mktemp("zipkin") / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["java", "-Xmx300m", "-jar", str(jar())]
    environment = {**os.environ, "QUERY_PORT": str(port)}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            server: Any = Store(port, None, None)  # type: ignore[arg-type]
            deadline_s = time.monotonic() + START_S
            while not answers(server):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()


def answers(server):
    try:
        return server.get("/health").status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def both(zipkin, tmp_path_factory):
    with running_store(tmp_path_factory.mktemp("store")) as store:
        yield zipkin, store


def stored(server, spans):
    """Send spans of one trace; return what comes back of it."""
    assert server.post(spans).status == 202
    target = f"/api/v2/trace/{spans[0]['traceId']}"
    deadline_s = time.monotonic() + 20
    while (answer := server.get(target)).status == 404:
        assert time.monotonic() < deadline_s, "not stored after 20 s"
        time.sleep(0.02)
    return answer.json


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples(both, example):
    spans = json.loads(example.read_bytes())
    theirs, ours = (stored(server, spans) for server in both)
    assert ours == theirs == spans


@pytest.mark.parametrize("number", range(len(NORMALISED)), ids=list(NORMALISED))
def test_what_is_normalised(both, number):
    sent, _ = list(NORMALISED.values())[number]
    spans = [{"traceId": f"abc{number:04x}", "id": "b", **sent}]
    theirs, ours = (stored(server, spans) for server in both)
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in STRICTER])
def test_what_is_refused(both, name):
    assert [server.post(REFUSED[name]).status for server in both] == [400, 400]


@pytest.mark.parametrize(
    "target",
    [
        "services",
        "spans",
        "spans?serviceName=",
        "remoteServices",
        "traces?limit=0",
        "traces?limit=x",
        "traces?endTs=0",
        "traces?lookback=-1",
        "traces?minDuration=0",
        "traces?maxDuration=5",
        "traces?minDuration=9&maxDuration=5",
        "traces?serviceName=%zz",
        "traces?annotationQuery=%00",
        "trace/zz",
        "trace/ffff",
        "trace/0",
        "traceMany",
        "traceMany?traceIds=a",
        "traceMany?traceIds=a,0a",
        "traceMany?traceIds=fffe,ffff",
        "dependencies",
        "dependencies?endTs=1&lookback=0",
        "autocompleteValues?key=",
        "nothing",
    ],
)
def test_statuses(both, target):
    theirs, ours = (server.get(f"/api/v2/{target}").status for server in both)
    assert ours == theirs


def random_span(chance, trace_id, at_ms):
    ids = [f"{n:x}" for n in range(1, 6)]
    made = {
        "traceId": trace_id,
        "id": chance.choice(ids),
        "name": chance.choice(["get", "post"]),
        "timestamp": at_ms * 1000 + chance.randrange(500),
        "duration": chance.choice([1, 10, 100, 1000]),
        "localEndpoint": {"serviceName": chance.choice(SERVICES)},
    }
    optional = {
        "parentId": lambda: chance.choice(ids),
        "kind": lambda: chance.choice(["CLIENT", "SERVER", "PRODUCER", "CONSUMER"]),
        "remoteEndpoint": lambda: {"serviceName": chance.choice(SERVICES)},
        "tags": lambda: {chance.choice(["error", "path"]): chance.choice(["a", "b"])},
        "shared": lambda: True,
    }
    return made | {
        key: make() for key, make in optional.items() if chance.random() < 0.6
    }


def random_query(chance, first_ms):
    query: dict[str, Any] = {
        "endTs": first_ms + chance.randrange(TRACES + 1) * 1000,
        "lookback": chance.choice([1000, 60_000, TRACES * 1000]),
        "limit": TRACES,
    }
    optional = {
        "serviceName": SERVICES,
        "remoteServiceName": SERVICES,
        "spanName": ["GET", "all", "unknown"],
        "annotationQuery": ["error", "path=a", "error and path", "error=b and path=a"],
        "minDuration": [1, 50, 1000],
    }
    for name, values in optional.items():
        if chance.random() < 0.3:
            query[name] = chance.choice(values)
    return urlencode(query)


def test_random_traces_give_the_same_links_and_the_same_search_results(both):
    chance = random.Random(7)
    first_ms = time.time_ns() // 1_000_000 - 86_400_000
    spans = [
        random_span(chance, f"{0xFEED0000 + n:x}", first_ms + n * 1000)
        for n in range(TRACES)
        for _ in range(chance.randint(1, 7))
    ]
    for server in both:
        assert server.post(spans).status == 202
        stored(server, spans[-1:])
    for n in range(TRACES):
        query = f"dependencies?endTs={first_ms + n * 1000 + 500}&lookback=500"
        theirs, ours = (links(server.get(f"/api/v2/{query}").json) for server in both)
        assert ours == theirs, [
            s for s in spans if s["traceId"] == f"{0xFEED0000 + n:x}"
        ]
    for _ in range(QUERIES):
        query = f"traces?{random_query(chance, first_ms)}"
        theirs, ours = (found(server.get(f"/api/v2/{query}").json) for server in both)
        assert ours == theirs, query


def links(answer):
    return sorted(
        (each["parent"], each["child"], each["callCount"], each.get("errorCount", 0))
        for each in answer
    )


def found(answer):
    return {
        trace[0]["traceId"]: sorted(json.dumps(span, sort_keys=True) for span in trace)
        for trace in answer
    }
