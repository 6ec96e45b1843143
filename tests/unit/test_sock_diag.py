"""Answers of sock_diag, built as the kernel builds them; real ones: tests/netns."""

import errno
import socket
import struct
from ipaddress import ip_address

import pytest
from podspan.agent.netlink import NLMSG_DONE, NLMSG_ERROR, attributes
from podspan.agent.pods.sock_diag import (
    INET_DIAG_SKV6ONLY,
    INET_DIAG_ULP_INFO,
    INET_ULP_INFO_NAME,
    SOCK_DIAG_BY_FAMILY,
    TCP_ESTABLISHED,
    TCP_LISTEN,
    TcpSocket,
    parse,
)

NESTED = 0x8000
INET_DIAG_SHUTDOWN = 8
DONE = struct.pack("=IHHIIi", 20, NLMSG_DONE, 2, 0, 0, 0)


def message(kind, body):
    head = struct.pack("=IHHII", 16 + len(body), kind, 2, 0, 0)
    return (head + body).ljust((16 + len(body) + 3) & ~3, b"\0")


def attribute(kind, value):
    head = struct.pack("=HH", 4 + len(value), kind)
    return (head + value).ljust((4 + len(value) + 3) & ~3, b"\0")


def diag(family, state, local, peer, *attributes):
    """Ports 1000 and 2000, cookie 0x100000007, inode 12345."""
    addresses = [
        socket.inet_pton(family, one).ljust(16, b"\0") for one in (local, peer)
    ]
    body = struct.pack("=4B", family, state, 0, 0) + struct.pack("!2H", 1000, 2000)
    body += b"".join(addresses) + struct.pack("=I2I", 0, 7, 1)
    body += struct.pack("=5I", 0, 0, 0, 0, 12345)
    return message(SOCK_DIAG_BY_FAMILY, body + b"".join(attributes))


def described(local, peer, **other):
    fields = {
        "listening": False,
        "inode": 12345,
        "cookie": 0x100000007,
        "local": ip_address(local),
        "local_port": 1000,
        "peer": ip_address(peer),
        "peer_port": 2000,
        "v6only": False,
        "ulp": "",
    }
    return TcpSocket(**{**fields, **other})


def test_sockets_of_one_answer_come_in_order_until_its_end():
    answer = (
        diag(socket.AF_INET, TCP_ESTABLISHED, "10.0.0.1", "10.0.0.2")
        + diag(socket.AF_INET6, TCP_ESTABLISHED, "fd00::1", "fd00::2")
        + DONE
    )
    assert list(parse(answer)) == [
        described("10.0.0.1", "10.0.0.2"),
        described("fd00::1", "fd00::2"),
        None,
    ]


def test_ipv4_in_ipv6_is_ipv4():
    answer = diag(
        socket.AF_INET6, TCP_ESTABLISHED, "::ffff:10.0.0.1", "::ffff:10.0.0.2"
    )
    assert list(parse(answer)) == [described("10.0.0.1", "10.0.0.2")]


@pytest.mark.parametrize("v6only", [False, True])
def test_a_listener_tells_whether_it_takes_ipv4(v6only):
    answer = diag(
        *(socket.AF_INET6, TCP_LISTEN, "::", "::"),
        attribute(INET_DIAG_SHUTDOWN, b"\0"),
        attribute(INET_DIAG_SKV6ONLY, bytes([v6only])),
    )
    assert list(parse(answer)) == [described("::", "::", listening=True, v6only=v6only)]


def test_the_upper_layer_protocol_is_told_by_its_name():
    inner = attribute(INET_ULP_INFO_NAME, b"tls\0") + attribute(2, b"cipher")
    answer = diag(
        *(socket.AF_INET, TCP_ESTABLISHED, "10.0.0.1", "10.0.0.2"),
        attribute(INET_DIAG_ULP_INFO | NESTED, inner),
    )
    assert list(parse(answer)) == [described("10.0.0.1", "10.0.0.2", ulp="tls")]


@pytest.mark.parametrize("kind", [NLMSG_ERROR, NLMSG_DONE])
def test_a_refusal_is_an_error(kind):
    answer = message(kind, struct.pack("=i", -errno.ENOENT))
    with pytest.raises(FileNotFoundError):
        list(parse(answer))


def test_no_socket_is_an_empty_answer():
    assert list(parse(DONE)) == [None]
    assert list(parse(b"")) == []


def test_an_answer_that_makes_no_sense_ends():
    assert list(attributes(bytes(8))) == [(0, b""), (0, b"")]
