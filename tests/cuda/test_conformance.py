"""CUDA twins against the reference in float32 on the CPU: shapes, types and hazards.

They run on a GPU where MLX has one; elsewhere the same text runs in an emulator, given a C++ compiler (see conftest.py).
"""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import Emulated, compiler

from marlin_cli.ops import cuda, reference
from marlin_cli.ops.cuda_decoded import Copies

pytestmark = pytest.mark.cuda
TOLERANCE = {mx.float32: 1e-5, mx.float16: 3e-3, mx.bfloat16: 2e-2}  # of the largest output
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16", "bfloat16"])
FORMATS = {"nvfp4": ("nvfp4", 4, 16), "mxfp4": ("mxfp4", 4, 32), "mxfp8": ("mxfp8", 8, 32)}
WHOLE = [("affine", 4, 32), ("affine", 4, 64), ("affine", 8, 32), ("affine", 8, 128)]
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if not mx.cuda.is_available():
        if compiler() is None:
            pytest.skip("neither a CUDA GPU nor a C++ compiler on Linux here")
        monkeypatch.setattr(cuda, "kernel", Emulated)
        monkeypatch.setattr(cuda, "copies", lambda: Copies(1 << 20, 1 << 40))


def random(*shape, seed=0, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def on_cpu(function, *arguments, **settings):
    with mx.stream(mx.cpu):
        result = function(*arguments, **settings)
        mx.eval(result)
    return result


def assert_close(found, expected, dtype, rows=slice(None)):
    assert found.shape == expected.shape and found.dtype == dtype
    found, expected = np.array(found.astype(mx.float32))[rows], np.array(expected.astype(mx.float32))[rows]
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max() + 1e-30


# rows of x, rows of the weight, columns: one of each, ragged tiles, one warp's part, several steps, ByT5-small's width.
SHAPES = [
    (1, 1, 32), (1, 33, 192), (3, 7, 320), (8, 129, 256), (9, 40, 256), (16, 48, 2080), (17, 64, 1024),
    (32, 17, 64), (31, 300, 1472), (2, 5, 8192), (32, 1024, 4096), (8, 4096, 4096), (4, 40, 1312), (5, 8200, 96),
]  # fmt: skip


@EACH_DTYPE
@EACH_FORMAT
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES, ids=str)
def test_packed_linear(format, rows, columns, depth, dtype):
    mode, bits, group_size = format
    x = random(rows, depth, dtype=dtype)
    weight, scales = on_cpu(mx.quantize, random(columns, depth, seed=1) * 0.3, group_size=group_size, bits=bits, mode=mode)
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    found = cuda.packed_linear(x, weight, scales, None, **settings)
    plain = on_cpu(mx.dequantize, weight, scales, **settings, dtype=mx.float32)
    assert_close(found, on_cpu(lambda: x.astype(mx.float32) @ plain.T), dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("format", [*FORMATS.values(), ("affine", 4, 32), ("affine", 8, 64)], ids=str)
def test_many_rows(format, dtype):
    """Weights that are decoded once for a dense product: each number, and the product."""
    mode, bits, group_size = format
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    x = random(40, 192, dtype=dtype)
    plain = random(33, 192, seed=1, dtype=dtype if mode == "affine" else mx.float32) * 0.3
    weight, scales, *biases = on_cpu(mx.quantize, plain, **settings)
    zeros = biases[0] if biases else None
    assert cuda.takes_packed_linear(x, weight, scales, zeros, **settings)
    expected = on_cpu(mx.dequantize, weight, scales, zeros, **settings, dtype=mx.float32)
    assert_close(cuda.unpacked(weight, scales, zeros, **settings, dtype=dtype), expected, dtype)
    assert_close(
        cuda.packed_linear(x, weight, scales, zeros, **settings), on_cpu(lambda: x.astype(mx.float32) @ expected.T), dtype
    )


@EACH_DTYPE
@EACH_FORMAT
def test_every_code_and_scale_is_decoded(format, dtype):
    """All bytes of weights under many scales, picked out one column at a time by unit rows of x."""
    mode, bits, group_size = format
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**32, (64, 128 * bits // 32), dtype=np.uint32)
    if bits == 8:
        codes = words.view(np.uint8)
        codes[(codes & 127) == 127] = 0  # NaN
    lowest, highest = (0, 127) if mode == "nvfp4" else (107, 126) if dtype == mx.float16 else (60, 150)
    scales = mx.array(rng.integers(lowest, highest, (64, 128 // group_size)).astype(np.uint8))
    weight = mx.array(words)
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    plain = np.array(on_cpu(mx.dequantize, weight, scales, **settings, dtype=mx.float32))
    for first in range(0, 128, 32):
        x = mx.eye(128)[first : first + 32].astype(dtype)
        found = np.array(cuda.packed_linear(x, weight, scales, None, **settings).astype(mx.float32))
        expected = np.array(mx.array(plain.T[first : first + 32]).astype(dtype).astype(mx.float32))
        assert (found == expected).all()


def test_products_of_slices_and_batches():
    settings = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    packed, scales = on_cpu(mx.quantize, random(2, 40, 128, seed=1), **settings)
    plain = on_cpu(mx.dequantize, packed, scales, **settings, dtype=mx.float32)
    x = random(2, 3, 256)
    flat = random(1 + 128)[1:].reshape(1, 128)  # starts 4 bytes after a multiple of 16
    for layer in range(2):
        for part in (x[..., :128], x[:, ::2, 128:], x.swapaxes(0, 1)[..., 64:192], flat):
            found = cuda.packed_linear(part, packed[layer], scales[layer], None, **settings)
            assert_close(found, on_cpu(lambda p=part, w=plain[layer]: p @ w.T), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("format", WHOLE, ids=str)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(3, 7, 384), (9, 40, 256), (31, 300, 1408)], ids=str)
def test_packed_linear_of_whole_numbers(format, rows, columns, depth, dtype):
    mode, bits, group_size = format
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    x = random(rows, depth, dtype=dtype)
    weight, scales, zeros = on_cpu(mx.quantize, random(columns, depth, seed=1, dtype=dtype) * 0.3, **settings)
    found = cuda.packed_linear(x, weight, scales, zeros, **settings)
    plain = on_cpu(mx.dequantize, weight, scales, zeros, **settings, dtype=mx.float32)
    assert_close(found, on_cpu(lambda: x.astype(mx.float32) @ plain.T), dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_whole_number_is_decoded(bits, dtype):
    """All codes, under scales and zeros that leave their products exact."""
    codes = np.arange(64 * 128, dtype=np.uint32).reshape(64, 128) % (1 << bits)
    per_word = 32 // bits
    words = (codes.reshape(64, -1, per_word) << (np.arange(per_word, dtype=np.uint32) * bits)).sum(-1, dtype=np.uint32)
    scales = mx.array(np.tile([[0.5, 2.0]], (64, 1))).astype(dtype)
    zeros = mx.zeros_like(scales)
    settings = {"group_size": 64, "bits": bits, "mode": "affine"}
    unit_rows = [mx.eye(128)[first : first + 32].astype(dtype) for first in range(0, 128, 32)]
    found = [cuda.packed_linear(rows, mx.array(words), scales, zeros, **settings) for rows in unit_rows]
    expected = codes.T * np.repeat([0.5, 2.0], 64)[:, None]
    assert (np.array(mx.concatenate(found).astype(mx.float32)) == expected).all()


def test_nan_and_infinity_stay_what_they_are():
    settings = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    packed, scales = on_cpu(mx.quantize, random(16, 64, seed=1), **settings)
    for bad in (np.nan, np.inf):
        x = mx.array([[bad] + [1.0] * 63, [1.0] * 64])
        found = cuda.packed_linear(x, packed, scales, None, **settings)
        assert not mx.isfinite(found[0]).any().item() and mx.isfinite(found[1]).all().item()


# batch, heads, kv_heads, rows, total, head_dim, and what is masked
ATTENTION = {
    "one row": (2, 4, 4, 1, 37, 64, {}),
    "one key": (1, 2, 2, 1, 1, 32, {}),
    "patch": (300, 2, 2, 8, 8, 64, {}),
    "tail of rows": (2, 3, 3, 5, 9, 48, {}),
    "grouped": (2, 8, 2, 3, 200, 128, {}),
    "grouped, one row": (1, 12, 3, 1, 700, 96, {}),
    "window": (1, 2, 2, 12, 300, 64, {"window": 5}),
    "window, not causal": (1, 2, 2, 40, 40, 16, {"window": 3, "causal": False}),
    "padding": (3, 2, 1, 6, 20, 64, {"left_padding": [0, 3, 14]}),
    "lengths": (3, 2, 2, 7, 70, 80, {"lengths": [70, 1, 33], "causal": False}),
    "bias": (2, 6, 6, 9, 33, 64, {"bias": 128, "causal": False, "lengths": [33, 20]}),
    "bias, decoding": (2, 6, 6, 1, 400, 64, {"bias": 20}),
    "bias, shorter than the distances": (1, 2, 2, 30, 30, 256, {"bias": 4, "causal": False}),
    "long": (1, 2, 2, 2, 4000, 64, {"causal": False}),
    "wide": (1, 2, 2, 4, 150, 256, {}),
    "everything": (2, 4, 2, 6, 90, 32, {"window": 30, "left_padding": [0, 5], "lengths": [90, 80]}),
}


def masks(options):
    options = dict(options)
    bias = options.pop("bias", None)
    for name in ("left_padding", "lengths"):
        if name in options:
            options[name] = mx.array(options[name])
    return options, bias


@EACH_DTYPE
@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention(case, dtype):
    batch, heads, kv_heads, rows, total, head_dim, options = case
    options, bias = masks(options)
    queries = random(batch, heads, rows, head_dim, dtype=dtype)
    keys = random(batch, kv_heads, total, head_dim, seed=1, dtype=dtype)
    values = random(batch, kv_heads, total, head_dim, seed=2, dtype=dtype)
    plain = [a.astype(mx.float32) for a in (queries, keys, values)]
    if bias is not None:
        options["relative_bias"] = random(heads, 2 * bias + 1, seed=3, dtype=dtype)
    found = cuda.attention(queries, keys, values, 0.3, **options)
    if bias is not None:
        options["relative_bias"] = options["relative_bias"].astype(mx.float32)
    assert_close(found, on_cpu(reference.attention, *plain, 0.3, **options), dtype)


@EACH_DTYPE
def test_attention_follows_strides(dtype):
    """Heads before rows as a view of rows before heads; every second key; a slice that starts anywhere; columns reversed."""
    joined = random(2, 20, 3, 3, 64, dtype=dtype)
    queries, keys, values = (joined[:, :, i].swapaxes(1, 2) for i in range(3))
    odd = random(2, 3, 20, 65, seed=4, dtype=dtype)[..., 1:]
    for q, k, v in (
        (queries, keys, values),
        (queries[:, :, :4], keys[:, :, ::2], values[:, :, 1::2]),
        (odd, keys, odd),
        (queries[..., ::-1], odd[..., ::-1], values),
    ):
        found = cuda.attention(q, k, v, 0.2)
        expected = on_cpu(reference.attention, *(a.astype(mx.float32) for a in (q, k, v)), 0.2)
        assert_close(found, expected, dtype)


# batch, heads, kv_heads, rows, rows of each page, head_dim, and what is masked
PAGED = {
    "one page, one row": (1, 4, 4, 1, [300], 64, {}),
    "one short page": (2, 2, 2, 1, [3], 32, {}),
    "cross": (2, 8, 2, 4, [1000], 64, {"causal": False, "lengths": [1000, 17]}),
    "pages": (2, 4, 1, 2, [256, 256, 5], 64, {}),
    "many pages": (1, 4, 2, 1, [64] * 17 + [1], 128, {}),
    "more rows than the last page": (1, 2, 2, 30, [64, 10], 96, {}),
    "padding": (2, 4, 4, 3, [40, 40], 64, {"left_padding": [0, 50]}),
    "window": (1, 6, 2, 4, [128, 128, 128], 32, {"window": 100}),
    "lengths": (3, 2, 2, 1, [128, 128], 256, {"lengths": [200, 128, 5], "causal": False}),
}


@EACH_DTYPE
@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (4, 8), (8, None), (None, None)], ids=str)
@pytest.mark.parametrize("case", PAGED.values(), ids=PAGED.keys())
def test_paged_attention(case, bits, dtype):
    batch, heads, kv_heads, rows, page_rows, head_dim, options = case
    options, _ = masks(options)
    queries = random(batch, heads, rows, head_dim, dtype=dtype)

    def pages(bits, seed):
        whole = [random(batch, kv_heads, count + 3, head_dim, seed=seed + i, dtype=dtype) for i, count in enumerate(page_rows)]
        if bits is not None:
            whole = [on_cpu(reference.pack_rows, page, bits) for page in whole]
        # The room of the last page is not all in use, so its rows are a slice of it.
        return [
            page[:, :, :count]
            if bits is None
            else reference.Packed(page.packed[:, :, :count], page.scales[:, :, :count], page.bits)
            for page, count in zip(whole, page_rows, strict=True)
        ]

    keys, values = pages(bits[0], 10), pages(bits[1], 50)
    assert cuda.takes_paged_attention(queries, keys, values, 0.2, **options)
    found = cuda.paged_attention(queries, keys, values, 0.2, **options)
    expected = on_cpu(reference.paged_attention, queries.astype(mx.float32), keys, values, 0.2, **options)
    assert_close(found, expected, dtype)


@EACH_DTYPE
@pytest.mark.parametrize("ids", [mx.uint8, mx.int32, mx.uint32, mx.int64])
@pytest.mark.parametrize(("shape", "width"), [((3, 8), 64), ((1, 1), 1), ((2, 5, 4), 12), ((1000, 8), 7)], ids=str)
def test_patch_embed(shape, width, ids, dtype):
    table = random(259, width, dtype=dtype)
    chosen = mx.array(np.random.default_rng(5).integers(0, 256, shape)).astype(ids)
    assert mx.array_equal(cuda.patch_embed(chosen, table), reference.patch_embed(chosen, table)).item()


@EACH_DTYPE
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize(("shape", "stride"), [((2, 16, 64), 4), ((1, 1, 1), 4), ((3, 17, 33), 4), ((1, 5, 8), 7)], ids=str)
def test_strided_pool(shape, stride, kind, dtype):
    x = random(*shape, dtype=dtype) - 3
    found = cuda.strided_pool(x, stride, kind)
    assert_close(found, on_cpu(reference.strided_pool, x.astype(mx.float32), stride, kind), dtype)


def test_pooling_keeps_nan():
    x = mx.array([[[1.0], [np.nan], [2.0], [3.0]]])
    for kind in ("mean", "max"):
        assert np.isnan(np.array(cuda.strided_pool(x, 2, kind))).tolist() == [[[True], [False]]]
