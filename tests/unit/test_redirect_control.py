"""Messages between agent and workers, and the socket they go through."""

import os
import socket
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.exchange import Role
from podspan.agent.kernel.handoff import Tuple
from podspan.agent.redirect.control import (
    BadMessage,
    Channel,
    Close,
    Counted,
    Drain,
    Finished,
    Message,
    Open,
    Opened,
    Overloaded,
    Start,
    decode,
    encode,
    pack_exchange,
    pair,
    unpack_exchange,
)
from podspan.agent.redirect.layer import StreamRecord

MESSAGES = (
    Start("child", "defer", ("b3", "tracecontext"), 0.5, 2.0),
    Open(4026531840, True, 12.5, 2, (2, 10)),
    Close(4026531840, gone=True),
    Drain(5.0),
    Opened(4026531840),
    Counted({"connections_outbound": 1 << 40}, 7),
    Finished((b"\0\xff", b"")),
    Overloaded(yes=True),
)

RECORD = StreamRecord(
    trace_id=(1 << 128) - 1,
    span_id=(1 << 64) - 1,
    parent_id=0,
    flags=1,
    link=1,
    request_first_ns=1,
    request_last_ns=2,
    response_first_ns=3,
    response_last_ns=1 << 62,
    request_bytes=10,
    response_bytes=1 << 40,
    status=200,
    end=1,
    error=0,
    method="POST",
    target="/a?b=ü",
    host="reviews:9080",
    user_agent="",
    request_id="01234567-89ab-4def-8123-456789abcdef",
    client_trace_id="",
    grpc_status="0",
    grpc_message="",
)
APPLICATION = Tuple(4026531840, "10.77.0.2", 9080, "fd77::1", 45678)
PACKED = pack_exchange(RECORD, Role.SERVER, APPLICATION)


@pytest.mark.parametrize(
    "message", MESSAGES, ids=lambda message: type(message).__name__
)
def test_a_message_is_the_same_after_its_way(message):
    assert decode(encode(message)) == message


def test_an_exchange_is_the_same_after_its_way():
    exchange = unpack_exchange(PACKED)

    for part in (RECORD, APPLICATION):
        for name, value in asdict(part).items():
            assert getattr(exchange, name) == value
    assert exchange.role is Role.SERVER


@given(st.binary(max_size=100))
def test_what_is_no_message_is_said_and_nothing_else_happens(packet):
    with pytest.raises(BadMessage):
        decode(packet)


@given(st.integers(0, len(PACKED) - 1))
def test_half_an_exchange_is_none(size):
    with pytest.raises(BadMessage):
        unpack_exchange(PACKED[:size])


@pytest.mark.parametrize(
    "packet",
    [
        encode(Opened(1)).replace(b"Opened", b"Closed"),
        encode(Opened(1)).replace(b"Opened", b"Finish"),
        b"",
        b"\xc1",
    ],
)
def test_a_message_of_another_version_is_said(packet):
    with pytest.raises(BadMessage):
        decode(packet)


@pytest.fixture
def channels():
    ends = [Channel(sock) for sock in pair()]
    yield ends
    for end in ends:
        end.close()


def test_messages_come_in_order_with_their_descriptors(channels, tmp_path):
    here, there = channels
    file = tmp_path / "file"
    file.write_text("content")
    with file.open() as opened:
        here.send(Opened(1), [opened.fileno()])
    here.send(Opened(2))

    (first, [fd]), (second, none) = there.receive()

    assert (first, second, none) == (Opened(1), Opened(2), [])
    assert not os.get_inheritable(fd)
    assert os.read(fd, 100) == b"content"
    os.close(fd)


def test_without_room_messages_wait_and_none_is_lost_or_twice(channels):
    here, there = channels
    sent = [Finished((bytes(20_000), b"%d" % number)) for number in range(200)]
    for message in sent:
        assert here.send(message)
    received: list[Message] = []
    while len(received) < len(sent):
        received += [message for message, _ in there.receive()]
        here.flush()

    assert received == sent


def test_what_has_no_room_to_wait_is_refused(channels):
    here, _ = channels
    taken = 0
    while here.send(Counted({}, 0)):
        taken += 1

    assert taken >= Channel.BACKLOG


def test_the_end_of_the_other_process_is_seen_by_both_ways(channels):
    here, there = channels
    there.close()

    assert here.receive() == []
    assert here.ended
    assert not here.send(Opened(1))


def test_descriptors_of_a_message_that_is_none_are_closed(channels):
    here, there = channels
    read, write = os.pipe()
    socket.send_fds(here.sock, [b"\xc1"], [write])
    os.close(write)
    with pytest.raises(BadMessage):
        there.receive()

    os.set_blocking(read, False)
    assert os.read(read, 1) == b""  # nobody has the other end any more
    os.close(read)
