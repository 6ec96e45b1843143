"""Where connections really go: the rules and the guard together, on real sockets."""

import select
import socket
import struct
import sys
import time
from contextlib import ExitStack
from ipaddress import ip_address

import pytest
from podspan.agent.kernel.guard import Guard
from podspan.init.plan import AGENT_MARK, INBOUND_PORT, OUTBOUND_PORT

SERVICE_PORT = 8080
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same
SO_MARK = 36

NEVER_STALE_NS = 600 * 10**9
DEADLINE_S = 20

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


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
def guard(compiled_guard):
    """A guard that wants redirection, and whose heartbeat stays fresh for the test."""
    compiled_guard.want(True)
    compiled_guard.beat(time.monotonic_ns())
    return compiled_guard


@pytest.fixture
def mortal_guard(pin_dir):
    """As `guard`, but the test may end it."""
    guard = Guard.open(pin_dir, grace_ns=NEVER_STALE_NS)
    guard.want(True)
    guard.beat(time.monotonic_ns())
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
    guard.want(False)

    assert pods.connect()[0] == ("server", SERVICE_PORT)


def test_an_agent_that_ends_well_ends_redirection_at_once(pods, mortal_guard):
    init_apply(pods.client, mortal_guard)
    assert pods.connect()[0] == ("client", OUTBOUND_PORT)

    mortal_guard.close()

    assert pods.connect()[0] == ("server", SERVICE_PORT)


def test_rules_made_under_one_agent_follow_the_next(pods, mortal_guard):
    init_apply(pods.client, mortal_guard)
    mortal_guard.close()

    successor = Guard.open(mortal_guard.path.parent, grace_ns=NEVER_STALE_NS)
    successor.want(True)
    successor.beat(time.monotonic_ns())

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


class Pods:
    """A client and a server namespace with listeners, and who accepted what."""

    def __init__(self, version, client, server):
        self.version = version
        self.client = client
        self.server = server
        self.server_address = server.ipv4 if version == 4 else server.ipv6
        self.loopback = "127.0.0.1" if version == 4 else "::1"
        self._stack = ExitStack()
        self._listeners = {}

    def __enter__(self):
        for name, namespace in (("client", self.client), ("server", self.server)):
            with namespace.inside():
                for port in (OUTBOUND_PORT, INBOUND_PORT, SERVICE_PORT):
                    listener = self._stack.enter_context(self._socket())
                    listener.bind(("", port))
                    listener.listen()
                    self._listeners[listener] = (name, port)
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def connect(self, namespace=None, address=None, mark=0):
        """Connect to the service; return who accepted it, and the accepted socket."""
        with (namespace or self.client).inside():
            client = self._stack.enter_context(self._socket())
        client.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        client.settimeout(DEADLINE_S)
        client.connect((address or self.server_address, SERVICE_PORT))
        [listener], _, _ = select.select(list(self._listeners), [], [], DEADLINE_S)
        accepted, _ = listener.accept()
        self._stack.enter_context(accepted)
        return self._listeners[listener], accepted

    def _socket(self):
        made = socket.socket(FAMILIES[self.version], socket.SOCK_STREAM)
        if self.version == 6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return made


def original_destination(accepted):
    """Read where a redirected connection was going, as the engine will."""
    if accepted.family == socket.AF_INET:
        raw = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        _, port, address = struct.unpack_from("!HH4s", raw)
    else:
        raw = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        _, port, _, address = struct.unpack_from("!HHI16s", raw)
    return str(ip_address(address)), port


def init_apply(namespace, guard, *options):
    podspan(namespace, "init", "apply", "--guard", str(guard.path), *options)


def podspan(namespace, *arguments):
    return namespace.run(sys.executable, "-m", "podspan.agent", *arguments)
