"""Statistics of `calibrate`: finished, with Hessians, of a ByT5, and of a run that stands in its middle."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from .case import Case
from .materials import TEXT
from .mutations import changed, damaged, json_text, value
from .safetensors_files import joined, parts

KEY = "marlin_statistics"
NUMBERS = {
    "F64": ("<d", (float("nan"), float("inf"), -1.0, 1e308, 1e300, 5e-324)),
    "F32": ("<f", (float("nan"), float("-inf"), -1.0, 3e38)),
    "I64": ("<q", (-1, 2**63 - 1, 0, -(2**63))),
}


def finished(rng: Random, folder: Path, materials: Path) -> Case:
    """A file of statistics that is shown, merged, or weighs the errors of `quantize`."""
    name = rng.choice(("plain", "hessian", "hessian", "byt5"))
    good = (materials / f"{name}.safetensors").read_bytes()
    (folder / "s.safetensors").write_bytes(_spoiled(rng, good))
    (folder / "good.safetensors").write_bytes(good)
    kind = rng.randrange(6)
    if kind == 0:
        return Case(["calibrate", "--show", "s.safetensors", *rng.choice(([], ["--json"]))])
    if kind == 1:
        argv = ["calibrate", "--merge", *rng.sample(["s.safetensors", "good.safetensors"], 2), "-o", "new.safetensors"]
        return Case(argv, ("new.safetensors",))
    model = str(materials / ("gated" if name == "byt5" else "prefix"))
    method = rng.choice(("mse", "awq", "gptq", "awq+gptq") if name == "hessian" else ("mse", "rtn"))
    argv = ["quantize", model, "--stats", "s.safetensors", "--method", method, "-o", "out"]
    if rng.random() < 0.2:
        argv += ["--domain-weight", rng.choice(("other=1", "code=0.5", "other=0", "x=1"))]
    if rng.random() < 0.15:
        argv += ["--balance-keys"]
    return Case(argv, ("out",))


def unfinished(rng: Random, folder: Path, materials: Path) -> Case:
    """What `calibrate --resume` goes on with."""
    good = (materials / "unfinished.safetensors").read_bytes()
    (folder / "new.safetensors.partial").write_bytes(_spoiled(rng, good))
    (folder / "text.txt").write_bytes(TEXT)
    argv = [
        "calibrate",
        str(materials / "prefix"),
        "--corpus",
        "text.txt",
        "--seq-bytes",
        "64",
        "--resume",
        "-o",
        "new.safetensors",
    ]
    return Case(argv, ("new.safetensors",))


def _spoiled(rng: Random, good: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return damaged(rng, good)
    document, data = parts(good)
    if kind == 1:
        return joined(document, with_number(rng, document, data))
    if kind == 2:
        names = [name for name in document if name != "__metadata__"]
        name = rng.choice(names)
        entry = rng.choice((document.pop(name), value(rng)))
        document[rng.choice((name, name + "x", "hessians.global", "inputs.\x1b[31m.count"))] = entry
        return joined(document, data)
    header: Any = json.loads(document["__metadata__"][KEY])
    if header.get("corpus_state") and rng.random() < 0.5:
        header["corpus_state"] = changed(rng, header["corpus_state"])
    else:
        header = changed(rng, header)
    document["__metadata__"][KEY] = json_text(rng, header).decode("latin-1")
    return joined(document, data)


def with_number(rng: Random, document: dict[str, Any], data: bytes) -> bytes:
    """Some or all numbers of an array that cannot be."""
    entry = document[rng.choice([name for name in document if name != "__metadata__" and document[name]["dtype"] in NUMBERS])]
    kind, numbers = NUMBERS[entry["dtype"]]
    packed = struct.pack(kind, rng.choice(numbers))
    begin, end = entry["data_offsets"]
    count = (end - begin) // len(packed)
    if rng.random() < 0.5:
        return data[:begin] + packed * count + data[end:]
    place = begin + rng.randrange(count) * len(packed)
    return data[:place] + packed + data[place + len(packed) :]
