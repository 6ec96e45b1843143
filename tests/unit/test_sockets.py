"""Which end of a connection accepted it, and which can be enrolled."""

from ipaddress import ip_address

import pytest
from podspan.agent.pods.sock_diag import TcpSocket
from podspan.agent.pods.sockets import Connection, Holder, Listeners


def tcp(local, port, *, listening=False, v6only=False, ulp=""):
    return TcpSocket(
        listening=listening,
        inode=1,
        cookie=1,
        local=ip_address(local),
        local_port=port,
        peer=ip_address("192.0.2.1"),
        peer_port=50000,
        v6only=v6only,
        ulp=ulp,
    )


@pytest.mark.parametrize(
    ("listener", "v6only", "local", "accepted"),
    [
        ("0.0.0.0", False, "10.0.0.1", True),
        ("0.0.0.0", False, "fd00::1", False),
        ("::", False, "10.0.0.1", True),
        ("::", False, "fd00::1", True),
        ("::", True, "10.0.0.1", False),
        ("::", True, "fd00::1", True),
        ("10.0.0.1", False, "10.0.0.1", True),
        ("10.0.0.1", False, "10.0.0.2", False),
        ("fd00::1", False, "fd00::1", True),
        ("fd00::1", False, "fd00::2", False),
        ("127.0.0.1", False, "10.0.0.1", False),
    ],
)
def test_accepted_is_what_a_listener_could_take(listener, v6only, local, accepted):
    listeners = Listeners([tcp(listener, 8080, listening=True, v6only=v6only)])
    assert listeners.accepted(tcp(local, 8080)) is accepted
    assert not listeners.accepted(tcp(local, 8081))


@pytest.mark.parametrize(
    ("ulp", "accepted", "holders", "unfit"),
    [
        ("", False, (Holder(1, 3),), None),
        ("", False, (), "no_holder_found"),
        ("", True, (), "accepted"),
        ("mptcp", True, (), "accepted"),
        ("mptcp", False, (Holder(1, 3),), "mptcp"),
        ("tls", False, (Holder(1, 3),), "upper_layer_protocol"),
    ],
)
def test_why_a_connection_cannot_be_enrolled(ulp, accepted, holders, unfit):
    end = tcp("10.0.0.1", 40000, ulp=ulp)
    assert Connection(4026531840, end, accepted, holders).unfit == unfit
