"""ByT5 on an NVIDIA GPU: marlin in 16 bits and packed, against transformers (bfloat16, sdpa), in one run.

    python benchmarks/cuda_byt5.py [--streams 1,8,64] [--formats nvfp4] [--source 256] [--target 64] [--rounds 5] [--operations]

byt5-small's shape with random weights, greedy, ids on the host. Milliseconds: medians of rounds that alternate, the first one
for warming up. `--operations` has marlin's own path without kernels for whole steps beside them. Ids are compared: transformers
and marlin round at different places, so they part at some near tie; packed weights are others.
"""

import argparse
import os
import statistics
import tempfile
import time

import mlx.core as mx
import numpy as np
import torch
from measured import Row, add_rows_option, report
from transformers import T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from marlin_cli import ByT5Model
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.encoder_decoder import encode
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

SHAPE = {
    "vocab_size": 384, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_decoder_layers": 4, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip


def models(formats: list[str]) -> tuple[T5ForConditionalGeneration, dict[str, ByT5Model]]:
    """The same random weights in transformers, in marlin, and packed."""
    torch.manual_seed(0)
    drafted = T5ForConditionalGeneration(T5Config(**SHAPE))
    with torch.no_grad():  # T5's own beginnings write the same id again and again
        drafted.lm_head.weight = torch.nn.Parameter(torch.randn_like(drafted.shared.weight) * SHAPE["d_model"] ** -0.5)
        for layer in drafted.decoder.block:
            layer.layer[1].EncDecAttention.o.weight.mul_(4)
    with tempfile.TemporaryDirectory() as folder:
        drafted.to(torch.bfloat16).save_pretrained(folder)
        peer = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
        plain = ByT5Model.from_pretrained(folder, device="cuda")
        mx.eval(plain.network.parameters())
    own = {"bfloat16": plain}
    for name in formats:
        wide = "mxfp8" if name.endswith("fp4") else name
        settings = QuantizationSettings(
            encoder_format=name, decoder_format=name, cross_format=name, wo_format=wide,
            group_size=32 if name.startswith("int") else None,
        )  # fmt: skip
        own[name] = ByT5Model(quantize_network(plain.network, settings, method="rtn").network, plain.device)
        mx.eval(own[name].network.parameters())
    return peer, own


def peer_run(peer: T5ForConditionalGeneration, sources: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
    ids = torch.tensor(sources).cuda()
    with torch.no_grad():
        torch.cuda.synchronize()
        start = time.perf_counter()
        peer.encoder(ids)
        torch.cuda.synchronize()
        encoded = time.perf_counter()
        out = peer.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return encoded - start, time.perf_counter() - encoded, out[:, 1:].tolist()


def own_run(model: ByT5Model, sources: list[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
    inputs = [bytes(value - 3 for value in source[:-1]) for source in sources]
    start = time.perf_counter()
    mx.eval(encode(model.network, mx.array(sources)))
    encoded = time.perf_counter()
    answers = model.answers(inputs, AnswerLimits(count, min_length=count))
    return encoded - start, time.perf_counter() - encoded, [list(best[0].ids) for best in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--formats", default="nvfp4")
    parser.add_argument("--source", type=int, default=256)
    parser.add_argument("--target", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", action="store_true")
    add_rows_option(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer, own = models(arguments.formats.split(","))
    rng = np.random.default_rng(0)
    for streams in map(int, arguments.streams.split(",")):
        sources = [[*rng.integers(3, 259, arguments.source).tolist(), 1] for _ in range(streams)]
        sides = {"transformers": lambda s=sources: peer_run(peer, s, arguments.target)}
        for name, model in own.items():
            sides[name] = lambda m=model, s=sources: own_run(m, s, arguments.target)
            if arguments.operations:
                sides[f"{name} by operations"] = sides[name]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        written: dict[str, list[list[int]]] = {}
        for _ in range(arguments.rounds + 1):
            for name, run in sides.items():
                os.environ["MARLIN_PATCHES"] = "operations" if "operations" in name else "auto"
                *took, written[name] = run()
                times[name].append((took[0], took[1]))
        encoders, wholes = (
            {key: statistics.median(each[i] for each in some[1:]) for key, some in times.items()} for i in (0, 1)
        )
        for name in list(sides)[1:]:
            other = name.removesuffix(" by operations") if "operations" in name else "transformers"
            same = np.mean([np.mean(np.array(a) == np.array(b)) for a, b in zip(written[name], written[other], strict=True)])
            report(
                Row(
                    f"ByT5, {arguments.source} in, {arguments.target} out, {name}, {streams} streams",
                    f"{wholes[name] * 1e3:.1f} ms, of it the encoder {encoders[name] * 1e3:.1f}",
                    f"transformers bfloat16: {wholes['transformers'] * 1e3:.0f} ms, {encoders['transformers'] * 1e3:.1f}",
                    f"{wholes['transformers'] / wholes[name]:.2f}x, {wholes['bfloat16'] / wholes[name]:.2f}x our bfloat16",
                    f"{same:.0%} of ids as {other}",
                ),
                arguments.rows_file,
            )


if __name__ == "__main__":
    main()
