"""Who is at the ends, and which service was called: never a wrong name."""

from dataclasses import replace
from ipaddress import IPv6Address

import pytest
from podspan.agent import workloads
from podspan.agent.exchange import Exchange, Role
from podspan.agent.pods.names import REFRESH_S, ServiceNames
from podspan.agent.workloads import (
    NOBODY,
    Service,
    Services,
    Workload,
    Workloads,
    service_of,
    without_host,
)
from unit.api_server import pod
from unit.kernel_struct import exchange_record
from unit.test_names import OTHER_NSFS, OWN_NETNS, Time
from unit.test_pod import kept

REVIEWS, RATINGS, HOST = 4026532001, 4026532002, 4026531840


def of_pod(name, *ips, namespace="shop", **spec):
    what = pod(f"{name}-x", namespace=namespace, labels={"app": name, "version": "v1"})
    what["metadata"]["generateName"] = f"{name}-"
    owner = {"kind": "DaemonSet", "name": f"{name}-v1", "controller": True}
    what["metadata"]["ownerReferences"] = [owner]
    what["spec"] = spec
    what["status"] = {"podIPs": [{"ip": ip} for ip in ips]}
    return kept(what)


def workload(name):
    return Workload(f"{name}-v1", "shop", name, "v1", name, "v1")


def call(netns, local="10.1.0.1", peer="10.1.0.2", **fields):
    fields = {"netns": netns, "local_addr": local, "peer_addr": peer, **fields}
    return Exchange.from_kernel(exchange_record(**fields))


class Cluster:
    """This node's pods, as a test has them."""

    def __init__(self, directory):
        self.pods = {
            REVIEWS: of_pod("reviews", "10.1.0.1", "fd00::1"),
            RATINGS: of_pod("ratings", "10.1.0.2"),
        }
        names = ServiceNames(directory, pods_by_netns=lambda: self.pods)
        self.workloads = Workloads(names)

    def ends(self, netns, *addresses):
        return self.workloads.ends(call(netns, *addresses))


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path / "netns")


def test_both_ends_in_pods_of_this_node(cluster):
    both = workload("reviews"), workload("ratings")
    assert cluster.ends(REVIEWS, "10.1.0.1", "10.1.0.2") == both
    assert cluster.ends(RATINGS, "10.1.0.2", "10.1.0.1") == both[::-1]
    assert cluster.ends(RATINGS, "fd00::2", "fd00::1") == both[::-1]


@pytest.mark.parametrize("address", ["10.96.0.1", "10.1.7.7", "fd00::7", "192.0.2.1"])
def test_an_address_of_none_of_these_pods_is_nobodys(cluster, address):
    assert cluster.ends(REVIEWS, "10.1.0.1", address) == (workload("reviews"), NOBODY)


def test_an_address_that_two_pods_claim_is_nobodys(cluster):
    cluster.pods = {**cluster.pods, 7: of_pod("other", "10.1.0.2")}
    assert cluster.ends(REVIEWS, "10.1.0.1", "10.1.0.2")[1] == NOBODY
    # Until one of them is gone.
    cluster.pods = {REVIEWS: cluster.pods[REVIEWS], 7: cluster.pods[7]}
    assert cluster.ends(REVIEWS, "10.1.0.1", "10.1.0.2")[1] == workload("other")


def test_a_pod_on_the_nodes_network_is_nobody(cluster):
    cluster.pods[HOST] = of_pod("proxy", "192.168.0.1", hostNetwork=True)
    assert cluster.ends(REVIEWS, "10.1.0.1", "192.168.0.1")[1] == NOBODY


def test_in_a_cluster_what_is_no_known_pod_is_nobody(cluster):
    """Neither its program's name, nor one that a runtime made up for its namespace."""
    assert cluster.ends(HOST, "192.168.0.1", "10.1.0.1") == (
        NOBODY,
        workload("reviews"),
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.6", "::1", "::6"])
def test_loopback_is_nobodys(cluster, address):
    """A redirected connection comes from there."""
    assert cluster.ends(REVIEWS, "10.1.0.1", address) == (workload("reviews"), NOBODY)


def test_who_calls_from_the_servers_own_address_is_nobody(cluster):
    """Where the pod has no ::6, redirected connections do."""
    served = call(REVIEWS, "fd00::1", "fd00::1", role=2)
    assert cluster.workloads.ends(served) == (workload("reviews"), NOBODY)
    # A client knows whom it calls.
    both = cluster.ends(REVIEWS, "fd00::1", "fd00::1")
    assert both == (workload("reviews"),) * 2


def test_a_pod_that_changed_has_its_new_name(cluster):
    cluster.ends(REVIEWS)
    cluster.pods = {REVIEWS: of_pod("renamed", "10.1.0.1")}
    assert cluster.ends(REVIEWS, "10.1.0.1", "10.1.0.2") == (
        workload("renamed"),
        NOBODY,
    )


def test_what_a_pod_does_not_say_is_unknown():
    found = workloads._of_pod(kept(pod("web-0", namespace="shop")))
    assert found == Workload("web-0", "shop", "unknown", "unknown", "web-0", "latest")


class Namespaces:
    """Named namespaces without a cluster: links to two of our own stand for them."""

    def __init__(self, directory):
        directory.mkdir()
        self.directory = directory
        self.clock = Time()
        self.front, self.back = OWN_NETNS.stat().st_ino, OTHER_NSFS.stat().st_ino
        (directory / "front").symlink_to(OWN_NETNS)
        (directory / "back").symlink_to(OTHER_NSFS)
        self.workloads = Workloads(ServiceNames(directory, self.clock))

    def ends(self, netns, *addresses, **fields):
        return tuple(
            end.name for end in self.workloads.ends(call(netns, *addresses, **fields))
        )

    def remove(self, name):
        (self.directory / name).unlink()
        self.clock.now_s += REFRESH_S
        self.workloads.ends(call(7))  # unknown, so that all are looked at


@pytest.fixture
def namespaces(tmp_path):
    return Namespaces(tmp_path / "netns")


def test_a_peers_name_is_learnt_from_its_own_exchanges(namespaces):
    there = "10.0.0.2"
    assert namespaces.ends(namespaces.front, "10.0.0.1", there) == ("front", "unknown")
    assert namespaces.ends(namespaces.back, there, "10.0.0.1") == ("back", "front")
    assert namespaces.ends(namespaces.front, "10.0.0.1", there) == ("front", "back")


def test_an_address_seen_in_two_namespaces_is_nobodys_for_good(namespaces):
    for netns in (namespaces.front, namespaces.back, namespaces.front):
        namespaces.ends(netns, "10.0.0.1")
    assert namespaces.ends(namespaces.back, "10.0.0.2", "10.0.0.1")[1] == "unknown"


def test_an_address_goes_to_the_next_when_its_namespace_is_gone(namespaces):
    namespaces.ends(namespaces.back, "10.0.0.1")
    namespaces.remove("back")
    peer_of = namespaces.ends(namespaces.front, "10.0.0.9", "10.0.0.1")
    assert peer_of == ("front", "unknown")
    namespaces.ends(namespaces.front, "10.0.0.1")
    assert namespaces.ends(namespaces.front, "10.0.0.9", "10.0.0.1")[1] == "front"


@pytest.mark.parametrize("address", ["fe80::1", "127.0.0.2", "::", "0.0.0.0"])
def test_what_every_namespace_may_have_is_not_learnt(namespaces, address):
    namespaces.ends(namespaces.back, address)
    assert namespaces.ends(namespaces.front, "10.0.0.1", address)[1] == "unknown"


def test_without_a_name_it_is_the_programs(namespaces):
    found = namespaces.ends(7, "192.0.2.1", "192.0.2.1", comm=b"curl")
    assert found == ("curl", "unknown")


def test_programs_are_bounded(namespaces, monkeypatch):
    monkeypatch.setattr(workloads, "MAX_PROGRAMS", 2)
    found = [namespaces.ends(7, comm=comm)[0] for comm in (b"a", b"b", b"c", b"a")]
    assert found == ["a", "b", "unknown", "a"]


def test_learnt_addresses_are_bounded(namespaces, monkeypatch):
    monkeypatch.setattr(workloads, "MAX_ADDRESSES", 1)
    for address in ("10.0.0.1", "10.0.0.2"):
        namespaces.ends(namespaces.back, address)
    peers = [
        namespaces.ends(namespaces.front, "10.0.0.9", address)[1]
        for address in ("10.0.0.1", "10.0.0.2")
    ]
    assert peers == ["back", "unknown"]


IN_FULL = Service("reviews.shop.svc.cluster.local", "reviews", "shop")


@pytest.mark.parametrize(
    ("host", "destination", "service"),
    [
        ("reviews", workload("reviews"), IN_FULL),
        ("reviews.shop", workload("reviews"), IN_FULL),
        ("reviews.shop.svc", workload("reviews"), IN_FULL),
        ("reviews.shop.svc.cluster.local", workload("reviews"), IN_FULL),
        ("reviews.shop.svc.cluster.local.", workload("reviews"), IN_FULL),
        # What the name says itself needs no confirmation,
        ("reviews.shop.svc", NOBODY, IN_FULL),
        ("a.b.svc.my.domain", NOBODY, Service("a.b.svc.my.domain", "a", "b")),
        # the rest does.
        ("reviews", NOBODY, Service("reviews", "reviews", "unknown")),
        ("reviews.shop", NOBODY, Service("reviews.shop", "reviews.shop", "unknown")),
        ("alias", workload("reviews"), Service("alias", "alias", "shop")),
        ("api.example.com", NOBODY, Service("api.example.com", "api.example.com")),
        ("com.svc", NOBODY, Service("com.svc", "com.svc")),
    ],
)
def test_a_hosts_service(host, destination, service):
    assert service_of(host, destination) == service


def asked(host, role=1, **fields):
    return call(REVIEWS, host=host, role=role, **fields)


@pytest.fixture
def services():
    return Services(lambda: 0.0)


@pytest.mark.parametrize("host", [b"", b"10.1.0.2:80", b"[fd00::1]", b"a b", b"x" * 96])
@pytest.mark.parametrize("destination", [workload("reviews"), NOBODY])
def test_without_a_hosts_name_it_is_what_istio_writes(services, host, destination):
    name, namespace = destination.canonical_service, destination.namespace
    assert services.called(asked(host), destination) == Service(namespace=namespace)
    served = services.called(asked(host, role=2), destination)
    assert served == Service(name, name, namespace)


def test_a_proxy_is_not_who_its_client_asks_for(services):
    exchange = asked(b"api.example.com:443", method=b"CONNECT")
    exchange = replace(exchange, target="api.example.com:443")
    assert services.called(exchange, NOBODY) == without_host(True, NOBODY)


@pytest.mark.parametrize("role", [Role.CLIENT, Role.SERVER])
def test_hostile_hosts_are_bounded_and_hide_no_service(monkeypatch, role):
    """Random names, and known services in random domains and namespaces."""
    monkeypatch.setattr(workloads, "MAX_HOSTS", 20)
    now = Time()
    services = Services(now)
    ours = workload("reviews")
    shapes = ("h{}.example", "reviews.shop.svc.d{}", "reviews.n{}.svc", "reviews.n{}")
    found = set()
    for number in range(200):
        for shape in shapes:
            host = shape.format(number).encode()
            found.add(services.called(asked(host, role), ours))
    assert len(found) == 21
    assert without_host(role is Role.CLIENT, ours) in found
    assert services.refused == 200 * len(shapes) - 20
    assert services.called(asked(b"reviews:9080", role), ours) == IN_FULL
    # What the other role names is not touched, and later there is room for others.
    other = Role.SERVER if role is Role.CLIENT else Role.CLIENT
    assert services.called(asked(b"other", other), ours).name == "other"
    now.now_s += workloads.RENEW_S
    assert services.called(asked(b"later", role), ours).name == "later"


def test_addresses_are_spelt_as_exchanges_spell_them(tmp_path):
    cluster = Cluster(tmp_path)
    spelt = str(IPv6Address("fd00:0:0::1"))
    assert cluster.ends(RATINGS, "fd00::2", spelt)[1] == workload("reviews")
