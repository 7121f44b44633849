"""GGUF files by hand, so that they can be damaged anywhere, and the tiny ByT5 of the tests in llama.cpp's names."""

import re
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np

from marlin_cli.checkpoints.foreign import read_foreign
from marlin_cli.checkpoints.hugging_face import weight_files

DATA = Path(__file__).parents[1] / "data" / "byt5"

# Pieces of transformers' names -> llama.cpp's.
NAMES = (
    (r"^shared\.", "token_embd."),
    (r"^lm_head\.", "output."),
    (r"^(enc|dec)oder\.final_layer_norm\.", r"\1.output_norm."),
    (r"^(enc|dec)oder\.block\.(\d+)\.layer\.", r"\1.blk.\2.layer."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".attn_rel_b."),
    (r"\.layer\.0\.SelfAttention\.", ".attn_"),
    (r"\.layer\.1\.EncDecAttention\.", ".cross_attn_"),
    (r"\.layer\.0\.layer_norm\.", ".attn_norm."),
    (r"^(dec.*)\.layer\.1\.layer_norm\.", r"\1.cross_attn_norm."),
    (r"\.layer\.\d\.layer_norm\.", ".ffn_norm."),
    (r"\.layer\.\d\.DenseReluDense\.wi_0\.", ".ffn_gate."),
    (r"\.layer\.\d\.DenseReluDense\.wi(_1)?\.", ".ffn_up."),
    (r"\.layer\.\d\.DenseReluDense\.wo\.", ".ffn_down."),
)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(content: object) -> bytes:
    """A value of metadata with its type before it."""
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + string(content)
    kind = 8 if isinstance(content[0], bytes) else 5
    items = [string(item) if kind == 8 else struct.pack("<i", item) for item in content]
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)


def gguf(metadata: dict, tensors: dict[str, np.ndarray], version: int = 3) -> bytes:
    """A whole file; float32, float16, and uint16 that stands for bfloat16."""
    kinds = {"float32": 0, "float16": 1, "uint16": 30}
    keys = b"".join(string(key) + value(content) for key, content in metadata.items())
    places, body = b"", b""
    for name, array in tensors.items():
        body += bytes(-len(body) % 32)
        places += string(name) + struct.pack("<I", array.ndim) + struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        places += struct.pack("<IQ", kinds[array.dtype.name], len(body))
        body += array.tobytes()
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + keys + places
    return head + bytes(-len(head) % 32) + body


def byt5_tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a folder in tests/data/byt5 by llama.cpp's names."""
    tensors = {}
    (file,) = weight_files(DATA / name)
    for key, array in read_foreign(file).tensors.items():
        if key.endswith("embed_tokens.weight") or (key == "lm_head.weight" and name == "relu"):
            continue  # the table of embeddings once more
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        tensors[key] = np.array(array.astype(mx.float32))
    return tensors


def byt5_metadata(config: dict, architecture: str = "t5") -> dict:
    """What llama.cpp's converter writes for transformers' config.json."""
    tokens = [b"<pad>", b"</s>", b"<unk>", *(b"<0x%02X>" % byte for byte in range(256))]
    tokens += [b"<extra_id_%d>" % index for index in range(config["vocab_size"] - len(tokens))]
    own = {
        "context_length": 512,
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_ff"],
        "block_count": config["num_layers"],
        "decoder_block_count": config["num_decoder_layers"],
        "attention.head_count": config["num_heads"],
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
        "decoder_start_token_id": config["decoder_start_token_id"],
    }
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": content for key, content in own.items()},
        "general.file_type": 0,
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 2, *[6] * 256, *[4] * (config["vocab_size"] - 259)],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
