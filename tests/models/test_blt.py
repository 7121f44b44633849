"""Byte Latent Transformers: hashes, patches by rule, attention within patches, and what a prediction does not see."""

import mlx.core as mx
import numpy as np
import pytest
from blt_cases import random_blt

from marlin_cli.errors import ConfigError, QuantizationError
from marlin_cli.models import architecture_of, preset
from marlin_cli.models.blt_config import BltConfig, StackConfig
from marlin_cli.models.blt_hashes import PRIMES, hash_rows
from marlin_cli.models.layers import linear_layers, part_of
from marlin_cli.models.unequal_patches import ends_of_patches, patches_of, pooled_attention, running_maximum, summed
from marlin_cli.quantization.plan import QuantizationSettings


def test_hashes_are_sums_that_wrap():
    ids = [[1, 259, 4, 200, 77, 33, 2, 90, 120, 5]]
    found = hash_rows(mx.array(ids), None, (3, 8), 2, 500002)
    assert found.shape == (1, 10, 4)
    for table, (prime, length) in enumerate([(prime, length) for prime in PRIMES[:2] for length in (3, 8)]):
        for row in range(10):
            group = [0] * max(0, length - row - 1) + ids[0][max(0, row - length + 1) : row + 1]
            total = sum(value * pow(prime, power) for power, value in enumerate(group)) % (1 << 64)
            signed = total - (1 << 64) if total >> 63 else total
            assert found[0, row, table].item() == signed % 500002 + table * 500002


def test_hashes_go_on_from_the_ids_before():
    ids = mx.random.randint(0, 260, (2, 20))
    whole = hash_rows(ids, None, (3, 5), 1, 97)
    for cut in (1, 2, 7):
        kept = ids[:, max(0, cut - 4) : cut]
        assert mx.array_equal(hash_rows(ids[:, cut:], kept, (3, 5), 1, 97), whole[:, cut:])


def test_where_patches_end():
    entropies = np.array([[9.0, 0.0, 9.0, 0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    none = np.zeros(2, np.int64)
    assert np.flatnonzero(ends_of_patches(entropies, 1.0, None, none, True)[0]).tolist() == [0, 2, 6]
    assert ends_of_patches(entropies, 1.0, None, none, True)[1].tolist() == [True] + [False] * 6
    assert not ends_of_patches(entropies, 1.0, None, none, False)[1].any()
    # Equal to the threshold is not above it.
    assert not ends_of_patches(entropies, 9.0, None, none, False).any()
    assert np.flatnonzero(ends_of_patches(entropies, 1.0, 2, none, True)[0]).tolist() == [0, 2, 4, 6]
    assert np.flatnonzero(ends_of_patches(entropies, 1.0, 3, np.array([2, 0]), False)[1]).tolist() == [2, 5]


def ragged():
    ends = np.zeros((2, 9), np.bool_)
    ends[0, [0, 4, 5, 8]] = True
    ends[1, [0, 6]] = True
    return ends, patches_of(ends)


def test_patches_of_unequal_numbers():
    _, patches = ragged()
    assert patches.own.tolist() == [[0, 1, 1, 1, 1, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 2, 2]]
    assert patches.last.tolist() == [[0, 4, 5, 8], [0, 6, 0, 0]] and (patches.count, patches.longest) == (4, 6)
    assert patches_of(np.zeros((1, 3), np.bool_)).count == 0


def test_values_of_patches_are_those_of_their_bytes():
    _, patches = ragged()
    mx.random.seed(0)
    x = mx.random.normal((2, 9, 5))
    largest, sums = np.array(running_maximum(x, patches)), np.array(summed(x, patches))
    for text, patch, bytes_of in ((0, 1, slice(1, 5)), (0, 3, slice(6, 9)), (1, 1, slice(1, 7)), (1, 0, slice(0, 1))):
        rows = np.array(x[text, bytes_of])
        assert np.allclose(largest[text, bytes_of.stop - 1], rows.max(axis=0))
        assert np.allclose(sums[text, patch], rows.sum(axis=0), atol=1e-6)


def test_a_patch_reads_its_own_bytes():
    _, patches = ragged()
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal(shape) for shape in ((2, 4, 2, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8)))
    found = pooled_attention(queries * 20, keys, values, patches, 0.5)  # scores that a plain exponential would not hold
    assert mx.isfinite(found).all()
    for text, patch, bytes_of in ((0, 1, slice(1, 5)), (0, 2, slice(5, 6)), (1, 1, slice(1, 7))):
        for head in range(3):
            scores = 0.5 * (queries[text, patch, :, head] * 20) @ keys[text, bytes_of, head].T
            wanted = mx.softmax(scores, axis=-1) @ values[text, bytes_of, head]
            assert mx.allclose(found[text, patch, :, head], wanted, atol=1e-5)


def test_a_prediction_does_not_see_what_follows():
    network = random_blt()
    data = mx.random.randint(0, 256, (1, 60))
    changed = mx.concatenate([data[:, :30], data[:, 30:] * 0], axis=1)
    same = mx.abs(network.predictions(data) - network.predictions(changed)).max(axis=-1)[0]
    assert mx.abs(same[:31]).max().item() < 1e-5 < same[31:].max().item()


def test_gradients_reach_what_makes_patches():
    network = random_blt()
    windows = mx.random.randint(0, 256, (2, 40))

    def loss(parameters):
        network.update(parameters)
        return mx.square(network.predictions(windows)).mean()

    gradients = mx.grad(loss)(network.trainable_parameters())
    assert mx.abs(gradients["byte_encoder"]["reader"]["q_proj"]["weight"]).max().item() > 0
    assert mx.abs(gradients["byte_encoder"]["patch_proj"]["weight"]).max().item() > 0
    assert mx.abs(gradients["patcher"]["output"]["weight"]).max().item() == 0


def test_parts_and_formats():
    settings, layers = QuantizationSettings(), linear_layers(random_blt())
    assert {part_of(path) for path in layers} == {"patcher", "encoder", "global", "decoder", "head"}
    formats = {path: settings.format_for(path) for path in layers}
    assert formats["patcher.layers.0.ffn.up_proj"] == formats["byte_decoder.layers.0.ffn.up_proj"] == "mxfp8"
    assert formats["byte_encoder.layers.0.attention.q_proj"] == "mxfp8" and formats["patches.layers.0.ffn.up_proj"] == "nvfp4"
    assert formats["byte_decoder.readers.1.q_proj"] == formats["byte_encoder.reader.k_proj"] == "16bit"
    assert formats["byte_encoder.patch_proj"] == formats["byte_decoder.patch_proj"] == "16bit"
    assert formats["byte_decoder.readers.1.v_proj"] == "mxfp8"
    given = QuantizationSettings(decoder_format="nvfp4", patcher_format="16bit")
    assert given.format_for("byte_decoder.layers.0.ffn.up_proj") == "nvfp4"
    assert given.format_for("patcher.layers.0.ffn.up_proj") == "16bit"
    assert given.formats_of(layers) == {
        "patcher": "16bit", "global": "nvfp4", "encoder": "mxfp8", "decoder": "nvfp4"
    }  # fmt: skip


def test_it_cannot_be_turned():
    network = random_blt()
    with pytest.raises(QuantizationError, match="a Byte Latent Transformer cannot be rotated: a patch takes the largest"):
        architecture_of(network).rotation(network.config)


def test_the_preset_is_the_default():
    assert preset("blt-1b") == BltConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 259}, "vocab_size must be at least 260"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"local_window": 1}, "local_window must be at least 2"),
        ({"hash_lengths": (3, 0)}, "hash_lengths must be 1 to 64"),
        ({"hash_lengths": tuple(range(1, 60)), "hash_functions": 11, "hash_buckets": 1 << 20}, "hash tables would have"),
        ({"end_ids": ()}, "end_ids must be ids below 260"),
        ({"decoder": StackConfig(64, 64, 2, 1)}, "the decoder goes on from the encoder's rows"),
        ({"max_patch_bytes": 0}, "max_patch_bytes must be at least 1"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ConfigError, match=message):
        BltConfig(**changes)


def test_heads_of_an_odd_width():
    with pytest.raises(ConfigError, match="d_model 30 is not made of 2 heads of an even width"):
        StackConfig(30, 64, 2, 1)
