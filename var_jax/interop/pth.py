"""Tensors of PyTorch's `.pth` files, without PyTorch, as views of one read-only mapping of the file.

`torch.save` writes a pickle that describes the tensors, and their bytes: since PyTorch 1.6 in a zip archive,
before that one after the other. Nothing in a file is run (see `unpickle`), and every offset and size is
checked against the file.
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
_MAX_EMPTY = 1 << 20  # product of the other sizes of a tensor that has a size of 0
_MAX_SHARING = 8  # bytes of all tensors over bytes of the file: several tensors may be views of one storage


def read_pth(path: str | Path) -> object:
    """Content of a file of `torch.save`, of any version since 0.1.10.

    Returns:
      The object that was saved: dicts, lists, tuples, sets, numbers, text and None as they were, tensors as
      read-only arrays mapped from the file, dtypes as `ElementType` and devices as text.

    Raises:
      ValueError: naming the file: if it is damaged, of another format, or holds anything else.
    """
    buffer = map_file(path)
    try:
        if buffer[:1] == pickle.PROTO:
            return _read_legacy(buffer)
        return _read_zip(buffer)
    except InvalidFile as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def map_file(path: str | Path) -> mmap.mmap | bytes:
    """The bytes of a file, mapped for reading through one descriptor."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""  # which cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_zip(buffer: mmap.mmap) -> object:
    """Content of a zip archive of PyTorch 1.6 or later."""
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
            "it is a TorchScript program. With PyTorch installed, take the tensors out of it: "
            "torch.save(torch.jit.load(old).state_dict(), new)"
        )
    if f"{root}byteorder" in members:
        order = _stored(members, f"{root}byteorder")
        if buffer[order.start : order.start + order.size] != b"little":
            raise InvalidFile(f"its numbers are not little-endian. {_REWRITE}")
    program = _stored(members, pickles[0])
    if program.size > MAX_PICKLE_BYTES:
        raise InvalidFile(f"its pickle has {program.size} bytes; at most {MAX_PICKLE_BYTES} are read")
    value, storages = unpickle(ByteReader(buffer, program.start, program.start + program.size))
    starts = {}
    for key, storage in storages.items():
        member = _stored(members, f"{root}data/{key}")
        if member.size < storage.total * _dtype(storage.type).itemsize:
            raise InvalidFile(
                f"member data/{key} does not hold {storage.total} elements of {storage.type.name}"
            )
        starts[key] = member.start
    return _arrays_for_tensors(value, buffer, starts)


def _stored(members: dict[str, Member], name: str) -> Member:
    """A member by name, whose bytes are in the file as they are."""
    if name not in members:
        raise InvalidFile(f"member {name!r} is missing")
    if members[name].is_compressed:
        raise InvalidFile(f"member {name!r} is compressed, which torch.save never does. {_REWRITE}")
    return members[name]


def _read_legacy(buffer: mmap.mmap) -> object:
    """Content of a file of PyTorch before 1.6: five pickles, then the storages in the order of the fifth."""
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
    reader, starts = ByteReader(buffer, reader.position), {}
    for key in keys:
        storage, count = storages[key], reader.unpack("<q")
        if count != storage.total or key in starts:
            raise InvalidFile(f"storage {key!r} has {count} elements, expected {storage.total}, once")
        starts[key] = reader.position
        reader.skip(count * _dtype(storage.type).itemsize)
    return _arrays_for_tensors(value, buffer, starts)


def _arrays_for_tensors(value, buffer: mmap.mmap, starts: dict[str, int]) -> object:
    """A copy of an unpickled value with arrays in place of its tensors.

    Args:
      value: of `unpickle`.
      buffer: the file.
      starts: offset in the file of every storage.

    Raises:
      InvalidFile: if a tensor reaches outside its storage, or a container is nested deeply or in itself.
    """
    return _Copier(buffer, starts).copy(value)[0]


class _Copier:
    """Copies nested containers; what several places share is copied once and stays shared."""

    def __init__(self, buffer: mmap.mmap, starts: dict[str, int]):
        self._buffer, self._starts = buffer, starts
        self._bytes_left = _MAX_SHARING * len(buffer)
        self._copies: dict[int, tuple[object, int] | None] = {}  # by id; None while a copy is being made

    def copy(self, value, level: int = 0) -> tuple[object, int]:
        """A copy of a value at some level of nesting, and how many levels it has itself."""
        if not isinstance(value, dict | list | tuple | Tensor):
            return value, 0
        if id(value) not in self._copies:
            self._copies[id(value)] = None
            self._copies[id(value)] = self._new_copy(value, level)
        if (known := self._copies[id(value)]) is None:
            raise InvalidFile("a container that holds itself")
        return known

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
        """A tensor as a read-only view of the file."""
        storage, dtype, itemsize = tensor.storage, _dtype(tensor.type), _dtype(tensor.storage.type).itemsize
        count, available = math.prod(tensor.sizes), storage.count * itemsize // dtype.itemsize
        if not count:
            return empty_array(tensor.sizes, dtype)
        steps = zip(tensor.sizes, tensor.strides, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        if last >= available or count > available:
            raise InvalidFile(
                f"a tensor of shape {tensor.sizes} with strides {tensor.strides} reaches outside its storage "
                f"{storage.key!r} of {available} elements, or repeats them"
            )
        self._bytes_left -= count * dtype.itemsize
        if self._bytes_left < 0:
            raise InvalidFile(f"its tensors have more than {_MAX_SHARING} times as many bytes as the file")
        offset = self._starts[storage.key] + storage.start * itemsize + tensor.offset * dtype.itemsize
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.ndarray(tensor.sizes, dtype, self._buffer, offset, strides)


def empty_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of no elements, whose other sizes numpy could refuse if they were larger."""
    if math.prod(size for size in shape if size) > _MAX_EMPTY:
        raise InvalidFile(f"an empty tensor of shape {shape}")
    return np.zeros(shape, dtype)


def _dtype(kind: ElementType) -> np.dtype:
    return np.dtype(DTYPES[kind.name])
