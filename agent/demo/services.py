"""One service of the demo: a plain threaded server that forwards no header at all.

    python -m podspan.agent.demo.services ratings
    python -m podspan.agent.demo.services reviews ratings=10.97.0.5
    python -m podspan.agent.demo.services client productpage=10.97.0.2

A server prints `ready` once it listens, then serves until it is killed. Its answer
repeats the header lines that it received, and the answers that it was given, so
that a reader of the page sees what went over each wire. The client prints the page.
"""

import http.client
import http.server
import json
import socket
import socketserver
import sys
import time
from typing import Any

from podspan.agent.demo.bookinfo import CLIENT, PORT, SERVICES, Service

# More than any answer takes, also in an emulated machine.
CALL_TIMEOUT_S = 30


class Upstreams:
    """What a service calls: one kept connection for each, used by one thread."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._connections = {
            name: http.client.HTTPConnection(address, PORT, timeout=CALL_TIMEOUT_S)
            for name, address in addresses.items()
        }

    def get(self, name: str, headers: dict[str, str] | None = None) -> Any:
        """Ask the service by its name, as a pod asks a Kubernetes service."""
        connection = self._connections[name]
        host = {"Host": f"{name}:{PORT}"}
        connection.request("GET", SERVICES[name].path, headers=host | (headers or {}))
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise OSError(f"{name} answered {response.status}: {body!r}")
        return json.loads(body)

    def close(self) -> None:
        """Close every connection."""
        for connection in self._connections.values():
            connection.close()


class Server(http.server.ThreadingHTTPServer):
    """Listens on IPv4 and IPv6 by one socket, a thread per connection."""

    address_family = socket.AF_INET6

    def __init__(self, service: Service, addresses: dict[str, str]) -> None:
        self.service = service
        self.addresses = addresses
        super().__init__(("::", PORT), Handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse lookup: there is no resolver in here."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.service.name, PORT


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, by its own thread."""

    server: Server
    protocol_version = "HTTP/1.1"
    # Head and body leave in one send: no 40 ms between Nagle and a delayed ACK.
    wbufsize = -1

    def setup(self) -> None:
        """Give this connection upstream connections of its own."""
        super().setup()
        self.upstreams = Upstreams(self.server.addresses)

    def finish(self) -> None:
        """Close them with it."""
        self.upstreams.close()
        super().finish()

    def do_GET(self) -> None:
        """Work, ask the others one after the other, answer."""
        service = self.server.service
        if self.path != service.path:
            self.send_error(404)
            return
        time.sleep(service.work_ms / 1000)
        try:
            answers = {name: self.upstreams.get(name) for name in service.calls}
        except (OSError, http.client.HTTPException) as exc:
            self.send_error(502, explain=str(exc))
            return
        page = {
            "service": service.name,
            "received": self.headers.items(),
            "answers": answers,
        }
        body = json.dumps(page).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: the trace is the log."""


def main(argv: list[str]) -> None:
    """Serve, or call as the client does."""
    name, *pairs = argv
    addresses: dict[str, str] = {}
    headers: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        # The client may send headers, so that a test sees that none is forwarded.
        (addresses if key in SERVICES else headers)[key] = value
    if name == CLIENT.name:
        upstreams = Upstreams(addresses)
        for callee in CLIENT.calls:
            print(json.dumps(upstreams.get(callee, headers)))
        upstreams.close()
        return
    with Server(SERVICES[name], addresses) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
