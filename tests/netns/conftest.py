"""Real network namespaces, named by topology, and a bpf file system to pin in.

All of it is made for one test and removed after it, also when the test fails.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from pyroute2 import NetNS, netns

PREFIX = "podspan-test-"
CLONE_NEWNET = 0x40000000  # linux/sched.h
IFA_F_NODAD = 0x02  # linux/if_addr.h: the address works at once

_serial = count(1)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespace:
    """A network namespace; the mounts stay those of the test."""

    name: str
    ipv4: str = "127.0.0.1"
    ipv6: str = "::1"

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def command(self, *argv: str) -> list[str]:
        # `ip netns exec` would mount another /sys, without /sys/fs/bpf.
        return ["nsenter", f"--net={self.path}", *argv]

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*argv),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == 0 or not check, f"{argv}: {done.stderr}"
        return done

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the namespace; sockets made here belong to it for life."""
        with Path("/proc/thread-self/ns/net").open() as home:
            with self.path.open() as there:
                _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@contextmanager
def new_namespaces(addresses: Sequence[tuple[str, str]]) -> Iterator[list[Namespace]]:
    """Make namespaces with loopback up; the caller connects them."""
    with ExitStack() as stack:
        made = []
        for ipv4, ipv6 in addresses:
            name = f"{PREFIX}{os.getpid()}-{next(_serial)}"
            netns.create(name)
            stack.callback(netns.remove, name)
            with NetNS(name) as inside:
                inside.link("set", index=1, state="up")
            made.append(Namespace(name, ipv4, ipv6))
        yield made


@pytest.fixture
def one_ns() -> Iterator[Namespace]:
    """A namespace with nothing but loopback."""
    with new_namespaces([("127.0.0.1", "::1")]) as [namespace]:
        yield namespace


@pytest.fixture
def two_ns_veth() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces joined by a veth pair, as two pods are."""
    addresses = [("10.77.0.1", "fd77::1"), ("10.77.0.2", "fd77::2")]
    with new_namespaces(addresses) as [left, right]:
        with NetNS(left.name) as inside:
            peer = {"ifname": "eth0", "net_ns_fd": right.name}
            inside.link("add", ifname="eth0", kind="veth", peer=peer)
        for namespace in (left, right):
            with NetNS(namespace.name) as inside:
                [link] = inside.link_lookup(ifname="eth0")
                inside.addr("add", index=link, address=namespace.ipv4, prefixlen=24)
                inside.addr(
                    "add",
                    index=link,
                    address=namespace.ipv6,
                    prefixlen=64,
                    flags=IFA_F_NODAD,
                )
                inside.link("set", index=link, state="up")
        yield left, right


@pytest.fixture(scope="session")
def bpffs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bpf file system of the tests' own; machines differ in whether they have one."""
    path = tmp_path_factory.mktemp("bpffs")
    subprocess.run(["mount", "-t", "bpf", "bpf", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def pin_dir(bpffs: Path) -> Iterator[Path]:
    """Where this test's guard may pin; the directory is not there yet."""
    path = bpffs / f"podspan{next(_serial)}"
    yield path
    if path.exists():
        shutil.rmtree(path)


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    """Skip on a laptop; where PODSPAN_TEST_REQUIRE_ROOT is set, fail instead."""
    if os.geteuid() != 0 and "PODSPAN_TEST_REQUIRE_ROOT" not in os.environ:
        pytest.skip("needs root; PODSPAN_TEST_REQUIRE_ROOT=1 runs it all the same")
