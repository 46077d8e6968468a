"""Files of named tensors: `.pth` and `.safetensors`, not held whole in memory."""

import contextlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from var_jax.interop.pth import read_pth

SUFFIXES = (".pth", ".pt", ".safetensors")

# Where the published trainer keeps the networks in its own checkpoints.
TRAINER_NAMES = {"tokenizer": "vae_local", "next_scale": "var_wo_ddp"}

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_networks(path: str | Path) -> dict[str | None, Mapping[str, np.ndarray]]:
    """State dicts in a file of weights, tensors mapped from the file.

    Returns:
      {None: the state dict} of a file that holds one network; or, of a checkpoint of the published trainer,
      those of `tokenizer` and `next_scale` that it holds.

    Raises:
      FileNotFoundError: where there is no file.
      ValueError: naming the file and what was found in it instead.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return {None: _read_safetensors(path)}
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights must be a {' or '.join(SUFFIXES)} file, found {path.suffix!r}")
    content = read_pth(path)
    if isinstance(content, Mapping) and content and all(map(_is_tensor, content.values())):
        return {None: content}
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        content = content["trainer"]
    found = {}
    for kind, name in TRAINER_NAMES.items():
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            found[kind] = content[name]
    if not found or not all(_is_tensor(t) for network in found.values() for t in network.values()):
        raise ValueError(
            f"{path} holds no plain state dict (names to tensors), and none under trainer/ named "
            f"{' or '.join(TRAINER_NAMES.values())}"
        )
    return found


def read_tensors(path: str | Path, kind: str) -> Mapping[str, np.ndarray]:
    """The state dict of a file; of a `tokenizer` or `next_scale` if it holds both.

    Errors as for `read_networks`.
    """
    networks = read_networks(path)
    if None in networks:
        return networks[None]
    if kind not in networks:
        raise ValueError(f"{path} holds {', '.join(networks)} of the published trainer, but no {kind}")
    return networks[kind]


def _is_tensor(value) -> bool:
    return isinstance(value, np.ndarray)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Named tensors of a `.safetensors` file, mapped from it."""
    try:
        with safe_open(path, framework="np"):  # the library checks the header and the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, which is not read")
        dtype, (start, end) = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), entry["data_offsets"]
        if start == end:
            tensors[name] = np.zeros(entry["shape"], dtype)
        else:
            tensors[name] = np.memmap(path, dtype, "r", 8 + length + start, tuple(entry["shape"]))
    return tensors


def release(tensor: np.ndarray) -> None:
    """Lets go of the memory of an array that is mapped from a file; used again, it is read again."""
    base = tensor
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None:
        base.madvise(mmap.MADV_DONTNEED)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple], tensors: Iterator[tuple[str, np.ndarray]], dtypes: Mapping
) -> None:
    """Writes tensors as they come, in any order; the file takes its name when it is complete.

    Args:
      path: of the file.
      shapes: of every tensor.
      tensors: names and tensors.
      dtypes: of those that are not float32.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header, offset = {}, 0
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
    with complete_or_absent(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors:
            entry = header.pop(name)
            if list(tensor.shape) != entry["shape"] or names[tensor.dtype] != entry["dtype"]:
                raise ValueError(f"{name} came as {tensor.dtype} {tensor.shape}, announced as {entry}")
            file.seek(8 + len(encoded) + entry["data_offsets"][0])
            file.write(np.ascontiguousarray(tensor).data)
        if header:
            raise ValueError(f"announced but not given: {', '.join(header)}")


def write_pth(path: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Writes a state dict as PyTorch does.

    Raises:
      ModuleNotFoundError: without PyTorch; says which extra brings it.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing .pth needs PyTorch: pip install -e '.[torch]', or write .safetensors"
        ) from error
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors}
    with complete_or_absent(path) as partial:
        torch.save(state, partial)


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all went well and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
