"""The viewer: one page for all its addresses, and the files beside it.

A browser asks for each again, with its ETag: an upgraded store shows its own viewer.
"""

from __future__ import annotations

import hashlib
import re
from http import HTTPStatus
from pathlib import Path
from typing import Final

from podspan.agent.store.request import Refusal, Request, Response

FOLDER: Final = Path(__file__).with_name("viewer")

CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}

# Nothing but its own scripts, whatever a span's texts say.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)

# No slash and no leading dot: nothing but a file of the folder.
_file_name = re.compile(r"[A-Za-z0-9_-]+(\.[a-z]+)").fullmatch

_page = re.compile(r"/|/traces/[0-9A-Za-z]+|/dependencies|/tail").fullmatch

# Zipkin's addresses, so that links to its viewer lead to the same here.
_zipkin_page = re.compile(
    r"/zipkin(?P<list>/?)|/zipkin(?P<trace>/traces/[0-9a-f]{1,32})|"
    r"/zipkin/dependency(?P<graph>/?)"
).fullmatch


def serve(request: Request) -> Response:
    """Return the page, the file or the redirect of a path; Refusal where none is."""
    path = request.path
    if _page(path):
        return _file("index.html", request)
    if path.startswith("/static/"):
        return _file(path.removeprefix("/static/"), request)
    if found := _zipkin_page(path):
        to = found["trace"] or ("/" if found["list"] is not None else "/dependencies")
        query = f"?{request.query_text}" if request.query_text else ""
        return Response(status=HTTPStatus.FOUND, headers={"Location": to + query})
    raise Refusal(HTTPStatus.NOT_FOUND, "Not found")


def _file(name: str, request: Request) -> Response:
    named = _file_name(name)
    content_type = CONTENT_TYPES.get(named[1]) if named else None
    path = FOLDER / name
    if content_type is None or not path.is_file():
        raise Refusal(HTTPStatus.NOT_FOUND, "Not found")
    body = path.read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "ETag": etag,
    }
    # A proxy that compresses makes a weak one of it.
    known = request.header("If-None-Match").replace("W/", "").split(",")
    if etag in [each.strip() for each in known]:
        return Response(b"", content_type, HTTPStatus.NOT_MODIFIED, headers)
    return Response(body, content_type, headers=headers)
