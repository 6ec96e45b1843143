"""Debian kernels to boot under QEMU: downloaded once, unpacked, never installed.

A cached kernel is a folder with the package's `boot/` and `lib/modules/`, and a link
named after the series (`6.1`) that is made last: where it exists, all is there.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# The -cloud flavours are smaller but lack 9p.
METAPACKAGES = {
    "6.1": "linux-image-amd64",
    "6.12": "linux-image-6.12-amd64",
}


class KernelUnavailable(Exception):
    """No such kernel can be had; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package."""

    version: str
    root: Path

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.version}"

    @property
    def modules(self) -> Path:
        return self.root / "lib" / "modules" / self.version

    def closure(self, names: list[str]) -> list[Path]:
        """Return the files of these modules and of all they need, in load order."""
        needs = read_dependencies((self.modules / "modules.dep").read_text())
        by_name = {module_name(file): file for file in needs}
        order: list[str] = []
        for name in names:
            if name in by_name:  # else built in
                file = by_name[name]
                # modules.dep lists what to load first last.
                order += [*reversed(needs[file]), file]
        return [self.modules / file for file in dict.fromkeys(order)]


def read_dependencies(text: str) -> dict[str, list[str]]:
    """Read a `modules.dep`: each module's file, and the files it needs."""
    lines = (line.partition(":") for line in text.splitlines())
    return {file: needs.split() for file, _, needs in lines}


def module_name(file: str) -> str:
    return Path(file).name.partition(".")[0].replace("-", "_")


def read_module(file: Path) -> bytes:
    data = file.read_bytes()
    return lzma.decompress(data) if file.suffix == ".xz" else data


def cache_folder() -> Path:
    """Return where kernels are kept: /var/cache for root, else the user's cache."""
    if "XDG_CACHE_HOME" in os.environ:
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif os.geteuid() == 0:
        base = Path("/var/cache")
    else:
        base = Path.home() / ".cache"
    return base / "podspan" / "kernels"


def get(series: str) -> Kernel:
    """Return the kernel of this series, downloading it unless it is cached."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    link = cache / series
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (link / "boot").exists():
            version = download(METAPACKAGES[series], cache)
            link.unlink(missing_ok=True)
            link.symlink_to(version)
    folder = link.resolve()
    return Kernel(version=folder.name, root=folder)


def download(metapackage: str, cache: Path) -> str:
    """Unpack the newest kernel of a metapackage into the cache, return its version."""
    try:
        image = newest_image(metapackage)
    except KernelUnavailable:
        refresh_lists()
        image = newest_image(metapackage)
    version = image.removeprefix("linux-image-")
    print(f"vm: downloading {image} to {cache} (once, about 100 MB)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpacking-") as work:
        if not fetched(image, work):
            refresh_lists()
            if not fetched(image, work):
                raise KernelUnavailable(
                    f"apt-get cannot download {image}",
                    "see what `apt-get download` says; try `apt-get update` first",
                )
        (package,) = Path(work).glob("*.deb")
        root = Path(work) / "root"
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
        # Debian's package leaves modules.dep to its postinst. depmod wants
        # System.map only to warn about missing symbols.
        subprocess.run(["/sbin/depmod", "--basedir", root, version], check=True, env={})
        target = cache / version
        if target.exists():
            shutil.rmtree(target)
        root.rename(target)
    return version


def newest_image(metapackage: str) -> str:
    """Return the package that a kernel metapackage depends on."""
    shown = subprocess.run(
        ["apt-cache", "depends", "--important", metapackage],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    ).stdout
    found = re.search(r"Depends: (linux-image-\d\S*)", shown)
    if not found:
        raise KernelUnavailable(
            f"apt knows no package {metapackage}",
            "run `apt-get update`; the kernels are those of Debian 12 (bookworm)",
        )
    return found[1]


def refresh_lists() -> None:
    """Run `apt-get update` where we may: lists may be absent, or outdated."""
    if os.geteuid() == 0:
        subprocess.run(["apt-get", "-qq", "update"], stdout=sys.stderr, check=False)


def fetched(image: str, folder: str) -> bool:
    # apt's sandbox user cannot write into our folder, and says so at length.
    options = ["-qq", "-o", "APT::Sandbox::User=root"]
    done = subprocess.run(
        ["apt-get", *options, "download", image],
        cwd=folder,
        stdout=sys.stderr,
        check=False,
    )
    return done.returncode == 0
