"""CANINE and ByGPT5 on the CPU against transformers in float32, on the same random weights: ms, and seconds of processors.

    python benchmarks/characters.py [--only canine,bygpt5] [--shapes 1x512,8x512] [--streams 1,8] [--prompt-bytes 128]
                                    [--steps 64] [--rounds 5] [--formats int8:8,nvfp4:8,mxfp8:16] [--results FILE]

CANINE has the shape of google/canine-s (132 M parameters) and makes the states of texts of so many positions. ByGPT5 has
that of byt5-small's decoder (73 M parameters) and writes `--steps` ids after a prompt, greedily, without stopping; its peer
is transformers' T5 decoder without encoder states, with its own cache. marlin runs in float32, and packed by nearest values
(how well they are chosen changes no time), with activations of float32 or, after the colon, 8 bits. States of float32 must be
those of transformers within 1e-4 of the largest, and its ids the same; how far packed ones are off is said. Runs alternate
within a round, after one each that does not count; medians over the rounds; the same threads for all (MARLIN_THREADS). On a
machine that does other work, processor seconds say more than the clock's: they are given beside them, and as a second ratio.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from measured import Row, add_rows_option, report
from transformers import CanineConfig, CanineModel, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.engine.byte_decoding import ByteByByte
from marlin_cli.engine.characters import encode
from marlin_cli.models import build
from marlin_cli.models.layers import linear_layers, set_modules
from marlin_cli.ops import QuantizedLinear, round_activations
from marlin_cli.ops.cpu import kernels, thread_count
from marlin_cli.quantization.encoders import encode as encode_weights
from marlin_cli.quantization.formats import FORMATS

PEER = "transformers float32"
LARGEST_ERROR = 1e-4  # of float32, relative to the largest value

Ids = list[list[int]]


@dataclass(frozen=True)
class Took:
    """What runs took: medians."""

    seconds: float
    processor_seconds: float


def processor_seconds() -> float:
    """Of all threads of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(runs: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Took], dict[str, Any]]:
    """The medians of every run, in rounds that alternate, and what each returned last."""
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in runs}
    outputs = {label: run() for label, run in runs.items()}
    for _ in range(rounds):
        for label, run in runs.items():
            start, used = time.perf_counter(), processor_seconds()
            outputs[label] = run()
            times[label].append((time.perf_counter() - start, processor_seconds() - used))
    return {label: Took(*map(statistics.median, zip(*each, strict=True))) for label, each in times.items()}, outputs


def packed(network: Any, format: str, activation_bits: int) -> Any:
    """A copy of the network with every linear layer in a format."""
    copy = type(network)(network.config)
    copy.update(network.parameters())
    layers = []
    for path, layer in linear_layers(copy).items():
        found = encode_weights(layer.weight, FORMATS[format])
        arrays = {"weight": found.weight, "scales": found.scales}
        optional = {"biases": found.biases, "global_scale": found.global_scale, "bias": layer.get("bias")}
        arrays |= {name: mx.array(value) for name, value in optional.items() if value is not None}
        settings = {"group_size": found.group_size, "bits": found.format.bits, "mode": found.format.mode}
        layers.append((path, QuantizedLinear(arrays, **settings)))
    set_modules(copy, layers)
    round_activations(copy, activation_bits)
    mx.eval(copy.parameters())
    return copy


def networks(folder: Path, formats: list[tuple[str, int]]) -> dict[str, Any]:
    """What marlin makes of a folder: in float32, and in each format."""
    checkpoint = read_checkpoint(folder)
    plain = build(checkpoint.config, checkpoint.weights, where=str(folder), dtype=mx.float32)
    found = {"float32": plain}
    for format, bits in formats:
        found[f"{format}, 8-bit activations" if bits == 8 else format] = packed(plain, format, bits)
    return found


# CANINE


def canine(arguments: argparse.Namespace, formats: list[tuple[str, int]]) -> list[Row]:
    """A row for every shape and format."""
    torch.manual_seed(0)
    model = CanineModel(CanineConfig()).eval()
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        ours = networks(Path(name), formats)
    rows = []
    for shape in arguments.shapes.split(","):
        texts, positions = map(int, shape.split("x"))
        # Two positions are of the marks.
        points = np.random.default_rng(0).integers(32, 0x2000, (texts, positions - 2)).tolist()
        ids = torch.tensor([[0xE000, *text, 0xE001] for text in points])

        @torch.no_grad()
        def theirs(ids: torch.Tensor = ids) -> Any:
            return model(ids).last_hidden_state.numpy()

        def of(network: Any, points: Ids = points) -> Callable[[], Any]:
            return lambda: np.stack([np.array(states) for states in encode(network, points)])

        runs = {PEER: theirs, **{label: of(network) for label, network in ours.items()}}
        took, outputs = measured(runs, arguments.rounds)
        for label in ours:
            error = np.abs(outputs[label] - outputs[PEER]).max() / np.abs(outputs[PEER]).max()
            off = np.sqrt(((outputs[label] - outputs[PEER]) ** 2).mean() / (outputs[PEER] ** 2).mean())
            if label == "float32" and error > LARGEST_ERROR:
                sys.exit(f"float32 states differ from transformers' by {error:.1e} of the largest")
            same = f"states within {error:.0e} of the largest" if label == "float32" else f"states {off:.1%} off (RMS)"
            what = f"CANINE (canine-s's shape), {label}, {texts} x {positions} characters"
            rows.append(row(what, took[label], took[PEER], same))
            report(rows[-1], arguments.rows_file)
    return rows


# ByGPT5


def random_decoder() -> T5ForConditionalGeneration:
    """A T5 of byt5-small's decoder, and the smallest encoder, which nothing reads."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=1, num_decoder_layers=4, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        # transformers has tied the head, whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 1472**-0.5)
    return model


def bygpt5_folder(model: T5ForConditionalGeneration, folder: Path) -> None:
    """What the authors' code would write of the decoder."""
    document = model.config.to_dict() | {
        "model_type": "bygpt5", "is_decoder": True, "is_encoder_decoder": False, "tie_word_embeddings": False,
        "transformers_version": "4.43.3",
    }  # fmt: skip
    document.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(document))
    torch.save(
        {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if not name.startswith("encoder.") and ".layer.1." not in name
        },
        folder / "pytorch_model.bin",
    )


@torch.no_grad()
def decoded_by_transformers(model: T5ForConditionalGeneration, prompts: Ids, steps: int) -> Any:
    """The ids after prompts, greedily: [streams, steps]."""
    cache, ids, found = DynamicCache(), torch.tensor(prompts), []
    for _ in range(steps):
        hidden = model.decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        ids = model.lm_head(hidden).argmax(-1, keepdim=True)
        found.append(ids)
    return torch.cat(found, dim=1).numpy()


def decoded_by_marlin(network: Any, prompts: Ids, steps: int) -> Any:
    """Likewise."""
    state = ByteByByte(network, prompts)
    found = []
    for step in range(steps):
        ids = mx.argmax(state.logits, axis=-1)
        found.append(np.array(ids))
        if step + 1 < steps:
            state.push(ids)
    return np.stack(found, axis=1)


def bygpt5(arguments: argparse.Namespace, formats: list[tuple[str, int]]) -> list[Row]:
    """A row for every number of streams and format."""
    model, rows = random_decoder(), []
    with tempfile.TemporaryDirectory() as name:
        bygpt5_folder(model, Path(name))
        ours = networks(Path(name), formats)
    for streams in map(int, arguments.streams.split(",")):
        prompts = np.random.default_rng(0).integers(3, 259, (streams, arguments.prompt_bytes)).tolist()
        runs: dict[str, Callable[[], Any]] = {PEER: partial(decoded_by_transformers, model, prompts, arguments.steps)}
        runs |= {label: partial(decoded_by_marlin, network, prompts, arguments.steps) for label, network in ours.items()}
        took, outputs = measured(runs, arguments.rounds)
        for label in ours:
            agreed = float((outputs[label] == outputs[PEER]).mean())
            if label == "float32" and agreed < 1:
                sys.exit(f"{agreed:.0%} of float32's ids are those of transformers")
            what = f"ByGPT5 (byt5-small's decoder), {label}, {streams} x {arguments.prompt_bytes} bytes, {arguments.steps} more"
            rows.append(row(what, took[label], took[PEER], f"{agreed:.0%} of the ids"))
            report(rows[-1], arguments.rows_file)
    return rows


def row(what: str, ours: Took, theirs: Took, same: str) -> Row:
    """A comparison, with both kinds of time."""

    def said(took: Took) -> str:
        return f"{took.seconds * 1000:.0f} ms ({took.processor_seconds:.2f} s of processors)"

    return Row(
        f"{what}, {thread_count()} threads",
        said(ours),
        f"{PEER} {said(theirs)}",
        f"{theirs.seconds / ours.seconds:.2f}x ({theirs.processor_seconds / ours.processor_seconds:.2f}x by processors)",
        f"{same}, as {PEER}",
    )


PARTS = {"canine": canine, "bygpt5": bygpt5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--shapes", default="1x512,8x512", help="of CANINE: texts x positions")
    parser.add_argument("--streams", default="1,8", help="of ByGPT5")
    parser.add_argument("--prompt-bytes", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", default="int8:8,nvfp4:8,mxfp8:16", help="beside float32, with bits of activations")
    parser.add_argument("--results", type=Path, help="write what was run, where, and the rows to this file, as JSON")
    add_rows_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    formats = [(name, int(bits)) for name, bits in (each.split(":") for each in arguments.formats.split(",") if each)]
    settings = {
        "versions": {package: version(package) for package in ("transformers", "torch", "mlx")},
        "threads": thread_count(),
        "kernels": kernels()[1],
        "rounds": arguments.rounds,
        "load_before": os.getloadavg(),
    }
    print(json.dumps(settings), flush=True)
    rows = [row for name in arguments.only.split(",") for row in PARTS[name](arguments, formats)]
    settings["load_after"] = os.getloadavg()
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(settings | {"rows": [asdict(each) for each in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
