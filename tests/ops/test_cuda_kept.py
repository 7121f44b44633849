"""Kernels that are kept as machine code: what they are compiled for, and when; neither compiler nor GPU is called."""

import hashlib

import mlx.core as mx
import pytest

from marlin_cli.ops import cuda, cuda_compile, cuda_kept
from marlin_cli.ops.cuda_kept import KeptKernel, Types, variant
from marlin_cli.ops.cuda_kernels import SOURCES

POOL, ATTENTION = SOURCES["strided_pool"], SOURCES["flash_attention"]
TEMPLATE = (("T", mx.float32), ("STRIDE", 4), ("MAXIMUM", True))
TYPES = Types(((mx.float32, 3),), (mx.float32,))


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What MLX was given to launch, and texts that were compiled, in a cache of its own."""
    launches, texts = [], []

    def compile_text(text):
        texts.append(text)
        return f"code of {text}".encode()

    def launch(**given):
        launches.append(given)
        return [mx.zeros(shape, dtype) for shape, dtype in zip(given["output_shapes"], given["output_dtypes"], strict=True)]

    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_compile, "compile_text", compile_text)
    monkeypatch.setattr(cuda_compile, "_key", lambda text: hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    forget()
    cuda_compile._say_not_kept.cache_clear()
    yield launches, texts
    forget()


def forget():
    """As a process that has only just begun."""
    cuda_kept._machine_code.cache_clear()
    cuda_compile.machine_code.cache_clear()


def pool(rows):
    return cuda.strided_pool(mx.zeros((2, rows, 8)), 4, "max")


def test_a_kernel_is_compiled_once_and_told_sizes_at_each_launch(launched):
    launches, texts = launched
    assert pool(16).shape == (2, 4, 8) and pool(17).shape == (2, 5, 8)
    assert [launch["scalars"] for launch in launches] == [[2, 16, 8], [2, 17, 8]]
    (text,) = texts
    assert {launch["compiled_source"] for launch in launches} == {f"code of {text}".encode()}
    assert {f'extern "C" __global__ void {launch["name"]}(' in text for launch in launches} == {True}
    assert all(launch["ensure_row_contiguous"] for launch in launches)


def test_another_process_compiles_nothing(launched, tmp_path):
    pool(16)
    forget()
    pool(16)
    (kept,) = (tmp_path / "cache" / "cubin").iterdir()
    assert len(launched[1]) == 1
    kept.write_bytes(kept.read_bytes()[:-1])  # damaged: rebuilt, and whole again for the next one
    forget()
    pool(16)
    forget()
    pool(16)
    assert len(launched[1]) == 2 and len({launch["compiled_source"] for launch in launched[0]}) == 1


@pytest.mark.parametrize("broken", ["no folder", "no file"])
def test_where_nothing_can_be_kept_one_line_says_so(broken, launched, tmp_path, monkeypatch, capsys):
    if broken == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.setattr(cuda_compile.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError(30, "Read-only")))
    cuda_compile._announce()
    capsys.readouterr()
    pool(16)
    cuda.strided_pool(mx.zeros((2, 16, 8)), 2, "max")
    said = capsys.readouterr().err
    assert said.count("CUDA kernels are compiled anew in each run") == 1
    assert len(launched[0]) == len(launched[1]) == 2


def test_each_variant_has_a_name_of_its_own():
    half = Types(((mx.float16, 3),), (mx.float16,))
    templates = [TEMPLATE, (*TEMPLATE[:1], ("STRIDE", 2), TEMPLATE[2]), (*TEMPLATE[:2], ("MAXIMUM", False))]
    found = [variant(POOL, template, TYPES, 256) for template in templates] + [variant(POOL, TEMPLATE, half, 256)]
    assert len({each.name for each in (*found, variant(POOL, TEMPLATE, TYPES, 512))}) == 5
    assert "__launch_bounds__" not in found[0].text
    bounded = variant(POOL, (*TEMPLATE, ("TOGETHER", 512)), TYPES, 256)
    assert "__launch_bounds__(256, 2) strided_pool_" in bounded.text
    assert "using T = float;" in found[0].text and "constexpr bool MAXIMUM = true;" in found[0].text
    assert "const __half* x, __half* out, const int x_size_0" in found[3].text


def test_strides_are_those_of_rows_without_gaps(launched):
    four, one = (mx.bfloat16, 4), (mx.int32, 1)
    types = Types((four, four, four, one, one, four, (mx.float32, 1)), (mx.bfloat16,))
    found = variant(ATTENTION, (("T", mx.bfloat16),), types, 128)
    assert found.sized == (0, 1, 2, 5)  # of padding, lengths and the factor no size is read
    assert "keys_strides[] = {int64_t(1) * keys_size_1 * keys_size_2 * keys_size_3, int64_t(1) * keys_size_2" in found.text
    queries = mx.zeros((1, 2, 3, 64))
    cuda.attention(queries, queries, queries, 1.0)
    (launch,) = launched[0]
    assert launch["scalars"] == [1, 2, 3, 64] * 4 and launch["name"].startswith("flash_attention_")


def test_a_prompt_is_read_by_what_is_kept_and_a_byte_follows_strides(monkeypatch):
    asked = []

    def kernel(name, in_rows=False):
        asked.append(in_rows)
        return lambda **given: [mx.zeros(given["output_shapes"][0])]

    monkeypatch.setattr(cuda, "kernel", kernel)
    keys = mx.zeros((1, 2, 30, 64))
    for rows in (1, 2, 30):
        cuda.attention(mx.zeros((1, 2, rows, 64)), keys, keys, 1.0)
    many = mx.zeros((1 << 10, 2, 8, 128))  # a copy of so much takes longer than is won
    cuda.attention(many, many, many, 1.0)
    assert asked == [False, True, True, False]


def test_kernels_that_take_rows_are_kept():
    kinds = {name: isinstance(cuda.kernel(name), KeptKernel) for name, source in SOURCES.items() if source.row_contiguous}
    assert kinds == dict.fromkeys(("marlin_gemm_fp4", "attention_combine", "unpack", "patch_embed", "strided_pool"), True)
    assert isinstance(cuda.kernel("flash_attention", in_rows=True), KeptKernel)
