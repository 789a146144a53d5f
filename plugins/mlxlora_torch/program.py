"""What the pickle inside a ``.pth`` says, found out without running it.

``torch.save`` writes a table of tensors as a pickle: a small program for a
stack machine that can name any function of any module and call it. It is
parsed once, by the machine here, which knows only the instructions that a dict
of tensors needs, imports nothing and calls nothing. torch never sees the
pickle: it gets the bytes of each tensor, mapped. Its own reader with
``weights_only`` runs no code either, as far as is known, but

- it believes numbers: ``bytearray(1 << 40)`` is allowed there, and takes the memory;
- a key made of many nested tuples ends the process;
- a mapped tensor may lie past its storage, over the next one, and no checksum is looked at;
- whatever else in this process told torch to be allowed, is allowed;
- its refusal is a page that recommends to load without care.

Instructions: the Python standard library's ``pickletools``.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, SafetyError

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
#: dtypes by their own names; those without a storage class come with _rebuild_tensor_v3
_DTYPES = {
    f"torch.{name}": name
    for name in (
        *("float16", "bfloat16", "float32", "uint16", "uint32", "uint64", "complex32", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        # as attributes of tensors, and beside them
        *("float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "complex128"),
    )
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR, _TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_PARAMETER_WITH_ATTRIBUTES = "torch._utils._rebuild_parameter_with_state"
_PARAMETERS = ((_PARAMETER, 3), (_PARAMETER_WITH_ATTRIBUTES, 4))
_TENSORS = (_TENSOR, _TENSOR_OF_DTYPE, _PARAMETER, _PARAMETER_WITH_ATTRIBUTES)
#: values that an attribute of a tensor, or an entry beside the tensors, may have; they are not used
_VALUES = ("torch.device", "torch.Size", "__builtin__.set", "builtins.set")
_CALLS = (_ORDERED_DICT, *_TENSORS, _WITH_ATTRIBUTES, *_VALUES)
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_GLOBALS = {*_STORAGES, *_DTYPES, *_CALLS, *_CLASSES}

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    # torch.save does not write these; to go on behind them finds the global that they are handed to.
    *("INT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
_PROTOCOL = 2  # of torch.save
_AXES = 32
_MOST_INSTRUCTIONS = 1_000_000  # some 30 a tensor, of which the largest models have a few thousand a file
#: what to do about a file that holds more, or other things, than plain tensors
RESAVE = (
    "save plain tensors: torch.save({k: v.detach().clone() for k, v in model.state_dict().items()}, path)"
)


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


def read_program(program: bytes, where: Path) -> Any:
    """What a pickle written by ``torch.save`` leaves behind, its tensors as :class:`StoredTensor`.

    Raises:
        SafetyError: it names or does something that no table of tensors needs.
        ModelError: it is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickletools minds odd escapes in names
        return _Machine(where).run(program)


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
            for count, (name, argument) in enumerate(_instructions(program)):
                if count == _MOST_INSTRUCTIONS:
                    raise _Damaged(f"it has more than {count} instructions")
                protocol = argument if name == "PROTO" else protocol
                self.step(name, argument)
            result = self.stack.pop()
        except (_Damaged, IndexError, KeyError) as fault:
            reason = fault if isinstance(fault, _Damaged) else "an instruction finds nothing to work on"
            raise ModelError(
                f"its table of tensors is damaged ({reason})",
                where=self.where,
                fix="download or save the file again",
            ) from None
        if protocol != _PROTOCOL:
            raise ModelError(
                f"is written with pickle protocol {protocol}, wanted {_PROTOCOL}",
                where=self.where,
                fix="save it again with torch.save(tensors, path), without pickle_protocol",
            )
        return result

    def step(self, name: str, argument: Any) -> None:
        """Do one instruction."""
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "TUPLE":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.take(int(name[-1]))))
            case "SETITEM" | "SETITEMS":
                self.add_items(self.take(2) if name == "SETITEM" else self.since_mark())
            case "APPEND" | "APPENDS":
                items = self.take(1) if name == "APPEND" else self.since_mark()
                self.top(list).extend(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                self.find(argument.replace(" ", ".", 1) if argument else self.name_on_stack())
            case "REDUCE":
                self.call(*self.take(2))
            case "BUILD":
                self.set_state(*self.take(1))
            case "BINPERSID":
                self.load_storage(*self.take(1))
            case _ if name in _CONSTANTS or name in _LITERALS:
                self.stack.append(_CONSTANTS.get(name, argument))
            case _:
                what = f"{name} {argument}" if argument is not None else name
                raise self.refusal(f"uses pickle instruction {what}, which no table of tensors needs")

    def refusal(self, what: str) -> SafetyError:
        """The error for a file that wants more than to hold tensors."""
        return SafetyError(
            f"{what[:300]}: it could run code, so it was not loaded",
            where=self.where,
            fix=f"get the weights from a source that you trust, or {RESAVE}",
        )

    # --- values ---

    def since_mark(self) -> list[Any]:
        """Take what came after the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> list[Any]:
        """Take the top ``count`` values, lowest first."""
        if len(self.stack) < count:
            raise _Damaged("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def top(self, kind: type[Any]) -> Any:
        """The top value, which must be of one kind."""
        if not isinstance(self.stack[-1], kind):
            raise _Damaged(f"found {kind_of(self.stack[-1])}, wanted {kind.__name__}")
        return self.stack[-1]

    def add_items(self, items: list[Any]) -> None:
        """Put key, value, key, value … into the dict on top."""
        table = self.top(dict)
        if len(items) % 2:
            raise _Damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A key made of nested tuples could exhaust the C stack when it is hashed.
            if not isinstance(key, (str, int)):
                raise _Damaged(f"a key is {kind_of(key)}")
            table[key] = value

    # --- what could do harm ---

    def name_on_stack(self) -> str:
        """The global whose module and name are the two top values."""
        module, name = self.take(2)
        return f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a computed name"

    def find(self, name: str) -> None:
        """Push a global by its full name, if it stands for a part of a tensor."""
        if name not in _GLOBALS:
            raise self.refusal(f"its pickle asks for {name}")
        self.stack.append(_Global(name))

    def call(self, function: Any, arguments: Any) -> None:
        """Do what calling one of the known globals would do, on inert values."""
        name = function.name if isinstance(function, _Global) else kind_of(function)
        if not isinstance(arguments, tuple):
            raise _Damaged("a call has no arguments")
        if name not in _CALLS:
            raise self.refusal(f"its pickle calls {name}")
        if name == _WITH_ATTRIBUTES:  # function, type, its arguments, attributes: these are forgotten
            name, given = _without_attributes(arguments)
        else:
            given = arguments
        self.stack.append(self.made(name, given))

    def made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What a known global gives for these arguments."""
        if name == _ORDERED_DICT and not arguments:
            return {}
        if name in _VALUES:
            return arguments
        match name, arguments:
            case (n, (storage, offset, shape, stride, _, _)) if n == _TENSOR:
                return _tensor(storage, offset, shape, stride, None)
            case (n, (storage, offset, shape, stride, _, _, dtype)) if n == _TENSOR_OF_DTYPE:
                return _tensor(storage, offset, shape, stride, dtype)
            case (n, (StoredTensor() as tensor, *rest)) if (n, 1 + len(rest)) in _PARAMETERS:
                return tensor
        raise _Damaged(f"{name} with unknown arguments")

    def set_state(self, state: Any) -> None:
        """Forget the attributes of an ordered dict, such as the versions in a state_dict."""
        if not isinstance(state, dict) or not isinstance(self.stack[-1], dict):
            raise self.refusal(f"its pickle sets the state of {kind_of(self.stack[-1])}")

    def load_storage(self, handle: Any) -> None:
        """Push the storage that ``("storage", class, key, device, elements)`` names."""
        match handle:
            case ("storage", _Global(name), str(key), str(), elements) if name in _STORAGES and _whole(
                (elements,)
            ):
                self.stack.append(Storage(key, _STORAGES[name], elements))
            case _:
                raise _Damaged("a storage has no proper name")


def _instructions(program: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each instruction, as far as they can be read."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            yield opcode.name, argument
    except (ValueError, IndexError) as fault:
        raise _Damaged(str(fault)) from None


def _without_attributes(arguments: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """The call that rebuilds a tensor without the attributes that were set on it, as name and arguments."""
    match arguments:
        case (_Global(name), _Global(kind), tuple(inner), _) if name in _TENSORS and kind in _CLASSES:
            return name, inner
        case _:
            raise _Damaged(f"{_WITH_ATTRIBUTES} with unknown arguments")


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
        and len(shape) == len(stride) <= _AXES
    )
    if not good:
        raise _Damaged("a tensor has no proper shape, stride or dtype")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _whole(values: Any) -> bool:
    """Whether ``values`` is a tuple of whole numbers of 0 and more that a size can be."""
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    words = {StoredTensor: "a tensor", dict: "a dict", list: "a list", tuple: "a tuple", str: "text"}
    return words.get(type(value), f"a value of type {type(value).__name__}")
