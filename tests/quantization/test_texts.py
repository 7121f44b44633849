"""Networks that encode, packed by every method that packs: what is folded leaves them as they were, and texts are a feed."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine, random_la_canine
from mlx.utils import tree_flatten

from marlin_cli.corpus import Text
from marlin_cli.errors import QuantizationError
from marlin_cli.models import architecture_of, linear_layers, part_of, shared_inputs, with_weights
from marlin_cli.models.canine_ids import settled_length
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.automatic import choose, measure_choices
from marlin_cli.quantization.distill import distill, settings_for
from marlin_cli.quantization.feeds import feed_of, size_bytes
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.methods.awq import fold, legal_folds
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.quantization.text_batches import TEXTS_PER_BATCH, text_batches, text_batches_by_domain
from marlin_cli.statistics.collect import hessian_channels, measure_text
from marlin_cli.statistics.data import Run, Statistics, pool
from marlin_cli.statistics.hessians import HessianAccumulator

KINDS = {
    "no head": lambda: random_canine(layers=1),
    "characters": lambda: random_canine(layers=1, head="token", labels=("O", "A", "B")),
    "texts": lambda: random_canine(layers=1, head="sequence", labels=("x", "y", "z")),
    "sentences": lambda: random_la_canine(layers=1, adapter_dim=32, language="cs"),
}
FOUR = QuantizationSettings("nvfp4", "nvfp4")


def texts(seed, count=10):
    """Texts of unequal lengths in two domains and scripts."""
    rng = np.random.default_rng(seed)
    letters = {"latin": np.arange(97, 123), "greek": np.arange(0x3B1, 0x3CA)}
    return [
        Text(domain, "".join(map(chr, rng.choice(letters[domain], rng.integers(20, 90)))).encode(), index)
        for index, domain in enumerate(["latin", "greek"] * (count // 2))
    ]


def statistics_of(network, tmp_path):
    sums = HessianAccumulator(hessian_channels(network), 2, tmp_path)
    totals = None
    for text in texts(1, 6):
        found = measure_text(network, text.domain, text.data, sums)
        totals = found if totals is None else pool(totals, found)
    return Statistics("m" * 64, shared_inputs(network), (Run("c" * 64, 100, 0, None),), totals, sums.sums)


def error_of(network, packed):
    """Mean square of the change of states, by that of the states."""
    total = size = 0.0
    for _, batch in text_batches_by_domain(texts(2, 4), network.config):
        wanted, found = (each.encode(batch.ids, batch.lengths) for each in (network, packed))
        total += mx.square(wanted - found).mean().item()
        size += mx.square(wanted).mean().item()
    return total / size


@pytest.mark.parametrize("kind", KINDS)
def test_folds_leave_a_network_as_it_was(kind):
    """Norms that follow a sum are read by later sums too: values before outputs are all that can be rescaled."""
    network = KINDS[kind]()
    parameters = dict(tree_flatten(network.parameters()))
    found = legal_folds(parameters, gated=False, norms_lead=architecture_of(network).norms_lead)
    assert {each.consumers[0].rpartition(".")[2] for each in found} == {"o_proj"} and len(found) == 3
    rng = np.random.default_rng(0)
    for each in found:
        fold(parameters, each, np.exp2(rng.integers(-3, 4, 32)).astype(np.float32))
    changed = with_weights(network, parameters)
    batch = next(text_batches(texts(2), network.config))
    assert mx.allclose(changed.encode(batch.ids, batch.lengths), network.encode(batch.ids, batch.lengths), atol=1e-4)


@pytest.mark.parametrize("kind", ["characters", "sentences"])
def test_every_method_packs(kind, tmp_path):
    network = KINDS[kind]()
    statistics = statistics_of(network, tmp_path)
    rough = error_of(network, quantize_network(network, FOUR, method="rtn").network)
    errors = {
        name: error_of(network, quantize_network(network, FOUR, statistics, method=name).network)
        for name in METHODS
        if not name.endswith("hadamard")
    }
    batches = text_batches_by_domain(texts(1, 6), network.config)
    errors["sequential"] = error_of(network, quantize_sequentially(network, FOUR, batches, method="gptq").network)
    assert 0 < rough < 0.5 and all(0 < error < 1.1 * rough for error in errors.values()), errors
    assert errors["gptq"] < rough and errors["sequential"] < rough


def test_formats_by_part():
    network = KINDS["characters"]()
    packed = quantize_network(network, QuantizationSettings("nvfp4", "mxfp8")).network
    modes = {path: getattr(module, "mode", None) for path, module in linear_layers(packed).items()}
    assert {mode for path, mode in modes.items() if path.startswith("layers.")} == {"nvfp4"}
    assert {mode for path, mode in modes.items() if path.startswith("local.")} == {"mxfp8"}
    assert modes["output"] is None and part_of("local.up.conv") == "local"


def test_rotation_is_refused_with_the_reason():
    network = KINDS["no head"]()
    batches = text_batches_by_domain(texts(1), network.config)
    with pytest.raises(QuantizationError, match="cannot be rotated: its norms follow the sums"):
        quantize_sequentially(network, FOUR, batches, method="gptq+hadamard")


@pytest.mark.parametrize("kind", ["characters", "texts", "sentences"])
def test_tuning_brings_predictions_nearer(kind):
    network = KINDS[kind]()
    packed = quantize_network(network, FOUR, method="rtn").network
    feed = list(text_batches(texts(1), network.config))
    seen = []
    batches = [feed[index % len(feed)] for index in range(6)]
    tuned = distill(network, packed, batches, settings_for(network, 6), on_step=lambda step, value: seen.append(value))
    assert seen[-1] < seen[1] and all(value > 0 for value in seen)
    assert error_of(network, tuned) < 1.05 * error_of(network, packed)


@pytest.mark.parametrize("changes", [{"head": "answer"}, {"head": "choice"}, {"head": "sequence", "labels": ("x", "y")},
                                     {"head": "sequence", "labels": ("x", "y"), "problem": "several_labels"}])  # fmt: skip
def test_predictions_are_those_of_each_text_by_itself(changes):
    """In a batch as alone: filler is no candidate, and counts nothing."""
    network = random_canine(**changes)
    some = [text.data for text in texts(3, 4)]
    batch = next(text_batches(texts(3, 4), network.config))
    assert batch.lengths is not None

    def probabilities(of):
        return np.array(mx.softmax(architecture_of(network).logits(network, of), axis=-1))

    together = probabilities(batch)
    alone = []
    for text in some:
        length = len(text.decode()) + 2
        ids = mx.array([[0xE000, *map(ord, text.decode()), 0xE001, *[0] * (batch.ids.shape[1] - length)]])
        scores = network(ids, mx.array([length]))
        if changes["head"] == "answer":
            for side in range(2):
                alone.append(np.array(mx.softmax(scores[0, :length, side])))
        elif changes["head"] == "choice":
            alone.append(scores.item())
        elif "problem" in changes:
            alone += [[1 - value, value] for value in mx.sigmoid(scores[0]).tolist()]
        else:
            alone.append(np.array(mx.softmax(scores[0])))
    if changes["head"] == "choice":
        np.testing.assert_allclose(together[0], np.array(mx.softmax(mx.array(alone))), atol=1e-5)
        return
    assert len(together) == len(alone)
    for found, wanted in zip(together, alone, strict=True):
        np.testing.assert_allclose(found[: len(wanted)], wanted, atol=1e-5)
        assert not found[len(wanted) :].any()


def test_what_predicts_nothing_says_so():
    batch = next(text_batches(texts(1), random_canine().config))
    for changes, words in (
        ({}, "has no head"),
        ({"head": "sequence", "labels": ("x",), "problem": "regression"}, "gives values"),
    ):
        network = random_canine(**changes)
        with pytest.raises(QuantizationError, match=words):
            architecture_of(network).logits(network, batch)


def test_formats_are_chosen_by_what_they_cost():
    network = KINDS["characters"]()
    batches = list(text_batches(texts(1, 2), network.config))
    choices = measure_choices(
        network, batches, lambda weight, plan: METHODS["rtn"](weight, plan.format, plan.group_size, None, None)
    )
    assert {path for each in choices for path in each.paths} == set(linear_layers(network)) - {"output"}
    assert all(each.divergence["nvfp4"] > each.divergence["mxfp8"] > 0 for each in choices)
    assert set(choose(choices, 6.0).values()) == {"nvfp4", "mxfp8"}


def test_batches_are_padded_as_if_without_end():
    for kind in ("no head", "sentences"):
        network = KINDS[kind]()
        found = list(text_batches(texts(4, 12), network.config))
        assert [len(batch.ids) for batch in found] == [TEXTS_PER_BATCH, 4]
        assert sum(map(size_bytes, found)) == sum(len(text.data) for text in texts(4, 12))
        for batch in found:
            longest = int(mx.max(batch.lengths).item())
            assert batch.ids.shape[1] == settled_length(longest)
            row = int(mx.argmax(batch.lengths).item())
            further = mx.pad(batch.ids, [(0, 0), (0, 40)], constant_values=network.config.padding)
            states, same = network.encode(batch.ids, batch.lengths), network.encode(further, batch.lengths)
            assert mx.allclose(states[row, :longest], same[row, :longest], atol=1e-4)


def test_a_corpus_as_a_feed(tmp_path):
    (tmp_path / "a.txt").write_bytes("Kůň a pes. ".encode() * 200)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe" * 1000)
    network = KINDS["no head"]()
    notes = []
    batches = feed_of(network).by_domain(network, [str(tmp_path)], [], 1 << 20, notes.append)
    assert notes == ["8 window(s) of the corpus are left out: they are no UTF-8"]
    assert 2550 < sum(size_bytes(batch) for _, batch in batches) <= 2600
    assert len(list(feed_of(network).endless(network, [str(tmp_path)], []))) == 2
