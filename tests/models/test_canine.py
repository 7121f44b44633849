"""CANINE: the numbers of transformers 4.57.6, and what its parts promise."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import SHAPE, TINY, batch, cases, random_canine, write_folder

from marlin_cli.checkpoints import canine
from marlin_cli.config import from_mapping
from marlin_cli.errors import ConfigError
from marlin_cli.models import fill
from marlin_cli.models.canine import Canine, CanineConfig, attention_in_blocks
from marlin_cli.models.canine_ids import settled_length
from marlin_cli.tensor_files import read_safetensors

GOLDEN = Path(__file__).parents[1] / "data" / "canine_golden.safetensors"
KINDS = ("TokenClassification", "SequenceClassification", "QuestionAnswering", "MultipleChoice")
EVERY = 41
TOLERANCE = 1e-4


def rows(states):
    return np.concatenate([states[:, ::EVERY], states[:, -1:]], axis=1)


def network_of(folder):
    checkpoint = canine.read(folder)
    network = Canine(from_mapping(CanineConfig, checkpoint.config, "here"))
    fill(network, checkpoint.weights, where="here", dtype=mx.float32)
    return network


@pytest.fixture(scope="module")
def golden():
    return read_safetensors(GOLDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_transformers(kind, golden, tmp_path):
    expected, metadata = golden
    labels = {str(index): f"L{index}" for index in range(3)}
    config = {**TINY, "model_type": "canine", "architectures": [f"CanineFor{kind}"], "id2label": labels}
    network = network_of(write_folder(tmp_path / "model", config, json.loads(metadata["shapes"])[kind]))
    for lengths, total in cases():
        ids, _ = batch(lengths, total)
        types = np.zeros_like(ids)
        types[:, total // 2 :] = 1
        given = mx.array(ids), None if set(lengths) == {total} else mx.array(lengths), mx.array(types)
        key = f"{kind}.{total}.{'.'.join(map(str, lengths))}"
        found = {"logits": np.array(network(*given))}
        if kind == "MultipleChoice":
            found["logits"] = found["logits"][:, 0]
        if kind == "TokenClassification":
            deep = network.deep(*given)
            found |= {"states": np.array(network.states(deep, given[1])), "pooled": np.array(network.pooled(deep))}
        for name, array in found.items():
            mine = rows(array) if array.ndim == 3 else array
            theirs = np.array(expected[f"{key}.{name}"])
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).max() < TOLERANCE, (key, name)


def test_blocks_see_themselves_alone():
    """Against each block by itself: lengths that end within a block, with it, and before it begins."""
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.standard_normal((3, 2, 11, 8), dtype=np.float32)) for _ in range(3))
    lengths = (11, 4, 6)
    found = attention_in_blocks(q, k, v, 4, mx.array(lengths))
    assert mx.allclose(attention_in_blocks(q, k, v, 4, None)[0], found[0], atol=1e-6)
    for row, length in enumerate(lengths):
        for start in range(0, 11, 4):
            block = slice(start, min(start + 4, 11))
            scores = q[row, :, block] @ k[row, :, block].swapaxes(-1, -2)
            seen = mx.arange(block.start, block.stop) < length
            weights = mx.softmax(mx.where(seen, scores, -3e38), axis=-1)
            assert mx.allclose(weights @ v[row, :, block], found[row, :, block], atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 8, 30])
def test_padding_changes_nothing_from_the_settled_length_on(length):
    network = random_canine()
    ids, _ = batch((length,), length)
    found = []
    for total in (settled_length(length), settled_length(length) + 1, settled_length(length) + 7):
        padded = mx.array(np.pad(ids, ((0, 0), (0, total - length))))
        lengths = mx.array([length])
        found.append(network.states(network.deep(padded, lengths), lengths)[:, :length])
    assert all(mx.allclose(found[0], other, atol=2e-5) for other in found[1:])


def test_padding_below_it_does():
    network = random_canine()
    ids, _ = batch((10,), 10)
    alone = network.states(network.deep(mx.array(ids)))
    lengths = mx.array([10])
    padded = mx.array(np.pad(ids, ((0, 0), (0, 2))))
    assert not mx.allclose(alone, network.states(network.deep(padded, lengths), lengths)[:, :10], atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"hash_functions": 3}, "multiple of hash_functions"),
        ({"hash_functions": 32}, "more than the 16"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"d_model": 1 << 20}, "more than the 32,768"),
        ({"norm_eps": -1.0}, "norm_eps must be at least"),
        ({"norm_eps": 0.0}, "norm_eps must be at least"),
        ({"second_type": 16}, "second_type"),
        ({"head": "token"}, "labels go with"),
        ({"labels": ("a",)}, "labels go with"),
        ({"head": "choice", "pooler": False}, "needs the pooler"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        CanineConfig(**SHAPE | changes)
