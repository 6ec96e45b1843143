"""Find a pod's uid in a /proc/PID/cgroup (cgroups(7)).

The kubelet names a pod's cgroup `pod<UID>`; with the systemd driver `-` in the uid
becomes `_`, and the name is a slice that repeats its parents' names (Kubernetes,
pkg/kubelet/cm: pod_container_manager_linux.go, cgroup_manager_linux.go). What is above
it differs: the kubelet's --cgroup-root, the runtime, and, read from within a cgroup
namespace, `..` in place of all that both paths share.
"""

from __future__ import annotations

import re

# A UUID; a static pod's is an MD5 sum in hex (pkg/kubelet/config/common.go).
_UID = r"[0-9a-f]{8}(?P<dash>[-_]?)(?:[0-9a-f]{4}(?P=dash)){3}[0-9a-f]{12}"

# `:` ends it when runc is not told of the systemd driver that the kubelet uses: the
# slice is then the beginning of one directory's name, SLICE:cri-containerd:ID.
_POD = re.compile(rf"[/-]pod(?P<uid>{_UID})(?:\.slice)?(?=[/:]|\Z)")


def pod_uids(cgroup: str) -> tuple[str, ...]:
    """Return the uids of the pods that the process is in, as the API writes them.

    None for a process of the node itself; several, the outermost first, where a pod
    runs a container runtime of its own. Of the hierarchies of cgroup v1 the first
    that names a pod counts.
    """
    for line in cgroup.split("\n"):
        uids = [match["uid"].replace("_", "-") for match in _POD.finditer(line)]
        if uids:
            return tuple(uids)
    return ()
