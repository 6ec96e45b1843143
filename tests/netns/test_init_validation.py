"""podspan init --run-validation: a real connection tells whether the rules work."""

import socket
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest
from podspan.agent.errors import NotRedirected
from podspan.agent.kernel.guard import Guard
from podspan.init import apply, validate
from podspan.init.apply import Manner
from podspan.init.plan import INBOUND_PORT, LOOPBACK, Family, Redirection

PODSPAN = (sys.executable, "-m", "podspan.agent", "init")
CHECK = ("apply", "--skip-rule-apply", "--run-validation")
VARIANTS = ("nft", "legacy")
FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
TIMEOUT_S = 20
BOTH = tuple(Family)
UNGUARDED = Redirection(guard=None)


@pytest.fixture(scope="module")
def guard(bpffs):
    """A guard that says no: there is no heartbeat."""
    guard = Guard.open(bpffs / "validation")
    yield str(guard.path)
    guard.close()
    guard.unpin()


@contextmanager
def engine(namespace):
    """Listen as the agent's worker does, and take what comes as an idle one."""
    with ExitStack() as stack:
        with namespace.inside():
            for kind in FAMILIES.values():
                listener = stack.enter_context(socket.socket(kind))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if kind == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind(("", INBOUND_PORT))
                listener.listen()
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_that_redirect_pass_though_the_guard_says_no(one_ns, guard, variant):
    wanted = Redirection(guard=guard, include_inbound=(), include_outbound=())
    with one_ns.inside():
        apply.apply(wanted, Manner(variant=variant))

        # Again at once: the first leaves no TIME_WAIT behind.
        for _ in range(2):
            validate.validate(wanted, BOTH, TIMEOUT_S)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("listening", [False, True])
def test_without_rules_that_is_said_at_once(one_ns, family, listening):
    with (
        engine(one_ns) if listening else ExitStack(),
        one_ns.inside(),
        pytest.raises(NotRedirected, match="no rule took") as caught,
    ):
        validate.validate(UNGUARDED, [family], 600)

    assert caught.value.exit_code == 126
    assert "iptables-save" in caught.value.hint


def test_the_agents_listeners_are_not_in_the_way(one_ns):
    with engine(one_ns), one_ns.inside():
        apply.apply(UNGUARDED, Manner())

        validate.validate(UNGUARDED, BOTH, TIMEOUT_S)


@contextmanager
def closing_what_comes(namespace):
    """Listen as another user would, and end each connection with a reset."""

    def serve(listener):
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    with namespace.inside(), ExitStack() as stack:
        for family, kind in FAMILIES.items():
            listener = stack.enter_context(socket.socket(kind))
            option = (socket.SOL_SOCKET, socket.SO_LINGER, validate.RESET_ON_CLOSE)
            listener.setsockopt(*option)
            address = str(LOOPBACK[family].network_address)
            listener.bind((address, INBOUND_PORT))
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
        yield


@pytest.mark.parametrize("redirects", [True, False])
def test_a_port_that_is_another_users_tells_as_well(one_ns, redirects):
    with closing_what_comes(one_ns):
        if redirects:
            apply.apply(UNGUARDED, Manner())
            validate.validate(UNGUARDED, BOTH, TIMEOUT_S)
        else:
            with pytest.raises(NotRedirected, match="no rule took"):
                validate.validate(UNGUARDED, BOTH, TIMEOUT_S)


def test_a_connection_of_another_port_is_no_proof(one_ns, monkeypatch):
    monkeypatch.setattr(validate, "original_port", lambda *arguments: 80)
    with one_ns.inside():
        apply.apply(UNGUARDED, Manner())

        with pytest.raises(NotRedirected, match="port 80 was dialled"):
            validate.validate(UNGUARDED, BOTH, TIMEOUT_S)


def test_a_lost_connection_fails_in_time(one_ns):
    with one_ns.inside():
        apply.apply(UNGUARDED, Manner())
    one_ns.run("iptables-nft", "-A", "INPUT", "-p", "tcp", "-j", "DROP")

    with one_ns.inside(), pytest.raises(NotRedirected, match="timed out"):
        validate.validate(UNGUARDED, [Family.IPV4], 0.2)


def test_a_probe_port_in_use_is_named(one_ns):
    with one_ns.inside(), socket.socket() as used:
        used.bind(("127.0.0.1", 15002))
        used.listen()

        with pytest.raises(NotRedirected, match="probe port 15002 is in use"):
            validate.validate(UNGUARDED, [Family.IPV4], TIMEOUT_S)


def test_apply_and_validate_in_one_run_and_the_exit_code_of_istio(one_ns, guard):
    done = one_ns.run(*PODSPAN, "apply", "--guard", guard, "--run-validation")
    assert "validated families=IPv4,IPv6" in done.stderr

    one_ns.run("ip6tables-nft", "-t", "nat", "-F", "OUTPUT")
    failed = one_ns.run(*PODSPAN, *CHECK, check=False)
    assert failed.returncode == 126
    assert "IPv6 connections are not redirected" in failed.stderr
    assert "hint: " in failed.stderr


def test_without_an_agent_validation_fails_as_nothing_is_installed(one_ns):
    options = ("--guard", "/sys/fs/bpf/podspan-no-agent/guard", "--run-validation")

    failed = one_ns.run(*PODSPAN, "apply", *options, check=False)

    assert failed.returncode == 126
    assert "no agent has pinned" in failed.stdout


@pytest.mark.parametrize("applied", [True, False])
def test_validation_needs_no_privilege(one_ns, applied):
    # As Istio's validation container: the agent's listeners are another user's.
    if applied:
        with one_ns.inside():
            apply.apply(UNGUARDED, Manner())
    unprivileged = (
        *("setpriv", "--reuid", "1337", "--regid", "1337", "--clear-groups"),
        *("--bounding-set", "-all", "--inh-caps", "-all"),
    )

    with engine(one_ns):
        done = one_ns.run(*unprivileged, *PODSPAN, *CHECK, check=False)

    assert done.returncode == (0 if applied else 126), done.stderr
