"""One tiny random T5 in every combination of what decides its head. Needs numpy alone, to run beside any transformers."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

GOLDEN = Path(__file__).parents[1] / "data" / "t5_heads"
VERSIONS = ("4.57.6", "5.24.0")  # of transformers, that the files of GOLDEN tell of

SIZES = {"vocab_size": 260, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
TABLE, HEAD = "shared.weight", "lm_head.weight"
STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

SOURCE, TARGET = b"bytes", b"to"
FLAGS = (True, False, None)  # None: config.json has no such key

# Which names stand in the file. Where a head stands there it is the table again, but for the last one.
STORED = {
    "table": (TABLE,),
    "table of each stack": STACKS,
    "head alone": (HEAD,),
    "table and equal head": (TABLE, HEAD),
    "all names": (TABLE, *STACKS, HEAD),
    "table and own head": (TABLE, HEAD),
}


class Combination(NamedTuple):
    """What decides a head."""

    model_type: str
    gated: bool
    tie_word_embeddings: bool | None
    scale_decoder_outputs: bool | None
    stored: str

    @property
    def key(self) -> str:
        """A name for the tables of GOLDEN."""
        flags = (self.tie_word_embeddings, self.scale_decoder_outputs)
        tie, scale = ("absent" if each is None else str(each).lower() for each in flags)
        return f"{self.model_type}, {'gated' if self.gated else 'plain'}, tie {tie}, scale {scale}, {self.stored}"


COMBINATIONS = [Combination(*each) for each in itertools.product(("t5", "mt5"), (True, False), FLAGS, FLAGS, STORED)]


def write(folder: Path, combination: Combination, version: str | None) -> Path:
    """A folder as transformers has it, of so many names and flags."""
    folder.mkdir(exist_ok=True)
    flags = {name: getattr(combination, name) for name in ("tie_word_embeddings", "scale_decoder_outputs")}
    document = {
        "model_type": combination.model_type, **SIZES, "feed_forward_proj": "gated-gelu" if combination.gated else "relu",
        "decoder_start_token_id": 0, **{key: value for key, value in flags.items() if value is not None},
        **({} if version is None else {"transformers_version": version}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(document))
    write_tensors(folder / "model.safetensors", tensors(combination.gated, combination.stored))
    return folder


def tensors(gated: bool, stored: str) -> dict[str, np.ndarray]:
    """Weights by transformers' names."""
    generator = np.random.default_rng(0)
    width, inner, ffn = SIZES["d_model"], SIZES["num_heads"] * SIZES["d_kv"], SIZES["d_ff"]

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32) * np.float32(0.4)

    table, head = random(SIZES["vocab_size"], width), random(SIZES["vocab_size"], width)
    found = {name: head if stored == "table and own head" and name == HEAD else table for name in STORED[stored]}
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        layers = f"{stack}.block.0.layer"
        for number, attention in enumerate(attentions):
            shapes = {"q": (inner, width), "k": (inner, width), "v": (inner, width), "o": (width, inner)}
            found |= {f"{layers}.{number}.{attention}.{each}.weight": random(*shape) for each, shape in shapes.items()}
            found[f"{layers}.{number}.layer_norm.weight"] = 1 + random(width)
        found[f"{layers}.0.SelfAttention.relative_attention_bias.weight"] = random(32, SIZES["num_heads"])
        last = f"{layers}.{len(attentions)}"
        inputs, output = random(2, ffn, width), random(width, ffn)
        parts = {"wi_0": inputs[0], "wi_1": inputs[1]} if gated else {"wi": inputs[0]}
        found |= {f"{last}.DenseReluDense.{each}.weight": part for each, part in (parts | {"wo": output}).items()}
        found |= {f"{last}.layer_norm.weight": 1 + random(width), f"{stack}.final_layer_norm.weight": 1 + random(width)}
    return found


def write_tensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file of safetensors, float32."""
    entries, end = {}, 0
    for name, array in arrays.items():
        entries[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
