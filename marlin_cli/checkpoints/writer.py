"""Writes marlin's own layout: a folder with config.json and safetensors, sharded when large."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.tensor_files import TypeAndShape, save_arrays, save_rows
from marlin_cli.writing import writing_folder

# A shard is held in memory until it is full.
SHARD_BYTES = 1_000_000_000


def write_model(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    quantization: Mapping[str, Any] | None,
    marlin: Mapping[str, Any] | None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model folder in one step: it is whole under its final name, or it is not there.

    Args:
        config: the architecture's fields; `quantization` (mlx-lm's convention) and `marlin` join it in config.json.
        weights: parameter path -> array.
        shard_bytes: weights beyond this many bytes go on in another file, with an index as transformers writes it.
        beside: further files, by name.

    Raises:
        OutputError: the folder exists and `overwrite` is off, or it cannot be written.
    """
    with writing_model(path, overwrite=overwrite, shard_bytes=shard_bytes) as writer:
        for name in sorted(weights):
            writer.add(name, weights[name])
        for name, data in (beside or {}).items():
            writer.put(name, data)
        writer.finish(config, quantization, marlin)


@contextlib.contextmanager
def writing_model(path: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Iterator["ModelWriter"]:
    """As `write_model`, for weights that come one by one: at most a shard of them is in memory.

    Raises:
        OutputError: as `write_model`.
    """
    with writing_folder(path, overwrite=overwrite) as folder:
        yield ModelWriter(folder, shard_bytes)


class ModelWriter:
    """A model folder in the making: `add` every weight, then `finish`."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._shard: dict[str, mx.array] = {}
        self._shard_of: dict[str, int] = {}  # name -> number of its shard, from 1
        self._used_bytes = self._total_bytes = 0
        self._shards = 1

    def add(self, name: str, array: mx.array) -> None:
        """Take a weight; shards that are full go to disk.

        Raises:
            OSError: they could not be written; `writing_folder` names the folder.
        """
        if self._shard and self._used_bytes + array.nbytes > self._shard_bytes:
            self._save(self._temporary(self._shards))
            self._shards += 1
        self._shard[name] = array
        self._shard_of[name] = self._shards
        self._used_bytes += array.nbytes
        self._total_bytes += array.nbytes

    def add_rows(self, shapes: Mapping[str, TypeAndShape], blocks: Iterable[Mapping[str, mx.array]]) -> None:
        """Take weights that come some rows at a time, each block of all of them; they have a shard of their own.

        Raises:
            OSError: as `add`.
        """
        if self._shard:
            self._save(self._temporary(self._shards))
            self._shards += 1
        save_rows(self._temporary(self._shards), shapes, blocks, {"format": "mlx"})
        self._shard_of.update(dict.fromkeys(shapes, self._shards))
        self._total_bytes += sum(dtype.size * math.prod(shape) for dtype, shape in shapes.values())
        self._shards += 1

    def put(self, name: str, data: bytes) -> None:
        """Write another file of this name.

        Raises:
            OSError: as `add`.
        """
        (self._folder / name).write_bytes(data)

    def finish(
        self, config: Mapping[str, Any], quantization: Mapping[str, Any] | None, marlin: Mapping[str, Any] | None
    ) -> None:
        """Write the last shard, the index if there are several, and config.json.

        Raises:
            OSError: as `add`.
        """
        document = dict(config)
        if quantization is not None:
            document["quantization"] = dict(quantization)
            # The same table under transformers' name, as mlx-lm writes it.
            document["quantization_config"] = dict(quantization)
        if marlin is not None:
            document["marlin"] = dict(marlin)
        if self._shard:
            self._save(self._temporary(self._shards))
        else:  # what came last has a shard of its own
            self._shards -= 1
        if self._shards == 1:
            self._temporary(1).rename(self._folder / "model.safetensors")
        else:
            names = {number: f"model-{number:05d}-of-{self._shards:05d}.safetensors" for number in range(1, self._shards + 1)}
            for number, name in names.items():
                self._temporary(number).rename(self._folder / name)
            weight_map = {key: names[number] for key, number in self._shard_of.items()}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            _write_json(self._folder / "model.safetensors.index.json", index)
        _write_json(self._folder / "config.json", document)

    def _temporary(self, number: int) -> Path:
        """Where a shard lies until their count is known."""
        return self._folder / f"{number}.safetensors"

    def _save(self, path: Path) -> None:
        save_arrays(path, self._shard, {"format": "mlx"})
        self._shard, self._used_bytes = {}, 0


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
