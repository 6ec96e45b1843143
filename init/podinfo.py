"""Read a pod's annotations as the downward API writes them into a file.

Pure: text in, a mapping out. One annotation a line, key="value", the value escaped as
a Go string (kubernetes pkg/fieldpath, FormatMap: `%v=%q`), so it never spans lines.
"""

from __future__ import annotations

import re

# strconv.Quote escapes so: the letters, \xNN for bytes that are not UTF-8, \uNNNN and
# \UNNNNNNNN for what cannot be printed.
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\\"'])|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))"
)
_LETTERS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_LINE = re.compile(r'([^=\s"]+)="((?:[^"\\]|\\.)*)"')


def parse(text: str) -> dict[str, str]:
    """Return the annotations; raise ValueError that names the line which is none."""
    found = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f'line {number} is not of the form key="value"')
        key, value = match.groups()
        found[key] = _ESCAPE.sub(_plain, value)
    return found


def _plain(match: re.Match[str]) -> str:
    letter, *codes = match.groups()
    if letter:
        return _LETTERS.get(letter, letter)
    return chr(int(next(filter(None, codes)), 16))
