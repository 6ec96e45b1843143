"""Decide the redirect rules: configuration in, nat rules out, nothing touched.

The specification is the golden files in tests/unit/golden/. The shape, per family:

    OUTPUT     -> PODSPAN_OUTPUT  -> PODSPAN_REDIRECT     -> the agent's outbound port
    PREROUTING -> PODSPAN_INBOUND -> PODSPAN_IN_REDIRECT  -> the agent's inbound port

All rules live in chains of our own, and a built-in chain gets one jump: so undoing is
deleting the jumps and the chains, and no foreign rule can be mistaken for ours. The
rules are data, because legacy tables take them through libiptc and nft takes text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal

# Every chain of ours starts so: whatever carries the prefix may be deleted by `clean`.
CHAIN_PREFIX: Final = "PODSPAN_"
INBOUND: Final = CHAIN_PREFIX + "INBOUND"
OUTPUT: Final = CHAIN_PREFIX + "OUTPUT"
REDIRECT: Final = CHAIN_PREFIX + "REDIRECT"
IN_REDIRECT: Final = CHAIN_PREFIX + "IN_REDIRECT"

# Istio's ports (istio-iptables -p and -z), so that its policies and habits carry over.
OUTBOUND_PORT: Final = 15001
INBOUND_PORT: Final = 15006

# SO_MARK of the agent's own upstream sockets, which must not be redirected again: the
# value that Istio's in-pod ztunnel uses, which other tools thus already leave alone.
AGENT_MARK: Final = 0x539

# The mark of a SYN that waited at the gate (agent/redirect/gate.py) and may come in.
GATE_MARK: Final = 0x53A
GATE_QUEUE: Final = 15001

# Where the agent pins the program that says whether a connection may be redirected.
GUARD_PATH: Final = "/sys/fs/bpf/podspan/redirect_guard"

# XT_BPF_PATH_MAX (linux/netfilter/xt_bpf.h), the room of 64 instructions, less the end.
GUARD_PATH_MAX: Final = 511

EVERY: Final = "*"
Every = Literal["*"]

Network = IPv4Network | IPv6Network


class Family(IntEnum):
    """Address families; each has a nat table of its own."""

    IPV4 = 4
    IPV6 = 6


@dataclass(frozen=True, slots=True)
class Redirection:
    """What to redirect, and under which condition."""

    guard: str | None = GUARD_PATH  # None: unconditionally, as Istio
    outbound_port: int = OUTBOUND_PORT
    inbound_port: int = INBOUND_PORT
    include_inbound: tuple[int, ...] | Every = EVERY
    exclude_inbound: tuple[int, ...] = ()  # only where every port is included
    include_outbound: tuple[Network, ...] | Every = EVERY
    exclude_outbound: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    """A match or target with its options, which are named as on the command line."""

    name: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of the nat table; rendered in the order that iptables-save prints."""

    chain: str
    target: Module  # RETURN, REDIRECT, or one of our chains
    destination: Network | None = None
    out_interface: str | None = None
    protocol: str | None = None
    matches: tuple[Module, ...] = ()


def plan(wanted: Redirection, family: Family) -> tuple[Rule, ...]:
    """Return the rules of one family, in the order in which they are appended."""
    return (
        _redirect(REDIRECT, wanted.outbound_port, wanted.guard),
        _redirect(IN_REDIRECT, wanted.inbound_port, wanted.guard),
        *_inbound(wanted),
        *_outbound(wanted, family),
        # The jumps come last: a kernel that took only a part would redirect nothing.
        Rule("PREROUTING", Module(INBOUND), protocol="tcp"),
        Rule("OUTPUT", Module(OUTPUT), protocol="tcp"),
    )


def _redirect(chain: str, port: int, guard: str | None) -> Rule:
    matches = (Module("bpf", (("object-pinned", guard),)),) if guard else ()
    target = Module("REDIRECT", (("to-ports", str(port)),))
    return Rule(chain, target, protocol="tcp", matches=matches)


def _inbound(wanted: Redirection) -> Iterator[Rule]:
    if wanted.include_inbound != EVERY:
        for port in wanted.include_inbound:
            yield _port_rule(INBOUND, port, Module(IN_REDIRECT))
        return
    for port in wanted.exclude_inbound:
        yield _port_rule(INBOUND, port, Module("RETURN"))
    yield Rule(INBOUND, Module(IN_REDIRECT), protocol="tcp")


def _outbound(wanted: Redirection, family: Family) -> Iterator[Rule]:
    mark = Module("mark", (("mark", hex(AGENT_MARK)),))
    yield Rule(OUTPUT, Module("RETURN"), matches=(mark,))
    # What stays inside the pod: localhost, and the pod calling its own address.
    yield Rule(OUTPUT, Module("RETURN"), out_interface="lo")
    for network in _of_family(wanted.exclude_outbound, family):
        yield Rule(OUTPUT, Module("RETURN"), destination=network)
    if wanted.include_outbound == EVERY:
        yield Rule(OUTPUT, Module(REDIRECT), protocol="tcp")
        return
    for network in _of_family(wanted.include_outbound, family):
        yield Rule(OUTPUT, Module(REDIRECT), destination=network, protocol="tcp")


def _port_rule(chain: str, port: int, target: Module) -> Rule:
    dport = Module("tcp", (("dport", str(port)),))
    return Rule(chain, target, protocol="tcp", matches=(dport,))


def _of_family(networks: Iterable[Network], family: Family) -> Iterator[Network]:
    return (network for network in networks if network.version == family)


def chains(rules: Iterable[Rule]) -> tuple[str, ...]:
    """Name the chains that the rules need us to make, in order of appearance."""
    names = (name for rule in rules for name in (rule.chain, rule.target.name))
    return tuple(dict.fromkeys(name for name in names if is_ours(name)))


def is_ours(chain: str) -> bool:
    """Say whether a chain is podspan's, of this version or another."""
    return chain.startswith(CHAIN_PREFIX)


def render(rules: Sequence[Rule], undo: Iterable[str] = ()) -> str:
    """Write one transaction for `iptables-restore --noflush`.

    `undo` are lines that come first, in the same transaction.
    """
    lines = ["*nat", *undo]
    lines += (f":{chain} - [0:0]" for chain in chains(rules))
    lines += map(render_rule, rules)
    lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def render_rule(rule: Rule) -> str:
    """Write one rule as iptables-save prints it."""
    words = ["-A", rule.chain]
    if rule.destination is not None:
        words += ["-d", str(rule.destination)]
    if rule.out_interface is not None:
        words += ["-o", rule.out_interface]
    if rule.protocol is not None:
        words += ["-p", rule.protocol]
    for match in rule.matches:
        words += ["-m", match.name, *_options(match)]
    words += ["-j", rule.target.name, *_options(rule.target)]
    return " ".join(words)


def _options(module: Module) -> Iterator[str]:
    for name, value in module.options:
        yield f"--{name}"
        yield value


def undo_lines(saved: str) -> list[str]:
    """Read iptables-save's output for nat: the lines that remove all that is ours.

    Whatever a half-applied run or another version left is found by the chains' prefix:
    jumps from chains that are not ours, then our chains. Foreign rules are not named.
    """
    lines = saved.splitlines()
    ours = [line[1:].split()[0] for line in lines if is_ours(line[1:])]
    jumps = [
        "-D" + line.removeprefix("-A")
        for line in lines
        if line.startswith("-A ") and _is_jump_into_ours(line)
    ]
    # All are emptied before the first is deleted: they refer to each other.
    return [*jumps, *(f"-F {name}" for name in ours), *(f"-X {name}" for name in ours)]


def _is_jump_into_ours(line: str) -> bool:
    words = line.split()
    if is_ours(words[1]):
        return False
    # A comment could hold the word -j; its last occurrence is the target's, because
    # iptables-save prints the target last and our chains take no options.
    return words[-2] in ("-j", "-g") and is_ours(words[-1])
