"""Products, dense and packed: every twin against float64, over shapes and hazards; and how the kernels are built."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.ops import cpu, reference
from marlin_cli.ops.dispatch import linear, packed_linear
from marlin_cli.quantization.encoders import decode, encode
from marlin_cli.quantization.formats import FORMATS

# rows of x, rows of the weight, columns: one row, ragged tails, fewer than a vector, many rows, one group.
SHAPES = {
    "one of each": (1, 1, 64),
    "one row": (1, 33, 192),
    "few rows": (3, 7, 320),
    "four": (4, 64, 128),
    "five": (5, 64, 128),
    "eight": (8, 129, 256),
    "nine": (9, 40, 256),
    "thirty-two": (32, 17, 64),
    "many": (67, 50, 192),
    "wide": (2, 5, 4096),
}
EACH_SHAPE = pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES.values(), ids=SHAPES.keys())
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
TWINS = ["reference", "dispatch"]
# VNNI on registers of 256 bits: the paths of AVX-VNNI, on processors that have it for 512.
AVX2_WITH_VNNI = "x86-64-v3 -mavx512f -mavx512vl -mavx512vnni"


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def close(found, x, weight):
    """Within float32 rounding of the exact product, in the scale of each sum's terms."""
    exact = np.array(x, dtype=np.float64) @ np.array(weight, dtype=np.float64).T
    terms = np.abs(np.array(x, dtype=np.float64)) @ np.abs(np.array(weight, dtype=np.float64)).T
    return found.shape == exact.shape and (np.abs(np.array(found) - exact) <= 2e-6 * terms + 1e-30).all()


@pytest.mark.parametrize("twin", TWINS)
@EACH_SHAPE
def test_dense(twin, rows, columns, depth):
    x, weight = random(rows, depth), random(columns, depth, seed=1)
    assert close((linear if twin == "dispatch" else reference.linear)(x, weight), x, weight)


TILED = [
    (17, 65, 129), (23, 16, 128), (30, 63, 300), (100, 130, 257), (257, 100, 130), (300, 33, 700), (1, 65, 20), (513, 3, 5),
    (400, 20, 300),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "depth"), TILED)
def test_dense_in_tiles(rows, columns, depth):
    """Parts of a tile, of a panel, of the depth and of the rows that are taken together; more rows than columns and fewer."""
    x, weight = random(rows, depth), random(columns, depth, seed=1)
    assert close(linear(x, weight), x, weight)


@pytest.mark.parametrize("depth", [1, 7, 15, 17, 33])
def test_dense_with_a_ragged_depth(depth):
    for rows in (1, 4, 6):
        x, weight = random(rows, depth), random(11, depth, seed=1)
        assert close(linear(x, weight), x, weight)


def packed_arguments(packed):
    floats = packed.biases is not None
    return (
        packed.weight,
        packed.scales.astype(mx.float32) if floats else packed.scales,
        packed.biases.astype(mx.float32) if floats else None,
    ), {"group_size": packed.group_size, "bits": packed.format.bits, "mode": packed.format.mode}


PACKED = [
    (1, 35, 1472), (1, 5, 96), (1, 10, 4160), (2, 7, 1472), (4, 9, 448), (5, 17, 96), (16, 96, 1472), (17, 33, 320),
    (32, 48, 192), (33, 31, 96), (257, 49, 1088), (300, 100, 2240), (512, 32, 64), (513, 3, 64), (530, 37, 4160),
]  # fmt: skip


@EACH_FORMAT
@pytest.mark.parametrize(("rows", "columns", "depth"), PACKED)
def test_packed_in_lines_and_tiles(format, rows, columns, depth):
    """Part of a line, of a tile, of a panel, of the depth and of the rows taken together; rows of very different size."""
    x = random(rows, depth) * mx.array(np.geomspace(1e-8, 1e8, rows, dtype=np.float32))[:, None]
    packed = encode(random(columns, depth, seed=1), format)
    arrays, settings = packed_arguments(packed)
    assert close(packed_linear(x, *arrays, **settings), x, decode(packed) / (packed.global_scale or 1.0))


@EACH_FORMAT
@pytest.mark.parametrize("size", [0.0, 1e-34, 1e-28, 1e-20, 1e15, 1e20, 1e30])
def test_packed_one_row_of_any_size(format, size):
    packed = encode(random(9, 448, seed=1), format)
    arrays, settings = packed_arguments(packed)
    expected = packed_linear(random(1, 448), *arrays, **settings)
    found = packed_linear(random(1, 448) * size, *arrays, **settings)
    assert mx.allclose(found, expected * size, rtol=1e-5, atol=1e-6 * size * mx.max(mx.abs(expected)).item()).item()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("every", [16, 64, 1024])
@pytest.mark.parametrize("rows", [1, 3])
def test_packed_beside_an_outlier(name, every, rows):
    """Weights are zero where x is large, so that sums show what a scale shared with the outlier leaves of the others."""
    x, weight = np.array(random(rows, 1024)), np.array(random(40, 1024, seed=1))
    x[0, 5::every] *= 1000
    weight[:, 5::every] = 0
    packed = encode(mx.array(weight), FORMATS[name])
    arrays, settings = packed_arguments(packed)
    unpacked = decode(packed) / (packed.global_scale or 1.0)
    assert not mx.any(unpacked[:, 5::every]).item()
    assert close(packed_linear(mx.array(x), *arrays, **settings), x, unpacked)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("depth", [128, 384, 896])
def test_packed_in_groups_of_every_size(name, group_size, depth):
    packed = encode(random(35, depth, seed=1), FORMATS[name], group_size=group_size)
    assert packed.group_size == group_size
    arrays, settings = packed_arguments(packed)
    for rows in (1, 3, 4, 5, 9, 40):
        x = random(rows, depth, seed=rows)
        assert close(packed_linear(x, *arrays, **settings), x, decode(packed))


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
@pytest.mark.parametrize("activation_bits", [16, 8])
@EACH_FORMAT
@pytest.mark.parametrize(("rows", "depth"), [(1, 1472), (4, 1472), (9, 1472), (40, 1472), (40, 4160), (300, 4160)])
def test_products_of_one_x_run_as_one(format, rows, depth, activation_bits):
    """A few columns, a panel and a part, panels; factor and bias once, whatever the parts: the same bits as one by one."""
    module = cpu.kernels()[0]
    x, products = random(rows, depth), []
    for columns, factor in ((5, 0.5), (33, 1.0), (64, -3.0)):
        (weight, scales, biases), _ = packed_arguments(packed := encode(random(columns, depth, seed=columns), format))
        kind, bias = getattr(module.Kind, format.name), random(columns, seed=7)
        product = module.Product(weight, scales, biases, kind, packed.group_size, bias, factor, activation_bits)
        plain = module.marlin_gemm(x, weight, scales, biases, kind, packed.group_size, activation_bits)
        products.append((product, plain * factor + bias))
    for (_, expected), found in zip(products, module.products_of([each for each, _ in products], x), strict=True):
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5 * mx.abs(expected).max().item()).item()


@EACH_FORMAT
@pytest.mark.parametrize("rows", [1, 4, 9, 40])
@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_packed_keeps_what_is_not_finite_to_its_row(format, rows, poison):
    packed = encode(random(5, 64, seed=1), format)
    arrays, settings = packed_arguments(packed)
    values = np.array(random(rows, 64))
    values[-1, 50] = poison
    found = np.array(packed_linear(mx.array(values), *arrays, **settings))
    assert not np.isfinite(found[-1]).any() and np.isfinite(found[:-1]).all()


@pytest.mark.parametrize("twin", TWINS)
@EACH_FORMAT
@EACH_SHAPE
def test_packed(twin, format, rows, columns, depth):
    x = random(rows, depth)
    packed = encode(random(columns, depth, seed=1), format)
    arrays, settings = packed_arguments(packed)
    found = (packed_linear if twin == "dispatch" else reference.packed_linear)(x, *arrays, **settings)
    weight = decode(packed) / (packed.global_scale or 1.0)
    if twin == "reference":  # MLX's own order of sums is looser
        assert mx.abs(found - x @ weight.T).max().item() < 1e-4 * mx.abs(x @ weight.T).max().item() + 1e-6
    else:
        assert close(found, x, weight)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("depth", [16, 48, 80])
def test_a_depth_that_ends_in_half_a_block(rows, depth):
    x = random(rows, depth)
    packed = encode(random(6, depth, seed=1), FORMATS["nvfp4"])
    arrays, settings = packed_arguments(packed)
    assert close(packed_linear(x, *arrays, **settings), x, decode(packed) / packed.global_scale)


@EACH_FORMAT
def test_every_code_and_scale_is_decoded(format):
    """All 256 bytes of weights under many scales, picked out one column at a time by unit rows of x."""
    if format.mode == "affine":
        packed = encode(random(8, 128) * 100, format)
    else:
        rng = np.random.default_rng(3)
        words = mx.array(rng.integers(0, 2**32, (32, 128 * format.bits // 32), dtype=np.uint32))
        groups = 128 // format.group_sizes[0]
        # E8M0 codes away from the ends, so that products stay in float32; all E4M3 codes but its two NaNs.
        codes = rng.integers(60, 190, (32, groups)) if format.mode.startswith("mx") else rng.choice(127, (32, groups))
        if format.bits == 8:
            codes_of = np.array(words).view(np.uint8)
            codes_of[(codes_of & 127) == 127] = 0
            words = mx.array(codes_of.view(np.uint32))
        packed = type(encode(random(2, 128), format))(
            words, mx.array(codes.astype(np.uint8)), None, 1.0, format, format.group_sizes[0]
        )
    arrays, settings = packed_arguments(packed)
    for rows in (slice(0, 8), slice(0, 128)):
        x = mx.eye(128)[rows]
        found = packed_linear(x, *arrays, **settings)
        expected = (decode(packed) / (packed.global_scale or 1.0)).T[rows]
        # scale * code + bias may be fused or not, which shows where the two cancel.
        slack = 1e-6 * mx.abs(expected).max().item() if format.mode == "affine" else 0
        assert mx.allclose(found, expected, rtol=1e-6, atol=slack).item()


@EACH_FORMAT
def test_batches_slices_and_nothing(format):
    packed = encode(random(8, 128), format)
    arrays, settings = packed_arguments(packed)
    weight = decode(packed) / (packed.global_scale or 1.0)
    x = random(2, 6, 256)
    broadcast = mx.broadcast_to(x[0, 0, :128], (3, 128))
    for part in (x[..., :128], x[:, ::2, 128:], x.swapaxes(0, 1)[..., 64:192], broadcast, x[:1, :1, 1:256:2]):
        assert close(packed_linear(part, *arrays, **settings).reshape(-1, 8), part.reshape(-1, 128), weight)
    assert packed_linear(mx.zeros((2, 0, 128)), *arrays, **settings).shape == (2, 0, 8)


def test_nan_stays_nan():
    x = mx.array([[np.nan] + [1.0] * 63])
    packed = encode(random(4, 64), FORMATS["nvfp4"])
    arrays, settings = packed_arguments(packed)
    assert mx.isnan(packed_linear(x, *arrays, **settings)).all().item()
    assert mx.isnan(linear(x, random(4, 64))).all().item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_types_run_on_the_reference(dtype):
    x, weight = random(3, 64).astype(dtype), random(5, 64, seed=1).astype(dtype)
    assert linear(x, weight).dtype == dtype


def test_its_gradients_are_the_reference_s():
    x, weight = random(3, 64), random(5, 64, seed=1)

    def gradients(function):
        return mx.grad(lambda x, weight: (function(x, weight) ** 2).sum(), argnums=(0, 1))(x, weight)

    for found, expected in zip(gradients(linear), gradients(reference.linear), strict=True):
        assert mx.abs(found - expected).max().item() < 1e-3 < mx.abs(expected).max().item()


def run(environment, code):
    own = {name: value for name, value in os.environ.items() if name != "CXX"} | environment
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=own)
    assert result.returncode == 0, result.stderr
    return result


PRODUCT = (
    "import mlx.core as mx; from marlin_cli.ops.dispatch import linear; from marlin_cli.ops.cpu import kernels\n"
    "mx.set_default_device(mx.cpu)\n"
    "for _ in range(2): assert linear(mx.ones((2, 32)), mx.ones((3, 32)))[0, 0].item() == 32\n"
    "print(kernels()[0] is not None, kernels()[1])"
)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MARLIN_KERNELS": "reference"}, "MARLIN_KERNELS=reference"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
        ({"CXX": "false"}, "does not run"),
        ({"PATH": "/nonexistent"}, "no C++ compiler (c++, g++, clang++)"),
    ],
)
def test_without_kernels_the_reference_runs_and_says_so_once(environment, reason):
    result = run(environment, PRODUCT)
    assert result.stdout.startswith("False") and reason in result.stdout
    expected = 0 if "MARLIN_KERNELS" in environment else 1
    assert result.stderr.count("\n") == expected, result.stderr


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    result = run({"MARLIN_CACHE": str(tmp_path / "file")}, PRODUCT)
    assert "cannot write to the cache" in result.stdout


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is Linux's")
def test_threads_wait_awake_unless_the_user_says_otherwise():
    """And the environment is left as it was."""
    code = PRODUCT + "\nimport os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for own, policy in (({}, "ACTIVE"), ({"OMP_WAIT_POLICY": "passive"}, "PASSIVE")):
        environment = {**unset, "OMP_DISPLAY_ENV": "verbose", **own}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
        assert f"OMP_WAIT_POLICY = '{policy}'" in result.stderr
        assert ("GOMP_SPINCOUNT = '20000'" in result.stderr) == (not own)
        assert result.stdout.splitlines()[-1] == f"{own.get('OMP_WAIT_POLICY')} None"


def test_a_failed_build_is_remembered(tmp_path):
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\ntest "$1" = --version && exit\necho x >> {calls}\necho "error: no luck" >&2; exit 1\n')
    compiler.chmod(0o755)
    environment = {"MARLIN_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    first, made = run(environment, PRODUCT), calls.read_text()
    again = run(environment, PRODUCT)
    assert "the build fails: error: no luck" in first.stdout and "to try again" in again.stdout
    assert "building" in first.stderr and "building" not in again.stderr
    assert calls.read_text() == made


@pytest.mark.parametrize("variable", ["MARLIN_THREADS", "MARLIN_KERNELS", "MARLIN_ROWS"])
def test_settings_that_make_no_sense_are_refused(variable):
    code = (
        "import mlx.core as mx; from marlin_cli.ops.dispatch import linear; from marlin_cli.errors import UsageError\n"
        "mx.set_default_device(mx.cpu)\n"
        "try: linear(mx.ones((2, 32)), mx.ones((3, 32)))\nexcept UsageError as error: print(error)"
    )
    assert f"{variable} must be" in run({variable: "-1"}, code).stdout


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
@pytest.mark.slow
@pytest.mark.parametrize("march", ["icelake-server", "skylake-avx512", "x86-64-v3", AVX2_WITH_VNNI, "x86-64"])
def test_the_paths_for_other_processors(march, tmp_path):
    """AVX-512 without tiles, without VNNI too, AVX2 without and with it, plain C++: built apart, through four files."""
    needed = {"icelake-server": "avx512_vnni", "skylake-avx512": "avx512bw", AVX2_WITH_VNNI: "avx512_vnni"}.get(march, "")
    if needed not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip(f"no {needed} on this processor")
    environment = {**os.environ, "MARLIN_MARCH": march, "MARLIN_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    others = ["rounded_activations", "ways"] + ["exact_rows"] * (march != "x86-64")  # whose loops would take minutes
    command += [str(Path(__file__).with_name(f"test_{name}.py")) for name in others]
    result = subprocess.run(
        [*command, "-k", "packed or dense or code or depth or way"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,  # most of it the compiler, on a machine that does much else
    )
    assert result.returncode == 0, result.stdout[-2000:]
