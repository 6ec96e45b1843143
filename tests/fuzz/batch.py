"""The scanner against its reference, thousands of streams in one call of batch.c."""

import ctypes
import struct
from collections.abc import Iterable
from itertools import accumulate, chain
from pathlib import Path

from fuzz.generator import Case
from podspan.agent.kernel import grammar
from unit.native.scanner import AGAIN_MAX, KINDS, SOURCE, Event, Native, Verdict
from unit.native.stream_model import read_stream

HARNESS = Path(__file__).parent / "batch.c"
STATES = {
    name.removeprefix("SCAN_"): number
    for name, number in grammar.enumerators(SOURCE, "scan_state").items()
}
HEADERS = {
    name.removeprefix("HEADER_").lower(): number
    for name, number in grammar.enumerators(SOURCE, "scan_header").items()
}
IN_HEAD = 255

_KINDS = {name: number for number, name in KINDS.items()}
_EVENT = struct.Struct("<BQ")
_HEAD = struct.Struct("<IHBBQB")
_VALUE = struct.Struct("<BHHH")
_END = struct.Struct("<BBQ")


def build(folder: Path, source: str = SOURCE) -> Native:
    """The scanner with batch.c around it, built into `folder`."""
    native = Native(folder, source, harness=HARNESS)
    native.lib.first_difference.restype = ctypes.c_ulonglong
    native.lib.first_difference.argtypes = [
        ctypes.POINTER(_RawBatch),
        ctypes.c_char_p,
        ctypes.POINTER(Coverage),
    ]
    return native


class Coverage(ctypes.Structure):
    """`struct fuzz_coverage` of batch.c."""

    _fields_ = (
        ("cells", ctypes.c_ulonglong * (grammar.STATES * grammar.CLASSES)),
        ("cuts", ctypes.c_ulonglong * grammar.STATES),
        ("ends", ctypes.c_ulonglong * grammar.STATES),
        ("heads", ctypes.c_ulonglong * 16),
        ("again", ctypes.c_ulonglong * (AGAIN_MAX + 2)),
        ("all_heads", ctypes.c_ulonglong),
        ("messages", ctypes.c_ulonglong),
    )


class _RawBatch(ctypes.Structure):
    _fields_ = (
        ("cases", ctypes.c_char_p),
        ("count", ctypes.c_ulonglong),
        ("data", ctypes.c_char_p),
        ("cuts", ctypes.c_char_p),
        ("expected", ctypes.c_char_p),
    )


class Batch:
    """Cases, and what the reference says of them."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self.cases = list(cases)
        expected = [expected_of(case) for case in self.cases]
        sizes = [
            [len(case.data) for case in self.cases],
            [len(case.cuts) for case in self.cases],
            [len(verdict) for verdict in expected],
        ]
        # (at, size) in the data, in the cuts, in the verdicts; then two flags
        places = [
            zip(accumulate([0, *column[:-1]]), column, strict=True) for column in sizes
        ]
        rows = zip(self.cases, *places, strict=True)
        cuts = list(chain.from_iterable(case.cuts for case in self.cases))
        self._raw = _RawBatch(
            b"".join(
                struct.pack("<8Q", *data, *cut, *verdict, case[1], case[2])
                for case, data, cut, verdict in rows
            ),
            len(self.cases),
            b"".join(case.data for case in self.cases),
            struct.pack(f"<{len(cuts)}Q", *cuts),
            b"".join(expected),
        )

    def first_difference(
        self, native: Native, coverage: Coverage | None = None
    ) -> int | None:
        """The number of the first case in which the scanner differs, if any.

        It says something else, or something else when its bytes are cut.
        """
        number = native.lib.first_difference(
            self._raw, native.tables, coverage or Coverage()
        )
        assert isinstance(number, int)
        return number if number < len(self.cases) else None


def expected_of(case: Case) -> bytes:
    """The reference's verdict; empty, which none is, where it contradicts itself."""
    try:
        return encode(read_stream(case.data, case.is_response, case.after_head))
    except AssertionError:
        return b""


def encode(verdict: Verdict) -> bytes:
    """A verdict as batch.c writes its own."""
    parts = [_encode_event(event) for event in verdict.events]
    state = STATES.get(verdict.state, IN_HEAD)
    return b"".join(parts) + _END.pack(0, state, verdict.skip)


def _encode_event(event: Event) -> bytes:
    start = _EVENT.pack(_KINDS[event.kind], event.at)
    if event.kind != "head":
        return start
    body = STATES[event.body]
    again = struct.pack(f"<{len(event.again_at)}H", *event.again_at)
    parts = [
        start,
        _HEAD.pack(
            event.size, event.status, event.minor, body, event.length, event.again
        ),
        again,
        struct.pack("<H", len(event.method)) + event.method,
        struct.pack("<H", len(event.target)) + event.target,
    ]
    values = sorted((HEADERS[name], value) for name, value in event.headers.items())
    for number, value in values:
        place = _VALUE.pack(number, value.name_at, value.at, value.length)
        parts.append(place + value.kept)
    return b"".join(parts)
