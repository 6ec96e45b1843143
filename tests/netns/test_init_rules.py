"""The rules as the kernel holds them: applied, applied again, cleaned, among others."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from netns.conftest import Namespace
from podspan.agent.kernel.guard import Guard

PODSPAN = (sys.executable, "-m", "podspan.agent", "init")

# What another tool has in nat, in each built-in chain that we jump from, on both sides
# of our jump, and with the words that ours consist of.
FOREIGN = """*nat
:KUBE-SERVICES - [0:0]
:NOT_PODSPAN_OUTPUT - [0:0]
-A PREROUTING -p tcp -j KUBE-SERVICES
-A OUTPUT -p tcp -m comment --comment "-j PODSPAN_OUTPUT" -j KUBE-SERVICES
-A OUTPUT -o eth9 -j NOT_PODSPAN_OUTPUT
-A KUBE-SERVICES -p tcp -m tcp --dport 53 -j REDIRECT --to-ports 5353
-A NOT_PODSPAN_OUTPUT -j RETURN
COMMIT
"""

# What a run that was cut short, or another version, may have left.
LEFTOVERS = {
    "chains without jumps": """*nat
:PODSPAN_OUTPUT - [0:0]
:PODSPAN_REDIRECT - [0:0]
-A PODSPAN_OUTPUT -j PODSPAN_REDIRECT
COMMIT
""",
    "every jump twice": """*nat
:PODSPAN_INBOUND - [0:0]
:PODSPAN_OUTPUT - [0:0]
-A PREROUTING -p tcp -j PODSPAN_INBOUND
-A PREROUTING -p tcp -j PODSPAN_INBOUND
-A OUTPUT -p tcp -j PODSPAN_OUTPUT
-A OUTPUT -p tcp -j PODSPAN_OUTPUT
COMMIT
""",
    "chains and jumps of another version": """*nat
:PODSPAN_DNS - [0:0]
:PODSPAN_MORE - [0:0]
-A PODSPAN_DNS -j PODSPAN_MORE
-A OUTPUT -p udp -m udp --dport 53 -g PODSPAN_DNS
-A INPUT -j PODSPAN_MORE
-A KUBE-SERVICES -j PODSPAN_DNS
COMMIT
""",
    "a probe": """*nat
:PODSPAN_PROBE - [0:0]
-A PODSPAN_PROBE -j RETURN
COMMIT
""",
}


@dataclass(frozen=True)
class Pod:
    """A namespace in which one iptables variant is in use, by others too."""

    namespace: Namespace
    variant: str

    def restore(self, rules):
        for program in ("iptables", "ip6tables"):
            subprocess.run(
                self.namespace.command(
                    f"{program}-{self.variant}-restore", "--noflush"
                ),
                input=rules,
                text=True,
                check=True,
            )

    def rules(self):
        """Return every table of both variants and families, without the counters."""
        lines = []
        for program in ("iptables", "ip6tables"):
            for variant in ("legacy", "nft"):
                saved = self.namespace.run(f"{program}-{variant}-save").stdout
                lines.append(f"{program}-{variant}")
                lines += (
                    line.split(" [")[0] for line in saved.splitlines() if line[0] != "#"
                )
        return lines

    def init(self, *arguments, **options):
        return self.namespace.run(*PODSPAN, *arguments, **options)


@pytest.fixture(params=["nft", "legacy"])
def pod(request, one_ns):
    pod = Pod(one_ns, request.param)
    pod.restore(FOREIGN)
    return pod


@pytest.fixture(scope="module")
def guard(bpffs):
    guard = Guard.open(bpffs / "rules")
    yield str(guard.path)
    guard.unpin()
    guard.close()


def ours(rules):
    return [line for line in rules if "PODSPAN_" in line and "NOT_PODSPAN" not in line]


def test_applying_twice_equals_applying_once_and_clean_leaves_nothing(pod, guard):
    before = pod.rules()

    pod.init("apply", "--guard", guard)
    once = pod.rules()
    pod.init("apply", "--guard", guard)
    twice = pod.rules()
    pod.init("clean")

    assert len(ours(once)) > len(ours(before))
    assert [line for line in once if line not in ours(once)] == [
        line for line in before if line not in ours(before)
    ]
    assert twice == once
    assert pod.rules() == before


def test_other_options_take_the_place_of_the_old_ones(pod, guard):
    pod.init("apply", "--guard", guard, "-p", "16001")
    first = pod.rules()
    pod.init("apply", "--guard", guard, "-b", "80,443", "-x", "10.96.0.1")
    pod.init("apply", "--guard", guard, "-p", "16001")

    assert pod.rules() == first


@pytest.mark.parametrize("leftover", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_whatever_an_earlier_run_left_is_undone(pod, guard, leftover):
    before = pod.rules()
    pod.init("apply", "--guard", guard)
    applied = pod.rules()
    pod.init("clean")

    pod.restore(leftover)
    pod.init("apply", "--guard", guard)
    assert pod.rules() == applied

    pod.init("clean")
    pod.restore(leftover)
    pod.init("clean")
    assert pod.rules() == before


def test_rules_are_where_the_node_keeps_its_own(pod, guard):
    pod.init("apply", "--guard", guard)

    for program in ("iptables", "ip6tables"):
        saved = pod.namespace.run(f"{program}-{pod.variant}-save").stdout
        assert f"--object-pinned {guard}" in saved


def test_a_change_of_variant_leaves_no_rule_behind(one_ns, guard):
    pod = Pod(one_ns, "legacy")
    pod.init("apply", "--guard", guard)  # no legacy rule yet: into nft
    nft_rules = ours(pod.rules())
    pod.restore(FOREIGN)

    pod.init("apply", "--guard", guard)

    rules = pod.rules()
    assert len(ours(rules)) == len(nft_rules) + 2  # two foreign comments name ours
    assert not ours(rules[rules.index("ip6tables-nft") :])


def test_a_namespace_without_any_rule_gets_ours_and_none_after_clean(one_ns, guard):
    pod = Pod(one_ns, "nft")

    pod.init("apply", "--guard", guard)
    assert ours(pod.rules())

    pod.init("clean")
    assert not [line for line in pod.rules() if line.startswith("-A")]
    assert not ours(pod.rules())


def test_rules_that_the_kernel_refuses_leave_nothing(pod, tmp_path):
    before = pod.rules()
    no_program = tmp_path / "file"
    no_program.touch()

    failed = pod.init("apply", "--guard", str(no_program), check=False)

    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) <= 2
    assert "nat" in failed.stderr or "bpf" in failed.stderr
    assert pod.rules() == before


def test_a_failure_of_the_second_family_takes_the_first_back(one_ns, guard, tmp_path):
    pod = Pod(one_ns, "nft")
    pod.restore(FOREIGN)
    before = pod.rules()
    real = "/usr/sbin/ip6tables-nft-restore"
    refuses = tmp_path / "ip6tables-nft-restore"
    refuses.write_text(
        "#!/bin/sh\n"
        "rules=$(cat)\n"
        'case $rules in *REDIRECT*) echo "no room" >&2; exit 4;; esac\n'
        f'echo "$rules" | {real} "$@"\n'
    )
    refuses.chmod(0o755)

    failed = pod.init(
        "apply",
        *("--guard", guard),
        env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )

    assert failed.returncode == 1
    assert "no room" in failed.stderr
    assert pod.rules() == before


def test_without_an_agent_nothing_is_installed_and_that_is_fine(one_ns):
    pod = Pod(one_ns, "nft")

    done = pod.init("apply", "--guard", "/sys/fs/bpf/podspan-no-agent/guard")

    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert "nothing installed" in done.stdout
    assert not ours(pod.rules())


def test_a_required_agent_that_does_not_come_is_an_error(one_ns, bpffs):
    pod = Pod(one_ns, "nft")

    failed = pod.init(
        "apply",
        "--require-agent=0.1",
        *("--guard", str(bpffs / "nobody")),
        check=False,
    )

    assert failed.returncode == 1
    assert "no agent within 0.1 s" in failed.stderr
    assert not ours(pod.rules())


def test_a_required_agent_is_waited_for(one_ns, pin_dir):
    pod = Pod(one_ns, "nft")
    guard_path = str(pin_dir / "redirect_guard")
    arguments = [*PODSPAN, "apply", "--require-agent", "--guard", guard_path]
    with subprocess.Popen(one_ns.command(*arguments)) as waiting:
        try:
            wait_until_it_runs(waiting)
            assert not ours(pod.rules())
            agent = Guard.open(pin_dir)
            assert waiting.wait(30) == 0
        finally:
            waiting.kill()

    assert ours(pod.rules())
    agent.close()


def test_an_init_containers_capabilities_suffice(pod, guard):
    capabilities = "-all,+net_admin,+net_raw"
    pod.namespace.run(
        *("setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities),
        *(*PODSPAN, "apply", "--guard", guard),
    )

    assert ours(pod.rules())


@pytest.mark.parametrize("action", ["apply", "clean"])
def test_no_capability_is_one_line_and_a_hint(one_ns, action):
    failed = one_ns.run(
        *("setpriv", "--bounding-set", "-net_admin"),
        *(*PODSPAN, action),
        check=False,
    )

    assert failed.returncode == 1
    assert failed.stderr.splitlines()[0] == "podspan: podspan init lacks CAP_NET_ADMIN"
    assert "hint:" in failed.stderr


@pytest.mark.skipif(
    not Path("/proc/sys/net/core/netdev_max_backlog").exists(),
    reason="runs inside a container: the host's network namespace is out of reach",
)
@pytest.mark.parametrize("action", ["apply", "clean"])
def test_the_hosts_network_namespace_is_refused(action):
    failed = subprocess.run(
        [*PODSPAN, action], capture_output=True, text=True, check=False
    )

    assert failed.returncode == 1
    assert "host's network namespace" in failed.stderr


def wait_until_it_runs(process):
    """Wait until the command has taken nsenter's place and sleeps between its looks."""
    deadline = time.monotonic() + 20
    while "nanosleep" not in Path(f"/proc/{process.pid}/wchan").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
