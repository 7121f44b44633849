"""Writes a packed model folder again as compressed-tensors: what llm-compressor writes, and vLLM and transformers read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from marlin_cli.checkpoints import hugging_face, native, nvfp4
from marlin_cli.checkpoints.t5_ends import TOKENIZER_CONFIG, tokenizer_config
from marlin_cli.checkpoints.t5_head import HEAD
from marlin_cli.errors import CheckpointError
from marlin_cli.tensor_files import write_safetensors
from marlin_cli.text import quoted
from marlin_cli.version import __version__
from marlin_cli.writing import writing_folder

EXPORTS = (nvfp4.COMPRESSED_TENSORS,)


def export_compressed_tensors(
    packed: Path, target: Path, *, overwrite: bool = False, beside: Mapping[str, bytes] | None = None
) -> None:
    """Write marlin's own folder `packed` as `target`, in one step. ByT5 takes transformers' names and configuration, and a
    tokenizer_config.json where its inputs end otherwise than ByT5Tokenizer ends them.

    Nothing is decoded: codes and scales are the same bytes.

    Args:
        beside: further files, by name.

    Raises:
        CheckpointError: a layer that is packed otherwise than nvfp4.
        OutputError: `target` exists and `overwrite` is off, or it cannot be written.
    """
    checkpoint = native.read(packed)
    config, weights = checkpoint.config, checkpoint.weights
    tokenizer = None
    ignored = [path for path, entry in (checkpoint.quantization or {}).items() if entry is False]
    if config.get("model_type") == "byt5":
        names = hugging_face.names_of(config)
        weights = {_renamed(path, names): array for path, array in weights.items()}
        ignored = [_renamed(f"{path}.weight", names).removesuffix(".weight") for path in ignored]
        tokenizer = tokenizer_config(config["end_id"])
        if hugging_face.repeats_table(config):
            weights[HEAD] = weights[hugging_face.EMBEDDINGS[0]]
        if config["tied_head"] and config["decoder_layers"]:
            ignored.append(HEAD.removesuffix(".weight"))  # a linear layer there, which the table of embeddings is not here
        config = hugging_face.config_of(config)
    document = {**config, "quantization_config": nvfp4.compressed_tensors_table(ignored, __version__)}
    if checkpoint.marlin is not None:
        document["marlin"] = checkpoint.marlin
    stored = nvfp4.under_compressed_tensors_names(weights)
    with writing_folder(target, overwrite=overwrite) as temporary:
        shapes = {name: (dtype, tuple(array.shape)) for name, (dtype, array) in stored.items()}
        write_safetensors(temporary / native.SINGLE, shapes, _contents(stored), {"format": "pt"})
        for name, data in (beside or {}).items():
            (temporary / name).write_bytes(data)
        for name, content in ((native.CONFIG, document), (TOKENIZER_CONFIG, tokenizer)):
            if content is not None:
                (temporary / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _renamed(path: str, names: Mapping[str, str]) -> str:
    base, _, last = path.rpartition(".")
    if f"{base}.weight" not in names:
        raise CheckpointError(f"{quoted(path)} has no name in transformers' T5; it cannot be exported")
    return f"{names[f'{base}.weight'].removesuffix('.weight')}.{last}"


def _contents(stored: Mapping[str, tuple[str, mx.array]]) -> Iterator[memoryview]:
    for _, array in stored.values():
        plain: Any = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        yield np.ascontiguousarray(np.array(plain)).reshape(-1).view(np.uint8).data
