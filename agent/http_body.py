"""Follow the body of an HTTP/1 message to its end, without keeping any of it.

RFC 9112 sections 6 and 7.
"""

from __future__ import annotations

import re

from podspan.agent.http_head import MAX_HEAD, Body, Framing, MalformedHead

# Section 7.1, as bpf/scanner.h: at most 15 digits, and space before what extends them.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[; \t][^\x00\r\n]*+)?\r\n")
_CHUNK_END = re.compile(rb"\r\n")
_TRAILER = re.compile(rb"[^\x00\r\n]*+\r\n")


class BodyReader:
    """Where in the body of a message its bytes stand."""

    __slots__ = ("_left", "_line", "_next_line", "size", "until_close")

    def __init__(self, framing: Framing) -> None:
        self.size = 0  # bytes so far, without the framing of chunks
        self.until_close = framing.body is Body.UNTIL_CLOSE
        self._left = framing.length if framing.body is Body.LENGTH else 0
        self._next_line = _CHUNK_SIZE if framing.body is Body.CHUNKED else None
        self._line = b""  # its begin

    @property
    def done(self) -> bool:
        """Whether the message has ended."""
        return not (self._left or self._next_line or self.until_close)

    def take(self, data: bytes, at: int) -> int:
        """Return up to where the bytes from `at` on are the body's, or more of it.

        Raises MalformedHead where a chunked one is malformed.
        """
        if self.until_close:
            self.size += len(data) - at
            return len(data)
        if self._left:
            passed = min(self._left, len(data) - at)
            self._left -= passed
            self.size += passed
            return at + passed
        end = data.find(b"\n", at) + 1
        self._line += data[at : end or len(data)]
        if len(self._line) > MAX_HEAD:
            raise MalformedHead(f"a chunk's line is longer than {MAX_HEAD} bytes")
        if not end:
            return len(data)
        line, self._line = self._line, b""
        self._end_line(line)
        return end

    def skip(self) -> int:
        """Return how many bytes of it may pass unseen; they count as taken."""
        left, self._left = self._left, 0
        self.size += left
        return left

    def lose(self, count: int) -> bool:
        """Skip bytes that are missing; False: the body's end may be among them."""
        if self.until_close:
            self.size += count
            return True
        if count > self._left:
            return False
        self._left -= count
        self.size += count
        return True

    def _end_line(self, line: bytes) -> None:
        """A line of a chunked body has ended."""
        grammar = self._next_line
        match = grammar.fullmatch(line) if grammar else None
        if match is None:
            raise MalformedHead("a chunked body is malformed")
        if grammar is _CHUNK_SIZE:
            self._left = int(match[1], 16)
            self._next_line = _CHUNK_END if self._left else _TRAILER
        elif grammar is _CHUNK_END:
            self._next_line = _CHUNK_SIZE
        elif line == b"\r\n":
            self._next_line = None
