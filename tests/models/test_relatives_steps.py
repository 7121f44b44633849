"""Pieces that a batch passes one after the other are the network; every layer that can be packed is seen once."""

import mlx.core as mx
import numpy as np
import pytest
from byt5_cases import examples
from canine_cases import batch, random_canine, random_la_canine
from decoder_cases import random_bygpt5, random_gbst

from marlin_cli.errors import QuantizationError
from marlin_cli.models import linear_layers
from marlin_cli.models.bygpt5_steps import BYGPT5
from marlin_cli.models.canine_steps import CANINE, LA_CANINE, TextBatch
from marlin_cli.models.gbst_steps import GBST
from marlin_cli.models.layers import inputs_by_layer, part_of
from marlin_cli.quantization.pair_batches import batch_of

WINDOWS = np.random.default_rng(0).integers(0, 256, (3, 40), dtype=np.uint8)


def through(architecture, network, given):
    state = architecture.start(network, given)
    for piece in architecture.pieces(network):
        state = piece.run(network, state)
    return state["rows"]


def texts(lengths, total, filler=0):
    ids = mx.array(batch(lengths, total, filler)[0])
    return TextBatch(ids, None if set(lengths) == {total} else mx.array(lengths), None, 1)


@pytest.mark.parametrize("starts_all", [False, True])
def test_a_bygpt5(starts_all):
    network = random_bygpt5(starts_all=starts_all)
    found = network.head(network.decoder.norm(through(BYGPT5, network, WINDOWS)))
    assert mx.array_equal(found.reshape(-1, 384), BYGPT5.logits(network, WINDOWS))


def test_a_gbst_with_filler():
    network = random_gbst()
    given = batch_of(examples(1, 5), network.config)
    assert given.lengths is not None
    hidden = network.decoder.norm(through(GBST, network, given)).reshape(-1, 32)[mx.array(given.places)]
    assert mx.allclose(network.head(hidden), GBST.logits(network, given), atol=1e-5)


@pytest.mark.parametrize(("lengths", "total"), [((12,), 12), ((5, 12, 1), 12), ((130, 140), 140)])
def test_a_canine(lengths, total):
    network = random_canine(head="token", labels=("a", "b"))
    given = texts(lengths, total)
    rows = through(CANINE, network, given)
    expected = network.states(network.deep(given.ids, given.lengths), given.lengths)
    assert mx.array_equal(rows, expected)
    scores = CANINE.logits(network, given)
    assert scores.shape == (sum(lengths), 2) and mx.allclose(scores[-1], network.output(rows[-1, lengths[-1] - 1]), atol=1e-5)


@pytest.mark.parametrize(("lengths", "total"), [((12,), 12), ((5, 12, 1), 12), ((130, 140), 140)])
def test_an_la_canine(lengths, total):
    network = random_la_canine(adapter_dim=16, language="cs")
    given = texts(lengths, total, -1)
    assert mx.array_equal(through(LA_CANINE, network, given), network.encode(given.ids, given.lengths))


@pytest.mark.parametrize(
    ("architecture", "make", "changes"),
    [
        (BYGPT5, random_bygpt5, {}),
        (BYGPT5, random_bygpt5, {"gated_ffn": False}),
        (GBST, random_gbst, {}),
        (CANINE, random_canine, {"head": "token", "labels": ("a", "b")}),
        (LA_CANINE, random_la_canine, {}),
        (LA_CANINE, random_la_canine, {"adapter_dim": 16}),
    ],
)
def test_every_layer_that_can_be_packed_is_seen_once(architecture, make, changes):
    network = make(**changes)
    sources = [source for piece in architecture.pieces(network) for source in piece.sources]
    inputs = {path: each for path, each in inputs_by_layer(network, architecture.input_of).items() if part_of(path) != "head"}
    assert sorted(sources) == sorted(set(inputs.values())) and set(inputs) == set(linear_layers(network)) - {"output"}


def test_the_real_rows_are_those_that_the_layers_see():
    """Whatever a piece's layers read has as many rows as `real` says."""
    network = random_canine()
    state = CANINE.start(network, texts((5, 14, 1), 15))
    for piece in CANINE.pieces(network):
        assert state["real"].shape == state["rows"].shape[:2]
        state = piece.run(network, state)


def test_caches_show_what_they_would_hold():
    network, seen = random_bygpt5(), {}
    BYGPT5.pass_through(network, WINDOWS[0], lambda path, keys, values: seen.update({path: keys.shape}))
    assert seen == dict.fromkeys(BYGPT5.packed_keys(network.config).paths, (1, 2, 40, 16))
    CANINE.pass_through(random_canine(), "Kůň".encode(), seen.update)
    LA_CANINE.pass_through(random_la_canine(), b"abcde", seen.update)


@pytest.mark.parametrize("architecture", [CANINE, GBST])
def test_what_cannot_be_rotated_says_so(architecture):
    network = random_canine() if architecture is CANINE else random_gbst()
    with pytest.raises(QuantizationError, match="cannot be rotated"):
        architecture.rotation(network.config)


def test_a_body_alone_predicts_nothing():
    with pytest.raises(QuantizationError, match="has no head"):
        CANINE.logits(random_canine(), texts((12,), 12))
