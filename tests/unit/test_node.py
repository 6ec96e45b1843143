"""Pods by network namespace: what the API and a /proc say together."""

import threading
import time

import pytest
from podspan.agent.pods.claims import PodProcesses
from podspan.agent.pods.node import NodePods
from podspan.agent.pods.pod import SAMPLING
from unit.api_server import PATIENCE_S, ApiServer, pod
from unit.test_claims import WEB, A, Node, inode


@pytest.fixture
def server(tmp_path):
    made = ApiServer(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def node(tmp_path):
    (tmp_path / "proc").mkdir()
    return Node(tmp_path / "proc")


def until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.002)


def test_a_pod_comes_with_its_process_changes_and_goes(server, node):
    pods = NodePods(server.cluster, PodProcesses(node.proc), look_s=0.01)
    try:
        assert pods.by_netns() == {}
        server.put(pod("web", WEB, labels={"app": "reviews"}))
        node.run_in(WEB, 10, A)
        until(lambda: inode(A) in pods.by_netns())
        snapshot = pods.by_netns()
        assert snapshot[inode(A)].service == "reviews.default"
        assert snapshot[inode(A)].sampling is None

        server.put(pod("web", WEB, annotations={SAMPLING: "12.5"}))
        until(lambda: pods.by_netns()[inode(A)].sampling == 12.5)
        assert snapshot[inode(A)].sampling is None

        node.end(10)
        until(lambda: pods.by_netns() == {})
    finally:
        pods.close()
    left = {thread.name for thread in threading.enumerate()}
    assert not left & {"podspan-pods", "podspan-netns"}


def test_a_static_pods_process_is_found_by_the_kubelets_uid(server, node):
    uid = "0123456789abcdef0123456789abcdef"
    server.put(pod("proxy", annotations={"kubernetes.io/config.hash": uid}))
    node.run_in(uid, 10, A)
    pods = NodePods(server.cluster, PodProcesses(node.proc), look_s=0.01)
    try:
        until(lambda: inode(A) in pods.by_netns())
        assert pods.by_netns()[inode(A)].name == "proxy"
    finally:
        pods.close()
