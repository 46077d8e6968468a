"""Read and write weight files (`.pth` and `.safetensors`) without loading them into memory at once."""

import contextlib
import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from var_jax.interop.byte_reader import ByteReader, InvalidFile, decode_text
from var_jax.interop.pth import empty_array, map_file, read_pth, reject_placeholder
from var_jax.paths import local_path

SUFFIXES = (".pth", ".pt", ".safetensors")

# Keys of the networks in checkpoints of the published trainer.
TRAINER_NAMES = {"tokenizer": "vae_local", "next_scale": "var_wo_ddp"}

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 1 << 23  # bytes, of about 60,000 tensors
_MAX_DIMENSIONS = 16
_MAX_NAME = 1024


def read_networks(path: str | Path) -> dict[str | None, Mapping[str, np.ndarray]]:
    """Read the state dicts in a weight file, with tensors memory-mapped from the file.

    Returns:
      {None: state dict} for a file of one network; for a checkpoint of the published trainer, the state
      dicts of `tokenizer` and `next_scale`, as far as it has them.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it holds no state dict; the message names the file and what it holds instead.
    """
    path = Path(local_path(path, "weights"))
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return {None: _read_safetensors(path)}
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights must be a {' or '.join(SUFFIXES)} file, got {path.suffix!r}")
    content = read_pth(path)
    if _is_state_dict(content):
        return {None: content}
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        content = content["trainer"]
    networks = {}
    for kind, name in TRAINER_NAMES.items():
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            networks[kind] = content[name]
    if not networks or not all(map(_is_state_dict, networks.values())):
        raise ValueError(
            f"{path} holds no plain state dict (names to tensors), and none under trainer/ named "
            f"{' or '.join(TRAINER_NAMES.values())}"
        )
    return networks


def read_tensors(path: str | Path, kind: str) -> Mapping[str, np.ndarray]:
    """Read the state dict of a weight file; from a checkpoint of the published trainer, that of `kind`.

    Args:
      path: of the file.
      kind: `tokenizer` or `next_scale`.

    Raises:
      FileNotFoundError, ValueError: as for `read_networks`, or if a trainer checkpoint has no such network.
    """
    networks = read_networks(path)
    if None in networks:
        return networks[None]
    if kind not in networks:
        raise ValueError(f"{path} holds {', '.join(networks)} of the published trainer, but no {kind}")
    return networks[kind]


def _is_state_dict(value) -> bool:
    """Return True if a value is a non-empty mapping of names to tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(type(name) is str and len(name) <= _MAX_NAME for name in value)
        and all(isinstance(tensor, np.ndarray) for tensor in value.values())
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the named tensors of a `.safetensors` file, memory-mapped.

    The format: https://huggingface.co/docs/safetensors. The file is opened and mapped once, so that the bytes
    that are checked are the bytes that are used.
    """
    buffer = map_file(path)
    try:
        reject_placeholder(buffer)
        return _parse_safetensors(buffer)
    except InvalidFile as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _parse_safetensors(buffer: mmap.mmap | bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a mapped `.safetensors` file as views; every byte must belong to one tensor."""
    reader = ByteReader(buffer)
    if (length := reader.unpack("<Q")) > _MAX_HEADER:
        raise InvalidFile(f"its header has {length} bytes; at most {_MAX_HEADER} are read")
    entries = _parse_header(reader.take(length))
    entries.pop("__metadata__", None)
    start = reader.position
    tensors, extents = {}, []
    for name, entry in entries.items():
        if len(name) > _MAX_NAME:
            raise InvalidFile(f"a tensor's name of {len(name)} characters; at most {_MAX_NAME} are read")
        dtype, shape, first, stop = _parse_entry(name, entry)
        if stop - first != math.prod(shape) * dtype.itemsize or start + stop > len(buffer):
            raise InvalidFile(
                f"{name} of shape {shape} does not have bytes {first} to {stop} of {len(buffer) - start}"
            )
        if first == stop:
            tensors[name] = empty_array(shape, dtype)
        else:
            tensors[name] = np.ndarray(shape, dtype, buffer, start + first)
        extents.append((first, stop))
    end = 0
    for first, stop in sorted(extents):
        if first != end:
            raise InvalidFile(f"tensors overlap, or leave a gap, at byte {first}")
        end = stop
    if start + end != len(buffer):
        raise InvalidFile(f"{len(buffer) - start - end} bytes follow the tensors")
    return tensors


def _parse_header(text: bytes) -> dict:
    """Parse the JSON header of a `.safetensors` file, rejecting duplicate names."""

    def unique(pairs: list[tuple]) -> dict:
        if len(fields := dict(pairs)) != len(pairs):
            raise InvalidFile("a name is there twice in its header")
        return fields

    try:
        header = json.loads(decode_text(text), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # an int of too many digits is a plain ValueError
        raise InvalidFile(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidFile("its header is not a JSON object")
    return header


def _parse_entry(name: str, entry) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Return dtype, shape, first byte and end byte (exclusive) of a tensor in the header."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, stop]}:
            if dtype not in _SAFETENSORS_DTYPES:
                raise InvalidFile(f"{name} has dtype {dtype}, which is not read")
            if len(shape) <= _MAX_DIMENSIONS and all(map(_is_count, (first, stop, *shape))):
                return np.dtype(_SAFETENSORS_DTYPES[dtype]), tuple(shape), first, stop
    raise InvalidFile(f"{name} has no dtype, shape and data_offsets, or invalid ones")


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def release(tensor: np.ndarray) -> None:
    """Free the resident pages of a memory-mapped array; the next access reads them from the file again."""
    base = tensor
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is None or not tensor.size:
        return
    start = tensor.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    last_offset = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    end = start + last_offset + tensor.itemsize
    start -= start % mmap.PAGESIZE  # also frees the pages shared with neighboring tensors
    base.madvise(mmap.MADV_DONTNEED, start, end - start)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple], tensors: Iterator[tuple[str, np.ndarray]], dtypes: Mapping
) -> None:
    """Write a `.safetensors` file atomically from a stream of tensors in any order.

    Args:
      path: of the file.
      shapes: shape of every tensor, by name.
      tensors: iterator of (name, tensor).
      dtypes: dtypes of the tensors that are not float32, by name.

    Raises:
      ValueError: if the tensors do not match `shapes` and `dtypes`.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header = {}
    offset = 0
    for name, shape in shapes.items():
        dtype = np.dtype(dtypes.get(name, np.float32))
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors:
            entry = header.pop(name)
            if list(tensor.shape) != entry["shape"] or names[tensor.dtype] != entry["dtype"]:
                raise ValueError(f"{name} is {tensor.dtype} {tensor.shape}, but was declared as {entry}")
            file.seek(8 + len(encoded) + entry["data_offsets"][0])
            file.write(
                np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
            )  # bfloat16 has no buffer of its own
        if header:
            raise ValueError(f"declared but not given: {', '.join(header)}")


def write_pth(path: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write a state dict as a `.pth` file with PyTorch, atomically.

    Raises:
      ModuleNotFoundError: if PyTorch is not installed; the message names the extra that installs it.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing .pth needs PyTorch: pip install -e '.[torch]', or write .safetensors"
        ) from error
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors}
    with atomic_path(path) as partial:
        torch.save(state, partial)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` on success, and remove it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
