"""A network namespace per pod, joined by a bridge, with IPv4 and IPv6.

    client  productpage  details  reviews  ratings      eth0 in each
       |         |          |        |        |
    ---+---------+----------+--------+--------+---      podspan-demo: the bridge

The bridge has a namespace of its own, so the host's network is not touched. Each
namespace carries a mark, written before the namespace gets its name: what bears our
mark and whose maker is dead is what a crashed run left, and only that is removed.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

from podspan.agent.demo.bookinfo import PODS
from podspan.agent.errors import PodspanError, UsageError
from pyroute2 import IPRoute, NetlinkError, netns

BRIDGE = "podspan-demo"

# Any private ranges do: nothing outside these namespaces is reachable from them.
NETWORK_V4 = IPv4Network("10.97.0.0/24")
NETWORK_V6 = IPv6Network("fd97::/64")

NAMED = Path(netns.NETNS_RUN_DIR)

CLONE_NEWNET = 0x40000000  # linux/sched.h
IFA_F_NODAD = 0x02  # linux/if_addr.h: usable at once, no duplicate detection
LOOPBACK = 1  # the index of lo in every namespace

# The alias of lo in each namespace of ours; behind it, who made it and when that
# process started, because process ids come again.
MARK = "podspan-demo"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Pod:
    """One namespace and where it is reached."""

    name: str
    ipv4: str
    ipv6: str

    @property
    def path(self) -> Path:
        """What to open to enter the namespace."""
        return NAMED / self.name

    def address(self, *, ipv6: bool) -> str:
        """Return the address of one family."""
        return self.ipv6 if ipv6 else self.ipv4


Topology = dict[str, Pod]

T = TypeVar("T")


class TopologyError(PodspanError):
    """The namespaces could not be made or joined."""


@contextmanager
def topology() -> Iterator[Topology]:
    """Make the namespaces; remove them whatever happens."""
    pods = {
        name: Pod(name, str(NETWORK_V4[host]), str(NETWORK_V6[host]))
        for host, name in enumerate(PODS, start=2)
    }
    remove_leftovers()
    _refuse_taken_names()
    made: list[str] = []
    try:
        for name in (BRIDGE, *pods):
            made.append(name)
            _in_a_thread(partial(_make_namespace, name))
        _in_namespace(BRIDGE, partial(_join, pods.values()))
        for pod in pods.values():
            _in_namespace(pod.name, partial(_address, pod))
    except (OSError, NetlinkError) as exc:
        _remove(made)
        raise TopologyError(
            f"cannot make the demo's network: {exc}",
            "it needs root, network namespaces, veth and bridge",
        ) from exc
    except BaseException:
        _remove(made)
        raise
    try:
        yield pods
    finally:
        _remove(made)


def remove_leftovers() -> None:
    """Remove what a run left that could not clean up after itself."""
    for name in (*PODS, BRIDGE):
        mark = _mark_of(name)
        if mark and not _maker_lives(mark):
            netns.remove(name)


def _refuse_taken_names() -> None:
    for name in (BRIDGE, *PODS):
        mark = _mark_of(name)
        if mark:
            raise UsageError(
                f"another demo is running (process {mark.split()[1]})",
                "wait until it is done, or stop it",
            )
        if (NAMED / name).exists():
            raise UsageError(
                f"a network namespace named {name} exists already",
                "the demo names its spans by its namespaces, so it needs that name: "
                f"if nothing uses it, ip netns delete {name}",
            )


def _remove(names: Iterable[str]) -> None:
    for name in names:
        if _mark_of(name) == _own_mark():
            netns.remove(name)


def _make_namespace(name: str) -> None:
    """Make a namespace around this thread, mark it, then give it its name."""
    if _libc.unshare(CLONE_NEWNET):
        raise _os_error("unshare", name)
    with IPRoute() as ip:
        ip.link("set", index=LOOPBACK, state="up", ifalias=_own_mark())
    netns.attach(name, threading.get_native_id())


def _join(pods: Iterable[Pod], ip: IPRoute) -> None:
    """Make the bridge, and a cable from it to each pod."""
    # Without the spanning tree protocol a port forwards as soon as it is up.
    ip.link("add", ifname="bridge", kind="bridge", br_stp_state=0)
    (bridge,) = ip.link_lookup(ifname="bridge")
    ip.link("set", index=bridge, state="up")
    for pod in pods:
        peer = {"ifname": "eth0", "net_ns_fd": pod.name}
        ip.link("add", ifname=pod.name, kind="veth", peer=peer)
        (port,) = ip.link_lookup(ifname=pod.name)
        ip.link("set", index=port, master=bridge, state="up")


def _address(pod: Pod, ip: IPRoute) -> None:
    (eth0,) = ip.link_lookup(ifname="eth0")
    ip.addr("add", index=eth0, address=pod.ipv4, prefixlen=NETWORK_V4.prefixlen)
    ip.addr(
        "add",
        index=eth0,
        address=pod.ipv6,
        prefixlen=NETWORK_V6.prefixlen,
        flags=IFA_F_NODAD,
    )
    ip.link("set", index=eth0, state="up")


def _mark_of(name: str) -> str:
    """Return our mark in a namespace; "" where there is none."""
    try:
        alias = _in_namespace(name, _loopback_alias)
    except OSError:  # no such namespace, or a name without one
        return ""
    return alias if alias.startswith(f"{MARK} ") else ""


def _loopback_alias(ip: IPRoute) -> str:
    (link,) = ip.get_links(LOOPBACK)
    return link.get_attr("IFLA_IFALIAS") or ""


def _own_mark() -> str:
    return f"{MARK} {os.getpid()} {_start_of(os.getpid())}"


def _maker_lives(mark: str) -> bool:
    _, pid, start = mark.split()
    return _start_of(int(pid)) == start


def _start_of(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Field 22, counted behind the name, which may hold blanks and parentheses.
    return stat[stat.rindex(")") + 2 :].split()[19]


def _in_namespace(name: str, work: Callable[[IPRoute], T]) -> T:
    def enter_and_work() -> T:
        with (NAMED / name).open("rb") as namespace:
            if _libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise _os_error("setns", name)
        with IPRoute() as ip:
            return work(ip)

    return _in_a_thread(enter_and_work)


def _in_a_thread(work: Callable[[], T]) -> T:
    """Run work in a thread that is never used again: it may change its namespace.

    Also when interrupted, this waits for the thread, so that nothing is made while
    the caller cleans up.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()


def _os_error(what: str, name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}", name)
