"""Decide the rules: configuration in, rules out, nothing touched.

The specification is the golden files in tests/unit/golden/. The shape, per family:

    nat     OUTPUT     -> PODSPAN_OUTPUT  -> PODSPAN_REDIRECT    -> the outbound port
            PREROUTING -> PODSPAN_INBOUND -> PODSPAN_IN_REDIRECT -> the inbound port
            by way of the gate, where a connection's first packet waits until its
            destination has answered (agent/redirect/gate.py)
    mangle  PREROUTING -> PODSPAN_PREROUTING   drops what is invalid, and notes
            OUTPUT     -> PODSPAN_RESTORE      and brings home what the agent opened in
                                               a client's name (see `Source`)

All rules live in chains of our own, and a built-in chain gets one jump: so undoing is
deleting the jumps and the chains, and no foreign rule can be mistaken for ours. The
rules are data, because legacy tables take them through libiptc and nft takes text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, Literal

# Every chain of ours starts so: whatever carries the prefix may be deleted by `clean`.
CHAIN_PREFIX: Final = "PODSPAN_"
INBOUND: Final = CHAIN_PREFIX + "INBOUND"
OUTPUT: Final = CHAIN_PREFIX + "OUTPUT"
REDIRECT: Final = CHAIN_PREFIX + "REDIRECT"
IN_REDIRECT: Final = CHAIN_PREFIX + "IN_REDIRECT"
PREROUTING: Final = CHAIN_PREFIX + "PREROUTING"
RESTORE: Final = CHAIN_PREFIX + "RESTORE"

# In the order in which they are written: nothing is redirected before all is there.
MANGLE: Final = "mangle"
NAT: Final = "nat"
TABLES: Final = (MANGLE, NAT)

# Istio's ports (istio-iptables -p, -z and --iptables-probe-port), so that its policies
# and habits carry over.
OUTBOUND_PORT: Final = 15001
INBOUND_PORT: Final = 15006
PROBE_PORT: Final = 15002

# SO_MARK of the agent's own upstream sockets, which must not be redirected again, and
# the mark of the connections that they open: the values that Istio's in-pod ztunnel
# uses, which other tools thus already leave alone. The other bits are not ours.
AGENT_MARK: Final = 0x539
CONNECTION_MARK: Final = 0x111
MARK_MASK: Final = 0xFFF

# Packets with the connection mark find every address at home: ztunnel's numbers again.
ROUTE_TABLE: Final = 100
ROUTE_PRIORITY: Final = 32764

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
    """Address families; each has tables of its own."""

    IPV4 = 4
    IPV6 = 6


class Source(StrEnum):
    """Whose address an application sees when the agent relays a call to it."""

    TRANSPARENT = "transparent"  # the client's own
    LOOPBACK = "loopback"  # 127.0.0.6 or ::6, as with Istio's sidecar


LOOPBACK: Final[Mapping[Family, Network]] = {
    Family.IPV4: IPv4Network("127.0.0.1/32"),
    Family.IPV6: IPv6Network("::1/128"),
}
# Istio's "inbound passthrough" addresses.
LOOPBACK_SOURCE: Final[Mapping[Family, Network]] = {
    Family.IPV4: IPv4Network("127.0.0.6/32"),
    Family.IPV6: IPv6Network("::6/128"),
}


@dataclass(frozen=True, slots=True)
class Redirection:
    """What to redirect, and under which condition."""

    guard: str | None = GUARD_PATH  # None: unconditionally and at once, as Istio
    gate: bool = True
    outbound_port: int = OUTBOUND_PORT
    inbound_port: int = INBOUND_PORT
    include_inbound: tuple[int, ...] | Every = EVERY
    exclude_inbound: tuple[int, ...] = ()  # only where every port is included
    include_outbound: tuple[Network, ...] | Every = EVERY
    exclude_outbound: tuple[Network, ...] = ()
    include_outbound_ports: tuple[int, ...] = ()  # besides the networks
    exclude_outbound_ports: tuple[int, ...] = ()
    exclude_interfaces: tuple[str, ...] = ()
    virtual_interfaces: tuple[str, ...] = ()  # what comes in there is outbound
    exclude_users: tuple[int, ...] = ()
    exclude_groups: tuple[int, ...] = ()
    include_groups: tuple[int, ...] | Every = EVERY
    drop_invalid: bool = False
    loopback: Network = LOOPBACK[Family.IPV4]  # of IPv4, where -i has loopback
    probe_port: int = PROBE_PORT
    source: Source = Source.TRANSPARENT

    @property
    def gated(self) -> bool:
        """Whether first packets wait; not where inbound may mean outbound."""
        return bool(self.guard and self.gate and not self.virtual_interfaces)


@dataclass(frozen=True, slots=True)
class Module:
    """A match or target with its options, which are named as on the command line.

    An option whose name begins with ! is negated; one without a value is a switch.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()


RETURN: Final = Module("RETURN")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a table; rendered in the order that iptables-save prints."""

    chain: str
    target: Module  # one of iptables', or one of our chains
    source: Network | None = None
    destination: Network | None = None
    in_interface: str | None = None
    out_interface: str | None = None
    protocol: str | None = None
    matches: tuple[Module, ...] = ()
    table: str = NAT


def plan(wanted: Redirection, family: Family) -> tuple[Rule, ...]:
    """Return the rules of one family, in the order in which they are appended."""
    return (
        *_mangle(wanted),
        *_redirect(REDIRECT, wanted.outbound_port, wanted),
        *_redirect(IN_REDIRECT, wanted.inbound_port, wanted),
        *_inbound(wanted, family),
        *_outbound(wanted, family),
        # The jumps come last: a kernel that took only a part would redirect nothing.
        Rule("PREROUTING", Module(INBOUND), protocol="tcp"),
        Rule("OUTPUT", Module(OUTPUT), protocol="tcp"),
    )


def _mangle(wanted: Redirection) -> Iterator[Rule]:
    transparent = wanted.source is Source.TRANSPARENT
    if wanted.drop_invalid:
        # What is out of a connection's window would else be answered with a reset.
        invalid = Module("conntrack", (("ctstate", "INVALID"),))
        yield Rule(PREROUTING, Module("DROP"), matches=(invalid,), table=MANGLE)
    if transparent:
        # What the agent opened in a client's name comes by lo, with the mark of its
        # socket. The answers go to the client's address, so they have to be told.
        note = Module("CONNMARK", (("set-xmark", _masked(CONNECTION_MARK)),))
        marked = _marked(AGENT_MARK)
        # Of a connection that it opens: never one of the client's own, whose ports it
        # may have been given.
        new = Module("conntrack", (("ctstate", "NEW"),))
        yield Rule(
            PREROUTING, note, protocol="tcp", matches=(marked, new), table=MANGLE
        )
        mask = hex(MARK_MASK)
        masks = (("nfmask", mask), ("ctmask", mask))
        restore = Module("CONNMARK", (("restore-mark", ""), *masks))
        noted = Module("connmark", (("mark", _masked(CONNECTION_MARK)),))
        yield Rule(RESTORE, restore, protocol="tcp", matches=(noted,), table=MANGLE)
    if wanted.drop_invalid or transparent:
        yield Rule("PREROUTING", Module(PREROUTING), table=MANGLE)
    if transparent:
        yield Rule("OUTPUT", Module(RESTORE), protocol="tcp", table=MANGLE)


def _redirect(chain: str, port: int, wanted: Redirection) -> Iterator[Rule]:
    if not wanted.guard:
        yield Rule(chain, _to_port(port), protocol="tcp")
        return
    guard = (Module("bpf", (("object-pinned", wanted.guard),)),)
    if not wanted.gated:
        yield Rule(chain, _to_port(port), protocol="tcp", matches=guard)
        return
    let_in = (_marked(GATE_MARK),)
    yield Rule(chain, _to_port(port), protocol="tcp", matches=let_in)
    # Where nobody holds the queue, packets pass: --queue-bypass.
    queue = (("queue-num", str(GATE_QUEUE)), ("queue-bypass", ""))
    yield Rule(chain, Module("NFQUEUE", queue), protocol="tcp", matches=guard)


def _inbound(wanted: Redirection, family: Family) -> Iterator[Rule]:
    if wanted.gated:
        # Sent on by the gate: nobody listens where it is meant for.
        marked = _marked(AGENT_MARK)
        yield Rule(INBOUND, RETURN, matches=(marked,))
    for interface in wanted.exclude_interfaces:
        yield Rule(INBOUND, RETURN, in_interface=interface)
    for interface in wanted.virtual_interfaces:
        for network in _included(wanted, family):
            yield Rule(
                INBOUND,
                Module(REDIRECT),
                destination=network,
                in_interface=interface,
                protocol="tcp",
            )
        yield Rule(INBOUND, RETURN, in_interface=interface)
    if wanted.include_inbound != EVERY:
        for port in wanted.include_inbound:
            yield _port_rule(INBOUND, port, Module(IN_REDIRECT))
        return
    for port in wanted.exclude_inbound:
        yield _port_rule(INBOUND, port, RETURN)
    yield Rule(INBOUND, Module(IN_REDIRECT), protocol="tcp")


def _outbound(wanted: Redirection, family: Family) -> Iterator[Rule]:
    marked = _marked(AGENT_MARK)
    yield Rule(OUTPUT, RETURN, matches=(marked,))
    yield _probe(wanted, family)
    for interface in wanted.exclude_interfaces:
        yield Rule(OUTPUT, RETURN, out_interface=interface)
    for port in wanted.exclude_outbound_ports:
        yield _port_rule(OUTPUT, port, RETURN)
    yield from _loopback(wanted, family)
    yield from _owners(wanted)
    for network in _of_family(wanted.exclude_outbound, family):
        yield Rule(OUTPUT, RETURN, destination=network)
    for port in wanted.include_outbound_ports:
        yield _port_rule(OUTPUT, port, Module(REDIRECT))
    for included in _included(wanted, family):
        yield Rule(OUTPUT, Module(REDIRECT), destination=included, protocol="tcp")


def _probe(wanted: Redirection, family: Family) -> Rule:
    """Redirect the connection by which `validate` sees whether rules are at work.

    It is told by its source port, which no other connection has, and asks no guard.
    """
    port = str(wanted.probe_port)
    return Rule(
        OUTPUT,
        _to_port(wanted.inbound_port),
        destination=LOOPBACK[family],
        out_interface="lo",
        protocol="tcp",
        matches=(Module("tcp", (("sport", port), ("dport", port))),),
    )


def _loopback(wanted: Redirection, family: Family) -> Iterator[Rule]:
    if wanted.source is Source.LOOPBACK:
        source = LOOPBACK_SOURCE[family]
        yield Rule(OUTPUT, RETURN, source=source, out_interface="lo")
    if any(network and network.is_loopback for network in _included(wanted, family)):
        # Asked for: then only what Istio names is left alone.
        own = wanted.loopback if family is Family.IPV4 else LOOPBACK[family]
        yield Rule(OUTPUT, RETURN, destination=own)
        return
    # What stays inside the pod: localhost, and the pod calling its own address.
    yield Rule(OUTPUT, RETURN, out_interface="lo")


def _owners(wanted: Redirection) -> Iterator[Rule]:
    """Leave alone what the sockets of some users and groups open."""
    owners = [("uid-owner", user) for user in wanted.exclude_users]
    owners += [("gid-owner", group) for group in wanted.exclude_groups]
    for option, number in owners:
        owner = Module("owner", ((option, str(number)),))
        yield Rule(OUTPUT, RETURN, matches=(owner,))
    if wanted.include_groups != EVERY:
        others = tuple(
            Module("owner", (("!gid-owner", str(group)),))
            for group in wanted.include_groups
        )
        yield Rule(OUTPUT, RETURN, matches=others)


def _included(wanted: Redirection, family: Family) -> Iterator[Network | None]:
    """Yield the networks to redirect; None is every one."""
    if wanted.include_outbound == EVERY:
        yield None
    else:
        yield from _of_family(wanted.include_outbound, family)


def _to_port(port: int) -> Module:
    return Module("REDIRECT", (("to-ports", str(port)),))


def _port_rule(chain: str, port: int, target: Module) -> Rule:
    dport = Module("tcp", (("dport", str(port)),))
    return Rule(chain, target, protocol="tcp", matches=(dport,))


def _marked(mark: int) -> Module:
    return Module("mark", (("mark", _masked(mark)),))


def _masked(mark: int) -> str:
    return f"{mark:#x}/{MARK_MASK:#x}"


def _of_family(networks: Iterable[Network], family: Family) -> Iterator[Network]:
    return (network for network in networks if network.version == family)


def chains(rules: Iterable[Rule]) -> tuple[str, ...]:
    """Name the chains that the rules need us to make, in order of appearance."""
    names = (name for rule in rules for name in (rule.chain, rule.target.name))
    return tuple(dict.fromkeys(name for name in names if is_ours(name)))


def of_table(rules: Iterable[Rule], table: str) -> tuple[Rule, ...]:
    """Choose the rules of one table."""
    return tuple(rule for rule in rules if rule.table == table)


def is_ours(chain: str) -> bool:
    """Say whether a chain is podspan's, of this version or another."""
    return chain.startswith(CHAIN_PREFIX)


def render(
    rules: Sequence[Rule], undo: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Write the input of `iptables-restore --noflush`: one transaction per table.

    `undo` are lines by table that come first, in the table's transaction. A table in
    which something is only undone comes last, as in a removal: nat before mangle.
    """
    undo = undo or {}
    made = [table for table in TABLES if of_table(rules, table)]
    undone = [table for table in undo if undo[table] and table not in made]
    undone.sort(key=lambda table: table != NAT)
    return "".join(
        _render_table(table, of_table(rules, table), undo.get(table, ()))
        for table in (*made, *undone)
    )


def _render_table(table: str, rules: Sequence[Rule], undo: Iterable[str]) -> str:
    lines = [f"*{table}", *undo]
    lines += (f":{chain} - [0:0]" for chain in chains(rules))
    lines += map(render_rule, rules)
    lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def render_rule(rule: Rule) -> str:
    """Write one rule as iptables-save prints it."""
    fields = (
        ("-s", rule.source),
        ("-d", rule.destination),
        ("-i", rule.in_interface),
        ("-o", rule.out_interface),
        ("-p", rule.protocol),
    )
    words = ["-A", rule.chain]
    for flag, value in fields:
        if value is not None:
            words += [flag, str(value)]
    for match in rule.matches:
        words += ["-m", match.name, *_options(match)]
    words += ["-j", rule.target.name, *_options(rule.target)]
    return " ".join(words)


def _options(module: Module) -> Iterator[str]:
    for name, value in module.options:
        if name.startswith("!"):
            yield "!"
        yield "--" + name.removeprefix("!")
        if value:
            yield value


def render_routing(source: Source, family: Family) -> str:
    """Write as commented commands what `routing` does by netlink for a source."""
    ip = f"# ip -{family.value}"
    if source is Source.TRANSPARENT:
        mark = _masked(CONNECTION_MARK)
        every = ip_network("0.0.0.0/0" if family is Family.IPV4 else "::/0")
        return (
            f"{ip} rule add fwmark {mark} lookup {ROUTE_TABLE} "
            f"priority {ROUTE_PRIORITY}\n"
            f"{ip} route add local {every} dev lo table {ROUTE_TABLE}\n"
        )
    if family is Family.IPV6:
        return f"{ip} address add {LOOPBACK_SOURCE[family]} dev lo\n"
    return ""  # all of 127.0.0.0/8 is there already
