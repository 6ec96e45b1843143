"""Spans into files and onto the terminal."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from podspan.agent.errors import ExportError
from podspan.agent.exchange import Exchange
from podspan.agent.export import tree as tree_module
from podspan.agent.export.jsonl import JsonLinesExporter
from podspan.agent.export.tree import TreeExporter
from podspan.agent.span import span_of
from unit.kernel_struct import exchange_record

SPAN: Any = span_of(Exchange.from_kernel(exchange_record()), "productpage", 0)


def in_trace(number):
    return replace(SPAN, trace_id=f"{number:016x}")


def test_json_lines_are_appended_one_span_each(tmp_path):
    path = tmp_path / "spans.jsonl"
    path.write_text("{}\n")
    exporter = JsonLinesExporter(str(path))
    exporter.export([in_trace(1), in_trace(2)])
    # Readable at once, not only after close.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("traceId", "")[-1:] for line in lines] == ["", "1", "2"]
    assert exporter.counters() == {"sent": 2}
    exporter.close(0)


def test_json_lines_to_standard_output_leave_it_open(capsys):
    exporter = JsonLinesExporter("-")
    exporter.export([SPAN])
    exporter.close(0)
    print("still open")
    span, rest = capsys.readouterr().out.splitlines()
    assert json.loads(span)["id"] == SPAN.span_id
    assert rest == "still open"


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path):
    with pytest.raises(ExportError, match="No such file or directory") as caught:
        JsonLinesExporter(str(tmp_path / "missing" / "spans"))
    assert "--json" in caught.value.hint


def test_a_full_disk_is_an_export_error():
    exporter = JsonLinesExporter("/dev/full")
    with pytest.raises(ExportError, match="No space left"):
        exporter.export([SPAN])
    exporter.close(0)


class Time:
    """A clock that stands still."""

    now_s = 100.0

    def __call__(self):
        return self.now_s


def titles(out):
    return [line[6:22] for line in out.getvalue().splitlines() if "trace " in line]


def test_a_trace_is_printed_when_it_was_quiet():
    out, clock = io.StringIO(), Time()
    exporter = TreeExporter(out, quiet_s=1.0, monotonic_s=clock)
    exporter.export([in_trace(1), in_trace(2)])
    clock.now_s += 0.75
    exporter.export([in_trace(1)])
    clock.now_s += 0.5
    exporter.tick()
    assert titles(out) == ["0000000000000002"]
    assert exporter.counters() == {"sent": 1, "queued": 2}
    clock.now_s += 0.5
    exporter.tick()
    assert titles(out) == ["0000000000000002", "0000000000000001"]
    assert "2 spans" in out.getvalue()
    assert exporter.counters() == {"sent": 3, "queued": 0}


def test_close_prints_what_is_left():
    out = io.StringIO()
    exporter = TreeExporter(out)
    exporter.export([in_trace(1)])
    exporter.tick()
    assert out.getvalue() == ""
    exporter.close(0)
    assert titles(out) == ["0000000000000001"]


def test_too_many_spans_are_printed_early_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(tree_module, "MAX_SPANS", 10)
    out = io.StringIO()
    exporter = TreeExporter(out)
    for number in range(23):
        exporter.export([in_trace(number)])
    assert exporter.counters() == {"sent": 13, "queued": 10}
    exporter.close(0)
    assert titles(out) == [f"{number:016x}" for number in range(23)]


def test_a_terminal_that_is_gone_is_told_apart_from_a_reader_that_has_enough():
    class Gone(io.StringIO):
        error = OSError(5, "Input/output error")

        def write(self, text):
            raise self.error

    out = Gone()
    exporter = TreeExporter(out)
    exporter.export([in_trace(1)])
    with pytest.raises(ExportError, match="Input/output error"):
        exporter.close(0)
    out.error = BrokenPipeError(32, "Broken pipe")
    exporter.export([in_trace(1)])
    with pytest.raises(BrokenPipeError):
        exporter.close(0)
