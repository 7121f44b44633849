"""Sums of one window against plain numpy over activations that are captured in another way."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.errors import StatisticsError
from marlin_cli.models import linear_layers, shared_inputs
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops import Linear
from marlin_cli.statistics.collect import measure
from marlin_cli.statistics.data import Moments

WINDOW = np.random.default_rng(3).integers(0, 256, 40, dtype=np.uint8)


def captured(network: MegaByte, window: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """(input, output) of every linear layer in a plain forward pass, by patching the class."""
    names = {id(module): path for path, module in linear_layers(network).items()}
    seen: dict[str, tuple] = {}
    original = Linear.__call__

    def spy(self: Linear, x: mx.array) -> mx.array:
        out = original(self, x)
        seen[names[id(self)]] = np.array(x).astype(np.float64), np.array(out).astype(np.float64)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__call__", spy)
        mx.eval(network(mx.array(window.astype(np.int32))[None]))
    return seen


def check(found: Moments, rows: np.ndarray) -> None:
    """`rows` [n, groups, channels] are what was measured."""
    np.testing.assert_array_equal(found.count, np.full((1, rows.shape[1]), rows.shape[0]))
    np.testing.assert_allclose(found.sum_squares[0], np.square(rows).sum(axis=0), rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(found.absolute_maximum[0], np.abs(rows).max(axis=0), rtol=1e-6)


def test_inputs_of_every_layer(each_network: MegaByte, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = captured(each_network, WINDOW, monkeypatch)
    sources = shared_inputs(each_network)
    totals = measure(each_network, "code", WINDOW)
    assert sources.keys() == linear_layers(each_network).keys() == seen.keys()
    assert totals.inputs.keys() == set(sources.values())
    assert totals.domains == {"code": 40}
    paper = each_network.config.layout == "paper"
    for path, source in sources.items():
        x = seen[path][0]
        by_row = path.startswith(("local", "middle", "output")) or (paper and path == "global_to_local")
        if path.startswith("middle") and x.ndim == 2:  # what leads to the next stage comes as a list of rows
            x = x.reshape(-1, each_network.config.middle[0].length, x.shape[-1])
        check(totals.inputs[source], x if by_row else x.reshape(-1, 1, x.shape[-1]))


def test_rows_of_each_layout(each_network: MegaByte) -> None:
    config = each_network.config
    inputs = measure(each_network, "code", WINDOW).inputs
    length = config.stages[-1].length
    rows = length + 1 if config.layout == "megabyte_pytorch" else length
    for path in ("local.layers.0.attention.q_proj", "local.layers.1.ffn.down_proj", "output"):
        assert inputs[path].count.tolist() == [[40 // length] * rows], path
    assert inputs["global.layers.1.attention.o_proj"].count.tolist() == [[40 // config.patch_size]]


def test_keys_are_measured_as_cached(network: MegaByte, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated by hand, in the two-halves form; values as projected; the local stage has no rotation."""
    totals = measure(network, "code", WINDOW)
    seen = captured(network, WINDOW, monkeypatch)
    for path, heads, rotates in (("global.layers.1", 2, True), ("local.layers.0", 2, False)):
        keys = seen[f"{path}.attention.k_proj"][1]
        keys = keys.reshape(*keys.shape[:2], heads, -1)
        if rotates:
            half = keys.shape[-1] // 2
            angle = np.arange(keys.shape[1])[:, None, None] * 10000.0 ** (-np.arange(half) / half)
            first, second = keys[..., :half], keys[..., half:]
            keys = np.concatenate(
                [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)],
                axis=-1,
            )
        values = seen[f"{path}.attention.v_proj"][1]
        check(totals.keys[f"{path}.attention"], keys.reshape(-1, *keys.shape[2:]))
        check(totals.values[f"{path}.attention"], values.reshape(-1, heads, keys.shape[-1]))


def test_every_attention_is_measured(each_network: MegaByte) -> None:
    config = each_network.config
    totals = measure(each_network, "code", WINDOW)
    stages = ["global", "local", *(["middle.0"] if config.middle else [])]
    assert totals.keys.keys() == {f"{stage}.layers.{index}.attention" for stage in stages for index in range(2)}
    assert totals.values.keys() == totals.keys.keys()
    assert totals.keys["global.layers.0.attention"].sum_squares.shape == (1, config.global_kv_heads or 2, 16)


def test_filler_is_not_measured(network: MegaByte) -> None:
    whole, cut = measure(network, "code", WINDOW[:36]), measure(network, "code", WINDOW[:39])
    assert cut.domains == {"code": 36}
    for path, moments in whole.inputs.items():
        np.testing.assert_array_equal(cut.inputs[path].sum_squares, moments.sum_squares)


def test_one_patch_reaches_no_patch_projection(network: MegaByte) -> None:
    totals = measure(network, "code", WINDOW[:4])
    assert totals.inputs["patch_projection"].count.tolist() == [[0]]
    assert totals.inputs["patch_projection"].sum_squares.shape == (1, 1, 32)
    assert totals.inputs["global.layers.0.attention.q_proj"].count.tolist() == [[1]]


def test_less_than_a_patch_is_refused(network: MegaByte) -> None:
    with pytest.raises(StatisticsError, match="3 bytes holds no whole patch of 4"):
        measure(network, "code", WINDOW[:3])


def test_the_network_is_as_before(each_network: MegaByte) -> None:
    before = {path: id(module) for path, module in each_network.named_modules()}
    logits = each_network(mx.array(WINDOW.astype(np.int32))[None])
    measure(each_network, "code", WINDOW)
    assert {path: id(module) for path, module in each_network.named_modules()} == before
    assert mx.array_equal(each_network(mx.array(WINDOW.astype(np.int32))[None]), logits)


def test_damaged_weights_are_named_and_the_network_is_restored(network: MegaByte) -> None:
    layer = network["global"].layers[1].ffn.up_proj
    layer.weight = layer.weight * float("nan")
    before = {path: id(module) for path, module in network.named_modules()}
    with pytest.raises(StatisticsError, match=r"'global\.layers\.1\.ffn\.down_proj' are not finite"):
        measure(network, "code", WINDOW)
    assert {path: id(module) for path, module in network.named_modules()} == before
