"""Whether a browser asks for its user, or for somebody's page.

There is no login, so being able to reach the port is what counts; a browser reaches it
for every page it shows. A page of another site may send a request, but not read the
answer without CORS headers, of which we send none. It may not write: a browser tells
the Origin of every POST. On loopback its name must not lead here, either (DNS
rebinding): the Host has to be an address or a local name. What listens on other
addresses is asked by names that only its cluster knows; there, any Host will do.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final

from podspan.agent.store.request import Refusal, Request

# No public DNS server answers for these, nor for names without a dot: RFC 6761, and
# ICANN's resolution 2024.07.29.06. Docker calls its host by the second.
LOCAL_NAMES: Final = (".localhost", ".internal")

_host = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?").fullmatch


def check_origin(request: Request, *, local: bool) -> None:
    """Raise Refusal for what another site's page made a browser send."""
    host = request.header("Host")
    if local and not _is_local_name(host):
        raise Refusal(
            HTTPStatus.MISDIRECTED_REQUEST,
            "This store is on loopback only: ask it by address or as localhost",
        )
    origin = request.header("Origin")
    if request.method == "POST" and origin and origin.partition("://")[2] != host:
        raise Refusal(HTTPStatus.FORBIDDEN, "Another site's pages may not write here")


def _is_local_name(host: str) -> bool:
    """Tell whether a Host header is none that a foreign DNS server answers for."""
    if not host:  # HTTP/1.0
        return True
    found = _host(host.lower())
    if not found:
        return False
    name = found[1] or found[2]
    if not found[1] and ("." not in name or name.endswith(LOCAL_NAMES)):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
