"""Where the user's spans go: several places at once, the spool, the embedded store."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import ExitStack, closing, contextmanager

import pytest
from podspan.agent import config
from podspan.agent.errors import ExportError, UsageError
from podspan.agent.outputs import Outputs
from unit.backend import Backend, Reply, spans, until

# An agent whose backend is away, until it is killed.
EXPORTING = """
import sys, threading
sys.path.extend({path!r})
from contextlib import ExitStack
from podspan.agent import config
from podspan.agent.outputs import Outputs
from unit.backend import spans

with ExitStack() as stack:
    outputs = Outputs(stack, config.parse(sys.argv[1:], {{}}))
    for first in range(1, 2001, 100):
        outputs.export(spans(100, first))
    while outputs.counters()["zipkin"]["spool_spans"] < 2000:
        threading.Event().wait(0.01)
    print("spooled", flush=True)
    threading.Event().wait()
"""


@contextmanager
def opened(*argv, environment=None):
    with ExitStack() as stack:
        yield Outputs(stack, config.parse(argv, environment or {}))


@pytest.fixture
def backend():
    with closing_(Backend()) as one:
        yield one


@contextmanager
def closing_(backend):
    try:
        yield backend
    finally:
        backend.stop()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_all_places_get_every_span(tmp_path, backend, capsys):
    with closing_(Backend()) as second:
        argv = ["--zipkin", backend.url, "--json", str(tmp_path / "spans"), "--tree"]
        argv += ["--otlp", second.url, "--otlp-encoding", "json"]
        with opened(*argv, "--data-dir", str(tmp_path / "data")) as outputs:
            outputs.export(spans(3))
            outputs.tick()
        assert backend.ids() == [1, 2, 3]
        [request] = second.requests
        [resource] = json.loads(request.plain)["resourceSpans"]
        assert len(resource["scopeSpans"][0]["spans"]) == 3
    assert len((tmp_path / "spans").read_text().splitlines()) == 3
    assert "3 spans" in capsys.readouterr().out
    assert outputs.losses()["zipkin_dropped"] == 0


def test_what_the_backend_did_not_take_is_sent_after_a_kill(tmp_path):
    port = free_port()
    argv = ["--zipkin", f"http://127.0.0.1:{port}", "--data-dir", str(tmp_path)]
    agent = subprocess.Popen(
        [sys.executable, "-c", EXPORTING.format(path=sys.path), *argv],
        stdout=subprocess.PIPE,
        text=True,
    )
    with agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "spooled\n"
        agent.send_signal(signal.SIGKILL)
    with closing_(Backend(port)) as backend, opened(*argv) as outputs:
        until(lambda: len(backend.ids()) == 2000)
        until(lambda: outputs.counters()["zipkin"]["spool_spans"] == 0)
        assert backend.ids() == list(range(1, 2001))


def test_what_a_spool_cannot_take_is_no_loss_once_it_is_sent(tmp_path, backend):
    backend.usual = Reply(503)
    argv = ["--zipkin", backend.url, "--data-dir", str(tmp_path), "--spool-size", "99"]
    with opened(*argv) as outputs:
        outputs.export(spans(1))
        until(lambda: outputs.counters()["zipkin"]["spool_failed"])
        backend.usual = Reply()
        until(lambda: outputs.counters()["zipkin"]["sent"] == 1)
        assert not any(outputs.losses().values())


def test_a_file_that_is_full_costs_no_other_place_a_span(backend, caplog):
    argv = ["--json", "/dev/full", "--zipkin", backend.url, "--spool-size", "0"]
    with opened(*argv) as outputs:
        for first in (1, 4):
            outputs.export(spans(3, first))
        assert outputs.losses()["json_failed"] == 6
    assert backend.ids() == [1, 2, 3, 4, 5, 6]
    assert caplog.text.count("No space left") == 1


def test_a_file_that_is_full_is_an_error_where_it_is_the_only_place():
    with (
        opened("--json", "/dev/full") as outputs,
        pytest.raises(ExportError, match="No space left"),
    ):
        outputs.export(spans(1))


def test_secrets_come_from_a_variable_or_a_file(tmp_path, backend):
    secret = tmp_path / "secret"
    secret.write_text("x-tenant: blue\n")
    argv = ["--zipkin", backend.url, "--spool-size", "0"]
    argv += ["--zipkin-headers-file", str(secret)]
    environment = {"PODSPAN_ZIPKIN_HEADERS": "authorization=Bearer%20hunter2"}
    with opened(*argv, environment=environment) as outputs:
        outputs.export(spans(1))
    [request] = backend.requests
    assert request.headers["authorization"] == "Bearer hunter2"
    assert request.headers["x-tenant"] == "blue"


def test_a_secret_that_is_no_header_is_said_without_it(backend):
    argv = ["--zipkin", backend.url, "--spool-size", "0"]
    environment = {"PODSPAN_ZIPKIN_HEADERS": "hunter2"}
    with (
        pytest.raises(UsageError, match="PODSPAN_ZIPKIN_HEADERS") as caught,
        opened(*argv, environment=environment),
    ):
        pytest.fail("it opened")
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_a_spool_folder_of_another_process_is_an_error_where_it_was_named(tmp_path):
    folder = tmp_path / "spool" / "zipkin"
    folder.mkdir(parents=True)
    other = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        argv = ["--zipkin", "http://127.0.0.1:9", "--data-dir", str(tmp_path)]
        with pytest.raises(ExportError, match="in use by another"), opened(*argv):
            pytest.fail("it opened")
    finally:
        os.close(other)


def test_a_spool_that_cannot_be_had_by_default_is_a_warning(
    tmp_path, monkeypatch, caplog, backend
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("podspan.agent.outputs.DATA_DIR", str(tmp_path / "file"))
    with opened("--zipkin", backend.url) as outputs:
        outputs.export(spans(1))
    assert backend.ids() == [1]
    assert "no spool for zipkin" in caplog.text


def test_without_a_place_spans_are_kept_in_the_embedded_store(tmp_path):
    port = free_port()
    argv = ["--store-address", f"127.0.0.1:{port}", "--data-dir", str(tmp_path)]
    sent = spans(3)

    def stored():
        url = f"http://127.0.0.1:{port}/api/v2/trace/{sent[0].trace_id}"
        try:
            with closing(urllib.request.urlopen(url)) as answer:
                return len(json.load(answer))
        except OSError:
            return 0

    with opened(*argv) as outputs:
        outputs.export(sent)
        until(lambda: stored() == 3)
        until(lambda: outputs.counters()["store"]["sent"] == 3)
    assert (tmp_path / "traces.db").exists()
    threads = [thread.name for thread in threading.enumerate()]
    assert not [name for name in threads if "store" in name]
