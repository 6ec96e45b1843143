"""bpf/scanner.h and bpf/b3.h, compiled for this machine.

`Native` is one build; a stream goes in, cut anywhere, and events come out. Mutants are
builds of a changed source.
"""

import ctypes
import subprocess
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from podspan.agent.kernel import grammar

HERE = Path(__file__).parent
BPF = HERE.parents[2] / "bpf"
SOURCE = (BPF / "scanner.h").read_text()
B3_SOURCE = (BPF / "b3.h").read_text()

# What clang allows and gcc does not know is all that is let pass.
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas"]

KINDS = {1: "head", 2: "message", 3: "opaque"}
NAMES_MAX = 16
AGAIN_MAX = 4
NOBODYS_TEXT = b"\xa5"
CONTEXT_SIZE = 48  # asserted in b3.h


class RawEvent(ctypes.Structure):
    """`struct event` of harness.c."""

    _fields_ = (
        ("at", ctypes.c_ulonglong),
        ("skip", ctypes.c_ulonglong),
        ("kind", ctypes.c_uint),
        ("seen", ctypes.c_uint),
        ("head_bytes", ctypes.c_uint),
        ("status", ctypes.c_ushort),
        ("minor", ctypes.c_ubyte),
        ("body_state", ctypes.c_ubyte),
        ("length_of", ctypes.c_ushort * 16),
        ("at_of", ctypes.c_ushort * 16),
        ("name_at_of", ctypes.c_ushort * 16),
        ("again_at", ctypes.c_ushort * AGAIN_MAX),
        ("again", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 7),
        ("text", ctypes.c_ubyte * 1024),
    )


@dataclass(frozen=True)
class Value:
    """A header's value: its place in the head, its size, and what is kept of it."""

    name_at: int
    at: int
    length: int
    kept: bytes


@dataclass(frozen=True)
class Event:
    """A head or a message ended after `at` bytes, or the stream became opaque."""

    kind: str
    at: int
    size: int = 0  # of the head
    minor: int = 0
    status: int = 0
    method: bytes = b""
    target: bytes = b""
    headers: dict[str, Value] = field(default_factory=dict)
    again: int = 0  # B3 lines that repeat one, and where the first of them are
    again_at: tuple[int, ...] = ()
    body: str = ""
    length: int = 0  # of a body by Content-Length


@dataclass(frozen=True)
class Verdict:
    """What a stream says: its events, and where its bytes leave it."""

    events: list[Event]
    state: str
    skip: int = 0  # body bytes still to come


def lookup_tables(source: str) -> bytes:
    """`struct grammar` of harness.c."""
    pairs = list(grammar.names(source))
    assert len(pairs) <= NAMES_MAX
    known = b"".join(name for name, _ in pairs).ljust(24 * NAMES_MAX, b"\0")
    entries = b"".join(entry for _, entry in pairs).ljust(8 * NAMES_MAX, b"\0")
    return grammar.table(source) + known + entries


class Native:
    """One build of scanner.h and b3.h with their tables."""

    def __init__(
        self,
        folder: Path,
        source: str = SOURCE,
        b3_source: str = B3_SOURCE,
        harness: Path = HERE / "harness.c",
    ) -> None:
        """Build into `folder`; another `harness` includes harness.c."""
        (folder / "scanner.h").write_text(source)
        (folder / "b3.h").write_text(b3_source)
        built = folder / "harness.so"
        places = [folder, HERE, BPF, BPF / "headers" / "include"]
        includes = [f"-I{place}" for place in places]
        output = ["-shared", "-fPIC", str(harness), "-o", str(built)]
        subprocess.run(["gcc", *FLAGS, *includes, *output], check=True)
        self.tables = lookup_tables(source)
        self._states = {
            number: name.removeprefix("SCAN_")
            for name, number in grammar.enumerators(source, "scan_state").items()
        }
        self._headers = {
            name: number
            for name, number in grammar.enumerators(source, "scan_header").items()
            if name not in ("HEADER_OTHER", "HEADER_LENGTH", "HEADER_CODING")
        }
        self._fields = grammar.text_fields(source)
        self.lib = _typed(ctypes.CDLL(str(built)))
        self._stream = ctypes.create_string_buffer(self.lib.stream_size())

    def with_tables(self, tables: bytes) -> Self:
        """The same build with other tables."""
        other = copy(self)
        other.tables = tables
        return other

    def scan(
        self,
        data: bytes,
        is_response: bool,
        cuts: Sequence[int] = (),
        after_head: bool = False,
    ) -> Verdict:
        """Feed `data` cut before each of `cuts`; `after_head`: it answers HEAD."""
        self._open(is_response, after_head)
        array = (ctypes.c_ulonglong * len(cuts))(*cuts)
        self.lib.feed_cut(self._stream, data, len(data), array, len(cuts))
        return self._verdict(is_response)

    def scan_bytes(
        self, data: bytes, is_response: bool, after_head: bool = False
    ) -> Verdict:
        """Feed `data` byte by byte."""
        self._open(is_response, after_head)
        self.lib.feed_bytes(self._stream, data, len(data))
        return self._verdict(is_response)

    def differing_cut(
        self, data: bytes, is_response: bool, after_head: bool = False, step: int = 1
    ) -> int:
        """Cut in two at each byte; the first cut that changes anything, or 0.

        Compares all of the scanner's memory, not only its verdict.
        """
        self._open(is_response, after_head)
        self.lib.feed_cut(self._stream, data, len(data), None, 0)
        cut = self.lib.differing_cut(self._stream, data, len(data), step)
        assert isinstance(cut, int)
        return cut

    def read_context(self, head: bytes) -> bytes | None:
        """`struct head_context` of the request head; None where it is none."""
        context = ctypes.create_string_buffer(b"\xff" * CONTEXT_SIZE, CONTEXT_SIZE)
        if not self.lib.b3_read_context(context, self.tables, head, len(head)):
            return None
        return context.raw

    def _open(self, is_response: bool, after_head: bool) -> None:
        self.lib.open_stream(self._stream, self.tables, is_response, after_head)

    def _verdict(self, is_response: bool) -> Verdict:
        lib, stream = self.lib, self._stream
        raws = lib.events_of(stream)
        events = [
            self._event(raws[i], is_response) for i in range(lib.count_of(stream))
        ]
        return Verdict(events, self._states[lib.state_of(stream)], lib.skip_of(stream))

    def _event(self, raw: RawEvent, is_response: bool) -> Event:
        kind = KINDS[raw.kind]
        if kind != "head":
            return Event(kind, raw.at)
        text = bytes(raw.text)
        if is_response and text.strip(NOBODYS_TEXT):
            raise AssertionError("a response wrote over its request")

        def kept(name: str, length: int) -> bytes:
            at, size = self._fields[name]
            return text[at : at + min(size, length)]

        headers = {}
        for name, number in self._headers.items():
            if raw.seen & 1 << number:
                header = name.removeprefix("HEADER_").lower()
                length = raw.length_of[number]
                value = b"" if is_response else kept(header, length)
                headers[header] = Value(
                    raw.name_at_of[number], raw.at_of[number], length, value
                )
        body = self._states[raw.body_state]
        return Event(
            kind,
            raw.at,
            size=raw.head_bytes,
            minor=raw.minor,
            status=raw.status,
            method=b"" if is_response else kept("method", 1024).rstrip(b"\0"),
            target=b"" if is_response else kept("target", 1024).rstrip(b"\0"),
            headers=headers,
            again=raw.again,
            again_at=tuple(raw.again_at[: min(raw.again, AGAIN_MAX)]),
            body=body,
            length=raw.skip if body == "BODY" else 0,
        )


def _typed(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, u64, size = ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_ulonglong
    data, number = ctypes.c_char_p, ctypes.c_int
    signatures = {
        "open_stream": (None, [pointer, data, number, number]),
        "feed_cut": (None, [pointer, data, size, pointer, size]),
        "feed_bytes": (None, [pointer, data, size]),
        "differing_cut": (u64, [pointer, data, size, u64]),
        "stream_size": (u64, []),
        "state_of": (ctypes.c_uint, [pointer]),
        "skip_of": (u64, [pointer]),
        "count_of": (ctypes.c_uint, [pointer]),
        "events_of": (ctypes.POINTER(RawEvent), [pointer]),
        "b3_hex_write": (None, [pointer, u64]),
        "b3_hex_read": (u64, [data, ctypes.POINTER(ctypes.c_uint)]),
        "b3_uuid_write": (None, [pointer, u64, u64, ctypes.c_ubyte]),
        "b3_derive_id": (u64, [u64]),
        "b3_sample_hash": (ctypes.c_uint, [u64]),
        "b3_read_context": (number, [pointer, data, data, size]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib
