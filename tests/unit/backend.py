"""A backend for spans that answers as told, over HTTP or HTTPS; and certificates."""

import gzip
import json
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from podspan.agent.exchange import Exchange
from podspan.agent.span import span_of
from unit.kernel_struct import exchange_record

PATIENCE_S = 20.0


def spans(count, first=1):
    """Return spans whose ids count up from `first`."""
    return [
        span_of(Exchange.from_kernel(exchange_record(span_id=number)), "a", 0)
        for number in range(first, first + count)
    ]


def until(condition):
    """Wait until the condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.002)


@dataclass
class Reply:
    """One answer."""

    status: int = 202
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """What came, when, and the status of its answer."""

    path: str
    headers: Any
    body: bytes
    status: int
    at_s: float  # since 1970

    @property
    def plain(self):
        compressed = self.headers["content-encoding"] == "gzip"
        return gzip.decompress(self.body) if compressed else self.body

    @property
    def ids(self):
        return [int(span["id"], 16) for span in json.loads(self.plain)]


class Backend:
    """Answers POSTs as told, and remembers them."""

    def __init__(self, port=0, tls=None):
        self.replies: list[Reply] = []  # the next answers; then `usual`
        self.usual = Reply()
        self.most_spans = 1_000_000  # else 413
        self.authorization = ""  # else 401
        self.hang = threading.Event()  # cleared: requests wait for it
        self.hang.set()
        self.requests: list[Request] = []
        self.connections: set[Any] = set()
        self.changed = threading.Condition()
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                at_s = time.time()
                with backend.changed:
                    backend.connections.add(self.client_address)
                    request = Request(self.path, self.headers, body, 0, at_s)
                    reply = backend.reply(request)
                    request.status = reply.status
                    backend.requests.append(request)
                    backend.changed.notify_all()
                backend.hang.wait(PATIENCE_S)
                self.send_response(reply.status)
                length = {"content-length": str(len(reply.body))}
                for name, value in (length | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request, client_address):
                pass  # the exporter gave up on an answer: that is what is tested

            def finish_request(self, request: Any, client_address: Any) -> None:
                # In the connection's thread: a handshake shall hold up nobody.
                if tls is not None:
                    request = tls.wrap_socket(request, server_side=True)
                with request:
                    super().finish_request(request, client_address)

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_port
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.port}/api/v2/spans"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()

    def reply(self, request):
        if (
            self.authorization
            and request.headers["authorization"] != self.authorization
        ):
            return Reply(401, b"no: " + str(request.headers).encode())
        if self.replies:
            return self.replies.pop(0)
        if self.most_spans < 1_000_000 and len(request.ids) > self.most_spans:
            return Reply(413)
        return self.usual

    def ids(self, status=202):
        """Return the ids of all spans that were answered with this status."""
        return [
            number
            for request in self.requests
            if request.status == status
            for number in request.ids
        ]

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S)

    def stop(self):
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@dataclass(frozen=True)
class Identity:
    """A certificate and its key."""

    cert: Path
    key: Path

    def server_context(self, clients_of=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        if clients_of is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(clients_of.cert)
        return context


def make_identity(folder, name, issuer=None, san="IP:127.0.0.1"):
    """Make a CA, or what one has issued."""
    made = Identity(folder / f"{name}.crt", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"]
    command += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={name}"]
    command += ["-keyout", str(made.key), "-out", str(made.cert)]
    if issuer is not None:
        command += ["-CA", str(issuer.cert), "-CAkey", str(issuer.key)]
        command += ["-addext", f"subjectAltName={san}"]
        command += ["-addext", "basicConstraints=CA:FALSE"]
    subprocess.run(command, check=True, capture_output=True)
    return made
