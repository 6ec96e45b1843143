"""What is kept of a pod."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.pods.pod import FIELDS, SAMPLING, Pod, percentage, pod_of
from unit.api_server import pod

CANONICAL = "service.istio.io/canonical-name"
APP = "app"
RECOMMENDED = "app.kubernetes.io/name"


def kept(what) -> Pod:
    found = pod_of(what)
    assert found is not None
    return found


def owned(kind, name, *, pod_name="pod-x", labels=None, controller=True):
    what = pod(pod_name, namespace="shop", labels=labels)
    what["metadata"]["generateName"] = f"{name}-"
    what["metadata"]["ownerReferences"] = [
        {"kind": "Other", "name": "other", "controller": False},
        {"kind": kind, "name": name, "controller": controller},
    ]
    return what


def service(what):
    return kept(what).service


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({APP: "reviews"}, "reviews.shop"),
        ({RECOMMENDED: "reviews"}, "reviews.shop"),
        ({CANONICAL: "reviews", APP: "x", RECOMMENDED: "y"}, "reviews.shop"),
        # Istio's default, APP_LABEL_AND_NAMESPACE, knows no other label.
        ({RECOMMENDED: "x", APP: "reviews"}, "reviews.shop"),
        ({APP: "", RECOMMENDED: "reviews"}, "reviews.shop"),
        ({"k8s-app": "x"}, "web.shop"),
    ],
)
def test_a_label_names_the_service_before_the_workload(labels, name):
    assert service(owned("DaemonSet", "web", labels=labels)) == name


@pytest.mark.parametrize(
    ("labels", "name", "revision"),
    [
        ({}, "web", "latest"),
        ({APP: "reviews", "version": "v2"}, "reviews", "v2"),
        # Other than the service above: Istio's canonical service asks `app` last.
        ({RECOMMENDED: "reviews", APP: "x"}, "reviews", "latest"),
        ({CANONICAL: "reviews", RECOMMENDED: "x", APP: "y"}, "reviews", "latest"),
        ({"app.kubernetes.io/version": "v3", "version": "x"}, "web", "v3"),
        (
            {
                "service.istio.io/canonical-revision": "v4",
                "app.kubernetes.io/version": "x",
            },
            "web",
            "v4",
        ),
    ],
)
def test_istios_canonical_service_and_revision(labels, name, revision):
    found = kept(owned("DaemonSet", "web", labels=labels))
    assert (found.canonical_service, found.canonical_revision) == (name, revision)


# Istio's GetDeployMetaFromPod.
@pytest.mark.parametrize(
    ("kind", "owner", "labels", "name"),
    [
        ("ReplicaSet", "web-7c5ddbdf54", {"pod-template-hash": "7c5ddbdf54"}, "web"),
        ("ReplicaSet", "web-abc", {"rollouts-pod-template-hash": "abc"}, "web"),
        ("ReplicaSet", "web-abc", {}, "web-abc"),  # one without a Deployment
        ("ReplicaSet", "web-abc", {"pod-template-hash": "bc"}, "web-abc"),
        ("StatefulSet", "db", {"pod-template-hash": "db"}, "db"),
        ("DaemonSet", "node-exporter", {}, "node-exporter"),
        ("Job", "migrate", {}, "migrate"),
        ("Job", "backup-27912345", {}, "backup"),  # a CronJob's, minutes
        ("Job", "backup-1674740700", {}, "backup"),  # and seconds, before 1.21
        ("Job", "backup-2023", {}, "backup-2023"),
        ("ReplicationController", "old", {}, "old"),
    ],
)
def test_the_workload_names_the_service_where_no_label_does(kind, owner, labels, name):
    assert service(owned(kind, owner, labels=labels)) == f"{name}.shop"


def test_a_pod_of_nobody_is_its_own_service():
    assert service(pod("debug", namespace="shop")) == "debug.shop"
    assert service(owned("DaemonSet", "web", controller=False)) == "pod-x.shop"


def test_a_static_pod_is_not_the_nodes_service():
    what = owned("Node", "node1", pod_name="proxy-node1")
    del what["metadata"]["generateName"]
    assert service(what) == "proxy-node1.shop"


def test_a_static_pods_cgroup_has_the_kubelets_uid():
    static = pod("proxy-node1", annotations={"kubernetes.io/config.hash": "abc"})
    assert (kept(static).uid, kept(static).cgroup_uid) == (
        "uid-of-proxy-node1",
        "abc",
    )
    assert kept(pod("web")).cgroup_uid == "uid-of-web"


def test_the_network_of_a_pod():
    web = kept(pod("web"))
    assert (web.ips, web.host_network) == (("10.0.0.7",), False)
    assert kept(pod("agent", hostNetwork=True)).host_network


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12.5", 12.5),
        ("0", 0.0),
        ("100", 100.0),
        ("100.0", 100.0),
        ("0.01", 0.01),
        ("007", 7.0),
        ("12.5\n", 12.5),  # YAML's block style leaves a line break
    ],
)
def test_a_percentage(text, value):
    assert percentage(text) == value
    annotated = kept(pod("web", annotations={SAMPLING: text}))
    assert (annotated.sampling, annotated.complaint) == (value, "")


@pytest.mark.parametrize(
    "text",
    [
        *("", "12.5%", "-1", "+1", "100.1", "101", "1e1", "nan", "inf", "0x10", "1_0"),
        *("12,5", ".5", "5.", "all", "true", "1 2", "\u0661", "9" * 400),
    ],
)
def test_what_is_no_percentage_is_a_complaint_that_says_all(text):
    annotated = kept(pod("web", namespace="shop", annotations={SAMPLING: text}))
    assert annotated.sampling is None
    assert "pod=shop/web" in annotated.complaint
    assert f"podspan.io/sampling={text[:64]!r}" in annotated.complaint
    assert 'write a percentage from 0 to 100, as in "12.5"' in annotated.complaint
    assert len(annotated.complaint) < 300


def test_without_the_annotation_the_rate_is_the_nodes():
    plain = kept(pod("web", annotations={"podspan.io/samplin": "12"}))
    assert (plain.sampling, plain.complaint) == (None, "")


@given(st.text())
def test_any_text_is_a_percentage_or_none(text):
    value = percentage(text)
    assert value is None or 0 <= value <= 100


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted(FIELDS)),
            inner,
        )
    ),
    max_leaves=30,
)


@given(json_values, json_values)
def test_whatever_the_json_it_is_a_pod_or_none(anything, metadata):
    pod_of(anything)
    if isinstance(metadata, dict):
        named = kept({"metadata": {**metadata, "uid": "u", "name": "n"}})
        assert named.service


@pytest.mark.parametrize(
    ("annotations", "engine", "edge", "complaint"),
    [
        ({}, "", False, ""),
        ({"podspan.io/engine": "redirect"}, "redirect", False, ""),
        ({"podspan.io/edge": "true"}, "", True, ""),
        ({"podspan.io/edge": "false"}, "", False, ""),
        ({"podspan.io/engine": "envoy"}, "", False, "write one of auto, kernel"),
        ({"podspan.io/edge": "yes"}, "", False, 'write "true" or "false"'),
    ],
)
def test_engine_and_edge_are_asked_for_by_annotations(
    annotations, engine, edge, complaint
):
    pod = pod_of({"metadata": {"uid": "u", "name": "n", "annotations": annotations}})
    assert pod is not None
    assert (pod.engine, pod.edge) == (engine, edge)
    assert complaint in pod.complaint
    assert bool(complaint) == bool(pod.complaint)
