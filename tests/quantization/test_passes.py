"""Pieces that a batch passes one after the other are the network, in every architecture; filler is told from what is real."""

import byt5_cases
import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.corpus import Example
from marlin_cli.errors import QuantizationError
from marlin_cli.models import ARCHITECTURES, Capability, architecture_of, linear_layers, matrices_of, part_of, shared_inputs
from marlin_cli.quantization.feeds import FEEDS
from marlin_cli.quantization.pair_batches import BATCH_IDS, batch_of, pair_batches, pair_batches_by_domain

KINDS = {**byt5_cases.KINDS, "encoder alone": {"decoder_layers": 0}}


def through(network, batch):
    """The state behind the last piece."""
    passes = architecture_of(network)
    state = passes.start(network, batch)
    for piece in passes.pieces(network):
        state = piece.run(network, state)
    return state


def test_the_pieces_of_a_megabyte_are_the_network(each_network):
    windows = np.random.default_rng(0).integers(0, 256, (3, 48), dtype=np.uint8)
    stage = each_network.stages[-1].stack
    rows = through(each_network, windows)["rows"]
    found = each_network.in_order(each_network.head(stage.norm(rows) if "norm" in stage else rows), 3, 48)
    expected = architecture_of(each_network).logits(each_network, windows)
    assert mx.array_equal(found.reshape(expected.shape), expected).item()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_the_pieces_of_a_byt5_are_the_network(changes):
    network = byt5_cases.random_byt5(**changes)
    for _, batch in byt5_cases.batches(1, network):
        rows = through(network, batch)["rows"]
        if not network.config.decoder_layers:
            assert mx.array_equal(network.encoder.norm(rows), network.encode(batch.source, batch.lengths)).item()
            continue
        hidden = network.decoder.norm(rows).reshape(-1, network.config.d_model)[mx.array(batch.places)]
        assert mx.array_equal(network.head(hidden), architecture_of(network).logits(network, batch)).item()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_every_layer_that_can_be_packed_is_seen_once(changes):
    network = byt5_cases.random_byt5(**changes)
    sources = [source for piece in architecture_of(network).pieces(network) for source in piece.sources]
    inputs = {path: source for path, source in shared_inputs(network).items() if part_of(path) != "head"}
    assert sorted(sources) == sorted(set(inputs.values())) and set(inputs) == set(linear_layers(network)) - {"output"}


def test_predictions_are_those_of_each_pair_by_itself():
    network = byt5_cases.random_byt5()
    some = byt5_cases.examples(3, 5)
    alone = [architecture_of(network).logits(network, batch_of([each], network.config)) for each in some]
    batch = batch_of(some, network.config)
    assert batch.lengths is not None and [len(each) for each in alone] == batch.rows.tolist()
    together = architecture_of(network).logits(network, batch)
    np.testing.assert_allclose(np.array(together), np.concatenate([np.array(each) for each in alone]), rtol=1e-3, atol=1e-4)


def test_an_encoder_alone_predicts_nothing():
    network = byt5_cases.random_byt5(decoder_layers=0)
    with pytest.raises(QuantizationError, match="encoder alone"):
        architecture_of(network).logits(network, byt5_cases.batches(1, network)[0][1])


def test_batches_hold_every_pair_once_and_no_more_ids_than_they_may():
    config = byt5_cases.random_byt5().config
    long = Example("text", b"s" * BATCH_IDS, b"", 9, BATCH_IDS)
    some = [*byt5_cases.examples(1, 300), long]
    found = list(pair_batches(some, config))
    assert len(found) > 2 and sum(len(batch.rows) for batch in found) == len(some)
    assert sum(batch.size_bytes for batch in found) == sum(each.size_bytes for each in some)
    sizes = [batch.source.size + batch.target.size for batch in found]
    assert sizes[-1] == BATCH_IDS + 2 and all(size <= BATCH_IDS for size in sizes[:-1])
    domains = [domain for domain, _ in pair_batches_by_domain(some, config)]
    assert domains == sorted(domains) and set(domains) == {"code", "text"}


def test_every_architecture_says_what_it_is():
    for name, architecture in ARCHITECTURES.items():
        assert architecture.config().model_type == architecture.name == name
        assert architecture.capability in FEEDS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parts_of_an_architecture_are_those_of_its_layers(name):
    architecture = ARCHITECTURES[name]
    both = {"encoder_layers": 1, "decoder_layers": 1}
    sizes = {Capability.CONTINUES: {}, Capability.ANSWERS: both, Capability.ENCODES: {"layers": 1}}
    network = architecture.network(architecture.config(**sizes[architecture.capability]))
    found = {part_of(path) for path in matrices_of(network)} - {"head"}
    assert found <= architecture.parts and architecture.parts - found <= {"middle"}
