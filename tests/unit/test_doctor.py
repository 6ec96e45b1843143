"""podspan doctor: facts in, findings out; and the command itself, on this machine."""

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from podspan.agent import doctor, metrics
from podspan.agent.config import STATUS_ADDRESS
from podspan.agent.doctor import Facts, Level, examine
from podspan.agent.errors import FeatureMissing, KernelError, UsageError
from podspan.agent.status import StatusServer
from podspan.agent.values import Address
from unit.test_metrics import snapshot

FAULT = "FIONREAD answers 0 where 100 bytes wait"
KPROBES = Path("/sys/bus/event_source/devices/kprobe/type")

# A node that lacks nothing, before its agent.
GOOD = Facts(
    release="6.1.0-18-amd64",
    root=True,
    capabilities=2**41 - 1,
    btf=True,
    kprobes=None,
    bpffs=None,
    cgroup="/sys/fs/cgroup",
    cgroup_partly=False,
    bcc="0.26.0",
    nft="1.8.9",
    legacy=True,
    queue="loaded",
    container=False,
    node_pids=True,
    holder=None,
    address=STATUS_ADDRESS,
    agent=None,
    silence="127.0.0.1:15025: Connection refused",
    now_s=1700000000.0,
)


def answer(**changes):
    """Return what an agent answers to /status."""
    changes = {"started_s": GOOD.now_s - 7200, "losses": {"full": 0}, **changes}
    said = json.loads(metrics.to_json(snapshot(**changes)))
    assert isinstance(said, dict)
    return said


def found(facts, name):
    (finding,) = (each for each in examine(facts) if each.name == name)
    return finding


@pytest.mark.parametrize("facts", [GOOD, replace(GOOD, agent=answer(), holder=7)])
def test_a_node_that_lacks_nothing(facts):
    findings = examine(facts)
    assert {finding.level for finding in findings} == {Level.OK}
    assert len({finding.name for finding in findings}) == len(findings)
    assert doctor.as_text(facts, findings).endswith("\nThe agent can run here.\n")


@pytest.mark.parametrize(
    ("changes", "name", "level", "text", "hint"),
    [
        ({"root": False}, "root", "FAIL", "not root", "sudo"),
        ({"capabilities": 1 << 21}, "root", "FAIL", "without CAP_NET_ADMIN", "privil"),
        ({"release": "5.15.0-1-x"}, "kernel", "warn", "5.15.0-1-x is older", "6.1"),
        ({"btf": False}, "btf", "FAIL", "/sys/kernel/btf", "CONFIG_DEBUG_INFO_BTF"),
        ({"kprobes": FeatureMissing("no k", "a")}, "kprobes", "FAIL", "no k", "a"),
        ({"bpffs": FeatureMissing("no b", "mo")}, "bpffs", "FAIL", "no b", "mo"),
        (
            {"bpffs": FeatureMissing("no b", "mo"), "container": True},
            "bpffs",
            "FAIL",
            "no b",
            "mount the node's /sys/fs/bpf",
        ),
        ({"cgroup": FeatureMissing("no c", "mo")}, "cgroup", "FAIL", "no c", "mo"),
        ({"cgroup_partly": True}, "cgroup", "warn", "this container only", "hostPath"),
        ({"node_pids": False}, "processes", "warn", "not seen", "hostPID: true"),
        ({"bcc": KernelError("no bcc", "apt")}, "bcc", "FAIL", "no bcc", "apt"),
        ({"nft": "", "legacy": False}, "iptables", "warn", "neither", "apt-get"),
        ({"queue": "missing"}, "nfqueue", "warn", "has no nfnetlink", "CONFIG_NETF"),
        ({"queue": "not known"}, "nfqueue", "warn", "is not loaded", "modprobe"),
        ({"holder": 7}, "agent", "warn", "pid 7), but does not answer", "--address"),
        ({"agent": answer(engine="")}, "agent", "warn", "is starting", ""),
        (
            {"agent": answer(selftest=FAULT, engine="redirect", engine_reason="why")},
            "engine",
            "warn",
            "redirect: why",
            "podspan init",
        ),
        (
            {"agent": answer(losses={"ring_full": 3, "parked": 0})},
            "losses",
            "warn",
            "ring_full=3",
            "incomplete",
        ),
        ({"selftest": FAULT}, "self-test", "warn", FAULT, "--engine auto redirects"),
        ({"selftest": KernelError("no", "do")}, "self-test", "FAIL", "no", "do"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(changes, name, level, text, hint):
    facts = replace(GOOD, **changes)
    finding = found(facts, name)
    assert finding.level == level
    assert text in finding.text
    assert hint in finding.hint
    others = {each.level for each in examine(facts) if each.name != name}
    assert others == {Level.OK}
    verdict = doctor.as_text(facts, examine(facts)).splitlines()[-1]
    assert name in verdict
    assert verdict.startswith("The agent cannot run") == (level == "FAIL")


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({"nft": ""}, "iptables", "can use legacy"),
        ({"legacy": False}, "iptables", "can use nft (iptables 1.8.9)"),
        ({"queue": "loadable"}, "nfqueue", "when it is needed"),
        ({"release": "7.2.0"}, "kernel", "7.2.0"),
        ({"release": "unheard-of"}, "kernel", "unheard-of"),
        ({"selftest": ""}, "self-test", "works here"),
        ({}, "agent", "none runs here (127.0.0.1:15025: Connection refused)"),
        ({"agent": answer()}, "agent", "podspan 1.2, pid 7, up 2 h, answers at"),
        ({"agent": answer()}, "engine", "kernel: self-test passed"),
        ({"agent": answer()}, "activity", "exchanges=23 spans=19 zipkin_sent=16"),
        ({"agent": answer()}, "losses", "nothing was lost"),
        ({"agent": answer()}, "redirect", "connections_open=2 requests_injected=9"),
        ({"agent": answer(redirect={})}, "redirect", "no worker is needed"),
    ],
)
def test_what_is_right_is_said_as_well(changes, name, text):
    finding = found(replace(GOOD, **changes), name)
    assert finding.level == Level.OK
    assert text in finding.text


def test_pods_are_listed_with_engine_and_reason():
    facts = replace(GOOD, agent=answer())
    lines = doctor.as_text(facts, examine(facts)).splitlines()
    at = lines.index("POD          NETNS       ENGINE  WHY")
    assert lines[at + 1 : at + 3] == [
        "shop/cart-0  4026532001  kernel  self-test passed",
        "cni-1        4026532002  off     --engine off",
    ]


def test_machines_get_all_of_it():
    facts = replace(GOOD, agent=answer(), btf=False)
    said = json.loads(doctor.as_json(facts, examine(facts)))
    assert said["failed"] == 1
    (btf,) = (each for each in said["findings"] if each["level"] == "FAIL")
    assert btf["name"] == "btf"
    assert btf["hint"]
    assert said["agent"]["pods"][0]["name"] == "cart-0"


@pytest.mark.parametrize(
    "agent",
    [
        {},
        {"engine": None, "pods": 7, "losses": [], "exporters": {"a": 1}},
        {"engine": "x", "started_s": "y", "pods": [1, {"name": []}], "pid": {}},
        {"engine": "\x1b[2J", "losses": {"\x1b[2J\n": 1}, "pods": [{"name": "\r"}]},
    ],
)
def test_an_agent_may_answer_anything(agent):
    facts = replace(GOOD, agent=agent)
    text = doctor.as_text(facts, examine(facts))
    assert text.replace("\n", "").isprintable()


class Agent:
    """A status port, and where it is."""

    def __init__(self):
        now = snapshot(updated_s=time.monotonic())
        self.server = StatusServer(Address("127.0.0.1", 0), lambda: now, lambda: True)
        self.address = Address("127.0.0.1", self.server.port)


@pytest.fixture
def agent():
    agent = Agent()
    yield agent
    agent.server.close()


def test_an_agent_is_asked(agent):
    assert doctor.ask(agent.address) == (
        json.loads(metrics.to_json(agent.server.read())),
        "",
    )
    everywhere = Address("0.0.0.0", agent.address.port)
    assert doctor.ask(everywhere)[1] == ""


def test_where_nobody_answers_is_said(agent):
    agent.server.close()
    said, why = doctor.ask(agent.address)
    assert said is None
    assert why == f"{agent.address}: Connection refused"
    assert doctor.ask(None) == (None, "it was not asked")


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b"{}", b"\xff", b"[" * 10**5])
def test_other_software_at_the_port_is_no_agent(agent, monkeypatch, body):
    def do_get(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)

    monkeypatch.setattr("podspan.agent.status._Handler.do_GET", do_get)
    said, why = doctor.ask(agent.address)
    assert said is None
    assert why == f"what answers at {agent.address} is no podspan agent"


def test_who_holds_the_lock_is_seen_without_taking_it(tmp_path):
    assert doctor.lock_holder(tmp_path) is None
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert doctor.lock_holder(tmp_path) == os.getpid()
        assert doctor.lock_holder(tmp_path.parent) is None
        fcntl.flock(fd, fcntl.LOCK_UN)
        assert doctor.lock_holder(tmp_path) is None
    finally:
        os.close(fd)
    assert doctor.lock_holder(tmp_path / "missing") is None


def test_a_process_that_waits_for_the_lock_does_not_hold_it(tmp_path):
    stat = tmp_path.stat()
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    locks = tmp_path / "locks"
    locks.write_text(
        f"1: POSIX  ADVISORY  WRITE 1 {device} 0 EOF\n"
        f"2: FLOCK  ADVISORY  WRITE 2 {device}0 0 EOF\n"
        f"3: FLOCK  ADVISORY  WRITE 3 {device} 0 EOF\n"
        f"3: -> FLOCK  ADVISORY  WRITE 4 {device} 0 EOF\n"
    )
    assert doctor.lock_holder(tmp_path, locks) == 3


def test_nfnetlink_queue_is_looked_for_where_modprobe_does(tmp_path):
    file, modules = tmp_path / "queue", tmp_path / "modules"
    assert doctor.queue_state(file, modules) == "not known"
    modules.mkdir()
    assert doctor.queue_state(file, modules) == "missing"
    (modules / "modules.dep").write_text("kernel/net/netfilter/nfnetlink_queue.ko.xz:")
    assert doctor.queue_state(file, modules) == "loadable"
    file.touch()
    assert doctor.queue_state(file, modules) == "loaded"


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, STATUS_ADDRESS),
        (None, {"PODSPAN_STATUS_ADDRESS": ""}, STATUS_ADDRESS),
        (None, {"PODSPAN_STATUS_ADDRESS": ":9000"}, Address("0.0.0.0", 9000)),
        ("none", {"PODSPAN_STATUS_ADDRESS": ":9000"}, None),
        ("[::1]:80", {}, Address("::1", 80)),
    ],
)
def test_the_agent_is_asked_where_it_was_told_to_be(given, environment, address):
    assert doctor._address(given, environment) == address


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UsageError, match="PODSPAN_STATUS_ADDRESS"):
        doctor._address(None, {"PODSPAN_STATUS_ADDRESS": "x"})
    with pytest.raises(UsageError, match="unrecognized"):
        doctor.main(["--jsn"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"holder": 7}, "an agent runs"),
        ({"agent": answer()}, "an agent runs"),
        ({"btf": False, "kprobes": KernelError("")}, "repair first: btf"),
    ],
)
def test_the_self_test_is_not_run_beside_an_agent_or_in_vain(monkeypatch, changes, why):
    monkeypatch.setattr(doctor, "try_kernel_engine", pytest.fail)
    facts = replace(GOOD, **changes)
    facts = doctor._with_self_test(facts, examine(facts))
    assert why in found(facts, "self-test").text


def run_doctor(*argv):
    return subprocess.run(
        [sys.executable, "-m", "podspan.agent", "doctor", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_on_this_machine():
    done = run_doctor("--address", "none")
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAIL ")]
    assert done.returncode == int(bool(failed))
    said = [line for line in failed if "this kernel has no kprobes" in line]
    assert bool(said) == (not KPROBES.exists())
    assert lines[-1].startswith("The agent can")


def test_the_command_and_an_agent(agent):
    done = run_doctor("--json", "--address", str(agent.address))
    said = json.loads(done.stdout)
    assert done.returncode == int(said["failed"] > 0)
    assert said["agent"]["exchanges"] == 23


def test_help_has_examples():
    done = run_doctor("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kubectl exec" in done.stdout
