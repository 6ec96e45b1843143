"""Why the relay copies: what the kernel does to a stream that sockmap carries.

The relay could let a sk_skb program redirect the bytes of opaque streams (splice.c).
The first test shows that this works while nothing goes wrong. Each of the others shows
what an end of a direct connection never sees. The cause is one: a redirected packet
goes to the partner's psock, into a list without limit (sk_psock_skb_redirect,
net/core/skmsg.c, 5.13 to 6.18), which a kernel thread empties. No system call tells
its length, what is in it is acknowledged to the sender and belongs to no socket's
memory, and shutdown(2) and close(2) do not wait for it.

A program can count what waits (what it has redirected less what the partner's
peer has acknowledged) and pass packets to the relay above a limit. That was tried:
with a limit of 1 MB a stream at full speed is there after 1.6 MB although its reader
reads, so volume is copied all the same. And the relay would have to ask again and
again whether the list is empty before each byte and each FIN of its own.

Should one of these tests fail, a kernel has learned it: then splicing is worth another
look. What it would bring stands in tests/bench/README.md.
"""

import os
import socket
import threading

import pytest
from netns.splicing import Splicer, relayed

BUFFER = 64 << 10
TIMEOUT_S = 20.0

# All sockets of a connection together hold less than a tenth of it.
FLOOD = 16 << 20


@pytest.fixture(scope="module")
def splicer():
    splicer = Splicer()
    yield splicer
    splicer.close()


@pytest.fixture
def inside(one_ns):
    """Sockets of the test belong to a namespace of its own."""
    with one_ns.inside():
        yield


def test_every_byte_arrives_both_ways_while_both_ends_read(splicer, inside):
    sent = {side: os.urandom(4 << 20) for side in ("client", "server")}
    came: dict[str, bytes] = {}
    with relayed() as (client, down, up, server):
        splicer.join(down, up)
        threads = [
            threading.Thread(target=client.sendall, args=(sent["client"],)),
            threading.Thread(target=server.sendall, args=(sent["server"],)),
            threading.Thread(target=lambda: came.update(client=read(client, 4 << 20))),
        ]
        for thread in threads:
            thread.start()
        came["server"] = read(server, 4 << 20)
        for thread in threads:
            thread.join()
        down.setblocking(False)
        with pytest.raises(BlockingIOError):
            down.recv(1)  # none of it passed through us
    assert came["server"] == sent["client"]
    assert came["client"] == sent["server"]


def test_bytes_queued_at_the_moment_of_entering_cannot_be_read(splicer, inside):
    with relayed() as (client, down, up, server):
        client.sendall(b"before ")
        assert down.recv(100, socket.MSG_PEEK) == b"before "
        splicer.join(down, up)
        # Neither we can read them, nor does a program run while no packet comes: who
        # has asked and waits for the answer waits for ever.
        with pytest.raises(BlockingIOError):
            down.recv(100, socket.MSG_DONTWAIT)
        client.sendall(b"after")
        assert read(server, 12) == b"before after"


def test_a_slow_reader_stops_the_sender_without_splicing(inside):
    with relayed(BUFFER) as (client, _, _, _):
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(FLOOD))


def test_a_slow_reader_does_not_stop_a_spliced_sender(splicer, inside):
    with relayed(BUFFER) as (client, down, up, _):
        splicer.join(down, up)
        client.settimeout(TIMEOUT_S)
        # Nobody reads: the kernel keeps it all.
        client.sendall(bytes(FLOOD))


def test_fin_overtakes_spliced_bytes_which_are_lost(splicer, inside):
    data = os.urandom(FLOOD)
    with relayed(BUFFER) as (client, down, up, server):
        splicer.join(down, up)
        client.settimeout(TIMEOUT_S)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        down.settimeout(TIMEOUT_S)
        assert down.recv(1) == b""  # so the relay sees that the client has ended,
        up.shutdown(socket.SHUT_WR)  # and passes it on
        came = read(server, FLOOD)
    assert data.startswith(came)
    assert len(came) < FLOOD // 2


def read(sock, size):
    """Read so many bytes, or less where the other side ends."""
    sock.settimeout(TIMEOUT_S)
    came = bytearray()
    while len(came) < size:
        piece = sock.recv(1 << 20)
        if not piece:
            break
        came += piece
    return bytes(came)
