"""Follow the pods of this node through the Kubernetes API: LIST, then WATCH.

A thread of its own does it, so that the agent never waits for an API server. Whatever
goes wrong is tried again, later and later, for as long as the agent runs, with the
pods known so far; each trouble is said when it begins, then every WARN_S:

- The server ends a watch, or the connection is cut: watch on from the last version.
- The server refuses for now (401, 403, 429, 5xx): the same again, no sooner than
  its Retry-After says.
- 410, as an answer or in the stream: that version is too old; list again at once.
- Any other answer, an error in the stream, or text that is no event: list again.

Needs the verbs list and watch on pods, and nothing else. The token is read for every
request, the CA for every list: both files change under a running pod.

Source: kubernetes.io, "Kubernetes API Concepts", on watches, bookmarks and 410 Gone.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import urllib3
from podspan.agent import version
from podspan.agent.pods.pod import FIELDS, Pod, pod_of

log = logging.getLogger(__name__)

# Where every pod finds them (kubernetes.io, "Accessing the Kubernetes API from a Pod").
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

PAGE_PODS = 500

# The pods of one page as JSON: a node's some hundred, each 10 KB, and room.
MAX_LIST_BYTES = 32 * 1024 * 1024

# One event. etcd holds objects of 1.5 MB; as JSON they are larger.
MAX_EVENT_BYTES = 8 * 1024 * 1024

READ_BYTES = 65536

CONNECT_TIMEOUT_S = 10.0
LIST_TIMEOUT_S = 60.0

# After so long the server ends a watch, each agent's at another time. A read that
# takes longer still has a server behind it that is gone.
WATCH_S = (240, 360)
WATCH_GRACE_S = 30.0

# A peer that vanished without a word is found out in a minute, however quiet a watch.
KEEPALIVE = [
    *urllib3.connection.HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 300.0
WARN_S = 60.0

# A watch that ends sooner, and said nothing, did not work.
WATCH_WORKED_S = 5.0

CLOSE_S = 2.0

# Refused as we are now, not what we asked for.
FOR_NOW = frozenset({401, 403, 408, 429})

HINTS = {
    401: "is the service account's token mounted, and for this cluster?",
    403: "the service account needs the verbs list and watch on pods, in a ClusterRole",
}

# What the answers are made of beside pods; everything else is dropped while reading,
# above all managedFields and the containers.
_FIELDS = FIELDS | {
    "type",
    "object",
    "items",
    "resourceVersion",
    "continue",
    "code",
    "message",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The API server, who we are to it, and which node is ours."""

    url: str
    node: str
    token_file: Path = SERVICE_ACCOUNT / "token"
    ca_file: Path = SERVICE_ACCOUNT / "ca.crt"


def cluster_of(environ: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that we are a pod of; None outside of one.

    The kubelet sets KUBERNETES_SERVICE_HOST; NODE_NAME is for the manifest to set.
    """
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if not host:
        return None
    node = environ.get("NODE_NAME")
    if not node:
        log.warning(
            "pods have no names and no annotations: NODE_NAME is not set "
            "hint='set it from spec.nodeName in the pod of the agent'"
        )
        return None
    port = environ.get("KUBERNETES_SERVICE_PORT") or "443"
    return Cluster(f"https://{f'[{host}]' if ':' in host else host}:{port}", node)


class PodWatch:
    """Knows the pods of a node, from the first list on, until `close`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        first_backoff_s: float = FIRST_BACKOFF_S,
        max_backoff_s: float = MAX_BACKOFF_S,
        list_timeout_s: float = LIST_TIMEOUT_S,
        page_pods: int = PAGE_PODS,
    ) -> None:
        self._cluster = cluster
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self._list_timeout_s = list_timeout_s
        self._page_pods = page_pods

        # Replaced, never changed: whoever reads it has a consistent one.
        self._pods: Mapping[str, Pod] = {}

        # The thread's own.
        self._http = urllib3.PoolManager()
        self._version = ""  # what `_pods` is the state of; "": list first
        self._list_from = "0"  # "0": whatever the server has in memory
        self._worked = False  # did the last watch?
        self._said = ""
        self._said_s = 0.0

        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._response: urllib3.BaseHTTPResponse | None = None  # guarded by _lock
        self._thread = threading.Thread(
            target=self._run, name="podspan-pods", daemon=True
        )
        self._thread.start()

    def pods(self) -> Mapping[str, Pod]:
        """Return the pods by uid, as of now; empty until the first list."""
        return self._pods

    def close(self) -> None:
        """End the thread, also out of a read that waits."""
        self._stop.set()
        with self._lock:
            if self._response is not None:
                # One that has ended by itself has nothing left to shut.
                with suppress(OSError, RuntimeError, ValueError):
                    self._response.shutdown()
        # One that connects just now ends by itself, when that times out.
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._http.clear()

    def _follow(self) -> None:
        backoff_s = self._first_backoff_s
        gone_before = False
        while not self._stop.is_set():
            retry_after_s = 0.0
            self._worked = False
            try:
                if not self._version:
                    self._list()
                self._watch()
            except _Trouble as trouble:
                if self._stop.is_set():
                    return
                self._report(trouble)
                retry_after_s = trouble.retry_after_s
                if trouble.relist:
                    self._version = ""
                if trouble.gone and not gone_before:
                    gone_before = True
                    continue
            gone_before = False
            if self._worked:
                backoff_s = self._first_backoff_s
            # Jitter, because an API server's return is news to all nodes at once.
            self._stop.wait(max(retry_after_s, backoff_s * random.uniform(0.5, 1.0)))
            backoff_s = min(2 * backoff_s, self._max_backoff_s)

    def _list(self) -> None:
        """Learn all pods, and of which version that is."""
        self._http.clear()
        self._http = urllib3.PoolManager(
            maxsize=1,
            retries=False,
            ca_certs=str(self._cluster.ca_file),
            socket_options=KEEPALIVE,
        )
        pods: dict[str, Pod] = {}
        query = {"limit": str(self._page_pods), "resourceVersion": self._list_from}
        while True:
            page = self._list_page(query)
            metadata = page.get("metadata") if isinstance(page, dict) else None
            items = page.get("items") if isinstance(page, dict) else None
            if not isinstance(metadata, dict) or not isinstance(items, list | None):
                raise _Trouble("the answer to a list is no list of pods", relist=True)
            for item in items or ():
                if (pod := pod_of(item)) is not None:
                    pods[pod.uid] = pod
            more = metadata.get("continue")
            if not more:
                break
            # The token says of which version; naming one again is an error.
            query = {"limit": str(self._page_pods), "continue": str(more)}
        at = metadata.get("resourceVersion")
        if not isinstance(at, str) or not at:
            raise _Trouble("a list of pods without a version", relist=True)
        for pod in pods.values():
            self._complain(pod)
        self._pods, self._version, self._list_from = pods, at, "0"
        log.info("pods: node=%s listed=%d", self._cluster.node, len(pods))

    def _list_page(self, query: dict[str, str]) -> Any:
        deadline_s = time.monotonic() + self._list_timeout_s
        with self._get(query, self._list_timeout_s) as response:
            body = bytearray()
            try:
                while part := response.read1(READ_BYTES):
                    body += part
                    if len(body) > MAX_LIST_BYTES:
                        raise _Trouble(f"a list of over {MAX_LIST_BYTES} bytes")
                    if time.monotonic() > deadline_s:
                        raise _Trouble(f"a list took over {self._list_timeout_s} s")
            except urllib3.exceptions.HTTPError as exc:
                raise _Trouble(str(exc)) from exc
        return _decode(body)

    def _watch(self) -> None:
        """Follow the changes until the server or the network ends it."""
        watch_s = random.randint(*WATCH_S)
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(watch_s),
        }
        started_s = time.monotonic()
        ended = "the server ended the watch at once"
        with self._get(query, watch_s + WATCH_GRACE_S) as response:
            lines = Lines(MAX_EVENT_BYTES)
            try:
                while part := response.read1(READ_BYTES):
                    for line in lines.feed(part):
                        self._take(line)
                        self._report_works()
            except LineTooLong as exc:
                raise _Trouble(f"an event of over {exc} bytes", relist=True) from exc
            except urllib3.exceptions.HTTPError as exc:
                # An event that was cut comes again whole.
                ended = str(exc)
        if time.monotonic() - started_s >= WATCH_WORKED_S:
            self._report_works()
        if not self._worked:
            raise _Trouble(ended)

    def _take(self, line: bytes) -> None:
        """Do what one event says."""
        event = _decode(line)
        kind = event.get("type") if isinstance(event, dict) else None
        what = event.get("object") if isinstance(event, dict) else None
        if not isinstance(what, dict):
            raise _Trouble(f"no event: {line[:80]!r}", relist=True)
        if kind == "ERROR":
            self._refuse(what.get("code"), _text(what.get("message")))
        if kind in ("ADDED", "MODIFIED", "DELETED"):
            pod = pod_of(what)
            if pod is None:
                raise _Trouble(f"an event without a pod: {line[:80]!r}", relist=True)
            pods = {uid: other for uid, other in self._pods.items() if uid != pod.uid}
            if kind != "DELETED":
                self._complain(pod)
                pods[pod.uid] = pod
            self._pods = pods
        # A bookmark, or what later Kubernetes may send, is its version alone.
        metadata = what.get("metadata")
        at = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if isinstance(at, str) and at:
            self._version = at

    def _refuse(
        self,
        code: object,
        message: str,
        *,
        relist: bool = True,
        retry_after_s: float = 0.0,
    ) -> NoReturn:
        """Raise what an error of the API means."""
        if code == 410:
            # What the server has in memory may be as old again: ask etcd.
            self._list_from = ""
        text = " ".join(message.split())[:200]
        raise _Trouble(
            f"HTTP {code} {text}".strip(),
            HINTS.get(code, "") if isinstance(code, int) else "",
            retry_after_s=retry_after_s,
            relist=relist,
            gone=code == 410,
        )

    @contextmanager
    def _get(
        self, query: dict[str, str], read_timeout_s: float
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Yield the answer, its body still to come; it can be closed from outside."""
        # Pods that have ended are kept by the thousand, and have no processes.
        selector = (
            f"spec.nodeName={self._cluster.node},"
            "status.phase!=Succeeded,status.phase!=Failed"
        )
        url = f"{self._cluster.url}/api/v1/pods?" + urlencode(
            {"fieldSelector": selector, **query}
        )
        token = self._token()
        try:
            response = self._http.request(
                "GET",
                url,
                headers={
                    "accept": "application/json",
                    "authorization": f"Bearer {token}",
                    "user-agent": f"podspan/{version()}",
                },
                timeout=urllib3.Timeout(CONNECT_TIMEOUT_S, read_timeout_s),
                redirect=False,
                preload_content=False,
            )
        except urllib3.exceptions.HTTPError as exc:
            raise _Trouble(str(exc)) from exc
        try:
            with self._lock:
                if self._stop.is_set():
                    raise _Trouble("closed")
                self._response = response
            if response.status != 200:
                status = response.status
                self._refuse(
                    status,
                    _message(response),
                    relist=status < 500 and status not in FOR_NOW,
                    retry_after_s=_retry_after_s(response.headers.get("retry-after")),
                )
            yield response
        finally:
            with self._lock:
                self._response = None
            response.close()

    def _token(self) -> str:
        path = self._cluster.token_file
        try:
            token = path.read_text().strip()
        except (OSError, ValueError) as exc:
            raise _Trouble(f"no token: {exc}", HINTS[401]) from exc
        # http.client would quote one with a line break, in an error and so in a log.
        if not token or not token.isascii() or not token.isprintable():
            raise _Trouble(f"no token in {path}", HINTS[401])
        return token

    def _complain(self, pod: Pod) -> None:
        """Warn of a pod's annotations, but not at every change of its status."""
        before = self._pods.get(pod.uid)
        if pod.complaint and (before is None or before.complaint != pod.complaint):
            log.warning("pods: annotation ignored: %s", pod.complaint)

    def _report(self, trouble: _Trouble) -> None:
        if trouble.gone:  # nothing is lost by it
            log.debug("pods: %s", trouble)
            return
        now_s = time.monotonic()
        if str(trouble) == self._said and now_s - self._said_s < WARN_S:
            return
        self._said, self._said_s = str(trouble), now_s
        log.warning(
            "the Kubernetes API does not tell us of pods: url=%s node=%s known=%d "
            "error=%r hint=%r",
            self._cluster.url,
            self._cluster.node,
            len(self._pods),
            str(trouble),
            trouble.hint
            or "is the API server up, and reachable from here? it is tried again; "
            "calls are traced all the same",
        )

    def _report_works(self) -> None:
        self._worked = True
        if self._said:
            self._said = ""
            log.info("the Kubernetes API tells us of pods again")


class LineTooLong(Exception):
    """A line has more bytes than this."""


class Lines:
    """Puts lines together that arrive cut anywhere."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._begun = bytearray()

    def feed(self, part: bytes) -> Iterator[bytes]:
        """Yield the lines that `part` completes, without their ends."""
        *ended, rest = part.split(b"\n")
        for line in ended:
            self._append(line)
            whole, self._begun = self._begun, bytearray()
            yield bytes(whole)
        self._append(rest)

    def _append(self, part: bytes) -> None:
        if len(self._begun) + len(part) > self._max_bytes:
            raise LineTooLong(self._max_bytes)
        self._begun += part


class _Trouble(Exception):
    """Why we know less than we should; `_run` does something about it."""

    def __init__(
        self,
        what: str,
        hint: str = "",
        *,
        retry_after_s: float = 0.0,
        relist: bool = False,
        gone: bool = False,
    ) -> None:
        super().__init__(what)
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.relist = relist
        self.gone = gone


def _decode(text: bytes | bytearray) -> Any:
    """Return what a JSON text says, of all objects in it only the names we read."""
    try:
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: {
                name: value for name, value in pairs if name in _FIELDS
            },
        )
    except (ValueError, RecursionError) as exc:
        raise _Trouble(f"no JSON: {bytes(text[:80])!r}", relist=True) from exc


def _message(response: urllib3.BaseHTTPResponse) -> str:
    """Return what an answer that is an error says: a Status, or any text."""
    try:
        text = response.read(4096)
    except urllib3.exceptions.HTTPError:
        return ""
    try:
        return str(_decode(text)["message"])
    except (_Trouble, KeyError, TypeError):
        return text.decode("utf-8", "replace")


def _retry_after_s(text: str | None) -> float:
    """Return the seconds that a Retry-After asks for; 0 for a date, or nonsense."""
    if text is None or not text.isascii() or not text.isdigit():
        return 0.0
    return min(float(text), MAX_RETRY_AFTER_S)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
