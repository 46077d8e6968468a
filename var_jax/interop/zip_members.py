"""Locate the members of a zip archive by offset and size, to read them from a memory-mapped file.

The format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT. An archive is rejected if two members
share a name or bytes, or if a member's local header and the central directory disagree: other tools could
read other contents from such an archive.
"""

import dataclasses
import mmap
import struct

from var_jax.interop.byte_reader import ByteReader, InvalidFile, decode_text

_END, _END64_LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_CENTRAL, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_ZIP64_EXTRA = 1  # id of the extra field with values that do not fit into 32 bits
_ENCRYPTED = 1  # bit of the flags
_MAX_MEMBERS = 1 << 16
_MAX_DIRECTORY = 1 << 25


@dataclasses.dataclass(frozen=True)
class Member:
    """Byte range of an archive member: `size` bytes from offset `start` of the file."""

    start: int
    size: int
    is_compressed: bool


def zip_members(buffer: mmap.mmap) -> dict[str, Member]:
    """Return the members of the zip archive in a buffer, by name.

    Raises:
      InvalidFile: if it is not a zip archive, or an ambiguous one.
    """
    directory, size, count = _central_directory(buffer)
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise InvalidFile(
            f"a zip archive of {count} members in a directory of {size} bytes; at most {_MAX_MEMBERS} "
            f"members and {_MAX_DIRECTORY} bytes are read"
        )
    reader = ByteReader(buffer, directory, directory + size)
    members, extents = {}, []
    for _ in range(count):
        name, header, member_size, is_compressed = _central_entry(reader)
        if name in members:
            raise InvalidFile(f"zip member {name!r} is there twice")
        start = _data_start(buffer, header, name, is_compressed)
        members[name] = Member(start, member_size, is_compressed)
        extents.append((header, start + member_size))
    extents.sort()
    starts = [start for start, _ in extents[1:]] + [directory]
    for (_, end), following in zip(extents, starts, strict=False):
        if end > following:
            raise InvalidFile("zip members overlap each other or the central directory")
    return members


def _central_directory(buffer: mmap.mmap) -> tuple[int, int, int]:
    """Return the offset, size and number of entries of the central directory."""
    end_offset = buffer.rfind(_END, max(len(buffer) - 22 - 0xFFFF, 0))
    if end_offset < 0:
        raise InvalidFile("not a zip archive, or cut short: its end is missing")
    record = ByteReader(buffer, end_offset).take(22)
    disk, first_disk, disk_count, count, size, offset, comment_length = struct.unpack("<4x4H2IH", record)
    if end_offset + 22 + comment_length != len(buffer):
        raise InvalidFile("bytes follow the end of the zip archive, or it is cut short")
    directory_end = end_offset
    if 0xFFFF in (disk_count, count) or 0xFFFFFFFF in (size, offset):
        locator = ByteReader(buffer, max(end_offset - 20, 0)).take(20)
        if not locator.startswith(_END64_LOCATOR):
            raise InvalidFile("zip64 archive without its end record")
        (directory_end,) = struct.unpack_from("<Q", locator, 8)
        record = ByteReader(buffer, directory_end).take(56)
        if not record.startswith(_END64):
            raise InvalidFile("zip64 archive without its end record")
        disk, first_disk, disk_count, count, size, offset = struct.unpack_from("<2I4Q", record, 16)
    if disk or first_disk or disk_count != count:
        raise InvalidFile("zip archive in several parts")
    if offset + size > directory_end:
        raise InvalidFile("the central directory of the zip archive lies outside it")
    return offset, size, count


def _central_entry(reader: ByteReader) -> tuple[str, int, int, bool]:
    """Return name, offset of the local header, size, and whether compressed, of the next directory entry."""
    entry = reader.take(46)
    if not entry.startswith(_CENTRAL):
        raise InvalidFile("damaged central directory of the zip archive")
    flags, method, packed, size, name_length, extra_length, comment_length, header = struct.unpack(
        "<4x4x2H8x2I3H8xI", entry
    )
    name = decode_text(reader.take(name_length))
    extra = reader.take(extra_length)
    reader.take(comment_length)
    zip64_values = _zip64_values(extra)
    sizes = {"size": size, "packed": packed, "header": header}
    for field, value in sizes.items():  # values over 32 bits are in the extra field, in this order
        if value == 0xFFFFFFFF:
            if not zip64_values:
                raise InvalidFile(f"zip member {name!r} has no zip64 {field}")
            sizes[field] = zip64_values.pop(0)
    if flags & _ENCRYPTED:
        raise InvalidFile(f"zip member {name!r} is encrypted")
    if method == 0 and sizes["size"] != sizes["packed"]:
        raise InvalidFile(f"zip member {name!r} is stored, but has two sizes")
    return name, sizes["header"], sizes["packed"], method != 0


def _zip64_values(extra: bytes) -> list[int]:
    """Return the 64-bit numbers of the zip64 extra field; [] if there is none."""
    reader = ByteReader(extra)
    while len(extra) - reader.position >= 4:
        kind, length = reader.unpack("<H"), reader.unpack("<H")
        field = reader.take(length)
        if kind == _ZIP64_EXTRA:
            return [value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
    return []


def _data_start(buffer: mmap.mmap, header: int, name: str, is_compressed: bool) -> int:
    """Return the offset of a member's bytes, and check its local header against the central directory."""
    reader = ByteReader(buffer, min(header, len(buffer)))
    method, name_length, extra_length = struct.unpack("<8xH16x2H", (local := reader.take(30)))
    if not local.startswith(_LOCAL) or decode_text(reader.take(name_length)) != name:
        raise InvalidFile(f"zip member {name!r} is not where the central directory says")
    if (method != 0) != is_compressed:
        raise InvalidFile(f"zip member {name!r} has two methods of compression")
    reader.take(extra_length)
    return reader.position
