"""Texts that people write in options, and what they mean.

Each reader makes a value of a text or raises BadValue, which says what to write.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field

NONE = "none"

DAY_S = 24 * 60 * 60

# Smaller is no store: SQLite's own pages, indexes and log take as much.
MIN_STORE_SIZE = 16 * 2**20

_AGES_S = {"s": 1, "m": 60, "h": 60 * 60, "d": DAY_S}
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class BadValue(argparse.ArgumentTypeError, ValueError):
    """The text means nothing; an argparse parser shows what it says."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str  # of IPv4 or IPv6, or a name
    port: int
    named: bool = True  # by the user

    def __str__(self) -> str:
        """Return it as it is written."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def reachable(self) -> Address:
        """Where a server that listens here is reached from the same machine."""
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return Address(loopback.get(self.host, self.host), self.port)


@dataclass(frozen=True, slots=True)
class Secret:
    """A text that is shown nowhere."""

    text: str = field(repr=False)

    def __str__(self) -> str:
        """Return that there is one."""
        return "(set)"


def text(text: str) -> str:
    """Return what is not empty."""
    if not text:
        raise BadValue("it is empty")
    return text


def switch(text: str) -> bool:
    """Return whether it is on."""
    switches = {"1": True, "true": True, "yes": True, "on": True}
    switches |= {"": False, "0": False, "false": False, "no": False, "off": False}
    try:
        return switches[text.lower()]
    except KeyError:
        raise BadValue("use 1 or 0") from None


def patterns(text: str) -> tuple[str, ...]:
    """Return the parts between commas."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def number(least: int, most: int) -> Callable[[str], int]:
    """Return the reader of a whole number."""

    def read(text: str) -> int:
        # isdigit: int() also takes signs, spaces, underscores.
        plain = text.isascii() and text.isdigit() and len(text) <= len(str(most))
        if not plain or not least <= int(text) <= most:
            raise BadValue(f"use a number from {least} to {most}")
        return int(text)

    return read


def seconds(least: float, most: float) -> Callable[[str], float]:
    """Return the reader of so many seconds."""

    def read(text: str) -> float:
        plain = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", text)
        if not plain or not least <= float(text) <= most:
            raise BadValue(
                f"use {least:g} to {most:g} seconds, with three decimals at most"
            )
        return float(text)

    return read


def percent(text: str) -> float:
    """Return a percentage; Istio counts in its hundredths, as Envoy does."""
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,2})?", text) or float(text) > 100:
        raise BadValue("use 0 to 100, with two decimals at most")
    return float(text)


def age(text: str) -> int:
    """Return seconds, of 90s, 15m, 12h or 7d."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if not match or not int(match[1]):
        raise BadValue("use a time such as 90s, 15m, 12h or 7d")
    return int(match[1]) * _AGES_S[match[2]]


def size(text: str) -> int:
    """Return bytes, of 1048576, 512KiB, 64MiB or 2GiB; the iB may be left out."""
    match = re.fullmatch(r"([0-9]{1,15})(?:([KMGT])(?:iB)?)?", text)
    if not match:
        raise BadValue("use a size such as 1048576, 64MiB or 2GiB")
    return int(match[1]) * _SIZES[(match[2] or "").lower()]


def store_size(text: str) -> int:
    """Return bytes, as `size` does, of an embedded store."""
    read = size(text)
    if read < MIN_STORE_SIZE:
        raise BadValue(f"use at least {size_text(MIN_STORE_SIZE)}")
    return read


def age_text(age_s: int) -> str:
    """Return what `age` reads."""
    unit = next(unit for unit in "dhms" if age_s % _AGES_S[unit] == 0)
    return f"{age_s // _AGES_S[unit]}{unit}"


def size_text(size: int) -> str:
    """Return what `size` reads."""
    if size == 0:
        return "0"
    unit = next(unit for unit in ("t", "g", "m", "k", "") if size % _SIZES[unit] == 0)
    return f"{size // _SIZES[unit]}{unit.upper()}{'iB' if unit else ''}"


def address(text: str) -> Address | None:
    """Return the address of ADDR:PORT; None where it is `none` or empty."""
    if text in ("", NONE):
        return None
    return _address(text, 1, "use ADDR:PORT, [IPV6]:PORT, or none")


def listening(text: str) -> Address:
    """Return the address of ADDR:PORT."""
    return _address(text, 1, "use ADDR:PORT or [IPV6]:PORT")


def any_port(text: str) -> Address:
    """Return the address of ADDR:PORT; port 0 is any that is free."""
    return _address(text, 0, "use ADDR:PORT or [IPV6]:PORT")


def _address(text: str, least_port: int, hint: str) -> Address:
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    # As in a URL: else the end of an IPv6 address would be a port.
    if not colon or (":" in bare) != host.startswith("[") or bare == "[":
        raise BadValue(hint)
    return Address(bare or "0.0.0.0", number(least_port, 65535)(port))


def one_of(*words: str) -> Callable[[str], str]:
    """Return the reader of one of these words."""

    def read(text: str) -> str:
        if text.lower() not in words:
            raise BadValue(f"use one of {', '.join(words)}")
        return text.lower()

    return read


def some_of(*words: str) -> Callable[[str], frozenset[str]]:
    """Return the reader of some of these words, with commas between."""

    def read(text: str) -> frozenset[str]:
        parts = frozenset(part.lower() for part in patterns(text))
        if not parts or not parts <= set(words):
            raise BadValue(f"use one or more of {', '.join(words)}")
        return parts

    return read
