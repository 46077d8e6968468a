"""Reading tensors from PyTorch `.pth` files without PyTorch.

A `.pth` file is a zip archive: a pickle that says how tensors are laid out, and their bytes.  A
pickle can name any function of any module to be called on loading; the few that rebuild tensors are
allowed here, and every other one is refused before anything runs.
"""

import collections
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def _rebuild_tensor(storage, offset, size, stride, *_):
    """A view of a flat storage; refuses strides that reach past its end."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if offset < 0 or min(stride, default=0) < 0 or last >= storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} reaches outside its storage")
    byte_strides = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, byte_strides, writeable=False)


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, load_storage):
        super().__init__(file)
        self._load_storage = load_storage

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which is not one of the globals that rebuild "
                "tensors; refused, since loading it could run any code"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return self._load_storage(str(key), dtype, count)


def read_pth(path: str | Path) -> dict:
    """What `torch.load` would give, tensors as read-only numpy arrays mapped from the file.

    Raises:
      ValueError: if the file is no zip archive of PyTorch, is damaged, or names another global.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path} is a zip archive, but not one that torch.save writes")
            root = pickles[0].removesuffix("data.pkl")

            def load_storage(key, dtype, count):
                return _map_entry(path, archive.getinfo(f"{root}data/{key}"), dtype, count)

            with archive.open(pickles[0]) as file:
                return _Unpickler(file, load_storage).load()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is not a zip archive (PyTorch's format since 1.6), or is cut short: {error}"
        ) from error
    except (pickle.UnpicklingError, KeyError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _map_entry(path, info: zipfile.ZipInfo, dtype: np.dtype, count: int) -> np.ndarray:
    """The bytes of a stored (uncompressed) archive member as an array mapped from the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
        raise pickle.UnpicklingError(f"member {info.filename} does not hold {count} x {dtype}")
    if count == 0:
        return np.zeros(0, dtype)
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", file.read(30))
    offset = info.header_offset + 30 + name_length + extra_length
    return np.memmap(path, dtype, "r", offset, shape=(count,))
