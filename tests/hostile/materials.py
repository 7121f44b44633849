"""The good files that generators damage: tiny models of every layout, statistics, results. Made once a campaign."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from .server import ENVIRONMENT

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
TEXT = b"the quick brown fox jumps over the lazy dog, and so on; " * 8
PAIRS = b'{"source": "abc def", "target": "ABC", "language": "x"}\n{"source": "x", "target": "y z"}\n' * 4

SMALL = {
    "patch_size": 4, "max_bytes": 512,
    "global_layers": 1, "global_dim": 32, "global_heads": 2, "global_ffn_dim": 32,
    "local_layers": 1, "local_dim": 32, "local_heads": 2, "local_ffn_dim": 32,
}  # fmt: skip
MIDDLE = {"length": 2, "layers": 1, "dim": 32, "heads": 2, "ffn_dim": 32, "positions": "learned"}
# A folder of marlin's own for each layout.
NATIVE = {
    "prefix": SMALL,
    "paper": {**SMALL, "global_dim": 128, "layout": "paper", "global_positions": "learned", "ffn": "relu",
    "norm": "layernorm", "qk_norm": True},
    "lucid": {
        **SMALL, "patch_size": 8, "layout": "megabyte_pytorch", "byte_dim": 32, "token_shift": True, "ffn": "gelu",
        "ffn_bias": True, "local_positions": "none", "middle": [MIDDLE],
    },
}  # fmt: skip
# Folders of Hugging Face's: one in safetensors with sizes that can be packed, one in a pickle as it is in tests/data.
BYT5 = ("gated", "relu")
# Relatives of ByT5, as their authors' code writes them: what continues bytes, and what answers.
RELATIVES = ("bygpt5", "gbst")
# What continues bytes otherwise, and what encodes texts: marlin's own folders, and those of their authors' code.
BYTEWISE = ("block_recurrent", "evabyte", "blt", "spacebyte", "authors-evabyte", "authors-blt")
ENCODERS = ("canine", "la_canine")
# Folders that `quantize` writes: marlin's own, llm-compressor's, and a ByT5's.
PACKED = {
    "packed": ("prefix",),
    "exported": ("prefix", "--export", "compressed-tensors", "--local-bits", "4"),
    "byt5-packed": ("gated",),
    "bygpt5-packed": ("bygpt5",),
}
WIDER = {"d_model": 32, "d_ff": 32, "d_kv": 16}
PICKLES = ("megabyte_pytorch-2-stages.pt", "megabyte_pytorch-3-stages.pt", "paper.pt")


def prepare(folder: Path) -> Path:
    """Make all good files in `folder`."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map

    from marlin_cli.checkpoints.writer import write_model
    from marlin_cli.config import from_mapping
    from marlin_cli.models import config_as_mapping
    from marlin_cli.models.megabyte import MegaByte
    from marlin_cli.models.megabyte_config import MegaByteConfig

    folder.mkdir(parents=True, exist_ok=True)
    for name, document in NATIVE.items():
        config = from_mapping(MegaByteConfig, document, name)
        network = MegaByte(config)
        mx.random.seed(0)
        network.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.2, network.parameters()))
        write_model(folder / name, config_as_mapping(config), dict(tree_flatten(network.parameters())), None, None)
    _byt5(folder)
    _relatives(folder)
    _networks(folder)
    for name in PICKLES:
        shutil.copy(DATA / "foreign" / name, folder / name)
    (folder / "text.txt").write_bytes(TEXT)
    (folder / "pairs.jsonl").write_bytes(PAIRS)
    _gguf(folder / "model.gguf")
    for name, argv in PACKED.items():
        _marlin(folder, "quantize", *argv, "-o", name)
    _marlin(folder, "calibrate", "prefix", "--corpus", "text.txt", "--seq-bytes", "64", "-o", "plain.safetensors")
    _marlin(
        folder, "calibrate", "prefix", "--corpus", "text.txt", "--seq-bytes", "64", "--hessian", "-o", "hessian.safetensors"
    )
    _marlin(folder, "calibrate", "gated", "--pairs", "pairs.jsonl", "-o", "byt5.safetensors")
    for _ in range(2):
        _marlin(folder, "bench", "prefix", "--prompt-bytes", "8", "--decode-bytes", "4", "--save", "results.jsonl")
    _unfinished(folder)
    _states(folder)
    return folder


def _marlin(folder: Path, *argv: str) -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-m", "marlin_cli", *argv], cwd=folder, env=environment, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"marlin {' '.join(argv)}: {result.stderr.decode(errors='replace')}")


def _byt5(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for name in BYT5:
        shutil.copytree(DATA / "byt5" / name, folder / name)
    config_file, weights = folder / "gated" / "config.json", folder / "gated" / "model.safetensors"
    config = json.loads(config_file.read_text())
    sides = {config["d_model"]: 32, config["d_ff"]: 32, config["num_heads"] * config["d_kv"]: 32}
    config_file.write_text(json.dumps({**config, **WIDER}))
    draw = np.random.default_rng(0).standard_normal
    shapes = {key: [sides.get(side, side) for side in array.shape] for key, array in load_file(weights).items()}
    save_file({key: (draw(shape) * 0.2).astype("f4") for key, shape in shapes.items()}, weights, {"format": "pt"})


def _relatives(folder: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    import decoder_cases

    decoder_cases.bygpt5_folder(folder / "bygpt5", decoder_cases.random_bygpt5(head_dim=32, layers=1))
    small = {"head_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    decoder_cases.gbst_folder(folder / "gbst", decoder_cases.random_gbst(**small))


def _networks(folder: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    import blt_cases
    import evabyte_cases
    from mlx.utils import tree_flatten
    from small_networks import CONTINUING, ENCODING, random_weights

    from marlin_cli.checkpoints.writer import write_model
    from marlin_cli.models import config_as_mapping

    for name, config in {**CONTINUING, **ENCODING}.items():
        if name in (*BYTEWISE, *ENCODERS):
            weights = dict(tree_flatten(random_weights(config).parameters()))
            write_model(folder / name, config_as_mapping(config), weights, None, None)
    evabyte_cases.evabyte_folder(folder / "authors-evabyte", evabyte_cases.random_evabyte())
    blt_cases.blt_folder(folder / "authors-blt", blt_cases.random_blt())


def _gguf(path: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
    import gguf_bytes

    config = json.loads((DATA / "byt5" / "gated" / "config.json").read_text())
    path.write_bytes(gguf_bytes.gguf(gguf_bytes.byt5_metadata(config), gguf_bytes.byt5_tensors("gated")))


def _unfinished(folder: Path) -> None:
    """A run that stands at its third window, as `calibrate --resume` reads it."""
    from itertools import islice

    from marlin_cli.corpus import open_corpus
    from marlin_cli.statistics import load_statistics
    from marlin_cli.statistics.store import save_unfinished

    corpus = open_corpus([str(folder / "text.txt")], sequence_bytes=64, seed=0)
    list(islice(corpus, 3))
    statistics = load_statistics(folder / "plain.safetensors")
    run = dataclasses.replace(statistics.runs[0], corpus=corpus.fingerprint())
    statistics = dataclasses.replace(statistics, runs=(run,))
    save_unfinished(folder / "unfinished.safetensors", statistics, corpus.state())


def _states(folder: Path) -> None:
    """States of a prompt of 64 bytes, and of a stream that was scored up to its 200th."""
    from marlin_cli import ContinuingModel
    from marlin_cli.bench.cost_files import CostFile, NoFile
    from marlin_cli.bench.surprise import default_window, surprise

    (folder / "prompt.txt").write_bytes(TEXT[:64])
    for name in ("prefix", "bygpt5"):
        argv = ["--prompt-file", "prompt.txt", "--max-bytes", "1", "--save-state", f"{name}.state"]
        _marlin(folder, "generate", name, *argv)

    class Ending:
        """A stream that is broken off."""

        name = "text.txt"

        def __init__(self) -> None:
            self._left = TEXT[:200]

        def read(self, most: int) -> bytes:
            part, self._left = self._left[:most], self._left[most:]
            if not part:
                raise KeyboardInterrupt
            return part

    model = ContinuingModel.from_pretrained(folder / "prefix", device="cpu")
    model = model.cached(default_window(model.config))
    for suffix in (".jsonl", ".npy"):
        with contextlib.suppress(KeyboardInterrupt):
            surprise(model, "prefix", Ending(), NoFile(), 20, file=CostFile(folder / f"costs{suffix}"))
