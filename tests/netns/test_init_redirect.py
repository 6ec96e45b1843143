"""Where connections really go: the rules and the guard together, on real sockets."""

import time

import pytest
from netns.redirect_pods import (
    DEADLINE_S,
    EVERYTHING,
    NEVER_STALE_NS,
    SERVICE_PORT,
    Pods,
    init_apply,
    inode,
    original_destination,
    podspan,
)
from podspan.agent.kernel.guard import Guard
from podspan.init.plan import AGENT_MARK, INBOUND_PORT, OUTBOUND_PORT

every_table = pytest.mark.parametrize(
    ("variant", "version"),
    [("nft", 4), ("nft", 6), ("legacy", 4), ("legacy", 6)],
    indirect=True,
)
both_families = pytest.mark.parametrize("version", [4, 6], indirect=True)


@pytest.fixture(scope="module")
def compiled_guard(bpffs):
    """One guard for the tests that do not end it; compiling takes half a second."""
    guard = Guard.open(bpffs / "podspan", grace_ns=NEVER_STALE_NS)
    yield guard
    guard.close()
    guard.unpin()


@pytest.fixture
def guard(compiled_guard, two_ns_veth):
    """A guard that wants redirection, and whose heartbeat stays fresh for the test."""
    want_everything(compiled_guard, two_ns_veth)
    yield compiled_guard
    for namespace in two_ns_veth:
        compiled_guard.forget(inode(namespace))


@pytest.fixture
def mortal_guard(pin_dir, two_ns_veth):
    """As `guard`, but the test may end it."""
    guard = Guard.open(pin_dir, grace_ns=NEVER_STALE_NS)
    want_everything(guard, two_ns_veth)
    yield guard
    guard.close()


@pytest.fixture
def variant(request, two_ns_veth):
    """The namespaces' iptables; legacy is chosen where legacy rules are in use."""
    name = getattr(request, "param", "nft")
    if name == "legacy":
        for namespace in two_ns_veth:
            for program in ("iptables-legacy", "ip6tables-legacy"):
                namespace.run(program, "-A", "INPUT", "-p", "udp", "-j", "ACCEPT")
    return name


@pytest.fixture
def version(request):
    return getattr(request, "param", 4)


@pytest.fixture
def pods(variant, version, two_ns_veth):
    """A client and a server pod; both listen on all ports that matter."""
    with Pods(version, *two_ns_veth) as pods:
        yield pods


@every_table
def test_a_fresh_heartbeat_redirects_what_a_pod_opens(pods, guard):
    init_apply(pods.client, guard)

    port, accepted = pods.connect()

    assert port == ("client", OUTBOUND_PORT)
    assert original_destination(accepted) == (pods.server_address, SERVICE_PORT)


@every_table
def test_a_fresh_heartbeat_redirects_what_reaches_a_pod(pods, guard):
    init_apply(pods.server, guard)

    port, accepted = pods.connect()

    assert port == ("server", INBOUND_PORT)
    assert original_destination(accepted) == (pods.server_address, SERVICE_PORT)


@every_table
def test_without_a_heartbeat_redirection_ends_by_itself(pods, guard):
    init_apply(pods.client, guard)
    left_ns = 300_000_000
    last_beat_ns = time.monotonic_ns() - NEVER_STALE_NS + left_ns
    guard.beat(last_beat_ns)
    beaten_at = time.monotonic()

    while pods.connect()[0] != ("server", SERVICE_PORT):
        assert time.monotonic() - beaten_at < DEADLINE_S

    assert time.monotonic() - beaten_at >= left_ns / 1e9 - 0.001
    # It stays so, and a new heartbeat takes it up again with the same rules.
    assert pods.connect()[0] == ("server", SERVICE_PORT)
    guard.beat(time.monotonic_ns())
    assert pods.connect()[0] == ("client", OUTBOUND_PORT)


def test_an_agent_that_wants_no_redirection_gets_none(pods, guard):
    init_apply(pods.client, guard)
    guard.want(inode(pods.client), ())

    assert pods.connect()[0] == ("server", SERVICE_PORT)


def test_an_agent_that_ends_well_ends_redirection_at_once(pods, mortal_guard):
    init_apply(pods.client, mortal_guard)
    assert pods.connect()[0] == ("client", OUTBOUND_PORT)

    mortal_guard.close()

    assert pods.connect()[0] == ("server", SERVICE_PORT)


def test_rules_made_under_one_agent_follow_the_next(pods, mortal_guard, two_ns_veth):
    init_apply(pods.client, mortal_guard)
    mortal_guard.close()

    successor = Guard.open(mortal_guard.path.parent, grace_ns=NEVER_STALE_NS)
    want_everything(successor, two_ns_veth)

    assert pods.connect()[0] == ("client", OUTBOUND_PORT)
    successor.close()


def test_rules_hold_a_guard_that_is_unpinned(pods, mortal_guard):
    init_apply(pods.client, mortal_guard)

    mortal_guard.unpin()
    assert pods.connect()[0] == ("client", OUTBOUND_PORT)

    mortal_guard.close()
    assert pods.connect()[0] == ("server", SERVICE_PORT)


@both_families
def test_the_agents_own_sockets_are_not_redirected(pods, guard):
    init_apply(pods.client, guard)

    assert pods.connect(mark=AGENT_MARK)[0] == ("server", SERVICE_PORT)


@both_families
def test_what_stays_inside_the_pod_is_not_redirected(pods, guard):
    init_apply(pods.server, guard)

    for address in (pods.loopback, pods.server_address):
        port, _ = pods.connect(pods.server, address)
        assert port == ("server", SERVICE_PORT)


@both_families
def test_excluded_destinations_and_ports_are_not_redirected(pods, guard):
    init_apply(pods.client, guard, "-x", "10.77.0.2,fd77::2")
    init_apply(pods.server, guard, "-d", str(SERVICE_PORT))

    assert pods.connect()[0] == ("server", SERVICE_PORT)


def test_after_clean_nothing_is_redirected(pods, guard):
    init_apply(pods.client, guard)
    assert pods.connect()[0] == ("client", OUTBOUND_PORT)

    podspan(pods.client, "init", "clean")

    assert pods.connect()[0] == ("server", SERVICE_PORT)


def test_without_a_guard_redirection_is_unconditional(pods):
    podspan(pods.client, "init", "apply", "--guard", "none")

    assert pods.connect()[0] == ("client", OUTBOUND_PORT)


def want_everything(guard, namespaces):
    for namespace in namespaces:
        guard.want(inode(namespace), EVERYTHING)
    guard.beat(time.monotonic_ns())
