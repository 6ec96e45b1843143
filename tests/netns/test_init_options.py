"""Where connections go by each option: the rules without a guard, on real sockets."""

import threading
from dataclasses import replace

import pytest
from netns.redirect_pods import SERVICE_PORT, Pods
from podspan.init.apply import VARIANTS, Manner, apply
from podspan.init.options import parse
from podspan.init.plan import INBOUND_PORT, OUTBOUND_PORT, Family, Redirection, plan


@pytest.fixture(params=[4, 6])
def pods(request, two_ns_veth):
    """A client and a server pod; both listen on all ports that matter."""
    with Pods(request.param, *two_ns_veth) as pods:
        yield pods


def test_chosen_and_excluded_owners_interfaces_and_ports(pods):
    direct, redirected = ("server", SERVICE_PORT), ("client", OUTBOUND_PORT)
    for options, variables, expected in (
        (("-u", "0"), {}, direct),
        (("-u", "1337"), {}, redirected),
        (("-g", "0"), {}, direct),
        ((), {"ISTIO_OUTBOUND_OWNER_GROUPS": "101,202"}, direct),
        ((), {"ISTIO_OUTBOUND_OWNER_GROUPS": "101,0"}, redirected),
        ((), {"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "0"}, direct),
        (("-c", "eth0"), {}, direct),
        (("-c", "eth1"), {}, redirected),
        (("-o", str(SERVICE_PORT)), {}, direct),
        (("-i", "", "-q", str(SERVICE_PORT)), {}, redirected),
        (("-i", "", "-q", "1"), {}, direct),
        (("-i", "10.77.0.0/24,fd77::/64"), {}, redirected),
        (("-i", "10.78.0.0/24,fd78::/64"), {}, direct),
    ):
        apply_here(pods.client, options, variables)
        assert pods.connect()[0] == expected, (options, variables)


def test_interfaces_and_ports_of_what_reaches_a_pod(pods):
    direct, redirected = ("server", SERVICE_PORT), ("server", INBOUND_PORT)
    for options, expected in (
        (("-c", "eth0"), direct),
        (("-b", str(SERVICE_PORT)), redirected),
        (("-b", "1"), direct),
        (("-b", ""), direct),
        # A virtual machine's connection is the pod's own: on its way out.
        (("-k", "eth0"), ("server", OUTBOUND_PORT)),
        (("-k", "eth0", "-i", "10.78.0.0/24,fd78::/64"), direct),
    ):
        apply_here(pods.server, options, {})
        assert pods.connect()[0] == expected, options


def test_loopback_is_redirected_where_it_is_asked_for(pods):
    apply_here(pods.client, ("-i", "127.1.2.3,::1"), {})

    if pods.version == 4:
        taken = pods.connect(pods.client, "127.1.2.3")[0]
        assert taken == ("client", OUTBOUND_PORT)
    # What Istio's `-d 127.0.0.1/32 -j RETURN` leaves alone even so.
    taken = pods.connect(pods.client, pods.loopback)[0]
    assert taken == ("client", SERVICE_PORT)


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_while_rules_are_replaced_no_connection_goes_past_them(two_ns_veth, variant):
    plans = [
        Redirection(guard=None, exclude_outbound_ports=(port,)) for port in range(1, 9)
    ]
    manner = Manner(variant=variant, families=(Family.IPV4,))
    ended = threading.Event()

    def replacing():
        try:
            with two_ns_veth[0].inside():
                for wanted in plans:
                    apply(wanted, manner)
        finally:
            ended.set()

    with Pods(4, *two_ns_veth) as pods:
        with pods.client.inside():
            apply(Redirection(guard=None), manner)
        thread = threading.Thread(target=replacing)
        thread.start()
        takers = set()
        while not ended.is_set():
            takers.add(pods.connect()[0])
        thread.join()

    with two_ns_veth[0].inside():
        assert VARIANTS[variant].holds(Family.IPV4, plan(plans[-1], Family.IPV4))
    assert takers == {("client", OUTBOUND_PORT)}


def apply_here(namespace, options, variables):
    """Apply in this process: a dozen of them in the time of one command."""
    given = parse(["apply", *options], variables)
    wanted = replace(given.redirection, guard=None)
    with namespace.inside():
        apply(wanted, Manner(variant="nft"))
