"""MLX's own fp_qmv_fast and sdpa_vector on the emulator, against float64; and faults planted in them."""

import mlx.core as mx
import numpy as np
import pytest
from checks import Check
from kernel_cases import DTYPES, TOLERANCES
from mlx_kernels import ABSENT, CHECKS, Output, launch, missing
from packed_numbers import FORMATS, packed_numbers

pytestmark = [pytest.mark.metal, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
UNSANITIZED = CHECKS - {Check.SANITIZERS}

SCALES = {"nvfp4": (0, 0x48), "mxfp4": (115, 128), "mxfp8": (115, 128)}  # as large as leaves the results to float16


def exactly(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def matrix_vector(format_name, dtype, *, rows=16, columns=512, batch=1, whole=None, results=4, **how):
    """fp_qmv_fast as MLX launches it: three rows of x, a threadgroup of two simdgroups for `2 * results` rows of weights."""
    bits, group = FORMATS[format_name]
    words, codes, numbers = packed_numbers(format_name, batch, rows, columns, scales=SCALES[format_name])
    weight, scales = mx.array(words).view(mx.uint32), mx.array(codes)
    x = (0.05 * mx.random.normal((batch, 3, columns), key=mx.random.key(0))).astype(dtype)
    expected = exactly(x) @ numbers.swapaxes(-1, -2) * (1 if whole is None else whole / (448 * 6))
    strides = [ABSENT] * 7
    if batch > 1:
        of_x = (mx.array([batch, 3, columns]), mx.array([3 * columns, columns, 1], dtype=mx.int64))
        of_weight = (mx.array([batch, rows, weight.shape[2]]), mx.array([rows * weight.shape[2]], dtype=mx.int64))
        strides = [mx.array(1), *of_x, mx.array(1), *of_weight, mx.array([rows * columns // group], dtype=mx.int64)]
    return launch(
        "fp_quantized.h",
        "fp_qmv_fast",
        (dtype, group, bits, batch > 1, rows % (2 * results) != 0, whole is not None, results),
        [
            *(weight, scales, ABSENT if whole is None else mx.array(whole)),
            *(x, Output((batch, 3, rows), dtype), mx.array(columns), mx.array(rows), *strides),
        ],
        grid=(3, -(-rows // (2 * results)), batch),
        threadgroup=(32, 2, 1),
        expected=mx.array(expected.astype(np.float32)),
        tolerance=TOLERANCES[dtype],
        **how,
    )


@pytest.mark.parametrize("format_name", FORMATS)
@EACH_DTYPE
def test_matrix_vector(format_name, dtype):
    matrix_vector(format_name, dtype, checks=UNSANITIZED).require()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 13}, {"batch": 2}, {"whole": 3.0}, {"columns": 1536}, {"results": 1}],
    ids=["plain", "ragged rows", "batch", "scale of the tensor", "deep", "one row a simdgroup"],
)
@pytest.mark.parametrize("format_name", FORMATS)
@EACH_DTYPE
def test_variants_of_the_matrix_vector_product(format_name, dtype, options):
    matrix_vector(format_name, dtype, **options).require()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [(">> 8", ">> 4"), ("result[row] = simd_sum(result[row])", "result[row] = result[row]")],
    ids=["a nibble read twice", "a sum of one lane"],
)
def test_a_wrong_matrix_vector_product_is_found(wrong, right):
    """Each edit leaves a kernel that compiles and is race-free, so the reference alone can tell."""

    def edited(text: str) -> str:
        assert wrong in text
        return text.replace(wrong, right)

    report = matrix_vector("nvfp4", mx.float32, checks=UNSANITIZED, change=edited)
    assert {finding.check for finding in report.findings} == {Check.RESULT}, str(report)


def attention(dtype, head_dim, *, mask=None, keys=70, rows=3, sinks=False, transposed=False, **how):
    """sdpa_vector as MLX launches it: 4 heads that share 2 of keys, in pages longer than their rows; 1024 threads a row."""
    heads, kv_heads, room = 4, 2, keys + 5
    random = mx.random.split(mx.random.key(1), 5)
    queries = mx.random.normal((heads, rows, head_dim), key=random[0]).astype(dtype)
    k, v = (mx.random.normal((kv_heads, room, head_dim), key=key).astype(dtype) for key in random[1:3])
    scores = exactly(queries) @ exactly(mx.repeat(k, 2, axis=0))[:, :keys].swapaxes(-1, -2) * head_dim**-0.5
    given, strides = {}, [ABSENT] * 3
    if mask == "causal":
        scores = np.where(np.arange(keys) <= keys - rows + np.arange(rows)[:, None], scores, -np.inf)
    elif mask is not None:
        given[mask] = mx.random.normal((rows, keys), key=random[3]).astype(dtype)
        if mask == "bool":
            given[mask] = given[mask] > 0
            scores = np.where(np.array(given[mask]), scores, -np.inf)
        else:
            scores = scores + exactly(given[mask])
        strides = [mx.array(1), mx.array(keys), mx.array(0)]
    extra = mx.random.normal((heads,), key=random[4]).astype(dtype)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    if sinks:
        total += np.exp(exactly(extra)[:, None, None] - scores.max(axis=-1, keepdims=True))
    expected = weights / total @ exactly(mx.repeat(v, 2, axis=0))[:, :keys]
    distances = [mx.array(step, dtype=mx.uint64) for step in (room * head_dim, head_dim) * 2]
    return launch(
        "sdpa_vector.h",
        "sdpa_vector",
        (dtype, head_dim, head_dim),
        [
            *(mx.contiguous(queries.swapaxes(0, 1)) if transposed else queries, k, v, Output((heads, rows, head_dim), dtype)),
            *(mx.array(heads // kv_heads), mx.array(keys), *distances, mx.array(head_dim**-0.5)),
            *(given.get("bool", ABSENT), given.get("float", ABSENT), *strides),
            *((extra, mx.array(heads)) if sinks else (ABSENT, ABSENT)),
        ],
        grid=(heads, rows, 1),
        threadgroup=(1024, 1, 1),
        constants={
            **{"has_mask": mask in ("bool", "float"), "bool_mask": mask == "bool", "float_mask": mask == "float"},
            **{"do_causal": mask == "causal", "query_transposed": transposed, "has_sinks": sinks},
        },
        expected=mx.array(expected.astype(np.float32)),
        tolerance=TOLERANCES[dtype],
        **how,
    )


@pytest.mark.parametrize(("head_dim", "mask"), [(64, None), (96, "causal"), (128, "causal")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_attention(dtype, head_dim, mask):
    attention(dtype, head_dim, mask=mask, checks=UNSANITIZED).require()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": "causal"},
        {"mask": "bool"},
        {"mask": "float"},
        {"sinks": True},
        {"transposed": True},
        {"keys": 3, "rows": 1},
    ],
    ids=["plain", "causal", "mask of bool", "mask of floats", "sinks", "transposed queries", "fewer keys than simdgroups"],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@EACH_DTYPE
def test_variants_of_attention(dtype, head_dim, options):
    attention(dtype, head_dim, **options).require()


@pytest.mark.parametrize("barrier", range(3), ids=["the peaks", "before a sum", "after a sum"])
def test_a_barrier_cut_from_attention_is_found(barrier):
    from metal_text import without_barrier

    report = attention(mx.float32, 64, rows=1, checks=UNSANITIZED, change=lambda text: without_barrier(text, barrier))
    assert report.found(Check.ORDER), str(report)


def test_a_simdgroup_barrier_in_attention_is_found():
    """Weaker than the one that stands there: it orders the lanes of one simdgroup alone."""
    from metal_text import barriers_of

    report = attention(
        mx.float32, 64, rows=1, checks=UNSANITIZED,
        change=lambda text: text.replace(barriers_of(text)[0], barriers_of(text)[0].replace("threadgroup_", "simdgroup_"), 1),
    )  # fmt: skip
    assert report.found(Check.ORDER), str(report)
