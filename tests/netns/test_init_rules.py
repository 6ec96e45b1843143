"""The rules as the kernel holds them: applied, applied again, cleaned, among others."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from netns.conftest import Namespace
from netns.foreign_rules import FOREIGN, foreign_rules
from podspan.agent.kernel.guard import Guard
from podspan.init import apply, command, legacy, nft
from podspan.init.apply import Manner
from podspan.init.options import parse
from podspan.init.plan import Family, Redirection, Source, plan
from unit.test_init_plan import SCENARIOS, VARIABLES

PODSPAN = (sys.executable, "-m", "podspan.agent", "init")
VARIANTS = {"nft": nft, "legacy": legacy}

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
    "rules in tables that we do not use": """*filter
:PODSPAN_OLD - [0:0]
-A PODSPAN_OLD -p tcp -j ACCEPT
-A INPUT -j PODSPAN_OLD
COMMIT
*raw
:PODSPAN_OLD - [0:0]
-A PREROUTING -j PODSPAN_OLD
COMMIT
""",
    "our rules in another order": """*nat
:PODSPAN_OUTPUT - [0:0]
-A PODSPAN_OUTPUT -p tcp -j RETURN
-A PODSPAN_OUTPUT -m mark --mark 0x539/0xfff -j RETURN
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

    def restore(self, rules, versions=(4, 6)):
        for version in versions:
            program = "iptables" if version == 4 else "ip6tables"
            subprocess.run(
                self.namespace.command(
                    f"{program}-{self.variant}-restore", "--noflush"
                ),
                input=rules,
                text=True,
                check=True,
            )

    def rules(self):
        """Return what is in every table of both variants and families, with counters.

        Whoever uses a table makes it exist, and legacy's stay for good: an empty one
        is as none.
        """
        return self._lines(lambda line: True)

    def others(self):
        """Return the same without what is ours."""
        return self._lines(lambda line: not OURS.search(line))

    def _lines(self, wanted):
        lines = []
        for program in ("iptables", "ip6tables"):
            for variant in ("legacy", "nft"):
                saved = self.namespace.run(f"{program}-{variant}-save", "-c").stdout
                lines.append(f"{program}-{variant}")
                for table in re.findall(r"^\*.*?^COMMIT$", saved, re.DOTALL | re.M):
                    kept = list(filter(wanted, table.splitlines()))
                    if re.search(r"^(\[|:\S+ -)", "\n".join(kept), re.M):
                        lines += kept
        return lines

    def init(self, *arguments, **options):
        """Run the command as a process, whose output and end matter."""
        return self.namespace.run(*PODSPAN, *arguments, **options)

    def do(self, *arguments):
        """Do the same in this process, which is ten times as fast."""
        with self.namespace.inside():
            assert command.main(arguments) == 0


# Our chains, their rules, and the jumps into them; see the lookalikes.
OURS = re.compile(r"^:PODSPAN_|-A PODSPAN_|-[jg] PODSPAN_\w+$")


@pytest.fixture(params=["nft", "legacy"])
def pod(request, one_ns):
    pod = Pod(one_ns, request.param)
    for version in (4, 6):
        pod.restore(foreign_rules("lookalike", version), [version])
    return pod


@pytest.fixture(scope="module")
def guard(bpffs):
    guard = Guard.open(bpffs / "rules")
    yield str(guard.path)
    guard.unpin()
    guard.close()


def ours(rules):
    return list(filter(OURS.search, rules))


@pytest.mark.parametrize("tool", FOREIGN)
@pytest.mark.parametrize("variant", VARIANTS)
def test_among_other_tools_rules_none_of_theirs_is_touched(
    variant, tool, one_ns, guard
):
    pod = Pod(one_ns, variant)
    for version in (4, 6):
        pod.restore(foreign_rules(tool, version), [version])
    before = pod.rules()
    assert len(before) > 10

    pod.do("apply", "--guard", guard, "--drop-invalid")
    once = pod.rules()
    pod.do("apply", "--guard", guard, "--drop-invalid")

    assert ours(once)
    assert pod.others() == before
    assert pod.rules() == once
    pod.do("clean")
    assert pod.rules() == before


# Legacy is slow to write, by a process per table.
EVERY_KIND_OF_RULE = ("all-at-once", "outbound-owner-groups", "loopback-source")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_scenarios_rules_are_known_again_and_not_written(
    variant, one_ns, guard, caplog
):
    caplog.set_level("INFO")
    manner = Manner(variant=variant)
    scenarios = SCENARIOS if variant == "nft" else EVERY_KIND_OF_RULE
    with one_ns.inside():
        for scenario in scenarios:
            argv = SCENARIOS[scenario]
            options = parse(["apply", *argv], VARIABLES.get(scenario, {}))
            wanted = options.redirection
            if wanted.guard:
                wanted = replace(wanted, guard=guard)
            caplog.clear()
            apply.apply(wanted, manner)
            assert caplog.text.count("applied family") == 2, scenario
            for family in Family:
                held = VARIANTS[variant].holds(family, plan(wanted, family))
                assert held, (scenario, family)
            caplog.clear()
            apply.apply(wanted, manner)
            # The guard that rules hold may be another one by now.
            written = "applied family" if wanted.guard else "in place already"
            assert caplog.text.count(written) == 2, scenario


CHANGES = {
    "a rule is gone": ("nat", "-D", "PODSPAN_OUTPUT", "1"),
    "a rule is there twice": ("nat", "-A", "PODSPAN_INBOUND", "-j", "RETURN"),
    "a rule is another": ("nat", "-R", "PODSPAN_OUTPUT", "1", "-j", "RETURN"),
    "a jump is gone": ("mangle", "-D", "PREROUTING", "-j", "PODSPAN_PREROUTING"),
    "a chain is more": ("nat", "-N", "PODSPAN_OLD"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_rules_that_somebody_changed_are_written_again(pod, change):
    pod.do("apply", "--guard", "none")
    wanted = pod.rules()

    pod.namespace.run(f"iptables-{pod.variant}", "-t", *change)
    assert pod.rules() != wanted
    pod.do("apply", "--guard", "none")

    assert pod.rules() == wanted


def test_rules_that_are_in_place_keep_their_counters_unless_forced(pod):
    pod.do("apply", "--guard", "none")
    rules = pod.namespace.run(f"iptables-{pod.variant}-save", "-c", "-t", "nat").stdout
    pod.namespace.run(f"iptables-{pod.variant}", "-t", "nat", "-F")
    pod.namespace.run(f"iptables-{pod.variant}", "-t", "nat", "-X")
    subprocess.run(
        pod.namespace.command(f"iptables-{pod.variant}-restore", "-c"),
        input=re.sub(r"^\[0:0\]", "[7:420]", rules, flags=re.M),
        text=True,
        check=True,
    )

    pod.do("apply", "--guard", "none")
    assert any("[7:420]" in line for line in ours(pod.rules()))

    pod.do("apply", "--guard", "none", "--force-apply")
    assert not any("[7:420]" in line for line in ours(pod.rules()))


# Ends where `kill -9` could: each time before or after one more thing is written.
CUT_SHORT = """
import os, signal, sys
from podspan.init import apply, legacy, nft, routing
from podspan.init.plan import Redirection

left = int(sys.argv[2])

def then_die(act):
    def acting(*arguments):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return act(*arguments)
    return acting

def by_table(act):
    def acting(family, rules):
        for table in ("mangle", "nat") if rules else ():
            act(family, [rule for rule in rules if rule.table in ("mangle", table)])
    return acting

routing.replace = then_die(routing.replace)
for variant in (legacy, nft):
    variant.replace = by_table(then_die(variant.replace))
apply.apply(Redirection(guard=None), apply.Manner(variant=sys.argv[1]))
raise SystemExit("it came to its end")
"""
# Written are routing, mangle, nat of IPv4, then of IPv6: killed after so many of them.
STEPS = (2, 3, 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_killed_anywhere_is_made_good(variant, one_ns):
    pod = Pod(one_ns, variant)
    manner = Manner(variant=variant)
    with one_ns.inside():
        apply.apply(Redirection(guard=None), manner)
    wanted = pod.rules()

    for step in STEPS:
        with one_ns.inside():
            apply.clean()
        killed = one_ns.run(
            sys.executable, "-c", CUT_SHORT, variant, str(step), check=False
        )
        assert killed.returncode == -9, killed.stderr
        left = ours(pod.rules())
        assert left
        assert left != ours(wanted)
        with one_ns.inside():
            apply.apply(Redirection(guard=None), manner)
        assert pod.rules() == wanted

    # The namespaces of the tests have no other routing rules with a mark.
    pod.do("clean")
    assert not ours(pod.rules())
    assert "fwmark" not in one_ns.run("ip", "rule").stdout


def test_other_options_take_the_place_of_the_old_ones(pod, guard):
    pod.do("apply", "--guard", guard, "-p", "16001")
    first = pod.rules()
    pod.do("apply", "--guard", guard, "-b", "80,443", "-x", "10.96.0.1")
    pod.do("apply", "--guard", guard, "-p", "16001")

    assert pod.rules() == first


@pytest.mark.parametrize("leftover", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_whatever_an_earlier_run_left_is_undone(pod, guard, leftover):
    before = pod.rules()
    pod.do("apply", "--guard", guard)
    applied = pod.rules()
    pod.do("clean")

    pod.restore(leftover)
    pod.do("apply", "--guard", guard)
    assert pod.rules() == applied

    pod.do("clean")
    pod.restore(leftover)
    pod.do("clean")
    assert pod.rules() == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_can_be_forced(variant, pod, guard):
    pod.do("apply", "--guard", guard, "--force-iptables-binary", variant)

    for program in ("iptables", "ip6tables"):
        saved = pod.namespace.run(f"{program}-{variant}-save").stdout
        assert len(ours(saved.splitlines())) * 2 == len(ours(pod.rules()))


def test_a_forced_variant_has_to_work(one_ns, guard, tmp_path):
    nsenter = shutil.which("nsenter")
    assert nsenter
    (tmp_path / "nsenter").symlink_to(nsenter)

    failed = Pod(one_ns, "nft").init(
        *("apply", "--guard", guard, "--force-iptables-binary", "nft"),
        env={"PATH": str(tmp_path)},
        check=False,
    )

    assert failed.returncode == 1
    assert "nft: iptables-nft is not installed" in failed.stderr


def test_rules_are_where_the_node_keeps_its_own(pod, guard):
    pod.do("apply", "--guard", guard)

    for program in ("iptables", "ip6tables"):
        saved = pod.namespace.run(f"{program}-{pod.variant}-save").stdout
        assert f"--object-pinned {guard}" in saved


def test_a_change_of_variant_leaves_no_rule_behind(one_ns, guard):
    pod = Pod(one_ns, "legacy")
    pod.do("apply", "--guard", guard)  # no legacy rule yet: into nft
    nft_rules = ours(pod.rules())
    for version in (4, 6):
        pod.restore(foreign_rules("lookalike", version), [version])

    pod.do("apply", "--guard", guard)

    rules = pod.rules()
    assert len(ours(rules)) == len(nft_rules)
    assert not ours(rules[rules.index("ip6tables-nft") :])


def test_a_namespace_without_any_rule_gets_ours_and_none_after_clean(one_ns, guard):
    pod = Pod(one_ns, "nft")

    pod.do("apply", "--guard", guard)
    assert ours(pod.rules())

    pod.do("clean")
    assert not [line for line in pod.rules() if line.startswith("-A")]
    assert not ours(pod.rules())


def test_rules_that_the_kernel_refuses_leave_nothing(pod, tmp_path):
    before = pod.rules()
    no_program = tmp_path / "file"
    no_program.touch()

    failed = pod.init("apply", "--guard", str(no_program), check=False)

    assert failed.returncode == 1
    problem = failed.stderr.splitlines()[-2:]
    assert problem[0].startswith("podspan: ") or problem[1].startswith("podspan: ")
    assert "nat" in failed.stderr or "bpf" in failed.stderr
    assert pod.rules() == before


def test_a_failure_of_the_second_family_takes_the_first_back(one_ns, guard, tmp_path):
    pod = Pod(one_ns, "nft")
    pod.restore(foreign_rules("lookalike", 4), [4])
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
    assert "podspan: podspan init lacks CAP_NET_ADMIN\n" in failed.stderr
    assert "hint:" in failed.stderr


@pytest.fixture
def without_connmark(tmp_path):
    return _without("CONNMARK", tmp_path)


@pytest.fixture
def without_nfqueue(tmp_path):
    return _without("NFQUEUE", tmp_path)


def _without(target, tmp_path):
    """A node whose kernel has no such target, as far as nft's restore tells."""
    for program in ("iptables-nft-restore", "ip6tables-nft-restore"):
        shim = tmp_path / program
        shim.write_text(
            "#!/bin/sh\n"
            "rules=$(cat)\n"
            f'case $rules in *{target}*) echo "no {target}" >&2; exit 4;; esac\n'
            f'echo "$rules" | /usr/sbin/{program} "$@"\n'
        )
        shim.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"}


def test_without_connmark_the_source_is_loopback_with_a_warning(
    one_ns, guard, without_connmark
):
    pod = Pod(one_ns, "nft")

    done = pod.init("apply", "--guard", guard, env=without_connmark)

    assert done.stderr.count("WARNING") == 2
    assert "127.0.0.6" in done.stderr
    assert "no CONNMARK" in done.stderr
    with one_ns.inside():
        for family in Family:
            wanted = Redirection(guard=guard, source=Source.LOOPBACK)
            assert nft.holds(family, plan(wanted, family))
    assert "::6" in one_ns.run("ip", "address").stdout
    assert "fwmark" not in one_ns.run("ip", "rule").stdout


def test_without_queues_there_is_no_gate_and_a_warning(one_ns, guard, without_nfqueue):
    pod = Pod(one_ns, "nft")

    done = pod.init("apply", "--guard", guard, env=without_nfqueue)

    assert done.stderr.count("WARNING") == 2
    assert "no NFQUEUE" in done.stderr
    with one_ns.inside():
        for family in Family:
            wanted = Redirection(guard=guard, gate=False)
            assert nft.holds(family, plan(wanted, family))


def test_a_gate_that_was_asked_for_has_to_work(one_ns, guard, without_nfqueue):
    pod = Pod(one_ns, "nft")
    argv = ("apply", "--guard", guard, "--gate", "on")

    done = pod.init(*argv, env=without_nfqueue, check=False)

    assert done.returncode == 1
    assert "no NFQUEUE" in done.stderr
    assert not ours(pod.rules())


def test_a_transparent_source_that_was_asked_for_has_to_work(
    one_ns, guard, without_connmark
):
    pod = Pod(one_ns, "nft")

    failed = pod.init(
        *("apply", "--guard", guard, "--inbound-source", "transparent"),
        env=without_connmark,
        check=False,
    )

    assert failed.returncode == 1
    assert "no CONNMARK" in failed.stderr
    assert not ours(pod.rules())
    assert "fwmark" not in one_ns.run("ip", "rule").stdout


def families_in(rules):
    sections = "\n".join(rules).split("ip6tables-legacy")
    return [bool(ours(section.splitlines())) for section in sections]


def test_single_stack_is_the_family_of_the_first_address(two_ns_veth, guard):
    pod = Pod(two_ns_veth[0], "nft")
    pod.do("apply", "--guard", guard)
    assert families_in(pod.rules()) == [True, True]

    pod.do("apply", "--guard", guard, "--dual-stack=false")
    assert families_in(pod.rules()) == [True, False]

    pod.namespace.run("ip", "-4", "address", "flush", "dev", "eth0")
    pod.do("apply", "--guard", guard, "--dual-stack=false")
    assert families_in(pod.rules()) == [True, True]


def test_dual_stack_that_was_asked_for_has_to_work(one_ns, guard, tmp_path):
    pod = Pod(one_ns, "nft")
    shim = tmp_path / "ip6tables-nft-restore"
    shim.write_text("#!/bin/sh\necho no IPv6 >&2\nexit 4\n")
    shim.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"}
    forced = ("--force-iptables-binary", "nft")

    done = pod.init("apply", "--guard", guard, *forced, env=path)
    assert "skipped family=IPv6" in done.stderr
    assert families_in(pod.rules()) == [True, False]

    failed = pod.init(
        "apply", "--guard", guard, *forced, "--dual-stack", env=path, check=False
    )
    assert failed.returncode == 1
    assert "no IPv6" in failed.stderr
    assert not ours(pod.rules())


def test_another_namespace_is_reached_by_its_file(one_ns, guard):
    pod = Pod(one_ns, "nft")
    there = ("--network-namespace", str(one_ns.path))

    for action, expected in (("apply", True), ("clean", False)):
        options = ("--guard", guard) if action == "apply" else ()
        subprocess.run([*PODSPAN, action, *options, *there], check=True)
        assert bool(ours(pod.rules())) is expected


@pytest.mark.parametrize("way", ["clean", "apply --cleanup-only"])
def test_both_ways_to_clean_do(way, pod, guard):
    before = pod.rules()
    pod.do("apply", "--guard", guard)

    pod.do(*way.split())

    assert pod.rules() == before


needs_the_host = pytest.mark.skipif(
    not Path("/proc/sys/net/core/netdev_max_backlog").exists(),
    reason="runs inside a container: the host's network namespace is out of reach",
)


@needs_the_host
@pytest.mark.parametrize("action", ["apply", "clean"])
def test_the_hosts_network_namespace_is_refused(action):
    failed = subprocess.run(
        [*PODSPAN, action], capture_output=True, text=True, check=False
    )

    assert failed.returncode == 1
    assert "host's network namespace" in failed.stderr


@needs_the_host
def test_the_hosts_network_namespace_is_refused_from_afar(one_ns):
    host = f"/proc/{os.getpid()}/ns/net"

    failed = one_ns.run(*PODSPAN, "apply", "--network-namespace", host, check=False)

    assert failed.returncode == 1
    assert "host's network namespace" in failed.stderr


def wait_until_it_runs(process):
    """Wait until the command has taken nsenter's place and sleeps between its looks."""
    deadline = time.monotonic() + 20
    while "nanosleep" not in Path(f"/proc/{process.pid}/wchan").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
