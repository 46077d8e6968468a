"""Read PyTorch `.pth` files without PyTorch, with tensors as read-only memory-mapped arrays.

`torch.save` writes a pickle that describes the tensors, and their bytes: since PyTorch 1.6 as members of a
zip archive, before that one after another. No code in a file is executed (see `unpickle`), and every offset
and size is checked against the file.
"""

import math
import mmap
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np

from var_jax.interop.byte_reader import ByteReader, InvalidFile
from var_jax.interop.torch_globals import ElementType, Tensor
from var_jax.interop.unpickle import MAX_PICKLE_BYTES, unpickle
from var_jax.interop.zip_members import Member, zip_members

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_REWRITE = "With PyTorch installed, write the file again: torch.save(torch.load(old, weights_only=True), new)"
_MAX_DEPTH = 32
_MAX_EMPTY = 1 << 20  # bound on the product of the nonzero sizes of a tensor without elements
_MAX_SHARING = 8  # bound on bytes of all tensors / bytes of the file: tensors may share a storage


def read_pth(path: str | Path) -> object:
    """Read the object saved in a file of `torch.save`, of any version since 0.1.10.

    Returns:
      The saved object: dicts, lists, tuples, sets, numbers, text and None unchanged, tensors as read-only
      arrays mapped from the file, dtypes as `ElementType`, and devices as text.

    Raises:
      ValueError: if the file is damaged, of another format, or holds anything else; the message names it.
    """
    buffer = map_file(path)
    try:
        reject_placeholder(buffer)
        if buffer[:1] == pickle.PROTO:
            return _read_legacy(buffer)
        return _read_zip(buffer)
    except InvalidFile as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def map_file(path: str | Path) -> mmap.mmap | bytes:
    """Return a read-only memory map of a file; b"" if it is empty."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def reject_placeholder(buffer: mmap.mmap | bytes) -> None:
    """Raise InvalidFile if a download is not the file itself, but a Git LFS pointer or a web page."""
    start = buffer[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise InvalidFile("it is a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned")
    if start.startswith((b"<!doctype html", b"<html")):
        raise InvalidFile("it is a web page (HTML), not the weights: download the file that it links to")


def _read_zip(buffer: mmap.mmap) -> object:
    """Read the object saved in a zip archive of PyTorch 1.6 or later."""
    if buffer[257:262] == b"ustar":
        raise InvalidFile(
            "it is a tar archive of PyTorch before 0.1.10. With PyTorch installed, convert it: "
            "torch.save(torch.load(old, weights_only=False), new); that may run any code in the file"
        )
    members = zip_members(buffer)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InvalidFile("it is a zip archive, but not one that torch.save writes")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise InvalidFile(
            "it is a TorchScript program. With PyTorch installed, extract its tensors: "
            "torch.save(torch.jit.load(old).state_dict(), new)"
        )
    if f"{root}byteorder" in members:
        order = _uncompressed_member(members, f"{root}byteorder")
        if buffer[order.start : order.start + order.size] != b"little":
            raise InvalidFile(f"its numbers are not little-endian. {_REWRITE}")
    program = _uncompressed_member(members, pickles[0])
    if program.size > MAX_PICKLE_BYTES:
        raise InvalidFile(f"its pickle has {program.size} bytes; at most {MAX_PICKLE_BYTES} are read")
    value, storages = unpickle(ByteReader(buffer, program.start, program.start + program.size))
    starts = {}
    for key, storage in storages.items():
        member = _uncompressed_member(members, f"{root}data/{key}")
        if member.size < storage.total * _dtype(storage.type).itemsize:
            raise InvalidFile(
                f"member data/{key} does not hold {storage.total} elements of {storage.type.name}"
            )
        starts[key] = member.start
    return _arrays_for_tensors(value, buffer, starts)


def _uncompressed_member(members: dict[str, Member], name: str) -> Member:
    """Return a member by name, which must be stored uncompressed."""
    if name not in members:
        raise InvalidFile(f"member {name!r} is missing")
    if members[name].is_compressed:
        raise InvalidFile(f"member {name!r} is compressed, which torch.save never does. {_REWRITE}")
    return members[name]


def _read_legacy(buffer: mmap.mmap) -> object:
    """Read the object saved by PyTorch before 1.6: five pickles then the storages."""
    # The pickles: magic number, protocol, system information, the object, and the keys of the storages.
    reader = ByteReader(buffer, 0, min(len(buffer), MAX_PICKLE_BYTES))
    for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        if unpickle(reader)[0] != expected:
            raise InvalidFile("it is a pickle, but not one that torch.save writes")
    system, _ = unpickle(reader)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise InvalidFile(f"its numbers are not little-endian. {_REWRITE}")
    value, storages = unpickle(reader)
    keys, _ = unpickle(reader)
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
        raise InvalidFile("its list of storages is not that of its tensors")
    reader = ByteReader(buffer, reader.position)
    starts = {}
    for key in keys:
        storage = storages[key]
        count = reader.unpack("<q")
        if count != storage.total or key in starts:
            raise InvalidFile(f"storage {key!r} has {count} elements, expected {storage.total}, once")
        starts[key] = reader.position
        reader.skip(count * _dtype(storage.type).itemsize)
    return _arrays_for_tensors(value, buffer, starts)


def _arrays_for_tensors(value, buffer: mmap.mmap, starts: dict[str, int]) -> object:
    """Return a copy of an unpickled value with arrays in place of its tensors.

    Args:
      value: returned by `unpickle`.
      buffer: the file.
      starts: offset in the file of every storage, by key.

    Raises:
      InvalidFile: if a tensor reaches outside its storage, or a container is nested too deeply or in itself.
    """
    return _Copier(buffer, starts).copy(value)[0]


class _Copier:
    """Copier of nested containers that keeps shared references shared."""

    def __init__(self, buffer: mmap.mmap, starts: dict[str, int]):
        self._buffer = buffer
        self._starts = starts
        self._bytes_left = _MAX_SHARING * len(buffer)
        self._copies: dict[int, tuple[object, int] | None] = {}  # by id; None while a copy is being made

    def copy(self, value, level: int = 0) -> tuple[object, int]:
        """Return a copy of a value at a level of nesting, and the number of levels in the value."""
        if not isinstance(value, dict | list | tuple | Tensor):
            return value, 0
        if id(value) not in self._copies:
            self._copies[id(value)] = None
            self._copies[id(value)] = self._new_copy(value, level)
        if (result := self._copies[id(value)]) is None:
            raise InvalidFile("a container that holds itself")
        return result

    def _new_copy(self, value, level: int) -> tuple[object, int]:
        if isinstance(value, Tensor):
            return self._array(value), 0
        children = list(value.values() if isinstance(value, dict) else value)
        if level < _MAX_DEPTH:
            children = [self.copy(child, level + 1) for child in children]
            depth = 1 + max((depth for _, depth in children), default=0)
        if level >= _MAX_DEPTH or depth > _MAX_DEPTH:
            raise InvalidFile(f"containers are nested more than {_MAX_DEPTH} deep")
        children = [child for child, _ in children]
        return type(value)(zip(value, children, strict=True) if isinstance(value, dict) else children), depth

    def _array(self, tensor: Tensor) -> np.ndarray:
        """Return a tensor as a read-only view of the file."""
        storage, dtype = tensor.storage, _dtype(tensor.type)
        storage_itemsize = _dtype(storage.type).itemsize
        count = math.prod(tensor.sizes)
        available = storage.count * storage_itemsize // dtype.itemsize
        if not count:
            return empty_array(tensor.sizes, dtype)
        axes = zip(tensor.sizes, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in axes)
        if last >= available or count > available:
            raise InvalidFile(
                f"a tensor of shape {tensor.sizes} with strides {tensor.strides} reaches outside its storage "
                f"{storage.key!r} of {available} elements, or repeats them"
            )
        self._bytes_left -= count * dtype.itemsize
        if self._bytes_left < 0:
            raise InvalidFile(f"its tensors have more than {_MAX_SHARING} times as many bytes as the file")
        offset = self._starts[storage.key] + storage.start * storage_itemsize + tensor.offset * dtype.itemsize
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.ndarray(tensor.sizes, dtype, self._buffer, offset, strides)


def empty_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array without elements; reject shapes whose nonzero sizes are too large for numpy."""
    if math.prod(size for size in shape if size) > _MAX_EMPTY:
        raise InvalidFile(f"an empty tensor of shape {shape}")
    return np.zeros(shape, dtype)


def _dtype(kind: ElementType) -> np.dtype:
    return np.dtype(DTYPES[kind.name])
