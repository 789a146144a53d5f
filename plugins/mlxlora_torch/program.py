"""What the pickle inside a ``.pth`` says, found out without running it.

``torch.save`` writes a table of tensors as a pickle: a small program for a
stack machine that can name any function of any module and call it. The machine
here knows only the instructions that a dict of tensors needs. It imports
nothing and calls nothing: the few globals that stand for tensors are names to
it, and any other global, or any other call, ends the reading. torch sees a
file only after this machine has come to its end.

Instructions: the Python standard library's ``pickletools``.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, SafetyError, listing

#: torch's name for the elements of a storage -> dtype
_STORAGES = {
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "untyped",
}
#: dtypes that have no storage class of their own; they come with _rebuild_tensor_v3
_DTYPES = {
    "torch.float16": "float16",
    "torch.bfloat16": "bfloat16",
    "torch.float32": "float32",
    "torch.uint16": "uint16",
    "torch.uint32": "uint32",
    "torch.uint64": "uint64",
    "torch.complex32": "complex32",
    "torch.float8_e4m3fn": "float8_e4m3fn",
    "torch.float8_e4m3fnuz": "float8_e4m3fnuz",
    "torch.float8_e5m2": "float8_e5m2",
    "torch.float8_e5m2fnuz": "float8_e5m2fnuz",
    "torch.float8_e8m0fnu": "float8_e8m0fnu",
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR, _TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {*_STORAGES, *_DTYPES, _ORDERED_DICT, _TENSOR, _TENSOR_OF_DTYPE, _PARAMETER}

#: the protocol of torch.save, and the only one that torch's safe reader is made for
PROTOCOL = 2


@dataclass(frozen=True)
class Storage:
    """A run of elements in the archive.

    Attributes:
        key: its name there: the bytes are in member ``data/KEY``.
        dtype: of its elements; ``untyped`` when they are bytes.
        elements: how many the program says there are.
    """

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage: element (i, j) is at ``offset + i * stride[0] + j * stride[1]``.

    Attributes:
        storage: where the elements are.
        dtype: of the elements.
        offset: of the first element, in elements.
        shape: dimensions.
        stride: elements from one to the next along each dimension.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last, both included."""
        if not self.elements:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def read_program(program: bytes, where: Path) -> dict[str, StoredTensor]:
    """The tensors that a pickle written by ``torch.save`` describes.

    Raises:
        SafetyError: it names or does something that no table of tensors needs.
        ModelError: it is damaged, or is something else than a dict of tensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickletools minds odd escapes in names
        table = _Machine(where).run(program)
    if not isinstance(table, dict):
        raise ModelError(f"holds {_kind(table)}, wanted a dict of tensors", where=where, fix=_RESAVE)
    other = [
        f"{name!r} is {_kind(value)}"
        for name, value in table.items()
        if not (isinstance(name, str) and isinstance(value, StoredTensor))
    ]
    if other:
        raise ModelError(f"holds more than named tensors: {listing(other)}", where=where, fix=_RESAVE)
    if not table:
        raise ModelError("holds no tensor", where=where)
    return table


_RESAVE = "save the tensors alone, as one dict: torch.save(model.state_dict(), path)"


@dataclass(frozen=True)
class _Global:
    """``module.name``, which is never looked up."""

    name: str


class _Damaged(Exception):
    """An instruction that does not fit what is on the stack."""


class _Machine:
    """Runs a pickle on inert values: numbers, strings, tuples, lists, dicts, :class:`StoredTensor`."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The value that the program leaves behind."""
        protocol = 0
        try:
            for name, argument in _instructions(program):
                if name == "PROTO":
                    protocol = argument
                elif name == "STOP":
                    break
                else:
                    self.step(name, argument)
            result = self.stack.pop()
        except (_Damaged, IndexError, KeyError) as fault:
            reason = fault if isinstance(fault, _Damaged) else "an instruction finds nothing to work on"
            raise ModelError(
                f"its table of tensors is damaged ({reason})",
                where=self.where,
                fix="download or save the file again",
            ) from None
        if protocol != PROTOCOL:
            raise ModelError(
                f"is written with pickle protocol {protocol}, wanted {PROTOCOL}",
                where=self.where,
                fix="save it again with torch.save(tensors, path), without pickle_protocol",
            )
        return result

    def step(self, name: str, argument: Any) -> None:
        """Do one instruction."""
        if name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif name in _LITERALS:
            self.push(argument)
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            what = f"{name} {argument}" if argument is not None else name
            raise self.refusal(f"uses pickle instruction {what}, which no table of tensors needs")

    def refusal(self, what: str) -> SafetyError:
        """The error for a file that wants more than to hold tensors."""
        return SafetyError(
            f"{what[:300]}: it could run code, so it was not loaded",
            where=self.where,
            fix="get the weights from a source that you trust, saved as plain tensors",
        )

    # --- values ---

    def mark(self, _: Any) -> None:
        """Set the stack aside until :meth:`since_mark`."""
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """Take what came after the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def take(self, count: int) -> list[Any]:
        """Take the top ``count`` values, lowest first."""
        if len(self.stack) < count:
            raise _Damaged("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def remember(self, index: int) -> None:
        """Keep the top value under ``index``."""
        self.memo[index] = self.stack[-1]

    def add_items(self, items: list[Any]) -> None:
        """Put key, value, key, value … into the dict on top."""
        table = self.top(dict)
        if len(items) % 2:
            raise _Damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A key made of nested tuples could exhaust the C stack when it is hashed.
            if not isinstance(key, (str, int)):
                raise _Damaged(f"a key is {_kind(key)}")
            table[key] = value

    def append(self, items: list[Any]) -> None:
        """Put items at the end of the list on top."""
        self.top(list).extend(items)

    def top(self, kind: type[Any]) -> Any:
        """The top value, which must be of one kind."""
        if not isinstance(self.stack[-1], kind):
            raise _Damaged(f"found {_kind(self.stack[-1])}, wanted {kind.__name__}")
        return self.stack[-1]

    # --- what could do harm ---

    def find(self, name: str) -> None:
        """Push a global by its full name, if it stands for a part of a tensor."""
        if name not in _GLOBALS:
            raise self.refusal(f"its pickle asks for {name}")
        self.stack.append(_Global(name))

    def find_on_stack(self, _: Any) -> None:
        """Push the global whose module and name are the two top values."""
        module, name = self.take(2)
        self.find(
            f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a computed name"
        )

    def call(self, _: Any) -> None:
        """Do what calling one of the known globals would do, on inert values."""
        function, arguments = self.take(2)
        name = function.name if isinstance(function, _Global) else _kind(function)
        if not isinstance(arguments, tuple):
            raise _Damaged("a call has no arguments")
        if name == _ORDERED_DICT and not arguments:
            self.stack.append({})
        elif name == _TENSOR and len(arguments) == 6:
            self.stack.append(_tensor(*arguments[:4], None))
        elif name == _TENSOR_OF_DTYPE and len(arguments) == 7:
            self.stack.append(_tensor(*arguments[:4], arguments[6]))
        elif name == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], StoredTensor):
            self.stack.append(arguments[0])
        elif name in (_ORDERED_DICT, _TENSOR, _TENSOR_OF_DTYPE, _PARAMETER):
            raise _Damaged(f"{name} with unknown arguments")
        else:
            raise self.refusal(f"its pickle calls {name}")

    def set_state(self, _: Any) -> None:
        """Forget the attributes of an ordered dict, such as the versions in a state_dict."""
        (state,) = self.take(1)
        if not isinstance(state, dict) or not isinstance(self.stack[-1], dict):
            raise self.refusal(f"its pickle sets the state of {_kind(self.stack[-1])}")

    def load_storage(self, _: Any) -> None:
        """Push the storage that ``("storage", class, key, device, elements)`` names."""
        (handle,) = self.take(1)
        match handle:
            case ("storage", _Global(name), str(key), str(), int(elements)) if (
                name in _STORAGES and elements >= 0
            ):
                self.stack.append(Storage(key, _STORAGES[name], elements))
            case _:
                raise _Damaged("a storage has no proper name")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    # torch.save does not write these; to go on behind them finds the global that they are handed to.
    *("INT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
_ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.take(3))),
    "SETITEM": lambda machine, _: machine.add_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.add_items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "BINPUT": lambda machine, index: machine.remember(index),
    "LONG_BINPUT": lambda machine, index: machine.remember(index),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "GLOBAL": lambda machine, name: machine.find(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.load_storage,
}


def _instructions(program: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each instruction, as far as they can be read."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            yield opcode.name, argument
    except (ValueError, IndexError) as fault:
        raise _Damaged(str(fault)) from None


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> StoredTensor:
    """The view that torch would rebuild from these arguments."""
    if dtype is not None:
        dtype = _DTYPES.get(dtype.name) if isinstance(dtype, _Global) else None
    elif isinstance(storage, Storage) and storage.dtype != "untyped":
        dtype = storage.dtype
    good = (
        isinstance(storage, Storage)
        and isinstance(dtype, str)
        and all(_whole(values) for values in ((offset,), shape, stride))
        and len(shape) == len(stride)
    )
    if not good:
        raise _Damaged("a tensor has no proper shape, stride or dtype")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _whole(values: Any) -> bool:
    """Whether ``values`` is a tuple of whole numbers that are not negative."""
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


def _kind(value: Any) -> str:
    """What a value is, in words."""
    words = {StoredTensor: "a tensor", dict: "a dict", list: "a list", tuple: "a tuple", str: "text"}
    return words.get(type(value), f"a value of type {type(value).__name__}")
