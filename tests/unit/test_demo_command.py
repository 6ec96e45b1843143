"""What `podspan demo` decides before it touches anything, and reads afterwards."""

from dataclasses import replace

import pytest
from podspan.agent.demo import command
from podspan.agent.errors import FeatureMissing, NoPrivilege, UsageError
from podspan.agent.span import Endpoint, Span, zipkin_json

SPAN = Span(
    trace_id="463ac35c9f6413ad48485a3953bb6124",
    span_id="000000000000000a",
    parent_id="",
    kind="SERVER",
    name="details:9080/*",
    timestamp_us=1_700_000_000_000_000,
    duration_us=2000,
    local=Endpoint("details", "10.97.0.3", 9080),
    remote=Endpoint("", "fd97::2", 40000),
    shared=False,
    tags={"http.status_code": "200"},
)


def test_spans_are_read_as_they_were_written(tmp_path):
    spans = [SPAN, replace(SPAN, parent_id="000000000000000b", shared=True)]
    path = tmp_path / "spans.jsonl"
    path.write_text("".join(f"{zipkin_json(each)}\n" for each in spans))
    assert command.read_spans(path) == spans


def test_a_line_that_is_still_being_written_waits(tmp_path):
    path = tmp_path / "spans.jsonl"
    assert command.read_spans(path) == []
    path.write_text(f"{zipkin_json(SPAN)}\n" + zipkin_json(SPAN)[:40])
    assert command.read_spans(path) == [SPAN]


def test_an_unknown_option_is_the_users_error():
    with pytest.raises(UsageError, match="--colour"):
        command.main(["--colour"])


def test_without_root_the_demo_says_so(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NoPrivilege, match="only root"):
        command.main([])


def test_without_kprobes_the_demo_names_the_machine_that_has_them(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(command, "KPROBES", tmp_path / "absent")
    with pytest.raises(FeatureMissing, match="no kprobes") as caught:
        command.main([])
    assert "make demo" in caught.value.hint
    assert "\n" not in str(caught.value)
