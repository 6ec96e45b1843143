"""Requests as bytes, the headers expected in them, and a server that echoes them."""

import socket
import threading
from contextlib import ExitStack, suppress

DEADLINE_S = 20
READ_MAX = 1 << 18

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

TRACE_ID = b"463ac35c9f6413ad48485a3953bb6124"
SPAN_ID = b"a2fb4a1d1a96d312"
PARENT_ID = b"0020000000000001"
REQUEST_ID = b"01234567-89ab-4def-8123-456789abcdef"

FORWARDED = (
    (b"X-B3-TraceId", TRACE_ID),
    (b"X-B3-SpanId", SPAN_ID),
    (b"X-B3-ParentSpanId", PARENT_ID),
    (b"X-B3-Sampled", b"1"),
    (b"X-Request-Id", REQUEST_ID),
)
WITHOUT_PARENT = tuple(line for line in FORWARDED if line[1] != PARENT_ID)


def make_head(*headers, method=b"GET", target=b"/reviews/7?verbose=1", size=None):
    """Return a head as a client writes it; `size` fills it up to that many bytes."""
    lines = [
        b"%s %s HTTP/1.1" % (method, target),
        b"Host: reviews:9080",
        b"User-Agent: Mozilla/5.0 (X11; Linux x86_64)",
        *(b"%s: %s" % header for header in headers),
        b"Accept: */*",
    ]
    if size is not None:
        left = size - len(b"\r\n".join(lines)) - len(b"\r\n" * 3) - len(b"X-Fill: ")
        assert left > 0, size
        lines.insert(3, b"X-Fill: " + b"f" * left)
    return b"\r\n".join([*lines, b"", b""])


def headers_of(head):
    """Return names in lower case, values; of a repeated name the first."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        headers.setdefault(name.lower(), value.strip())
    return headers


def chunked(body, size=32768):
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + (
        b"0\r\n\r\n"
    )


def read_all(sock):
    """Read until the peer closes."""
    parts = []
    while part := sock.recv(READ_MAX):
        parts.append(part)
    return b"".join(parts)


class EchoServer:
    """Answers one request per connection, with the bytes of the request."""

    def __init__(self, namespace):
        self.address = (namespace.ipv4, 9080)
        self._stack = ExitStack()
        with namespace.inside():
            self._listener = socket.create_server(self.address, backlog=512)
        self._thread = threading.Thread(target=self._accept, name="echo server")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(DEADLINE_S)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    @staticmethod
    def _serve(sock):
        with sock, suppress(OSError):
            request = read_request(sock)
            sock.sendall(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % len(request) + request
            )


def read_request(sock):
    data = b""
    while b"\r\n\r\n" not in data:
        part = sock.recv(READ_MAX)
        if not part:
            return data
        data += part
    head = data[: data.index(b"\r\n\r\n") + 4]
    whole = len(head) + int(headers_of(head).get(b"content-length", 0))
    parts = [data]
    size = len(data)
    while size < whole:
        part = sock.recv(READ_MAX)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)
