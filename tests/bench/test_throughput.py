"""Timing with a clock that only counts, so that what is timed shows exactly. Speeds are never asserted."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.api import MegaByteModel
from marlin_cli.bench import throughput
from marlin_cli.bench.energy import EnergyCounter
from marlin_cli.bench.spreads import percentiles_of
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput, sample_prompt
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.sampling import sample
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.sizes import bytes_by_part, bytes_in_float32

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

    monkeypatch.setattr(throughput, "begin", Recorded)
    return pushes


class Clock:
    """Time that passes in the model alone: so many seconds a prompt, a choice of the first byte, and a decoded byte."""

    def __init__(self, monkeypatch, prompt, choice, byte):
        self.now = 0.0
        clock = self

        class Timed(Lockstep):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                clock.now += prompt()

            def advance(self, *arguments):
                ids = super().advance(*arguments)
                clock.now += ids.shape[1] * byte()
                return ids

        def choose(*arguments):
            clock.now += choice()
            return sample(*arguments)

        monkeypatch.setattr(throughput, "begin", Timed)
        monkeypatch.setattr(throughput, "sample", choose)

    def __call__(self):
        return self.now


def in_turn(*values):
    """A value for each run, the warm-up first."""
    return itertools.chain(values).__next__


def test_speeds_come_from_the_time_between_the_marks(model, monkeypatch):
    clock = Clock(monkeypatch, lambda: 4.0, lambda: 1.0, lambda: 0.5)
    [result] = measure_throughput([model], SETTINGS, clock)
    assert result.prefill_bytes_per_second.samples == (5.0, 5.0, 5.0)  # 20 bytes in 4 s
    assert result.time_to_first_byte_seconds.samples == (5.0, 5.0, 5.0)  # prefill and the choice
    assert result.decode_bytes_per_second.samples == (2.0, 2.0, 2.0)  # 9 bytes in 4.5 s


def test_medians_are_over_the_repeats(model, monkeypatch):
    clock = Clock(monkeypatch, in_turn(100.0, 1.0, 2.0, 4.0), lambda: 1.0, lambda: 0.5)
    [result] = measure_throughput([model], SETTINGS, clock)
    assert result.prefill_bytes_per_second.samples == (20.0, 10.0, 5.0)
    assert result.prefill_bytes_per_second.median == 10.0
    assert (result.prefill_bytes_per_second.minimum, result.prefill_bytes_per_second.maximum) == (5.0, 20.0)


def test_latencies_of_bytes_and_of_whole_patches(model, monkeypatch):
    # 21 bytes are there when decoding begins: 3 more end a patch of 4 that is not whole, then one is, then 2 bytes.
    waits = itertools.count(1)
    clock = Clock(monkeypatch, lambda: 1.0, lambda: 1.0, lambda: float(next(waits)))
    [result] = measure_throughput([model], ThroughputSettings(20, 9, 1), clock)
    total = 9 / result.decode_bytes_per_second.median
    assert result.patch_latency_seconds.percentile_50 == result.patch_latency_seconds.maximum
    assert 0 < result.patch_latency_seconds.maximum < total
    assert result.byte_latency_seconds.maximum < result.patch_latency_seconds.maximum
    assert result.byte_latency_seconds.percentile_50 <= result.byte_latency_seconds.percentile_90
    [short] = measure_throughput([model], ThroughputSettings(20, 3, 1), clock)
    assert short.patch_latency_seconds is None


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
def test_parts_of_decoding_add_up_to_the_repeat_in_the_middle(model):
    [result] = measure_throughput([model], SETTINGS)
    parts = result.decode_seconds_by_part
    assert list(parts) == ["global", "global cache", "local", "local cache", "head", "sampling", "overhead"]
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(1 / result.decode_bytes_per_second.median, rel=1e-9)


def test_parts_are_of_the_repeat_whose_time_is_in_the_middle(model, monkeypatch):
    reading = itertools.count()  # each look at the parts finds a second more in the first and two in the second

    class Told(Lockstep):
        @property
        def part_seconds(self):
            seen = float(next(reading))
            return {"global": seen, "local": 2 * seen}

    monkeypatch.setattr(throughput, "begin", Told)
    clock = Clock(monkeypatch, lambda: 1.0, lambda: 1.0, in_turn(*[1.0] * 10, *[9.0] * 9, *[5.0] * 9, *[7.0] * 9))
    monkeypatch.setattr(Lockstep, "part_seconds", Told.part_seconds)
    [result] = measure_throughput([model], SETTINGS, clock)
    assert result.decode_seconds_by_part["global"] == 1 / 9 and result.decode_seconds_by_part["local"] == 2 / 9
    assert sum(result.decode_seconds_by_part.values()) == pytest.approx(1 / result.decode_bytes_per_second.median)


def test_parts_that_nothing_tells_apart_are_unknown(model, monkeypatch):
    monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
    [result] = measure_throughput([model], SETTINGS)
    assert result.decode_seconds_by_part is None


def test_percentiles():
    found = percentiles_of([float(value) for value in range(101)])
    assert (found.percentile_50, found.percentile_90, found.percentile_99, found.maximum) == (50, 90, 99, 100)


def test_a_sweep_has_every_batch_after_every_context(model, random_network, small_sizes, monkeypatch):
    other = MegaByteModel(random_network(MegaByteConfig(**small_sizes), seed=1), model.device)
    clock = Clock(monkeypatch, lambda: 2.0, lambda: 0.0, lambda: 0.25)
    counts = []
    settings = ThroughputSettings(8, 4, 2, sweep_contexts=(4, 12), sweep_batches=(1, 3))
    results = measure_throughput([model, other], settings, clock, counts.append)
    for result in results:
        points = [(point.context_bytes, point.decode_bytes, point.batch) for point in result.sweep]
        assert points == [(4, 4, 1), (4, 4, 3), (12, 4, 1), (12, 4, 3)]
        assert [point.prefill_bytes_per_second.median for point in result.sweep] == [2, 6, 6, 18]
        assert [point.decode_bytes_per_second.median for point in result.sweep] == [4, 12, 4, 12]
    assert sum(counts) == 2 * 3 * (settings.bytes_of_run + settings.bytes_of_sweep)
    assert settings.bytes_of_sweep == 4 * (4 + 5) + 4 * (12 + 5)


def test_lengths_of_decoding_are_swept_after_every_context(model, monkeypatch):
    clock = Clock(monkeypatch, lambda: 2.0, lambda: 0.0, lambda: 0.25)
    settings = ThroughputSettings(8, 4, 1, sweep_contexts=(4, 8), sweep_decodes=(2, 6))
    [result] = measure_throughput([model], settings, clock)
    assert [(point.context_bytes, point.decode_bytes) for point in result.sweep] == [(4, 2), (4, 6), (8, 2), (8, 6)]
    assert [point.decode_bytes_per_second.median for point in result.sweep] == [4, 4, 4, 4]
    assert settings.bytes_of_sweep == 7 + 11 + 11 + 15


def test_batches_alone_are_swept_after_the_prompt():
    assert ThroughputSettings(8, 4, sweep_batches=(2, 4)).sweep == [(8, 4, 2), (8, 4, 4)]
    assert ThroughputSettings(8, 4, sweep_decodes=(2, 3)).sweep == [(8, 2, 1), (8, 3, 1)]
    assert ThroughputSettings(8, 4).sweep == []


def test_short_runs_are_repeated_until_they_have_taken_long(model, random_network, small_sizes, monkeypatch):
    other = MegaByteModel(random_network(MegaByteConfig(**small_sizes), seed=1), model.device)
    clock = Clock(monkeypatch, lambda: 1.0, lambda: 0.5, lambda: 0.5)  # 6 seconds a run
    for seconds, repeats in ((0.0, 2), (12.0, 2), (12.5, 3), (30.0, 5)):
        results = measure_throughput([model, other], ThroughputSettings(20, 9, 2, seconds), clock)
        assert [len(result.decode_bytes_per_second.samples) for result in results] == [repeats] * 2
    with pytest.raises(UsageError, match="--seconds must be 0 or more, found -1"):
        ThroughputSettings(seconds=-1)


def test_contexts_of_a_sweep_must_fit(model):
    settings = ThroughputSettings(8, 4, 1, sweep_contexts=(8, model.config.max_bytes))
    with pytest.raises(UsageError, match=f"--context {model.config.max_bytes}, a first byte and --decode-bytes 4 do not"):
        measure_throughput([model], settings)
    settings = ThroughputSettings(8, 4, 1, sweep_decodes=(4, model.config.max_bytes - 8))
    with pytest.raises(UsageError, match=f"--context 8, a first byte and --decode-bytes {model.config.max_bytes - 8} do not"):
        measure_throughput([model], settings)
    with pytest.raises(UsageError, match="--decode-bytes must be at least 1, found 0"):
        ThroughputSettings(sweep_decodes=(1, 0))
    with pytest.raises(UsageError, match="--batch must be at least 1, found 0"):
        ThroughputSettings(sweep_batches=(1, 0))


def test_energy_is_that_of_the_decoded_bytes(model, monkeypatch, tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000000")
    (zone / "energy_uj").write_text("999000000")

    class Using(Lockstep):
        def advance(self, *arguments):
            ids = super().advance(*arguments)
            used = int((zone / "energy_uj").read_text()) + 500_000 * ids.shape[1]
            (zone / "energy_uj").write_text(str(used % 1_000_000_000))
            return ids

    monkeypatch.setattr(throughput, "begin", Using)
    [result] = measure_throughput([model], SETTINGS, energy=EnergyCounter(tmp_path))
    assert result.joules_per_byte == pytest.approx(0.5)
    [result] = measure_throughput([model], SETTINGS, energy=EnergyCounter(tmp_path / "nothing"))
    assert result.joules_per_byte is None


def test_the_bytes_timed_are_those_that_generation_gives(model, pushed):
    [result] = measure_throughput([model], SETTINGS)
    assert result.decoded_bytes == 27
    generated = model.generate(sample_prompt(20, SETTINGS.seed), max_bytes=10)
    runs = [bytes(value for _, value in pushed[start : start + 10]) for start in range(0, len(pushed), 10)]
    assert runs == [generated] * 4  # a warm-up and three repeats


def test_repeats_of_several_models_go_to_and_fro(model, random_network, small_sizes, pushed):
    other = MegaByteModel(random_network(MegaByteConfig(**small_sizes), seed=1), model.device)
    counts = []
    results = measure_throughput([model, other], SETTINGS, on_bytes=counts.append)
    one, two = id(model.network), id(other.network)
    runs = [pushed[start][0] for start in range(0, len(pushed), 10)]
    assert runs == [one, two, one, two, two, one, one, two]  # warm-ups, then A B B A A B
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


def test_a_cpu_widens_floats_and_not_what_is_packed():
    weights = {
        "local.layers.0.q_proj.weight": mx.zeros((4, 8), mx.uint32),
        "local.layers.0.q_proj.scales": mx.zeros((4, 2), mx.bfloat16),
        "local.layers.0.q_proj.biases": mx.zeros((4, 2), mx.bfloat16),
        "output.weight": mx.zeros((2, 3), mx.bfloat16),
        "global.layers.0.q_proj.weight": mx.zeros((2, 3), mx.float32),
    }
    assert bytes_in_float32(weights) == {"global": 24, "local": 128 + 32, "head": 24}
