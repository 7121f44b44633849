"""Scores of ByT5 on pairs: by hand for given answers, and as the model itself answers, whatever shares a pass."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from marlin_cli import ByT5Config, ByT5Model
from marlin_cli.bench.answering_speed import measure_answering
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.corpus import Pair
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.quality import pairs as pairs_module
from marlin_cli.quality.pairs import Answers, answers_to, measure_pairs, quality_of

PAIRS = [
    Pair(b"first input", b"an answer", "a"), Pair(b"", b"x", "b"), Pair(b"\xff\x00", b"\xfe", "a"),
    Pair("\u010d\u0159".encode() * 9, "\u010d".encode(), "b"), Pair(b"no answer", b"", "c"),
]  # fmt: skip


def random_model(seed=0, **changes):
    shape = {"d_model": 64, "ffn_dim": 64, "heads": 2, "head_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
    model = ByT5Model.from_config(ByT5Config(**{**shape, **changes}), device="cpu")
    mx.random.seed(seed)
    model.network.update(
        tree_map(
            lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else a.shape[-1] ** -0.5), model.network.parameters()
        )
    )
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


def test_scores_by_hand():
    pairs = [Pair(b"abcd", b"abcD", "en"), Pair("z\u010d".encode(), "\u017e\u010d".encode(), "cs"), Pair(b"", b"", "none")]
    answers = Answers(
        [b"abcD", b"", b"z"], np.array([8.0, 2.0, 1.0]), np.array([0.0, 2.0, 1.0]), np.array([True, False, False])
    )
    found = quality_of(pairs, answers)
    assert list(found.groups) == ["cs", "en", "none"]
    every = found.all_pairs
    assert (every.pairs, every.target_bytes, every.characters, every.total_bits) == (3, 8, 6, 11.0)
    assert every.bits_per_target_byte.value == pytest.approx(11 / 8)
    assert every.character_error_rate.value == pytest.approx(3 / 6)
    assert every.copied_error_rate.value == pytest.approx(2 / 6)
    assert every.exact_match.value == pytest.approx(1 / 3)
    residuals = np.array([0.0, 2.0, 1.0]) - 0.5 * np.array([4, 2, 0])
    assert every.character_error_rate.standard_error == pytest.approx(math.sqrt(1.5 * (residuals @ residuals)) / 6)
    assert found.groups["en"].exact_match.value == 1 and found.groups["en"].exact_match.standard_error is None
    assert found.groups["none"].bits_per_target_byte is None and found.groups["none"].character_error_rate is None
    beside = quality_of(pairs, answers, Answers([], answers.bits - 1, answers.errors, answers.exact)).all_pairs
    assert beside.against_reference.bits_per_target_byte.value == pytest.approx(3 / 8)
    assert beside.against_reference.character_error_rate.value == 0
    assert quality_of([Pair(b"", b"a")], Answers([b""], np.ones(1), np.ones(1), np.zeros(1, bool))).groups == {}


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_bits_and_answers_are_those_of_each_pair_alone(kv_bits, model, monkeypatch):
    own = ByT5Model(model.network, model.device, kv_bits=kv_bits)
    together = answers_to(own, PAIRS)
    monkeypatch.setattr(pairs_module, "BYTES_PER_PASS", 1)
    alone = answers_to(own, PAIRS)
    assert together.data == alone.data
    np.testing.assert_allclose(together.bits, alone.bits, rtol=1e-4)
    for pair, data, bits in zip(PAIRS, alone.data, alone.bits, strict=True):
        assert bits == pytest.approx(own.bits(pair.source, pair.target), rel=1e-4)
        assert data == own.generate(pair.source, 2 * max(len(pair.source), len(pair.target)) + 32)


def test_bits_are_those_of_the_logits(model):
    logits = model.logits(b"source", b"target")
    rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = -sum(rows[index, byte + 3].item() for index, byte in enumerate(b"target")) - rows[6, 1].item()
    assert model.bits(b"source", b"target") == pytest.approx(expected / math.log(2), rel=1e-4)


def test_a_model_beside_itself_and_another(model):
    own, other = measure_pairs({"own": model, "other": random_model(1)}, PAIRS, model)
    assert own.all_pairs.against_reference.bits_per_target_byte.value == 0
    assert own.all_pairs.against_reference.exact_match.standard_error == 0
    difference = other.all_pairs.bits_per_target_byte.value - own.all_pairs.bits_per_target_byte.value
    assert other.all_pairs.against_reference.bits_per_target_byte.value == pytest.approx(difference)
    assert difference != 0


def test_progress_counts_every_byte(model):
    seen = []
    measure_pairs({"a": model, "b": model}, PAIRS, None, seen.append)
    assert sum(seen) == 2 * sum(len(pair.source) + len(pair.target) for pair in PAIRS)


def test_what_is_refused(model):
    with pytest.raises(UsageError, match="encoder alone"):
        measure_pairs({"m": random_model(decoder_layers=0)}, PAIRS)
    with pytest.raises(UsageError, match="36 bytes does not fit the reference"):
        measure_pairs({"m": model}, PAIRS, random_model(max_bytes=20))
    with pytest.raises(UsageError, match="no pairs"):
        measure_pairs({"m": model}, [])
    broken = random_model()
    broken.network.output.weight = mx.full(broken.network.output.weight.shape, float("nan"))
    with pytest.raises(CheckpointError, match="m: its predictions are not finite"):
        measure_pairs({"m": broken}, PAIRS)


def test_speeds_by_a_clock_that_ticks_once_a_reading(model):
    ticks = iter(range(1000))
    settings = ThroughputSettings(prompt_bytes=10, decode_bytes=4, repeats=2, sweep_batches=(1, 3))
    counted = []
    found = measure_answering([model], settings, lambda: float(next(ticks)), counted.append)
    assert [speed.batch_size for speed in found[0]] == [1, 3]
    for speed, size in zip(found[0], (1, 3), strict=True):
        assert speed.encoder_bytes_per_second.samples == (10.0 * size,) * 2
        assert speed.decode_bytes_per_second.samples == (1.0 * size,) * 2  # a tick a byte
        assert speed.byte_latency_seconds.percentile_50 == speed.byte_latency_seconds.maximum == 1
        assert speed.time_to_first_byte_seconds.median == 1 and speed.decoded_bytes == 8 * size
        assert speed.memory_bytes == size * 2 * 2 * 11 * 64 * 4  # keys and values of two layers, the end among the rows
    assert sum(counted) == 3 * (1 + 3) * settings.bytes_of_run


def test_speed_of_an_encoder_alone():
    settings = ThroughputSettings(prompt_bytes=10, decode_bytes=4, repeats=1, sweep_batches=(2,))
    (speed,) = measure_answering([random_model(decoder_layers=0)], settings)[0]
    assert speed.byte_latency_seconds is None
    assert speed.decode_bytes_per_second is None and speed.encoder_bytes_per_second.median > 0
    with pytest.raises(UsageError, match="--prompt-bytes 10"):
        measure_answering([random_model(max_bytes=9)], settings)
