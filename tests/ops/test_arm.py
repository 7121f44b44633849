"""The CPU kernels' NEON paths: compiled for ARM, run by QEMU, against the exact numbers. No ARM machine has run them."""

import itertools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from packed_numbers import FORMATS, packed_numbers

from marlin_cli.files import shipped
from marlin_cli.ops import reference

HERE = Path(__file__).parent
KINDS = ["nvfp4", "mxfp4", "mxfp8", "int4", "int8"]  # as `Kind` numbers them
SCALES = {"nvfp4": (0, 0x7F), "mxfp4": (20, 230), "mxfp8": (40, 230)}  # as wide as leaves room for sums in float32
AFFINE_GROUP = 64
ROWS = [*range(1, 10), 33]  # each number of rows that a loop is made for, two loops, and a product of blocks
COMPILERS = {
    "gcc": ["aarch64-linux-gnu-g++"],
    "clang": ["clang++-19", "--target=aarch64-linux-gnu"],
}
DOT_PRODUCTS = "-march=armv8.2-a+dotprod"
PATHS = {"neon": [], "neon, dot products": [DOT_PRODUCTS], "portable": ["-U__ARM_NEON"]}
# Beside marlin_gemm.cpp, which the driver includes.
PRODUCTS = sorted(path.name for path in shipped("kernels").glob("marlin_gemm_*.cpp")) + ["dense_lines.cpp", "ways.cpp"]
OTHER_KERNELS = ["flash_attention.cpp", "linear.cpp", "marlin_gemm.cpp"]


def missing() -> str | None:
    """Why nothing can be compiled for ARM and run here, or None."""
    absent = [name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)}: apt-get install g++-aarch64-linux-gnu qemu-user" if absent else None


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Call(NamedTuple):
    """One call of arm_driver.cpp."""

    operation: str
    integers: Sequence[int]
    buffers: Sequence[np.ndarray]
    shape: tuple[int, ...]  # of what it returns


def build(
    folder: Path, *, compiler: Sequence[str] = COMPILERS["gcc"], flags: Sequence[str] = ("-O1",), kernels: bool = False
) -> Path:
    """The driver with marlin_gemm, or with all that it calls. A file in `folder` goes before the kernel of that name."""
    linked = [*PRODUCTS, *(OTHER_KERNELS if kernels else [])]
    sources = [HERE / "arm_driver.cpp"]
    sources += [folder / name if (folder / name).exists() else shipped("kernels") / name for name in linked]
    includes = [f"-I{place}" for place in (folder, shipped("kernels"), Path(mx.__file__).parent / "include")]
    options = ["-std=c++20", "-Wno-psabi", "-static", "-ffunction-sections", "-Wl,--gc-sections", *flags]
    options += ["-DDRIVER_ALL"] if kernels else []
    done = subprocess.run(
        [*compiler, *options, *includes, *map(str, sources), "-o", str(folder / "driver")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "driver"


def run(driver: Path, calls: Sequence[Call], path: str = "neon") -> list[np.ndarray]:
    """What each call returns; `path` is the one that must have been compiled."""
    text = b""
    for call in calls:
        sizes = [buffer.nbytes for buffer in call.buffers]
        text += f"{call.operation} {len(call.integers)} {' '.join(map(str, call.integers))} {len(sizes)} ".encode()
        text += f"{' '.join(map(str, sizes))}\n".encode() + b"".join(buffer.tobytes() for buffer in call.buffers)
    done = subprocess.run(["qemu-aarch64", str(driver)], input=text, capture_output=True)
    assert done.returncode == 0, done.stderr
    said, _, printed = done.stdout.partition(b"\n")
    assert said.decode() == path.split(",")[0]
    floats = np.frombuffer(printed, np.float32)
    ends = np.cumsum([np.prod(call.shape) for call in calls])
    assert floats.size == ends[-1]
    return [part.reshape(call.shape) for part, call in zip(np.split(floats, ends[:-1]), calls, strict=True)]


def weights(kind: str, rows: int, columns: int) -> tuple[list[np.ndarray], int, np.ndarray]:
    """The buffers of a packed matrix, its group, and the numbers that it holds."""
    if kind in FORMATS:
        packed = packed_numbers(kind, rows, columns, scales=SCALES[kind])
        return [packed.words, packed.scales], FORMATS[kind][1], packed.numbers
    random = np.random.default_rng(0)
    words = random.integers(0, 256, (rows, columns if kind == "int8" else columns // 2), dtype=np.uint8)
    codes = words if kind == "int8" else np.stack([words & 15, words >> 4], axis=-1).reshape(rows, columns)
    scales, biases = random.standard_normal((2, rows, columns // AFFINE_GROUP)).astype(np.float32)
    wide = [np.repeat(each.astype(np.float64), AFFINE_GROUP, axis=-1) for each in (scales, biases)]
    return [words, scales, biases], AFFINE_GROUP, codes * wide[0] + wide[1]


def depths(kind: str) -> list[int]:
    """Columns: blocks of 32, an odd number of them; for nvfp4 half a block more."""
    return {"nvfp4": [192, 80], "mxfp4": [192, 160], "mxfp8": [192, 160]}.get(kind, [192])


def rounded(x: np.ndarray) -> np.ndarray:
    """Each 32 values of a row as multiples of a 127th of the largest of them."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    return (np.rint(blocks / scales) * scales.astype(np.float64)).reshape(x.shape[0], -1)[:, : x.shape[1]]


def product_calls() -> tuple[list[Call], list[tuple[str, np.ndarray, np.ndarray]]]:
    """Every format unpacked and multiplied; with each call its name, the exact result, and how far off it may be."""
    calls, expected = [], []
    for number, kind in enumerate(KINDS):
        for depth in depths(kind):
            columns = 5
            buffers, group, numbers = weights(kind, columns, depth)
            integers = [number, columns, depth, group]
            calls.append(Call("unpack", integers, buffers, (columns, depth)))
            # A number times a scale has few bits, so only a bias makes it inexact.
            room = np.zeros_like(numbers) if kind in FORMATS else 1e-6 * (np.abs(numbers).max() + np.zeros_like(numbers))
            expected.append((f"unpack {kind} {depth}", numbers, room))
            for rows, bits in itertools.product(ROWS, (32, 8)):
                x = np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32)
                calls.append(Call("multiply_packed", [*integers, rows, bits], [*buffers, x], (rows, columns)))
                seen = rounded(x) if bits == 8 and kind != "mxfp8" else x.astype(np.float64)
                exact, terms = seen @ numbers.T, np.abs(seen) @ np.abs(numbers).T
                expected.append((f"multiply_packed {kind} {depth}, {rows} rows of {bits} bits", exact, 2e-6 * terms))
    return calls, expected


def wrong(found: Sequence[np.ndarray], expected: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> list[str]:
    """Names of the calls whose results are not the expected ones."""
    pairs = zip(found, expected, strict=True)
    return [name for result, (name, exact, room) in pairs if not (np.abs(result - exact) <= room).all()]


@pytest.mark.slow
def test_packed_products(tmp_path):
    calls, expected = product_calls()
    assert wrong(run(build(tmp_path), calls), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "broken"),
    [
        ("vshrq_n_u8(bytes, 4)", "vandq_u8(bytes, vdupq_n_u8(15))"),
        ("part & 1 ? vget_high_s16(wide[part / 2])", "part & 1 ? vget_low_s16(wide[part / 2])"),
        ("vmovl_s8(vget_high_s8(bytes))", "vmovl_s8(vget_low_s8(bytes))"),
    ],
    ids=["the low nibble twice", "the low half of a vector twice", "the low bytes twice"],
)
def test_a_fault_of_neon_is_found(tmp_path, right, broken):
    text = (shipped("kernels") / "marlin_gemm_floats.cpp").read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / "marlin_gemm_floats.cpp").write_text(text.replace(right, broken), encoding="utf-8")
    calls, expected = product_calls()
    found = wrong(run(build(tmp_path), calls), expected)
    assert {"unpack nvfp4 192", "unpack mxfp4 192", "unpack int4 192"} <= set(found)


def attention_calls() -> tuple[list[Call], list[tuple[str, np.ndarray, np.ndarray]]]:
    calls, expected = [], []
    heads, kv_heads, head_dim, total = 4, 2, 64, 70
    random = np.random.default_rng(3)
    for bits, rows in ((bits, rows) for bits in (32, 8, 4) for rows in (1, 6)):
        queries = (0.1 * random.standard_normal((heads, rows, head_dim))).astype(np.float32)
        dense = random.standard_normal((2, 1, kv_heads, total, head_dim)).astype(np.float32)
        pages = [mx.array(each) if bits == 32 else reference.pack_rows(mx.array(each), bits) for each in dense]
        buffers = [queries]
        for page in pages:
            buffers += [np.array(page)] if bits == 32 else [np.array(page.packed), np.array(page.scales)]
        exact = reference.paged_attention(mx.array(queries)[None], [pages[0]], [pages[1]], 1.0)
        calls.append(Call("attend", [heads, kv_heads, head_dim, rows, total, bits], buffers, (heads, rows, head_dim)))
        expected.append((f"attend {bits} bits, {rows} rows", np.array(exact[0]), np.full((), 3e-6)))
    return calls, expected


def dense_calls() -> tuple[list[Call], list[tuple[str, np.ndarray, np.ndarray]]]:
    calls, expected = [], []
    for rows, depth in ((rows, depth) for rows in (1, 2, 3, 4, 5) for depth in (7, 64, 83)):
        random = np.random.default_rng(depth)
        x, weight = (random.standard_normal((n, depth)).astype(np.float32) for n in (rows, 7))
        calls.append(Call("multiply_dense", [rows, 7, depth], [x, weight], (rows, 7)))
        exact = x.astype(np.float64) @ weight.T.astype(np.float64)
        expected.append((f"multiply_dense {rows} {depth}", exact, 2e-6 * (np.abs(x) @ np.abs(weight).T)))
    return calls, expected


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", COMPILERS)
def test_all_kernels_as_users_build_them(tmp_path, name, path):
    """With -O3; the portable path beside NEON, so that a difference between the two shows as a failure of one."""
    if shutil.which(COMPILERS[name][0]) is None:
        pytest.skip(f"no {COMPILERS[name][0]}")
    driver = build(tmp_path, compiler=COMPILERS[name], flags=["-O3", *PATHS[path]], kernels=True)
    calls, expected = [], []
    for more, results in (product_calls(), dense_calls(), attention_calls()):
        calls += more
        expected += results
    assert wrong(run(driver, calls, path), expected) == []
