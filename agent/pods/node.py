"""Which pod a network namespace of this node is: the API's word, and the kernel's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import MappingProxyType

from podspan.agent.pods.claims import PodProcesses, match
from podspan.agent.pods.kubernetes import Cluster, PodWatch
from podspan.agent.pods.pod import Pod

log = logging.getLogger(__name__)

LOOK_S = 1.0


class NodePods:
    """Knows this node's pods by network namespace, until `close`."""

    def __init__(
        self,
        cluster: Cluster,
        processes: PodProcesses | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        log.info("pods: node=%s api=%s", cluster.node, cluster.url)
        self._look_s = look_s
        self._watch = PodWatch(cluster)
        self._processes = processes or PodProcesses()
        self._by_netns: Mapping[int, Pod] = MappingProxyType({})
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="podspan-netns", daemon=True
        )
        self._thread.start()

    def by_netns(self) -> Mapping[int, Pod]:
        """Return the pods by their namespaces' inodes: what was so a moment ago.

        It never changes; the next call may return another one. Takes no time.
        """
        return self._by_netns

    def close(self) -> None:
        """End the threads."""
        self._stop.set()
        self._watch.close()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._look_s):
            pods = {pod.cgroup_uid: pod for pod in self._watch.pods().values()}
            found = match(self._processes.look(), pods)
            if found != self._by_netns:
                self._by_netns = MappingProxyType(found)
                log.debug("pods: known=%d namespaces=%d", len(pods), len(found))
