"""GGUF files of a ByT5: the head's counts, types and lengths of metadata, names, shapes and offsets of tensors, values."""

import json
import struct
import sys
from pathlib import Path
from random import Random
from typing import Any

from .case import Case, text_beside, use_of_model
from .materials import DATA
from .mutations import ESCAPES, damaged

COUNTS = (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
VALUES = (
    0,
    1,
    2**32 - 1,
    2**31 - 1,
    0.0,
    -1.0,
    float("nan"),
    float("inf"),
    True,
    "",
    "x" * 9_000,
    ESCAPES,
    [b"a"],
    [1, 2],
    [b"\xff"] * 300,
)


def gguf(rng: Random, folder: Path, materials: Path) -> Case:
    """A file that is damaged as bytes, or written with other metadata or tensors."""
    text_beside(folder)
    good = (materials / "model.gguf").read_bytes()
    kind = rng.randrange(6)
    refuse = False
    if kind == 0:
        content = damaged(rng, good)
    elif kind == 1:
        content, refuse = good[: rng.randrange(len(good))], True
    elif kind == 2:
        content = _with_count(rng, good)
    else:
        content = _written(rng, kind)
    name = rng.choice(("model.gguf", "model.gguf", "model.gguf", "model/model.gguf"))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return use_of_model(rng, name.split("/")[0], refuse, byt5=True)


def _with_count(rng: Random, good: bytes) -> bytes:
    """Another version, number of tensors or keys; or a length, anywhere in the front part, that is far too large."""
    place, format_ = rng.choice(((4, "<I"), (8, "<Q"), (16, "<Q"), (24, "<Q"), (rng.randrange(24, 3_000), "<Q")))
    number = rng.choice(COUNTS) & (2**32 - 1 if format_ == "<I" else 2**64 - 1)
    return good[:place] + struct.pack(format_, number) + good[place + struct.calcsize(format_) :]


def _written(rng: Random, kind: int) -> bytes:
    sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
    import gguf_bytes

    metadata: dict[Any, Any] = gguf_bytes.byt5_metadata(json.loads((DATA / "byt5" / "gated" / "config.json").read_text()))
    tensors = dict(gguf_bytes.byt5_tensors("gated"))
    if kind == 3:
        key = rng.choice(list(metadata))
        metadata[key] = rng.choice(VALUES)
    elif kind == 4:
        key = rng.choice(list(metadata))
        if rng.random() < 0.5:
            del metadata[key]
        else:
            metadata[rng.choice((ESCAPES, "", "x" * 70_000, key + ".x", "general.alignment"))] = rng.choice(VALUES)
    else:
        name = rng.choice(list(tensors))
        array = tensors.pop(name)
        change = rng.randrange(6)
        if change == 0:
            tensors[rng.choice((ESCAPES, "", "x" * 9_000, name + ".x", "dec.blk.99.attn_q.weight"))] = array
        elif change == 1:
            tensors[name] = array[:1]
        elif change == 2:
            tensors[name] = array.reshape(-1)
        elif change == 3:
            tensors[name] = array * float("nan")
        elif change == 4:
            tensors[name] = array.astype("float16")
    return gguf_bytes.gguf(metadata, tensors, rng.choice((3, 3, 3, 2, 1, 4, 2**24)))
