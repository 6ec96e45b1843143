"""The embedded store as a child: started, missed, started again, ended."""

import errno
import json
import os
import signal
import socket
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from podspan.agent import embedded
from podspan.agent.embedded import EmbeddedStore
from podspan.agent.errors import ExportError
from podspan.agent.values import Address

PATIENCE_S = 60.0


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Address("127.0.0.1", listener.getsockname()[1])


def started(folder, address=None):
    return EmbeddedStore(
        address or free_address(),
        folder,
        max_age_s=86400,
        max_bytes=2**30,
        log_level="info",
    )


def answers(store):
    with urllib.request.urlopen(f"{store.url}api/v2/services") as answer:
        return json.load(answer)


def wait_for(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_up(store):
    try:
        return answers(store) == []
    except OSError:
        return False


def test_it_answers_once_it_is_made_and_is_gone_once_closed(tmp_path):
    with closing(started(tmp_path / "data")) as store:
        assert answers(store) == []
        pid = store._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_it_is_started_again_after_it_died(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embedded, "FIRST_BACKOFF_S", 0.05)
    with closing(started(tmp_path)) as store:
        os.kill(store._process.pid, signal.SIGKILL)
        store._process.wait()

        def back():
            store.tick()
            return is_up(store)

        wait_for(back)
        assert store.restarts == 1
    assert "the embedded store ended: code=-9" in caplog.text


def test_one_that_was_well_for_a_while_is_started_again_soon(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(embedded, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(embedded, "MAX_BACKOFF_S", 0.02)  # it takes longer to start
    with closing(started(tmp_path)) as store:

        def back():
            store.tick()
            return is_up(store)

        for _ in range(3):
            os.kill(store._process.pid, signal.SIGKILL)
            store._process.wait()
            wait_for(back)
    assert caplog.text.count("again_in_s=0.01 ") == 3


def test_a_node_without_a_process_to_spare_starts_it_later(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(embedded, "FIRST_BACKOFF_S", 0.05)
    with closing(started(tmp_path)) as store:
        os.kill(store._process.pid, signal.SIGKILL)
        store._process.wait()
        start = store._start
        failures = [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))]

        def start_or_fail():
            if failures:
                raise failures.pop()
            return start()

        monkeypatch.setattr(store, "_start", start_or_fail)

        def back():
            store.tick()
            return is_up(store)

        wait_for(back)
        assert store.restarts == 1
    assert "cannot be started: error='Resource temporarily unavail" in caplog.text


def test_a_port_that_is_taken_is_an_error_with_a_way_out(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(ExportError, match="did not start") as caught:
            started(tmp_path, address)
    assert "--store-address" in caught.value.hint
    assert str(address.port) in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot keep traces in") as caught:
        started(tmp_path / "file" / "data")
    assert "--data-dir" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which it is to give up")
def test_it_has_no_capabilities(tmp_path):
    with closing(started(tmp_path)) as store:
        status = Path(f"/proc/{store._process.pid}/status").read_text()
    sets = {"CapPrm", "CapEff", "CapBnd", "CapAmb"}
    found = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert {int(found[each], 16) for each in sets} == {0}
    assert found["NoNewPrivs"] == "1"


def test_it_does_not_get_the_credentials_of_other_backends(tmp_path, monkeypatch):
    monkeypatch.setenv("PODSPAN_OTLP_HEADERS", "authorization=hunter2")
    with closing(started(tmp_path)) as store:
        environment = Path(f"/proc/{store._process.pid}/environ").read_text()
    assert "PATH=" in environment
    assert "hunter2" not in environment


@pytest.mark.parametrize(
    ("listening", "url"),
    [
        (Address("0.0.0.0", 9411), "127.0.0.1:9411"),
        (Address("::", 9411), "[::1]:9411"),
        (Address("10.0.0.7", 80), "10.0.0.7:80"),
    ],
)
def test_where_it_is_reached(listening, url):
    assert str(listening.reachable) == url
