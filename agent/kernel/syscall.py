"""bpf(2), the few commands that bcc does not offer or hides behind its own objects.

File descriptors and bytes in, file descriptors and bytes out. What the kernel refuses
is a `BpfError` with its errno; the callers know what it means to the user.

Blind: only x86_64 and arm64, where podspan runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h for arm64.
SYS_BPF: Final = {"x86_64": 321, "aarch64": 280}

# enum bpf_cmd, include/uapi/linux/bpf.h.
BPF_MAP_LOOKUP_ELEM: Final = 1
BPF_MAP_UPDATE_ELEM: Final = 2
BPF_MAP_DELETE_ELEM: Final = 3
BPF_MAP_GET_NEXT_KEY: Final = 4
BPF_OBJ_PIN: Final = 6
BPF_OBJ_GET: Final = 7
BPF_OBJ_GET_INFO_BY_FD: Final = 15
BPF_LINK_CREATE: Final = 28

COMMAND_NAMES: Final = {
    BPF_MAP_LOOKUP_ELEM: "MAP_LOOKUP_ELEM",
    BPF_MAP_UPDATE_ELEM: "MAP_UPDATE_ELEM",
    BPF_MAP_DELETE_ELEM: "MAP_DELETE_ELEM",
    BPF_MAP_GET_NEXT_KEY: "MAP_GET_NEXT_KEY",
    BPF_OBJ_PIN: "OBJ_PIN",
    BPF_OBJ_GET: "OBJ_GET",
    BPF_OBJ_GET_INFO_BY_FD: "OBJ_GET_INFO_BY_FD",
    BPF_LINK_CREATE: "LINK_CREATE",
}

# enum bpf_attach_type: the hooks that podspan attaches by link.
BPF_CGROUP_SOCK_OPS: Final = 3

# What statfs(2) says of a bpf file system (include/uapi/linux/magic.h).
BPF_FS_MAGIC: Final = 0xCAFE4A11

# Flags of map_update.
BPF_ANY: Final = 0
BPF_NOEXIST: Final = 1
BPF_EXIST: Final = 2


class BpfError(OSError):
    """The kernel refused a bpf(2) command; `errno` says why, `command` which."""

    def __init__(self, number: int, command: str, path: str | None = None) -> None:
        super().__init__(number, f"bpf({command}): {os.strerror(number)}", path)
        self.command = command


@dataclass(frozen=True, slots=True)
class MapInfo:
    """The head of `struct bpf_map_info`: what the map is, not what it holds."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Two maps of one shape can stand in for each other."""
        return (self.type, self.key_size, self.value_size, self.max_entries)


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """Parts of `struct bpf_prog_info`."""

    type: int
    id: int
    tag: bytes  # hash of the instructions; the maps they name do not enter it
    map_ids: tuple[int, ...]


def obj_pin(fd: int, path: str | Path) -> None:
    """Give a map, program or link a name in bpffs; EEXIST if the name is taken."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr = struct.pack("=QII", ctypes.addressof(name), fd, 0)
    _bpf(BPF_OBJ_PIN, attr, str(path))


def obj_get(path: str | Path) -> int:
    """Open what is pinned at `path`; the caller closes the descriptor."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr = struct.pack("=QII", ctypes.addressof(name), 0, 0)
    return _bpf(BPF_OBJ_GET, attr, str(path))


def map_update(map_fd: int, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
    """Set one element; the sizes must be the map's, the kernel does not ask."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    attr = _element(
        map_fd, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), flags
    )
    _bpf(BPF_MAP_UPDATE_ELEM, attr)


def map_lookup(map_fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return one element's value, or None if there is no such key."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value_size)
    attr = _element(
        map_fd, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), 0
    )
    try:
        _bpf(BPF_MAP_LOOKUP_ELEM, attr)
    except BpfError as exc:
        if exc.errno == errno.ENOENT:
            return None
        raise
    return value_buffer.raw


def map_delete(map_fd: int, key: bytes) -> bool:
    """Remove one element; False if there was none."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    attr = _element(map_fd, ctypes.addressof(key_buffer), 0, 0)
    try:
        _bpf(BPF_MAP_DELETE_ELEM, attr)
    except BpfError as exc:
        if exc.errno == errno.ENOENT:
            return False
        raise
    return True


def map_items(map_fd: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a hash map as they are found.

    Keys are collected first, so the caller may delete; what others delete meanwhile is
    left out.
    """
    info = map_info(map_fd)
    size = info.key_size
    keys: list[bytes] = []
    following = ctypes.create_string_buffer(size)
    last: bytes | None = None
    while True:
        before = None if last is None else ctypes.create_string_buffer(last, size)
        attr = _element(
            map_fd,
            0 if before is None else ctypes.addressof(before),
            ctypes.addressof(following),
            0,
        )
        try:
            _bpf(BPF_MAP_GET_NEXT_KEY, attr)
        except BpfError as exc:
            if exc.errno == errno.ENOENT:
                break
            raise
        last = following.raw
        keys.append(last)
    for key in dict.fromkeys(keys):  # a table that changes is begun anew
        value = map_lookup(map_fd, key, info.value_size)
        if value is not None:
            yield key, value


def link_create(prog_fd: int, target_fd: int, attach_type: int, flags: int = 0) -> int:
    """Attach a program (since Linux 5.7); closing the returned link detaches it."""
    attr = struct.pack("=IIII", prog_fd, target_fd, attach_type, flags)
    return _bpf(BPF_LINK_CREATE, attr)


def map_info(map_fd: int) -> MapInfo:
    """Describe a map."""
    # type, id, key_size, value_size, max_entries lead the struct since Linux 4.13.
    info = ctypes.create_string_buffer(struct.calcsize("=5I"))
    _get_info(map_fd, info)
    return MapInfo(*struct.unpack("=5I", info.raw))


def prog_info(prog_fd: int, max_maps: int = 16) -> ProgInfo:
    """Describe a program; more maps than `max_maps` are left off."""
    # type, id, tag[8], jited_len, xlated_len, jited, xlated, load_time, uid,
    # nr_map_ids, map_ids: the struct's head since Linux 4.15.
    head = struct.Struct("=II8sIIQQQIIQ")
    ids = (ctypes.c_uint32 * max_maps)()
    info = ctypes.create_string_buffer(
        head.pack(0, 0, b"", 0, 0, 0, 0, 0, 0, max_maps, ctypes.addressof(ids)),
        head.size,
    )
    _get_info(prog_fd, info)
    fields = head.unpack(info.raw)
    count = min(fields[9], max_maps)
    return ProgInfo(
        type=fields[0], id=fields[1], tag=fields[2], map_ids=tuple(ids[:count])
    )


def is_bpffs(path: str | Path) -> bool:
    """Say whether `path` lies in a bpf file system; False if there is no such path."""
    # struct statfs begins with f_type, a long; 120 bytes on both architectures.
    status = ctypes.create_string_buffer(256)
    if _libc.statfs(ctypes.c_char_p(os.fsencode(path)), status) != 0:
        return False
    kind: int = struct.unpack_from("=q", status.raw)[0]
    return kind == BPF_FS_MAGIC


def _get_info(fd: int, info: ctypes.Array[ctypes.c_char]) -> None:
    attr = struct.pack("=IIQ", fd, ctypes.sizeof(info), ctypes.addressof(info))
    _bpf(BPF_OBJ_GET_INFO_BY_FD, attr)


def _element(map_fd: int, key: int, value: int, flags: int) -> bytes:
    # The u64 after map_fd is aligned: four bytes of padding, which must be zero.
    return struct.pack("=I4xQQQ", map_fd, key, value, flags)


_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attr: bytes, path: str | None = None) -> int:
    """Call bpf(2). The kernel takes shorter attributes than it knows: the rest is 0."""
    name = COMMAND_NAMES[command]
    number = SYS_BPF.get(platform.machine())
    if number is None:
        raise BpfError(errno.ENOSYS, name, path)
    buffer = ctypes.create_string_buffer(attr, len(attr))
    result: int = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_int(command),
        ctypes.byref(buffer),
        ctypes.c_uint(len(attr)),
    )
    if result < 0:
        raise BpfError(ctypes.get_errno(), name, path)
    return result
