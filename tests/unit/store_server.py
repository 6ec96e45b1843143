"""A running store, and a client that sends exactly what it is told."""

import http.client
import json
from contextlib import closing, contextmanager
from dataclasses import dataclass

from podspan.agent.store.database import Database
from podspan.agent.store.server import StoreServer

JSON = {"Content-Type": "application/json"}
DAY_S = 86400


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self):
        """The body, read."""
        return json.loads(self.body)

    @property
    def text(self):
        """The body, for people."""
        return self.body.decode()


@dataclass(frozen=True)
class Store:
    """Where it is."""

    port: int
    database: Database
    server: StoreServer

    def ask(self, method, target, body=None, headers=None):
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with closing(connection):
            connection.putrequest(
                method, target, skip_host=bool(headers and "Host" in headers)
            )
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def get(self, target, **headers):
        """GET with headers, underscores for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("GET", target, headers=named)

    def post(self, body, **headers):
        """POST spans, as bytes or as what becomes JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/api/v2/spans", body, JSON | named)


@contextmanager
def running_store(folder):
    """Yield a Store on a port of its own."""
    path = folder / "traces.db"
    database = Database(path, max_age_s=10_000 * DAY_S, max_bytes=1 << 30)
    with closing(database), closing(StoreServer(database, ("127.0.0.1", 0))) as server:
        server.start()
        yield Store(server.port, database, server)
