"""Connections of no known protocol, as if the redirect engine were not there."""

import hashlib
import os
import smtplib
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress

import pytest
from netns.http_peer import DEADLINE_S
from netns.redirect_fixtures import (
    INBOUND_PORT,
    OPAQUE,
    OUTBOUND_PORT,
    SERVICE_PORT,
    accepts,
    address_of,
    both_families,
    connect,
    connected,
    echo,
    plan_of,
    read_exactly,
    redirect_inbound,
    redirect_outbound,
    redirection,
    reset,
    serving,
    wait_until,
)
from netns.redirect_pods import podspan
from podspan.agent.redirect.engine import WorkerOptions

# Each way. Fewer megabytes are for who waits.
TRANSFER = int(os.environ.get("PODSPAN_TEST_TRANSFER_MB", "1024")) << 20
BLOCK = 1 << 20
SMTP_PORT = 25


@pytest.fixture
def pods(two_ns_veth):
    """The client's connections are redirected where they leave, and the engine runs."""
    client, server = two_ns_veth
    redirect_outbound(client)
    with redirection() as engine:
        engine.serve(client)
        yield client, server, engine


@pytest.fixture
def pods_both_ways(two_ns_veth):
    """As `pods`, and where they arrive: two relays in a row."""
    client, server = two_ns_veth
    redirect_outbound(client)
    redirect_inbound(server)
    with redirection() as engine:
        engine.serve(client, server)
        yield client, server, engine


@both_families
def test_both_ends_hear_each_other_through_one_relay_in_each_pod(
    pods_both_ways, version
):
    client, server, engine = pods_both_ways

    with connected(client, server, version) as (ours, theirs):
        assert ours.getpeername()[:2] == (address_of(server, version), SERVICE_PORT)
        ours.sendall(OPAQUE + b"ping")
        assert read_exactly(theirs, 5) == OPAQUE + b"ping"
        theirs.sendall(b"pong")
        assert read_exactly(ours, 4) == b"pong"

    engine.until_counted(
        connections_outbound=1, connections_inbound=1, connections_open=0
    )


def test_a_transfer_both_ways_at_once_is_byte_exact(pods_both_ways):
    client, server, _ = pods_both_ways
    sent, received = {}, {}

    def send(name, sock):
        digest = hashlib.sha256()
        block = OPAQUE + os.urandom(BLOCK - 1)
        for at in range(0, TRANSFER, BLOCK):
            part = at.to_bytes(8) + block
            digest.update(part)
            sock.sendall(part if at else OPAQUE + part)
        sock.shutdown(socket.SHUT_WR)
        sent[name] = digest.hexdigest()

    def receive(name, sock):
        digest = hashlib.sha256()
        assert read_exactly(sock, 1) == OPAQUE
        while part := sock.recv(BLOCK):
            digest.update(part)
        received[name] = digest.hexdigest()

    with connected(client, server) as (ours, theirs):
        threads = [
            threading.Thread(target=step, args=(name, sock))
            for name, sock in (("ours", ours), ("theirs", theirs))
            for step in (send, receive)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert received == {"ours": sent["theirs"], "theirs": sent["ours"]}


def test_a_server_that_speaks_first_is_heard_and_the_session_goes_on(pods, tmp_path):
    client, server, engine = pods
    box = tmp_path / "mail"
    with smtp_server(server, box):
        with client.inside():
            mail = smtplib.SMTP(server.ipv4, SMTP_PORT, timeout=DEADLINE_S)
        with mail:
            mail.sendmail("a@example.org", ["b@example.org"], ("x" * 70 + "\n") * 1000)

    [message] = (box / "new").iterdir()
    assert message.read_text().count("x" * 70) == 1000
    engine.until_counted(server_first=1, protocol_opaque=1)


@both_families
def test_each_side_may_end_first_and_still_hear_the_other(pods_both_ways, version):
    client, server, engine = pods_both_ways
    for first, second in ((0, 1), (1, 0)):
        with connected(client, server, version) as ends:
            ends[0].sendall(OPAQUE)
            read_exactly(ends[1], 1)
            ends[first].sendall(b"last words")
            ends[first].shutdown(socket.SHUT_WR)
            assert read_exactly(ends[second], 10) == b"last words"
            assert ends[second].recv(1) == b""
            ends[second].sendall(b"answer")
            ends[second].shutdown(socket.SHUT_WR)
            assert read_exactly(ends[first], 6) == b"answer"
            assert ends[first].recv(1) == b""

    engine.until_counted(connections_open=0, reset_by_up=0, reset_by_down=0)


def test_an_end_without_a_byte_is_passed_on(pods):
    client, server, _ = pods
    with connected(client, server) as (ours, theirs):
        ours.shutdown(socket.SHUT_WR)
        assert theirs.recv(1) == b""
        theirs.sendall(b"nothing to say?")
        theirs.shutdown(socket.SHUT_WR)
        assert read_exactly(ours, 15) == b"nothing to say?"
        assert ours.recv(1) == b""


@pytest.mark.parametrize("resetting", ["client", "server"])
def test_a_reset_reaches_the_other_end_behind_the_data_before_it(
    pods_both_ways, resetting
):
    client, server, engine = pods_both_ways
    with connected(client, server) as (ours, theirs):
        ours.sendall(OPAQUE)
        read_exactly(theirs, 1)
        breaks, hears = (ours, theirs) if resetting == "client" else (theirs, ours)
        data = os.urandom(1 << 20)
        hears.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        breaks.sendall(data)
        # Until it is at the other end: a kernel forgets what a reset finds unsent.
        engine.until(lambda: unread(hears) == len(data))
        reset(breaks)
        assert read_exactly(hears, len(data)) == data
        with pytest.raises(ConnectionResetError):
            hears.recv(1)

    engine.until_counted(connections_open=0)


@both_families
def test_a_refused_connection_is_refused(pods, version):
    client, server, engine = pods

    with pytest.raises(ConnectionRefusedError):
        connect(client, server, version)

    engine.until_counted(connect_failed_econnrefused=1, connections_open=0)
    assert engine.counter("connections_outbound") == 0


def test_a_network_that_says_no_is_heard(pods):
    client, server, engine = pods
    client.run("ip", "route", "add", "10.98.0.0/16", "via", server.ipv4)
    server.run("ip", "route", "add", "unreachable", "10.98.0.0/16")
    server.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    with client.inside():
        ours = socket.socket()
    with ours:
        ours.settimeout(DEADLINE_S)
        with pytest.raises(OSError, match="No route to host"):
            ours.connect(("10.98.0.1", 80))

    engine.until_counted(connect_failed_ehostunreach=1, connections_outbound=0)


def test_connections_from_one_port_reach_each_its_own_server(pods):
    """connect(2) gives one port to connections with different destinations."""
    client, server, engine = pods
    ports = (81, 82, 83)

    def say_port(sock):
        sock.sendall(OPAQUE + b"%d" % sock.getsockname()[1])

    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(serving(server, say_port, port=port))
        for shared in range(20001, 20021):
            socks = {}
            for port in ports:
                with client.inside():
                    sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((client.ipv4, shared))
                sock.setblocking(False)
                sock.connect_ex((server.ipv4, port))
                socks[port] = sock
            for port, sock in socks.items():
                sock.settimeout(DEADLINE_S)
                assert read_exactly(sock, 3) == OPAQUE + b"%d" % port
                sock.close()
    engine.until_counted(connections_outbound=len(ports) * 20, connections_open=0)


def test_without_a_gate_a_refused_connection_is_reset(two_ns_veth):
    """As by any proxy: connect(2) has succeeded before it is known."""
    client, server = two_ns_veth
    redirect_outbound(client, gate=False)
    with redirection() as engine:
        engine.serve(client)
        with connect(client, server) as ours, pytest.raises(ConnectionResetError):
            ours.recv(1)
        engine.until_counted(connect_failed_econnrefused=1, connections_open=0)


@pytest.mark.parametrize("port", [OUTBOUND_PORT, INBOUND_PORT])
@both_families
def test_who_calls_the_listeners_themselves_is_reset_not_relayed_to_them(
    pods, port, version
):
    client, _, engine = pods
    loopback = "127.0.0.1" if version == 4 else "::1"

    def call():
        with client.inside():
            ours = socket.create_connection((loopback, port), DEADLINE_S)
        with ours:
            ours.recv(1)

    with pytest.raises(ConnectionResetError):
        call()

    engine.until_counted(not_redirected=1, connections_open=0)


@both_families
def test_the_server_sees_istios_loopback_address_where_no_other_is_possible(
    two_ns_veth, version
):
    client, server = two_ns_veth
    redirect_inbound(server)
    server.run("ip", "addr", "add", "::6/128", "dev", "lo")
    with redirection() as engine:
        engine.serve(server)
        with connected(client, server, version) as (_, theirs):
            seen = theirs.getpeername()[0]

    assert seen == ("127.0.0.6" if version == 4 else "::6")


def seen_by_the_server(client, server, version):
    with connected(client, server, version) as (ours, theirs):
        seen = theirs.getpeername()[0]
        ours.sendall(OPAQUE)
        assert read_exactly(theirs, 1) == OPAQUE
        theirs.sendall(b"answer")
        assert read_exactly(ours, 6) == b"answer"
    return seen


@both_families
def test_the_server_sees_the_client_while_init_routes_answers_back(
    two_ns_veth, version
):
    """The init step may come after the agent, and what it made may go."""
    client, server = two_ns_veth
    redirect_inbound(server)
    own = "127.0.0.6" if version == 4 else server.ipv6
    shown = address_of(client, version)
    with redirection() as engine:

        def until_the_server_sees(address):
            engine.serve(server)
            engine.until(lambda: seen_by_the_server(client, server, version) == address)

        until_the_server_sees(own)
        # All but what redirects.
        podspan(server, "init", "apply", "--guard", "none", "-b", "", "-i", "")
        until_the_server_sees(shown)
        podspan(server, "init", "clean")
        until_the_server_sees(own)


def test_the_server_sees_no_client_where_that_is_not_wanted(two_ns_veth):
    client, server = two_ns_veth
    redirect_inbound(server)
    podspan(server, "init", "apply", "--guard", "none", "-b", "", "-i", "")
    with redirection() as engine:
        engine.serve(plan_of(server, inbound_source="loopback"))
        assert seen_by_the_server(client, server, 4) == "127.0.0.6"


def test_a_pod_without_ipv6_is_served(two_ns_veth):
    client, server = two_ns_veth
    redirect_outbound(client)
    client.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    with redirection() as engine:
        engine.serve(client)
        with connected(client, server) as (ours, theirs):
            ours.sendall(OPAQUE)
            assert read_exactly(theirs, 1) == OPAQUE


def test_first_bytes_that_stay_undecided_are_not_held_for_ever(two_ns_veth):
    client, server = two_ns_veth
    redirect_outbound(client)
    with redirection(options=WorkerOptions(sniff_wait_s=0.05)) as engine:
        engine.serve(client)
        with connected(client, server) as (ours, theirs):
            ours.sendall(b"GE")
            assert read_exactly(theirs, 2) == b"GE"
            theirs.sendall(b"go on")
            assert read_exactly(ours, 5) == b"go on"


def test_a_reader_that_stops_stops_the_sender_and_nobody_else(pods):
    client, server, _ = pods
    with connected(client, server) as (ours, theirs):
        ours.settimeout(0.5)
        sent = 0
        block = OPAQUE * BLOCK
        with suppress(TimeoutError):
            while sent < 256 << 20:
                sent += ours.send(block)
        assert sent < 256 << 20
        with serving(server, echo, port=81), connect(client, server, port=81) as other:
            other.sendall(OPAQUE + b"hello")
            assert read_exactly(other, 6) == OPAQUE + b"hello"
        ours.settimeout(DEADLINE_S)
        ours.shutdown(socket.SHUT_WR)
        arrived = 0
        while part := theirs.recv(BLOCK):
            arrived += len(part)

    assert arrived == sent


def test_many_tiny_writes_arrive_in_order(pods):
    client, server, _ = pods
    text = OPAQUE + b"".join(b"%d," % number for number in range(3000))
    with connected(client, server) as (ours, theirs):
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in text:
            ours.send(bytes([byte]))
        assert read_exactly(theirs, len(text)) == text


@contextmanager
def smtp_server(namespace, box):
    """A real one, which greets before it listens to what it is told."""
    command = [sys.executable, "-m", "aiosmtpd", "--nosetuid", "--class"]
    command += ["aiosmtpd.handlers.Mailbox", "--listen"]
    command += [f"{namespace.ipv4}:{SMTP_PORT}", str(box)]
    process = subprocess.Popen(namespace.command(*command))
    try:
        with namespace.inside():
            wait_until(lambda: accepts(namespace.ipv4, SMTP_PORT))
        yield
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def unread(sock):
    return len(sock.recv(8 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT))
