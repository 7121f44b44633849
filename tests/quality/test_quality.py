"""Bits per byte and divergence, against plain loops in float64 over the logits."""

import os

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from marlin_cli.engine.fused import fuse
from marlin_cli.engine.scoring import bits_of
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quality import quality
from marlin_cli.quality.byte_classes import BYTE_CLASSES, classes_of
from marlin_cli.quality.held_out import Windowing, cut, files_by_domain
from marlin_cli.quality.journal import Journal
from marlin_cli.quality.quality import kl_divergence, measure_quality

WINDOW = 48

FILES = {
    "text/long": bytes(range(32, 127)) * 2,
    "text/one byte": b"x",
    "text/exact": b"0123456789ab" * 8,
    "text/utf-8": "h\u00e9llo, \u4e16\u754c".encode() * 4,
    "text/spaces": b" " * 50,
    "binary/zeros": bytes(100),
    "binary/one zero": b"\0",
    "binary/every value": bytes(range(256)),
    "binary/high": bytes([255, 254, 0, 128]) * 13,
    "binary/prime": bytes(value * value % 251 for value in range(97)),
}


@pytest.fixture
def windows(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return cut(files_by_domain(str(tmp_path)), Windowing(window_bytes=WINDOW))


@pytest.fixture
def config(small_sizes):
    return MegaByteConfig(**small_sizes)


@pytest.fixture
def network(random_network, config):
    return random_network(config, seed=0)


@pytest.fixture
def other(random_network, config):
    return random_network(config, seed=1)


def log2_in_float64(network, data, run_stage=None):
    """Base-2 log-probabilities [len(data), 256], each window from an empty context."""
    rows = []
    for start in range(0, len(data), WINDOW):
        logits = np.array(network(mx.array(list(data[start : start + WINDOW]))[None], run_stage)[0]).astype(np.float64)
        for row in logits:
            shifted = row - row.max()
            rows.append((shifted - np.log(np.exp(shifted).sum())) / np.log(2))
    return np.array(rows)


def in_float64(network, prefix):
    """Data and log-probabilities of the files of a domain, by name."""
    return {name: (data, log2_in_float64(network, data)) for name, data in FILES.items() if name.startswith(prefix)}


def bits(data, log2):
    return -log2[np.arange(len(data)), list(data)]


@pytest.mark.parametrize("name", FILES)
def test_bits_per_byte_of_a_file_are_those_of_a_plain_loop(tmp_path, network, name):
    (tmp_path / "file").write_bytes(FILES[name])
    windows = cut(files_by_domain(str(tmp_path / "file")), Windowing(window_bytes=WINDOW))
    [result] = measure_quality({"tiny": network}, windows)
    expected = bits(FILES[name], log2_in_float64(network, FILES[name]))
    assert result.all_domains.bytes == len(FILES[name])
    assert result.all_domains.bits_per_byte.value == pytest.approx(expected.mean(), abs=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_costs_of_the_demo_are_those_of_its_logits_and_windows_add_up(tmp_path, demo, name):
    """Kernels sum its costs and keep no logits; their logits say the same."""
    (tmp_path / "file").write_bytes(FILES[name])
    windows = cut(files_by_domain(str(tmp_path / "file")), Windowing(window_bytes=WINDOW))
    [result] = measure_quality({"demo": demo.network}, windows)
    fused = fuse(demo.network)  # its logits: those of plain MLX are rounded otherwise, by 2e-6
    log2 = log2_in_float64(demo.network, FILES[name], None if fused is None else fused.run_stage)
    expected = bits(FILES[name], log2)
    assert result.all_domains.bits_per_byte.value == pytest.approx(expected.mean(), abs=1e-6)
    alone = [measure_quality({"demo": demo.network}, {"other": [window]})[0].all_domains for window in windows["other"]]
    assert sum(score.bytes for score in alone) == len(FILES[name])
    assert sum(score.total_bits for score in alone) == pytest.approx(result.all_domains.total_bits, abs=1e-6 * len(FILES[name]))


def test_domains_add_up_to_the_whole(network, windows):
    [result] = measure_quality({"tiny": network}, windows)
    assert list(result.domains) == ["binary", "text"]
    for domain, score in result.domains.items():
        expected = [bits(data, log2) for data, log2 in in_float64(network, domain).values()]
        assert score.bytes == sum(map(len, expected))
        assert score.total_bits == pytest.approx(sum(part.sum() for part in expected), abs=1e-6 * score.bytes)
        assert score.bits_per_byte.value == pytest.approx(score.total_bits / score.bytes, rel=1e-12)
    whole = result.all_domains
    assert whole.bytes == sum(map(len, FILES.values())) == sum(score.bytes for score in result.domains.values())
    assert whole.windows == sum(-(-len(data) // WINDOW) for data in FILES.values())
    assert whole.bits_per_byte.value == pytest.approx(whole.total_bits / whole.bytes, rel=1e-12)
    alone = sum(bits_of(network, np.frombuffer(data, dtype=np.uint8), WINDOW).sum() for data in FILES.values())
    assert whole.total_bits == pytest.approx(alone, rel=1e-7)


def test_the_standard_error_is_over_windows(network, windows):
    [result] = measure_quality({"tiny": network}, windows)
    sums, sizes = [], []
    for data, log2 in in_float64(network, "text").values():
        costs = bits(data, log2)
        parts = [costs[start : start + WINDOW] for start in range(0, len(costs), WINDOW)]
        sums += [part.sum() for part in parts]
        sizes += [len(part) for part in parts]
    residuals = np.array(sums) - result.domains["text"].bits_per_byte.value * np.array(sizes)
    expected = np.sqrt(len(sums) / (len(sums) - 1) * (residuals**2).sum()) / sum(sizes)
    assert result.domains["text"].windows == len(sums)
    assert result.domains["text"].bits_per_byte.standard_error == pytest.approx(expected, rel=1e-4)


def test_passes_of_one_window_give_what_large_ones_do(network, windows, monkeypatch):
    [together] = measure_quality({"tiny": network}, windows)
    monkeypatch.setattr(quality, "BYTES_PER_PASS", 1)
    counts = []
    [alone] = measure_quality({"tiny": network}, windows, on_bytes=counts.append)
    assert alone.all_domains.total_bits == pytest.approx(together.all_domains.total_bits, rel=1e-6)
    assert len(counts) == alone.all_domains.windows
    assert sum(counts) == alone.all_domains.bytes


def test_a_model_is_its_own_equal(network, random_network, config, windows):
    twin = random_network(config, seed=0)
    results = measure_quality({"itself": network, "twin": twin}, windows, reference=network)
    for result in results:
        for score in (*result.domains.values(), result.all_domains):
            beside = score.against_reference
            assert (beside.kl_bits_per_byte.value, beside.kl_median_bits, beside.kl_maximum_bits) == (0, 0, 0)
            assert beside.bits_per_byte_difference.value == 0
            assert beside.top1_agreement.value == 1


def test_divergence_and_agreement_are_those_of_a_plain_loop(network, other, windows):
    [result] = measure_quality({"other": other}, windows, reference=network)
    of_bytes = []
    for domain, score in result.domains.items():
        divergences, agreements, differences = [], [], []
        expected, predicted = in_float64(network, domain), in_float64(other, domain)
        for name, (data, p) in expected.items():
            q = predicted[name][1]
            divergences += list((2**p * (p - q)).sum(axis=1))
            agreements += list(p.argmax(axis=1) == q.argmax(axis=1))
            differences += list(bits(data, q) - bits(data, p))
        beside = score.against_reference
        assert beside.kl_bits_per_byte.value == pytest.approx(np.mean(divergences), abs=1e-6)
        assert beside.kl_median_bits == pytest.approx(np.median(divergences), abs=1e-5)
        assert beside.kl_percentile_99_bits == pytest.approx(np.percentile(divergences, 99), abs=1e-5)
        assert beside.kl_maximum_bits == pytest.approx(max(divergences), abs=1e-5)
        assert beside.top1_agreement.value == pytest.approx(np.mean(agreements), abs=1e-12)
        assert beside.bits_per_byte_difference.value == pytest.approx(np.mean(differences), abs=1e-6)
        of_bytes += divergences
    assert result.all_domains.against_reference.kl_bits_per_byte.value == pytest.approx(np.mean(of_bytes), abs=1e-6)
    assert result.all_domains.against_reference.kl_median_bits == pytest.approx(np.median(of_bytes), abs=1e-5)


def test_a_difference_is_paired(network, windows):
    """Windows differ much in what they cost, and little in how a slight change of the weights moves that."""
    close = type(network)(network.config)
    close.update(tree_map(lambda array: array * 1.001, network.parameters()))
    [result] = measure_quality({"close": close}, windows, reference=network)
    score = result.domains["binary"]
    assert score.against_reference.bits_per_byte_difference.standard_error < 0.1 * score.bits_per_byte.standard_error


def test_a_divergence_below_the_rounding_of_its_terms_comes_out():
    logits = np.random.default_rng(0).normal(size=(200, 256))
    close = logits + np.random.default_rng(1).normal(size=logits.shape) * 1e-4

    def log2(values):
        return (values - np.log(np.exp(values).sum(axis=-1, keepdims=True))) / np.log(2)

    p, q = log2(logits), log2(close)
    expected = (2**p * (p - q)).sum(axis=-1)
    found = np.array(kl_divergence(mx.array(p.astype(np.float32)), mx.array(q.astype(np.float32))))
    assert expected.mean() < 1e-8  # the terms are 100 times as large, and a float32 log-probability is good to 1e-6
    assert found.mean() == pytest.approx(expected.mean(), rel=0.05)


def test_a_reference_among_the_models_is_run_once(network, other, windows, monkeypatch):
    calls = []
    original = quality.log2_probabilities

    def counted(network, ids):
        calls.append(id(network))
        return original(network, ids)

    monkeypatch.setattr(quality, "log2_probabilities", counted)
    measure_quality({"reference": network, "other": other}, windows, reference=network)
    assert calls.count(id(network)) == calls.count(id(other)) == len(calls) / 2


def test_a_window_beyond_a_context_is_refused(network, random_network, small_sizes, windows):
    narrow = random_network(MegaByteConfig(**{**small_sizes, "max_bytes": 40}))
    with pytest.raises(UsageError, match="48 bytes do not fit the context of narrow; ask for 40 or fewer"):
        measure_quality({"wide": network, "narrow": narrow}, windows)
    with pytest.raises(UsageError, match="the context of the reference"):
        measure_quality({"wide": network}, windows, reference=narrow)


def test_another_vocabulary_cannot_be_the_reference(network, random_network, small_sizes, windows):
    larger = random_network(MegaByteConfig(**small_sizes, vocab_size=258))
    with pytest.raises(UsageError, match="predicts 258 ids and tiny 256"):
        measure_quality({"tiny": network}, windows, reference=larger)


@pytest.mark.parametrize("broken", ["tiny", "the reference"])
def test_predictions_that_are_not_finite_are_named(network, other, windows, broken):
    other.output.weight = other.output.weight * float("nan")
    networks = {"tiny": other if broken == "tiny" else network}
    with pytest.raises(CheckpointError, match=f"{broken}: its predictions of domain '\\w+' are not finite"):
        measure_quality(networks, windows, reference=network if broken == "tiny" else other)


def test_a_divergence_that_is_not_finite_is_named(network, other, windows):
    """Of an id that no byte here is: what each byte costs is a number all the same."""
    windows = {"text": windows["text"][:1]}
    bias = mx.zeros((256,))
    unused = next(value for value in range(256) if not any(value in each.read() for part in windows.values() for each in part))
    bias[unused] = -mx.inf
    head = other.output
    other.output = lambda x: head(x) + bias
    with pytest.raises(CheckpointError, match=r"tiny: its predictions of domain '\w+' are not finite"):
        measure_quality({"tiny": other}, windows, reference=network)


def test_kinds_of_bytes_and_places_in_the_patch_are_those_of_a_plain_loop(network, other, windows):
    [result] = measure_quality({"other": other}, windows, reference=network)
    costs, kinds, places, divergences = [], [], [], []
    for name, (data, q) in in_float64(other, "").items():
        p = in_float64(network, name)[name][1]
        costs += list(bits(data, q))
        divergences += list((2**p * (p - q)).sum(axis=1))
        kinds += [BYTE_CLASSES[number] for number in classes_of(np.frombuffer(data, dtype=np.uint8))]
        places += [str(index % WINDOW % network.config.patch_size) for index in range(len(data))]
    costs, divergences = np.array(costs), np.array(divergences)
    for labels, scores in ((kinds, result.byte_classes), (places, result.patch_positions)):
        assert set(scores) == set(labels)
        for label, score in scores.items():
            members = np.array(labels) == label
            assert score.bytes == members.sum()
            assert score.bits_per_byte.value == pytest.approx(costs[members].mean(), abs=1e-6)
            assert score.against_reference.kl_median_bits == pytest.approx(np.median(divergences[members]), abs=1e-5)
        assert sum(score.total_bits for score in scores.values()) == pytest.approx(result.all_domains.total_bits, rel=1e-12)
    assert {"UTF-8 lead", "UTF-8 continuation", "high binary"} <= set(result.byte_classes)  # also cut by a window's end


@pytest.mark.parametrize("stride", [48, 20, 7])
def test_sliding_windows_score_each_byte_once_and_with_context(tmp_path, network, stride):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    [result] = measure_quality(
        {"tiny": network}, cut(files_by_domain(str(tmp_path)), Windowing(window_bytes=WINDOW, stride_bytes=stride))
    )
    expected = 0.0
    for data in FILES.values():
        scored = 0
        for start in range(0, len(data), stride):
            window = data[start : start + WINDOW]
            fresh = max(0, start + len(window) - scored)
            log2 = log2_in_float64(network, window)
            expected += bits(window, log2)[len(window) - fresh :].sum()
            scored += fresh
        assert scored == len(data)
    assert result.all_domains.bytes == sum(map(len, FILES.values()))
    assert result.all_domains.bits_per_byte.value == pytest.approx(expected / result.all_domains.bytes, abs=1e-6)


@pytest.mark.parametrize("after", [1, 3, 6])
def test_an_interrupted_run_resumes_to_the_same_numbers(tmp_path, network, other, windows, monkeypatch, after):
    monkeypatch.setattr(quality, "BYTES_PER_PASS", 2 * WINDOW)
    whole = measure_quality({"other": other}, windows, reference=network)
    done = []

    def stop(count):
        done.append(count)
        if len(done) == after:
            raise KeyboardInterrupt

    folder = tmp_path / "journals"
    with pytest.raises(KeyboardInterrupt), Journal(folder, lambda: "key") as journal:
        measure_quality({"other": other}, windows, network, stop, journal=journal)
    calls = []
    original = quality.log2_probabilities
    monkeypatch.setattr(quality, "log2_probabilities", lambda *arguments: calls.append(1) or original(*arguments))
    counts = []
    with Journal(folder, lambda: "key", resume=True) as journal:
        assert measure_quality({"other": other}, windows, network, counts.append, journal=journal) == whole
    assert sum(counts) == whole[0].all_domains.bytes
    assert len(calls) == 2 * (len(counts) - after)


@pytest.mark.slow
@pytest.mark.skipif("MARLIN_HELDOUT" not in os.environ, reason="MARLIN_HELDOUT names no folder of held-out bytes")
@pytest.mark.parametrize(
    "domain, bits_per_byte, size",
    [("multilingual", 1.36631, 230133), ("code", 1.14063, 69632), ("binary", 3.49876, 111705)],
)
def test_the_demo_costs_what_its_training_record_says(demo, domain, bits_per_byte, size):
    files = files_by_domain(os.environ["MARLIN_HELDOUT"])[domain]
    windows = cut({domain: files}, Windowing(window_bytes=2048, max_bytes_per_file=4096))
    [result] = measure_quality({"demo": demo.network}, windows)
    assert result.domains[domain].bytes == size
    assert result.domains[domain].bits_per_byte.value == pytest.approx(bits_per_byte, rel=0.005)
