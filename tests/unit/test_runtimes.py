"""Go programs by their files, and Go processes by what they run."""

import os
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.pods import processes
from podspan.agent.pods.runtimes import (
    BUILD_INFO_MAGIC,
    ELF_HEADER,
    GO_SECTIONS,
    PROGRAM_HEADER,
    PT_LOAD,
    PT_NOTE,
    SECTION_HEADER,
    GoProcesses,
    is_go,
)

GOSU = "/usr/sbin/gosu"
READ_WRITE, READ_EXECUTE = 6, 5
ADDRESS = 0x400008  # of segments: linkers do not align these to 16
DEADLINE_S = 30

needs_gosu = pytest.mark.skipif(
    not Path(GOSU).exists(), reason=f"no {GOSU}: apt-get install gosu"
)


def make_elf(*segments, sections=(), ident=b"\x7fELF\x02\x01\x01", shnum=None):
    """An ELF of (type, flags, content) segments and of sections' names."""
    names = b"\0" + b"".join(name + b"\0" for name in (*sections, b".shstrtab"))
    body = ELF_HEADER.size + PROGRAM_HEADER.size * len(segments)
    headers, contents = b"", b""
    for kind, flags, content in segments:
        at = body + len(contents)
        headers += PROGRAM_HEADER.pack(
            kind, flags, at, ADDRESS, ADDRESS, len(content), len(content), 16
        )
        contents += content
    names_at = body + len(contents)
    table = b""
    for name in (*sections, b".shstrtab"):
        table += SECTION_HEADER.pack(
            *(names.index(b"\0" + name + b"\0") + 1, 3, 0, 0),
            *(names_at, len(names), 0, 0, 1, 0),
        )
    count = len(sections) + 1 if shnum is None else shnum
    header = ELF_HEADER.pack(
        *(ident, 2, 62, 1, 0, ELF_HEADER.size, names_at + len(names), 0),
        *(ELF_HEADER.size, PROGRAM_HEADER.size, len(segments)),
        *(SECTION_HEADER.size, count, max(0, count - 1)),
    )
    return header + headers + contents + names + table


def note(owner, content=bytes(20), kind=4):
    def pad(data):
        return data.ljust((len(data) + 3) & ~3, b"\0")

    return (
        struct.pack("<3I", len(owner), len(content), kind) + pad(owner) + pad(content)
    )


GNU_NOTE, GO_NOTE = note(b"GNU\0"), note(b"Go\0\0", b"build id")


@pytest.mark.parametrize("name", sorted(GO_SECTIONS))
def test_go_by_the_name_of_a_section(name):
    assert is_go(make_elf(sections=[b".text", name, b".data"]))


@pytest.mark.parametrize("name", [b".gopclntab2", b".go", b"x.go.buildinfo", b".text"])
def test_not_go_by_a_name_that_is_only_like_one(name):
    assert not is_go(make_elf(sections=[name]))


def test_go_by_a_note_where_sections_are_stripped():
    assert is_go(make_elf((PT_NOTE, 4, GNU_NOTE + GO_NOTE), shnum=0))
    assert not is_go(make_elf((PT_NOTE, 4, GNU_NOTE), shnum=0))
    assert not is_go(make_elf((PT_NOTE, 4, note(b"GoGo")), shnum=0))


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([(PT_LOAD, READ_WRITE, bytes(8) + BUILD_INFO_MAGIC)], True),
        ([(PT_LOAD, READ_WRITE, bytes(16) + BUILD_INFO_MAGIC)], False),
        ([(PT_LOAD, READ_WRITE, bytes(65544) + BUILD_INFO_MAGIC)], False),
        ([(PT_LOAD, READ_EXECUTE, bytes(8) + BUILD_INFO_MAGIC)], False),
        ([(PT_NOTE, READ_WRITE, bytes(8) + BUILD_INFO_MAGIC)], False),
        (
            [
                (PT_LOAD, READ_EXECUTE, bytes(160)),
                (PT_LOAD, READ_WRITE, bytes(8) + BUILD_INFO_MAGIC),
            ],
            True,
        ),
    ],
)
def test_go_by_its_build_info_where_all_else_is_stripped(segments, expected):
    assert is_go(make_elf(*segments, shnum=0)) is expected


@pytest.mark.parametrize(
    "ident",
    [
        b"\x7fELF\x01\x01\x01",  # 32-bit
        b"\x7fELF\x02\x02\x01",  # big endian
        b"#!/bin/sh",
    ],
)
def test_what_is_no_elf64_is_not_go(ident):
    assert not is_go(make_elf(sections=[b".go.buildinfo"], ident=ident))


@given(st.binary(max_size=300))
def test_no_bytes_make_it_fail(data):
    assert not is_go(data)


WHOLE = make_elf(
    (PT_NOTE, 4, GNU_NOTE + note(b"Og\0\0")),
    (PT_LOAD, READ_WRITE, bytes(64)),
    sections=[b".text", b".data"],
)


@given(
    st.lists(
        st.tuples(st.integers(6, len(WHOLE) - 1), st.integers(0, 255)), max_size=12
    ),
    st.integers(0, len(WHOLE)),
)
def test_no_damaged_elf_makes_it_fail(changes, size):
    damaged = bytearray(WHOLE)
    for at, value in changes:
        damaged[at] = value
    assert is_go(bytes(damaged[:size])) in {True, False}


@given(offset=st.integers(0, 2**64 - 1), size=st.integers(0, 2**64 - 1))
def test_no_offset_in_a_file_makes_it_fail(tmp_path_factory, offset, size):
    path = tmp_path_factory.getbasetemp() / "hostile"
    segment = PROGRAM_HEADER.pack(PT_LOAD, READ_WRITE, offset, 0, 0, size, size, 1)
    header = ELF_HEADER.pack(
        *(b"\x7fELF\x02\x01", 2, 62, 1, 0, ELF_HEADER.size, offset, 0),
        *(ELF_HEADER.size, PROGRAM_HEADER.size, 1, SECTION_HEADER.size, 3, 1),
    )
    path.write_bytes(header + segment)
    with path.open("rb") as file:
        assert not is_go(file)


@needs_gosu
def test_a_real_go_program_is_go_whatever_was_stripped():
    whole = Path(GOSU).read_bytes()
    header = list(ELF_HEADER.unpack_from(whole))
    stripped = bytearray(whole)
    header[11:14] = [0, 0, 0]  # shentsize, shnum, shstrndx
    ELF_HEADER.pack_into(stripped, 0, *header)
    without_note = bytearray(stripped)
    for at in range(header[5], header[5] + header[10] * PROGRAM_HEADER.size, 56):
        if PROGRAM_HEADER.unpack_from(whole, at)[0] == PT_NOTE:
            without_note[at] = 0
    damaged = bytearray(without_note)
    damaged[whole.index(BUILD_INFO_MAGIC)] = 0

    with Path(GOSU).open("rb") as file:
        assert is_go(file)
    assert is_go(bytes(stripped))
    assert is_go(bytes(without_note))
    assert not is_go(bytes(damaged))


def test_python_is_not_go():
    with Path(sys.executable).open("rb") as file:
        assert not is_go(file)


@needs_gosu
def test_a_go_process_is_told_when_it_starts_and_when_it_ends():
    go = GoProcesses()
    go.look()
    with blocked([GOSU]) as process:
        wait_until_it_runs(process.pid, GOSU)
        assert process.pid in go.look().started
        assert process.pid in go.running
        change = go.look()
        assert process.pid not in change.started | change.ended
    assert process.pid in go.look().ended
    assert process.pid not in go.running


@needs_gosu
def test_a_process_that_becomes_go_by_execve_has_started():
    go = GoProcesses()
    with blocked(["sh", "-c", f"read line; exec {GOSU}"]) as process:
        assert process.pid not in go.look().started
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_until_it_runs(process.pid, GOSU)
        assert process.pid in go.look().started


@needs_gosu
def test_only_processes_of_the_namespaces_asked_for_count():
    own = processes.own_netns()
    go = GoProcesses()
    with blocked([GOSU]) as process:
        wait_until_it_runs(process.pid, GOSU)
        assert process.pid in go.look({own}).started
        assert process.pid in go.look({own + 1}).ended


def test_a_process_that_is_no_go_program_never_counts():
    go = GoProcesses()
    assert os.getpid() not in go.look().started


@contextmanager
def blocked(argv):
    """Run a program that cannot say a word, and so does not end, within the context."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            pass
    os.set_blocking(writer, True)
    process: Any = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=writer, stderr=writer
    )
    os.close(writer)
    try:
        yield process
    finally:
        os.close(reader)
        process.stdin.close()
        process.wait(DEADLINE_S)


def wait_until_it_runs(pid, path):
    deadline = time.monotonic() + DEADLINE_S
    while not Path(f"/proc/{pid}/exe").samefile(path):
        assert time.monotonic() < deadline
        time.sleep(0.001)
