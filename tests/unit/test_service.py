"""The agent's loop, with a tracer that needs no kernel."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from podspan.agent import config, outputs, service, status, values
from podspan.agent.engine import Plan
from podspan.agent.errors import (
    ExportError,
    FeatureMissing,
    KernelError,
    NoPrivilege,
    StatusError,
    UsageError,
)
from podspan.agent.exchange import Exchange
from podspan.agent.kernel.enrol import Enrolment
from podspan.agent.kernel.state import Inherited
from podspan.agent.metrics import PodStatus
from podspan.agent.pods.names import ServiceNames
from podspan.agent.pods.pod import pod_of
from podspan.agent.service import Losses, Periodic, run
from podspan.agent.steering import Steering
from unit.kernel_struct import exchange_record

OWN_NETNS = Path("/proc/self/ns/net")


@pytest.fixture(autouse=True)
def outside_of_a_cluster(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def settings(*argv):
    """What the user sets; by default trees, and no disk or port of this machine's."""
    named = {"--json", "--zipkin", "--tree"} & set(argv)
    argv = argv if named else ("--tree", *argv)
    unset = {"PODSPAN_SPOOL_SIZE": "0", "PODSPAN_STATUS_ADDRESS": "none"}
    return config.parse(argv, unset)


class FakeTracer:
    """Plays a script: one step per poll; then ends the agent by a signal."""

    fault: str | None = None
    inherited = Inherited()
    enrolment = Enrolment(0, 0, {})

    def __init__(self, *steps, signal_number=signal.SIGTERM, on_enter=None):
        self.steps = list(steps)
        self.signal_number = signal_number
        self.on_enter = on_enter
        self.calls = []
        self.lost = {"ring_full": 0}
        self.beats = []
        self.selected = []
        self.sampling = {}
        self.roaming = set()
        self.plans = {}
        self.attached = False
        self.ended = False

    def __call__(
        self, *, max_connections, options, netns, roaming, on_exchange, on_warning
    ):
        self.max_connections = max_connections
        self.options = options
        self.roaming = set(roaming)
        self.netns = netns
        self.on_exchange = on_exchange
        self.on_warning = on_warning
        return self

    def __enter__(self):
        if self.on_enter is not None:
            self.on_enter()
        self.attached = True
        return self

    def __exit__(self, *exc):
        self.attached = False

    def poll(self, timeout_ms):
        assert self.attached
        self.calls.append(timeout_ms)
        if self.steps:
            self.steps.pop(0)(self)
        elif not self.ended:
            self.ended = True
            os.kill(os.getpid(), self.signal_number)

    def heartbeat(self):
        assert self.attached
        self.beats.append(time.monotonic())

    def select(self, netns):
        self.selected.append(netns)

    def set_sampling(self, by_netns):
        self.sampling = by_netns

    def set_roaming(self, come, gone):
        self.roaming = (self.roaming | set(come)) - set(gone)

    def set_plans(self, plans):
        self.plans = plans

    def http2_ports(self, netns):
        return frozenset()

    def losses(self):
        assert self.attached
        return dict(self.lost)


def finish(**fields):
    """Return a step in which the kernel reports one exchange."""

    def step(tracer):
        tracer.on_exchange(Exchange.from_kernel(exchange_record(**fields)))

    return step


def until(condition):
    """Return steps that poll until the condition holds, at most for a while."""
    deadline_s = time.monotonic() + 20

    def step(tracer):
        assert time.monotonic() < deadline_s
        if not condition(tracer):
            tracer.steps.insert(0, step)
            threading.Event().wait(0.01)

    return step


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_23_exchanges_give_23_spans(tmp_path):
    out = tmp_path / "spans"
    tracer = FakeTracer(*(finish(span_id=number) for number in range(1, 24)))
    assert run(settings("--json", str(out)), tracer) == 0
    assert [int(span["id"], 16) for span in read(out)] == list(range(1, 24))
    assert not tracer.attached


def test_many_exchanges_in_one_poll_all_arrive(tmp_path):
    def flood(tracer):
        for number in range(1, 1001):
            finish(span_id=number)(tracer)

    out = tmp_path / "spans"
    assert run(settings("--json", str(out)), FakeTracer(flood)) == 0
    assert [int(span["id"], 16) for span in read(out)] == list(range(1, 1001))


def test_what_is_in_the_ring_when_the_signal_comes_is_not_lost(tmp_path):
    def end(tracer):
        os.kill(os.getpid(), signal.SIGTERM)
        tracer.ended = True

    out = tmp_path / "spans"
    run(settings("--json", str(out)), FakeTracer(end, finish()))
    assert len(read(out)) == 1


def test_unsampled_exchanges_are_not_exported(tmp_path):
    out = tmp_path / "spans"
    run(settings("--json", str(out)), FakeTracer(finish(flags=0), finish(flags=1)))
    assert len(read(out)) == 1


def test_trees_are_printed(capsys):
    run(settings("--tree"), FakeTracer(finish()))
    out = capsys.readouterr().out
    assert out.startswith("trace 463ac35c9f6413ad48485a3953bb6124: 1 span, ")
    assert "client productpage  GET /details/0?u=1  200" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_agent_and_its_handlers_are_restored(caplog, number):
    caplog.set_level(logging.INFO)
    before = signal.getsignal(number)
    assert run(settings(), FakeTracer(signal_number=number)) == 0
    assert signal.getsignal(number) is before
    assert f"signal={number.name}" in caplog.text


def test_the_ready_file_says_our_pid_while_attached_and_only_then(tmp_path):
    ready = tmp_path / "ready"
    ready.write_text("left behind by a killed agent")
    seen = []
    tracer = FakeTracer(
        lambda _: seen.append(ready.read_text()),
        on_enter=lambda: seen.append(ready.exists()),
    )
    run(settings("--ready-file", str(ready)), tracer)
    assert seen == [False, f"{os.getpid()}\n"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["missing/ready", ".", "/proc/ready", "file/ready"])
def test_a_ready_file_that_cannot_be_written_is_said_before_anything_loads(
    tmp_path, path
):
    (tmp_path / "file").touch()
    tracer = FakeTracer(on_enter=pytest.fail)
    with pytest.raises(UsageError, match="--ready-file"):
        run(settings("--ready-file", str(tmp_path / path)), tracer)


def test_a_file_that_cannot_be_written_is_said_before_anything_loads(tmp_path):
    tracer = FakeTracer(on_enter=pytest.fail)
    with pytest.raises(ExportError):
        run(settings("--json", str(tmp_path / "missing" / "spans")), tracer)


def test_a_kernel_that_refuses_leaves_nothing_behind(tmp_path):
    def refuse():
        raise KernelError("no", "why")

    ready = tmp_path / "ready"
    threads = set(threading.enumerate())
    with pytest.raises(KernelError):
        run(
            settings("--zipkin", "http://127.0.0.1:9", "--ready-file", str(ready)),
            FakeTracer(on_enter=refuse),
        )
    assert not ready.exists()
    assert not set(threading.enumerate()) - threads
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_exporter_that_fails_within_a_poll_ends_the_agent():
    # bcc calls back from C, which swallows exceptions: they must surface later.
    def flood(tracer):
        for _ in range(1000):
            finish()(tracer)

    tracer = FakeTracer(flood)
    with pytest.raises(ExportError, match="No space left"):
        run(settings("--json", "/dev/full"), tracer)
    assert not tracer.attached


def test_the_heart_beats_from_the_start_and_keeps_beating():
    tracer = FakeTracer(until(lambda tracer: len(tracer.beats) == 4))
    run(settings("--heartbeat-interval", "0.15", "--guard-grace", "0.5"), tracer)
    gaps = [later - at for at, later in pairwise(tracer.beats)]
    assert min(gaps) >= 0.15 * 0.9
    assert tracer.options.guard_grace_ns == 500_000_000


def test_settings_reach_the_tracer():
    tracer = FakeTracer()
    run(settings("--max-connections", "7"), tracer)
    assert tracer.max_connections == 7
    assert tracer.netns is None
    assert tracer.selected == []


def test_settings_reach_the_spans(tmp_path):
    out = tmp_path / "spans"
    argv = ["--json", str(out), "--tags", "otel", "--max-path", "4", "--no-query"]
    run(settings(*argv), FakeTracer(finish(target=b"/path"), finish(target=b"/?q")))
    urls = [span["tags"]["url.full"] for span in read(out)]
    assert urls == ["http://details:9080/pat", "http://details:9080/"]


def test_namespaces_that_come_and_go_are_selected(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "SELECT_S", 0.01)
    names = ServiceNames(tmp_path)
    monkeypatch.setattr("podspan.agent.service.ServiceNames", lambda **_: names)
    own = OWN_NETNS.stat().st_ino
    tracer = FakeTracer(
        lambda _: (tmp_path / "cni-1").symlink_to(OWN_NETNS),
        until(lambda tracer: tracer.selected == [{own}]),
        lambda _: (tmp_path / "cni-1").unlink(),
        until(lambda tracer: tracer.selected == [{own}, frozenset()]),
    )
    run(settings("--netns", "cni-*"), tracer)
    assert tracer.netns == frozenset()


def test_the_namespaces_name_is_the_service(tmp_path, monkeypatch):
    (tmp_path / "reviews").symlink_to(OWN_NETNS)
    names = ServiceNames(tmp_path)
    monkeypatch.setattr("podspan.agent.service.ServiceNames", lambda **_: names)
    out = tmp_path / "spans"
    tracer = FakeTracer(finish(netns=OWN_NETNS.stat().st_ino), finish(netns=1))
    run(settings("--json", str(out)), tracer)
    services = [span["localEndpoint"]["serviceName"] for span in read(out)]
    assert services == ["reviews", "productpage"]


def test_in_a_cluster_that_is_away_the_agent_traces_and_says_so(
    caplog, tmp_path, monkeypatch
):
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("NODE_NAME", "node1")
        out = tmp_path / "spans"
        tracer = FakeTracer(
            finish(), until(lambda _: "does not tell us of pods" in caplog.text)
        )
        assert run(settings("--json", str(out)), tracer) == 0
    assert [span["localEndpoint"]["serviceName"] for span in read(out)] == [
        "productpage"
    ]
    left = {thread.name for thread in threading.enumerate()}
    assert not left & {"podspan-pods", "podspan-netns"}


def test_version_and_configuration_are_logged_first(caplog):
    caplog.set_level(logging.INFO)
    run(settings(), FakeTracer())
    assert caplog.messages[0].startswith("podspan agent: version=")
    assert "max_connections=16384" in caplog.messages[1]
    assert "engine=kernel reason='self-test passed'" in caplog.messages[2]
    assert caplog.messages[-1].startswith("ended: exchanges=0 spans=0")


def test_what_workers_report_at_their_end_is_exported(tmp_path, monkeypatch):
    class Ending(Steering):
        def close(self):
            self._on_exchange(Exchange.from_kernel(exchange_record()))

    monkeypatch.setattr(service, "Steering", Ending)
    out = tmp_path / "spans"
    run(settings("--json", str(out)), FakeTracer())
    assert len(read(out)) == 1


def test_a_kernel_engine_that_fails_its_test_is_refused_where_it_was_asked_for():
    tracer = FakeTracer()
    tracer.fault = "FIONREAD answers 0"
    with pytest.raises(FeatureMissing, match="FIONREAD answers 0") as caught:
        run(settings("--engine", "kernel"), tracer)
    assert "--engine auto" in caught.value.hint
    assert not tracer.attached


def test_warnings_of_the_tracer_are_logged(caplog):
    run(settings(), FakeTracer(lambda tracer: tracer.on_warning("kprobe missing")))
    assert caplog.messages == ["kprobe missing"]


def test_losses_are_told_when_they_grow_and_summed_up_at_the_end(caplog, monkeypatch):
    monkeypatch.setattr(service, "LOSSES_S", 0.0)

    def lose(tracer):
        tracer.lost["ring_full"] += 3

    def nothing(tracer):
        pass

    run(settings(), FakeTracer(lose, nothing, lose, nothing))
    assert caplog.messages == [
        "lost: ring_full=3; since the start: ring_full=3",
        "lost: ring_full=3; since the start: ring_full=6",
        "lost altogether: ring_full=6",
    ]


def test_nothing_lost_is_not_a_warning(caplog):
    losses = Losses(lambda: {"ring_full": 0})
    losses.report()
    losses.sum_up()
    assert caplog.messages == []


def test_a_dead_zipkin_is_a_warning_and_the_agent_goes_on(
    caplog, tmp_path, monkeypatch
):
    monkeypatch.setattr(outputs, "DRAIN_S", 0.2)
    out = tmp_path / "spans"
    tracer = FakeTracer(
        finish(),
        until(lambda _: "does not take spans" in caplog.text),
        finish(),
    )
    argv = ["--zipkin", "http://127.0.0.1:9", "--json", str(out)]
    assert run(settings(*argv), tracer) == 0
    assert len(read(out)) == 2
    assert caplog.text.count("does not take spans") == 1
    assert "hint=" in caplog.text
    assert "ended with spans unsent: spans=2" in caplog.text


def test_a_late_task_is_not_made_up_for():
    runs = []
    task = Periodic(1.0, lambda: runs.append(1))
    start_s = time.monotonic()
    for now_s in (start_s + 0.5, start_s + 10, start_s + 10.5, start_s + 11.5):
        task.run_if_due(now_s)
    assert len(runs) == 2


def test_no_root_is_the_only_thing_said(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoPrivilege) as caught:
        run(settings())
    assert "sudo" in caught.value.hint
    assert caplog.messages == []


def test_no_bcc_is_the_second(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FeatureMissing, match="bcc") as caught:
        run(settings())
    assert "apt-get install python3-bpfcc" in caught.value.hint


def test_a_missing_prerequisite_opens_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    out = tmp_path / "spans"
    with pytest.raises(NoPrivilege):
        run(replace(settings(), json=str(out)))
    assert not out.exists()


AGENT = """
import sys
sys.path.extend({path!r})
from podspan.agent import service
from podspan.agent.__main__ import main
from unit.test_service import FakeTracer

tracer = FakeTracer()
tracer.ended = True  # no signal of its own
service._kernel_tracer = lambda: tracer
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_as_a_process(tmp_path, number):
    ready = tmp_path / "ready"
    argv = ["agent", "--tree", "--ready-file", str(ready)]
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT.format(path=sys.path), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline_s = time.monotonic() + 20
        while not ready.exists():
            assert agent.poll() is None, agent.communicate()
            assert time.monotonic() < deadline_s
            threading.Event().wait(0.01)
        assert ready.read_text() == f"{agent.pid}\n"
        agent.send_signal(number)
        _, err = agent.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            agent.kill()
        agent.wait()
    assert agent.returncode == 0
    assert "Traceback" not in err
    assert not ready.exists()


def test_the_status_port_says_what_the_loop_has_done(monkeypatch):
    servers = []

    def open_and_keep(*args):
        server = status.open_status(*args)
        assert server is not None
        servers.append(server)
        return server

    def ask(path):
        url = f"http://127.0.0.1:{servers[0].port}{path}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.read().decode()

    def expect_not_ready():
        with pytest.raises(urllib.error.HTTPError, match="503"):
            ask("/readyz")

    class ExitingTracer(FakeTracer):
        def __exit__(self, *exc):
            expect_not_ready()
            super().__exit__(*exc)

    said = []

    def look(tracer):
        assert ask("/readyz") == "ready\n"
        said.append(json.loads(ask("/status")))
        return said[-1]["exchanges"] == 1

    monkeypatch.setattr(service, "open_status", open_and_keep)
    tracer = ExitingTracer(finish(), until(look), on_enter=expect_not_ready)
    tracer.lost = {"ring_full": 3}
    address = values.Address("127.0.0.1", 0)
    run(replace(settings(), status_address=address), tracer)
    assert said[0]["engine"] == "kernel"
    assert said[-1]["spans"] == 1
    assert said[-1]["losses"]["ring_full"] == 3
    assert set(said[-1]["exporters"]) == {"tree"}
    assert said[-1]["pid"] == os.getpid()
    with pytest.raises(OSError, match="refused"):
        ask("/status")


def test_a_status_address_that_is_taken_is_said_before_anything_loads():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(StatusError, match=address):
            run(settings("--status-address", address), FakeTracer(on_enter=pytest.fail))


def test_pods_are_told_with_their_plans(tmp_path):
    pod = pod_of({"metadata": {"uid": "u", "name": "cart-0", "namespace": "shop"}})
    assert pod is not None
    names = ServiceNames(tmp_path, pods_by_netns=lambda: {7: pod})
    plans = {9: Plan("off", "no", False), 7: Plan("kernel", "yes", True)}
    assert service._pods(plans, names) == (
        PodStatus(9, "", "", "off", "no"),
        PodStatus(7, "shop", "cart-0", "kernel", "yes"),
    )
