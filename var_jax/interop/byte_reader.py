"""Read numbers and text from an untrusted binary buffer with bounds checks."""

import mmap
import struct


class InvalidFile(ValueError):
    """Bytes that violate their file format; readers of files re-raise it with the name of the file."""


class ByteReader:
    """Sequential reader of the range [start, end) of a buffer, which raises InvalidFile at its end.

    Attributes:
      position: offset in the buffer of the next byte.
    """

    def __init__(self, buffer: bytes | mmap.mmap, start: int = 0, end: int | None = None):
        end = len(buffer) if end is None else end
        if not 0 <= start <= end <= len(buffer):
            raise InvalidFile(f"bytes {start} to {end} are outside the file, which has {len(buffer)}")
        self.position = start
        self._buffer, self._end = buffer, end

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        start = self.position
        self.skip(count)
        return self._buffer[start : self.position]

    def skip(self, count: int) -> None:
        """Skip the next `count` bytes."""
        if not 0 <= count <= self._end - self.position:
            raise InvalidFile(
                f"cut short: {count} bytes expected at {self.position}, {self._end - self.position} left"
            )
        self.position += count

    def unpack(self, layout: str):
        """Return the next number, in a `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, max_length: int = 256) -> str:
        """Return the ASCII text up to the next newline, and skip the newline."""
        end = self._buffer.find(b"\n", self.position, min(self.position + max_length + 1, self._end))
        if end < 0:
            raise InvalidFile(f"no end of the line that starts at byte {self.position}")
        return decode_text(self.take(end + 1 - self.position)[:-1], "ascii")


def decode_text(text: bytes, encoding: str = "utf-8") -> str:
    """Decode bytes to text.

    Raises:
      InvalidFile: if they are not valid in the encoding.
    """
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidFile(f"text that is not {encoding}: {text[:40]!r}") from error
