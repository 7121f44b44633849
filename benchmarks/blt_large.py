"""BLT-1B larger than memory: peak memory and seconds of packing a checkpoint of its real shape, and of bytes with the result.

    python benchmarks/blt_large.py [--method mse] [--folder FOLDER] [--decode-bytes 64]

The checkpoint has transformers' layout, in bfloat16: 9.2 GB, of which the hash tables are 6.1 in a file of their own. A
block of random rows is written again and again into the tables, and one random layer for all of a stack, which takes no less
to read and to pack. Each step is `marlin` in a process of its own, whose peak the system tells. What is claimed: `quantize`
within 4 GiB, and 64 bytes within the packed bytes and 1 GiB.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from quantize_large import measured

from marlin_cli.models import preset
from marlin_cli.models.blt_config import BltConfig, StackConfig
from marlin_cli.tensor_files import save_rows

GIB = 1 << 30
SPREAD = 0.02
ROWS = 1 << 15

# transformers' names of the stacks, and of the attentions between patches and bytes.
STACKS = {
    "patcher": "patcher", "encoder": "local_encoder", "patches": "global_transformer", "decoder": "local_decoder",
}  # fmt: skip


def random_weights(*shape: int) -> mx.array:
    """Weights of the spread that training gives."""
    return (mx.random.normal(shape) * SPREAD).astype(mx.bfloat16)


def layer_of(stack: StackConfig) -> dict[str, mx.array]:
    """A layer of a stack."""
    width, wide = stack.d_model, stack.ffn_dim
    found = {f"self_attn.{name}_proj.weight": random_weights(width, width) for name in "qkvo"}
    found |= {f"mlp.{name}_proj.weight": random_weights(wide, width) for name in ("gate", "up")}
    found["mlp.down_proj.weight"] = random_weights(width, wide)
    return found | {f"{name}.weight": mx.ones(width) for name in ("input_layernorm", "post_attention_layernorm")}


def reader_of(asking: int, asked: int) -> dict[str, mx.array]:
    """An attention between rows of these widths."""
    found = {"q_proj.weight": random_weights(asked, asking), "o_proj.weight": random_weights(asking, asked)}
    found |= {f"{name}_proj.weight": random_weights(asked, asked) for name in "kv"}
    return found | {"q_norm.weight": mx.ones(asking), "k_norm.weight": mx.ones(asked)}


def tensors_of(config: BltConfig) -> dict[str, mx.array]:
    """All but the hash tables."""
    local, vocab, rows = config.encoder.d_model, config.vocab_size, config.patch_rows
    found = {
        "lm_head.weight": random_weights(vocab, config.decoder.d_model),
        "model.patcher.embed_tokens.weight": random_weights(vocab, config.patcher.d_model),
        "model.patcher.norm.weight": mx.ones(config.patcher.d_model),
        "model.patcher.lm_head.weight": random_weights(vocab, config.patcher.d_model),
        "model.local_encoder.embed_tokens.weight": random_weights(vocab, local),
        "model.local_encoder.patch_embedding_projection.weight": random_weights(rows * local, local),
        "model.local_decoder.patch_embedding_projection.weight": random_weights(rows * local, config.patches.d_model),
        "model.local_decoder.norm.weight": mx.ones(config.decoder.d_model),
    }
    for ours, theirs in STACKS.items():
        stack = vars(config)[ours]
        layer = layer_of(stack)
        found |= {f"model.{theirs}.layers.{n}.{name}": each for n in range(stack.layers) for name, each in layer.items()}
    reader = reader_of(local, local)
    found |= {f"model.local_encoder.cross_attn_layers.0.{name}": each for name, each in reader.items()}
    for number in range(config.decoder.layers):
        found |= {f"model.local_decoder.cross_attn_layers.{number}.{name}": each for name, each in reader.items()}
    return found


def document_of(config: BltConfig) -> dict[str, Any]:
    """Its config.json."""

    def part(stack: StackConfig, **own: Any) -> dict[str, Any]:
        return {
            "hidden_size": stack.d_model, "intermediate_size": stack.ffn_dim, "num_attention_heads": stack.heads,
            "num_key_value_heads": stack.heads, "num_hidden_layers": stack.layers, "rms_norm_eps": stack.norm_eps,
            "rope_theta": stack.rope_theta, "max_position_embeddings": config.max_bytes + 1, **own,
        }  # fmt: skip

    return {
        "model_type": "blt", "vocab_size": config.vocab_size, "patching_threshold": config.threshold, "patch_in_forward": True,
        "patching_mode": "entropy", "cross_attn_k": config.patch_rows,
        "encoder_hash_byte_group_size": list(config.hash_lengths),
        "encoder_hash_byte_group_vocab": config.hash_buckets, "encoder_hash_byte_group_nb_functions": config.hash_functions,
        "local_attention_window_len": config.local_window, "max_patch_length": config.max_patch_bytes,
        "patcher_config": part(config.patcher, sliding_window=config.patcher_window),
        "encoder_config": part(config.encoder, cross_attn_all_layers=False), "global_config": part(config.patches),
        "decoder_config": part(config.decoder, cross_attn_all_layers=config.cross_every_layer),
    }  # fmt: skip


def make_checkpoint(folder: Path, config: BltConfig) -> None:
    """Write a folder of transformers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    table, tensors = "model.encoder_hash_tok_embedding.weight", tensors_of(config)
    rows, columns = config.hash_functions * len(config.hash_lengths) * config.hash_buckets, config.encoder.d_model
    block = random_weights(ROWS, columns)
    mx.eval(block)
    blocks = ({table: block[: min(ROWS, rows - start)]} for start in range(0, rows, ROWS))
    save_rows(folder / "model-00001-of-00002.safetensors", {table: (mx.bfloat16, (rows, columns))}, blocks, {"format": "pt"})
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), tensors, {"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00002-of-00002.safetensors") | {table: "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(document_of(config)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="mse")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is made; a temporary folder unless given")
    parser.add_argument("--decode-bytes", type=int, default=64)
    parser.add_argument("--hash-buckets", type=int, default=500_002)
    arguments = parser.parse_args()
    mx.random.seed(0)
    config = BltConfig(**{**vars(preset("blt-1b")), "hash_buckets": arguments.hash_buckets})
    marlin = [sys.executable, "-m", "marlin_cli"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        model, packed = folder / "model", folder / "packed"
        start = time.perf_counter()
        if not (model / "config.json").exists():
            make_checkpoint(model, config)
            print(f"made in {time.perf_counter() - start:.0f} s", flush=True)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        seconds, peak = measured(
            [*marlin, "quantize", str(model), "--method", arguments.method, "-o", str(packed), "--overwrite", "--json"]
        )
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


if __name__ == "__main__":
    main()
