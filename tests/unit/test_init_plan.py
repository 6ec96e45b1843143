"""The plan against its specification: golden/init-*.rules, read as iptables reads them.

After a wanted change: `podspan init plan OPTIONS` of the scenario is the new file. The
names are those of Istio's cases (tools/istio-iptables/pkg/capture/testdata) where the
options are. Its IPv6 cases are the second half of ours; its TPROXY cases are refused,
and its DNS cases have no meaning here: see test_init_options.py.
"""

import re
from ipaddress import ip_network
from pathlib import Path

import pytest
from podspan.init import plan, saved
from podspan.init.options import parse
from podspan.init.plan import Family, Module, Redirection, Rule, Source

GOLDEN = Path(__file__).parent / "golden"

GUARDED = "--guard=/sys/fs/bpf/other/guard"
SCENARIOS = {
    "default": [],
    "unguarded": ["--guard", "none"],
    "no-gate": ["--gate", "off"],
    "other-ports-and-guard": ["-p", "16001", "-z", "16006", GUARDED],
    "loopback-source": ["--inbound-source", "loopback"],
    "drop-invalid": ["--drop-invalid"],
    "drop-invalid-loopback-source": ["--drop-invalid", "--inbound-source", "loopback"],
    # Ports that are excluded have no meaning here: only what is listed goes.
    "inbound-ports-include": ["-b", "80,8080", "-d", "15020"],
    "inbound-wildcard-exclude": ["-d", "22,15020"],
    "inbound-only": ["-i", ""],
    "outbound-only": ["-b", ""],
    "ipnets": ["-i", "10.0.0.0/8,fd00::/8"],
    "ip-range": [
        *("-i", "10.0.0.0/8,fd00::/8", "-x", "10.96.0.1,fd00:96::1"),
        *("-u", "3,4", "-g", "1,2"),
    ],
    "loopback-outbound-iprange": ["-i", "127.1.2.3/32,::1/128"],
    "host-ipv4-loopback-cidr": ["-i", "127.1.2.3/32"],
    "outbound-ports-include": ["-i", "", "-q", "32000,31000"],
    "outbound-ports-exclude": ["-o", "1024,21"],
    "basic-exclude-nic": ["-c", "not-istio-nic"],
    "kube-virt-interfaces": ["-k", "eth1,eth2"],
    "ipnets-with-kube-virt-interfaces": ["-i", "10.0.0.0/8", "-k", "eth1,eth2"],
    "uid-gid": ["-u", "3,4", "-g", "1,2"],
    "outbound-owner-groups": [],
    "outbound-owner-groups-exclude": ["-g", "1"],
    "all-at-once": [
        *("-d", "15020", "-x", "10.96.0.1", "-q", "3306", "-o", "53", "-c", "eth1"),
        *("-k", "k6t-+", "-u", "3", "-g", "1", "-i", "10.0.0.0/8,fd00::/8"),
        *("--drop-invalid", "--iptables-probe-port", "16002"),
    ],
}
VARIABLES = {
    "host-ipv4-loopback-cidr": {"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.0.0.0/8"},
    "outbound-owner-groups": {"ISTIO_OUTBOUND_OWNER_GROUPS": "101,202"},
    "outbound-owner-groups-exclude": {"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "888,5"},
}


def wanted_in(scenario):
    environment = VARIABLES.get(scenario, {})
    return parse(["plan", *SCENARIOS[scenario]], environment).redirection


every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
both_families = pytest.mark.parametrize("family", Family)


@every_scenario
def test_the_rules_are_as_specified(scenario):
    wanted = wanted_in(scenario)
    rules = "".join(
        f"# IPv{family.value}\n"
        + plan.render(plan.plan(wanted, family))
        + plan.render_routing(wanted.source, family)
        for family in Family
    )

    assert rules == (GOLDEN / f"init-{scenario}.rules").read_text()


def test_every_golden_file_has_a_scenario():
    names = {path.stem.removeprefix("init-") for path in GOLDEN.glob("init-*.rules")}

    assert names == set(SCENARIOS)


@both_families
@every_scenario
def test_a_built_in_chain_gets_one_jump_and_nothing_else(scenario, family):
    rules = plan.plan(wanted_in(scenario), family)
    built_in = [rule for rule in rules if not plan.is_ours(rule.chain)]

    places = [(rule.table, rule.chain) for rule in built_in]
    assert len(set(places)) == len(places)
    assert {("nat", "OUTPUT"), ("nat", "PREROUTING")} <= set(places)
    assert all(plan.is_ours(rule.target.name) for rule in built_in)


@both_families
@every_scenario
def test_no_connection_but_the_probe_is_redirected_past_the_guard(scenario, family):
    wanted = wanted_in(scenario)
    rules = plan.plan(wanted, family)
    [probe, *guarded] = sorted(
        (rule for rule in rules if rule.target.name == "REDIRECT"),
        key=lambda rule: rule.chain != plan.OUTPUT,
    )

    let_in = (Module("mark", (("mark", "0x53a/0xfff"),)),)
    guard = (Module("bpf", (("object-pinned", wanted.guard),)),)
    gates = [rule for rule in rules if rule.target.name == "NFQUEUE"]
    if not wanted.guard:
        assert (gates, [rule.matches for rule in guarded]) == ([], [(), ()])
    elif not wanted.gated:
        assert (gates, [rule.matches for rule in guarded]) == ([], [guard, guard])
    else:
        assert [rule.matches for rule in guarded] == [let_in, let_in]
        assert [(gate.chain, gate.matches) for gate in gates] == [
            (plan.REDIRECT, guard),
            (plan.IN_REDIRECT, guard),
        ]
    port = str(wanted.probe_port)
    assert probe.matches == (Module("tcp", (("sport", port), ("dport", port))),)
    assert probe.destination == plan.LOOPBACK[family]


@both_families
@every_scenario
def test_what_the_agent_marked_is_left_alone_before_all_else(scenario, family):
    rules = plan.plan(wanted_in(scenario), family)
    first = next(rule for rule in rules if rule.chain == plan.OUTPUT)

    assert plan.render_rule(first) == (
        "-A PODSPAN_OUTPUT -m mark --mark 0x539/0xfff -j RETURN"
    )


def test_nothing_redirects_before_all_else_is_in_place():
    wanted = Redirection(source=Source.TRANSPARENT, drop_invalid=True)

    text = plan.render(plan.plan(wanted, Family.IPV4), undo={"filter": ["-X OLD"]})

    assert re.findall(r"^\*(\w+)", text, re.MULTILINE) == ["mangle", "nat", "filter"]


def test_what_redirects_is_undone_first():
    text = plan.render((), undo={"mangle": ["-X OLD"], "nat": ["-X OLD"]})

    assert re.findall(r"^\*(\w+)", text, re.MULTILINE) == ["nat", "mangle"]


def test_chain_names_fit_into_the_kernel():
    # XT_EXTENSION_MAXNAMELEN (linux/netfilter/x_tables.h), the end included: a jump's
    # target is written into that field.
    wanted = Redirection(drop_invalid=True)
    for chain in plan.chains(plan.plan(wanted, Family.IPV4)):
        assert len(chain) < 29


def test_a_rule_reads_as_iptables_save_prints_it():
    rule = Rule(
        "PODSPAN_OUTPUT",
        Module("REDIRECT", (("to-ports", "15001"),)),
        source=ip_network("10.1.0.0/16"),
        destination=ip_network("10.0.0.0/8"),
        in_interface="eth1",
        out_interface="eth0",
        protocol="tcp",
        matches=(
            Module("tcp", (("dport", "80"),)),
            Module("owner", (("!gid-owner", "5"),)),
        ),
    )

    assert plan.render_rule(rule) == (
        "-A PODSPAN_OUTPUT -s 10.1.0.0/16 -d 10.0.0.0/8 -i eth1 -o eth0 -p tcp "
        "-m tcp --dport 80 -m owner ! --gid-owner 5 -j REDIRECT --to-ports 15001"
    )


SAVED = """\
*filter
:INPUT ACCEPT [0:0]
-A INPUT -j ACCEPT
COMMIT
# Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon Nov 23 20:11:26 2026
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [3:180]
:KUBE-SERVICES - [0:0]
:NOT_PODSPAN_OUTPUT - [0:0]
:PODSPAN_OUTPUT - [0:0]
:PODSPAN_OLD - [0:0]
-A OUTPUT -m comment --comment "-j PODSPAN_OUTPUT" -j KUBE-SERVICES
-A OUTPUT -p tcp -j PODSPAN_OUTPUT
-A OUTPUT -p udp -g PODSPAN_OLD
-A OUTPUT -o eth0 -j NOT_PODSPAN_OUTPUT
-A KUBE-SERVICES -j PODSPAN_OLD
-A PODSPAN_OUTPUT -j PODSPAN_OLD
-A PODSPAN_OUTPUT -j KUBE-SERVICES
COMMIT
"""


def test_undo_removes_jumps_then_chains_and_names_nothing_foreign():
    assert saved.undo_lines(SAVED) == {
        "nat": [
            "-D OUTPUT -p tcp -j PODSPAN_OUTPUT",
            "-D OUTPUT -p udp -g PODSPAN_OLD",
            "-D KUBE-SERVICES -j PODSPAN_OLD",
            "-F PODSPAN_OUTPUT",
            "-F PODSPAN_OLD",
            "-X PODSPAN_OUTPUT",
            "-X PODSPAN_OLD",
        ]
    }


def test_undo_of_nothing_is_nothing():
    foreign = re.sub(r"^.*\bPODSPAN_.*\n", "", SAVED, flags=re.MULTILINE)

    assert saved.undo_lines("") == {}
    assert saved.undo_lines(foreign) == {}
    assert saved.ours(foreign) == {}


def test_undo_stands_before_what_is_made_again():
    rules = (Rule("PODSPAN_OUTPUT", Module("RETURN")),)

    assert plan.render(rules, undo={"nat": ["-F PODSPAN_OLD", "-X PODSPAN_OLD"]}) == (
        "*nat\n"
        "-F PODSPAN_OLD\n"
        "-X PODSPAN_OLD\n"
        ":PODSPAN_OUTPUT - [0:0]\n"
        "-A PODSPAN_OUTPUT -j RETURN\n"
        "COMMIT\n"
    )


def test_what_is_ours_is_our_chains_and_the_jumps_into_them():
    assert saved.ours(SAVED) == {
        "nat": {
            "PODSPAN_OUTPUT": ["-j PODSPAN_OLD", "-j KUBE-SERVICES"],
            "PODSPAN_OLD": [],
            "OUTPUT": ["-p tcp -j PODSPAN_OUTPUT", "-p udp -g PODSPAN_OLD"],
            "KUBE-SERVICES": ["-j PODSPAN_OLD"],
        }
    }


@both_families
@every_scenario
def test_rendered_rules_are_found_as_expected(scenario, family):
    rules = plan.plan(wanted_in(scenario), family)

    assert saved.ours(plan.render(rules)) == saved.expected(rules)
