"""Define inert stand-ins for the PyTorch globals (functions, storage types, dtypes) named in `.pth` pickles.

No name in a file is imported or called. Each name of a closed list maps to a token, and a call of a token
returns a plain value or the description of a tensor.
"""

import collections
import dataclasses
import enum

from var_jax.interop.byte_reader import InvalidFile

_MAX_COUNT = 1 << 48
_MAX_DIMENSIONS = 16
_MAX_DEVICE = 32  # characters of the name: the work limit of `unpickle` does not count text
_MAX_KEY = 1 << 53  # a file could choose larger ints with equal hashes


@dataclasses.dataclass(frozen=True, slots=True)
class ElementType:
    """Element type of a tensor, by its name in PyTorch (`float32`)."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Flat array in the file, or a part of it, that tensors are views of.

    Attributes:
      key: key of the array in the file.
      type: of its elements.
      total: number of elements of the array.
      start, count: first element and number of elements of the part; the full array, except in files of
        PyTorch before 0.4.
    """

    key: str
    type: ElementType
    total: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Description of a tensor as a strided view of a storage; offset and strides in elements of `type`."""

    storage: Storage
    type: ElementType
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Constructor(enum.Enum):
    """Callables that a file may name."""

    ORDERED_DICT = "collections.OrderedDict"
    SET = "set"
    SIZE = "torch.Size"
    DEVICE = "torch.device"
    TENSOR = "torch._utils._rebuild_tensor"
    TENSOR_V2 = "torch._utils._rebuild_tensor_v2"
    TENSOR_V3 = "torch._utils._rebuild_tensor_v3"
    PARAMETER = "torch._utils._rebuild_parameter"


_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_DTYPES = (*_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
GLOBALS = {
    "collections OrderedDict": Constructor.ORDERED_DICT,
    "builtins set": Constructor.SET,
    "__builtin__ set": Constructor.SET,
    "torch Size": Constructor.SIZE,
    "torch device": Constructor.DEVICE,
    "torch._utils _rebuild_tensor": Constructor.TENSOR,
    "torch._utils _rebuild_tensor_v2": Constructor.TENSOR_V2,
    "torch._utils _rebuild_tensor_v3": Constructor.TENSOR_V3,
    "torch._utils _rebuild_parameter": Constructor.PARAMETER,
    "torch.storage UntypedStorage": ElementType("uint8"),
    **{f"torch {name}": ElementType(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch {name}": ElementType(name) for name in _DTYPES},
}


def call_constructor(function: Constructor, arguments: tuple):
    """Return the value of a constructor call in a file, without calling PyTorch.

    Raises:
      InvalidFile: on arguments that `torch.save` does not write.
    """
    match function, arguments:
        case Constructor.ORDERED_DICT, ():
            return collections.OrderedDict()
        case Constructor.ORDERED_DICT, (list(pairs),) if all(type(p) is list and len(p) == 2 for p in pairs):
            return collections.OrderedDict((check_key(key), value) for key, value in pairs)  # Python 2
        case Constructor.SET, (list(items),):
            return set(map(check_key, items))
        case Constructor.SIZE, (tuple(sizes),) if len(sizes) <= _MAX_DIMENSIONS and _are_counts(*sizes):
            return sizes
        case Constructor.DEVICE, (str(kind), *index) if (
            len(kind) <= _MAX_DEVICE and len(index) < 2 and _are_counts(*index)
        ):
            return ":".join(map(str, (kind, *index)))
        case Constructor.PARAMETER, (Tensor() as tensor, _, _):
            return tensor
        case Constructor.TENSOR, (Storage() as storage, offset, sizes, strides):
            return _tensor(storage, storage.type, offset, sizes, strides)
        case Constructor.TENSOR_V2, (Storage() as storage, offset, sizes, strides, _, _, *_):
            return _tensor(storage, storage.type, offset, sizes, strides)
        case Constructor.TENSOR_V3, (Storage() as storage, offset, sizes, strides, _, _, ElementType(), *_):
            return _tensor(storage, arguments[6], offset, sizes, strides)
    raise InvalidFile(f"a call of {function.value} with other arguments than torch.save writes")


def _tensor(storage: Storage, kind: ElementType, offset, sizes, strides) -> Tensor:
    if type(sizes) is not tuple or type(strides) is not tuple or len(sizes) != len(strides):
        raise InvalidFile(f"a tensor of storage {storage.key!r} without shape and strides")
    if len(sizes) > _MAX_DIMENSIONS:
        raise InvalidFile(f"a tensor of {len(sizes)} dimensions; at most {_MAX_DIMENSIONS} are read")
    if not _are_counts(offset, *sizes, *strides):
        raise InvalidFile(f"a tensor of storage {storage.key!r} with an offset or a shape that is no count")
    return Tensor(storage, kind, offset, sizes, strides)


def parse_storage(persistent_id) -> Storage:
    """Return the storage, or part of one (before PyTorch 0.4), that a persistent id of a pickle describes.

    Raises:
      InvalidFile: if the id does not describe a storage.
    """
    match persistent_id:
        case ("storage", ElementType() as kind, str(key), _, total) if _are_counts(total):
            return Storage(key, kind, total, 0, total)
        case ("storage", ElementType() as kind, str(key), _, total, None) if _are_counts(total):
            return Storage(key, kind, total, 0, total)
        case ("storage", ElementType() as kind, str(key), _, total, (_, start, count)) if (
            _are_counts(total, start, count) and start + count <= total
        ):
            return Storage(key, kind, total, start, count)
    raise InvalidFile("a persistent id that does not describe a storage")


def _are_counts(*values) -> bool:
    return all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def check_key(value) -> str | int | None:
    """Check and return a dict key or set item: only types for which a file cannot choose colliding hashes.

    Raises:
      InvalidFile: on any other type.
    """
    if value is None or type(value) in (str, bool) or (type(value) is int and abs(value) <= _MAX_KEY):
        return value
    raise InvalidFile(f"a dict key that is a {type(value).__name__}, neither text nor a small int")
