"""The spool where it hurts: processes killed at any moment, and real full disks."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from netns import spool_process
from netns.spool_process import IN_USE, MAX_BYTES, batch
from podspan.agent.errors import ExportError
from podspan.agent.exchange import Exchange
from podspan.agent.export.spool import Spool
from podspan.agent.span import span_of
from unit.kernel_struct import exchange_record

LIVES = 20
REPORTS_IN_A_LIFE = 400
DISK_BYTES = 1 << 20


@contextmanager
def opened(folder, max_bytes=MAX_BYTES, sync="never"):
    spool = Spool(folder, max_bytes=max_bytes, sync=sync)
    try:
        yield spool
    finally:
        spool.close()


def drain(spool):
    batches = []
    while spans := spool.peek():
        batches.append(spans)
        spool.ack()
    return batches


# Processes


@contextmanager
def process(folder, sync="never", first=0):
    command = [sys.executable, spool_process.__file__, folder, sync, str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def life(folder, sync, first, reports):
    """Let a process live for that many reports; return all that it made."""
    with process(folder, sync, first) as child:
        made = [child.stdout.readline().split() for _ in range(reports)]
        child.kill()
        return made + [line.split() for line in child.stdout]


@pytest.mark.parametrize("sync", ["never", "batch"])
def test_a_process_killed_at_any_moment_loses_nothing_it_had_reported(tmp_path, sync):
    """One spool through many lives; after each its remains are read in a copy."""
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    chance = random.Random(seed)
    first, delivered, acknowledged = 0, -1, -1
    for number in range(LIVES):
        made = life(
            tmp_path / "spool", sync, first, chance.randint(1, REPORTS_IN_A_LIFE)
        )
        assert made[0] == ["opened"]
        appended = max(
            [int(n) for what, n in made[1:] if what == "appended"] + [first - 1]
        )
        for what, n in made[1:]:
            if what == "delivered":
                # Again at most the one that was killed before its acknowledgement.
                assert acknowledged < int(n) <= delivered + 1
                delivered = int(n)
            elif what == "acknowledged":
                acknowledged = int(n)

        remains = shutil.copytree(tmp_path / "spool", tmp_path / str(number))
        with opened(remains) as spool:
            left = drain(spool)
            assert spool.counters()["spool_torn"] <= 1
        shutil.rmtree(remains)
        numbers = [spans[0].timestamp_us for spans in left]
        # The last step may have been done, and not yet reported.
        start = numbers[0] if numbers else delivered + 1
        end = numbers[-1] if numbers else appended
        assert start in {acknowledged + 1, delivered + 1}
        assert end in {appended, appended + 1} or (not numbers and start > appended)
        assert left == [batch(n) for n in range(start, end + 1)]
        acknowledged = max(acknowledged, start - 1)
        first = max(end, delivered) + 1
    assert first > LIVES


def test_of_processes_that_want_one_folder_one_gets_it(tmp_path):
    folder = tmp_path / "spool"
    with ExitStack() as stack:
        children = [stack.enter_context(process(folder)) for _ in range(4)]
        answers = [child.stdout.readline().strip() for child in children]
        assert sorted(answers) == [IN_USE] * 3 + ["opened"]
        with pytest.raises(ExportError, match="in use by another process"):
            Spool(folder, max_bytes=MAX_BYTES)
    # A dead process holds nothing.
    with opened(folder) as spool:
        assert spool.counters()["spool_torn"] <= 1


# Disks


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "spool", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", f"size={DISK_BYTES}") as path:
        yield path


def realistic(number):
    """About 40 KB."""
    record = exchange_record(span_id=number + 1)
    return [span_of(Exchange.from_kernel(record), "productpage", 0)] * 64


def fill(path):
    """Leave not a byte."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1024)):
            pass
    assert os.statvfs(path).f_bavail == 0
    return path


def test_a_full_disk_takes_no_batch_in_part_and_more_when_there_is_room(
    small_disk, tmp_path
):
    taken = []
    with opened(small_disk / "spool", max_bytes=1 << 30) as spool:
        number = 0
        while spool.append(realistic(number)):
            taken.append(realistic(number))
            number += 1
        assert number > 10
        assert not spool.append(realistic(number))
        counts = spool.counters()
        assert (counts["spool_failed"], counts["spool_dropped"]) == (128, 0)
        assert counts["spooled"] == len(spool) == 64 * number

        remains = shutil.copytree(small_disk / "spool", tmp_path / "remains")
        with opened(remains) as heir:
            assert drain(heir) == taken
            assert heir.counters()["spool_torn"] == 0

        assert drain(spool) == taken
        assert spool.append(realistic(number))
        assert drain(spool) == [realistic(number)]


def test_what_is_on_a_full_disk_is_delivered_once(small_disk, tmp_path):
    with opened(small_disk / "spool", max_bytes=1 << 30) as spool:
        for number in range(5):
            assert spool.append(realistic(number))
    filler = fill(small_disk / "filler")
    with opened(small_disk / "spool", max_bytes=1 << 30) as spool:
        for number in range(2):
            assert spool.peek() == realistic(number)
            spool.ack()
        assert not spool.append(realistic(9))
        # The acknowledgements needed no room: they are there after SIGKILL.
        remains = shutil.copytree(small_disk / "spool", tmp_path / "remains")
        with opened(remains) as heir:
            assert drain(heir) == [realistic(number) for number in range(2, 5)]
        filler.unlink()
        assert spool.append(realistic(9))
        assert drain(spool) == [*map(realistic, range(2, 5)), realistic(9)]


def test_an_old_segment_that_is_delivered_makes_room_for_a_new_one(small_disk):
    with opened(small_disk / "spool", max_bytes=16 * 100_000) as spool:
        number = 0
        while spool.append(realistic(number)):
            number += 1
        while not spool.append(realistic(number)):
            assert spool.peek()
            spool.ack()
        assert 0 < len(spool) < 64 * number


def test_a_disk_without_inodes_delivers_what_it_has(tmp_path):
    with mounted(tmp_path / "disk", f"size={DISK_BYTES},nr_inodes=16") as disk:
        with opened(disk / "spool") as spool:
            assert spool.append(realistic(1))
        with suppress(OSError):
            for number in range(16):
                (disk / str(number)).touch()
        assert os.statvfs(disk).f_favail == 0
        with opened(disk / "spool") as spool:
            assert spool.peek() == realistic(1)
            assert not spool.append(realistic(2))
            assert drain(spool) == [realistic(1)]
            assert spool.append(realistic(3))


@pytest.mark.parametrize("waiting", [False, True])
def test_a_read_only_folder_is_refused(small_disk, waiting):
    with opened(small_disk / "spool") as spool:
        assert not waiting or spool.append(realistic(1))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ExportError, match="Read-only file system") as caught:
        Spool(small_disk / "spool", max_bytes=MAX_BYTES)
    assert str(small_disk) in str(caught.value)
    with pytest.raises(ExportError, match="Read-only file system"):
        Spool(small_disk / "new", max_bytes=MAX_BYTES)
