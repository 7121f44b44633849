"""Reads the pickles inside files of `torch.save` without running them, into plain values and references to tensors.

A pickle is a program. This is an interpreter of its own for the few opcodes that `torch.save` writes: names in the
pickle never become Python objects, nothing in it is ever called, and every other opcode or name is refused.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from marlin_cli.errors import CheckpointError
from marlin_cli.text import one_line

# The widest whole number that anything in a checkpoint needs; longer ones only make work.
MAX_INTEGER_BITS = 128

# Opcodes of a state dict: some 32 a tensor, so that these are enough for 12,000. Each costs time and memory.
MAX_OPCODES = 400_000

# Entries of a shape, strides, or a storage's description: tuples that a few bytes can name again and again.
MAX_ENTRIES = 64


@dataclass(frozen=True)
class Name:
    """A name that the pickle refers to. It stays a name."""

    module: str
    name: str


@dataclass(frozen=True)
class StorageReference:
    """A run of elements that lies elsewhere in the file."""

    kind: str  # torch's class, for example FloatStorage
    key: str
    elements: int


@dataclass(frozen=True)
class TensorReference:
    """A strided view of a storage, counted in elements; nothing has been read yet."""

    storage: StorageReference
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Inert:
    """Stands for a value that a checkpoint may hold and that means nothing here: a dtype, a device, a NumPy array."""


class _Refusal(Exception):
    """Why a pickle is refused, without the name of its file."""


def _rebuilt_tensor(arguments: tuple[Any, ...]) -> TensorReference:
    """`torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)`."""
    if len(arguments) < 4:
        raise _Refusal("a tensor is not described as torch describes it")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, StorageReference) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise _Refusal("a tensor is not described as torch describes it")
    if max(len(shape), len(strides)) > MAX_ENTRIES:
        raise _Refusal(f"a tensor has {max(len(shape), len(strides)):,} dimensions")
    if len(shape) != len(strides):
        raise _Refusal(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (offset, *shape, *strides)):
        raise _Refusal("a tensor has a shape, stride or offset that is negative or no whole number")
    return TensorReference(storage, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> Any:
    """`torch._utils._rebuild_parameter(data, requires_grad, hooks)` is its data."""
    if not arguments or not isinstance(arguments[0], TensorReference):
        raise _Refusal("a parameter is not made of a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise _Refusal("an OrderedDict is not filled as torch fills it")
    return {}


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], (tuple, list)):
        raise _Refusal("a torch.Size is not made of a tuple")
    if len(arguments[0]) > MAX_ENTRIES:
        raise _Refusal(f"a torch.Size of {len(arguments[0]):,} dimensions")
    return tuple(arguments[0])


def _inert(arguments: tuple[Any, ...]) -> Inert:
    return Inert()


# What stands for the calls in a checkpoint.
CALLS: Mapping[Name, Callable[[tuple[Any, ...]], Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuilt_tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch", "Size"): _size,
    # Losses and settings that training scripts keep beside the weights.
    Name("torch", "device"): _inert,
    Name("_codecs", "encode"): _inert,
    Name("numpy", "dtype"): _inert,
    Name("numpy.core.multiarray", "_reconstruct"): _inert,
    Name("numpy.core.multiarray", "scalar"): _inert,
    Name("numpy._core.multiarray", "_reconstruct"): _inert,
    Name("numpy._core.multiarray", "scalar"): _inert,
}

# Names that are values, not calls.
STORAGE_KINDS = frozenset(
    f"{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
TORCH_DTYPES = frozenset(("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"))

# Opcodes that push their own argument, or a value of their own.
LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
     "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
)  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(stream: BytesIO, where: str) -> Any:
    """The value of the pickle that starts at the stream's position, which moves behind it.

    Dicts, lists, tuples, numbers and strings come as they are, tensors as `TensorReference`, the rest as `Inert`.

    Args:
        where: the file that begins every error.

    Raises:
        CheckpointError: the pickle is damaged, or asks for anything but what rebuilds tensors.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPCODES:
                raise _Refusal(f"its pickle has more than {MAX_OPCODES:,} instructions; {ADVICE}")
            machine.step(opcode.name, argument)
        return machine.result()
    except _Refusal as refusal:
        raise CheckpointError(f"{where}: refused: {refusal}") from None
    except (ValueError, IndexError, MemoryError, OverflowError) as error:
        # What pickletools raises, and a stack that is too short.
        raise CheckpointError(f"{where}: damaged pickle: {one_line(error)[:120]}; fetch the file again") from None


class _Machine:
    """The stack, the marks in it and the memo."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below each mark
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        return self._stack.pop()

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode."""
        stack = self._stack
        if opcode in LITERALS:
            if isinstance(argument, int) and argument.bit_length() > MAX_INTEGER_BITS:
                raise _Refusal(f"its pickle holds a number of {argument.bit_length()} bits")
            stack.append(argument)
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError(f"nothing was remembered as {argument}")
            stack.append(self._memo[argument])
        elif opcode == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif opcode == "EMPTY_DICT":
            stack.append({})
        elif opcode == "EMPTY_LIST":
            stack.append([])
        elif opcode in TUPLES:
            self._stack.append(tuple(self._pop(TUPLES[opcode])))
        elif opcode == "TUPLE":
            values = self._pop_to_mark()
            self._stack.append(tuple(values))
        elif opcode in ("APPEND", "APPENDS"):
            values = self._pop(1) if opcode == "APPEND" else self._pop_to_mark()
            self._top(list).extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if opcode == "SETITEM" else self._pop_to_mark()
            self._set_items(values)
        elif opcode == "GLOBAL":
            module, _, name = argument.partition(" ")
            stack.append(_known(module, name))
        elif opcode == "STACK_GLOBAL":
            module, name = self._pop(2)
            stack.append(_known(module, name))
        elif opcode == "INST":
            module, _, name = argument.partition(" ")
            raise _Refusal(f"its pickle calls {_shown(module, name)}; {ADVICE}")
        elif opcode == "REDUCE":
            call, arguments = self._pop(2)
            if not isinstance(call, Name) or call not in CALLS or not isinstance(arguments, tuple):
                called = _shown(call.module, call.name) if isinstance(call, Name) else f"a value of type {type(call).__name__}"
                raise _Refusal(f"its pickle calls {called}; {ADVICE}")
            stack.append(CALLS[call](arguments))
        elif opcode == "BUILD":
            # The state of an OrderedDict is torch's `_metadata`, that of a parameter its Python attributes.
            self._pop(1)
            self._top(dict, Inert, TensorReference)
        elif opcode == "BINPERSID":
            stack.append(_storage(*self._pop(1)))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise _Refusal(f"its pickle uses the opcode {opcode}, which torch.save does not write; {ADVICE}")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is too short")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._outer.pop()
        return values

    def _top(self, *kinds: type) -> Any:
        top = self._stack[-1]
        if not isinstance(top, kinds):
            raise _Refusal(f"its pickle changes a {type(top).__name__}; {ADVICE}")
        return top

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing a tuple of tuples of tuples .. can take for ever, and no state dict has one as a key.
            if not isinstance(key, (str, int, float, bytes, type(None))):
                raise _Refusal(f"its pickle has a {type(key).__name__} as a key of a dict")
            target[key] = value


ADVICE = "marlin only rebuilds tensors: save model.state_dict() alone, or as safetensors"


def _known(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise _Refusal("its pickle refers to a name that is not text")
    found = Name(module, name)
    is_value = (
        (module in ("torch", "torch.storage") and name in STORAGE_KINDS)
        or (module == "torch" and name in TORCH_DTYPES)
        or (module == "numpy" and name == "ndarray")
    )
    if not is_value and found not in CALLS:
        raise _Refusal(f"its pickle calls {_shown(module, name)}; {ADVICE}")
    return found


def _storage(reference: Any) -> StorageReference:
    """What `torch.save` writes for a storage: ("storage", class, key, device, elements)."""
    if not isinstance(reference, tuple) or not 5 <= len(reference) <= MAX_ENTRIES or reference[0] != "storage":
        raise _Refusal("its pickle refers to something other than a storage")
    _, kind, key, _, elements, *view = reference
    if not isinstance(kind, Name) or kind.name not in STORAGE_KINDS:
        raise _Refusal("a storage is of no class that marlin knows")
    if not isinstance(key, str) or type(elements) is not int or not 0 <= elements < 1 << 63 or any(view):
        raise _Refusal("a storage is not described as torch describes it")
    return StorageReference(kind.name, key, elements)


def _shown(module: str, name: str) -> str:
    """A name from a hostile file, fit for a line on a terminal."""
    return ascii(f"{module}.{name}"[:80]).strip("'\"")
