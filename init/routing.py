"""The routing half of transparent sources, through netlink.

An application's answer to a client's address has to come back to the agent's socket:
packets with the connection mark look into a table in which every address is local. And
for the loopback source IPv6 needs an address, ::6 (IPv4 has all of 127.0.0.0/8).

What is ours is told by a number that the kernel keeps with it, so equal entries of
Istio's ztunnel or sidecar serve us as well and are left alone by `clean`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, ENOENT, EOPNOTSUPP, ESRCH
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any, Final

from podspan.agent.errors import RedirectError
from podspan.init.plan import (
    CONNECTION_MARK,
    LOOPBACK_SOURCE,
    MARK_MASK,
    ROUTE_PRIORITY,
    ROUTE_TABLE,
    Family,
    Source,
)

# The origin of rules and routes (FRA_PROTOCOL since Linux 4.17; RTM's proto). Numbers
# from 5 up are for user space; none of linux/rtnetlink.h and iproute2's rt_protos.d.
PROTOCOL: Final = 0x57
# An address has no such origin before Linux 5.18; its route's metric is kept and
# reported since 4.18 (IFA_RT_PRIORITY), and means nothing on loopback.
ADDRESS_METRIC: Final = 0x539

LO: Final = 1  # the index of loopback, in every namespace
# What the kernel says of things that are not there, or of a family that is not.
GONE: Final = (ENOENT, ESRCH, EADDRNOTAVAIL, EAFNOSUPPORT, EOPNOTSUPP)

# Absent where the kernel has no IPv6 or was booted with ipv6.disable=1.
IPV6_MARK: Final = Path("/proc/thread-self/net/if_inet6")

FAMILIES: Final = {Family.IPV4: AF_INET, Family.IPV6: AF_INET6}
SCOPE_HOST: Final = 254


def replace(family: Family, source: Source | None) -> None:
    """Make what `source` needs all that there is of ours; None: remove it."""
    with _netlink(f"set up IPv{family.value} routing") as ip:
        _set_rule(ip, family, source is Source.TRANSPARENT)
        if family is Family.IPV6 and IPV6_MARK.exists():
            _set_address(ip, source is Source.LOOPBACK)


def is_transparent(family: Family) -> bool:
    """Say whether sockets here may be bound to a client's address, and get answers.

    The rule is the mark: `apply` leaves it only where the rest is in place too.
    """
    with _netlink("read routing rules") as ip:
        return bool(any(map(_is_our_kind, _rules(ip, family))))


def has_ipv6_first() -> bool:
    """Say whether the first address that is the pod's own is an IPv6 one."""
    with _netlink("read addresses") as ip:
        for address in ip.get_addr():
            # Neither loopback (host) nor link-local.
            if address["index"] != LO and address["scope"] == 0:
                return int(address["family"]) == AF_INET6
    return False


def _set_rule(ip: Any, family: Family, wanted: bool) -> None:
    """The route comes before the rule that leads to it, and goes after it."""
    rule = {
        "family": FAMILIES[family],
        "priority": ROUTE_PRIORITY,
        "fwmark": CONNECTION_MARK,
        "fwmask": MARK_MASK,
        "table": ROUTE_TABLE,
    }
    route = {
        "family": FAMILIES[family],
        "type": "local",
        "dst": "0.0.0.0/0" if family is Family.IPV4 else "::/0",
        "oif": LO,
        "table": ROUTE_TABLE,
        "proto": PROTOCOL,
        "scope": SCOPE_HOST if family is Family.IPV4 else 0,
    }
    if wanted:
        _unless(ip.route, "add", route, (EEXIST,))
        if not any(map(_is_our_kind, _rules(ip, family))):
            _unless(ip.rule, "add", {**rule, "protocol": PROTOCOL}, (EEXIST,))
        return
    # Both are deleted only where the origin is ours, too.
    _unless(ip.rule, "del", {**rule, "protocol": PROTOCOL}, GONE)
    _unless(ip.route, "del", route, GONE)


def _rules(ip: Any, family: Family) -> list[Any]:
    """Return the rules of a family; a kernel without such has none."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        return list(ip.get_rules(family=FAMILIES[family]))
    except NetlinkError as exc:
        if exc.code not in GONE:
            raise
        return []


def _is_our_kind(rule: Any) -> bool:
    names = ("FRA_FWMARK", "FRA_FWMASK", "FRA_TABLE")
    found = tuple(map(rule.get_attr, names))
    return found == (CONNECTION_MARK, MARK_MASK, ROUTE_TABLE)


def _set_address(ip: Any, wanted: bool) -> None:
    network = LOOPBACK_SOURCE[Family.IPV6]
    address = {
        "index": LO,
        "address": str(network.network_address),
        "prefixlen": network.prefixlen,
    }
    if wanted:
        _unless(ip.addr, "add", {**address, "rt_priority": ADDRESS_METRIC}, (EEXIST,))
        return
    for each in list(ip.get_addr(family=AF_INET6, index=LO)):
        if each.get_attr("IFA_RT_PRIORITY") == ADDRESS_METRIC:
            _unless(ip.addr, "del", address, GONE)


def _unless(
    act: Any, verb: str, fields: dict[str, Any], allowed: tuple[int, ...]
) -> None:
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        act(verb, **fields)
    except NetlinkError as exc:
        if exc.code not in allowed:
            raise


@contextmanager
def _netlink(what: str) -> Iterator[Any]:
    """Yield a netlink socket of this thread's namespace."""
    from pyroute2 import IPRoute  # noqa: PLC0415  # a quarter of a second
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        with IPRoute() as ip:
            yield ip
    except (NetlinkError, OSError) as exc:
        raise RedirectError(
            f"cannot {what}: {exc}",
            hint="needs CAP_NET_ADMIN and a kernel with IP_MULTIPLE_TABLES; "
            "--inbound-source loopback does without",
            command="netlink",
        ) from exc
