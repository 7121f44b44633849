"""nvfp4 layers against the package that defines their layout."""

import json

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.checkpoints import nvfp4
from marlin_cli.quantization.encoders import decode, encode
from marlin_cli.quantization.formats import FORMATS

pytestmark = pytest.mark.peers

torch = pytest.importorskip("torch")
compressed_tensors = pytest.importorskip("compressed_tensors")

ROWS, COLUMNS = 48, 64


@pytest.fixture
def scheme():
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme("NVFP4A16", ["Linear"])


def compressor():
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor

    return NVFP4PackedCompressor


def test_their_decoder_reads_our_weights(scheme):
    mx.random.seed(0)
    packed = encode(mx.random.normal((ROWS, COLUMNS)) * 0.01, FORMATS["nvfp4"])
    ours = {"x.weight": packed.weight, "x.scales": packed.scales, "x.global_scale": mx.array(packed.global_scale)}
    stored = nvfp4.under_compressed_tensors_names(ours)
    state = {
        "weight_packed": torch.from_numpy(np.array(stored["x.weight_packed"][1])),
        "weight_scale": torch.from_numpy(np.array(stored["x.weight_scale"][1])).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.from_numpy(np.array(stored["x.weight_global_scale"][1])),
    }
    theirs = compressor().decompress(state, scheme)["weight"].float().numpy()
    # They decode into bfloat16.
    np.testing.assert_allclose(theirs, np.array(decode(packed)), rtol=2**-8)


def test_we_read_what_their_compressor_writes(scheme, tmp_path):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    divisor = (448 * 6 / weight.abs().max()).reshape(1)  # as llm-compressor chooses it; no power of two
    groups = weight.reshape(ROWS, COLUMNS // 16, 16).abs().amax(-1)
    scale = (groups / 6 * divisor).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": divisor}
    written = compressor().compress(state, scheme)
    names = {"weight_packed": written["weight_packed"], "weight_scale": written["weight_scale"].view(torch.uint8)}
    tensors = {f"x.{name}": mx.array(tensor.numpy()) for name, tensor in names.items()}
    tensors["x.weight_global_scale"] = mx.array(divisor.numpy())
    read = nvfp4.under_mlx_names(tensors, nvfp4.COMPRESSED_TENSORS, tmp_path)
    decoded = mx.dequantize(read["x.weight"], read["x.scales"], group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
    ours = np.array(decoded * read["x.global_scale"])
    theirs = compressor().decompress(dict(written), scheme)["weight"].float().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2**-8, atol=1e-9)
    assert np.abs(ours - weight.numpy()).max() < 0.2 * weight.abs().max()


def test_their_configuration_takes_our_table():
    from compressed_tensors.quantization import QuantizationConfig

    table = nvfp4.compressed_tensors_table(["output"], "0")
    found = QuantizationConfig.model_validate(json.loads(json.dumps(table)))
    weights = found.config_groups["group_0"].weights
    assert (found.format, found.ignore, weights.num_bits, weights.group_size) == ("nvfp4-pack-quantized", ["output"], 4, 16)
