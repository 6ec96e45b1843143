"""A case in which scanner and reference differ, made small and told to a person."""

import re
from collections.abc import Callable

from fuzz.batch import Batch
from fuzz.generator import Case
from unit.native.scanner import Native, Verdict
from unit.native.stream_model import read_stream

TRIES = 10_000  # of one case: a second, or twenty for the longest
_RUN = re.compile(rb"(.)\1{60,}", re.DOTALL)


def differs(native: Native, case: Case) -> bool:
    """Whether batch.c finds a difference in this one case."""
    return Batch([case]).first_difference(native) is not None


def shrunk(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A smaller case that fails as well, found by leaving out what can be left out."""
    left = TRIES

    def smaller(candidate: Case) -> Case:
        nonlocal case, left
        left -= 1
        if left > 0 and candidate != case and fails(candidate):
            case = candidate
        return case

    before = None
    while case != before and left > 0:
        before = case
        smaller(case._replace(cuts=()))
        smaller(case._replace(after_head=False))
        piece = len(case.data)
        while piece:
            at = 0
            while at < len(case.data):
                size = len(case.data)
                if len(smaller(_without(case, at, min(at + piece, size))).data) == size:
                    at += piece
            piece //= 2
        for cut in case.cuts:
            smaller(case._replace(cuts=tuple(c for c in case.cuts if c != cut)))
    return case


def _without(case: Case, start: int, end: int) -> Case:
    cuts = (cut if cut <= start else max(start, cut - end + start) for cut in case.cuts)
    data = case.data[:start] + case.data[end:]
    return case._replace(data=data, cuts=tuple(cuts))


def explained(native: Native, case: Case) -> str:
    """The case, and every verdict on it."""
    data, is_response, after_head, cuts = case
    whole = _told(lambda: native.scan(data, is_response, (), after_head))
    lines = [
        f"stream: {spelt(data)}",
        f"        {len(data)} bytes, {is_response=}, {after_head=}, {cuts=}",
        "the reference says:",
        *_told(lambda: read_stream(data, is_response, after_head)),
        "the scanner says:",
        *whole,
    ]
    cut = _told(lambda: native.scan(data, is_response, cuts, after_head))
    if cut != whole:
        lines += ["when it is cut:", *cut]
    by_bytes = _told(lambda: native.scan_bytes(data, is_response, after_head))
    if by_bytes != whole:
        lines += ["byte by byte:", *by_bytes]
    if differing := native.differing_cut(data, is_response, after_head):
        lines.append(f"its memory differs when it is cut at {differing}")
    return "\n".join(lines)


def spelt(data: bytes) -> str:
    """An expression that is `data`, with long runs of one byte as products."""
    parts, at = [], 0
    for run in _RUN.finditer(data):
        parts += [repr(data[at : run.start()]), f"{run[1]!r} * {len(run[0])}"]
        at = run.end()
    return " + ".join([*parts, repr(data[at:])])


def _told(read: Callable[[], Verdict]) -> list[str]:
    try:
        verdict = read()
    except AssertionError as exc:
        return [f"    {type(exc).__name__}: {exc}"]
    end = f"    ends in {verdict.state}, {verdict.skip} body bytes to come"
    return [*(f"    {event}" for event in verdict.events), end]
