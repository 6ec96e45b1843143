"""The demo's network and services on a real kernel, without the agent."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest

if os.geteuid():
    pytest.skip(
        "needs root for network namespaces: run with sudo", allow_module_level=True
    )

from podspan.agent.demo import command, processes
from podspan.agent.demo.bookinfo import PODS
from podspan.agent.demo.command import DemoError
from podspan.agent.demo.processes import ProcessError, call_page, start_services
from podspan.agent.demo.topology import BRIDGE, NAMED, topology
from podspan.agent.errors import UsageError

FORWARDABLE = {
    "x-request-id": "7",
    "x-b3-traceid": "463ac35c9f6413ad48485a3953bb6124",
    "x-b3-spanid": "a2fb4a1d1a96d312",
    "x-b3-sampled": "1",
    "traceparent": "00-463ac35c9f6413ad48485a3953bb6124-a2fb4a1d1a96d312-01",
    "end-user": "jason",
}


def names_taken():
    return {name for name in (BRIDGE, *PODS) if (NAMED / name).exists()}


def ratings_of(page):
    return page["answers"]["reviews"]["answers"]["ratings"]


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Wait for another run of these tests: the names of the namespaces are fixed."""
    with Path(__file__).open() as this_file:
        fcntl.flock(this_file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="class")
def five_pods():
    with topology() as pods:
        yield pods
    assert not names_taken()


class TestOneTopology:
    @pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
    def test_the_page_comes_through_the_whole_graph(self, five_pods, ipv6):
        with ExitStack() as stack:
            start_services(stack, five_pods, ipv6=ipv6)
            page = call_page(stack, five_pods, ipv6=ipv6)

        assert page["service"] == "productpage"
        assert list(page["answers"]) == ["details", "reviews"]
        assert page["answers"]["reviews"]["answers"]["ratings"]["service"] == "ratings"

    def test_no_service_forwards_a_header(self, five_pods):
        with ExitStack() as stack:
            start_services(stack, five_pods)
            page = call_page(stack, five_pods, headers=FORWARDABLE)

        assert {name.lower() for name, _ in page["received"]} > set(FORWARDABLE)
        for answer in (*page["answers"].values(), ratings_of(page)):
            assert {name for name, _ in answer["received"]} == {
                "Host",
                "Accept-Encoding",
            }

    def test_the_host_is_untouched(self, five_pods):
        links = json.loads(subprocess.check_output(["ip", "-json", "link"]))
        assert not {link["ifname"] for link in links} & {"bridge", *PODS}

    def test_a_second_demo_is_refused_while_one_runs(self, five_pods):
        with pytest.raises(UsageError, match="another demo is running"), topology():
            pass
        assert names_taken() == {BRIDGE, *PODS}


class TestCleanUp:
    """Each case makes a topology of its own, so none may exist beside it."""

    @pytest.fixture(autouse=True)
    def nothing_before_or_after(self):
        assert not names_taken()
        yield
        assert not names_taken()

    def test_after_a_failure_inside(self):
        with pytest.raises(RuntimeError), topology():
            raise RuntimeError

    def test_after_a_service_that_does_not_start(self, monkeypatch):
        monkeypatch.setattr(processes, "SERVICE_MODULE", "no.such.module")
        with (
            pytest.raises(ProcessError, match="productpage ended before") as caught,
            topology() as pods,
            ExitStack() as stack,
        ):
            start_services(stack, pods)
        assert "no.such.module" in caught.value.hint

    def test_after_a_port_that_is_taken(self):
        with topology() as pods, ExitStack() as stack:
            start_services(stack, pods)
            with pytest.raises(ProcessError, match="ended before") as caught:
                start_services(stack, pods)
        assert "Address already in use" in caught.value.hint

    def test_a_crashed_run_is_removed_by_the_next_and_its_services_die(self):
        crash = """
            import os, signal
            from contextlib import ExitStack
            from podspan.agent.demo.processes import start_services
            from podspan.agent.demo.topology import topology
            with topology() as pods, ExitStack() as stack:
                for child in start_services(stack, pods):
                    print(child.pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """
        crashed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(crash)],
            stdout=subprocess.PIPE,
            check=False,
        )
        assert crashed.returncode == -signal.SIGKILL
        services = [int(pid) for pid in crashed.stdout.split()]
        assert len(services) == 4
        for pid in services:
            wait_for_end(pid)
        assert names_taken() == {BRIDGE, *PODS}

        with topology() as pods, ExitStack() as stack:
            start_services(stack, pods)

    def test_a_stranger_s_namespace_is_refused_and_left_alone(self):
        subprocess.run(["ip", "netns", "add", "details"], check=True)
        try:
            with pytest.raises(UsageError, match="named details exists"), topology():
                pass
            assert names_taken() == {"details"}
        finally:
            subprocess.run(["ip", "netns", "delete", "details"], check=True)

    def test_after_an_agent_that_fails(self, monkeypatch):
        fake_kernel_and_agent(monkeypatch, "echo no BTF >&2; exit 3")
        with pytest.raises(ProcessError, match=r"ended too early \(exit code 3\)") as e:
            command.main([])
        assert e.value.hint == "no BTF"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_after_a_signal(self, monkeypatch, tmp_path, number):
        fake_kernel_and_agent(
            monkeypatch, f"echo $$ >{tmp_path}/pid; kill -{number} $PPID; exec sleep 99"
        )
        # A background job of a shell has SIGINT ignored, and the demo respects that.
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with pytest.raises((KeyboardInterrupt, DemoError)):
                command.main([])
            assert signal.getsignal(number) is signal.SIG_DFL
        finally:
            signal.signal(number, before)
        wait_for_end(int((tmp_path / "pid").read_text()))

    def test_an_agent_that_writes_no_span_is_told_what_is_missing(self, monkeypatch):
        monkeypatch.setattr(command, "SPANS_S", 0.2)
        ready = 'while [ "$1" != --ready-file ]; do shift; done; : >"$2"; exec sleep 99'
        fake_kernel_and_agent(monkeypatch, ready)
        with pytest.raises(ProcessError) as caught:
            command.main([])
        assert "the CLIENT half of client -> productpage" in str(caught.value)
        assert "the SERVER half of reviews -> ratings" in str(caught.value)


def fake_kernel_and_agent(monkeypatch, script):
    """Let the demo run where there are no kprobes, with a shell script as podspan."""
    monkeypatch.setattr(command, "KPROBES", NAMED.parent)
    monkeypatch.setattr(
        command,
        "_podspan",
        lambda what, *rest: [
            "sh",
            "-c",
            script if what == "agent" else ":",
            what,
            *rest,
        ],
    )


def wait_for_end(pid):
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([process], [], [], 10)
    os.close(process)
    assert ended, f"process {pid} survived its demo"
