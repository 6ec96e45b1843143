"""podspan init on this kernel: both iptables variants, both families, a guard.

In this process, as starting Python is what emulation is slowest at.
"""

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from ipaddress import ip_address

import pytest
from podspan.init import apply, plan, routing, validate
from podspan.init.apply import VARIANTS, Manner
from podspan.init.plan import (
    AGENT_MARK,
    OUTBOUND_PORT,
    Family,
    Redirection,
)
from vm.conftest import DEADLINE_S, Pod, ip

PORT = 8080
SO_MARK = 36
TRANSPARENT = {4: (socket.SOL_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}
KINDS = {4: socket.AF_INET, 6: socket.AF_INET6}

CLIENT = Pod("podspan-init-client", "10.97.0.1", "fd97::1")
SERVER = Pod("podspan-init-server", "10.97.0.2", "fd97::2")

SYS_BPF = {"x86_64": 321, "aarch64": 280}
BPF_PROG_LOAD, BPF_OBJ_PIN = 5, 6
SOCKET_FILTER = 1
# r0 = 1; exit: redirect everything.
YES = struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A pinned program that says yes, without the half minute of compiling one."""
    mount = tmp_path_factory.mktemp("bpf")
    subprocess.run(["mount", "-t", "bpf", "bpf", mount], check=True)
    try:
        program, licence = ctypes.create_string_buffer(YES), ctypes.c_char_p(b"GPL")
        address = ctypes.cast(licence, ctypes.c_void_p).value or 0
        load = struct.pack(
            "<IIQQ", SOCKET_FILTER, 2, ctypes.addressof(program), address
        )
        fd = bpf(BPF_PROG_LOAD, load)
        path = ctypes.create_string_buffer(bytes(mount / "yes"))
        bpf(BPF_OBJ_PIN, struct.pack("<QI", ctypes.addressof(path), fd))
        os.close(fd)
        yield str(mount / "yes")
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    number = SYS_BPF[os.uname().machine]
    result: int = libc.syscall(number, command, buffer, len(attributes))
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result


@pytest.fixture
def versions(request: pytest.FixtureRequest) -> Iterator[tuple[int, ...]]:
    """Make a client's and a server's pod, with addresses of these families."""
    wanted: tuple[int, ...] = request.param
    try:
        for pod in (CLIENT, SERVER):
            ip("netns", "add", pod.name)
            ip("-n", pod.name, "link", "set", "lo", "up")
        peer = ("peer", "name", "eth0", "netns", SERVER.name)
        ip("-n", CLIENT.name, "link", "add", "eth0", "type", "veth", *peer)
        for pod in (CLIENT, SERVER):
            dev = ("dev", "eth0")
            if 4 in wanted:
                ip("-n", pod.name, "address", "add", f"{pod.ipv4}/24", *dev)
            if 6 in wanted:
                ip("-n", pod.name, "address", "add", f"{pod.ipv6}/64", *dev, "nodad")
            ip("-n", pod.name, "link", "set", "eth0", "up")
        yield wanted
    finally:
        for pod in (CLIENT, SERVER):
            with suppress(AssertionError):
                ip("netns", "delete", pod.name)


def address_of(pod: Pod, version: int) -> str:
    return pod.ipv4 if version == 4 else pod.ipv6


def made_in(pod: Pod, version: int) -> socket.socket:
    with pod.inside():
        made = socket.socket(KINDS[version])
    made.settimeout(DEADLINE_S)
    if version == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def listening(pod: Pod, version: int, port: int) -> socket.socket:
    made = made_in(pod, version)
    made.bind(("", port))
    made.listen()
    return made


def is_redirected(version: int) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(listening(CLIENT, version, OUTBOUND_PORT))
        caller = stack.enter_context(made_in(CLIENT, version))
        caller.connect((address_of(SERVER, version), PORT))
        accepted = stack.enter_context(listener.accept()[0])
        assert validate.original_port(accepted, Family(version)) == PORT


def answers_in_a_clients_name(version: int) -> None:
    """The server's pod relays, as its agent would: from the client's address."""
    with ExitStack() as stack:
        server = stack.enter_context(listening(SERVER, version, PORT))
        upstream = stack.enter_context(made_in(SERVER, version))
        upstream.setsockopt(socket.SOL_SOCKET, SO_MARK, AGENT_MARK)
        upstream.setsockopt(*TRANSPARENT[version], 1)
        upstream.bind((address_of(CLIENT, version), 0))
        upstream.connect((address_of(SERVER, version), PORT))
        accepted, peer = server.accept()
        stack.enter_context(accepted)
        assert ip_address(peer[0]) == ip_address(address_of(CLIENT, version))
        accepted.sendall(b"response")
        assert upstream.recv(64) == b"response"


@pytest.mark.parametrize(
    ("variant", "versions"),
    [("nft", (4, 6)), ("legacy", (4, 6)), ("nft", (4,)), ("nft", (6,))],
    indirect=["versions"],
)
def test_apply_redirect_reapply_clean(
    variant: str,
    versions: tuple[int, ...],
    guard: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    wanted = Redirection(guard=guard, gate=False, drop_invalid=True)
    manner = Manner(need_source=True, variant=variant)
    with CLIENT.inside():
        assert apply.apply(wanted, manner) == tuple(Family)
        validate.validate(wanted, tuple(Family), DEADLINE_S)
    for version in versions:
        is_redirected(version)

    # Not for each: under emulation legacy's processes take seconds.
    if variant == "nft" and len(versions) == 2:
        with SERVER.inside():
            apply.apply(wanted, manner)
        for version in versions:
            answers_in_a_clients_name(version)

    with CLIENT.inside():
        caplog.clear()
        apply.apply(wanted, manner)
        assert caplog.text.count("in place of other rules") == 2
        for family in Family:
            assert VARIANTS[variant].holds(family, plan.plan(wanted, family))
        apply.clean()
        for family in Family:
            assert VARIANTS[variant].holds(family, ())
            assert not routing.is_transparent(family)
