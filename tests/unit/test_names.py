"""Names of network namespaces: links to our own stand for `ip netns add`."""

from pathlib import Path

import pytest
from podspan.agent.pods.names import REFRESH_S, ServiceNames
from unit.api_server import pod
from unit.test_pod import kept

OWN_NETNS = Path("/proc/self/ns/net")
OTHER_NSFS = Path("/proc/self/ns/uts")


class Time:
    """A clock that stands still."""

    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def own():
    return OWN_NETNS.stat().st_ino


@pytest.fixture
def other():
    return OTHER_NSFS.stat().st_ino


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "netns"


def add(directory, name, netns=OWN_NETNS):
    directory.mkdir(exist_ok=True)
    (directory / name).symlink_to(netns)


def test_a_named_namespace_has_that_name(directory, own):
    add(directory, "reviews")
    assert ServiceNames(directory).name(own, "python3") == "reviews"


def test_an_unnamed_one_goes_by_its_program(directory, own):
    assert ServiceNames(directory).name(own, "python3") == "python3"


def test_a_name_that_comes_later_is_found_after_a_while(directory, own):
    clock = Time()
    names = ServiceNames(directory, clock)
    assert names.name(own, "python3") == "python3"
    add(directory, "reviews")
    assert names.name(own, "python3") == "python3"  # not read again at every span
    clock.now_s += REFRESH_S
    assert names.name(own, "python3") == "reviews"


def test_a_name_that_is_gone_is_forgotten_with_the_next_look(directory, own):
    add(directory, "reviews")
    names = ServiceNames(directory)
    assert names.select(["*"]) == {own}
    (directory / "reviews").unlink()
    assert names.select(["*"]) == frozenset()
    assert names.name(own, "python3") == "python3"


def test_of_two_names_the_first_in_order_counts(directory, own):
    add(directory, "b")
    add(directory, "a")
    assert ServiceNames(directory).name(own, "") == "a"


def test_selection_by_patterns(directory, own, other):
    add(directory, "cni-1")
    add(directory, "db", OTHER_NSFS)
    names = ServiceNames(directory)
    assert names.select(["cni-*"]) == {own}
    assert names.select(["cni-*", "d?"]) == {own, other}
    assert names.select(["CNI-*", "x"]) == frozenset()


def test_a_pods_namespace_has_the_pods_service_while_it_is_known(directory, own, other):
    add(directory, "cni-1")
    add(directory, "cni-2", OTHER_NSFS)
    pods = {own: kept(pod("web", namespace="shop", labels={"app": "reviews"}))}
    names = ServiceNames(directory, pods_by_netns=lambda: pods)
    assert names.name(own, "python3") == "reviews.shop"
    assert names.name(other, "python3") == "cni-2"
    pods = {}
    assert names.name(own, "python3") == "cni-1"
    assert names.select(["cni-1"]) == {own}


def test_a_file_that_is_no_namespace_is_none(directory):
    directory.mkdir()
    left_behind = directory / "reviews"
    left_behind.touch()
    (directory / "dangling").symlink_to("nowhere")
    names = ServiceNames(directory)
    assert names.select(["*"]) == frozenset()
    assert names.name(left_behind.stat().st_ino, "python3") == "python3"
