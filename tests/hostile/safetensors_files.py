"""Safetensors files and their shards: the length of the header, its JSON, types, shapes, offsets, values; the index."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from .case import Case, text_beside, use_of_model
from .materials import BYT5, NATIVE, PACKED, RELATIVES
from .mutations import ESCAPES, changed, damaged, json_text, value

TYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "U8", "U32", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "", ESCAPES)
NOT_NUMBERS = {"F32": struct.pack("<f", float("nan")), "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}


def safetensors(rng: Random, folder: Path, materials: Path) -> Case:
    """One weights file, damaged in its header or its data."""
    name = rng.choice((*NATIVE, *PACKED, *BYT5, *RELATIVES))
    shutil.copytree(materials / name, folder / "model")
    text_beside(folder)
    path = folder / "model" / "model.safetensors"
    if not path.exists():
        shutil.copy(materials / "prefix" / "model.safetensors", path)
    content = path.read_bytes()
    document, data = parts(content)
    kind = rng.randrange(8)
    refuse = False
    if kind == 0:
        content = damaged(rng, content)
    elif kind == 1:
        content, refuse = content[: rng.randrange(len(content))], True
    elif kind == 2:
        lengths = (0, 1, len(content), len(content) - 8, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(len(content)))
        content = struct.pack("<Q", rng.choice(lengths)) + content[8:]
    elif kind == 3:
        content = _with_payload(rng, document, data)
        refuse = True
    elif kind == 4:
        text = json_text(rng, document)
        content = struct.pack("<Q", len(text)) + text + data
    elif kind == 5:
        content = joined(changed(rng, document), data)
    else:
        content = joined(_header(rng, document, len(data)), data)
    path.write_bytes(content)
    named = rng.choice(("model", "model/model.safetensors"))
    case = use_of_model(rng, named, refuse, name in BYT5 or name.startswith("byt5"))
    # A plan is of shapes: it looks at no weight.
    return replace(case, refuse=False) if kind == 3 and "--dry-run" in case.argv else case


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(document: Any, data: bytes) -> bytes:
    """A file of a header and data."""
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _with_payload(rng: Random, document: dict[str, Any], data: bytes) -> bytes:
    """A number that is none in the middle of a weight."""
    names = [name for name in document if name != "__metadata__" and document[name]["dtype"] in NOT_NUMBERS]
    entry = document[rng.choice(names)]
    number = NOT_NUMBERS[entry["dtype"]]
    begin, end = entry["data_offsets"]
    place = begin + rng.randrange((end - begin) // len(number)) * len(number)
    return joined(document, data[:place] + number + data[place + len(number) :])


def _header(rng: Random, document: dict[str, Any], size: int) -> dict[str, Any]:
    """One tensor's entry, with a fault that this format alone can have."""
    names = [name for name in document if name != "__metadata__"]
    name = rng.choice(names)
    entry = document[name] = dict(document[name])
    begin, end = entry["data_offsets"]
    kind = rng.randrange(9)
    if kind == 0:
        entry["dtype"] = rng.choice(TYPES)
    elif kind == 1:
        entry["shape"] = rng.choice(([], [0], [-1], [2**62, 4], [2**64], [1] * 70, entry["shape"][::-1], [*entry["shape"], 1]))
    elif kind == 2:
        entry["data_offsets"] = rng.choice(
            ([end, begin], [begin + 1, end + 1], [0, size], [begin, size * 1000], [-4, end], [begin])
        )
    elif kind == 3:
        document[rng.choice(names) + rng.choice(("x", ESCAPES, ".scales", ".bias", ""))] = dict(entry)
    elif kind == 4:
        document["__metadata__"] = rng.choice(
            ({"a": 1}, {"format": ESCAPES}, [], "x", {"a": None}, {"x" * 10_000: "y" * 10_000})
        )
    elif kind == 5:
        document[rng.choice((ESCAPES, "", "\ud800", "x" * 5_000, "a\nb", ".", "a.b.c"))] = document.pop(name)
    elif kind == 6:
        document.pop(name)  # a hole
    elif kind == 7:
        document.update(
            {f"{name}.{index}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for index in range(3_000)}
        )
    else:
        document[name] = value(rng)
    return document


def shards(rng: Random, folder: Path, materials: Path) -> Case:
    """Several weights files with an index that is not right."""
    name = rng.choice((*NATIVE, *PACKED))
    model = folder / "model"
    shutil.copytree(materials / name, model)
    text_beside(folder)
    document, data = parts((model / "model.safetensors").read_bytes())
    names = sorted((each for each in document if each != "__metadata__"), key=lambda each: document[each]["data_offsets"])
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    cut = rng.randrange(1, len(names))
    for file, part in zip(files, (names[:cut], names[cut:]), strict=True):
        first = document[part[0]]["data_offsets"][0]
        entries = {
            each: {**document[each], "data_offsets": [at - first for at in document[each]["data_offsets"]]} for each in part
        }
        (model / file).write_bytes(joined(entries, data[first : document[part[-1]]["data_offsets"][1]]))
    (model / "model.safetensors").unlink()
    places = {each: files[index >= cut] for index, each in enumerate(names)}
    index: Any = {"metadata": {"total_size": len(data)}, "weight_map": places}
    kind = rng.randrange(6)
    if kind == 0:
        hostile = (
            "../text.txt",
            "/etc/passwd",
            "/dev/zero",
            "",
            ".",
            ESCAPES,
            "x" * 5_000,
            "config.json",
            "a\nb",
            "\ud800",
            files[0],
        )
        places[rng.choice(names)] = rng.choice(hostile)
    elif kind == 1:
        other = rng.choice(files)
        (model / other).write_bytes(damaged(rng, (model / other).read_bytes()))
    elif kind == 2:
        (model / rng.choice(files)).unlink()
    elif kind == 3:
        shutil.copy(model / files[0], model / files[1])
    else:
        index = changed(rng, index)
    (model / "model.safetensors.index.json").write_bytes(json_text(rng, index))
    return use_of_model(rng, "model")
