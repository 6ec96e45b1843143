"""The target URI of a request, as far as it may be recorded.

RFC 9112 section 3.3 says which URI a request line and a Host field mean together.
Secrets are left out here, before anything else sees the text: userinfo, and the
parameters that OpenTelemetry names (semconv: HTTP spans, url.full). What cannot be
read for certain is left out as well: a secret may be in it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

# The kernel's record cuts the texts at these sizes (bpf/exchange.h), in bytes.
TARGET_CUT = 256
HOST_CUT = 96

DEFAULT_PORTS = {"http": 80, "https": 443}

USERINFO = "REDACTED:REDACTED@"
SECRET_PARAMETERS = ("AWSAccessKeyId", "Signature", "sig", "X-Goog-Signature")

# scheme://authority, then path and query; a fragment has no place in a request.
_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)")

# RFC 3986 section 3.2, loosely: any name without what would end it in a URL.
_NEITHER = r"\]\[@/?#\\\x00-\x20\x7f"
_HOST_AND_PORT = re.compile(
    rf"(\[[^{_NEITHER}]+\]|[^:{_NEITHER}]+)(?::([0-9]{{0,5}}))?"
)


class Authority(NamedTuple):
    """Who is called, in lower case."""

    text: str  # as a URL has it; "": not known in full
    host: str  # in brackets if IPv6; "": not known
    port: int  # 0: not known
    service: str  # the host, unless it is an address or cut


UNKNOWN = Authority("", "", 0, "")


class Url(NamedTuple):
    """A request's target URI."""

    scheme: str
    authority: Authority
    path: str  # with the query; "" for CONNECT and for `*`


def request_url(
    method: str, target: str, host: str, *, max_path: int, query: bool
) -> Url:
    """Return what the request asks for, `host` being its Host field.

    Path and query together are cut at `max_path` characters, after what is secret
    was taken out.
    """
    scheme, path = "http", ""
    if target.startswith("/"):
        authority = _of_host(host)
        path = target
    elif method == "CONNECT":
        authority = _authority(target, 0, _is_cut(target, TARGET_CUT))
    elif absolute := _ABSOLUTE.match(target):
        # RFC 9112 section 3.2.2: it stands above Host.
        scheme = absolute[1].lower()
        path = absolute[3]
        # An authority that goes on where the kernel cut may be userinfo.
        authority = UNKNOWN
        if path or not _is_cut(target, TARGET_CUT):
            authority = _authority(absolute[2], DEFAULT_PORTS.get(scheme, 0), False)
        if not authority.host:
            scheme, authority, path = "http", _of_host(host), ""
    else:
        authority = _of_host(host)

    if "?" in path:
        path, _, parameters = path.partition("?")
        if query:
            path = f"{path}?{_without_secrets(parameters)}"
    return Url(scheme, authority, path[:max_path])


def _of_host(host: str) -> Authority:
    return _authority(host, 80, _is_cut(host, HOST_CUT))


# A node calls few hosts; a hostile client's many do not matter.
@lru_cache(maxsize=1024)
def _authority(text: str, default_port: int, cut: bool) -> Authority:
    """Read HOST[:PORT]; what follows a cut may have been more of either."""
    userinfo, _, rest = text.lower().rpartition("@")
    match = _HOST_AND_PORT.fullmatch(rest)
    if not match:
        return UNKNOWN
    host, digits = match[1], match[2]
    if cut:
        return Authority("", host, 0, "")
    port = int(digits) if digits else default_port
    if port > 65535:
        return UNKNOWN
    is_address = host.startswith("[") or host.replace(".", "").isdigit()
    service = "" if is_address else host
    return Authority(f"{USERINFO if userinfo else ''}{rest}", host, port, service)


def _is_cut(text: str, size: int) -> bool:
    """Tell whether the text filled its field; it may have ended there by chance."""
    return len(text) >= size or (
        not text.isascii() and len(text.encode("utf-8", "replace")) >= size
    )


def _spellings(name: str) -> str:
    """Return a pattern for the name, each character as such or percent-encoded."""
    return "".join(f"(?:{re.escape(char)}|(?i:%{ord(char):02x}))" for char in name)


# `;` separated parameters once, too (HTML 4.01 appendix B.2.2).
_SECRET = re.compile(
    rf"(?<![^&;])({'|'.join(map(_spellings, SECRET_PARAMETERS))})=[^&]*"
)

# All names have one of these, unless they are percent-encoded: saves the search.
_SECRET_HINTS = ("ig", "Id", "%")


def _without_secrets(query: str) -> str:
    """Keep the keys, as semconv has it: `sig=REDACTED`."""
    for hint in _SECRET_HINTS:
        if hint in query:
            return _SECRET.sub(r"\1=REDACTED", query)
    return query
