"""Read a capture file: pcap of both byte orders and precisions, pcapng, gzip.

The only importer of scapy, whose readers of raw packets are used. They say little of a
file that ends early and take sizes as they stand there; so they read through `_Source`,
which bounds sizes and remembers how a read ended.
"""

from __future__ import annotations

import gzip
import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from podspan.agent.errors import ReplayError

# What scapy reads of a packet; libpcap takes 4 bytes more for damage, as we do these.
# Blocks of pcapng may hold more than a packet.
MAX_PACKET = 262140
MAX_BLOCK = 16 << 20
MAX_INTERFACES = 4096

# Times beyond are no capture's: the year 2262.
_MAX_NS = (1 << 63) - 1

_KINDS = "pcap and pcapng files, plain or gzipped, can be replayed"

# Packets of several CPUs or interfaces may be written out of order, by so many.
REORDERED_PACKETS = 256
# Further back it is the clock that was set.
CLOCK_STEP_NS = 1_000_000_000

_GZIP = b"\x1f\x8b"
_PCAPNG = b"\x0a\x0d\x0d\x0a"
# Microseconds and nanoseconds, in both byte orders.
_PCAP = frozenset(
    {b"\xa1\xb2\xc3\xd4", b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\x3c\x4d", b"\x4d\x3c\xb2\xa1"}
)

# What reading a damaged file may raise, scapy's own apart.
_DAMAGE = (EOFError, OSError, OverflowError, ValueError, zlib.error, struct.error)


class Packet(NamedTuple):
    """A captured packet; times are nanoseconds since 1970, never 0."""

    at_ns: int
    link_type: int  # a LINKTYPE_ of tcpdump.org
    data: bytes
    wire_length: int  # before the snapshot length cut it


class Capture:
    """An open capture file. Raises ReplayError where it is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._opened()
        try:
            self.size = os.fstat(self._file.fileno()).st_size  # 0: a pipe
            self._source = _Source(self._file)
            self._reader = self._reader_of(self._source)
        except BaseException:
            self._file.close()
            raise
        self.without_time = 0  # packets
        self.damage = ""  # why the file was not read to its end

    def __enter__(self) -> Self:
        """Return the capture."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    @property
    def position(self) -> int:
        """How many bytes of the file have been read."""
        return self._file.tell() if self._file.seekable() else self._source.taken

    def packets(self) -> Iterator[Packet]:
        """Return the packets in the order of the file; then `damage` is known."""
        read = self._pcapng if self._source.magic == _PCAPNG else self._pcap
        while True:
            try:
                packet = read()
            except _Damaged as damaged:
                self.damage = str(damaged)
                return
            except _DAMAGE:
                self.damage = self._source.how_it_ended()
                return
            if packet is not None:
                yield packet

    def _opened(self) -> BufferedReader:
        try:
            return self._path.open("rb")
        except OSError as exc:
            hint = "tcpdump writes files as root: sudo chown, or sudo podspan replay"
            raise ReplayError(
                f"cannot read {self._path}: {exc.strerror}",
                hint if isinstance(exc, PermissionError) else "",
            ) from exc

    def _reader_of(self, source: _Source) -> Any:
        # A tenth of a second, and megabytes: only where a capture is read.
        from scapy.error import Scapy_Exception  # noqa: PLC0415
        from scapy.utils import RawPcapNgReader, RawPcapReader  # noqa: PLC0415

        # Of what is wrong in a file we speak ourselves, once.
        logging.getLogger("scapy").setLevel(logging.CRITICAL)
        path = str(self._path)
        if not source.magic:
            raise ReplayError(f"{path} is empty", "was the capture stopped at once?")
        try:
            if source.magic == _PCAPNG:
                return _raw(RawPcapNgReader, path, source)
            if source.magic in _PCAP:
                return _raw(RawPcapReader, path, source)
        except (Scapy_Exception, _Damaged, *_DAMAGE) as exc:
            raise ReplayError(
                f"{path} begins as a capture, but its header is cut or damaged", _KINDS
            ) from exc
        raise ReplayError(f"{path} is no capture", _KINDS)

    def _pcap(self) -> Packet | None:
        reader = self._reader
        data, meta = reader._read_packet(MAX_PACKET)
        if meta.caplen > MAX_PACKET:
            raise _Damaged("damaged")
        if len(data) < meta.caplen:
            raise _Damaged("cut")
        fraction_ns = meta.usec if reader.nano else meta.usec * 1000
        # The upper bits tell of a frame check sequence, whose bytes IP's length cuts.
        link_type = reader.linktype & 0xFFFF
        at_ns = meta.sec * 1_000_000_000 + fraction_ns
        return Packet(at_ns or 1, link_type, data, meta.wirelen)

    def _pcapng(self) -> Packet | None:
        block = self._reader._read_block(MAX_PACKET)
        if len(self._reader.interfaces) > MAX_INTERFACES:
            raise _Damaged("damaged")
        if block is None:
            return None
        data, meta = block
        if meta.tshigh is None:  # a Simple Packet Block
            self.without_time += 1
            return None
        at_ns = ((meta.tshigh << 32) + meta.tslow) * 1_000_000_000 // meta.tsresol
        if at_ns > _MAX_NS:
            self.without_time += 1
            return None
        return Packet(at_ns or 1, meta.linktype, data, meta.wirelen)


def in_order_of_time(packets: Iterable[Packet]) -> Iterator[Packet]:
    """Return the packets sorted, as far as they are at most a little out of order."""
    # The number keeps those of one time as they are, and packets uncompared.
    waiting: list[tuple[int, int, Packet]] = []
    newest_ns = 0
    for number, packet in enumerate(packets):
        if packet.at_ns < newest_ns - CLOCK_STEP_NS:
            while waiting:
                yield heappop(waiting)[2]
            newest_ns = 0
        newest_ns = max(newest_ns, packet.at_ns)
        heappush(waiting, (packet.at_ns, number, packet))
        if len(waiting) > REORDERED_PACKETS:
            yield heappop(waiting)[2]
    while waiting:
        yield heappop(waiting)[2]


class _Damaged(Exception):
    """The file cannot be read further; says how. Never leaves this module."""


class _Source:
    """The bytes of a capture, unpacked."""

    def __init__(self, file: BufferedReader) -> None:
        packed = file.peek(2)[:2] == _GZIP
        self._file = gzip.GzipFile(fileobj=file) if packed else file
        self.taken = 0  # bytes
        self._short = False  # the last read ended in the middle of what was asked
        self.magic = b""
        try:
            self.magic = self.read(4)
        except _DAMAGE:
            # Not gzip, or cut within its first bytes.
            self.magic = _GZIP

    def read(self, size: int) -> bytes:
        """Read exactly so many bytes, unless the file ends before."""
        if size > MAX_BLOCK:
            raise _Damaged("damaged")
        data = self._file.read(size)
        self.taken += len(data)
        self._short = 0 < len(data) < size
        return data

    def how_it_ended(self) -> str:
        """Return "" where the file is over, between two packets."""
        if self._short:
            return "cut"
        try:
            return "damaged" if self._file.read(1) else ""
        except EOFError:  # gzip's: its end is missing
            return "cut"
        except _DAMAGE:
            return "damaged"


def _raw(reader: Any, path: str, source: _Source) -> Any:
    """Make one of scapy's readers, whose metaclass would open the file itself."""
    made = reader.__new__(reader, reader.__name__, reader.__bases__, {})
    made.__init__(path, source, source.magic)
    return made
