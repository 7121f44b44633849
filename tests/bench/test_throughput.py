"""Timing with a clock that only counts, so that what is timed shows exactly. Speeds are never asserted."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.api import MegaByteModel
from marlin_cli.bench import throughput
from marlin_cli.bench.sizes import bytes_by_part
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput, sample_prompt
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.models.megabyte import MegaByteConfig
from marlin_cli.ops.device import choose_device

SETTINGS = ThroughputSettings(prompt_bytes=20, decode_bytes=9, repeats=3)


@pytest.fixture
def model(random_network, small_sizes):
    return MegaByteModel(random_network(MegaByteConfig(**small_sizes)), choose_device("cpu"))


@pytest.fixture
def pushed(monkeypatch):
    """The ids that any decoding state takes, pushed or drawn, by the network that decodes."""
    pushes = []

    class Recorded(Lockstep):
        def push(self, ids):
            pushes.append((id(self.network), *ids.tolist()))
            super().push(ids)

        def advance(self, sampling, noise, most):
            ids = super().advance(sampling, noise, most)
            pushes.extend((id(self.network), value) for value in ids[0].tolist())
            return ids

    monkeypatch.setattr(throughput, "Lockstep", Recorded)
    return pushes


def ticks(seconds):
    """A clock that a run reads four times: the time passes between, as listed."""
    now = itertools.accumulate(itertools.chain([0.0], itertools.cycle([*seconds, 0.0])))
    return lambda: next(now)


def test_speeds_come_from_the_time_between_the_marks(model):
    [result] = measure_throughput([model], SETTINGS, ticks([4.0, 1.0, 3.0]))
    assert result.prefill_bytes_per_second.samples == (5.0, 5.0, 5.0)  # 20 bytes in 4 s
    assert result.time_to_first_byte_seconds.samples == (5.0, 5.0, 5.0)  # prefill and the choice
    assert result.decode_bytes_per_second.samples == (3.0, 3.0, 3.0)  # 9 bytes in 3 s


def test_medians_are_over_the_repeats(model):
    clock = ticks([1.0, 1.0, 3.0, 0.0, 2.0, 1.0, 9.0, 0.0, 4.0, 1.0, 1.0])
    [result] = measure_throughput([model], SETTINGS, clock)
    assert result.prefill_bytes_per_second.samples == (20.0, 10.0, 5.0)
    assert result.prefill_bytes_per_second.median == 10.0
    assert (result.decode_bytes_per_second.minimum, result.decode_bytes_per_second.maximum) == (1.0, 9.0)


def test_the_bytes_timed_are_those_that_generation_gives(model, pushed):
    [result] = measure_throughput([model], SETTINGS)
    assert result.decoded_bytes == 27
    generated = model.generate(sample_prompt(20, SETTINGS.seed), max_bytes=10)
    runs = [bytes(value for _, value in pushed[start : start + 10]) for start in range(0, len(pushed), 10)]
    assert runs == [generated] * 4  # a warm-up and three repeats


def test_repeats_of_several_models_alternate(model, random_network, small_sizes, pushed):
    other = MegaByteModel(random_network(MegaByteConfig(**small_sizes), seed=1), model.device)
    counts = []
    results = measure_throughput([model, other], SETTINGS, on_bytes=counts.append)
    assert [network for network, _ in itertools.groupby(pushed, key=lambda push: push[0])] == [
        id(model.network), id(other.network),
    ] * 4  # fmt: skip
    assert len(results) == 2
    assert counts == [30] * 8


def test_cache_bytes_are_the_most_in_use(model):
    [result] = measure_throughput([model], SETTINGS)
    config = model.config
    # 30 bytes are 7 whole patches of 4, and each level has a leading row; keys and values in float32.
    row = 2 * 4 * config.global_layers * config.global_dim
    assert result.cache_bytes["global"] == (7 + 1) * row
    assert result.cache_bytes["local"] == 2 * 4 * config.local_layers * config.local_dim * config.patch_size
    assert result.working_memory_bytes > result.cache_bytes["global"]


def test_cache_bits_of_the_model_are_used(random_network, small_sizes):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_heads": 1}))
    plain, packed = (MegaByteModel(network, choose_device("cpu"), cache_bits=CacheBits(bits, bits)) for bits in (16, 4))
    wide, narrow = measure_throughput([plain, packed], SETTINGS)
    assert narrow.cache_bytes["global"] < 0.2 * wide.cache_bytes["global"]  # 4.5 bits for 32
    assert narrow.cache_bytes["local"] == wide.cache_bytes["local"]


def test_the_prompt_is_a_fixed_piece_of_the_shipped_sample():
    assert sample_prompt(300, seed=0) == sample_prompt(300, seed=0)
    assert len({sample_prompt(300, seed=seed) for seed in range(5)}) == 5


@pytest.fixture
def small_sample(tmp_path, monkeypatch):
    """Three files of 10 bytes in two domains instead of the shipped sample."""
    for domain, name, byte in (("binary", "x", b"x"), ("code", "a", b"a"), ("code", "b", b"b")):
        (tmp_path / domain).mkdir(exist_ok=True)
        (tmp_path / domain / name).write_bytes(byte * 10)
    monkeypatch.setattr(throughput, "shipped", lambda relative: tmp_path)
    return tmp_path


def test_a_prompt_may_span_files(small_sample):
    assert sample_prompt(30, seed=0) == b"x" * 10 + b"a" * 10 + b"b" * 10
    for seed in range(20):
        assert sample_prompt(15, seed) in b"x" * 10 + b"a" * 10 + b"b" * 10


def test_a_prompt_longer_than_the_sample_is_refused(small_sample):
    with pytest.raises(CorpusError, match="the shipped sample has 30 bytes"):
        sample_prompt(31, seed=0)


def test_a_missing_sample_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "shipped", lambda relative: tmp_path / "nothing")
    with pytest.raises(CorpusError, match="the shipped sample is missing"):
        sample_prompt(1, seed=0)


def test_a_run_fills_the_context_and_no_more(model):
    context = model.config.max_bytes
    [result] = measure_throughput([model], ThroughputSettings(context - 10, 9, 1))
    assert result.decoded_bytes == 9
    with pytest.raises(UsageError, match=f"do not fit a context of {context} bytes"):
        measure_throughput([model], ThroughputSettings(context - 9, 9, 1))


@pytest.mark.parametrize("field", ["prompt_bytes", "decode_bytes", "repeats"])
def test_counts_start_at_one(field):
    with pytest.raises(UsageError, match="must be at least 1, found 0"):
        ThroughputSettings(**{field: 0})


def test_weights_by_part_are_all_weights(each_network):
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(each_network.parameters()))
    sizes = bytes_by_part(weights)
    assert sum(sizes.values()) == sum(np.array(array).nbytes for array in weights.values())
    assert ("middle" in sizes) == bool(each_network.config.middle)
    assert sizes["head"] == sum(array.nbytes for path, array in weights.items() if path.startswith("output."))


def test_what_is_looked_up_counts_as_embeddings():
    paths = ["byte_embedding.weight", "local_positions.weight", "global_start", "middle.0.start", "global.layers.0.w"]
    assert bytes_by_part({path: mx.zeros(3) for path in paths}) == {"global": 12, "embeddings": 48}
