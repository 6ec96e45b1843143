"""Name the protocol of a redirected connection from its first bytes.

Bytes in, verdict out: the caller owns the socket, the timeout and the replay. The
verdict is that of the shortest prefix that has one, so it does not depend on cuts.
"""

from __future__ import annotations

import re
from enum import Enum


class Protocol(Enum):
    """Which layer a connection gets."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"


# RFC 9113 section 3.4: every HTTP/2 client speaks these bytes first.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Of a frame's head (RFC 9113 section 4.1), all but the length: a server's first frame
# is SETTINGS, which is no acknowledgement and of no stream (sections 3.4 and 6.5).
_FRAME_HEAD = 9
_SETTINGS = b"\x04\0\0\0\0\0"

# As agent/http_head.py: a method of at most 16 token characters and a space; behind PRI
# also the byte that the preface has not there. Empty lines may come before it (RFC
# 9112 section 2.2); http1.py does not wait with them.
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,16}"
_TARGET = rb"[\x21-\x7e\x80-\xff]"
_HTTP1 = re.compile(
    rb"\r\n|(?!PRI )%b |PRI (?:(?!\*)%b|\*%b|\* HTTP/1)" % (_TOKEN, _TARGET, _TARGET)
)
_MAY_BECOME_HTTP1 = re.compile(rb"\r|%b" % _TOKEN)


def sniff(first: bytes) -> Protocol | None:
    """Return the protocol, or None while `first` may still become one we know.

    HTTP1 says that it may be HTTP/1 and nothing else that we know: its layer lets pass
    what turns out to be neither. None is returned for at most 23 bytes.
    """
    if first.startswith(HTTP2_PREFACE):
        return Protocol.HTTP2
    if HTTP2_PREFACE.startswith(first) or _MAY_BECOME_HTTP1.fullmatch(first):
        return None
    return Protocol.HTTP1 if _HTTP1.match(first) else Protocol.OPAQUE


def may_be_http2_server(first: bytes) -> bool:
    """Say whether HTTP/2 servers may begin so; they need not wait for the client.

    No other protocol that speaks first is known to.
    """
    head = first[3:_FRAME_HEAD]
    return first[:1] in {b"", b"\0"} and _SETTINGS.startswith(head)
