"""What one agent leaves in the kernel, and the next one takes over."""

import socket
import struct

import pytest
from netns.http_peer import make_head
from netns.injection_fixtures import Injection, two_pods
from podspan.agent.errors import KernelError
from podspan.agent.exchange import Exchange
from podspan.agent.kernel.state import PREFIX, Inherited, State, only_agent

SO_COOKIE = 57  # include/uapi/asm-generic/socket.h


@pytest.fixture
def place(pin_dir):
    """The agent's directory in a bpf file system, which is there."""
    pin_dir.mkdir()
    return pin_dir


def cookie_of(sock):
    (cookie,) = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return cookie


class Successor:
    """A second agent's tables, beside what the first has pinned."""

    def __init__(self, injection, place):
        self.state = State(injection.programs.bpf, place)
        self.records: list[Exchange] = []
        ring = injection.programs.bpf[b"exchanges"]

        def take(data):
            self.records.append(Exchange.from_kernel(ring.event(data)))

        self.inherited = self.state.inherit(take)


def test_the_next_agent_goes_on_where_the_last_was_killed(place):
    with two_pods() as pods:
        with Injection(*pods) as first:
            State(first.programs.bpf, place).pin()
            client, server = first.connect()
            client.sendall(make_head(target=b"/under-way"))
            received = server.recv(65536)
            first.send(make_head(target=b"/unread"))
            gone, peer = first.connect()
            gone.sendall(make_head(target=b"/gone"))
        # Nobody has read the ring, and no program is attached any longer.
        peer.close()
        gone.close()
        with client, server, Injection(*pods) as second:
            successor = Successor(second, place)
            assert successor.inherited == Inherited(connections=2, open=2, records=1)
            assert [record.target for record in successor.records] == ["/unread"]
            assert successor.state.keep({cookie_of(client)}) == 1

            client.close()
            record = second.record()
    assert record.target == "/under-way"
    assert b"x-b3-spanid: %016x\r\n" % record.span_id in received


def test_bytes_that_passed_in_between_leave_an_exchange_unseen(place):
    with two_pods() as pods:
        with Injection(*pods) as first:
            State(first.programs.bpf, place).pin()
            client, server = first.connect()
            client.sendall(make_head(target=b"/answered-meanwhile"))
            server.recv(65536)
        server.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        assert client.recv(65536)
        with client, server, Injection(*pods) as second:
            successor = Successor(second, place)
            assert successor.state.keep({cookie_of(client)}) == 0
            client.close()
            assert second.record().end.name == "UNSEEN"


def test_what_an_agent_with_other_structs_left_is_counted_and_removed(place):
    with two_pods() as pods:
        with Injection(*pods) as first:
            State(first.programs.bpf, place).pin()
            [pins] = place.glob(f"{PREFIX}*")
            pins.rename(place / f"{PREFIX}0123456789abcdef")
            client, server = first.connect()
        with client, server, Injection(*pods) as second:
            successor = Successor(second, place)
            assert successor.inherited == Inherited(lost=1)
            successor.state.pin()
    assert [path.name for path in place.glob(f"{PREFIX}*")] == [pins.name]


def test_without_a_predecessor_there_is_nothing_to_take_over(place):
    with two_pods() as pods, Injection(*pods) as injection:
        assert not Successor(injection, place).inherited


def test_a_second_agent_is_refused_while_the_first_runs(place):
    with only_agent(place):
        with (
            pytest.raises(KernelError, match="another agent") as refused,
            only_agent(place),
        ):
            pass
        assert refused.value.hint
    with only_agent(place):
        pass
