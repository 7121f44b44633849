"""Folders of every other architecture, marlin's own and their authors': what config.json says, and the tensors beside it."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from .case import Case, text_beside
from .configs import LARGE
from .materials import BYTEWISE, ENCODERS
from .mutations import ESCAPES, changed, json_text, value

# What a good file of the materials may lack.
KEYS = (
    "model_type", "layout", "quantization", "quantization_config", "marlin", "positions", "local_window", "global_window",
    "patch_rule", "start_id", "head", "labels", "adapter", "language", "kv_heads", "attention_scale", "vocab_size",
    "architectures", "id2label", "rope_theta", "tie_word_embeddings", "attn_implementation", "patch_in_forward", "BOS",
)  # fmt: skip
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (1, 1), (32,), (31, 32), (32, 32, 1), (2, 2, 2, 2), (64, 64))


def network_config(rng: Random, folder: Path, materials: Path) -> Case:
    """A configuration with one value, or many, that no such model has."""
    name = rng.choice((*BYTEWISE, *ENCODERS))
    _copy(folder, materials, name)
    path = folder / "model" / "config.json"
    document = json.loads(path.read_text())
    if rng.random() < 0.7:
        holders = [document, *(each for each in document.values() if isinstance(each, dict) and each)]
        for _ in range(rng.choice((1, 1, 2, 3))):
            holder = rng.choice(holders)
            key = rng.choice((*holder, *KEYS[:4])) if rng.random() < 0.8 else rng.choice(KEYS)
            holder[key] = rng.choice((*LARGE, 0, -1, 1, 3, 5, 1.5, 2**16, ESCAPES, None, [], value(rng), value(rng)))
    else:
        document = changed(rng, document)
    path.write_bytes(json_text(rng, document))
    return _use(rng, name)


def network_tensors(rng: Random, folder: Path, materials: Path) -> Case:
    """Tensors that are missing, new, of another shape or type, or hold no numbers."""
    from safetensors.numpy import load_file, save_file

    name = rng.choice((*BYTEWISE, *ENCODERS))
    _copy(folder, materials, name)
    path = rng.choice(sorted((folder / "model").glob("*.safetensors")))
    tensors = load_file(path)
    for _ in range(rng.choice((1, 1, 1, 2, 30))):
        key = rng.choice(list(tensors))
        kind = rng.randrange(6)
        if kind == 0:
            del tensors[key]
        elif kind == 1:
            tensors[rng.choice((f"{key}.more", key.replace("0", "7"), "mixer", ESCAPES, f"{key}.scales"))] = tensors[key]
        elif kind == 2:
            shape = rng.choice((tensors[key].shape[::-1], (*tensors[key].shape, 1), tensors[key].shape[1:], *SHAPES))
            tensors[key] = np.ones(shape, tensors[key].dtype)
        elif kind == 3:
            tensors[key] = np.nan_to_num(tensors[key]).astype(rng.choice(("f2", "f8", "i8", "u4", "?", "i4")))
        elif kind == 4 and tensors[key].size and tensors[key].dtype.kind == "f":
            tensors[key] = tensors[key].copy()
            tensors[key].flat[rng.randrange(tensors[key].size)] = rng.choice((np.nan, np.inf))
        else:
            tensors[key] = tensors[key][: rng.choice((0, 1, 2, -1, -2))] if tensors[key].ndim else tensors[key]
        if not tensors:
            break
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, path, {"format": "pt"})
    return _use(rng, name)


def _copy(folder: Path, materials: Path, name: str) -> None:
    shutil.copytree(materials / name, folder / "model")
    text_beside(folder)


def _use(rng: Random, name: str) -> Case:
    """A command that reads the model, drawn from those that are for its kind."""
    both: tuple[Any, ...] = (
        (["quantize", "model", "-o", "out"], ("out",), False),
        (["quantize", "model", "--dry-run"], (), False),
        (["quantize", "model", "-o", "out", "--dequantize"], ("out",), False),
        (["quantize", "model", "--plan"], (), False),
        (["info", "model", "--fingerprint"], (), False),
        (["info", "model", "--json"], (), False),
        (["calibrate", "model", "--corpus", "text.txt", "--seq-bytes", "64", "-o", "new.safetensors"], ("new.safetensors",),
         False),
    )  # fmt: skip
    writing: tuple[Any, ...] = (
        (["generate", "model", "-p", "ab", "--max-bytes", "4"], (), True),
        (["generate", "model", "-p", "ab", "--max-bytes", "4", "--window", "restart", "--json"], (), False),
        (["generate", "model", "-p", "ab", "--max-bytes", "4", "--kv-bits", "8"], (), True),
        (["generate", "model", "-p", "ab", "--max-bytes", "4", "--save-state", "state"], ("state",), True),
        (["bench", "model", "--plan", "--bandwidth", "10"], (), False),
        (["bench", "model", "--no-throughput", "--quality", "text.txt"], (), False),
        (["bench", "model", "--surprise", "text.txt"], (), False),
    )
    encoding: tuple[Any, ...] = (
        (["encode", "model", "-p", "ab", "--pool", "mean"], (), False),
        (["label", "model", "-p", "ab"], (), False),
        (["label", "model", "-p", "ab", "--language", "cs"], (), False),
        (["bench", "model", "--prompt-bytes", "8", "--repeats", "1"], (), False),
    )
    argv, outputs, raw = rng.choice(both if rng.random() < 0.4 else encoding if name in ENCODERS else writing)
    return Case(argv, outputs, raw=raw)
