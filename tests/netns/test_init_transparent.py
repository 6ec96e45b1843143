"""Whose address an application sees when the agent relays a call to it."""

import socket
import sys
from contextlib import closing

import pytest
from podspan.init.plan import AGENT_MARK, INBOUND_PORT, OUTBOUND_PORT
from pyroute2 import NetNS

SO_MARK = 36
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
PORT = 8080
DEADLINE_S = 20

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

every_table = pytest.mark.parametrize(
    ("variant", "version"), [("nft", 4), ("nft", 6), ("legacy", 4), ("legacy", 6)]
)


def init(namespace, *arguments, check=True):
    return namespace.run(
        sys.executable, "-m", "podspan.agent", "init", *arguments, check=check
    )


def apply(namespace, variant, *options):
    return init(
        namespace,
        *("apply", "--guard", "none", "--force-iptables-binary", variant),
        *options,
    )


@pytest.fixture
def pod(two_ns_veth):
    return two_ns_veth[1]


def address_of(namespace, version):
    return namespace.ipv4 if version == 4 else namespace.ipv6


def agents_socket(namespace, version):
    """Return a socket such as the agent opens towards an application."""
    with namespace.inside():
        made = socket.socket(FAMILIES[version])
    made.setsockopt(socket.SOL_SOCKET, SO_MARK, AGENT_MARK)
    if version == 4:
        made.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    made.settimeout(DEADLINE_S)
    return made


def listening(namespace, version, port, mark=0):
    with namespace.inside():
        made = socket.socket(FAMILIES[version])
    made.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    if version == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind(("", port))
    made.listen()
    made.settimeout(DEADLINE_S)
    return made


@every_table
def test_an_application_answers_a_socket_that_has_its_clients_address(
    two_ns_veth, variant, version
):
    client, pod = two_ns_veth
    apply(pod, variant, "--inbound-source", "transparent")

    with (
        closing(listening(pod, version, PORT)) as server,
        closing(agents_socket(pod, version)) as upstream,
    ):
        upstream.bind((address_of(client, version), 0))
        upstream.connect((address_of(pod, version), PORT))
        accepted, peer = server.accept()
        with accepted:
            assert peer[0] == address_of(client, version)
            upstream.sendall(b"request")
            assert accepted.recv(64) == b"request"
            accepted.sendall(b"response")
            assert upstream.recv(64) == b"response"


@pytest.mark.parametrize("version", [4, 6])
def test_without_the_rules_the_answer_goes_astray(two_ns_veth, version):
    client, pod = two_ns_veth
    apply(pod, "nft", "--inbound-source", "loopback")

    with (
        closing(listening(pod, version, PORT)),
        closing(agents_socket(pod, version)) as upstream,
    ):
        upstream.bind((address_of(client, version), 0))
        upstream.settimeout(1)
        # The client resets what it never asked for, but the answer is not for us.
        with pytest.raises(TimeoutError):
            upstream.connect((address_of(pod, version), PORT))


@every_table
def test_what_is_redirected_to_marked_listeners_flows_beside_these_rules(
    two_ns_veth, variant, version
):
    # The agent's accepted sockets have its mark as well, and their packets pass by.
    client, pod = two_ns_veth
    apply(client, variant, "--inbound-source", "transparent")
    apply(pod, variant, "--inbound-source", "transparent")

    with (
        closing(listening(client, version, OUTBOUND_PORT, AGENT_MARK)) as outbound,
        closing(listening(pod, version, INBOUND_PORT, AGENT_MARK)) as inbound,
        client.inside(),
    ):
        for listener, mark in ((outbound, 0), (inbound, AGENT_MARK)):
            with socket.socket(FAMILIES[version]) as caller:
                caller.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
                caller.settimeout(DEADLINE_S)
                caller.connect((address_of(pod, version), PORT))
                accepted, _ = listener.accept()
                with accepted:
                    caller.sendall(b"request" * 10_000)
                    received = b""
                    while len(received) < 70_000:
                        received += accepted.recv(65536)
                    accepted.sendall(b"response")
                    assert caller.recv(64) == b"response"


def routing_of(namespace):
    with NetNS(namespace.name) as inside:
        rules = [
            (family, rule.get_attr("FRA_PRIORITY"), rule.get_attr("FRA_PROTOCOL"))
            for family in (2, 10)
            for rule in inside.get_rules(family=family)
            if rule.get_attr("FRA_FWMARK")
        ]
        routes = [
            (route["family"], route["proto"], route["type"])
            for family in (2, 10)
            for route in inside.get_routes(family=family, table=100)
        ]
        addresses = [
            address.get_attr("IFA_ADDRESS") for address in inside.get_addr(index=1)
        ]
    return rules, routes, addresses


def test_routing_is_made_once_and_removed(one_ns):
    before = routing_of(one_ns)

    apply(one_ns, "nft")
    once = routing_of(one_ns)
    apply(one_ns, "nft")

    assert routing_of(one_ns) == once
    assert [rule[:2] for rule in once[0]] == [(2, 32764), (10, 32764)]
    assert [route[0] for route in once[1]] == [2, 10]
    init(one_ns, "clean")
    assert routing_of(one_ns) == before


def test_the_loopback_source_needs_an_address_and_no_routing(one_ns):
    before = routing_of(one_ns)
    apply(one_ns, "nft")

    apply(one_ns, "nft", "--inbound-source", "loopback")

    rules, routes, addresses = routing_of(one_ns)
    assert (rules, routes) == ([], [])
    assert "::6" in addresses
    init(one_ns, "clean")
    assert routing_of(one_ns) == before


def test_ztunnels_routing_and_istios_address_serve_and_stay(one_ns):
    one_ns.run("ip", "address", "add", "::6/128", "dev", "lo")
    for family in ("-4", "-6"):
        rule = ("fwmark", "0x111/0xfff", "lookup", "100", "priority", "32764")
        one_ns.run("ip", family, "rule", "add", *rule)
        every = "0.0.0.0/0" if family == "-4" else "::/0"
        route = ("local", every, "dev", "lo", "table", "100")
        one_ns.run("ip", family, "route", "add", *route)
    before = routing_of(one_ns)

    for source in ("transparent", "loopback"):
        apply(one_ns, "nft", "--inbound-source", source)
        assert routing_of(one_ns) == before

    init(one_ns, "clean")
    assert routing_of(one_ns) == before
