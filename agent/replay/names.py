"""Name the services at the ends of a connection.

A hosts file of the user's (hosts(5)) says; else the Host by which an address was called
in this capture, where that was always the same; else the address itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from podspan.agent.errors import UsageError
from podspan.agent.url import TARGET_CUT, request_url

# A cluster has some thousand pods; beyond this someone fills a capture on purpose.
MAX_LEARNED = 65536


class ServiceNames:
    """Names by address; learned on the way."""

    def __init__(self, hosts: Mapping[str, str]) -> None:
        self._hosts = hosts
        self._learned: dict[str, str] = {}  # "": called by different names

    def learn(self, address: str, host: str) -> None:
        """The address was called by this name; "" is none."""
        known = self._learned.get(address)
        if known is None and host and len(self._learned) < MAX_LEARNED:
            # All of this machine's services share it, and its clients, too.
            self._learned[address] = "" if ip_address(address).is_loopback else host
        elif known and host and known != host:
            self._learned[address] = ""

    def name(self, address: str, host: str = "") -> str:
        """Return the name of who is there, where it was called `host` now."""
        return self._hosts.get(address) or host or self._learned.get(address) or address


def named_host(method: str, target: str, host: str) -> str:
    """Return the name of the service that a request asks for; "": it has none."""
    if not method or method == "CONNECT":  # the peer is not who is named
        return ""
    url = request_url(method, target, host, max_path=TARGET_CUT, query=False)
    return url.authority.service


def read_hosts(text: str) -> dict[str, str]:
    """Return the first name of each address in a hosts file.

    Raises UsageError with the number of a line that is none.
    """
    hosts: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            address = ip_address(words[0].partition("%")[0])
        except ValueError:
            raise _bad_line(number, f"{words[0]!r} is no address") from None
        if len(words) == 1:
            raise _bad_line(number, "it has no name")
        hosts.setdefault(str(address), words[1])
    return hosts


def _bad_line(number: int, what: str) -> UsageError:
    return UsageError(
        f"line {number} of the hosts file: {what}",
        "a line is ADDRESS NAME, as hosts(5)",
    )
