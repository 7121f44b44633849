"""The codes of the packed formats as Metal decodes them: all of them, to the last bit."""

import mlx.core as mx
import pytest

from marlin_cli.files import shipped

pytestmark = pytest.mark.metal


def decoded(emulated, body: str, inputs: mx.array, count: int) -> mx.array:
    header = shipped("kernels/packed.h.metal").read_text(encoding="utf-8")

    def call() -> mx.array:
        kernel = mx.fast.metal_kernel("decode", ["codes"], ["out"], body, header)
        (out,) = kernel(
            inputs=[inputs],
            grid=(inputs.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(count,)],
            output_dtypes=[mx.float32],
        )
        return out

    return emulated(call).result


def same(found: mx.array, expected: mx.array) -> bool:
    return mx.array_equal(found, expected, equal_nan=True).item()


def test_e4m3(emulated):
    codes = mx.arange(256).astype(mx.uint8)
    body = "uint i = thread_position_in_grid.x; out[i] = marlin::from_e4m3(codes[i]);"
    assert same(decoded(emulated, body, codes, 256), mx.from_fp8(codes, dtype=mx.float32))


def test_e8m0(emulated):
    codes = mx.arange(256).astype(mx.uint8)
    body = "uint i = thread_position_in_grid.x; out[i] = marlin::from_e8m0(codes[i]);"
    powers = mx.array([2.0 ** (code - 127) for code in range(255)] + [float("inf")])
    assert same(decoded(emulated, body, codes, 256), powers)


def test_e2m1_words(emulated):
    words = mx.random.randint(0, 2**32 - 1, (512,), key=mx.random.key(0)).astype(mx.uint32)
    body = """
    uint i = thread_position_in_grid.x;
    for (int p = 0; p < 4; p++) {
      float2 pair = marlin::from_e2m1_pair(codes[i], p);
      out[i * 8 + p] = pair.x;
      out[i * 8 + p + 4] = pair.y;
    }"""
    magnitudes = mx.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = (words[:, None] >> (4 * mx.arange(8)).astype(mx.uint32)) & 15
    expected = magnitudes[nibbles & 7] * mx.where(nibbles & 8, -1.0, 1.0)
    assert same(decoded(emulated, body, words, 4096), expected.reshape(-1))


def test_e4m3_words(emulated):
    codes = mx.arange(256).astype(mx.uint8)
    body = """
    uint i = thread_position_in_grid.x;
    for (int p = 0; p < 2; p++) {
      float2 pair = marlin::from_e4m3_pair(codes[i], p);
      out[i * 4 + p] = pair.x;
      out[i * 4 + p + 2] = pair.y;
    }"""
    assert same(decoded(emulated, body, codes.view(mx.uint32), 256), mx.from_fp8(codes, dtype=mx.float32))
