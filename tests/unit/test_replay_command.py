"""`podspan replay` as users meet it."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing, contextmanager, suppress
from io import StringIO
from itertools import count
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest
from podspan.agent.errors import ExportError, ReplayError, StoreError, UsageError
from podspan.agent.replay.command import main
from podspan.agent.replay.names import read_hosts
from podspan.agent.replay.progress import ProgressBar
from podspan.agent.store.database import Database
from podspan.agent.store.exporter import MAX_AGE_S, MAX_BYTES
from unit.replay_wire import (
    B3,
    TRACE,
    Talk,
    captured,
    pcapng_bytes,
    request,
    response,
)

DEADLINE_S = 30
PROGRAM = (
    "import sys; from podspan.agent.replay.command import main; main(sys.argv[1:])"
)


@pytest.fixture
def capture(tmp_path):
    talk = Talk().handshake().exchange(request("/reviews", more=B3), response()).bye()
    path = tmp_path / "incident.pcapng"
    path.write_bytes(pcapng_bytes(captured(talk)))
    return path


def test_trees_by_default_and_a_summary(capture, capsys):
    assert main([str(capture)]) == 0
    said = capsys.readouterr()
    assert f"trace {TRACE}: 2 spans, 2 services" in said.out
    assert "server reviews" in said.out
    assert said.err.startswith("podspan replay: 10 packets, 1 connections, 1 exchanges")
    assert said.err.endswith("2 spans; skipped: nothing\n")


def test_json_lines_on_standard_output_or_in_a_file(capture, tmp_path, capsys):
    out = tmp_path / "spans"
    main([str(capture), "--json", "-"])
    main([str(capture), "--json", str(out)])
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    assert [json.loads(line)["traceId"] for line in printed.splitlines()] == [TRACE] * 2


def test_ids_tags_and_names_are_options(capture, tmp_path, capsys):
    hosts = tmp_path / "hosts"
    hosts.write_text("# pods\n10.0.0.1 curl\n10.0.0.2\treviews-v1 alias # one\n")
    options = ["--hosts", str(hosts), "--span-ids", "child", "--tags", "otel"]
    main([str(capture), "--json", "-", *options])
    client, server = map(json.loads, capsys.readouterr().out.splitlines())
    assert client["localEndpoint"]["serviceName"] == "curl"
    assert server["localEndpoint"]["serviceName"] == "reviews-v1"
    assert server["parentId"] == client["id"]
    assert client["tags"]["http.request.method"] == "GET"


def test_a_store_has_the_spans_and_takes_more(capture, tmp_path):
    path = tmp_path / "traces.db"
    main([str(capture), "--store", str(path)])
    database = Database(path, max_age_s=MAX_AGE_S, max_bytes=MAX_BYTES)
    with closing(database):
        spans = database.trace(TRACE)
        assert {span["kind"] for span in spans} == {"CLIENT", "SERVER"}
        assert database.services() == ["10.0.0.1", "reviews"]


@contextmanager
def serving(capture, scratch):
    """The command with --serve on a free port; yields its URL, and ends it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(capture), "--serve", f"127.0.0.1:{port}"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    try:
        assert process.stderr
        words = ""
        while "until Ctrl-C" not in words:
            words = process.stderr.readline()
            assert words, "ended before it served"
        yield words.split()[2], process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_lasts_until_it_is_stopped_and_leaves_nothing(
    capture, number, tmp_path
):
    with serving(capture, tmp_path) as (url, process):
        base = url.partition("?")[0]
        with urllib.request.urlopen(f"{base}api/v2/trace/{TRACE}") as answer:
            assert len(json.load(answer)) == 2
        query = url.partition("?")[2]
        with urllib.request.urlopen(f"{base}api/v2/traces?{query}") as answer:
            assert len(json.load(answer)) == 1  # the link shows the incident
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0
    assert not list(tmp_path.glob("podspan-replay-*"))


def test_ctrl_c_ends_the_reading_and_what_was_read_is_told(tmp_path, capsys):
    """Of a pipe that never ends, whose writer is at most its size ahead."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    talk = Talk().handshake().exchange(request("/", more=B3), response())
    data = pcapng_bytes(captured(talk))
    packets = data[data.index(b"\x06\0\0\0") :]
    before = signal.getsignal(signal.SIGINT)

    def write():
        with suppress(BrokenPipeError), path.open("wb", buffering=0) as pipe:
            pipe.write(data)
            for number in count():
                pipe.write(packets)
                if number == 1000:
                    os.kill(os.getpid(), signal.SIGINT)

    writer = Thread(target=write)
    writer.start()
    assert main([str(path)]) == 130
    writer.join(DEADLINE_S)
    said = capsys.readouterr()
    assert TRACE in said.out
    assert "interrupted: the rest of the capture was not read" in said.err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cut_capture_is_replayed_with_a_warning(capture, capsys):
    capture.write_bytes(capture.read_bytes()[:-9])
    assert main([str(capture)]) == 0
    said = capsys.readouterr().err
    assert "warning: the capture ends in the middle of a packet" in said
    assert "file_cut 1" in said


WRONG = [
    pytest.param([], UsageError, "FILE", id="no file"),
    pytest.param(["absent"], ReplayError, "cannot read absent", id="absent"),
    pytest.param(
        ["{file}", "--serve", "nonsense"], UsageError, "ADDR:PORT", id="address"
    ),
    pytest.param(["{file}", "--serve", "none"], UsageError, "ADDR:PORT", id="none"),
    pytest.param(["{file}", "--hosts", "absent"], UsageError, "absent", id="hosts"),
    pytest.param(["{file}", "--json", "-", "--tree"], UsageError, "both", id="both"),
    pytest.param(["{file}", "--json", "/absent/x"], ExportError, "/absent/x", id="out"),
    pytest.param(
        ["{file}", "--store", "/absent/x"], StoreError, "/absent/x", id="store"
    ),
    pytest.param(
        ["{file}", "--store", "{file}"], StoreError, "incident", id="no store"
    ),
    pytest.param(["{file}", "--sampling", "1"], UsageError, "--sampling", id="option"),
]


@pytest.mark.parametrize(("words", "error", "says"), WRONG)
def test_what_cannot_be_is_an_error_that_says_why(capture, words, error, says):
    with pytest.raises(error, match=says):
        main([word.format(file=capture) for word in words])


def test_a_capture_of_an_unknown_link_layer_is_an_error(tmp_path):
    talk = Talk().handshake()
    path = tmp_path / "wifi"
    packets = [packet._replace(link_type=105) for packet in captured(talk)]
    path.write_bytes(pcapng_bytes(packets))
    with pytest.raises(ReplayError, match="link layer"):
        main([str(path)])


def test_no_permission_is_told(capture, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    # Root may read anything, so the file cannot refuse by itself.
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ReplayError, match="Permission denied") as raised:
        main([str(capture)])
    assert "sudo" in raised.value.hint


def test_a_wrong_line_of_the_hosts_file_is_named():
    assert read_hosts("\n::1 localhost # x\nfe80::1%lo0 link\n") == {
        "::1": "localhost",
        "fe80::1": "link",
    }
    for text, number in (("10.0.0.1 a\nnonsense b\n", 2), ("10.0.0.1\n", 1)):
        with pytest.raises(UsageError, match=f"line {number}"):
            read_hosts(text)


class Terminal(StringIO):
    def __init__(self, isatty):
        super().__init__()
        self._isatty = isatty

    def isatty(self):
        return self._isatty


def test_progress_is_shown_on_a_terminal_only():
    for isatty in (True, False):
        out = Terminal(isatty)
        bar = ProgressBar(out, 200)
        bar.show(100)
        bar.clear()
        assert ("50%" in out.getvalue()) == isatty
        assert out.getvalue().endswith("\r\033[K" if isatty else "")


def test_the_link_to_the_viewer_shows_what_came_before_the_clock_was_set_back(
    tmp_path,
):
    talk = Talk().handshake().exchange(request("/", more=B3), response()).bye()
    early = [
        packet._replace(at_ns=packet.at_ns - 10**12) for packet in captured(talk)[:3]
    ]
    path = tmp_path / "incident.pcapng"
    path.write_bytes(pcapng_bytes([*captured(talk), *early]))
    with serving(path, tmp_path) as (url, _):
        query = parse_qs(urlsplit(url).query)
    assert int(query["lookback"][0]) >= 10**6
