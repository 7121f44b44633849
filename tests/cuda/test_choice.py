"""What the CUDA twins take and how they are launched; it needs neither a GPU nor a compiler."""

import mlx.core as mx
import pytest

from marlin_cli.engine.cuda_answers import decoder_arrays
from marlin_cli.errors import BackendError
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops import cuda, cuda_kernels, cuda_stages, reference
from marlin_cli.ops.cuda_decoded import Copies
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "settings", "taken"),
    [
        ((1, 64), 2**14, mx.float32, NVFP4, True),
        ((1, 64), 2**14 - 1, mx.float32, NVFP4, False),
        ((2, 16, 64), 2**15, mx.bfloat16, NVFP4, True),
        ((33, 64), 2**20, mx.float16, NVFP4, True),
        ((8, 64), 64, mx.float16, NVFP4, True),
        ((7, 64), 64, mx.float16, NVFP4, False),
        ((33, 64), 2**20, mx.float32, NVFP4, False),
        ((8, 64), 64, mx.bfloat16, {"group_size": 64, "bits": 8, "mode": "affine"}, True),
        ((8, 64), 64, mx.bfloat16, {"group_size": 64, "bits": 6, "mode": "affine"}, False),
        ((0, 64), 2**20, mx.float16, NVFP4, False),
        ((1, 48), 2**22, mx.float16, NVFP4, False),
        ((1, 64), 2**20, mx.int32, NVFP4, False),
        ((1, 64), 2**20, mx.float16, {"group_size": 32, "bits": 8, "mode": "mxfp8"}, True),
        ((1, 64), 2**20, mx.float16, {"group_size": 64, "bits": 4, "mode": "affine"}, False),
    ],
)
def test_products_that_are_taken(shape, rows, dtype, settings, taken):
    weight = mx.zeros((rows, shape[-1] * settings["bits"] // 32), dtype=mx.uint32)
    scales = mx.zeros((rows, 1), dtype=mx.uint8)  # never read
    assert cuda.takes_packed_linear(mx.zeros(shape, dtype=dtype), weight, scales, None, **settings) is taken


@pytest.mark.parametrize(
    ("rows", "side", "dtype", "way", "why"),
    [
        (1, 512, mx.bfloat16, "MLX", "too little work"),
        (1, 1024, mx.bfloat16, "marlin_gemm_fp4", "few rows"),
        (8, 1024, mx.bfloat16, "marlin_gemm_fp4", "few rows"),
        (32, 4096, mx.bfloat16, "marlin_gemm_fp4", "few rows"),
        (17, 8192, mx.bfloat16, "decoded, dense", "leaves no room marlin_gemm_fp4"),
        (33, 2048, mx.bfloat16, "decoded, dense", "leaves no room marlin_gemm_fp4"),
        (64, 1024, mx.bfloat16, "marlin_gemm_fp4", "few rows"),
        (65, 1024, mx.bfloat16, "decoded, dense", "no room made anew"),
        (65, 1024, mx.float32, "MLX", "float32 rows"),
    ],
)
def test_the_way_of_a_product_is_told(rows, side, dtype, way, why):
    weight, scales = mx.zeros((side, side // 8), dtype=mx.uint32), mx.zeros((side, side // 16), dtype=mx.uint8)
    found = cuda.product_way(mx.zeros((rows, side), dtype=dtype), weight, scales, None, **NVFP4)
    assert found[0] == way and why in found[1]


@pytest.mark.parametrize(("rows", "side", "kept"), [(40, 64, True), (40, 64, False), (70, 64, True), (70, 64, False)])
def test_many_rows_use_a_copy_where_it_is_kept(rows, side, kept, monkeypatch):
    """Else a kernel of few rows takes them in parts, up to some number."""
    used = []

    def unpacked(*arrays, **settings):
        used.append("unpack")
        return mx.ones((side, side), dtype=mx.bfloat16)

    def launched(**how):
        used.append("gemm")
        return [mx.zeros(how["output_shapes"][0])]

    monkeypatch.setattr(cuda, "SMALL_WEIGHT", 0)
    monkeypatch.setattr(cuda, "unpacked", unpacked)
    monkeypatch.setattr(cuda, "kernel", lambda name: launched)
    store = Copies(1 << 20 if kept else 0, 1 << 60)
    monkeypatch.setattr(cuda, "copies", lambda: store)
    weight, scales = mx.zeros((side, side // 8), dtype=mx.uint32), mx.zeros((side, side // 16), dtype=mx.uint8)
    for _ in range(2):
        found = cuda.packed_linear(mx.ones((rows, side), dtype=mx.bfloat16), weight, scales, None, **NVFP4)
        assert found.shape == (rows, side)
    assert used == (["unpack"] if kept else ["gemm"] * 2 if rows == 40 else ["unpack"] * 2)


@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "taken"),
    [(1, 4, 64, True), (16, 8, 64, True), (17, 8, 64, False), (1, 4, 40, False), (1, 4, 272, False), (0, 4, 64, False)],
)
def test_attentions_that_are_taken(rows, heads, head_dim, taken):
    queries, keys = mx.zeros((1, heads, rows, head_dim)), mx.zeros((1, 2, 100, head_dim))
    assert cuda.takes_attention(queries, keys, keys, 1.0, window=9) is taken
    assert cuda.takes_paged_attention(queries, [keys, keys], [keys, keys], 1.0) is taken


def test_what_mlx_is_fast_at_is_left_to_it():
    queries, keys = mx.zeros((1, 4, 1, 64)), mx.zeros((1, 4, 33, 64))
    assert not cuda.takes_attention(queries, keys, keys, 1.0)
    assert cuda.takes_attention(queries, keys[:, :, 1:], keys[:, :, 1:], 1.0)
    assert cuda.takes_attention(queries, keys, keys, 1.0, lengths=mx.array([20]))
    assert cuda.takes_attention(queries, keys, keys, 1.0, relative_bias=mx.zeros((4, 9)))


def test_pages_are_of_one_kind_and_none_is_empty():
    queries, dense = mx.zeros((1, 2, 1, 64)), mx.zeros((1, 2, 20, 64))
    four, eight = (reference.pack_rows(dense, bits) for bits in (4, 8))
    for keys, values, taken in (
        ([four, four], [eight, eight], True),
        ([four], [dense], True),
        ([four, eight], [four, four], False),
        ([dense, dense.astype(mx.float16)], [four, four], False),
        ([dense.astype(mx.int32)], [dense], False),
        ([four, dense[:, :, :0]], [four, dense[:, :, :0]], False),
        ([], [], False),
    ):
        assert cuda.takes_paged_attention(queries, keys, values, 1.0) is taken


def test_integers_are_not_pooled_nor_embedded():
    assert cuda.takes_strided_pool(mx.zeros((1, 4, 8)), 4, "mean") and cuda.takes_patch_embed(
        mx.zeros(1 << 16), mx.zeros((256, 1024))
    )
    assert not cuda.takes_strided_pool(mx.zeros((1, 4, 8), dtype=mx.int32), 4, "mean")
    assert not cuda.takes_patch_embed(mx.zeros(8), mx.zeros((4, 4)))  # MLX's gather needs no compiling


@pytest.mark.skipif(mx.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda_a_twin_is_refused_when_called_and_not_before():
    with pytest.raises(BackendError, match="NVRTC does not load"):
        cuda.strided_pool(mx.zeros((1, 4, 8)), 4, "mean")


@pytest.mark.parametrize("source", cuda_kernels.SOURCES.values(), ids=cuda_kernels.SOURCES.keys())
def test_every_input_and_output_is_used(source):
    body = source.body()
    assert [name for name in (*source.inputs, *source.outputs) if name not in body] == []


def test_blocks_read_whole_steps_and_fill_the_machine():
    queries = mx.zeros((1, 8, 1, 64))
    for total in (1, 100, 4096, 65536):
        keys = mx.zeros((1, 8, total, 64), dtype=mx.float16)
        rows = cuda._rows_a_split(queries, [keys])
        assert rows % 128 == 0 and (rows == 128 or 8 * total / rows >= 264)


@pytest.mark.parametrize(("format", "loads"), [(None, 8), ("nvfp4", 4), ("mxfp8", 8)])
def test_a_decoder_of_four_bits_has_fewer_loads_under_way(format, loads):
    network = ByT5(ByT5Config(d_model=64, ffn_dim=96, heads=2, head_dim=32, encoder_layers=1, decoder_layers=1))
    network.set_dtype(mx.bfloat16)
    if format is not None:
        settings = QuantizationSettings(encoder_format=format, decoder_format=format, cross_format=format, wo_format=format)
        network = quantize_network(network, settings, method="rtn").network
    assert cuda_stages.loads_of(decoder_arrays(network), 1) == loads
