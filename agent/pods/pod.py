"""What the agent keeps of a pod: pure, from the API's JSON.

The service is named as Istio names it by default (tracingServiceName
APP_LABEL_AND_NAMESPACE): the label `app`, else the workload, and the namespace. Before
that counts what the user says to be the service in so many words; in between, the
label that Istio's canonical service goes by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from podspan.agent.engine import ANNOTATION as ENGINE
from podspan.agent.engine import EDGE, ENGINES

SAMPLING = "podspan.io/sampling"

SERVICE_LABELS = (
    "service.istio.io/canonical-name",
    "app",
    "app.kubernetes.io/name",
)

# Istio's canonical service and revision: istio/istio, pkg/model/proxy labels.
CANONICAL_LABELS = (
    "service.istio.io/canonical-name",
    "app.kubernetes.io/name",
    "app",
)
REVISION_LABELS = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)
NO_REVISION = "latest"

RATE_HINT = (
    'write a percentage from 0 to 100, as in "12.5"; '
    "until then the rate of the node counts"
)
ENGINE_HINT = f"write one of {', '.join(ENGINES)}; until then the node's counts"
EDGE_HINT = 'write "true" or "false"; until then it is false'

T = TypeVar("T")

# A static pod's cgroup has the uid that the kubelet made up, which the API knows as
# this annotation of the mirror pod (Kubernetes, pkg/kubelet/types/pod_update.go).
STATIC_UID = "kubernetes.io/config.hash"

# Set by the controller on the pods of one ReplicaSet, whose name ends in the same:
# Deployments, and Argo's Rollouts.
TEMPLATE_HASHES = ("pod-template-hash", "rollouts-pod-template-hash")

# A CronJob's Jobs end in the time they were due: seconds since 1970, later minutes.
_JOB_TIME = re.compile(r"-[0-9]{8,10}\Z")

_PERCENTAGE = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,9})?", re.ASCII)

# Of all that a pod's JSON says, these are the names that `pod_of` looks at.
FIELDS = frozenset(
    {
        "metadata",
        "uid",
        "name",
        "namespace",
        "generateName",
        "labels",
        *SERVICE_LABELS,
        *REVISION_LABELS,
        *TEMPLATE_HASHES,
        "annotations",
        SAMPLING,
        ENGINE,
        EDGE,
        STATIC_UID,
        "ownerReferences",
        "controller",
        "kind",
        "spec",
        "hostNetwork",
        "status",
        "podIPs",
        "ip",
    }
)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of this node."""

    uid: str
    name: str
    namespace: str
    service: str
    sampling: float | None  # percentage of new traces; None: the node's
    engine: str  # one of ENGINES; "": the node's
    edge: bool  # requests that arrive here get headers before they are read
    complaint: str  # what is wrong with its annotations; "": nothing
    cgroup_uid: str  # `uid`, but for static pods
    host_network: bool
    ips: tuple[str, ...]
    canonical_service: str
    canonical_revision: str
    workload: str  # what the user wrote to get it; else the pod itself
    app: str  # its labels `app` and `version`; "": none
    version: str


def pod_of(fields: object) -> Pod | None:
    """Return the pod that the API describes; None if it has no uid or name."""
    metadata = _mapping(_mapping(fields).get("metadata"))
    uid, name = _text(metadata.get("uid")), _text(metadata.get("name"))
    if not uid or not name:
        return None
    namespace = _text(metadata.get("namespace")) or "default"
    labels = _mapping(metadata.get("labels"))
    annotations = _mapping(metadata.get("annotations"))
    workload = _workload(metadata, labels) or name
    said = _Annotations(annotations)
    sampling = said.read(SAMPLING, percentage, RATE_HINT)
    engine = said.read(ENGINE, _engine, ENGINE_HINT)
    edge = said.read(EDGE, _truth, EDGE_HINT)
    addresses = _list(_mapping(_mapping(fields).get("status")).get("podIPs"))
    return Pod(
        uid=uid,
        name=name,
        namespace=namespace,
        service=f"{_first(labels, SERVICE_LABELS) or workload}.{namespace}",
        sampling=sampling,
        engine=engine or "",
        edge=edge or False,
        complaint=f"pod={namespace}/{name} {said.complaint}" if said.complaint else "",
        cgroup_uid=_text(annotations.get(STATIC_UID)) or uid,
        host_network=_mapping(_mapping(fields).get("spec")).get("hostNetwork") is True,
        ips=tuple(
            filter(None, (_text(_mapping(entry).get("ip")) for entry in addresses))
        ),
        canonical_service=_first(labels, CANONICAL_LABELS) or workload,
        canonical_revision=_first(labels, REVISION_LABELS) or NO_REVISION,
        workload=workload,
        app=_text(labels.get("app")),
        version=_text(labels.get("version")),
    )


class _Annotations:
    """Reads annotations of ours; the first that is wrong is complained about."""

    def __init__(self, texts: Mapping[str, object]) -> None:
        self.complaint = ""
        self._texts = texts

    def read(self, key: str, read: Callable[[str], T | None], hint: str) -> T | None:
        """Return the value; None where there is none, or none that makes sense."""
        if key not in self._texts:
            return None
        text = _text(self._texts[key])
        value = read(text)
        if value is None and not self.complaint:
            self.complaint = f"{key}={text[:64]!r} hint={hint!r}"
        return value


def _engine(text: str) -> str | None:
    return text if text in ENGINES else None


def _truth(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text)


def percentage(text: str) -> float | None:
    """Return the number from 0 to 100 that a text is; None if it is none."""
    text = text.strip()
    value = float(text) if _PERCENTAGE.fullmatch(text) else -1.0
    return value if 0 <= value <= 100 else None


def _workload(metadata: Mapping[str, object], labels: Mapping[str, object]) -> str:
    """Return the name of what the user wrote to get this pod; "": the pod itself.

    As Istio (GetDeployMetaFromPod): only a name that was generated tells of a
    controller. A static pod has one as well, but that is the node.
    """
    if not _text(metadata.get("generateName")):
        return ""
    for entry in _list(metadata.get("ownerReferences")):
        owner = _mapping(entry)
        if owner.get("controller") is not True:
            continue
        name, kind = _text(owner.get("name")), _text(owner.get("kind"))
        if kind == "ReplicaSet":
            for label in TEMPLATE_HASHES:
                value = _text(labels.get(label))
                if value and name.endswith(f"-{value}"):
                    return name.removesuffix(f"-{value}")
        if kind == "Job":
            return _JOB_TIME.sub("", name)
        return name
    return ""


def _first(labels: Mapping[str, object], keys: Iterable[str]) -> str:
    """Return the first of these labels that says something; "": none."""
    return next(filter(None, (_text(labels.get(key)) for key in keys)), "")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
