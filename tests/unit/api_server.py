"""A Kubernetes API server for tests: LIST and WATCH of pods over HTTPS.

It speaks as the real one does (chunked watch streams, bookmarks, continue tokens,
Status objects), holds the pods it is told of, and misbehaves when told to: each fault
answers one request.
"""

import json
import ssl
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from podspan.agent.pods.kubernetes import Cluster

PATIENCE_S = 20.0
NODE = "node1"
TOKEN = "a.service.account"  # noqa: S105 (it opens nothing)


def certificate(folder):
    """Make a key and a certificate for 127.0.0.1 that is its own CA."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    if not cert.exists():
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
                *("-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=kubernetes"),
                *("-addext", "subjectAltName=IP:127.0.0.1"),
                *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),
                *("-keyout", str(key), "-out", str(cert)),
            ],
            check=True,
            capture_output=True,
        )
    return key, cert


def write_token(path, token):
    """Replace it as the kubelet does: at once."""
    draft = path.with_suffix(".draft")
    draft.write_text(f"{token}\n")
    draft.rename(path)


def pod(name, uid=None, *, namespace="default", labels=None, annotations=None, **spec):
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-of-{name}",
            "labels": labels or {},
            "annotations": annotations or {},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {"nodeName": NODE, "containers": [{"name": "app"}], **spec},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}]},
    }


def status(code, message="", **headers):
    """Return a fault: refuse with a Status object."""

    def fault(handler):
        body = {"kind": "Status", "status": "Failure", "code": code, "message": message}
        handler.answer(code, body, headers)

    return fault


def stream(*chunks, end=True):
    """Return a fault: a watch that says just this; without `end` it is cut."""

    def fault(handler):
        handler.begin_stream()
        for chunk in chunks:
            handler.chunk(chunk)
        if end:
            handler.chunk(b"")
        handler.close_connection = True

    return fault


def line(kind, what):
    return json.dumps({"type": kind, "object": what}).encode() + b"\n"


class ApiServer:
    """Serves from the moment it is made, until `stop`."""

    def __init__(self, folder, port=0):
        self.token = TOKEN
        self.page = 0  # pods per page; 0: all, as out of the watch cache
        self.pods = {}
        self.version = 1000
        self.oldest = 0  # versions before this are gone
        self.events = []  # (version, line)
        self.faults: list[Any] = []  # of the next requests
        self.requests: list[dict[str, str]] = []  # dicts of their parameters
        self.watches = 0  # open
        self.changed = threading.Condition(threading.RLock())
        self.stopping = False
        self.generation = 0  # of watches; those of an earlier one end
        key, cert = certificate(folder)
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                query = dict(parse_qsl(urlsplit(self.path).query, True))
                with server.changed:
                    fault = server.faults.pop(0) if server.faults else None
                    server.requests.append(query)
                    server.changed.notify_all()
                if fault:
                    fault(self)
                elif self.headers["authorization"] != f"Bearer {server.token}":
                    status(401, "Unauthorized")(self)
                elif "watch" in query:
                    server._watch(self, query)
                else:
                    server._list(self, query)

            def answer(self, code, body, headers=None):
                text = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                for name, value in (headers or {}).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(text)

            def begin_stream(self):
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()

            def chunk(self, data):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request, client_address):
                pass  # the client went away: that is what is tested

        self._server = Server(("127.0.0.1", port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self._server.server_port
        token_file = folder / "token"
        write_token(token_file, TOKEN)
        self.cluster = Cluster(
            f"https://127.0.0.1:{self.port}", NODE, token_file, ca_file=cert
        )
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def put(self, what):
        """Add or change a pod."""
        kind = "MODIFIED" if what["metadata"]["uid"] in self.pods else "ADDED"
        self._happened(kind, what)

    def delete(self, what):
        self._happened("DELETED", what)

    def bookmark(self):
        self._happened("BOOKMARK", {"kind": "Pod", "metadata": {}})

    def say(self, text):
        """Put these bytes into the watches, whatever they are."""
        with self.changed:
            self.events.append((self.version, text))
            self.changed.notify_all()

    def end_watches(self):
        """End the open ones as the server does: with all said, and a bookmark."""
        with self.changed:
            self.bookmark()
            self.generation += 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: not self.watches, PATIENCE_S)

    def forget(self):
        """Compact: all versions but the present one are gone."""
        with self.changed:
            self.version += 1
            self.oldest = self.version
            self.events.clear()

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def stop(self):
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _happened(self, kind, what):
        with self.changed:
            self.version += 1
            what["metadata"]["resourceVersion"] = str(self.version)
            uid = what["metadata"].get("uid")
            if kind == "DELETED":
                del self.pods[uid]
            elif uid:
                self.pods[uid] = what
            self.events.append((self.version, line(kind, what)))
            self.changed.notify_all()

    def _list(self, handler, query):
        with self.changed:
            pods, version = list(self.pods.values()), self.version
        assert "resourceVersion" not in query or "continue" not in query
        first = int(query.get("continue", 0))
        metadata = {"resourceVersion": str(version)}
        if self.page and first + self.page < len(pods):
            metadata["continue"] = str(first + self.page)
            pods = pods[: first + self.page]
        handler.answer(
            200, {"kind": "PodList", "metadata": metadata, "items": pods[first:]}
        )

    def _watch(self, handler, query):
        since = int(query["resourceVersion"])
        if since < self.oldest:
            handler.begin_stream()
            gone = {"kind": "Status", "code": 410, "message": "too old"}
            handler.chunk(line("ERROR", gone))
            handler.chunk(b"")
            return
        with self.changed:
            self.watches += 1
            generation = self.generation
            at = next(
                (at for at, (v, _) in enumerate(self.events) if v > since),
                len(self.events),
            )
            self.changed.notify_all()
        with suppress(OSError):
            handler.begin_stream()
            while text := self._next_event(at, generation):
                at += 1
                handler.chunk(text)
            handler.chunk(b"")
        handler.close_connection = True
        with self.changed:
            self.watches -= 1
            self.changed.notify_all()

    def _next_event(self, at, generation):
        """Wait for the event at an index; nothing when the watch is to end."""
        with self.changed:
            self.changed.wait_for(
                lambda: (
                    at < len(self.events)
                    or self.stopping
                    or generation != self.generation
                )
            )
            return self.events[at][1] if at < len(self.events) else b""
