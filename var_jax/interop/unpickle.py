"""Interpret the pickles that `torch.save` writes without executing any code they name.

A pickle is a program that may call any function. This interpreter supports a closed list of instructions,
which build plain values; names of PyTorch become inert tokens (`torch_globals`), and tensors become
descriptions of their storages. All other instructions and names are rejected, and every length is checked
before memory is allocated for it.
"""

import collections
import pickle
import pickletools
from collections.abc import Callable

from var_jax.interop.byte_reader import ByteReader, InvalidFile, decode_text
from var_jax.interop.torch_globals import (
    GLOBALS,
    Constructor,
    Storage,
    call_constructor,
    check_key,
    parse_storage,
)

MAX_PICKLE_BYTES = 1 << 25  # of one pickle: 100 times a trainer checkpoint of d36
_MAX_WORK = 1 << 19  # instructions: 5 times a trainer checkpoint of d36
_MAX_STACK = 1 << 18
_MAX_MARKS = 64
_MAX_TEXT = 1 << 16


def unpickle(reader: ByteReader) -> tuple[object, dict[str, Storage]]:
    """Interpret the pickle at the position of a reader, and move the reader to its end.

    Returns:
      The unpickled value: dicts, lists, tuples, sets, numbers, text, None, `ElementType` and `Tensor`; and
      the storages that it refers to, by key. A container may contain itself.

    Raises:
      InvalidFile: on an instruction or name that `torch.save` does not write, or a number that is too large.
    """
    machine = _Machine(reader)
    while (opcode := reader.take(1)) != pickle.STOP:
        machine.spend(1)
        if opcode not in _ACTIONS:
            name = _OPCODE_NAMES.get(opcode, opcode)
            raise InvalidFile(f"pickle instruction {name}, which torch.save does not write for tensors")
        _ACTIONS[opcode](machine)
    return machine.pop(), machine.storages


class _Machine:
    """State of a pickle program: stack, marks and memo, with the instructions as methods."""

    def __init__(self, reader: ByteReader):
        self.reader = reader
        self.storages = {}
        self._stack, self._marks, self._memo = [], [], {}
        self._work_left = _MAX_WORK

    def spend(self, work: int) -> None:
        """Subtract from the work limit, which counts instructions and the arguments that a call copies."""
        self._work_left -= work
        if self._work_left < 0:
            raise InvalidFile(f"a pickle of more than {_MAX_WORK} instructions")

    def push(self, value) -> None:
        if len(self._stack) >= _MAX_STACK:
            raise InvalidFile(f"a pickle with more than {_MAX_STACK} values on its stack")
        self._stack.append(value)

    def pop(self):
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise InvalidFile("a pickle that takes from an empty stack")
        return self._stack.pop()

    def top(self, kinds: type | tuple[type, ...]):
        """Return the topmost value, which must be of one of these types."""
        self.push(value := self.pop())
        if type(value) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
            raise InvalidFile(f"a pickle that fills a {type(value).__name__}")
        return value

    def mark(self) -> None:
        if len(self._marks) >= _MAX_MARKS:
            raise InvalidFile(f"a pickle with more than {_MAX_MARKS} open marks")
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list:
        if not self._marks:
            raise InvalidFile("a pickle that lacks a mark")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def protocol(self) -> None:
        if not 2 <= (protocol := self.reader.unpack("<B")) <= 5:
            raise InvalidFile(f"a pickle of protocol {protocol}; torch.save writes 2 to 5")

    def text(self, length_layout: str) -> None:
        if (length := self.reader.unpack(length_layout)) > _MAX_TEXT:
            raise InvalidFile(f"a text of {length} bytes in the pickle; at most {_MAX_TEXT} are read")
        self.push(decode_text(self.reader.take(length)))

    def long(self) -> None:
        self.push(int.from_bytes(self.reader.take(self.reader.unpack("<B")), "little", signed=True))

    def make_tuple(self, length: int) -> None:
        values = [self.pop() for _ in range(length)]
        self.push(tuple(reversed(values)))

    def append(self, values: list) -> None:
        self.top(list).extend(values)

    def add(self, values: list) -> None:
        self.top(set).update(map(check_key, values))

    def set_items(self, values: list) -> None:
        if len(values) % 2:
            raise InvalidFile("a pickle with a key without a value")
        self.top((dict, collections.OrderedDict)).update(
            zip(map(check_key, values[::2]), values[1::2], strict=True)
        )

    def put(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self._memo[index] = value

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise InvalidFile(f"a pickle that recalls value {index}, which it has not stored")
        self.push(self._memo[index])

    def name(self, module: str, name: str) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise InvalidFile("a pickle whose global is not named by text")
        if f"{module} {name}" not in GLOBALS:
            raise InvalidFile(
                f"the file asks for {module[:100]}.{name[:100]}, which is not one of the globals that "
                "rebuild tensors; it is rejected, since loading it could run any code. If you trust it, load "
                "it with PyTorch and save only the state dict: torch.save(model.state_dict(), new)"
            )
        self.push(GLOBALS[f"{module} {name}"])

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def persistent(self) -> None:
        self.push(storage := parse_storage(self.pop()))
        first = self.storages.setdefault(storage.key, storage)
        if (first.type, first.total) != (storage.type, storage.total):
            raise InvalidFile(f"storage {storage.key!r} is described in two ways")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Constructor or type(arguments) is not tuple:
            raise InvalidFile(f"a pickle that calls a {type(function).__name__}")
        self.spend(len(arguments) + sum(len(value) for value in arguments if type(value) is list))
        self.push(call_constructor(function, arguments))

    def set_state(self) -> None:
        """Ignore attributes set on an OrderedDict: `_metadata` of a state dict, versions of its modules."""
        self.pop()
        self.top(collections.OrderedDict)


def _push_number(layout: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.reader.unpack(layout))


def _push_constant(value) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


_OPCODE_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: _Machine.protocol,
    pickle.FRAME: lambda m: m.reader.take(8),
    pickle.MARK: _Machine.mark,
    pickle.NONE: _push_constant(None),
    pickle.NEWTRUE: _push_constant(True),
    pickle.NEWFALSE: _push_constant(False),
    pickle.BININT: _push_number("<i"),
    pickle.BININT1: _push_number("<B"),
    pickle.BININT2: _push_number("<H"),
    pickle.BINFLOAT: _push_number(">d"),
    pickle.LONG1: _Machine.long,
    pickle.BINUNICODE: lambda m: m.text("<I"),
    pickle.SHORT_BINUNICODE: lambda m: m.text("<B"),
    pickle.BINSTRING: lambda m: m.text("<i"),
    pickle.SHORT_BINSTRING: lambda m: m.text("<B"),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_SET: lambda m: m.push(set()),
    pickle.EMPTY_TUPLE: _push_constant(()),
    pickle.TUPLE1: lambda m: m.make_tuple(1),
    pickle.TUPLE2: lambda m: m.make_tuple(2),
    pickle.TUPLE3: lambda m: m.make_tuple(3),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
    pickle.APPEND: lambda m: m.append([m.pop()]),
    pickle.APPENDS: lambda m: m.append(m.pop_to_mark()),
    pickle.ADDITEMS: lambda m: m.add(m.pop_to_mark()),
    pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_to_mark()),
    pickle.BINPUT: lambda m: m.put(m.reader.unpack("<B")),
    pickle.LONG_BINPUT: lambda m: m.put(m.reader.unpack("<I")),
    pickle.MEMOIZE: _Machine.memoize,
    pickle.BINGET: lambda m: m.get(m.reader.unpack("<B")),
    pickle.LONG_BINGET: lambda m: m.get(m.reader.unpack("<I")),
    pickle.GLOBAL: lambda m: m.name(m.reader.line(), m.reader.line()),
    pickle.STACK_GLOBAL: _Machine.stack_name,
    pickle.BINPERSID: _Machine.persistent,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.set_state,
}
