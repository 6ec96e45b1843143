"""A pod's uid from /proc/PID/cgroup, in the shapes that nodes really have."""

import re
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.pods.cgroup import pod_uids

UID = "7fda01c4-0ece-403d-88b4-c371d66d132a"
INNER = "5c56dfae-5a1b-4f0f-a5c5-6a1f37dfc5b7"
ID = "e58a24d4a722c99712cff74ef69d93311089584eb32617b3890e0dcb996133f1"

SHAPES = {
    "k3s with the systemd driver (cryptnono/cryptnono#47)": (
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod7fda01c4_"
        "0ece_403d_88b4_c371d66d132a.slice/cri-containerd-e58a24d4a722c99712cff74ef69d9"
        "3311089584eb32617b3890e0dcb996133f1.scope\n",
        (UID,),
    ),
    "kind: a kubelet with a --cgroup-root (containerd/nri#227)": (
        "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/"
        "kubelet-kubepods-besteffort-pod1e597579_417e_482f_bf65_5fe170c3aebd.slice/"
        f"cri-containerd-{ID}.scope\n",
        ("1e597579-417e-482f-bf65-5fe170c3aebd",),
    ),
    "CRI-O on cgroup v1 (opencontainers/runc#4620)": (
        "13:freezer:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda5c1"
        f"f8d5_1919_434d_add7_4afaafdaef89.slice/crio-{ID}.scope\n"
        "11:files:/\n"
        "10:hugetlb:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda5c1"
        f"f8d5_1919_434d_add7_4afaafdaef89.slice/crio-{ID}.scope\n",
        ("a5c1f8d5-1919-434d-add7-4afaafdaef89",),
    ),
    "cgroupfs driver, v1 (Qard/container-info, its tests)": (
        "11:devices:/kubepods/besteffort/pod74c13223-5a00-11e9-b385-42010a80018d/"
        "34dc0b5e626f2c5c4c5170e34b10e7654ce36f0fcd532739f4445baabea03376\n"
        "10:perf_event:/\n",
        ("74c13223-5a00-11e9-b385-42010a80018d",),
    ),
    "cgroupfs driver, in a Docker that names it too (minikube#11280)": (
        "0::/docker/d6701ec289c56e4391acb11d07474b3139466857a305490575508a8b7a9fcf22/"
        f"kubepods/burstable/pod{UID}/{ID}\n",
        (UID,),
    ),
    "guaranteed QoS: no class in the path": (
        f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/docker-{ID}"
        ".scope\n",
        (UID,),
    ),
    "hybrid: only one hierarchy names it (this project's k8s node)": (
        f"9:name=systemd:/\n8:pids:/kubepods/pod{UID}/{ID}\n0::/\n",
        (UID,),
    ),
    "runc not told of the kubelet's systemd driver": (
        "0::/system.slice/containerd.service/kubepods-burstable-pod"
        f"{UID.replace('-', '_')}.slice:cri-containerd:{ID}\n",
        (UID,),
    ),
    "a sibling, seen from a cgroup namespace, systemd driver": (
        f"0::/../../kubepods-burstable-pod{UID.replace('-', '_')}.slice/"
        f"cri-containerd-{ID}.scope\n",
        (UID,),
    ),
    "a sibling, seen from a cgroup namespace, cgroupfs driver": (
        f"0::/../../pod{UID}/{ID}\n",
        (UID,),
    ),
    "the pod's own cgroup, no container": (f"0::/kubepods/pod{UID}", (UID,)),
    "a static pod: MD5 in hex": (
        f"0::/kubepods/burstable/pod0123456789abcdef0123456789abcdef/{ID}\n",
        ("01234567-89ab-cdef-0123-456789abcdef".replace("-", ""),),
    ),
    "a node in a pod": (
        f"0::/kubepods/pod{UID}/{ID}/kubelet/kubepods/besteffort/pod{INNER}/{ID}\n",
        (UID, INNER),
    ),
    "a service of the node": ("0::/system.slice/containerd.service\n", ()),
    "the root": ("0::/\n", ()),
    "a Podman pod": (
        f"0::/machine.slice/machine-libpod_pod_{ID}.slice/libpod-{ID}.scope\n",
        (),
    ),
    "kubepods itself": ("0::/kubepods.slice/kubepods-besteffort.slice\n", ()),
    "something that only begins like one": (f"0::/user.slice/pod{UID}x\n", ()),
    "gone": ("", ()),
}


@pytest.mark.parametrize(("text", "uids"), SHAPES.values(), ids=SHAPES)
def test_the_pod_of_a_cgroup(text, uids):
    assert pod_uids(text) == uids


@given(
    st.uuids(),
    st.sampled_from(["", "-besteffort", "-burstable"]),
    st.text(st.characters(exclude_characters="/\n")),
)
def test_any_uid_is_found_with_either_driver(uid: UUID, qos, container):
    name = f"kubepods{qos}-pod{str(uid).replace('-', '_')}.slice"
    assert pod_uids(f"0::/kubepods.slice/{name}/{container}") == (str(uid),)
    assert pod_uids(f"3:cpu:/kubepods/pod{uid}/x/{container}\n") == (str(uid),)


@given(
    st.text()
    | st.text("/podkube-_:.slice0123456789abcdef\n")
    | st.from_regex(r"/kubepods.*pod[0-9a-f_-]{30,40}.*")
)
def test_a_hostile_text_gives_uids_or_nothing(text):
    for uid in pod_uids(text):
        assert re.fullmatch(
            r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uid
        )
