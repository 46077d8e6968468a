"""Inert stand-ins for the names of PyTorch that its files hold.

Files name functions, types of storages and dtypes. None of them is looked up here: each name of a closed list
stands for a token, and a call of a token yields a plain value or the description of a tensor.
"""

import collections
import dataclasses
import enum

from var_jax.interop.byte_reader import InvalidFile

_MAX_COUNT = 1 << 48
_MAX_DIMENSIONS = 16
_MAX_DEVICE = 32  # characters of its name: text is not counted as work
_MAX_KEY = 1 << 53  # larger ints can be chosen to have equal hashes


@dataclasses.dataclass(frozen=True, slots=True)
class ElementType:
    """The type of a tensor's elements, by its name in PyTorch (`float32`)."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """A flat array in the file that tensors are views of: elements `start` to `start + count` of it.

    Attributes:
      key: of the array in the file.
      type: of its elements.
      total: number of elements of the array.
      start, count: the part that is meant; the whole array, except in files of PyTorch before 0.4.
    """

    key: str
    type: ElementType
    total: int
    start: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as its strided view of a storage; offset and strides count elements of `type`."""

    storage: Storage
    type: ElementType
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Constructor(enum.Enum):
    """The callables that a file may name."""

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
    """Result of a call in the file.

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


def parse_storage(identity) -> Storage:
    """The storage that a persistent id describes; before PyTorch 0.4 it could be a part of another one.

    Raises:
      InvalidFile: if it describes anything else.
    """
    match identity:
        case ("storage", ElementType() as kind, str(key), _, total) if _are_counts(total):
            return Storage(key, kind, total, 0, total)
        case ("storage", ElementType() as kind, str(key), _, total, None) if _are_counts(total):
            return Storage(key, kind, total, 0, total)
        case ("storage", ElementType() as kind, str(key), _, total, (_, start, count)) if (
            _are_counts(total, start, count) and start + count <= total
        ):
            return Storage(key, kind, total, start, count)
    raise InvalidFile("a persistent id that is not that of a storage")


def _are_counts(*values) -> bool:
    return all(type(value) is int and 0 <= value <= _MAX_COUNT for value in values)


def check_key(value) -> str | int | None:
    """A key of a dict or an item of a set, of a type whose hash cannot be chosen at will.

    Raises:
      InvalidFile: on any other type.
    """
    if value is None or type(value) in (str, bool) or (type(value) is int and abs(value) <= _MAX_KEY):
        return value
    raise InvalidFile(f"a dict key that is a {type(value).__name__}, neither text nor a small int")
