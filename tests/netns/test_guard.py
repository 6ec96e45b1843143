"""The guard's pins, who takes them over and when; and its table of policies."""

import os
import struct
import subprocess
import sys
import time

import pytest
from podspan.agent.errors import FeatureMissing, KernelError
from podspan.agent.kernel import guard as guard_module
from podspan.agent.kernel import syscall
from podspan.agent.kernel.guard import (
    GRACE_NS,
    ONLY,
    POLICIES,
    PROGRAM,
    STATES,
    Guard,
    Want,
)

MAPS = (STATES, POLICIES)
POD, OTHER_POD = 4026532001, 4026532002

ALL_OUTBOUND = Want(inbound=False, port=None)
PORT_80_IN = Want(inbound=True, port=80)
PORT_443_OUT = Want(inbound=False, port=443)


@pytest.fixture
def guard(pin_dir):
    guard = Guard.open(pin_dir)
    yield guard
    guard.close()


def test_pins_outlive_the_agent_and_the_next_one_takes_them_over(pin_dir):
    first = Guard.open(pin_dir)
    before = pinned(pin_dir)
    first.close()

    second = Guard.open(pin_dir)

    assert pinned(pin_dir) == before
    second.close()


@pytest.mark.parametrize("name", MAPS)
def test_a_program_of_another_version_is_replaced_with_its_maps(pin_dir, name):
    old = Guard.open(pin_dir)
    _, old_maps = pinned(pin_dir)
    # Not our program any more: one of the maps is none that it uses.
    (pin_dir / name).unlink()
    other = Guard.open(pin_dir.parent / "spare")
    other.unpin()
    syscall.obj_pin(other._maps[name], pin_dir / name)

    new = Guard.open(pin_dir)

    _, maps = pinned(pin_dir)
    assert not set(maps) & set(old_maps)
    assert not list(pin_dir.glob(f"*{guard_module.NEW_SUFFIX}"))
    for guard in (old, other, new):
        guard.close()


@pytest.mark.parametrize("name", MAPS)
def test_a_replacement_that_was_cut_short_is_finished(pin_dir, name):
    Guard.open(pin_dir).close()
    (pin_dir / name).rename(pin_dir / (name + guard_module.NEW_SUFFIX))

    Guard.open(pin_dir).close()

    names = sorted(path.name for path in pin_dir.iterdir())
    assert names == sorted([PROGRAM, *MAPS])


def test_a_new_agent_redirects_nothing_until_it_wants_to(pin_dir):
    first = Guard.open(pin_dir)
    first.want(POD, [ALL_OUTBOUND, PORT_80_IN])
    first.beat(time.monotonic_ns())

    second = Guard.open(pin_dir)

    state = syscall.map_lookup(second._maps[STATES], ONLY, 16)
    assert state == bytes(8) + GRACE_NS.to_bytes(8, "little")
    assert policies(second) == set()
    first.close()
    second.close()


def test_an_agent_that_ends_says_that_nobody_is_there(guard):
    guard.want(POD, [ALL_OUTBOUND])
    guard.beat(1)
    states = os.dup(guard._maps[STATES])

    guard.close()

    state = syscall.map_lookup(states, ONLY, 16)
    os.close(states)
    assert state is not None
    assert state[:8] == bytes(8)


def test_what_is_wanted_takes_the_place_of_what_was(guard):
    guard.want(OTHER_POD, [ALL_OUTBOUND])
    guard.want(POD, [ALL_OUTBOUND, PORT_80_IN])
    assert policies(guard) == {(OTHER_POD, 0, 0, 6), (POD, 0, 0, 6), (POD, 80, 1, 6)}

    guard.want(POD, [PORT_80_IN, PORT_443_OUT, PORT_443_OUT])

    assert policies(guard) == {(OTHER_POD, 0, 0, 6), (POD, 80, 1, 6), (POD, 443, 0, 6)}


def test_a_pod_that_is_forgotten_leaves_nothing_for_its_inodes_next_owner(guard):
    guard.want(POD, [ALL_OUTBOUND, PORT_80_IN])
    guard.want(OTHER_POD, [PORT_443_OUT])

    guard.forget(POD)
    guard.forget(POD)

    assert policies(guard) == {(OTHER_POD, 443, 0, 6)}
    guard.want(POD, [PORT_443_OUT])
    assert policies(guard) == {(OTHER_POD, 443, 0, 6), (POD, 443, 0, 6)}


def test_never_is_something_redirected_that_is_not_wanted(guard, monkeypatch):
    old = {ALL_OUTBOUND, *(Want(True, port) for port in range(80, 88))}
    new = {PORT_443_OUT, *(Want(True, port) for port in range(85, 93))}
    guard.want(POD, old)
    before = policies(guard)
    moments = []
    for name in ("map_update", "map_delete"):
        call = getattr(syscall, name)

        def spy(*arguments, call=call):
            result = call(*arguments)
            moments.append(policies(guard))
            return result

        monkeypatch.setattr(syscall, name, spy)

    guard.want(POD, new)

    after = policies(guard)
    assert len(after) == len(new)
    assert len(moments) == len(old ^ new)
    assert all(moment <= before or moment <= after for moment in moments)


def test_a_full_table_is_an_error_and_leaves_the_pod_alone(pin_dir, monkeypatch):
    monkeypatch.setattr(guard_module, "MAX_POLICIES", 4)
    guard = Guard.open(pin_dir)
    guard.want(OTHER_POD, [ALL_OUTBOUND, PORT_443_OUT])
    guard.want(POD, [PORT_80_IN])

    with pytest.raises(KernelError, match="all 4 policies") as caught:
        guard.want(POD, [PORT_80_IN, *(Want(False, port) for port in range(80, 90))])

    assert str(POD) in str(caught.value)
    assert "fewer pods" in caught.value.hint
    assert policies(guard) == {(OTHER_POD, 0, 0, 6), (OTHER_POD, 443, 0, 6)}
    guard.want(POD, [PORT_80_IN, ALL_OUTBOUND])
    guard.close()


def test_a_table_of_another_size_is_replaced(pin_dir, monkeypatch):
    Guard.open(pin_dir).close()
    monkeypatch.setattr(guard_module, "MAX_POLICIES", 4)

    guard = Guard.open(pin_dir)

    assert syscall.map_info(guard._maps[POLICIES]).max_entries == 4
    guard.close()


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_is_not_every_port(port):
    with pytest.raises(ValueError, match="no port"):
        Want(inbound=True, port=port)


def test_without_the_privilege_to_read_kernel_memory_it_says_what_is_missing(pin_dir):
    script = """
import sys
from pathlib import Path
from podspan.agent.errors import ProgramRejected
from podspan.agent.kernel.guard import Guard

try:
    Guard.open(Path(sys.argv[1]))
except ProgramRejected as exc:
    print(exc.hint)
"""
    done = subprocess.run(
        [
            *("setpriv", "--bounding-set=-perfmon,-sys_admin"),
            *(sys.executable, "-c", script, pin_dir),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "CAP_PERFMON" in done.stdout
    assert list(pin_dir.iterdir()) == []


def test_unpin_leaves_nothing(pin_dir):
    guard = Guard.open(pin_dir)

    guard.unpin()
    guard.unpin()

    assert not pin_dir.exists()
    guard.close()
    guard.close()


def test_no_bpf_file_system_is_said_with_the_command_that_mounts_it(tmp_path):
    with pytest.raises(FeatureMissing) as caught:
        Guard.open(tmp_path / "podspan")

    assert caught.value.hint == f"mount -t bpf bpf {tmp_path}"


def pinned(pin_dir):
    """Return the identity of the pinned program, and of the maps it uses."""
    fd = syscall.obj_get(pin_dir / PROGRAM)
    try:
        info = syscall.prog_info(fd)
    finally:
        os.close(fd)
    return info.id, info.map_ids


def policies(guard):
    """Return what the table holds: namespace, port, inbound, protocol."""
    return {
        struct.unpack("=IHBB", key)
        for key, _ in syscall.map_items(guard._maps[POLICIES])
    }
