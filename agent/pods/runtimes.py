"""Which processes run Go: their goroutines roam between threads.

What a thread of theirs serves must not be claimed as the parent of what it calls. Told
by the executable, before the first call could link wrongly.

Blind: Go in a shared library, gccgo, and programs that were packed (UPX).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from podspan.agent.pods import processes

# cmd/link names them so; the last where the linker keeps it for relocation (PIE).
GO_SECTIONS: Final = frozenset(
    {
        b".go.buildinfo",
        b".note.go.buildid",
        b".gopclntab",
        b".data.rel.ro.gopclntab",
    }
)
GO_NOTE_OWNER: Final = b"Go\0\0"

# Go's debug/buildinfo looks for it where a section has no name: aligned so, near the
# start of the first writable segment.
BUILD_INFO_MAGIC: Final = b"\xff Go buildinf:"
BUILD_INFO_ALIGN: Final = 16
BUILD_INFO_WITHIN: Final = 65536

# elf.h, the 64-bit little-endian forms.
ELF_IDENT: Final = b"\x7fELF\x02\x01"
# After e_ident: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize,
# phnum, shentsize, shnum, shstrndx.
ELF_HEADER: Final = struct.Struct("<16s2HI3QI6H")
# type, flags, offset, vaddr, paddr, filesz, memsz, align
PROGRAM_HEADER: Final = struct.Struct("<2I6Q")
# name, type, flags, addr, offset, size, link, info, addralign, entsize
SECTION_HEADER: Final = struct.Struct("<2I4Q2I2Q")
NOTE_HEADER: Final = struct.Struct("<3I")  # namesz, descsz, type
PT_LOAD: Final = 1
PT_NOTE: Final = 4
PF_X_W: Final = 3
PF_W: Final = 2

# More is no program's, so no hostile file's either.
NAMES_BYTES: Final = 65536
NOTES_BYTES: Final = 4096

# Bytes at an offset, of a size; fewer where the file ends.
Read = Callable[[int, int], bytes]

File = tuple[int, int, int]  # device, inode, time of the last change in ns


def is_go(elf: BinaryIO | bytes) -> bool:
    """Say whether an executable is a Go program; False for whatever is no ELF64.

    Reads the headers and little more. Raises OSError where a file cannot be read.
    """
    read = _reader(elf)
    try:
        header = ELF_HEADER.unpack(read(0, ELF_HEADER.size))
    except struct.error:
        return False
    ident, _, _, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, names = (
        header
    )
    if not ident.startswith(ELF_IDENT):
        return False
    segments = list(_table(read, PROGRAM_HEADER, phoff, phentsize, phnum))
    sections = list(_table(read, SECTION_HEADER, shoff, shentsize, shnum))
    return (
        _has_go_section(read, sections, names)
        or _has_go_note(read, segments)
        or _has_build_info(read, segments)
    )


@dataclass(frozen=True, slots=True)
class Change:
    """What is otherwise than at the last look."""

    started: frozenset[int]
    ended: frozenset[int]


class GoProcesses:
    """The Go programs that run; each file is read once as long as one runs it.

    A process is told by its executable at every look, a stat(2) each, because execve(2)
    keeps the process and its start time: containers begin as runc, a Go program.
    """

    def __init__(self) -> None:
        self._verdicts: dict[File, bool] = {}
        self._running: frozenset[int] = frozenset()

    def look(self, netns: Collection[int] | None = None) -> Change:
        """Return which Go processes (tgids) came and went in these namespaces.

        None: in all. Meant to be called once a second.
        """
        before, self._running = self._running, frozenset(self._find(netns))
        return Change(self._running - before, before - self._running)

    @property
    def running(self) -> frozenset[int]:
        """The Go processes of the last look."""
        return self._running

    def _find(self, netns: Collection[int] | None) -> Iterator[int]:
        known, self._verdicts = self._verdicts, {}  # forgets what nobody runs any more
        for pid in processes.pids():
            exe = f"/proc/{pid}/exe"
            try:
                file = _identity(os.stat(exe))  # noqa: PTH116  half of Path's time
                verdict = self._verdicts.get(file, known.get(file))
                if verdict is None:
                    file, verdict = _judge(exe)
            except OSError:  # a kernel thread, or it has ended
                continue
            self._verdicts[file] = verdict
            if verdict and (netns is None or processes.netns_of(pid) in netns):
                yield pid


def _identity(stat: os.stat_result) -> File:
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _judge(exe: str) -> tuple[File, bool]:
    with Path(exe).open(
        "rb", buffering=0
    ) as file:  # perhaps another one than a moment ago
        return _identity(os.fstat(file.fileno())), is_go(file)


def _reader(elf: BinaryIO | bytes) -> Read:
    if isinstance(elf, bytes):
        return lambda offset, size: elf[offset : offset + size]
    fd = elf.fileno()
    # To pread(2), an end that no file can have is an error.
    return lambda offset, size: os.pread(fd, size, offset) if offset < 1 << 62 else b""


def _table(
    read: Read, entry: struct.Struct, offset: int, entry_size: int, count: int
) -> Iterator[tuple[int, ...]]:
    """Yield the whole entries of a header table; none if they are of another form."""
    if entry_size == entry.size:
        data = read(offset, entry_size * count)
        yield from entry.iter_unpack(data[: len(data) // entry.size * entry.size])


def _has_go_section(read: Read, sections: list[tuple[int, ...]], names: int) -> bool:
    if names >= len(sections):  # stripped of its headers, or cut
        return False
    offset, size = sections[names][4:6]
    texts = read(offset, min(size, NAMES_BYTES))
    return any(
        texts.startswith(name + b"\0", section[0])
        for section in sections
        for name in GO_SECTIONS
    )


def _has_go_note(read: Read, segments: list[tuple[int, ...]]) -> bool:
    return any(
        owner == GO_NOTE_OWNER
        for kind, _, offset, _, _, size, _, _ in segments
        if kind == PT_NOTE
        for owner in _note_owners(read(offset, min(size, NOTES_BYTES)))
    )


def _note_owners(notes: bytes) -> Iterator[bytes]:
    """Yield the owners' names of a segment of notes, padded as they are."""
    at = 0
    while at + NOTE_HEADER.size <= len(notes):
        name_size, size, _ = NOTE_HEADER.unpack_from(notes, at)
        at += NOTE_HEADER.size
        name_end = at + ((name_size + 3) & ~3)
        yield notes[at:name_end]
        at = name_end + ((size + 3) & ~3)


def _has_build_info(read: Read, segments: list[tuple[int, ...]]) -> bool:
    for kind, flags, offset, address, _, size, _, _ in segments:
        if kind == PT_LOAD and flags & PF_X_W == PF_W:
            data = read(offset, min(size, BUILD_INFO_WITHIN))
            at = data.find(BUILD_INFO_MAGIC)
            while at >= 0 and (address + at) % BUILD_INFO_ALIGN:
                at = data.find(BUILD_INFO_MAGIC, at + 1)
            return at >= 0
    return False
