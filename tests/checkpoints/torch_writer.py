"""Writes files as `torch.save` does, opcode by opcode and without torch, well-formed or hostile."""

import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"f4": "Float", "f8": "Double", "f2": "Half", "u2": "BFloat16", "i8": "Long", "i4": "Int", "u1": "Byte"}
KINDS |= {"b1": "Bool", "i2": "Short", "i1": "Char"}


@dataclass(frozen=True)
class Opcodes:
    """Opcodes to be written as they are."""

    data: bytes


@dataclass(frozen=True)
class View:
    """A tensor that is any strided view of a storage; uint16 storages count as bfloat16."""

    storage: np.ndarray
    shape: tuple
    strides: tuple
    offset: Any = 0
    elements: int | None = None  # what the pickle claims the storage has
    kind: str | None = None


@dataclass
class Document:
    """A pickle and the storages that it refers to."""

    pickle: bytes = b""
    storages: dict[str, np.ndarray] = field(default_factory=dict)


def tensor(array: np.ndarray) -> View:
    """A contiguous tensor."""
    array = np.ascontiguousarray(array)
    return View(array, array.shape, tuple(stride // array.itemsize for stride in array.strides))


def name(module: str, attribute: str) -> Opcodes:
    """A reference to `module.attribute`."""
    return Opcodes(f"c{module}\n{attribute}\n".encode())


def call(function: Opcodes, *arguments: Any) -> Opcodes:
    """A call of a name."""
    return Opcodes(function.data + _opcodes(tuple(arguments), Document()) + b"R")


def document(value: Any) -> Document:
    """`value` pickled with protocol 2."""
    found = Document()
    found.pickle = b"\x80\x02" + _opcodes(value, found) + b"."
    return found


def write_zip(
    path: Path,
    value: Any,
    *,
    byteorder: str = "little",
    compression: int = zipfile.ZIP_STORED,
    leave_out: str = "",
    twice: str = "",
) -> Path:
    """`value` (or a `Document`) in the format of torch 1.6 and later."""
    content = value if isinstance(value, Document) else document(value)
    entries = {"archive/data.pkl": content.pickle, "archive/byteorder": byteorder.encode(), "archive/version": b"3\n"}
    entries |= {f"archive/data/{key}": storage.tobytes() for key, storage in content.storages.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, data in entries.items():
            if entry != leave_out:
                archive.writestr(entry, data)
            if entry == twice:
                archive.writestr(f"again/{entry}", data)
    return path


def write_legacy(path: Path, value: Any, *, version: int = 1001) -> Path:
    """`value` in the format before torch 1.6."""
    content = document(value)
    machine = {"protocol_version": version, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    magic = b"\x80\x02\x8a\n" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
    parts = [magic, document(version).pickle, document(machine).pickle, content.pickle]
    parts.append(document(list(content.storages)).pickle)
    for storage in content.storages.values():
        parts += [struct.pack("<q", storage.size), storage.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


def _opcodes(value: Any, into: Document) -> bytes:
    if isinstance(value, Opcodes):
        return value.data
    if isinstance(value, np.ndarray):
        value = tensor(value)
    if isinstance(value, View):
        key = str(len(into.storages))
        into.storages[key] = value.storage
        kind = value.kind or KINDS[value.storage.dtype.str[1:]]
        elements = value.storage.size if value.elements is None else value.elements
        storage = _opcodes(("storage", name("torch", f"{kind}Storage"), key, "cpu", elements), into) + b"Q"
        hooks = Opcodes(b"ccollections\nOrderedDict\n)R")
        arguments = (Opcodes(storage), value.offset, value.shape, value.strides, False, hooks)
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + _opcodes(arguments, into) + b"R"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8b" + struct.pack("<i", len(data)) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(_opcodes(item, into) for item in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(_opcodes(item, into) for item in value) + b"e"
    items = b"".join(_opcodes(part, into) for pair in value.items() for part in pair)
    return b"}(" + items + b"u"
