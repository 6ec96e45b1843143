"""A cpio archive of the kind the kernel unpacks at boot ("newc"). Bytes in, bytes out.

The format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

from stat import S_IFDIR, S_IFLNK, S_IFREG

TRAILER = "TRAILER!!!"


def archive(
    folders: list[str], links: dict[str, str], files: dict[str, bytes]
) -> bytes:
    """Return an archive of these folders, links and executable files.

    A folder comes before what lies in it, so list parents first.
    """
    entries = [
        *((name, S_IFDIR | 0o755, b"") for name in folders),
        *((name, S_IFLNK | 0o777, to.encode()) for name, to in links.items()),
        *((name, S_IFREG | 0o755, body) for name, body in files.items()),
        (TRAILER, 0, b""),
    ]
    return b"".join(
        entry(inode, *fields) for inode, fields in enumerate(entries, start=1)
    )


def entry(inode: int, name: str, mode: int, body: bytes) -> bytes:
    path = name.encode() + b"\0"
    uid = gid = mtime = device = checksum = 0
    numbers = (
        *(inode, mode, uid, gid, 1, mtime, len(body)),
        *(device, device, device, device, len(path), checksum),
    )
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return aligned(header + path) + aligned(body)


def aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
