"""EvaByte larger than memory: peak memory and seconds of packing a checkpoint of its real shape, and of bytes with the result.

    python benchmarks/evabyte_large.py [--layers 32] [--method mse] [--folder FOLDER] [--decode-bytes 64]
    python benchmarks/evabyte_large.py --calibrate 128

The checkpoint has the hub's layout, a shard a layer, 13 GB in 16 bits with all 32 layers; its layers are one random layer
again and again, which takes no less to read and to pack. Each step is `marlin` in a process of its own, whose peak the
system tells. What is claimed: `quantize` to nvfp4 within 4 GiB, and 64 bytes within the packed bytes and 1 GiB; with
--calibrate alone, `calibrate` on a window of so many bytes within 4 GiB, where memory is short of the model's 26 GB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from quantize_large import measured

from marlin_cli.models import preset
from marlin_cli.models.evabyte import EvaByteConfig

GIB = 1 << 30
SPREAD = 0.02


def random_weights(*shape: int) -> mx.array:
    """Weights of the spread that training gives."""
    return (mx.random.normal(shape) * SPREAD).astype(mx.bfloat16)


def layer_of(config: EvaByteConfig) -> dict[str, mx.array]:
    """A layer by its names in the hub's files."""
    width, wide = config.d_model, config.ffn_dim
    weigher = (1, config.heads, 1, 1, config.head_dim)
    shapes = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj.weight": (wide, width),
        "mlp.up_proj.weight": (wide, width),
        "mlp.down_proj.weight": (width, wide),
    }
    shapes |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    shapes |= {"self_attn.adaptive_phi": weigher, "self_attn.adaptive_mu_k": weigher}
    return {name: random_weights(*shape) for name, shape in shapes.items()}


def make_checkpoint(folder: Path, config: EvaByteConfig) -> int:
    """Write a folder of the hub's layout, a shard at a time: its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, width, weight_map, total = config.vocab_size, config.d_model, {}, 0
    layer = layer_of(config)
    ends = {
        "model.embed_tokens.weight": random_weights(vocab, width),
        "model.norm.weight": random_weights(width),
        "lm_head.weight": random_weights(config.prediction_heads * vocab, width),
    }
    shards = [
        *({f"model.layers.{index}.{name}": each for name, each in layer.items()} for index in range(config.layers)),
        ends,
    ]
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / file), tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(each.nbytes for each in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    document = {
        "model_type": "evabyte", "attention_class": "eva", "bos_token_id": 1, "eos_token_id": 11, "hidden_act": "silu",
        "chunk_size": config.chunk_bytes, "window_size": config.window_bytes, "num_pred_heads": config.prediction_heads,
        "hidden_size": width, "intermediate_size": config.ffn_dim, "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers, "vocab_size": vocab, "norm_add_unit_offset": True, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "max_position_embeddings": config.max_bytes + 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(document))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="mse")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is made; a temporary folder unless given")
    parser.add_argument("--decode-bytes", type=int, default=64)
    parser.add_argument("--calibrate", type=int, help="bytes of a window; nothing else is measured then")
    arguments = parser.parse_args()
    mx.random.seed(0)
    config = EvaByteConfig(**{**vars(preset("evabyte")), "layers": arguments.layers})
    marlin = [sys.executable, "-m", "marlin_cli"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        model, packed = folder / "model", folder / "packed"
        start = time.perf_counter()
        if not (model / "config.json").exists():
            total = make_checkpoint(model, config)
            print(f"made {total / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        if arguments.calibrate:
            window = ["--seq-bytes", str(arguments.calibrate), "--max-bytes", str(arguments.calibrate)]
            statistics = ["-o", str(folder / "stats.safetensors"), "--overwrite", "--device", "cpu"]
            seconds, peak = measured([*marlin, "calibrate", str(model), *window, *statistics])
            print(
                f"calibrate: a window of {arguments.calibrate} bytes of {size / 1e9:.2f} GB in {seconds:.0f} s,"
                f" peak {peak / GIB:.2f} GiB resident (claimed: 4)"
            )
            return
        options = ["--global-bits", "4", "--method", arguments.method, "-o", str(packed), "--overwrite", "--json"]
        seconds, peak = measured([*marlin, "quantize", str(model), *options])
        packed_size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        print(
            f"quantize {arguments.method}: {size / 1e9:.2f} GB to {packed_size / 1e9:.2f} GB in {seconds:.0f} s,"
            f" peak {peak / GIB:.2f} GiB resident (claimed: 4)",
            flush=True,
        )
        generate = ["generate", str(packed), "-p", "The quick brown fox jumps ", "--max-bytes", str(arguments.decode_bytes)]
        seconds, peak = measured([*marlin, *generate, "--device", "cpu"])
        print(
            f"generate: {arguments.decode_bytes} bytes in {seconds:.0f} s with reading the model, peak {peak / GIB:.2f} GiB"
            f" resident (claimed: {packed_size / GIB + 1:.2f})",
            flush=True,
        )
        timed = ["--prompt-bytes", "64", "--decode-bytes", str(arguments.decode_bytes), "--repeats", "2", "--roofline"]
        found = subprocess.run(
            [*marlin, "bench", str(packed), *timed, "--device", "cpu", "--format", "json"], capture_output=True, text=True
        )
        if found.returncode:
            print(found.stderr.strip())
            return
        result = json.loads(found.stdout)["models"][0]
        print(json.dumps({name: result[name] for name in ("throughput", "roofline") if name in result}, indent=1))


if __name__ == "__main__":
    main()
