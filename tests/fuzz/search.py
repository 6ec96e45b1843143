"""Look for a difference with all processors."""

import os
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

from fuzz.batch import Batch, build
from fuzz.generator import Case, cases
from unit.native.scanner import Native

CHUNK = 2000  # cases

_native: Native  # a worker's


def chunks(seed: str, count: int) -> Iterator[tuple[str, int]]:
    """(seed, cases) of each piece of work, whatever the number of processors.

    The first has the seed itself: so a piece can be run again alone.
    """
    for number, start in enumerate(range(0, count, CHUNK)):
        name = f"{seed}/{number}" if number else seed
        yield name, min(CHUNK, count - start)


def first_difference(seed: str, count: int, folder: Path) -> tuple[str, Case] | None:
    """The first case that differs, and the seed of its chunk; builds into `folder`."""
    workers = len(os.sched_getaffinity(0))
    with get_context("spawn").Pool(workers, _start, (folder,)) as pool:
        for found in pool.imap(_difference_in, chunks(seed, count)):
            if found is not None:
                return found
        pool.close()
        pool.join()
    return None


def _start(folder: Path) -> None:
    global _native  # noqa: PLW0603
    own = folder / str(os.getpid())
    own.mkdir()
    _native = build(own)


def _difference_in(chunk: tuple[str, int]) -> tuple[str, Case] | None:
    seed, count = chunk
    batch = Batch(cases(seed, count))
    number = batch.first_difference(_native)
    return None if number is None else (seed, batch.cases[number])
