"""nvfp4 layers of llm-compressor and ModelOpt come in, ours leave, and plain MLX takes our folders as mlx-lm takes its own."""

import json
import signal
import subprocess
import sys
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner

from marlin_cli import load
from marlin_cli.api import ByT5Model, MegaByteModel
from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.cli import app
from marlin_cli.errors import AssumptionWarning, CheckpointError, UsageError
from marlin_cli.models import build, linear_layers, set_modules
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.layers import packed_of
from marlin_cli.tensor_files import safetensors_header, write_safetensors

DATA = bytes(range(64))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)


@pytest.fixture
def source(tmp_path, random_network, small_sizes):
    """A saved model whose layers all fit nvfp4."""
    config = MegaByteConfig(**{**small_sizes, "local_dim": 32, "global_heads": 1})
    MegaByteModel(random_network(config), choose_device("cpu")).save(tmp_path / "source")
    return tmp_path / "source"


def quantize(*arguments):
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output


def e4m3(codes):
    """The float64 values of E4M3 codes."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, (codes & 7).astype(np.float64)
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7))
    return np.where(sign == 1, -value, value)


def raw(file):
    """name -> (type, array of bytes or numbers) of a safetensors file, read by hand."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    kinds = {"U8": np.uint8, "F8_E4M3": np.uint8, "F32": np.float32, "BF16": np.uint16}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            body = np.frombuffer(data[8 + length :][start:end], kinds[entry["dtype"]])
            tensors[name] = (entry["dtype"], body.reshape(entry["shape"]))
    return tensors


def decoded(packed, scales, divisor):
    """What compressed-tensors' documentation says the weights are, in float64."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return E2M1[codes] * np.repeat(e4m3(scales), 16, axis=1) / divisor


def test_an_export_says_the_same_weights_in_the_other_layout(source, tmp_path):
    quantize(source, "-o", tmp_path / "ours", "--local-bits", 4)
    quantize(source, "-o", tmp_path / "out", "--local-bits", 4, "--export", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    table = config["quantization_config"]
    assert (table["quant_method"], table["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    assert "quantization" not in config and "output" in table["ignore"]
    tensors = raw(tmp_path / "out" / "model.safetensors")
    layers = {path: layer for path, layer in linear_layers(load(tmp_path / "ours").network).items() if "scales" in layer}
    assert len(layers) > 10
    for path, layer in layers.items():
        (kind, packed), (scale_kind, scales) = tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_scale"]
        assert (kind, scale_kind) == ("U8", "F8_E4M3")
        divisor = tensors[f"{path}.weight_global_scale"][1]
        assert divisor.shape == (1,)
        np.testing.assert_array_equal(decoded(packed, scales, float(divisor[0])), np.array(decode(packed_of(layer))))
        assert f"{path}.weight" not in tensors


def test_an_export_comes_back_bit_for_bit(source, tmp_path):
    quantize(source, "-o", tmp_path / "ours", "--local-bits", 4, "--kv-bits", 8)
    quantize(source, "-o", tmp_path / "out", "--local-bits", 4, "--kv-bits", 8, "--export", "compressed-tensors")
    before, after = read_checkpoint(tmp_path / "ours").weights, read_checkpoint(tmp_path / "out").weights
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    ours, back = load(tmp_path / "ours"), load(tmp_path / "out")
    assert mx.array_equal(ours.logits(DATA), back.logits(DATA)).item()
    assert back.cache_bits == ours.cache_bits
    back.save(tmp_path / "again")
    assert mx.array_equal(load(tmp_path / "again").logits(DATA), ours.logits(DATA)).item()


# The command line, killed when the packed model is whole and its other form is about to be written.
KILLED = """
import os, signal
from marlin_cli.commands import quantization_run
quantization_run.export_compressed_tensors = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
from marlin_cli.cli import main
main()
"""


def test_an_export_that_is_killed_leaves_what_stood_there(source, tmp_path):
    folder = tmp_path / "written"
    folder.mkdir()
    command = ["quantize", str(source), "-o", str(folder / "out"), "--local-bits", "4", "--export", "compressed-tensors"]
    killed = [sys.executable, "-c", KILLED, *command]
    assert subprocess.run(killed, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert [path.name[:5] for path in folder.iterdir()] == [".out."]
    quantize(*command[1:])  # and takes away what the other left
    assert [path.name for path in folder.iterdir()] == ["out"]
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert subprocess.run([*killed, "--overwrite"], capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_other_formats_are_not_exported(source, tmp_path):
    with pytest.raises(UsageError, match="nvfp4 alone, and 'local.* would be mxfp8 .*4 or 16 bits for the local part"):
        quantize(source, "-o", tmp_path / "out", "--export", "compressed-tensors")
    with pytest.raises(UsageError, match="--export 'gguf' is not known; known: compressed-tensors"):
        quantize(source, "-o", tmp_path / "out", "--export", "gguf")
    with pytest.raises(UsageError, match="--export has no meaning beside --dequantize"):
        quantize(source, "-o", tmp_path / "out", "--export", "compressed-tensors", "--dequantize")
    assert not (tmp_path / "out").exists()


def as_modelopt(folder, target, *, inside):
    """The export `folder` as ModelOpt would have written it: other names, a factor in place of a divisor."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    settings = {"quant_algo": "NVFP4", "group_size": 16}
    if inside:
        config["quantization_config"] = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, **settings}
    else:
        document = {"producer": {"name": "modelopt"}, "quantization": {**settings, "exclude_modules": ["output"]}}
        (target / "hf_quant_config.json").write_text(json.dumps(document))
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (kind, array) in raw(folder / "model.safetensors").items():
        if name.endswith(".weight_packed"):
            tensors[name.removesuffix("_packed")] = (kind, array)
        elif name.endswith(".weight_global_scale"):
            base = name.removesuffix(".weight_global_scale")
            tensors[f"{base}.weight_scale_2"] = ("F32", (1 / array).reshape(()))
            tensors[f"{base}.input_scale"] = ("F32", np.array(0.25, np.float32))
        else:
            tensors[name] = (kind, array)
    shapes = {name: (kind, array.shape) for name, (kind, array) in tensors.items()}
    contents = [array.tobytes() for _, array in tensors.values()]
    write_safetensors(target / "model.safetensors", shapes, contents, {"format": "pt"})


@pytest.mark.parametrize("inside", [True, False], ids=["in config.json", "in hf_quant_config.json"])
def test_modelopt_comes_in(source, tmp_path, inside):
    quantize(source, "-o", tmp_path / "out", "--local-bits", 16, "--export", "compressed-tensors")
    as_modelopt(tmp_path / "out", tmp_path / "modelopt", inside=inside)
    expected, found = load(tmp_path / "out"), load(tmp_path / "modelopt")
    assert mx.array_equal(expected.logits(DATA), found.logits(DATA)).item()


def rewritten(folder, change):
    """Change the tensors of an export in place."""
    tensors = raw(folder / "model.safetensors")
    change(tensors)
    shapes = {name: (kind, array.shape) for name, (kind, array) in tensors.items()}
    contents = [array.tobytes() for _, array in tensors.values()]
    write_safetensors(folder / "model.safetensors", shapes, contents, {})


def test_a_scale_that_is_no_power_of_two_is_exact_in_16_bits_too(source, tmp_path):
    """As other tools choose it: 448 * 6 over the largest weight."""
    quantize(source, "-o", tmp_path / "out", "--local-bits", 4, "--export", "compressed-tensors")
    name = "global.layers.0.ffn.up_proj"

    def change(tensors):
        tensors[f"{name}.weight_global_scale"] = ("F32", np.array([1234.567], np.float32))

    rewritten(tmp_path / "out", change)
    tensors = raw(tmp_path / "out" / "model.safetensors")
    weight = decoded(tensors[f"{name}.weight_packed"][1], tensors[f"{name}.weight_scale"][1], np.float64(np.float32(1234.567)))
    checkpoint = read_checkpoint(tmp_path / "out")
    for dtype, most in ((mx.float32, 3e-7), (mx.bfloat16, 2.0**-8)):
        network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where="out", dtype=dtype)
        layer = linear_layers(network)[name]
        np.testing.assert_allclose(np.array(decode(packed_of(layer))), weight, rtol=2e-7)
        # One input channel at a time: the product is a single number, rounded to its type at most twice.
        found = np.array(layer(mx.eye(weight.shape[1]).astype(dtype)).astype(mx.float32)).T
        np.testing.assert_allclose(found, weight, rtol=most)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda tensors, name: tensors.pop(f"{name}.weight_scale"), "weight_scale' is missing"),
        (lambda tensors, name: tensors.pop(f"{name}.weight_packed"), "weight_packed' is missing"),
        (
            lambda tensors, name: tensors.update({f"{name}.weight_global_scale": ("F32", np.zeros(1, np.float32))}),
            "is 0.0, expected a positive number",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.weight_global_scale": ("F32", np.ones(2, np.float32))}),
            "expected one number",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.weight_scale": ("F32", np.ones((32, 2), np.float32))}),
            "expected a matrix of bytes",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.weight_scale": ("F8_E4M3", np.ones((32, 3), np.uint8))}),
            "does not fit scales of shape [32, 3]",
        ),
    ],
    ids=["no scale", "no codes", "zero", "two numbers", "scales in float32", "another group size"],
)
def test_damaged_layers_are_named(source, tmp_path, change, says):
    quantize(source, "-o", tmp_path / "out", "--local-bits", 16, "--export", "compressed-tensors")
    name = "global.layers.0.attention.q_proj"
    rewritten(tmp_path / "out", lambda tensors: change(tensors, name))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "out")
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def byt5_network(**changes):
    mx.random.seed(3)
    config = ByT5Config(
        vocab_size=384, d_model=64, heads=4, head_dim=16, ffn_dim=96, encoder_layers=2, decoder_layers=1, **changes
    )  # fmt: skip
    network = ByT5(config)
    mx.eval(network.parameters())
    return network


def test_byt5_leaves_under_transformers_names_and_comes_back(tmp_path):
    ByT5Model(byt5_network(), choose_device("cpu")).save(tmp_path / "source")
    arguments = [tmp_path / "source", "--wo-bits", 4]
    quantize(*arguments, "-o", tmp_path / "ours")
    quantize(*arguments, "-o", tmp_path / "out", "--export", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["d_kv"], config["feed_forward_proj"]) == ("t5", 16, "gated-gelu")
    tensors, _ = safetensors_header(tmp_path / "out" / "model.safetensors")
    assert tensors["encoder.block.0.layer.0.SelfAttention.q.weight_packed"] == {"dtype": "U8", "shape": [64, 32]}
    assert tensors["decoder.block.0.layer.2.DenseReluDense.wo.weight_scale"] == {"dtype": "F8_E4M3", "shape": [64, 6]}
    assert read_checkpoint(tmp_path / "out").layout == "hugging_face"
    ours, back = load(tmp_path / "ours"), load(tmp_path / "out")
    assert mx.array_equal(ours.logits(b"source", b"target"), back.logits(b"source", b"target")).item()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_head_of_byt5_comes_back(tied, scaled, tmp_path):
    ByT5Model(byt5_network(tied_head=tied, scaled_head=scaled), choose_device("cpu")).save(tmp_path / "source")
    arguments = [tmp_path / "source", "--wo-bits", 4]
    quantize(*arguments, "-o", tmp_path / "ours")
    quantize(*arguments, "-o", tmp_path / "out", "--export", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Both versions of transformers are told the same: 4 ties and scales by one flag, which 5 does not ask where it has two.
    assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (tied and scaled, scaled)
    assert ("lm_head.weight" in raw(tmp_path / "out" / "model.safetensors")) == (not (tied and scaled))
    assert "lm_head" in config["quantization_config"]["ignore"]
    ours, back = load(tmp_path / "ours"), load(tmp_path / "out")
    assert (back.config.tied_head, back.config.scaled_head) == (tied, scaled)
    assert mx.array_equal(ours.logits(b"source", b"target"), back.logits(b"source", b"target")).item()


@pytest.mark.parametrize(
    "ends, eos",
    [({}, 1), ({"answer_end_ids": (13,)}, 13), ({"answer_end_ids": (1, 13)}, [1, 13]), ({"answer_end_ids": ()}, []),
     ({"end_id": 259}, 259), ({"end_id": 2, "answer_end_ids": (1, 13)}, [1, 13])],
    ids=["the usual", "another", "two", "none", "of inputs too", "of inputs apart"],
)  # fmt: skip
def test_the_ends_of_byt5_come_back(ends, eos, tmp_path):
    ByT5Model(byt5_network(**ends), choose_device("cpu")).save(tmp_path / "source")
    quantize(tmp_path / "source", "--wo-bits", 4, "-o", tmp_path / "out", "--export", "compressed-tensors")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("tokenizer_config.json" in names) == ("end_id" in ends)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == eos
    with warnings.catch_warnings():
        # A tokenizer that is not there ends inputs with 1, whatever ends answers; that is said and right.
        warnings.simplefilter("ignore", AssumptionWarning)
        before, after = load(tmp_path / "source").config, load(tmp_path / "out").config
    assert (after.end_id, after.answer_ends) == (before.end_id, before.answer_ends)
    assert after.answer_ends == ends.get("answer_end_ids", (after.end_id,))


# Plain MLX


class ScaledLinear(nn.Linear):
    """As mlx-lm's own layers that hold nvfp4's scale of the whole tensor: `to_quantized` takes `global_scale`."""

    def to_quantized(self, group_size=None, bits=None, mode="affine", global_scale=None):
        rows, columns = self.weight.shape
        layer = (ScaledQuantizedLinear if mode == "nvfp4" else nn.QuantizedLinear)(
            columns, rows, "bias" in self, group_size, bits, mode
        )
        if mode == "nvfp4":
            layer.global_scale = mx.array(1.0)
        return layer


class ScaledQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x):
        return super().__call__(x) * self.global_scale


def in_plain_mlx(folder):
    """A packed folder loaded as mlx-lm does it: config.json, `nn.quantize` with its predicate, strict `load_weights`."""
    config = json.loads((folder / "config.json").read_text())
    table = config.pop("quantization")
    assert config.pop("quantization_config") == table
    config.pop("marlin")
    weights = mx.load(str(folder / "model.safetensors"))
    network = build({**config}, dict(tree_of(folder)), where="plain")
    for path, layer in linear_layers(network).items():
        set_modules(network, [(path, ScaledLinear(layer.weight.shape[1], layer.weight.shape[0], bias="bias" in layer))])

    def predicate(path, module):
        if path in table:
            return table[path]
        return hasattr(module, "to_quantized") and f"{path}.scales" in weights

    defaults = {key: table[key] for key in ("group_size", "bits", "mode")}
    nn.quantize(network, **defaults, class_predicate=predicate)
    network.load_weights(list(weights.items()), strict=True)
    return network


def tree_of(folder):
    """Weights of the right shapes and no meaning."""
    model = load(folder.parent / "source")
    from mlx.utils import tree_flatten

    return [(path, mx.zeros_like(array)) for path, array in tree_flatten(model.network.parameters())]


@pytest.mark.parametrize(
    "formats", [("nvfp4", "mxfp8"), ("mxfp4", "int8"), ("int4", "16bit"), ("mxfp8", "nvfp4")], ids="-".join
)
def test_plain_mlx_gives_the_same_logits(source, tmp_path, formats):
    folder = tmp_path / "ours"
    quantize(source, "-o", folder, "--global-format", formats[0], "--local-format", formats[1], "--group-size", 32)
    network = in_plain_mlx(folder)
    plain = network(mx.array(np.frombuffer(DATA, np.uint8).astype(np.int32))[None])[0]
    ours = load(folder, device="cpu").logits(DATA)
    assert mx.abs(ours).max().item() > 0.5
    np.testing.assert_allclose(np.array(plain), np.array(ours), atol=2e-4)
