"""The guard's pins: who takes them over, and when."""

import os
import time

import pytest
from podspan.agent.errors import FeatureMissing
from podspan.agent.kernel import guard as guard_module
from podspan.agent.kernel import syscall
from podspan.agent.kernel.guard import ONLY, PROGRAM, STATES, Guard


def test_pins_outlive_the_agent_and_the_next_one_takes_them_over(pin_dir):
    first = Guard.open(pin_dir)
    before = pinned(pin_dir)
    first.close()

    second = Guard.open(pin_dir)

    assert pinned(pin_dir) == before
    second.close()


def test_a_program_of_another_version_is_replaced_with_its_map(pin_dir):
    old = Guard.open(pin_dir)
    _, old_maps = pinned(pin_dir)
    # Not our program any more: the map is one that it does not use.
    (pin_dir / STATES).unlink()
    other_map = Guard.open(pin_dir.parent / "spare")
    other_map.unpin()
    syscall.obj_pin(other_map._map_fd, pin_dir / STATES)

    new = Guard.open(pin_dir)

    _, maps = pinned(pin_dir)
    assert maps != old_maps
    assert not list(pin_dir.glob(f"*{guard_module.NEW_SUFFIX}"))
    for guard in (old, other_map, new):
        guard.close()


def test_a_replacement_that_was_cut_short_is_finished(pin_dir):
    Guard.open(pin_dir).close()
    (pin_dir / STATES).rename(pin_dir / (STATES + guard_module.NEW_SUFFIX))

    Guard.open(pin_dir).close()

    assert sorted(path.name for path in pin_dir.iterdir()) == [PROGRAM, STATES]


def test_a_new_agent_redirects_nothing_until_it_wants_to(pin_dir):
    first = Guard.open(pin_dir)
    first.want(True)
    first.beat(time.monotonic_ns())

    second = Guard.open(pin_dir)

    state = syscall.map_lookup(second._map_fd, ONLY, 24)
    assert state is not None
    assert state[:8] + state[16:] == bytes(16)  # all but the grace
    first.close()
    second.close()


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
