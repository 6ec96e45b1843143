"""The server's life, and `podspan store` as a process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from podspan.agent import values
from podspan.agent.__main__ import main as podspan
from podspan.agent.errors import StoreError, UsageError
from podspan.agent.store import command
from podspan.agent.store.server import MAX_CONNECTIONS, THREADS, StoreServer
from unit.store_server import running_store

SPAN = {"traceId": "a", "id": "b", "localEndpoint": {"serviceName": "web"}}


def until(condition, what, seconds=20):
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"not {what} after {seconds} s"
        time.sleep(0.01)


def test_a_port_that_is_taken_is_told(tmp_path):
    with running_store(tmp_path) as store:
        with pytest.raises(StoreError, match=f"port {store.port}") as caught:
            StoreServer(store.database, ("127.0.0.1", store.port))
        assert "--listen" in caught.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b"])
def test_an_address_that_is_not_ours_is_told(tmp_path, host):
    with running_store(tmp_path) as store, pytest.raises(StoreError, match=host):
        StoreServer(store.database, (host, 0))


def test_a_server_that_never_started_closes(tmp_path):
    with running_store(tmp_path) as store:
        server = StoreServer(store.database, ("127.0.0.1", 0))
        server.close()
        StoreServer(store.database, ("127.0.0.1", server.port)).close()


def test_closing_never_pulls_what_the_loop_has_closed(tmp_path):
    with running_store(tmp_path) as store:
        for _ in range(600):  # it went wrong once in 150
            server = StoreServer(store.database, ("127.0.0.1", 0))
            server.start()
            server.close()


def test_ipv6(tmp_path):
    with running_store(tmp_path) as store:
        try:
            server = StoreServer(store.database, ("::1", 0))
        except StoreError as exc:
            pytest.skip(f"no IPv6 here: {exc}")
        server.start()
        url = f"http://[::1]:{server.port}/api/v2/services"
        with urllib.request.urlopen(url) as answer:
            assert answer.status == 200
        server.close()


def test_closing_finishes_what_is_being_answered_and_what_waits(tmp_path, monkeypatch):
    entered, leave = threading.Semaphore(0), threading.Event()
    with running_store(tmp_path) as store:

        def slow_services():
            entered.release()
            leave.wait(20)
            return ["slow"]

        monkeypatch.setattr(store.database, "services", slow_services)
        answers: list[Any] = []
        asking = [
            threading.Thread(
                target=lambda: answers.append(store.get("/api/v2/services").json)
            )
            for _ in range(THREADS + 4)
        ]
        for each in asking:
            each.start()
        for _ in range(THREADS):
            assert entered.acquire(timeout=20)
        until(lambda: waiting(store.server) == len(asking), "all of them waiting")
        closing = threading.Thread(target=store.server.close)
        closing.start()
        until(lambda: refused(store.port), "closed to new connections")
        leave.set()
        closing.join()
        for each in asking:
            each.join()
    assert answers == [["slow"]] * len(asking)


def waiting(server):
    channels = list(server._server.active_channels.values())
    return sum(len(channel.requests) for channel in channels)


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return True
    return False


def test_closing_does_not_wait_for_those_who_are_silent(tmp_path):
    with (
        running_store(tmp_path) as store,
        socket.create_connection(("127.0.0.1", store.port)) as silent,
    ):
        silent.sendall(b"GET / HTTP/1.1\r\n")
        started_s = time.monotonic()
        store.server.close()
        print(f"closed after {time.monotonic() - started_s:.2f} s")
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_more_connections_than_allowed_wait_and_are_served_later(tmp_path):
    with running_store(tmp_path) as store:
        held = [
            socket.create_connection(("127.0.0.1", store.port))
            for _ in range(MAX_CONNECTIONS + 8)
        ]
        for connection in held:
            connection.close()
        assert store.get("/health").status == 200


def test_eight_senders_at_once_lose_nothing(tmp_path):
    def send(sender):
        for batch in range(10):
            first = (sender * 10 + batch) * 50 + 1
            spans = [
                {**SPAN, "traceId": f"{sender + 1:x}", "id": f"{first + n:x}"}
                for n in range(50)
            ]
            assert store.post(spans).status == 202

    with running_store(tmp_path) as store:
        senders = [threading.Thread(target=send, args=(n,)) for n in range(8)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        for n in range(8):
            assert len(store.get(f"/api/v2/trace/{n + 1:x}").json) == 500


# The command


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "podspan.agent", "store", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def podspan_store(folder, *arguments):
    """Yield the process and its URL, once it is ready."""
    ready = folder / "ready"
    data = folder / "data/traces.db"
    options = ("--listen", "127.0.0.1:0", "--data", data, "--ready-file", ready)
    with started(*map(str, options), *arguments) as process:
        try:
            until(lambda: ready.exists() or process.poll() is not None, "ready")
            assert process.stderr is not None
            line = process.stderr.readline()
            url = line.partition("url=")[2].partition(" ")[0]
            assert url, line + process.stderr.read()
            yield process, url
        finally:
            process.kill()


def test_the_command_keeps_what_it_was_sent_over_a_restart(tmp_path):
    with podspan_store(tmp_path) as (process, url):
        assert (tmp_path / "ready").read_text() == f"{process.pid}\n"
        body = json.dumps([SPAN]).encode()
        request = urllib.request.Request(
            f"{url}api/v2/spans", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 202
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not (tmp_path / "ready").exists()
    with podspan_store(tmp_path) as (process, url):
        with urllib.request.urlopen(f"{url}api/v2/services") as answer:
            assert json.load(answer) == ["web"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_command_says_what_runs(tmp_path):
    with podspan_store(tmp_path, "--max-age", "12h", "--max-size", "64MiB") as (
        process,
        url,
    ):
        process.terminate()
        assert process.stderr is not None
        ended = process.stderr.read()
    assert url.startswith("http://127.0.0.1:")
    assert "ended: {'spans': 0" in ended
    assert "Traceback" not in ended


def test_the_data_is_for_its_owner_only(tmp_path):
    with podspan_store(tmp_path) as (process, _):
        assert (tmp_path / "data").stat().st_mode & 0o077 == 0
        process.terminate()


WITH_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "podspan.agent", "store",
    "--with-parent", *sys.argv[1:]], stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_with_parent_the_store_ends_when_its_parent_is_killed(tmp_path):
    ready = tmp_path / "ready"
    options = ["--listen", "127.0.0.1:0", "--data", str(tmp_path / "traces.db")]
    options += ["--ready-file", str(ready)]
    with subprocess.Popen(
        [sys.executable, "-c", WITH_PARENT, *options], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(ready.exists, "ready")
        parent.kill()
    until(lambda: not ready.exists(), "ended")
    until(lambda: not alive(child), "gone")


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def failing(*arguments):
    with started(*arguments) as process:
        _, said = process.communicate(timeout=30)
        return process.returncode, said


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    data = tmp_path / "photo.jpg"
    data.write_bytes(b"\xff\xd8" * 1000)
    code, said = failing("--data", str(data), "--listen", "127.0.0.1:0")
    assert code == 1
    assert said.startswith("podspan: ")
    assert str(data) in said
    assert data.read_bytes() == b"\xff\xd8" * 1000


def test_a_taken_port_is_one_line_and_a_hint(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = failing(
            "--data", str(tmp_path / "t.db"), "--listen", f"127.0.0.1:{port}"
        )
    assert code == 1
    lines = said.splitlines()
    assert str(port) in lines[-2]
    assert "--listen" in lines[-1]


def test_a_file_may_become_no_larger_than_the_disk(tmp_path, caplog):
    data = tmp_path / "traces.db"
    disk = shutil.disk_usage(tmp_path).total
    assert command._room(data, values.MIN_STORE_SIZE) == values.MIN_STORE_SIZE
    assert not caplog.records
    assert values.MIN_STORE_SIZE <= command._room(data, 1 << 62) <= disk
    assert "less than --max-size" in caplog.text
    data.write_bytes(bytes(1 << 20))  # what is there already may stay
    assert command._room(data, 1 << 62) <= disk


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot make"):
        command.main(["--data", str(tmp_path / "a/b.db")])


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("12h", 43200), ("7d", 604800)]
)
def test_ages(text, seconds):
    assert command._parser().parse_args(["--max-age", text]).max_age == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("16384KiB", 1 << 24), ("500MiB", 500 << 20), ("2GiB", 2 << 30)]
)
def test_sizes(text, size):
    assert command._parser().parse_args(["--max-size", text]).max_size == size


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9411", ("127.0.0.1", 9411)),
        ("localhost:0", ("localhost", 0)),
        (":9411", ("0.0.0.0", 9411)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(text, address):
    listen = command._parser().parse_args(["--listen", text]).listen
    assert (listen.host, listen.port) == address


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-age", "7"],
        ["--max-age", "0d"],
        ["--max-age", "-1d"],
        ["--max-age", "1.5h"],
        ["--max-age", "7 d"],
        ["--max-age", "7w"],
        ["--max-size", "2"],
        ["--max-size", "2GB"],
        ["--max-size", "2gib"],
        ["--max-size", "1MiB"],
        ["--max-size", "-2GiB"],
        ["--listen", "9411"],
        ["--listen", "127.0.0.1"],
        ["--listen", "127.0.0.1:65536"],
        ["--listen", "::1:9411"],
        ["--listen", "http://127.0.0.1:9411"],
        ["--log-level", "loud"],
        ["--data"],
        ["--dat", "x"],
        ["extra"],
    ],
)
def test_what_is_no_option_is_told(arguments):
    with pytest.raises(UsageError):
        command.main(arguments)


def test_a_ready_file_without_its_folder_is_told(tmp_path):
    with pytest.raises(UsageError, match="--ready-file"):
        command.main(
            ["--data", str(tmp_path / "t.db"), "--ready-file", str(tmp_path / "no/x")]
        )


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        podspan(["store", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said
    assert "podspan store" in said
