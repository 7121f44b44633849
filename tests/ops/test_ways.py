"""Tables of ways of multiplying: what lines say, what is refused, and every way of this processor against the exact product."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.documents import read_json
from marlin_cli.errors import ConfigError
from marlin_cli.files import shipped
from marlin_cli.ops import cpu, ways
from marlin_cli.quantization.encoders import decode, encode
from marlin_cli.quantization.formats import FORMATS

MODULE = cpu.kernels()[0]
needs_kernels = pytest.mark.skipif(MODULE is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
HERE = {"fixed", "registers", "panels"}


@pytest.fixture(autouse=True)
def shipped_ways():
    yield
    if MODULE is not None:
        ways.use_ways(MODULE)


def test_a_line_is_read_and_written():
    best = {1: "fixed", 2: "registers", 4: "registers", 8: "panels", 16: "panels"}
    assert ways.line_of(best) == "1 fixed, 4 registers, panels"
    assert ways.parse("1 fixed, 4 registers, panels", HERE, "t") == [(1, "fixed"), (4, "registers"), (ways.ANY, "panels")]
    assert ways.line_of({1: "fixed"}) == "fixed"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1 fixed, 4 registers", "does not end with a way for all rows"),
        ("", "is no number of rows and a way"),
        (7, "does not end with a way"),
        ("1 fixed, tiles", "'tiles' is no number of rows and a way; ways here: fixed, panels, registers"),
        ("x fixed, panels", "'x fixed' is no number of rows"),
        ("1 2 fixed, panels", "'1 2 fixed' is no number of rows"),
    ],
)
def test_a_line_that_says_something_else_is_refused(line, problem):
    with pytest.raises(ConfigError, match=problem):
        ways.parse(line, HERE, "table")


def test_every_shipped_table_has_every_line():
    tables = read_json(shipped("kernels") / "ways.json")
    assert set(tables) == {"amx", "avx512_vnni", "avx512", "avx2", "neon", "portable"}
    for table in tables.values():
        assert set(table) == set(ways.keys())


@needs_kernels
def test_a_table_of_this_machine_goes_before_the_shipped_one(tmp_path, monkeypatch, capsys):
    file = tmp_path / "ways.json"
    monkeypatch.setattr(ways, "measured_file", lambda module: file)
    assert ways.use_ways(MODULE) == f"ways of {MODULE.processor_class()}"
    file.write_text('{"int8 16 small": "registers"}', encoding="utf-8")
    file.chmod(0o600)
    assert ways.use_ways(MODULE) == "ways measured here"
    assert MODULE.chosen_way(MODULE.Kind.int8, 64, 64, 64, 1, 16) == "registers"
    file.write_text('{"int8 16 small": "no such way"}', encoding="utf-8")
    assert ways.use_ways(MODULE) == f"ways of {MODULE.processor_class()}"
    assert "'no such way' is no number of rows and a way" in capsys.readouterr().err


@needs_kernels
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_every_way_gives_the_product(name, activation_bits):
    """Parts of a line, of a panel, of the rows taken together; few rows and many by each way."""
    columns, depth = 37, 448
    kind = getattr(MODULE.Kind, name)
    packed = encode(mx.array(np.random.default_rng(1).standard_normal((columns, depth)).astype(np.float32)), FORMATS[name])
    floats = packed.biases is not None
    scales = packed.scales.astype(mx.float32) if floats else packed.scales
    biases = packed.biases.astype(mx.float32) if packed.biases is not None else None
    weight = np.array(decode(packed), dtype=np.float64) / (packed.global_scale or 1.0)
    for way in MODULE.way_names(kind, activation_bits):
        MODULE.set_ways(kind, activation_bits, False, [(ways.ANY, way)])
        assert MODULE.chosen_way(kind, columns, depth, packed.group_size, 5, activation_bits) == way
        for rows in (1, 2, 3, 4, 5, 7, 9, 17, 40):
            x = np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32)
            found = MODULE.marlin_gemm(mx.array(x), packed.weight, scales, biases, kind, packed.group_size, activation_bits)
            terms = np.abs(x).astype(np.float64) @ np.abs(weight).T
            room = 2e-6 if activation_bits == 16 or name == "mxfp8" else 2e-2
            assert (np.abs(np.array(found) - x.astype(np.float64) @ weight.T) <= room * terms).all(), (way, rows)
