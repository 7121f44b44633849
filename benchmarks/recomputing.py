"""Time of a byte at the end of a long context beside references that run the whole context again for each byte.

    python benchmarks/recomputing.py [--only block_recurrent,evabyte,blt,spacebyte] [--context 4096] [--bytes 64] [--rounds 3]

Block-Recurrent: block-recurrent-transformer-pytorch 0.4.4 at the shape of the preset, in segments of 512 bytes as its
wrapper generates: what is timed is its pass over the last segment, nearly full. EvaByte: the transcription of tests/peers
(its own code needs triton) at 8 layers 1,024 wide, windows of 2,048. BLT: transformers without its cache, at half the widths
of BLT-1B and a third of its layers. SpaceByte: the transcription of tests/peers (its own code needs a GPU for its attention)
at half the layers of the preset. Weights are random, both sides float32 on this CPU, and marlin packed to nvfp4 too (of a
BLT bytes to mxfp8). Logits of the float32 models are compared; sides are timed in turns, the least of each is shown.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.engine.continuation import begin
from marlin_cli.models import build, preset
from marlin_cli.models.blt_config import StackConfig
from marlin_cli.models.evabyte import EvaByteConfig
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "peers")]


def block_recurrent(context: int, folder: Path) -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """Our network, and the reference's logits of the last byte of ids [context]."""
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    config = preset("block-recurrent-enwik8")
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(
        num_tokens=256, dim=config.d_model, depth=config.layers, dim_head=config.head_dim, heads=config.heads,
        max_seq_len=config.block_bytes, block_width=config.block_bytes, recurrent_layers=(config.recurrent_layers[0] + 1,),
    ).eval()  # fmt: skip
    torch.save(model.state_dict(), folder / "model.pt")
    read = read_checkpoint(folder / "model.pt", ImportOptions(block_bytes=config.block_bytes, bos_byte=0))
    network = build(read.config, read.weights, where="here", dtype=mx.float32)
    handed: list[Any] = []

    @torch.no_grad()
    def last(ids: np.ndarray) -> np.ndarray:
        whole = (len(ids) - 1) // config.block_bytes * config.block_bytes
        if not handed:  # what earlier segments leave is made once, as its wrapper does
            memories: Any = []
            states: Any = []
            for start in range(0, whole, config.block_bytes):
                segment = torch.from_numpy(ids[None, start : start + config.block_bytes])
                _, memories, states = model(segment, xl_memories=memories, states=states)
            handed.extend((memories, states))
        logits, _, _ = model(torch.from_numpy(ids[None, whole:]), xl_memories=handed[0], states=handed[1])
        return logits[0, -1].numpy()

    return network, last


def evabyte(context: int, folder: Path) -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """As `block_recurrent`."""
    from evabyte_cases import document_of, random_evabyte, tensors_of
    from torch_evabyte import TorchEvaByte

    config = EvaByteConfig(d_model=1024, ffn_dim=2752, heads=8, layers=8, prediction_heads=8)
    network = random_evabyte(**{name: value for name, value in vars(config).items() if name != "model_type"})
    tensors = {name: torch.from_numpy(array) for name, array in tensors_of(network).items()}
    model = TorchEvaByte(document_of(config), tensors)
    return network, lambda ids: model(torch.from_numpy(np.pad(ids + 64, (1, 0), constant_values=1)[None]))[0, -1, 0].numpy()


def blt(context: int, folder: Path) -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """As `block_recurrent`."""
    from blt_cases import blt_folder, random_blt
    from transformers import BltForCausalLM

    network = random_blt(
        patcher=StackConfig(384, 1024, 6, 5, rope_theta=1e4), encoder=StackConfig(512, 1408, 8, 1),
        patches=StackConfig(1024, 2816, 8, 8), decoder=StackConfig(512, 1408, 8, 3), patcher_window=512, local_window=512,
        hash_lengths=(3, 4, 5, 6, 7, 8), hash_buckets=5003, max_bytes=8191,
    )  # fmt: skip
    model = BltForCausalLM.from_pretrained(blt_folder(folder / "model", network), dtype=torch.float32).eval()

    @torch.no_grad()
    def last(ids: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.pad(ids + 4, (1, 0), constant_values=1)[None])
        return model(input_ids=given, use_cache=False, logits_to_keep=1).logits[0, -1].numpy()

    return network, last


def spacebyte(context: int, folder: Path) -> tuple[Any, Callable[[np.ndarray], np.ndarray]]:
    """As `block_recurrent`."""
    from torch_spacebyte import TorchSpaceByte, TorchSpaceConfig

    torch.manual_seed(0)
    model = TorchSpaceByte(
        TorchSpaceConfig(
            d_model=1024, context_size=8192, d_key=64, n_layers=6, rope=True, global_context_size=8192, d_local=512,
            n_initial_layers=3, n_local_layers=6, local_attention_window=512,
        )
    ).eval()  # fmt: skip
    torch.save(model.checkpoint(), folder / "ckpt.pt")
    read = read_checkpoint(folder / "ckpt.pt")
    network = build(read.config, read.weights, where="here", dtype=mx.float32)

    @torch.no_grad()
    def last(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(np.pad(ids, (1, 0), constant_values=255)[None]))[0, -1].numpy()

    return network, last


def seconds_of(network: Any, ids: np.ndarray, count: int) -> float:
    """Of a byte, the mean of `count` behind a context."""
    state = begin(network, [bytes(ids.tolist())])
    mx.eval(state.logits)
    start = time.perf_counter()
    for _ in range(count):
        state.push(mx.argmax(state.logits, axis=-1))
        mx.eval(state.logits)
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="block_recurrent,evabyte,blt,spacebyte")
    parser.add_argument("--context", type=int, default=4096, help="bytes, the last block or window of which is nearly full")
    parser.add_argument("--bytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    torch.set_num_threads(2)
    for name in arguments.only.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            ids = np.random.default_rng(0).integers(97, 123, arguments.context - arguments.bytes)
            ids[::5] = 32  # words, as patches of a SpaceByte are
            sides = {"block_recurrent": block_recurrent, "evabyte": evabyte, "blt": blt, "spacebyte": spacebyte}
            network, last = sides[name](arguments.context, Path(temporary))
            found = np.array(begin(network, [bytes(ids.tolist())]).logits[0])
            print(f"{name}: logits differ by {np.abs(found - last(ids)).max():.1e}", flush=True)
            packed = quantize_network(network, QuantizationSettings(), method="rtn").network
            times: dict[str, list[float]] = {"reference": [], "marlin float32": [], "marlin nvfp4": []}
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                last(ids)
                times["reference"].append(time.perf_counter() - start)
                times["marlin float32"].append(seconds_of(network, ids, arguments.bytes))
                times["marlin nvfp4"].append(seconds_of(packed, ids, arguments.bytes))
            least = {side: min(each) for side, each in times.items()}
            for side, seconds in least.items():
                print(f"  {side:15} {1e3 * seconds:8.2f} ms a byte, {least['reference'] / seconds:6.1f} x", flush=True)


if __name__ == "__main__":
    main()
