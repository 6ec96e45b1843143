"""Where a backend is, and how to prove who we are.

Secrets are in headers and may be in a URL's query: neither is in the text of anything
here, nor of the errors raised here. Pure but for reading the files that it is told.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from podspan.agent.errors import UsageError

# RFC 9110 section 5.6.2 and 5.5; of the values only what every server takes.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?")


@dataclass(frozen=True, slots=True, repr=False)
class Destination:
    """One backend."""

    url: str  # as checked_url returns it
    # "Name: value" lines; beat `headers`, and are read again when the file changes.
    headers_file: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    ca_file: Path | None = None  # None: the system's
    cert_file: Path | None = None  # the client's
    key_file: Path | None = None  # None: it is in cert_file

    def __repr__(self) -> str:
        """Say where, and nothing that proves who we are."""
        return f"Destination({shown(self.url)!r})"


def checked_url(url: str, flag: str, default_path: str) -> str:
    """Return where to POST: `url`, completed if it has no path of its own."""
    hint = f"an example: {flag} http://collector.tracing:9411"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UsageError(f"not a URL: {_harmless(url)!r}: {exc}", hint) from None
    if parts.username is not None:
        raise UsageError(
            "a URL with a user name in it would end up in logs",
            "send the credentials as a header: see podspan agent --help",
        )
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"not an http or https URL: {_harmless(url)!r}", hint)
    if not parts.hostname or port == 0 or not url.isprintable() or " " in url:
        raise UsageError(f"not a URL: {_harmless(url)!r}", hint)
    if parts.path in ("", "/"):
        parts = parts._replace(path=default_path)
    return parts._replace(fragment="").geturl()


def shown(url: str) -> str:
    """Return a URL as logs may have it: a query may hold a key."""
    parts = urlsplit(url)
    return SplitResult(parts.scheme, parts.netloc, parts.path, "", "").geturl()


def _harmless(url: str) -> str:
    """Return what is no URL, without what may be a password or a key."""
    before, _, after = url.partition("?")[0].rpartition("@")
    return f"...@{after}" if before else after


def headers_from_list(text: str, variable: str) -> dict[str, str]:
    """Return the headers of `name=value,name=value`, an environment variable's text.

    As OTEL_EXPORTER_OTLP_HEADERS: values may be percent-encoded
    (https://opentelemetry.io/docs/specs/otel/protocol/exporter/).
    """
    found: dict[str, str] = {}
    for number, part in enumerate(text.split(","), 1):
        if not part.strip():
            continue
        name, equals, value = part.partition("=")
        found |= _header(
            name, unquote(value) if equals else None, f"{variable}, part {number}"
        )
    return found


def headers_from_file(path: Path) -> dict[str, str]:
    """Return the headers of `Name: value` lines; # begins a comment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(
            f"cannot read headers from {path}: {_what(exc)}",
            "it has to be a text file that the agent may read",
        ) from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, value = line.partition(":")
        found |= _header(name, value if colon else None, f"{path}, line {number}")
    return found


def _header(name: str, value: str | None, where: str) -> dict[str, str]:
    name = name.strip().lower()
    value = value.strip() if value is not None else ""
    # The text may be a secret, or have one: only its place is told.
    if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
        raise UsageError(
            f"not a header: {where}",
            "a file has lines `Name: value`, a variable `name=value,name=value`",
        )
    return {name: value}


def tls_context(destination: Destination) -> ssl.SSLContext | None:
    """Return how to verify the backend and what to show it; None without TLS."""
    ca, cert, key = destination.ca_file, destination.cert_file, destination.key_file
    if key is not None and cert is None:
        raise UsageError(f"a key without its certificate: {key}", "name both files")
    if urlsplit(destination.url).scheme != "https":
        if ca is not None or cert is not None:
            raise UsageError(
                f"certificates, but no https URL: {shown(destination.url)}",
                "use https://, or leave the files off",
            )
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as exc:
        raise UsageError(
            f"cannot use the CA certificates in {ca}: {_what(exc)}",
            "it has to be a PEM file that the agent may read",
        ) from exc
    if cert is not None:
        try:
            # The password: else OpenSSL asks the terminal for it, and waits.
            context.load_cert_chain(cert, key, password="")
        except OSError as exc:
            raise UsageError(
                f"cannot use the client certificate {cert}, key {key or cert}: "
                f"{_what(exc)}",
                "both have to be PEM, belong together, and need no password",
            ) from exc
    return context


def _what(exc: Exception) -> str:
    """Return the reason without file names and places in OpenSSL's source."""
    if isinstance(exc, ssl.SSLError):
        return (exc.reason or "not PEM").lower().replace("_", " ")
    return (exc.strerror if isinstance(exc, OSError) else "") or "not text"
