"""Write well-formed and malformed pickles and `.pth` files without PyTorch."""

import collections
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
}
PROTOCOL, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def global_(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


ORDERED_DICT = call(global_("collections", "OrderedDict"))


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    """Return the instructions that push a storage by its persistent id."""
    return tuple_of(text("storage"), global_("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(base: bytes, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """Return the instructions that push a tensor, a view of the storage that `base` pushes."""
    shape = (tuple_of(*map(number, sizes)), tuple_of(*map(number, strides)))
    return call(
        global_("torch._utils", "_rebuild_tensor_v2"), base, number(offset), *shape, b"\x89", ORDERED_DICT
    )


def dict_of(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def write_zip(
    path: Path, pickled: bytes, storages: Mapping[str, bytes] = {}, compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write a zip archive in the layout of `torch.save`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def save(path: Path, value) -> Path:
    """Write nested dicts, lists and tuples of arrays, numbers and text like the current `torch.save`."""
    pickled, arrays = _dump(value, is_legacy=False)
    return write_zip(path, pickled, {key: array.tobytes() for key, array in arrays.items()})


def save_legacy(path: Path, value) -> Path:
    """Write such a value like `torch.save` before PyTorch 1.6."""
    pickled, arrays = _dump(value, is_legacy=True)
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    with open(path, "wb") as file:
        file.write(b"".join(_dump(part, is_legacy=True)[0] for part in header))
        file.write(pickled + _dump(list(arrays), is_legacy=True)[0])
        for array in arrays.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())
    return path


def _dump(value, is_legacy: bool) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return the pickle of a value, and its arrays by the keys of their storages."""
    arrays = {}

    def pickled(value) -> bytes:
        if isinstance(value, np.ndarray):
            key = str(len(arrays))
            arrays[key] = value = np.asarray(value, order="C")
            strides = tuple(stride // value.itemsize for stride in value.strides)
            base = storage(key, value.size, STORAGES[value.dtype.name])
            if is_legacy:
                base = base.replace(b"tQ", b"NtQ")  # None: not a view of another storage
            return tensor(base, 0, value.shape, strides)
        if isinstance(value, Mapping):
            empty = ORDERED_DICT if isinstance(value, collections.OrderedDict) else b"}"
            return empty + b"(" + b"".join(pickled(k) + pickled(v) for k, v in value.items()) + b"u"
        if isinstance(value, list | tuple):
            parts = b"(" + b"".join(map(pickled, value))
            return parts + b"t" if isinstance(value, tuple) else b"]" + parts + b"e"
        if isinstance(value, str):
            return text(value)
        if isinstance(value, bool | None):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        return number(value) if isinstance(value, int) else b"G" + struct.pack(">d", value)

    return PROTOCOL + pickled(value) + STOP, arrays
