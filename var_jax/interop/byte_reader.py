"""Bounds-checked reading of bytes that a stranger wrote."""

import mmap
import struct


class InvalidFile(ValueError):
    """The bytes are not what their format allows. The readers of whole files add the name of the file."""


class ByteReader:
    """Reads forward through a part of a buffer, never outside it.

    Attributes:
      position: offset in the buffer of the next byte.
    """

    def __init__(self, buffer: bytes | mmap.mmap, start: int = 0, end: int | None = None):
        end = len(buffer) if end is None else end
        if not 0 <= start <= end <= len(buffer):
            raise InvalidFile(f"bytes {start} to {end} are outside the file, which has {len(buffer)}")
        self.position, self._buffer, self._end = start, buffer, end

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self.position
        self.skip(count)
        return self._buffer[start : self.position]

    def skip(self, count: int) -> None:
        """Pass over the next `count` bytes."""
        if not 0 <= count <= self._end - self.position:
            raise InvalidFile(
                f"cut short: {count} bytes expected at {self.position}, {self._end - self.position} left"
            )
        self.position += count

    def unpack(self, layout: str):
        """One number of a `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, max_length: int = 256) -> str:
        """ASCII text up to the next newline, without it."""
        end = self._buffer.find(b"\n", self.position, min(self.position + max_length + 1, self._end))
        if end < 0:
            raise InvalidFile(f"no end of the line that starts at byte {self.position}")
        return decode_text(self.take(end + 1 - self.position)[:-1], "ascii")


def decode_text(text: bytes, encoding: str = "utf-8") -> str:
    """Text from bytes, which must be valid in that encoding."""
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidFile(f"text that is not {encoding}: {text[:40]!r}") from error
