"""The relatives' accuracy: targets stand beside the predictions they belong to, sizes are those of files, errors are paired."""

import dataclasses

import canine_cases
import mlx.core as mx
import numpy as np
import pytest
import relatives_models as models
import relatives_quality as quality
from mlx.utils import tree_flatten

from marlin_cli.corpus import Pair
from marlin_cli.models import ARCHITECTURES, architecture_of, linear_layers
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.gbst import GbstConfig
from marlin_cli.quantization.apply import plan_network, quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

LINES = ["Dvě slova a konec.", "Další řádek, delší než ten první, aby bylo co dělit.", "Třetí řádek"] * 4
DECODER = {"d_model": 32, "ffn_dim": 64, "heads": 2, "head_dim": 16}
CHARACTERS = {"hash_buckets": 256, "max_characters": 256}


def small(name):
    """The task with a network of few weights."""
    task = models.TASKS[name]() if name != "gbst" else None
    if name == "gbst":
        config = GbstConfig(**DECODER, encoder_layers=1, decoder_layers=1, block_sizes=(1, 2))
        return models.Task("", config, "byte", "exact", 1e-3, models.pairs_of_lines, models.restored, models.as_it_is)
    if name == "bygpt5":
        return dataclasses.replace(task, config=ByGPT5Config(**DECODER, layers=1))
    return dataclasses.replace(task, config=dataclasses.replace(task.config, layers=1, **CHARACTERS))


@pytest.mark.parametrize("name", models.TASKS)
def test_every_prediction_has_its_target(name):
    task = small(name)
    batch = task.batch(task.config, task.pieces(LINES)[:3])
    network = ARCHITECTURES[task.config.model_type].network(task.config)
    logits = architecture_of(network).logits(network, batch.inputs)
    assert len(batch.targets) == len(batch.owners) == logits.shape[0]
    assert (batch.targets[batch.owners >= 0] < logits.shape[1]).all()
    expected = batch.sizes + (name == "gbst")  # an answer's end is predicted too
    np.testing.assert_array_equal(np.bincount(batch.owners[batch.owners >= 0]), expected)


def test_bytes_are_predicted_by_those_before_them():
    data = models.byte_pieces(["x" * 200])[0]
    changed = b"abc" + data[3:]
    batch = models.continued(ByGPT5Config(**DECODER, layers=1), [changed])
    assert [value - 3 for value in batch.targets[:2]] == [*b"bc"]
    assert batch.owners[-1] == -1 and (batch.owners[:-1] == 0).all()


def test_words_begin_where_spaces_stood_and_lines_end_at_their_last_character():
    lines = ["ab c", "de f"] * 64
    text, marks = models.word_pieces(lines)[0]
    assert text.startswith("abcdef") and marks[:6] == [1, 0, 1, 1, 0, 1]
    text, marks = models.line_pieces(lines)[0]
    assert text.startswith("ab c de f ") and marks[:10] == [0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def test_no_line_is_trained_on_and_held_out(tmp_path):
    for folder, first in (("train", 0), ("heldout", 5)):
        (tmp_path / folder / "multilingual").mkdir(parents=True)
        name = "cs.txt" if folder == "train" else "docs_cs.txt"
        lines = [f"řádek {'abcdefghijklmnopqrst'[number]}\n" for number in range(first, first + 15)]
        (tmp_path / folder / "multilingual" / name).write_text("".join(lines), encoding="utf-8")
    for held_out in (tmp_path / "heldout", None):
        train, measured = models.split_texts(tmp_path / "train", held_out)
        assert measured["cs"] and not {*train["cs"]} & {*measured["cs"]}


def test_a_size_by_shapes_is_that_of_the_packed_arrays():
    network = canine_cases.random_la_canine(adapter_dim=32, d_model=64)
    settings = QuantizationSettings()
    packed = quantize_network(network, settings, method="rtn")
    arrays = {
        path: array.astype(mx.bfloat16) if array.dtype == mx.float32 and not path.endswith("global_scale") else array
        for path, array in tree_flatten(packed.network.parameters())
    }
    extra = sum(array.nbytes for path, array in arrays.items() if path.endswith("global_scale"))
    assert quality.size_of(network, settings).size_bytes == sum(array.nbytes for array in arrays.values()) - extra
    assert quality.size_of(network, None).bits == 16


@pytest.mark.parametrize("name", models.TASKS)
def test_layers_packed_alone_are_there_and_are_all_that_is_packed(name):
    task = small(name)
    network = ARCHITECTURES[task.config.model_type].network(task.config)
    found = []
    for pattern in quality.ALONE[name].values():
        found += [plan.path for plan in plan_network(network, quality._alone(pattern)) if plan.format is not None]
    assert sorted(found) == sorted(path for path in linear_layers(network) if path != "output")


def test_a_difference_is_of_ratios_and_its_error_is_that_of_paired_texts():
    old = np.array([1.0, 4.0, 10.0]), np.array([1.0, 2.0, 5.0])
    value, error = quality.difference((old[0] + 0.5 * old[1], old[1]), old)
    assert (value, error) == pytest.approx((0.5, 0.0))
    value, error = quality.difference((np.array([2.0, 4.0]), np.ones(2)), (np.array([1.0, 1.0]), np.ones(2)))
    assert (value, error) == pytest.approx((2.0, 1.0))  # 1 and 3: a mean of 2, a standard error of 1


def test_scores_tell_bits_quality_and_likeness():
    task = small("canine")
    pieces = models.word_pieces(LINES)[:2]
    targets = task.batch(task.config, pieces).targets
    sure = np.log(np.where(targets[:, None] == np.arange(2), 0.75, 0.25))
    even = np.log(np.stack([np.full(len(targets), 0.9), np.full(len(targets), 0.1)], axis=1))
    scores = quality.scores_of(task, pieces, quality.Predicted([sure], []), quality.Predicted([even], []))
    value = {key: a.sum() / b.sum() for key, (a, b) in scores.items()}
    assert value["bits"] == pytest.approx(np.log2(4 / 3)) and value["quality"] == 1
    words = sum(sum(marks) for _, marks in pieces) / 256
    assert value["equal"] == pytest.approx(1 - words)
    apart = 0.9 * np.log2(0.9 / np.array([0.75, 0.25])) + 0.1 * np.log2(0.1 / np.array([0.25, 0.75]))
    assert value["divergence"] == pytest.approx(apart @ [1 - words, words])


def test_sentences_are_alike_where_both_ends_are():
    task = small("la_canine")
    pieces = models.line_pieces(LINES)[:1]
    logs = [np.log(np.full((128, 2), 0.5))]
    found, plain = quality.Predicted(logs, [{4, 6, 9}]), quality.Predicted(logs, [{4, 9}])
    equal, count = quality.scores_of(task, pieces, found, plain)["equal"]
    assert (equal.tolist(), count.tolist()) == ([1.0], [2.0])  # [0, 4] is there, [4, 9] is not


def test_answers_are_right_or_not_and_like_the_plain_ones_or_not():
    task = small("gbst")
    pairs = [Pair(b"ab", b"Ab"), Pair(b"cd", b"Cd")]
    rows = len(task.batch(task.config, pairs).targets)
    logs = [np.log(np.full((rows, 384), 1 / 384))]
    found, plain = quality.Predicted(logs, [b"Ab", b"cd"]), quality.Predicted(logs, [b"ab", b"cd"])
    scores = quality.scores_of(task, pairs, found, plain)
    assert scores["quality"][0].tolist() == [1, 0] and scores["equal"][0].tolist() == [0, 1]
