"""What a protocol is to delivery.py: how spans are written, and what an answer means.

Pure: an answer is a status, headers and a body; whoever has the socket acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Protocol

from podspan.agent.span import Span

# The user has to change something: credentials, the path, a proxy's or a mesh's rules.
SETUP_STATUSES = frozenset({401, 403, 404, 405, 407})

# Of an answer's text, what a line of the log has room for.
MESSAGE_CUT = 200


class Outcome(Enum):
    """What an answer makes of a batch."""

    SENT = "sent"
    PARTIAL = "partial"  # but for some spans, which nobody wants to see again
    REFUSED = "refused"  # it would fare no better another time
    TOO_LARGE = "too large"  # a part of it may fare better
    RETRY = "retry"
    SETUP = "setup"  # no batch will be taken until somebody repairs something


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer means."""

    outcome: Outcome
    message: str = ""  # "": there is nothing to tell; a stranger's, as it came
    rejected: int = 0  # spans, of PARTIAL
    retry_after: str = ""  # the header, of RETRY


class Encoder(Protocol):
    """A protocol: spans to a body, an answer to a verdict."""

    name: str  # in logs and metrics
    content_type: str
    default_path: str  # of a URL that has none

    def encode(self, spans: Sequence[Span]) -> bytes:
        """Return the body of a request; there is at least one span."""

    def verdict(self, status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
        """Return what an answer means; the headers' names are in lower case."""


def failure(
    status: int, headers: Mapping[str, str], message: str, *, retried: bool
) -> Verdict:
    """Return what an answer outside of 2xx means.

    `retried`: the protocol has such a request sent again. A redirect is not followed:
    it would take credentials and traces to where the user has not sent them.
    """
    said = f"HTTP {status} {message}"
    if retried:
        return Verdict(
            Outcome.RETRY, said, retry_after=headers.get("retry-after", "").strip()
        )
    if status == 413:
        return Verdict(Outcome.TOO_LARGE, said)
    if 300 <= status < 400:
        place = headers.get("location", "nowhere").partition("?")[0]
        return Verdict(Outcome.SETUP, f"HTTP {status}: redirects to {place}")
    setup = status in SETUP_STATUSES
    return Verdict(Outcome.SETUP if setup else Outcome.REFUSED, said)


def one_line(text: str) -> str:
    """Return a stranger's text as a line of the log can have it."""
    words = "".join(char if char.isprintable() else " " for char in text[:1000])
    return " ".join(words.split())[:MESSAGE_CUT]


def retry_after_s(value: str, now_s: float) -> float | None:
    """Return how long a Retry-After says to wait; None where it says nothing.

    Seconds or a date (RFC 9110 section 10.2.3); `now_s` is since 1970.
    """
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        at_s = parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, at_s - now_s)
