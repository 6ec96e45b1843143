import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.replay import streams
from podspan.agent.replay.streams import Room, Stream

NEAR_WRAP = (1 << 32) - 50


def begun(seq=1000):
    stream = Stream(Room())
    stream.begin(seq)
    return stream


def text(pieces):
    return b"".join(piece.data or b"?" * piece.lost for piece in pieces)


@given(st.binary(min_size=1, max_size=300), st.integers(0, 1 << 30), st.booleans())
def test_any_order_overlap_and_repetition_give_the_same_bytes(data, seed, near_wrap):
    chance = random.Random(seed)
    first = NEAR_WRAP if near_wrap else 7
    cuts = [(at, at + chance.randint(1, 40)) for at in range(len(data))]
    cuts = [*chance.sample(cuts, len(cuts)), (0, len(data))]
    stream = begun(first)
    pieces = []
    for start, end in cuts:
        pieces += stream.add(1, (first + start) % (1 << 32), data[start:end])
    assert text(pieces) == data
    assert not stream._held
    assert stream._room.held == 0


def test_the_first_copy_counts_wherever_it_waits():
    stream = begun(0)
    assert text(stream.add(1, 4, b"BBBB")) == b""
    assert text(stream.add(2, 2, b"ccccccCC")) == b""  # covers what waits
    assert text(stream.add(3, 0, b"dddd")) == b"ddccBBBBCC"
    assert text(stream.add(4, 8, b"eeee")) == b"ee"


def test_pieces_keep_the_times_of_their_segments():
    stream = begun(0)
    stream.add(5, 2, b"cd")
    assert [piece.at_ns for piece in stream.add(9, 0, b"ab")] == [9, 5]


def test_what_is_acknowledged_and_not_here_is_lost():
    stream = begun(NEAR_WRAP)
    stream.add(1, (NEAR_WRAP + 60) % (1 << 32), b"late")
    pieces = stream.acknowledged(2, (NEAR_WRAP + 64) % (1 << 32))
    assert [(piece.lost, piece.data) for piece in pieces] == [(60, b""), (0, b"late")]
    assert stream.acknowledged(2, NEAR_WRAP) == []


def test_a_number_that_no_window_reaches_is_no_acknowledgement():
    stream = begun(0)
    assert stream.acknowledged(1, 1 << 31) == []
    assert stream.next == 0


def test_more_than_may_wait_gives_up_what_is_missing(monkeypatch):
    monkeypatch.setattr(streams, "MAX_HELD", 3000)
    stream = begun(0)
    pieces = []
    for at in range(100, 2000, 100):
        pieces += stream.add(1, at, b"x" * 100)
    assert pieces[0].lost == 100
    assert sum(len(piece.data) for piece in pieces) == 1900
    assert sum(piece.lost for piece in pieces) == 100
    assert max(piece.at_ns for piece in pieces) == 1


def test_all_streams_share_a_bound(monkeypatch):
    monkeypatch.setattr(streams, "MAX_HELD_IN_ALL", 1000)
    room = Room()
    two = [Stream(room), Stream(room)]
    for stream in two:
        stream.begin(0)
    assert two[0].add(1, 10, b"x" * 500) == []
    assert text(two[1].add(1, 10, b"y" * 500)) == b"?" * 10 + b"y" * 500
    two[0].close()
    assert room.held == 0


@pytest.mark.parametrize("early", [False, True])
def test_the_end_is_passed_when_all_before_it_is_here(early):
    stream = begun(0)
    if early:
        stream.finish(4)
        assert not stream.ended
    stream.add(1, 0, b"data")
    if not early:
        stream.finish(4)
    assert stream.ended
    assert stream.acknowledged(2, 5) == []


def test_an_acknowledged_end_gives_up_what_is_before_it():
    stream = begun(0)
    stream.finish(4)
    assert [piece.lost for piece in stream.acknowledged(2, 5)] == [4]
    assert stream.ended


def test_repeated_segments_are_counted():
    stream = begun(0)
    stream.add(1, 0, b"data")
    stream.add(2, 0, b"data")
    stream.add(3, 2, b"tamore")
    assert stream.repeated == 2


def test_a_stream_without_begin_begins_with_what_comes():
    stream = Stream(Room())
    assert text(stream.add(1, NEAR_WRAP, b"data")) == b"data"
    other = Stream(Room())
    assert other.acknowledged(1, 77) == []
    assert text(other.add(1, 77, b"data")) == b"data"
