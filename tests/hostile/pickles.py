"""Pickles of torch.save in both formats: opcodes, memos, sizes, shared lists, tables that hold themselves, zip entries."""

import io
import struct
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from .case import Case, text_beside, use_of_model
from .materials import PICKLES
from .mutations import ESCAPES, damaged

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
import torch_writer  # noqa: E402 (found by the line above)

ARRAY = np.arange(12, dtype="f4").reshape(3, 4)
LARGE = (2**20, 2**31, 2**40, 2**62, 2**63, 2**200, -1, -(2**40), 0)


def zipped(rng: Random, folder: Path, materials: Path) -> Case:
    """torch 1.6 and later: a zip of a pickle and storages."""
    path = folder / rng.choice(("model.pt", "model.bin", "model.ckpt"))
    kind = rng.randrange(5)
    good = (materials / rng.choice(PICKLES)).read_bytes()
    refuse = False
    if kind == 0:
        path.write_bytes(damaged(rng, good))
    elif kind == 1:
        path.write_bytes(good[: rng.randrange(len(good))])
        refuse = True
    elif kind == 2:
        path.write_bytes(_repacked(rng, good))
    else:
        twice = rng.choice(("", "", "", "archive/data.pkl", "archive/data/0"))
        leave_out = rng.choice(("", "", "", "archive/data.pkl", "archive/data/0", "archive/version"))
        packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        order = rng.choice(("little", "little", "big", "middle", ESCAPES))
        torch_writer.write_zip(path, _content(rng), byteorder=order, compression=packing, leave_out=leave_out, twice=twice)
        refuse = True
    return _use(rng, folder, path, refuse)


def legacy(rng: Random, folder: Path, materials: Path) -> Case:
    """Before torch 1.6: pickles one after another, then the storages."""
    path = folder / "model.pt"
    content = _content(rng)
    if isinstance(content, torch_writer.Document):
        content = torch_writer.Opcodes(content.pickle[2:-1])
    torch_writer.write_legacy(path, content, version=rng.choice((1001, 1001, 1001, 1, 2**40)))
    if rng.random() < 0.4:
        path.write_bytes(damaged(rng, path.read_bytes()))
    return _use(rng, folder, path, True)


def _use(rng: Random, folder: Path, path: Path, refuse: bool) -> Case:
    text_beside(folder)
    case = use_of_model(rng, path.name, refuse)
    if rng.random() < 0.3:
        options = (
            "heads=2",
            "heads=0",
            "heads=-1",
            "heads=1e9",
            f"heads={2**40}",
            "max_bytes=8",
            "heads=[1]",
            "activation=x",
            "rope=1",
        )
        return Case([*case.argv, "--import", rng.choice(options)], case.outputs, False, case.raw)
    return case


def _repacked(rng: Random, good: bytes) -> bytes:
    """A good file whose pickle or another entry is damaged, in a zip that is whole."""
    target = io.BytesIO()
    if not zipfile.is_zipfile(io.BytesIO(good)):  # one of the files is in the older format
        return damaged(rng, good)
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(target, "w") as archive:
        names = source.namelist()
        chosen = rng.choice((*names, *[name for name in names if name.endswith(".pkl")] * len(names)))
        for name in names:
            data = source.read(name)
            if name == chosen and not rng.randrange(20):
                continue
            archive.writestr(name, damaged(rng, data) if name == chosen else data)
    return target.getvalue()


def _content(rng: Random) -> Any:
    """A value, or opcodes, that no trainer writes."""
    kind = rng.randrange(12)
    view, large = torch_writer.View, rng.choice(LARGE)
    if kind == 0:
        return {"a": view(ARRAY.reshape(-1), (large,), (1,))}
    if kind == 1:
        return {"a": view(ARRAY.reshape(-1), (2**20, 2**20), (0, 0))}
    if kind == 2:
        return {"a": view(ARRAY.reshape(-1), (3, 4), (large, 1), offset=rng.choice((0, large)))}
    if kind == 3:
        return {"a": view(ARRAY.reshape(-1), (3,), (1,), elements=large)}
    if kind == 4:
        return {
            "a": view(
                ARRAY.reshape(-1), (3,), (1,), kind=rng.choice(("Quint8", "Double", "ComplexFloat", ESCAPES.replace("\n", "")))
            )
        }
    if kind == 5:
        depth = rng.choice((50, 2_000, 200_000))
        return _raw(b"]" * depth + b"a" * (depth - 1))
    if kind == 6:  # each list holds the one before twice
        return _raw(b"](Nle" + b"".join(b"q%c]h%ch%ca0a" % (n, n, n) for n in range(rng.choice((5, 60, 200)))))
    if kind == 7:  # a table that holds itself
        return _raw(
            b"}q\x00X\x01\x00\x00\x00ah\x00s"
            + rng.choice((b"", b"X\x05\x00\x00\x00modelh\x00s", b"X\x0a\x00\x00\x00state_dicth\x00s"))
        )
    if kind == 8:
        length = struct.pack("<I", rng.choice((2**31 - 1, 2**32 - 1, 2**20)))
        return _raw(rng.choice((b"X", b"B", b"T", b"\x8b")) + length + b"x" * 40)
    if kind == 9:  # memo places far away
        return _raw(
            b"Nr"
            + struct.pack("<I", rng.choice((2**31, 2**32 - 1, 2**24)))
            + b"j"
            + struct.pack("<I", rng.choice((0, 2**32 - 1)))
        )
    if kind == 10:
        return _raw(rng.randbytes(rng.choice((1, 4, 40, 400))))
    number = rng.choice(
        (b"L" + b"9" * 100_000 + b"L\n", b"I" + b"9" * 100_000 + b"\n", b"F1e999999\n", b"Fnan\n", b"I\x1b[31m\n")
    )
    return rng.choice(
        (_raw(number), {"model": {ESCAPES: ARRAY, "x" * 5_000: ARRAY}}, {7: ARRAY}, [ARRAY], ARRAY, {"a": {"b": ARRAY}}, None)
    )


def _raw(opcodes: bytes) -> torch_writer.Document:
    return torch_writer.Document(b"\x80\x02" + opcodes + b".")
