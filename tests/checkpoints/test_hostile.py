"""Damaged and hostile checkpoints: each is refused in one line that names the file, and nothing in them runs."""

import json
import os
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from foreign_states import state_of
from mlx.utils import tree_flatten
from refusals import refused
from torch_writer import write_zip

from marlin_cli.checkpoints import fingerprint, read_checkpoint
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.errors import CheckpointError
from marlin_cli.models import build, config_as_mapping
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig

TINY = MegaByteConfig(
    patch_size=4, max_bytes=64, global_layers=1, global_dim=16, global_heads=2, global_ffn_dim=16,
    local_layers=1, local_dim=8, local_heads=2, local_ffn_dim=16,
)  # fmt: skip
WEIGHTS = dict(tree_flatten(MegaByte(TINY).parameters()))


# Marlin's own folders


def write_native(folder: Path, **changes: object) -> Path:
    """A good folder, with some weights replaced (left out where None)."""
    weights = {key: array for key, array in {**WEIGHTS, **changes}.items() if array is not None}
    write_model(folder, config_as_mapping(TINY), weights, None, None)
    return folder


def test_the_model_that_these_tests_damage_is_good(tmp_path):
    checkpoint = read_checkpoint(write_native(tmp_path / "model"))
    assert build(checkpoint.config, checkpoint.weights, where="x").config == TINY


def header(tensors: object, data: bytes = bytes(16)) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats(start: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


GOOD = header({"a": floats(0, 16, 4)})
SAFETENSORS = {
    "empty file": (b"", "is empty, expected safetensors"),
    "cut in the length": (GOOD[:5], "damaged safetensors"),
    "cut in the header": (GOOD[:30], "damaged safetensors"),
    "cut in the data": (GOOD[:-1], "damaged safetensors"),
    "bytes behind the data": (GOOD + b"x", "damaged safetensors"),
    "a zip file": (b"PK\x03\x04" + bytes(60), "is a zip file, as torch.save writes, expected safetensors"),
    "text": (b"<!DOCTYPE html><html>not found</html>", "is a page of HTML, expected safetensors"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull fetches"),
    "header larger than memory": (struct.pack("<Q", 1 << 62) + b"{}", "damaged safetensors"),
    "header larger than the file": (struct.pack("<Q", 1000) + b"{}", "damaged safetensors"),
    "header is no JSON": (header(b"{{{{{{{{"), "damaged safetensors"),
    "header is a list": (header([1, 2]), "damaged safetensors"),
    "overlapping offsets": (header({"a": floats(0, 12, 3), "b": floats(8, 16, 2)}), "damaged safetensors"),
    "offsets beyond the end": (header({"a": floats(0, 1600, 400)}), "damaged safetensors"),
    "offsets backwards": (header({"a": floats(16, 0, 4)}), "damaged safetensors"),
    "a hole between tensors": (header({"a": floats(0, 4, 1), "b": floats(8, 16, 2)}), "damaged safetensors"),
    "negative offset": (header({"a": floats(-16, 0, 4)}), "damaged safetensors"),
    "negative shape": (header({"a": floats(0, 16, -4)}), "damaged safetensors"),
    "shape that overflows": (header({"a": floats(0, 16, 1 << 62, 1 << 62)}), "damaged safetensors"),
    "shape and offsets disagree": (header({"a": floats(0, 16, 5)}), "damaged safetensors"),
    "unknown dtype": (header({"a": floats(0, 16, 4, dtype="F33")}), "a tensor is of a type that safetensors here"),
    "an endless dtype": (header({"a": floats(0, 16, 4, dtype="\x1b" * 9999)}), "a tensor is of a type that safetensors here"),
    "a dtype that MLX lacks": (header({"a": floats(0, 16, 2, dtype="F64")}), "'a' is F64, which MLX does not have"),
    "float8 of another kind": (header({"a": floats(0, 16, 16, dtype="F8_E5M2")}), "'a' is F8_E5M2, which MLX does not have"),
    "float8 as it is": (
        header({"a": floats(0, 16, 16, dtype="F8_E4M3")}),
        "is uint8 (as MLX reads float8|of no known",
    ),
    "flags for weights": (header({"output.weight": floats(0, 16, 16, dtype="BOOL")}), "is bool, expected|of no known"),
    "a header of many megabytes": (header(b" " * (5 << 20)), "its header has 5,242,880 bytes, more than the 4,194,304"),
    "a long name with escapes": (
        header({"\x1b[31m" + "n" * 9999: floats(0, 16, 4)}),
        "'global.layers.0.attention_norm.weight' is missing|of no known",
    ),
    "the same tensor twice": (
        header(b'{"a":%s,"a":%s}' % ((json.dumps(floats(0, 16, 4)).encode(),) * 2)),
        "no place for|is missing|damaged",
    ),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_damaged_safetensors(case, tmp_path):
    content, says = SAFETENSORS[case]
    folder = write_native(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    message = refused(folder)
    assert any(part in message for part in says.split("|")), message
    assert len(message) < 500
    (folder / "config.json").unlink()
    # Without config.json it is read as a foreign file, and refused as well.
    refused(folder)


OUTPUT = WEIGHTS["output.weight"]
NATIVE_WEIGHTS = {
    "NaN": ({"output.weight": mx.where(mx.arange(8) == 3, mx.nan, OUTPUT)}, "'output.weight' holds NaN or infinity"),
    "infinity in bfloat16": (
        {"output.weight": mx.full(OUTPUT.shape, mx.inf).astype(mx.bfloat16)},
        "'output.weight' holds NaN or infinity",
    ),
    "missing": ({"output.weight": None}, "the weight 'output.weight' is missing"),
    "extra": ({"output.bias": mx.zeros(256)}, "no place for the weight 'output.bias'"),
    "another shape": ({"output.weight": OUTPUT.T}, r"'output.weight' has shape [8, 256]"),
    "whole numbers": ({"output.weight": OUTPUT.astype(mx.int32)}, "'output.weight' is int32, expected floating point"),
    "packed without a table": (
        {"output.weight": mx.zeros((256, 1), mx.uint32), "output.scales": mx.ones((256, 1))},
        "the quantization table says nothing of it",
    ),
}


@pytest.mark.parametrize("case", NATIVE_WEIGHTS)
def test_weights_that_do_not_fit(case, tmp_path):
    changes, says = NATIVE_WEIGHTS[case]
    assert says in refused(write_native(tmp_path / "model", **changes))


NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
INT4 = {"group_size": 32, "bits": 4, "mode": "affine"}
Q = "global.layers.0.attention.q_proj"
CODES, SCALES = mx.zeros((16, 2), mx.uint32), mx.full((16, 1), 56, mx.uint8)
PACKED = {
    "biases where none belong": (NVFP4, {"biases": mx.zeros(3)}, "has biases, for which a layer packed as nvfp4 has no place"),
    "a bias that the model lacks": (NVFP4, {"bias": mx.zeros(16)}, "has bias, for which"),
    "no biases": (INT4, {"weight": mx.zeros((16, 2), mx.uint32)}, "in groups of 32 ask for [16, 0]"),
    "a vector of global scales": (NVFP4, {"global_scale": mx.zeros(3)}, "a global_scale that is not one number"),
    "a whole global scale": (NVFP4, {"global_scale": mx.array(1)}, "a global_scale that is not one number"),
    "scales in float32": (NVFP4, {"scales": mx.ones((16, 1))}, "has scales of type float32, which nvfp4 does not hold"),
    "codes in bytes": (NVFP4, {"weight": CODES.astype(mx.uint8)}, "has weight of type uint8"),
    "too few codes": (NVFP4, {"weight": CODES[:5]}, "has weight of shape [5, 2]"),
    "scales that are NaN": (NVFP4, {"scales": mx.full((16, 1), 0xFF, mx.uint8)}, f"'{Q}.scales' holds NaN"),
    "codes that are NaN": (MXFP8, {"weight": CODES + 0x7F00}, f"'{Q}.weight' holds NaN"),
    "3 bits": ({**INT4, "bits": 3}, {}, "'affine' with 3 bits in groups of 32, which is no format"),
    "no group": ({**NVFP4, "group_size": 0}, {}, "in groups of 0, which is no format"),
    "a group that is no whole number": ({**NVFP4, "group_size": 16.0}, {}, "in groups of 16.0, which is no format"),
    "another kind": ({**NVFP4, "mode": "nf4"}, {}, "'nf4' with 4 bits"),
    "a list for a kind": ({**NVFP4, "mode": ["nvfp4"]}, {}, "which is no format"),
    "text for bits": ({**NVFP4, "bits": "4"}, {}, "'nvfp4' with '4' bits"),
    "true for bits": ({**NVFP4, "bits": True}, {}, "'nvfp4' with True bits"),
    "a negative group": ({**NVFP4, "group_size": -16}, {}, "in groups of -16"),
    "a huge group": ({**NVFP4, "group_size": 10**400}, {}, "in groups of <a whole number of 1,329 bits>"),
    "a huge kind": ({**NVFP4, "mode": "\x1b[31m" * 999}, {}, r"'\x1b[31m\x1b[31m"),
    "a kind left out is affine": (
        {"group_size": 16, "bits": 4},
        {},
        "'affine' with 4 bits in groups of 16, which is no format",
    ),
    "text for a layer": ({**NVFP4, Q: "nvfp4"}, {}, "the quantization table has str 'nvfp4' for it; expected group_size, bits"),
    "a list for a layer": ({**NVFP4, Q: [16, 4]}, {}, "the quantization table has list [16, 4] for it"),
    "a huge number for a layer": ({**NVFP4, Q: 10**400}, {}, "has int <a whole number of 1,329 bits> for it"),
    "false for a layer that is packed": ({**NVFP4, Q: False}, {}, "the quantization table has bool False for it"),
    "half an entry for a layer": ({**NVFP4, Q: {"bits": 4}}, {}, "the quantization table has dict {'bits': 4} for it"),
    "thousands of entries": (
        {**{f"x.{i}": NVFP4 for i in range(9999)}, "bits": 4},
        {},
        "is packed, but the quantization table has",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_layers_that_do_not_fit(case, tmp_path):
    """Kernels read as many bytes as shapes promise: what gets past here crashes the program."""
    table, changes, says = PACKED[case]
    arrays = {f"{Q}.{name}": array for name, array in {"weight": CODES, "scales": SCALES, **changes}.items()}
    write_model(tmp_path / "model", config_as_mapping(TINY), {**WEIGHTS, **arrays}, table, None)
    assert says in refused(tmp_path / "model")


@pytest.mark.parametrize("table", [NVFP4, {**NVFP4, Q: True}, {"group_size": 64, "bits": 8, Q: NVFP4}])
def test_the_packed_layer_that_these_tests_damage_is_good(table, tmp_path):
    weights = {**WEIGHTS, f"{Q}.weight": CODES, f"{Q}.scales": SCALES, f"{Q}.global_scale": mx.array(2.0)}
    write_model(tmp_path / "model", config_as_mapping(TINY), weights, table, None)
    checkpoint = read_checkpoint(tmp_path / "model")
    build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where="x")


CONFIGS = {
    "no JSON": ("{,}", "is not JSON"),
    "empty": ("", "is not JSON"),
    "nested without end": ("[" * 100_000, "is not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "is not UTF-8"),
    "a list": ("[1]", "expected an object, found list [1]"),
    "unknown key": ({"global_dims": 16}, "unknown key 'global_dims'; did you mean 'global_dim'?"),
    "text for a number": ({"patch_size": "4"}, "expected int, found str '4'"),
    "true for a number": ({"patch_size": True}, "expected int, found bool True"),
    "a scale that is not a number": ('{"attention_scale": NaN}', "expected a finite number, found float nan"),
    "a scale without end": ('{"attention_scale": 1e999}', "expected a finite number, found float inf"),
    "a scale of nothing": ({"attention_scale": 0}, "attention_scale must be at least"),
    "layers without end": ({"global_layers": 10**12}, "global_layers is 1,000,000,000,000, more than the 256"),
    "more layers than weights": ({"global_layers": 200}, "layers.1.attention_norm.weight' is missing, with all of 199 layers"),
    "a patch without end": ({"patch_size": 10**9}, "patch_size is 1,000,000,000, more than the 65,536"),
    "a window without end": ({"attention_window": 10**15}, "attention_window is 1,000,000,000,000,000, more than"),
    "a number of thousands of digits": ('{"global_dim": 1' + "0" * 5000 + "}", "is not JSON: Exceeds the limit"),
    "escapes in a key": ({"\x1b[31mdim": 1}, r"unknown key '\x1b[31mdim'"),
    "escapes in a kind of model": ({"model_type": "\x1b[31m" + "x" * 999}, r"model_type '\x1b[31mx"),
    "half of a character": ({"layout": "\ud800"}, r"found str '\ud800'|str '\ud800' is not one of"),
    "another tool with escapes": (
        {"quantization_config": {"quant_method": "\x1b]0;t\x07"}},
        r"packed by '\x1b]0;t\x07'; marlin",
    ),
    "formats with escapes": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "\x1b[31m" * 99}},
        r"packed by 'compressed-tensors' as '\x1b[31m",
    ),
    "a format that is a list": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": {"format": [["x"]]}}}},
        r"""as "[['x']]"; marlin reads""",
    ),
    "a tool that is a list": ({"quantization_config": {"quant_method": [1]}}, "packed by [1]; marlin reads"),
    "bits of the cache": ({"marlin": {"kv_bits": "8"}}, "marlin's kv_bits in config.json is '8', expected 4, 8 or 16"),
    "zero heads": ({"global_heads": 0}, "global_heads must be at least 1"),
    "heads that do not divide": ({"global_heads": 3}, "3 heads do not divide a width of 16"),
    "another architecture": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    "another width": ({"local_dim": 16}, "the configuration asks for"),
    "quantization is a number": ({"quantization": 4}, "'quantization' should be a table, found int 4"),
    "another tool's packing": ({"quantization_config": {"quant_method": "gptq"}}, "packed by 'gptq'; marlin reads"),
    "another tool's format": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "packed by 'compressed-tensors' as 'pack-quantized'",
    ),
    "a table of no tool": ({"quantization_config": {"group_size": 16}}, "'quantization_config' differs"),
    "marlin's table is a list": ({"marlin": []}, "'marlin' should be a table"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configurations(case, tmp_path):
    content, says = CONFIGS[case]
    folder = write_native(tmp_path / "model")
    file = folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    elif isinstance(content, str) and content.startswith('{"'):
        content = file.read_text().rstrip().removesuffix("}") + "," + content[1:]
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    message = refused(folder)
    assert any(part in message for part in says.split("|")), message
    assert "config.json" in message or case == "another width" or "packed by" in message, message
    assert len(message) < 700


INDICES = {
    "no JSON": ("{", "is not JSON"),
    "a list": ([1], "has no table weight_map"),
    "no map": ({"metadata": {}}, "has no table weight_map"),
    "an empty map": ({"weight_map": {}}, "has no table weight_map"),
    "a number as a file": ({"weight_map": {"a": 1}}, "has no table weight_map"),
    "a missing shard": ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "is missing; fetch it again"),
    "a shard above the folder": ({"weight_map": {"a": "../outside.safetensors"}}, "lies outside the folder"),
    "a shard anywhere": ({"weight_map": {"a": "/etc/passwd"}}, "lies outside the folder"),
    "the folder above itself": ({"weight_map": {"a": ".."}}, "is a folder, expected a file"),
    "a zero byte": ({"weight_map": {"a": "x\x00.safetensors"}}, r"'x\x00.safetensors' is missing"),
    "half of a character": ({"weight_map": {"a": "\ud800.safetensors"}}, r"'\ud800.safetensors' is missing"),
    "a name of thousands of letters": ({"weight_map": {"a": "x" * 9999}}, f"'{'x' * 77}'... is missing"),
    "escapes": ({"weight_map": {"a": "\x1b[31m/x"}}, r"'\x1b[31m/x' lies outside"),
    "a pipe": ({"weight_map": {"a": "pipe"}}, "pipe: is a pipe, expected a file"),
    "a device behind a link": ({"weight_map": {"a": "device"}}, "device: is a device, expected a file"),
    "a link that goes round": ({"weight_map": {"a": "round"}}, "'round' is missing|Too many levels"),
    "a tensor in two shards": (
        {"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}},
        "in another shard too",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_bad_indices_of_shards(case, tmp_path):
    content, says = INDICES[case]
    folder = write_native(tmp_path / "model")
    mx.save_safetensors(str(tmp_path / "outside.safetensors"), WEIGHTS)
    mx.save_safetensors(str(folder / "b.safetensors"), {"output.weight": OUTPUT})
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "round").symlink_to("round")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)
    message = refused(folder)
    assert any(part in message for part in says.split("|")), message


def make_empty_folder(path: Path) -> None:
    path.mkdir()


def make_two_weights_files(path: Path) -> None:
    path.mkdir()
    for file in ("a.pt", "b.pt"):
        write_zip(path / file, {"a": np.ones(2, "f4")})


def make_config_alone(path: Path) -> None:
    write_native(path)
    (path / "model.safetensors").unlink()


def make_folders_for_files(path: Path) -> None:
    make_config_alone(path)
    (path / "model.safetensors").mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_pipe_for_weights(path: Path) -> None:
    make_config_alone(path)
    os.mkfifo(path / "model.safetensors")


def make_pipe_for_config(path: Path) -> None:
    write_native(path)
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


def make_pipes_alone(path: Path) -> None:
    path.mkdir()
    for name in ("a.pt", "b.safetensors"):
        os.mkfifo(path / name)


def make_gguf_folder(path: Path) -> None:
    (path / "model.gguf").mkdir(parents=True)


def make_folder_for_config(path: Path) -> None:
    write_native(path)
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


PLACES = {
    "nothing there": (lambda path: None, "no such file"),
    "an empty folder": (make_empty_folder, "found none"),
    "two weights files": (make_two_weights_files, "found 'a.pt', 'b.pt'; name the file"),
    "config.json alone": (make_config_alone, "holds neither model.safetensors nor"),
    "a folder named model.safetensors": (make_folders_for_files, "is a folder, expected a file"),
    "a pipe": (make_pipe, "is a pipe, expected a file"),
    "a pipe named model.safetensors": (make_pipe_for_weights, "is a pipe, expected a file"),
    "a pipe named config.json": (make_pipe_for_config, "is a pipe, expected a file"),
    "pipes alone": (make_pipes_alone, "found none"),
    "a folder named model.gguf": (make_gguf_folder, "is a folder, expected a file"),
    "a folder named config.json": (make_folder_for_config, "is a folder, expected a file"),
}


@pytest.mark.parametrize("case", PLACES)
def test_files_that_are_not_there(case, tmp_path):
    make, says = PLACES[case]
    make(tmp_path / "model")
    assert says in refused(tmp_path / "model")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf"])
def test_pipes_by_their_names(suffix, tmp_path):
    folder = write_native(tmp_path / "model")
    for path in (folder / f"pipe{suffix}", tmp_path / f"pipe{suffix}"):
        os.mkfifo(path)
        assert "is a pipe, expected a file" in refused(path)
        with pytest.raises(CheckpointError, match="is a pipe, expected a file"):
            fingerprint(path)


# Foreign layouts


LUCID = "megabyte_pytorch-3-stages"
FOREIGN_TENSORS = {
    "a missing tensor": (LUCID, {"to_logits.bias": None}, "the tensor 'to_logits.bias' is missing"),
    "a missing layer": (LUCID, {"transformers.1.layers.0.0.norm.g": None}, "layers.0.0.norm.g' is missing"),
    "an extra tensor": (LUCID, {"router.weight": np.ones((2, 2), "f4")}, "no place for the tensor 'router.weight'"),
    "a fused matrix of another shape": (
        LUCID,
        {"transformers.0.layers.0.0.to_kv.weight": np.ones((23, 8), "f4")},
        "has shape [23, 8], the other tensors ask for [24, 8]",
    ),
    "a vector for a matrix": (LUCID, {"token_embs.0.weight": np.ones(8, "f4")}, "not 2 dimensions"),
    "an empty matrix": (LUCID, {"token_embs.0.weight": np.ones((256, 0), "f4")}, "not 2 dimensions"),
    "one stage": (LUCID, {"start_tokens.1": None, "start_tokens.2": None}, "with 1 stage; two or more are needed"),
    "a patch that does not nest": (LUCID, {"token_embs.1.2.weight": np.ones(24, "f4")}, "do not nest"),
    "a patch of no whole bytes": (LUCID, {"token_embs.1.2.weight": np.ones(33, "f4")}, "is not made of embeddings"),
    "fewer ids than bytes": (
        LUCID,
        {"token_embs.0.weight": np.ones((100, 8), "f4")},
        "vocab_size must hold every byte",
    ),
    "a projection of another shape": (
        LUCID,
        {"token_embs.1.3.weight": np.ones((8, 31), "f4")},
        "'middle.0.patch_projection.weight' has shape [8, 31]",
    ),
    "whole numbers for weights": (LUCID, {"to_logits.bias": np.arange(256)}, "'output.bias' is int64"),
    "NaN": (LUCID, {"to_logits.bias": np.full(256, np.nan, "f4")}, "'output.bias' holds NaN or infinity"),
    "infinity in float64": (LUCID, {"to_logits.bias": np.full(256, np.inf)}, "'output.bias' holds NaN or infinity"),
    "a missing pad": ("paper", {"local_pad": None}, "the tensor 'local_pad' is missing"),
    "queries of another shape": (
        "paper",
        {"global_blocks.0.attention.QKV_linear.weight": np.ones((47, 16), "f4")},
        "has shape [47, 16], the other tensors ask for [48, 16]",
    ),
    "a head of fewer rows than ids": (
        "paper",
        {"logits.logits_linear.weight": np.ones((192, 8), "f4")},
        "'output.weight' has shape [192, 8]",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_TENSORS)
def test_foreign_tensors_that_do_not_fit(case, tmp_path):
    stem, changes, says = FOREIGN_TENSORS[case]
    state, document_of_file = state_of(stem)
    state = {key: array for key, array in {**state, **changes}.items() if array is not None}
    value = {"state_dict": state, "model_config": document_of_file.get("model_config")}
    assert says in refused(write_zip(tmp_path / "model.pt", value))


MODEL_CONFIGS = {
    "an unknown activation": ({"nonlinear": "Tanh"}, "'Tanh' is not one of ReLU, GELU, SiLU"),
    "text for a number": ({"d_key": "4"}, "expected int, found str '4'"),
    "a head of no width": ({"d_key": 0}, "heads 0 wide do not divide"),
    "a head of another width": ({"d_key": 3}, "heads 3 wide do not divide"),
    "sparse attention": ({"sparse_attention": True}, "sparse_attention, which marlin does not run"),
    "tokens of words": ({"tokenizer": "gpt2"}, "trained on tokens of 'gpt2'"),
    "a nested value": ({"nonlinear": [["ReLU"]]}, "has a list as 'nonlinear'"),
    "an id that is none": ({"BOS": 256}, "bos_byte must be an id below vocab_size"),
    "more ids than embeddings": ({"vocab_size": 300}, "vocab_size of model_config is 300, the embeddings have 256 rows"),
}


@pytest.mark.parametrize("case", MODEL_CONFIGS)
def test_bad_model_configs_of_the_paper_layout(case, tmp_path):
    changes, says = MODEL_CONFIGS[case]
    state, document_of_file = state_of("paper")
    value = {"state_dict": state, "model_config": document_of_file["model_config"] | changes}
    message = refused(write_zip(tmp_path / "model.pt", value))
    assert any(part in message for part in says.split("|")), message


def test_a_model_config_that_is_no_table(tmp_path):
    state, _ = state_of("paper")
    path = write_zip(tmp_path / "model.pt", {"state_dict": state, "model_config": [1]})
    assert "its model_config is a list" in refused(path)
