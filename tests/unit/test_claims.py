"""Processes of pods and their namespaces: a folder stands for /proc."""

import os
from pathlib import Path

import pytest
from podspan.agent.pods import claims
from podspan.agent.pods.claims import FULL_LOOK_S, SETTLE_S, PodProcesses, match
from unit.api_server import pod
from unit.test_pod import kept

# Four things with an inode of their own: the node's namespace and three of pods.
NODE, A, B, C = (Path("/proc/self/ns", name) for name in ("net", "uts", "ipc", "mnt"))

WEB = "7fda01c4-0ece-403d-88b4-c371d66d132a"
DB = "5c56dfae-5a1b-4f0f-a5c5-6a1f37dfc5b7"
PODS = {uid: kept(pod(name, uid)) for name, uid in [("web", WEB), ("db", DB)]}


class Node:
    """A /proc, and the time."""

    def __init__(self, proc):
        self.proc = proc
        self.now_s = 100.0
        (proc / "self").mkdir()
        (proc / "sys").mkdir()
        self.run(1, "", NODE)
        self.processes = PodProcesses(proc, lambda: self.now_s)

    def run(self, pid, cgroup, netns, started=0):
        folder = self.proc / str(pid)
        (folder / "ns").mkdir(parents=True)
        (folder / "ns" / "net").symlink_to(netns)
        (folder / "cgroup").write_text(f"0::/{cgroup}\n")
        (folder / "stat").write_text(f"{pid} (a) b) S{' 0' * 18} {started} 0 0\n")

    def run_in(self, uid, pid, netns, started=0):
        self.run(pid, f"kubepods/pod{uid}/id", netns, started)

    def end(self, pid):
        folder = self.proc / str(pid)
        for entry in (folder / "ns" / "net", folder / "cgroup", folder / "stat"):
            entry.unlink()
        (folder / "ns").rmdir()
        folder.rmdir()

    def names(self, pods=PODS):
        claims = self.processes.look()
        return {netns: pod.name for netns, pod in match(claims, pods).items()}


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def inode(namespace):
    return namespace.stat().st_ino


def test_a_process_of_a_pod_tells_the_pods_namespace(node):
    node.run_in(WEB, 10, A)
    node.run_in(WEB, 11, A)
    node.run_in(DB, 12, B)
    node.run(13, "system.slice/sshd.service", C)
    assert node.names() == {inode(A): "web", inode(B): "db"}


def test_the_nodes_own_namespace_is_no_pods(node):
    node.run_in(WEB, 10, NODE)  # CRI-O's conmon
    assert node.names() == {}


def test_a_pod_on_the_nodes_network_has_no_namespace(node):
    node.run_in(WEB, 10, A)  # it has entered that one
    agent = kept(pod("agent", WEB, hostNetwork=True))
    assert node.names({WEB: agent}) == {}


def test_a_namespace_that_others_enter_stays_its_first_ones(node):
    node.run_in(DB, 10, A, started=500)
    node.run_in(WEB, 20, A, started=400)
    assert node.names() == {inode(A): "web"}


def test_a_pod_may_have_several_namespaces_and_a_pod_inside(node):
    node.run_in(WEB, 10, A)
    node.run(11, f"kubepods/pod{WEB}/id/kubepods/pod{DB}/id", B)
    assert node.names() == {inode(A): "web", inode(B): "db"}
    # To the outer cluster it is all the outer pod.
    assert node.names({WEB: PODS[WEB]}) == {inode(A): "web", inode(B): "web"}


def test_a_pod_that_the_api_tells_of_later_is_found_without_a_new_process(node):
    node.run_in(WEB, 10, A)
    assert node.names({}) == {}
    node.now_s += 2 * SETTLE_S
    assert node.names() == {inode(A): "web"}


def test_a_pod_that_ends_is_forgotten(node):
    node.run_in(WEB, 10, A)
    assert node.names()
    node.end(10)
    assert node.names() == {}


def test_a_container_that_is_still_being_made_is_found_when_it_is(node):
    node.run(10, "system.slice/containerd.service", NODE)
    assert node.names() == {}
    node.end(10)
    node.run_in(WEB, 10, NODE)  # the same process: its cgroup first,
    assert node.names() == {}
    node.end(10)
    node.run_in(WEB, 10, A)  # then its namespace
    node.now_s += SETTLE_S / 2
    assert node.names() == {inode(A): "web"}


def test_settled_processes_are_read_again_with_the_next_full_look_only(node):
    node.run_in(WEB, 10, A)
    node.names()
    node.now_s += SETTLE_S
    node.end(10)
    node.run_in(DB, 10, B)  # within a second, with the same pid
    node.run_in(DB, 11, C)
    assert node.names() == {inode(A): "web", inode(C): "db"}
    node.now_s += FULL_LOOK_S
    assert node.names() == {inode(B): "db", inode(C): "db"}


@pytest.mark.parametrize("gone", ["cgroup", "stat", "ns/net"])
def test_a_process_that_ends_while_it_is_read_is_none(node, gone):
    node.run_in(WEB, 10, A)
    (node.proc / "10" / gone).unlink()
    assert node.names() == {}


@pytest.mark.parametrize("stat", [b"", b"10 (x", b"10 (x) S 1", b"\xff) " + b"x " * 30])
def test_a_stat_that_cannot_be_read_is_no_claim(node, stat):
    node.run_in(WEB, 10, A)
    (node.proc / "10" / "stat").write_bytes(stat)
    assert node.names() == {}


def test_the_real_proc_has_us_outside_of_any_pod():
    found = PodProcesses().look()
    assert all(claim.uids and claim.netns for claim in found)
    own = claims._claim(Path("/proc", str(os.getpid())))
    assert own is None or own.netns == inode(NODE)
