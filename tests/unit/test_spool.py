"""The spool on a real file system: order, bounds, and what is left after damage."""

import errno
import os
import resource
import shutil
import stat
import tempfile
import threading
import tracemalloc
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from podspan.agent.errors import ExportError
from podspan.agent.exchange import Exchange
from podspan.agent.export import spool as spool_module
from podspan.agent.export.spool import (
    HEADER,
    MARKER,
    MAX_SEGMENT_BYTES,
    SEARCH_BYTES,
    SEGMENT_HEAD,
    SET_ASIDE,
    STATE_AT,
    SYNCS,
    VERSION,
    Spool,
)
from podspan.agent.span import Endpoint, Span, span_of
from unit.kernel_struct import exchange_record

ROOMY = 1 << 30

SPAN = span_of(Exchange.from_kernel(exchange_record()), "productpage", 0)
assert SPAN is not None
TINY = Span(
    "", "", "", "", "", 0, 1, Endpoint("", "", 0), Endpoint("", "", 0), False, {}
)


def batch(number, size=1, like=TINY):
    return [replace(like, span_id=f"{number:04x}{place:x}") for place in range(size)]


def drain(spool):
    batches = []
    while spans := spool.peek():
        batches.append(spans)
        spool.ack()
    return batches


@contextmanager
def opened(folder, max_bytes=ROOMY, sync="never"):
    spool = Spool(folder, max_bytes=max_bytes, sync=sync)
    try:
        yield spool
    finally:
        spool.close()


@contextmanager
def as_killed_now(folder):
    """What the next process finds if this one ends by SIGKILL at this moment."""
    with tempfile.TemporaryDirectory() as elsewhere:
        yield shutil.copytree(folder, Path(elsewhere) / "spool")


def segments(folder):
    return sorted(folder.glob("*.spool"))


# Order and restarts


def test_batches_come_back_whole_and_in_order(tmp_path):
    batches = [batch(number, size=number + 1, like=SPAN) for number in range(5)]
    with opened(tmp_path / "spool") as spool:
        assert all(spool.append(spans) for spans in batches)
        assert len(spool) == 15
        assert drain(spool) == batches
        assert len(spool) == 0


def test_a_batch_is_peeked_until_it_is_acknowledged(tmp_path):
    with opened(tmp_path) as spool:
        spool.append(batch(1))
        spool.append(batch(2))
        assert spool.peek() == spool.peek() == batch(1)
        spool.ack()
        assert spool.peek() == batch(2)


def test_an_ack_of_nothing_does_nothing(tmp_path):
    with opened(tmp_path) as spool:
        spool.ack()
        spool.append(batch(1))
        spool.ack()
        assert drain(spool) == [batch(1)]


def test_an_empty_batch_is_no_batch(tmp_path):
    with opened(tmp_path) as spool:
        assert spool.append([])
        assert spool.peek() == []
        assert not segments(tmp_path)


@pytest.mark.parametrize("sync", SYNCS)
def test_the_next_process_goes_on_where_this_one_was_killed(tmp_path, sync):
    with opened(tmp_path / "spool", sync=sync) as spool:
        for number in range(4):
            spool.append(batch(number))
        spool.peek()
        spool.ack()
        spool.peek()  # delivered perhaps, but not acknowledged: comes again
        with as_killed_now(tmp_path / "spool") as left, opened(left) as heir:
            assert len(heir) == 3
            heir.append(batch(4))
            assert drain(heir) == [batch(1), batch(2), batch(3), batch(4)]
            assert heir.counters()["spool_torn"] == 0


def test_an_empty_spool_keeps_no_file(tmp_path):
    with opened(tmp_path) as spool:
        for number in range(100):
            spool.append(batch(number))
            spool.peek()
            spool.ack()
            assert list(tmp_path.iterdir()) == []
        assert spool.counters()["spool_bytes"] == 0


def test_a_writer_and_a_reader_share_the_spool(tmp_path):
    batches = [batch(number, size=3) for number in range(2000)]
    received: list[list[Span]] = []
    with opened(tmp_path) as spool:
        done = threading.Event()

        def write():
            for spans in batches:
                spool.append(spans)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while len(received) < len(batches):
            was_done = done.is_set()
            received += drain(spool)
            assert len(received) == len(batches) or not was_done
        writer.join()
    assert received == batches


text = st.text(st.characters(exclude_categories=()), max_size=20)
numbers = st.integers(-(2**63), 2**64 - 1)
endpoints = st.builds(Endpoint, text, text, st.integers(0, 65535))
spans = st.builds(
    Span,
    *(text, text, text, text, text),
    *(numbers, numbers),
    *(endpoints, endpoints),
    st.booleans(),
    st.dictionaries(text, text, max_size=4),
    st.lists(st.tuples(numbers, text), max_size=2).map(tuple),
)


@given(st.lists(spans, min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_span_can_hold_comes_back_equal(tmp_path, given_spans):
    with opened(tmp_path) as spool:
        assert spool.append(given_spans)
        assert drain(spool) == [given_spans]


def test_a_new_field_of_a_span_needs_a_new_version():
    assert len(spool_module._row(TINY)) == len(fields(Span))
    assert len(fields(Endpoint)) == 3
    assert VERSION == 1


# Bounds


def test_beyond_the_bound_the_oldest_segments_go_and_are_counted(tmp_path):
    batches = [batch(number, size=2) for number in range(200)]
    with opened(tmp_path, max_bytes=4000) as spool:
        for spans in batches:
            assert spool.append(spans)
            assert sum(path.stat().st_size for path in segments(tmp_path)) <= 4000
        dropped = spool.counters()["spool_dropped"]
        assert 0 < dropped < 400
        assert len(spool) + dropped == 400
        assert drain(spool) == batches[dropped // 2 :]


def test_a_batch_in_the_readers_hands_is_not_dropped(tmp_path):
    with opened(tmp_path, max_bytes=2000) as spool:
        spool.append(batch(0))
        in_hands = spool.peek()
        number = 0
        while not spool.counters()["spool_dropped"]:
            number += 1
            spool.append(batch(number))
        assert spool.peek() == in_hands
        waiting = len(spool)
        spool.ack()
        assert len(spool) == waiting - 1
        rest = drain(spool)
        assert rest[0] != batch(1)
        assert rest[-1] == batch(number)
        counts = spool.counters()
        assert counts["spooled"] == 1 + len(rest) + counts["spool_dropped"]


def test_a_batch_dropped_while_peeked_is_lost_with_the_process(tmp_path):
    spool = Spool(tmp_path, max_bytes=400)
    spool.append(batch(0))
    spool.peek()
    number = 0
    while len(spool) > 1 or number == 0:
        number += 1
        spool.append(batch(number, size=4))
        if spool.counters()["spool_dropped"]:
            break
    spool.close()
    counts = spool.counters()
    with opened(tmp_path) as heir:
        left = drain(heir)
    assert batch(0) not in left
    assert counts["spool_spans"] == sum(map(len, left))
    assert counts["spooled"] == counts["spool_dropped"] + counts["spool_spans"]


def test_a_batch_larger_than_the_spool_is_refused_and_drops_nothing(tmp_path):
    with opened(tmp_path, max_bytes=500) as spool:
        spool.append(batch(1))
        assert not spool.append(batch(2, size=100))
        assert drain(spool) == [batch(1)]
        counts = spool.counters()
        assert (counts["spool_failed"], counts["spool_dropped"]) == (100, 0)


def test_a_smaller_bound_holds_from_the_start(tmp_path):
    batches = [batch(number) for number in range(50)]
    with opened(tmp_path, max_bytes=5000) as spool:
        for spans in batches:
            spool.append(spans)
    with opened(tmp_path, max_bytes=1000) as spool:
        assert spool.counters()["spool_bytes"] <= 1000
        left = drain(spool)
    assert left == batches[-len(left) :]


def test_segments_are_a_sixteenth_of_the_bound_and_8_mib_at_most(tmp_path):
    with opened(tmp_path / "small", max_bytes=16 * 1000) as spool:
        for number in range(100):
            spool.append(batch(number))
        sizes = [path.stat().st_size for path in segments(tmp_path / "small")]
    assert len(sizes) > 2
    assert all(800 < size <= 1000 for size in sizes[:-1])
    large = [replace(TINY, name="x" * 1_000_000)]
    with opened(tmp_path / "large") as spool:
        for _ in range(9):
            spool.append(large)
        sizes = [path.stat().st_size for path in segments(tmp_path / "large")]
    assert len(sizes) == 2
    assert max(sizes) <= MAX_SEGMENT_BYTES


def test_reading_holds_one_batch_in_memory(tmp_path):
    with opened(tmp_path) as spool:
        large = batch(1, size=200, like=SPAN)
        tracemalloc.start()
        try:
            for _ in range(40):
                spool.append(large)
            tracemalloc.reset_peak()
            spool.peek()
            of_one = tracemalloc.get_traced_memory()[1]
            while spool.peek():
                spool.ack()
            assert tracemalloc.get_traced_memory()[1] < 2.5 * of_one
        finally:
            tracemalloc.stop()


class AgainstAList(RuleBasedStateMachine):
    """Random operations; the model is the list of batches that wait."""

    @initialize(
        max_bytes=st.sampled_from([300, 2000, ROOMY]), sync=st.sampled_from(SYNCS)
    )
    def start(self, max_bytes, sync):
        self.base = Path(tempfile.mkdtemp())
        self.lives = 0
        self.folder = self.base / "0"
        self.options = {"max_bytes": max_bytes, "sync": sync}
        self.spool = Spool(self.folder, **self.options)
        self.waiting: deque[list[Span]] = deque()
        self.number = 0
        self.peeked = False
        self.only_in_hands = False  # peeked, and its segment dropped

    @rule(size=st.integers(1, 4), length=st.integers(0, 60))
    def append(self, size, length):
        self.number += 1
        spans = batch(self.number, size, replace(TINY, name="n" * length))
        before = self.spool.counters()
        taken = self.spool.append(spans)
        after = self.spool.counters()
        dropped = after["spool_dropped"] - before["spool_dropped"]
        if not taken:
            assert after["spool_failed"] - before["spool_failed"] == size
            assert dropped == 0
            return
        in_hands = [self.waiting.popleft()] if self.peeked else []
        while dropped > 0:
            dropped -= len(self.waiting.popleft())
        assert dropped == 0
        self.waiting.extendleft(in_hands)
        self.waiting.append(spans)
        if peeked := self.spool._peeked:
            self.only_in_hands = not self.spool._holds(peeked.segment)

    @rule()
    def peek(self):
        spans = self.spool.peek()
        assert spans == (self.waiting[0] if self.waiting else [])
        self.peeked = bool(spans)

    @rule()
    def ack(self):
        self.spool.ack()
        if self.peeked:
            self.waiting.popleft()
        self.peeked = self.only_in_hands = False

    @rule(killed=st.booleans())
    def restart(self, killed):
        self.lives += 1
        if killed:
            self.folder = shutil.copytree(self.folder, self.base / str(self.lives))
        self.spool.close()
        self.spool = Spool(self.folder, **self.options)
        if self.only_in_hands:
            self.waiting.popleft()
        self.peeked = self.only_in_hands = False
        assert self.spool.counters()["spool_torn"] == 0

    @invariant()
    def counted(self):
        counts = self.spool.counters()
        assert len(self.spool) == sum(map(len, self.waiting))
        sizes = [path.stat().st_size for path in self.folder.iterdir()]
        assert counts["spool_bytes"] == sum(sizes) <= self.options["max_bytes"]
        on_disk = len(self.waiting) - self.only_in_hands
        assert len(sizes) <= on_disk

    def teardown(self):
        if hasattr(self, "spool"):
            assert drain(self.spool) == list(self.waiting)
            assert list(self.folder.iterdir()) == []
            self.spool.close()
            shutil.rmtree(self.base)


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None
)


# Damage


@dataclass(frozen=True)
class Written:
    """A batch, and where its record stands in its segment."""

    spans: list[Span]
    file: str
    start: int
    end: int
    delivered: bool


@dataclass(frozen=True)
class Remains:
    """The files of a killed process, to be damaged."""

    files: dict[str, bytes]
    batches: list[Written]

    def waiting(self, without=()):
        return [
            one.spans for one in self.batches if not (one.delivered or one in without)
        ]

    def reopened(self, folder, **changed):
        """Lay out the files, some of them changed; return what comes of them."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in {**self.files, **changed}.items():
            (folder / name).write_bytes(data)
        with opened(folder) as spool:
            received = drain(spool)
            assert len(spool) == 0
            assert segments(folder) == []
            return received, spool.counters()


@pytest.fixture(scope="module")
def remains(tmp_path_factory):
    """Seven batches in three segments; the first two are delivered."""
    folder = tmp_path_factory.mktemp("remains")
    written: list[Written] = []
    ends: dict[str, int] = {}
    with opened(folder, max_bytes=16 * 150) as spool:
        for number in range(7):
            spans = batch(number)
            spool.append(spans)
            newest = segments(folder)[-1]
            start = ends.get(newest.name, len(SEGMENT_HEAD))
            ends[newest.name] = end = newest.stat().st_size
            written.append(Written(spans, newest.name, start, end, number < 2))
        for _ in range(2):
            spool.peek()
            spool.ack()
        files = {path.name: path.read_bytes() for path in segments(folder)}
    assert len(files) == 3
    return Remains(files, written)


def test_a_file_cut_at_any_byte_loses_what_was_cut_and_no_more(remains, tmp_path):
    for name, data in remains.files.items():
        ends = {one.end for one in remains.batches if one.file == name}
        for cut in range(len(data)):
            received, counts = remains.reopened(tmp_path / "s", **{name: data[:cut]})
            beyond = [b for b in remains.batches if b.file == name and b.end > cut]
            assert received == remains.waiting(without=beyond), (name, cut)
            assert counts["spool_torn"] == (cut not in ends), (name, cut)


def test_a_flipped_bit_anywhere_costs_one_record_or_the_head_one_file(
    remains, tmp_path
):
    for name, data in remains.files.items():
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            received, counts = remains.reopened(tmp_path / "s", **{name: damaged})
            here = [one for one in remains.batches if one.file == name]
            if at < len(SEGMENT_HEAD):
                assert counts["spool_set_aside"] == 1
                assert received == remains.waiting(without=here), (name, at)
                continue
            [hit] = [one for one in here if one.start <= at < one.end]
            if at == hit.start + STATE_AT:
                # Delivered once more, at worst.
                again = [hit.spans] if hit.delivered else []
                assert received == again + remains.waiting(), (name, at)
                assert counts["spool_torn"] == 0
                continue
            assert received == remains.waiting(without=[hit]), (name, at)
            if not hit.delivered:
                assert counts["spool_torn"] == 1, (name, at)


def test_a_lost_record_is_counted_in_spans_where_its_header_is_sound(remains, tmp_path):
    [*_, last] = remains.batches
    damaged = bytearray(remains.files[last.file])
    damaged[last.start + HEADER.size] ^= 1
    _, counts = remains.reopened(tmp_path / "s", **{last.file: damaged})
    assert (counts["spool_torn"], counts["spool_lost"]) == (1, 1)
    damaged[last.start] ^= 1
    _, counts = remains.reopened(tmp_path / "s", **{last.file: damaged})
    assert (counts["spool_torn"], counts["spool_lost"]) == (1, 0)


@pytest.mark.parametrize("row", [(), ("1",), {}, 1, None, (None,) * 12, (None,) * 99])
def test_a_sound_record_of_what_is_no_span_is_lost(tmp_path, monkeypatch, row):
    with opened(tmp_path) as spool:
        with monkeypatch.context() as patch:
            patch.setattr(spool_module, "_row", lambda _: row)
            spool.append(batch(1))
        spool.append(batch(2))
        assert drain(spool) == [batch(2)]
        assert spool.counters()["spool_lost"] == 1


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_damage_leaves_sound_batches_in_order(remains, tmp_path, data):
    damaged = {}
    for name, sound in remains.files.items():
        changed = bytearray(sound)
        for _ in range(data.draw(st.integers(0, 3))):
            start = data.draw(st.integers(0, len(changed)))
            match data.draw(st.sampled_from(["zero", "noise", "cut", "remove"])):
                case "zero":  # as a file system may after a power cut
                    end = data.draw(st.integers(start, len(changed)))
                    changed[start:end] = bytes(end - start)
                case "noise":
                    noise = data.draw(st.binary(max_size=40))
                    changed[start : start + len(noise)] = noise
                case "cut":
                    del changed[start:]
                case "remove":
                    end = data.draw(st.integers(start, len(changed)))
                    del changed[start:end]
        damaged[name] = bytes(changed)
    received, _ = remains.reopened(tmp_path / "s", **damaged)
    everything = iter(one.spans for one in remains.batches)
    assert all(spans in everything for spans in received)  # in order, none twice


def test_no_text_can_hold_what_a_header_begins_with():
    """Who is traced chooses the texts, and may know this format."""
    every_text = "".join(map(chr, range(0x110000)))
    assert set(MARKER).isdisjoint(every_text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_record_after_a_damaged_one_is_found_however_far(tmp_path, parts):
    """Also where its marker lies across the parts that are searched one by one."""
    for shift in range(-8, 8):
        folder = tmp_path / str(shift)
        text = "x" * (parts * SEARCH_BYTES - HEADER.size - 25 + shift)
        with opened(folder) as spool:
            spool.append([replace(TINY, name=text)])
            spool.append(batch(1))
            [path] = segments(folder)
        damaged = bytearray(path.read_bytes())
        damaged[len(SEGMENT_HEAD)] ^= 1
        path.write_bytes(damaged)
        with opened(folder) as spool:
            assert drain(spool) == [batch(1)]


def test_damage_while_the_spool_is_open_costs_one_record(tmp_path):
    with opened(tmp_path) as spool:
        for number in range(3):
            spool.append(batch(number))
        [path] = segments(tmp_path)
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"?")
        assert drain(spool) == [batch(0), batch(2)]
        counts = spool.counters()
        assert (counts["spool_torn"], counts["spool_lost"]) == (1, 1)
        assert len(spool) == 0


def test_segments_removed_behind_our_back_are_counted_as_lost(tmp_path):
    with opened(tmp_path, max_bytes=16 * 100) as spool:
        for number in range(4):
            spool.append(batch(number))
        first, second, *_ = segments(tmp_path)
        second.unlink()
        assert drain(spool) == [batch(0), batch(2), batch(3)]
        assert spool.counters()["spool_lost"] == 1
        assert first not in segments(tmp_path)


# Files that are not ours


@pytest.mark.parametrize(
    "content",
    [
        b"PODSPOOL\x02\x00and what version 2 has",
        b"PODSPOOL\x00\x00",
        b"someone else's",
        b"x",
    ],
)
def test_another_version_is_set_aside_every_time_and_never_lost(tmp_path, content):
    for time in (1, 2):
        with opened(tmp_path) as spool:
            spool.append(batch(time))
        [path] = segments(tmp_path)
        path.write_bytes(content)
        with opened(tmp_path) as spool:
            assert spool.peek() == []
            assert spool.append(batch(0))
            assert drain(spool) == [batch(0)]
            assert spool.counters()["spool_set_aside"] == 1
        kept = list((tmp_path / SET_ASIDE).iterdir())
        assert [path.read_bytes() for path in kept] == [content] * time


@pytest.mark.parametrize("kind", ["folder", "fifo", "symlink", "dangling"])
def test_what_is_no_file_is_set_aside_and_not_followed(tmp_path, kind):
    with opened(tmp_path / "other") as spool:
        spool.append(batch(0))
    [other] = segments(tmp_path / "other")
    precious = other.read_bytes()
    folder = tmp_path / "spool"
    folder.mkdir()
    strange = folder / f"{7:020d}.spool"
    match kind:
        case "folder":
            strange.mkdir()
        case "fifo":
            os.mkfifo(strange)
        case "symlink":
            strange.symlink_to(other)
        case "dangling":
            strange.symlink_to(tmp_path / "missing")
    with opened(folder) as spool:
        assert spool.counters()["spool_set_aside"] == 1
        spool.append(batch(1))
        assert segments(folder)[0].name > strange.name
        assert drain(spool) == [batch(1)]
    assert other.read_bytes() == precious
    assert os.path.lexists(folder / SET_ASIDE / strange.name)


def test_files_with_other_names_are_left_alone(tmp_path):
    names = ["notes.txt", "1.spool", "cursor", f"{1:020d}.spool~", "\udcff"]
    for name in names:
        (tmp_path / name).write_text("mine")
    with opened(tmp_path) as spool:
        spool.append(batch(1))
        drain(spool)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


# A disk that does not take it


@contextmanager
def files_may_grow_to(size):
    """A real limit: the kernel writes up to it, and then answers EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("before", [0, 2])
def test_a_write_cut_short_at_any_byte_leaves_nothing_half_done(tmp_path, before):
    with opened(tmp_path / "probe") as spool:
        sizes = [0]
        for number in range(before + 1):
            spool.append(batch(number))
            sizes.append(segments(tmp_path / "probe")[0].stat().st_size)
    for limit in range(sizes[-2], sizes[-1]):
        folder = tmp_path / str(limit)
        with opened(folder) as spool:
            for number in range(before):
                spool.append(batch(number))
            with files_may_grow_to(limit):
                assert not spool.append(batch(before))
            assert spool.counters()["spool_failed"] == 1
            assert sum(path.stat().st_size for path in segments(folder)) == sizes[-2]
            assert spool.append(batch(99))
            with as_killed_now(folder) as left, opened(left) as heir:
                assert drain(heir) == [*map(batch, range(before)), batch(99)]
                assert heir.counters()["spool_torn"] == 0


def broken(monkeypatch, *calls, error=errno.EIO):
    """No file system here fails by itself with EIO."""

    def fail(*args):
        raise OSError(error, os.strerror(error))

    for call in calls:
        monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("call", ["fdatasync", "fsync", "pwrite"])
def test_a_batch_that_does_not_reach_the_disk_is_not_taken(
    tmp_path, monkeypatch, call, before
):
    with opened(tmp_path, sync="batch") as spool:
        for number in range(before):
            spool.append(batch(number))
        with monkeypatch.context() as patch:
            broken(patch, call)
            # The folder's own fsync is due only for a new file.
            taken = spool.append(batch(8))
            assert taken == (call == "fsync" and before == 1)
        spool.append(batch(9))
        expected = [*map(batch, range(before)), *([batch(8)] * taken), batch(9)]
        with as_killed_now(tmp_path) as left, opened(left) as heir:
            assert drain(heir) == expected
        assert drain(spool) == expected


def test_a_torn_end_that_cannot_be_cut_off_stays_the_end(tmp_path, monkeypatch):
    with opened(tmp_path) as spool:
        spool.append(batch(1))
        size = segments(tmp_path)[0].stat().st_size
        with monkeypatch.context() as patch, files_may_grow_to(size + 30):
            broken(patch, "ftruncate")
            assert not spool.append(batch(2))
        spool.append(batch(3))
        with as_killed_now(tmp_path) as left, opened(left) as heir:
            assert heir.counters()["spool_torn"] == 1
            assert drain(heir) == [batch(1), batch(3)]
        assert drain(spool) == [batch(1), batch(3)]
        assert spool.counters()["spool_torn"] == 0


def test_an_ack_that_does_not_reach_the_disk_may_deliver_twice(tmp_path, monkeypatch):
    with opened(tmp_path, sync="batch") as spool:
        for number in range(3):
            spool.append(batch(number))
        with monkeypatch.context() as patch:
            broken(patch, "pwrite", error=errno.ENOSPC)
            spool.peek()
            spool.ack()
        assert spool.peek() == batch(1)
        with as_killed_now(tmp_path) as left, opened(left) as heir:
            assert drain(heir) == [batch(0), batch(1), batch(2)]


def test_a_segment_that_cannot_be_read_is_passed_over_and_counted(
    tmp_path, monkeypatch
):
    with opened(tmp_path) as spool:
        spool.append(batch(1, size=5))
        with monkeypatch.context() as patch:
            broken(patch, "pread")
            assert spool.peek() == []
        counts = spool.counters()
        assert (counts["spool_torn"], counts["spool_lost"]) == (1, 5)
        spool.append(batch(2))
        assert drain(spool) == [batch(2)]


def test_trouble_is_told_once_and_its_end(tmp_path, caplog):
    caplog.set_level("INFO")
    with opened(tmp_path) as spool:
        with files_may_grow_to(10):
            for number in range(5):
                spool.append(batch(number))
        spool.append(batch(9))
        drain(spool)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "File too large" in caplog.text
    assert str(tmp_path) in caplog.text


# The folder


def test_nobody_else_may_read_what_is_spooled(tmp_path):
    mask = os.umask(0)
    try:
        with opened(tmp_path / "spool") as spool:
            spool.append(batch(1))
            [path] = segments(tmp_path / "spool")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    finally:
        os.umask(mask)


def test_a_folder_in_use_is_refused_until_it_is_let_go(tmp_path):
    with opened(tmp_path) as spool:
        spool.append(batch(1))
        with pytest.raises(ExportError, match="in use by another process") as caught:
            Spool(tmp_path, max_bytes=ROOMY)
        assert caught.value.hint
    with opened(tmp_path) as heir:
        assert drain(heir) == [batch(1)]


def test_a_place_that_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in [
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "spool", "Not a directory"),
        (Path("/proc/spool"), "No such file"),
    ]:
        with pytest.raises(ExportError, match=reason) as caught:
            Spool(folder, max_bytes=ROOMY)
        assert str(folder) in str(caught.value)


def test_a_closed_spool_takes_and_gives_nothing(tmp_path):
    spool = Spool(tmp_path, max_bytes=ROOMY)
    spool.append(batch(1))
    spool.append(batch(2))
    spool.peek()
    spool.close()
    spool.close()
    spool.ack()
    assert spool.peek() == []
    assert not spool.append(batch(3))
    assert len(spool) == 2
    with opened(tmp_path) as heir:
        assert drain(heir) == [batch(1), batch(2)]


# fsync


class Calls:
    """Counts what goes to the real fsync and fdatasync."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real):
        def call(fd):
            self.count += 1
            real(fd)

        return call

    def since(self):
        count, self.count = self.count, 0
        return count


def test_sync_says_when_fsync_is_called(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    for sync, each in [("never", False), ("segment", False), ("batch", True)]:
        with opened(tmp_path / sync, max_bytes=16 * 150, sync=sync) as spool:
            spool.append(batch(0))
            spool.append(batch(1))
            assert (calls.since() > 0) == each
            spool.peek()
            spool.ack()
            assert (calls.since() > 0) == each
            for number in range(2, 6):  # and into a second segment
                spool.append(batch(number))
            assert (calls.since() > 0) == (sync != "never")
        assert (calls.since() > 0) == (sync != "never")


def test_counters_do_not_wait_for_the_disk(tmp_path, monkeypatch):
    slow, go_on = threading.Event(), threading.Event()

    def hang(fd):
        slow.set()
        assert go_on.wait(30)

    with opened(tmp_path, sync="batch") as spool:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", hang)
            writer = threading.Thread(target=spool.append, args=[batch(1)])
            writer.start()
            assert slow.wait(30)
            assert len(spool) == spool.counters()["spool_spans"] == 0
            go_on.set()
            writer.join()
        assert len(spool) == 1
