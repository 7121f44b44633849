"""ByT5 generation on the CPU against transformers and CTranslate2, on the same random weights: ms for inputs and steps.

    python benchmarks/byt5_generation.py [--streams 1,8] [--input-bytes 256] [--steps 64] [--rounds 3] [--skip bfloat16,...]

The shape is that of google/byt5-small (300 M parameters). Each program reads the inputs and writes `--steps` ids, greedily and
without stopping. Timed are the encoder, and everything; what is left is spread over the steps. marlin runs in float32, and
with packed weights, whose activations are float32 or rounded to 8 bits as CTranslate2 rounds its own; `wo` keeps 8 bits where
not all layers are named. The ids of float32 runs must be those of transformers. Rounds alternate, after a short answer by each
that does not count; medians; the same threads for all (MARLIN_THREADS).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import ctranslate2
import mlx.core as mx
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from measured import Row, add_rows_option, report
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from marlin_cli import ByT5Model
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.encoder_decoder import encode
from marlin_cli.ops import round_activations
from marlin_cli.ops.cpu import kernels, thread_count
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

# Seconds of the encoder and of the whole, and the ids of each answer.
Run = Callable[[list[list[int]], int], tuple[float, float, list[list[int]]]]


def random_folder(folder: Path) -> None:
    """A byt5-small with random weights whose answers depend on the input, as transformers saves it."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_decoder_layers=4, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        # transformers has tied the head, whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 1472**-0.5)
        for layer in model.decoder.block:
            layer.layer[1].EncDecAttention.o.weight.mul_(4)
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def transformers_run(folder: Path, dtype: torch.dtype) -> Run:
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def run(sources: list[list[int]], steps: int) -> tuple[float, float, list[list[int]]]:
        ids = torch.tensor(sources)
        start = time.perf_counter()
        model.encoder(ids)
        encoded = time.perf_counter()
        out = model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=1)
        return encoded - start, time.perf_counter() - encoded, out[:, 1:].tolist()

    return run


def ctranslate2_run(folder: Path) -> Run:
    converted = folder / "ctranslate2"
    TransformersConverter(str(folder)).convert(str(converted), quantization="int8", force=True)
    tokenizer = ByT5Tokenizer.from_pretrained(folder)
    translator = ctranslate2.Translator(
        str(converted), device="cpu", compute_type="int8", inter_threads=1, intra_threads=thread_count()
    )

    def run(sources: list[list[int]], steps: int) -> tuple[float, float, list[list[int]]]:
        tokens = [tokenizer.convert_ids_to_tokens(source) for source in sources]
        # It has no call for a T5's encoder alone: a single step, less what a step costs in a long answer.
        times, answers = [], []
        for length in (1, steps):
            start = time.perf_counter()
            results = translator.translate_batch(tokens, beam_size=1, max_decoding_length=length, min_decoding_length=length)
            times.append(time.perf_counter() - start)
            answers = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        short, whole = times
        return short - (whole - short) / (steps - 1), whole, answers

    return run


def marlin_run(model: ByT5Model) -> Run:
    def run(sources: list[list[int]], steps: int) -> tuple[float, float, list[list[int]]]:
        start = time.perf_counter()
        mx.eval(encode(model.network, mx.array(sources)))
        encoded = time.perf_counter()
        inputs = [bytes(value - 3 for value in source[:-1]) for source in sources]
        answers = model.answers(inputs, AnswerLimits(steps, min_length=steps))
        return encoded - start, time.perf_counter() - encoded, [list(answer[0].ids) for answer in answers]

    return run


def packed(model: ByT5Model, format: str, wo_format: str, activation_bits: int = 16) -> ByT5Model:
    """The model with its layers in a format, by nearest values: how well they are chosen changes no time."""
    settings = QuantizationSettings(
        encoder_format=format, decoder_format=format, cross_format=format, wo_format=wo_format
    )  # fmt: skip
    network = quantize_network(model.network, settings, method="rtn").network
    round_activations(network, activation_bits)
    return ByT5Model(network, model.device)


def agreement(answers: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the ids that are the same, place by place."""
    return float(np.mean(np.array(answers) == np.array(expected)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--input-bytes", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", default="", help="runs to leave out, by name, with commas")
    add_rows_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    skipped = arguments.skip.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_folder(folder)
        plain = ByT5Model.from_pretrained(folder, device="cpu")
        makers: dict[str, Callable[[], Run]] = {
            "transformers float32": lambda: transformers_run(folder, torch.float32),
            "transformers bfloat16": lambda: transformers_run(folder, torch.bfloat16),
            "ctranslate2 int8": lambda: ctranslate2_run(folder),
            "marlin float32": lambda: marlin_run(plain),
            "marlin mxfp8": lambda: marlin_run(packed(plain, "mxfp8", "mxfp8")),
            "marlin nvfp4": lambda: marlin_run(packed(plain, "nvfp4", "mxfp8")),
            "marlin nvfp4 with 8-bit activations": lambda: marlin_run(packed(plain, "nvfp4", "int8", 8)),
            "marlin nvfp4 in all layers, 8-bit activations": lambda: marlin_run(packed(plain, "nvfp4", "nvfp4", 8)),
            "marlin int8 with 8-bit activations": lambda: marlin_run(packed(plain, "int8", "int8", 8)),
        }
        runs = {label: make() for label, make in makers.items() if label not in skipped}
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch", "ctranslate2", "mlx"))
    print(f"{versions}; {thread_count()} threads, kernels: {kernels()[1]}", flush=True)
    rng = np.random.default_rng(0)
    for streams in map(int, arguments.streams.split(",")):
        sources = [[*rng.integers(3, 259, arguments.input_bytes).tolist(), 1] for _ in range(streams)]
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in runs}
        answers = {}
        for run in runs.values():
            run(sources[:1], 2)
        for number in range(arguments.rounds):
            for label, run in runs.items():
                encoder, whole, answers[label] = run(sources, arguments.steps)
                times[label].append((encoder, whole))
                print(f"round {number + 1}, {streams} streams, {label}: {encoder:.2f} s, {whole:.2f} s", flush=True)
        expected = answers.get("transformers float32")
        assert expected is None or answers.get("marlin float32") in (None, expected), "float32 ids differ from transformers'"
        found = {label: [statistics.median(part) for part in zip(*each, strict=True)] for label, each in times.items()}
        peers = {label: each for label, each in found.items() if not label.startswith("marlin")}
        for label, (encoder, whole) in found.items():
            same = "no ids compared" if expected is None else f"{agreement(answers[label], expected):.0%} of the ids"
            of_all = f"encoder {encoder * 1000:.0f}, a step {(whole - encoder) / arguments.steps * 1000:.1f}"
            print(
                f"{streams} x {arguments.input_bytes} bytes, {label}: {of_all}, all {whole * 1000:.0f} ms; {same}", flush=True
            )
            if label in peers:
                continue
            report(
                Row(
                    f"ByT5 (byt5-small's shape), {label.removeprefix('marlin ')}, {streams} x {arguments.input_bytes} bytes in,"
                    f" {arguments.steps} out, {thread_count()} threads",
                    f"{whole * 1000:.0f} ms ({of_all})",
                    ", ".join(f"{name} {its * 1000:.0f}" for name, (_, its) in peers.items()) + " ms",
                    ", ".join(f"{its / whole:.2f}x" for _, its in peers.values()),
                    f"{same} as transformers float32",
                ),
                arguments.rows_file,
            )


if __name__ == "__main__":
    main()
