"""config.json of every model that marlin reads, and generation_config.json: values, sizes, nesting, missing and new keys."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from .case import Case, text_beside, use_of_model
from .materials import BYT5, NATIVE, PACKED, RELATIVES
from .mutations import ESCAPES, HUGE, changed, json_text, value

# Keys that a good file of the materials may lack.
MEGABYTE_KEYS = (
    "global_head_dim", "global_kv_heads", "local_head_dim", "local_kv_heads", "attention_scale", "attention_window",
    "rope_theta",
    "rope_interleaved", "qk_norm", "start_tokens", "token_shift", "norm_eps", "byte_dim", "quantization", "marlin",
    "conditioning",
    "quantization_config", "middle", "vocab_size",
)  # fmt: skip
T5_KEYS = (
    "tie_word_embeddings", "scale_decoder_outputs", "is_gated_act", "dense_act_fn", "feed_forward_proj", "quantization",
    "quantization_config", "marlin", "model_type", "architectures", "num_decoder_layers", "vocab_size", "d_kv",
    "relative_attention_num_buckets", "relative_attention_max_distance", "eos_token_id", "pad_token_id",
    "decoder_start_token_id",
)  # fmt: skip
RELATIVE_KEYS = (
    *T5_KEYS, "subword_blocks", "max_subword_block_size", "downsample_factor", "score_consensus_attn", "is_decoder",
    "is_encoder_decoder", "bos_token_id",
)  # fmt: skip
HOW_PACKED = ("group_size", "bits", "mode")
NO_WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"
# A whole size of which any part of a model would be larger than memory.
LARGE = (2**20, 2**24, 2**31, 2**40, 2**63, HUGE)


def native_config(rng: Random, folder: Path, materials: Path) -> Case:
    """A MegaByte's in the three layouts, and those of packed models."""
    name = rng.choice((*NATIVE, *PACKED))
    document = _copy(folder, materials, name)
    if name in PACKED and rng.random() < 0.5:
        _table(rng, document)
    else:
        document = _mutated(rng, document, MEGABYTE_KEYS)
    (folder / "model" / "config.json").write_bytes(json_text(rng, document))
    return use_of_model(rng, "model", byt5=name.startswith("byt5"))


def relative_config(rng: Random, folder: Path, materials: Path) -> Case:
    """A ByGPT5's and a GBST's, as their authors' code writes it, and a tokenizer's that names the first id."""
    name = rng.choice(RELATIVES)
    document = _copy(folder, materials, name)
    if name == "bygpt5" and rng.random() < 0.2:
        tokenizer = {"bos_token": rng.choice(("</s>", "<extra_id_9999>", ESCAPES, value(rng))), "add_bos_token": value(rng)}
        (folder / "model" / "tokenizer_config.json").write_bytes(json_text(rng, tokenizer))
    else:
        document = _mutated(rng, document, RELATIVE_KEYS)
    (folder / "model" / "config.json").write_bytes(json_text(rng, document))
    return use_of_model(rng, "model", byt5=name == "gbst")


def byt5_config(rng: Random, folder: Path, materials: Path) -> Case:
    """A T5's, as transformers writes it."""
    document = _copy(folder, materials, rng.choice(BYT5))
    document = _mutated(rng, document, T5_KEYS)
    (folder / "model" / "config.json").write_bytes(json_text(rng, document))
    return use_of_model(rng, "model", byt5=True)


def sizes(rng: Random, folder: Path, materials: Path) -> Case:
    """Sizes beyond all memory, with the weights of another model, with none, or with a file that holds none."""
    document = _copy(folder, materials, rng.choice((*NATIVE, *BYT5, *RELATIVES)))
    kind = rng.randrange(3)
    for weights in (*(folder / "model").glob("*.safetensors"), *(folder / "model").glob("*.bin")):
        if kind == 0:
            weights.unlink()
        elif kind == 1:
            weights.write_bytes(NO_WEIGHTS)
    if rng.random() < 0.6:
        numbers = [key for key in document if isinstance(document[key], int) and not isinstance(document[key], bool)]
        for key in rng.sample(numbers, rng.choice((1, 1, 2, 3))):
            document[key] = rng.choice(LARGE)
    else:
        document = _mutated(rng, document, (*MEGABYTE_KEYS, *T5_KEYS))
    (folder / "model" / "config.json").write_bytes(json_text(rng, document))
    if rng.random() < 0.5:
        return Case(["bench", "model", "--plan", "--bandwidth", "10"])
    return use_of_model(rng, "model")


def generation_config(rng: Random, folder: Path, materials: Path) -> Case:
    """What a T5 says of ends, lengths and beams."""
    _copy(folder, materials, rng.choice(BYT5))
    path = folder / "model" / "generation_config.json"
    document = json.loads(path.read_text())
    document = _mutated(rng, document, ("eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "num_beams"))
    path.write_bytes(json_text(rng, document))
    return use_of_model(rng, "model", byt5=True)


def _copy(folder: Path, materials: Path, name: str) -> dict[str, Any]:
    shutil.copytree(materials / name, folder / "model")
    text_beside(folder)
    return json.loads((folder / "model" / "config.json").read_text())


def _mutated(rng: Random, document: dict[str, Any], keys: tuple[str, ...]) -> Any:
    kind = rng.randrange(4)
    if kind == 0:
        return {**document, rng.choice(keys): value(rng)}
    if kind == 1:
        numbers = [key for key in document if isinstance(document[key], int) and not isinstance(document[key], bool)]
        return {**document, rng.choice(numbers): rng.choice((*LARGE, 0, -1, 1, 3, 5, 2**16))} if numbers else value(rng)
    if kind == 2:
        texts = [key for key in document if isinstance(document[key], (str, list))]
        return {**document, rng.choice(texts): rng.choice((ESCAPES, "", None, [], ["x" * 9_000], {}, "gelu", "none", 7))}
    return changed(rng, document)


def _table(rng: Random, document: dict[str, Any]) -> None:
    """The table that says how layers are packed."""
    table = document.get("quantization") or document["quantization_config"]
    entries = [table, *(entry for entry in table.values() if isinstance(entry, dict))]
    entry = rng.choice(entries)
    if "config_groups" in table and rng.random() < 0.7:
        table.update(changed(rng, table))
    elif rng.random() < 0.7:
        entry[rng.choice(HOW_PACKED)] = rng.choice(
            (0, -1, 3, 4, 8, 16, 32, 2**40, "nvfp4", "mxfp8", "affine", ESCAPES, None, [], HUGE, 4.0)
        )
    else:
        table[rng.choice((ESCAPES, "global", "", "x" * 5_000))] = value(rng)
