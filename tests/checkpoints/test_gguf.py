"""GGUF files of ByT5: the numbers of the folder they came from, and one line for every file that is damaged or another's."""

import contextlib
import json
import random
import re
import shutil
import struct
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf_bytes import DATA, byt5_metadata, byt5_tensors, gguf, string

from marlin_cli import ByT5Model, load
from marlin_cli.checkpoints import fingerprint, read_checkpoint
from marlin_cli.checkpoints.gguf_file import GGUFFile
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError

SOURCE, TARGET = b"bytes \x00\xff", b"target"


def config_of(name: str) -> dict:
    return json.loads((DATA / name / "config.json").read_text())


def write(path: Path, name: str = "gated", metadata: dict | None = None, tensors: dict | None = None) -> Path:
    """The model in tests/data/byt5/`name` as GGUF; entries given replace others, and None leaves one out."""
    keys = byt5_metadata(config_of(name)) | (metadata or {})
    arrays = byt5_tensors(name) | (tensors or {})
    path.write_bytes(gguf(*({k: v for k, v in each.items() if v is not None} for each in (keys, arrays))))
    return path


def refused(path: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load(path, device="cpu")
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable()
    return message


@pytest.mark.parametrize("name", ["gated", "relu"])
def test_the_numbers_of_the_folder_it_came_from(name, tmp_path):
    path = write(tmp_path / "model.gguf", name)
    with contextlib.nullcontext() if name == "gated" else pytest.warns(AssumptionWarning):
        expected, found = load(DATA / name, device="cpu"), load(path, device="cpu")
    assert isinstance(found, ByT5Model)
    assert found.config == expected.config
    assert mx.array_equal(found.encode(SOURCE), expected.encode(SOURCE)).item()
    assert mx.array_equal(found.logits(SOURCE, TARGET), expected.logits(SOURCE, TARGET)).item()


def turned(table):
    """Another table of the same size."""
    return table[::-1].copy()


def packed_once_more(table):
    """As a type of 4 bits would give it back."""
    scale = np.abs(table).max(axis=1, keepdims=True) / 7
    return np.rint(table / scale).astype(np.float32) * scale


# What a file holds as output.weight -> tied, scaled, and what a warning says; of T5 1.0 without a gate and of 1.1 with one.
HEADS = {
    "none, no gate": ("relu", lambda table: None, True, True, "no output.weight and no gate .* as scaled"),
    "none, a gate": ("gated", lambda table: None, True, False, "no output.weight and a gate .* as not scaled"),
    "again, no gate": ("relu", lambda table: table, True, True, "that is the embeddings and no gate .* as scaled"),
    "again, a gate": ("gated", lambda table: table, True, False, "that is the embeddings and a gate .* as not scaled"),
    "packed, no gate": ("relu", packed_once_more, False, True, "that is the embeddings and no gate .* as scaled"),
    "packed, a gate": ("gated", packed_once_more, False, False, "that is the embeddings and a gate .* as not scaled"),
    "another, no gate": ("relu", turned, False, False, "not the embeddings and no gate .* as not scaled"),
    "another, a gate": ("gated", turned, False, False, None),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_no_key_tells_of(case, tmp_path):
    name, head, tied, scaled, says = HEADS[case]
    path = write(tmp_path / "model.gguf", name, tensors={"output.weight": head(byt5_tensors(name)["token_embd.weight"])})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(path, device="cpu")
    assert (model.config.tied_head, model.config.scaled_head) == (tied, scaled)
    if says is None:
        assert not caught
    else:
        (warning,) = caught
        assert warning.category is AssumptionWarning and str(warning.message).startswith(f"{path}: no key tells whether")
        assert re.search(says, str(warning.message))
    # What was assumed stands in what is written, and is not asked again.
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    assert again.config == model.config
    assert mx.array_equal(again.logits(SOURCE, TARGET), model.logits(SOURCE, TARGET)).item()


@pytest.mark.parametrize(
    "keys, end, ends",
    [({}, 1, (1,)), ({"eos": 2}, 2, (2,)), ({"eot": 13}, 1, (1, 13)), ({"eos": 2, "eot": 13, "eom": 2}, 2, (2, 13)),
     ({"eot": 1}, 1, (1,)), ({"eot": 13, "eom": 14}, 1, (1, 13, 14))],
)  # fmt: skip
def test_ids_that_end_answers(keys, end, ends, tmp_path):
    metadata = {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items()}
    config = load(write(tmp_path / "model.gguf", metadata=metadata), device="cpu").config
    assert (config.end_id, config.answer_ends) == (end, ends)


def test_a_folder_with_one_file(tmp_path):
    path = write(tmp_path / "any-name.gguf")
    assert load(tmp_path, device="cpu").config == load(path, device="cpu").config
    assert fingerprint(tmp_path) == fingerprint(path)
    before = fingerprint(path)
    write(path, metadata={"t5.decoder_start_token_id": 259})
    assert load(path, device="cpu").config.start_id == 259
    assert fingerprint(path) != before


@pytest.mark.parametrize("bits", ["float16", "bfloat16"])
def test_16_bits_are_kept(bits, tmp_path):
    weight = byt5_tensors("gated")["enc.blk.0.attn_q.weight"]
    stored = weight.astype(np.float16) if bits == "float16" else (weight.view(np.uint32) >> 16).astype(np.uint16)
    path = write(tmp_path / "model.gguf", tensors={"enc.blk.0.attn_q.weight": stored})
    array = read_checkpoint(path).weights["encoder.layers.0.attention.q_proj.weight"]
    assert array.dtype == getattr(mx, bits)
    assert np.abs(np.array(array.astype(mx.float32)) - weight).max() < 2**-7 * np.abs(weight).max()


def test_an_encoder_alone(tmp_path):
    expected = load(DATA / "gated", device="cpu").encode(SOURCE)
    tensors = {key: None for key in byt5_tensors("gated") if key.startswith(("dec.", "output."))}
    path = tmp_path / "model.gguf"
    metadata = dict.fromkeys(byt5_metadata(config_of("gated")))
    write(path, metadata=metadata | byt5_metadata(config_of("gated"), "t5encoder"), tensors=tensors)
    model = load(path, device="cpu")
    assert model.config.decoder_layers == 0
    assert mx.array_equal(model.encode(SOURCE), expected).item()


def test_a_stray_tensor_and_an_older_version(tmp_path):
    expected = load(DATA / "gated", device="cpu").logits(SOURCE, TARGET)
    stray = {"dec.blk.0.cross_attn_rel_b.weight": np.ones((32, 2), np.float32)}
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(byt5_metadata(config_of("gated")), byt5_tensors("gated") | stray, version=2))
    assert mx.array_equal(load(path, device="cpu").logits(SOURCE, TARGET), expected).item()


TOKENS = byt5_metadata(config_of("gated"))["tokenizer.ggml.tokens"]
OTHERS = {
    "another architecture": ({"general.architecture": "llama"}, "general.architecture is 'llama'"),
    "no architecture": ({"general.architecture": None}, "general.architecture is missing"),
    "a part": ({"split.count": 3}, "one of 3 parts"),
    "a missing key": ({"t5.block_count": None}, "the key 't5.block_count' is missing"),
    "text for a number": ({"t5.block_count": "2"}, "t5.block_count should be a whole number, found str"),
    "an architecture that is a list": ({"general.architecture": [1]}, "general.architecture is [1]"),
    "an epsilon that is text": ({"t5.attention.layer_norm_rms_epsilon": "1"}, "epsilon should be a number, found str"),
    "an end beyond all ids": ({"tokenizer.ggml.eos_token_id": 384}, "eos_token_id is 384, not below the 384 rows"),
    "an end of a turn beyond": ({"tokenizer.ggml.eot_token_id": 9999}, "tokenizer.ggml.eot_token_id is 9999, not below"),
    "a start beyond all ids": ({"t5.decoder_start_token_id": 384}, "t5.decoder_start_token_id is 384, not below"),
    "a fraction": ({"t5.block_count": 2.5}, "t5.block_count should be a whole number, found float 2.5"),
    "a flag for a number": ({"t5.block_count": True}, "t5.block_count should be a whole number, found bool True"),
    "more layers": ({"t5.block_count": 3}, "'enc.blk.2.attn_norm.weight' is missing"),
    "fewer layers": ({"t5.block_count": 1, "t5.decoder_block_count": 1}, "no place for the tensor 'enc.blk.1."),
    "no heads": ({"t5.attention.head_count": 0}, "head_count must be at least 1"),
    "grouped heads": ({"t5.attention.head_count_kv": 1}, "head_count_kv is 1; in T5 it is 2"),
    "another width": ({"t5.embedding_length": 16}, "the configuration asks for"),
    "bytes elsewhere": ({"tokenizer.ggml.byte_offset": 0}, "byte_offset is 0"),
    "pieces of words": ({"tokenizer.ggml.tokens": [*TOKENS[:68], b"\xe2\x96\x81the", *TOKENS[69:]]}, "the id 68 stands for"),
    "few tokens": ({"tokenizer.ggml.tokens": TOKENS[:60]}, "tokenizer.ggml.tokens has 60 tokens"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "not a list of strings"),
    "an odd alignment": ({"general.alignment": 12}, "not a power of two"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_t5_over_bytes(case, tmp_path):
    metadata, says = OTHERS[case]
    assert says in refused(write(tmp_path / "model.gguf", metadata=metadata))


TENSORS = {
    "missing": ("enc.blk.1.ffn_norm.weight", None, "'enc.blk.1.ffn_norm.weight' is missing"),
    "left over": ("enc.blk.1.attn_rel_b.weight", np.ones((32, 2), np.float32), "no place for the tensor"),
    "misshapen": ("enc.blk.1.ffn_norm.weight", np.ones(9, np.float32), "the configuration asks for"),
    "not finite": ("enc.blk.1.ffn_norm.weight", np.full(8, np.nan, np.float32), "NaN or infinity"),
    "words": ("token_embd.weight", np.ones((32128, 8), np.float32), "pieces of words"),
    "flat embeddings": ("token_embd.weight", np.ones(8, np.float32), "not 2 dimensions"),
    "empty": ("extra", np.ones((0, 8), np.float32), "'extra' is empty"),
    "many dimensions": ("extra", np.ones((1, 1, 1, 1, 1), np.float32), "'extra' has 5 dimensions"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, tmp_path):
    name, array, says = TENSORS[case]
    assert says in refused(write(tmp_path / "model.gguf", tensors={name: array}))


def place(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def head(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def list_of(kind: int, count: int, key: str = "a") -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, count)


def two(first: tuple, second: tuple) -> bytes:
    return head(2, 0, place("a", *first) + place("b", *second) + bytes(999))


BROKEN = {
    "nothing": (b"", "it is empty"),
    "another file": (b"PK\x03\x04" + bytes(40), "is no GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF of version 3; marlin reads little-endian"),
    "a future version": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
    "cut in the counts": (head(0, 0)[:20], "in the middle of its header"),
    "keys without end": (head(0, 1 << 60), "claims 1,152,921,504,606,846,976 keys"),
    "tensors without end": (head(1 << 60, 0), "claims 1,152,921,504,606,846,976 tensors"),
    "a list without end": (head(0, 1, list_of(4, 1 << 60)), "lists of 1,152,921,504,606,846,976 items"),
    "strings without end": (head(0, 1, list_of(8, 1 << 60)), "lists of 1,152,921,504,606,846,976 items"),
    "lists in lists": (head(0, 1, list_of(9, 1)), "has lists of lists, which no known writer makes"),
    "a string without end": (head(0, 1, struct.pack("<Q", 1 << 62)), "in the middle of its header"),
    "an unknown type": (head(0, 1, string("a") + struct.pack("<I", 13)), "the unknown type 13"),
    "no text": (head(0, 1, string(b"\xff\xfe")), "not UTF-8"),
    "keys that the file has not": (head(0, 4000), "in the middle of its header"),
    "strings that the file has not": (head(0, 1, list_of(8, 1 << 20)), "in the middle of its header"),
    "many lists": (head(0, 3, b"".join(list_of(0, 500_000, key) + bytes(500_000) for key in "abc")), "of 1,500,000 items"),
    "a list of another unknown type": (head(0, 1, list_of(77, 1)), "lists of the unknown type 77"),
    "no dimensions": (head(1, 0, place("a", (), 0, 0) + bytes(99)), "'a' has 0 dimensions"),
    "an odd place": (head(1, 0, place("a", (8,), 0, 4) + bytes(99)), "'a' begins at 4, no multiple of its alignment, 32"),
    "one place for two": (two(((8,), 0, 0), ((8,), 0, 0)), "'a' and 'b' overlap"),
    "a place within another": (two(((64,), 0, 0), ((8,), 1, 64)), "'a' and 'b' overlap"),
    "packed within another": (two(((1 << 20,), 8, 0), ((8,), 1, 64)), "'a' and 'b' overlap"),
    "escapes in a key": (head(0, 2, (string("a\x1b[31m") + struct.pack("<II", 4, 1)) * 2), r"'a\x1b[31m' stands twice"),
    "a long name": (head(1, 0, place("n" * 9999, (0,), 0, 0)), f"'{'n' * 77}'... is empty"),
    "a key twice": (head(0, 2, (string("a") + struct.pack("<II", 4, 1)) * 2), "'a' stands twice"),
    "a tensor twice": (head(2, 0, place("a", (8,), 0, 0) * 2 + bytes(99)), "'a' stands twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case, tmp_path):
    content, says = BROKEN[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert says in refused(path)


@pytest.mark.parametrize(
    "where", [("a", (8,), 0, 1 << 50), ("a", (1 << 62, 1 << 62), 0, 0), ("a", (1 << 63,), 1, 0)], ids=["far", "huge", "long"]
)
def test_tensors_beyond_the_file(where, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(head(1, 0, place(*where) + bytes(200)))
    with pytest.raises(CheckpointError, match="'a' ends at byte .*, the file at 2"):
        GGUFFile(path).array("a")


def test_files_cut_or_changed_anywhere(tmp_path):
    """Whatever is changed or cut, the file is read or refused; nothing else ever comes out."""
    path = write(tmp_path / "model.gguf")
    content = path.read_bytes()
    generator = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 3))):
            changed[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(changed[: generator.choice((len(content), generator.randrange(len(content))))])
        try:
            read_checkpoint(path)
            outcomes["read"] += 1
        except (CheckpointError, ConfigError) as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_what_is_not_there(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.gguf")
    write(tmp_path / "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert "config.json" in refused(tmp_path)
