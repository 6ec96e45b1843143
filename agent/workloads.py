"""Who is at the ends of an exchange, in the words of Istio's metrics.

One end's namespace is known by its inode. The other end is an address: that of a pod of
this node, or one that another namespace of this node was seen to have. What may be
someone else's stays unknown: a wrong name is worse than none. So of a Service's cluster
address, of a pod of another node, and of one on the node's network nothing is said. Nor
of loopback, and of who calls a server from its own address: where connections are
redirected, as in Istio, their proxy does.

Names are those of workloads, not of pods, so that their number does not grow with time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, NamedTuple

from podspan.agent.exchange import Exchange, Role
from podspan.agent.pods.names import ServiceNames
from podspan.agent.pods.pod import NO_REVISION, Pod
from podspan.agent.url import request_url

UNKNOWN: Final = "unknown"

# Addresses learnt from namespaces that are no pods, and programs without a namespace's
# name: beyond that many, unknown.
MAX_ADDRESSES: Final = 4096
MAX_PROGRAMS: Final = 256

# Names of services that only a Host header tells, of each role: who calls our pods may
# not use up what our pods call.
MAX_HOSTS: Final = 500
RENEW_S: Final = 3600.0

_AMBIGUOUS: Final = 0  # for a namespace's inode

# Kubernetes, "DNS for Services and Pods": SERVICE.NAMESPACE.svc.DOMAIN.
_SERVICE = re.compile(r"([^.]+)\.([^.]+)\.svc(\..+)?")
CLUSTER_DOMAIN: Final = ".cluster.local"


class Workload(NamedTuple):
    """One end; where it is unknown, what Istio writes then."""

    name: str = UNKNOWN
    namespace: str = UNKNOWN
    app: str = UNKNOWN
    version: str = UNKNOWN
    canonical_service: str = UNKNOWN
    canonical_revision: str = NO_REVISION


class Service(NamedTuple):
    """The service that was called, as far as the request tells."""

    host: str = UNKNOWN
    name: str = UNKNOWN
    namespace: str = UNKNOWN


NOBODY: Final = Workload()


class Workloads:
    """Names both ends of an exchange; used by one thread."""

    def __init__(self, names: ServiceNames) -> None:
        self._names = names
        self._pods: Mapping[int, Pod] = {}
        self._by_netns: dict[int, Workload] = {}  # of pods
        self._by_address: dict[str, Workload] = {}  # of pods
        self._learnt: dict[str, int] = {}  # inodes of other namespaces, by address
        self._programs: dict[str, Workload] = {}

    def ends(self, exchange: Exchange) -> tuple[Workload, Workload]:
        """Return this end and the other one."""
        pods = self._names.pods_by_netns()
        if pods is not self._pods and pods != self._pods:
            self._renew(pods)
        netns = exchange.netns
        own = self._by_netns.get(netns)
        if own is None:
            own = self._other(netns, exchange)
        address = exchange.peer_addr
        if address == exchange.local_addr and exchange.role is Role.SERVER:
            return own, NOBODY
        peer = self._by_address.get(address)
        if peer is None:
            peer = self._at(address)
        return own, peer

    def _renew(self, pods: Mapping[int, Pod]) -> None:
        self._pods = pods
        self._by_netns = {netns: _of_pod(pod) for netns, pod in pods.items()}
        self._by_address = {}
        for netns, pod in pods.items():
            for ip in () if pod.host_network else pod.ips:
                # One that is going and one that has come may both claim it.
                twice = ip in self._by_address
                self._by_address[ip] = NOBODY if twice else self._by_netns[netns]

    def _other(self, netns: int, exchange: Exchange) -> Workload:
        """Return who lives in a namespace that is no known pod's."""
        # In a cluster it is a pod's still, whose name a runtime made up, or the node's.
        if self._pods:
            return NOBODY
        name = self._names.name(netns, "")
        if not name:
            return self._program(exchange.comm)
        self._learn(exchange.local_addr, netns)
        return _of_name(name)

    def _program(self, comm: str) -> Workload:
        found = self._programs.get(comm)
        if found is None:
            if not comm or len(self._programs) >= MAX_PROGRAMS:
                return NOBODY
            found = self._programs[comm] = _of_name(comm)
        return found

    def _learn(self, address: str, netns: int) -> None:
        known = self._learnt.get(address)
        if known in (netns, _AMBIGUOUS) or _is_everyones(address):
            return
        if known is None and len(self._learnt) >= MAX_ADDRESSES:
            return
        # One that has gone may leave its address to another.
        is_free = known is None or not self._names.name(known, "")
        self._learnt[address] = netns if is_free else _AMBIGUOUS

    def _at(self, address: str) -> Workload:
        """Return who has an address that is no pod's."""
        netns = self._learnt.get(address, _AMBIGUOUS)
        name = self._names.name(netns, "") if netns else ""
        return _of_name(name) if name else NOBODY


class Services:
    """Names the called service; a bounded number of those that Host headers make up."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.refused = 0  # exchanges whose service was one too many
        self._now_s = now_s
        self._known: dict[tuple[str, Workload, bool], Service] = {}
        self._made_up = {True: 0, False: 0}  # by whether a client named them
        self._since_s = now_s()

    def called(self, exchange: Exchange, destination: Workload) -> Service:
        """Return the service that a request went to."""
        client = exchange.role is Role.CLIENT
        # CONNECT goes to a proxy, which is not who is named.
        if exchange.method == "CONNECT":
            return without_host(client, destination)
        url = request_url(
            exchange.method, exchange.target, exchange.host, max_path=0, query=False
        )
        host = url.authority.service
        if not host:
            return without_host(client, destination)
        key = host, destination, client
        found = self._known.get(key)
        if found is None:
            found = service_of(host, destination)
            if not _is_confirmed(found, destination):
                if not self._has_room(client):
                    self.refused += 1
                    return without_host(client, destination)
                self._made_up[client] += 1
            self._known[key] = found
        return found

    def _has_room(self, client: bool) -> bool:
        """Tell whether there is room for a name; after a while, for other ones."""
        if self._made_up[client] < MAX_HOSTS:
            return True
        now_s = self._now_s()
        if now_s - self._since_s < RENEW_S:
            return False
        self._since_s = now_s
        self._known.clear()
        self._made_up = {True: 0, False: 0}
        return True


def without_host(client: bool, destination: Workload) -> Service:
    """Return the service where no host is named.

    As Istio: a server knows its canonical service, a client nothing.
    """
    if client:
        return Service(namespace=destination.namespace)
    name = destination.canonical_service
    return Service(name, name, destination.namespace)


def service_of(host: str, destination: Workload) -> Service:
    """Return the service of a host name; in full where that is certain.

    It is where the name says the namespace, or where the destination's own namespace
    and name confirm it.
    """
    host = host.removesuffix(".")
    if match := _SERVICE.fullmatch(host):
        name, namespace, domain = match.groups()
        return Service(host if domain else host + CLUSTER_DOMAIN, name, namespace)
    name, _, rest = host.partition(".")
    namespace = destination.namespace
    if namespace != UNKNOWN and (
        rest == namespace or (not rest and name in _words(destination))
    ):
        return Service(_full(name, namespace), name, namespace)
    return Service(host, host, namespace)


def _is_confirmed(service: Service, destination: Workload) -> bool:
    """Tell whether it is one of the few that the destination's own names make."""
    host, name, _ = service
    full = _full(name, destination.namespace)
    return name in _words(destination) and host in (name, full)


def _full(name: str, namespace: str) -> str:
    return f"{name}.{namespace}.svc{CLUSTER_DOMAIN}"


def _words(workload: Workload) -> tuple[str, ...]:
    """Return the names that a service of this workload is likely to have."""
    return workload.canonical_service, workload.app, workload.name


def _of_pod(pod: Pod) -> Workload:
    return Workload(
        pod.workload,
        pod.namespace,
        pod.app or UNKNOWN,
        pod.version or UNKNOWN,
        pod.canonical_service,
        pod.canonical_revision,
    )


@lru_cache(maxsize=1024)
def _of_name(name: str) -> Workload:
    return Workload(name=name, canonical_service=name)


@lru_cache(maxsize=4096)
def _is_everyones(address: str) -> bool:
    """Tell whether many namespaces may have this address at the same time."""
    ip = ip_address(address)
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified
