"""Speeds of reading texts: every shape, what a clock says, texts of the shipped sample, lengths that do not fit."""

import itertools

import pytest
from canine_cases import random_canine, random_la_canine

from marlin_cli.bench.encoding_speed import measure_encoding, sample_text
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.errors import UsageError
from marlin_cli.ops.device import choose_device


def model(make, **config):
    return EncodingModel(make(layers=1, **config), choose_device("cpu"))


def test_every_shape_of_every_model():
    settings = ThroughputSettings(repeats=3, sweep_contexts=(8, 16), sweep_batches=(1, 2))
    ticks, told = itertools.count(), []
    models = [model(random_canine), model(random_canine, head="token", labels=("O", "A")), model(random_la_canine)]
    found = measure_encoding(models, settings, lambda: float(next(ticks)), told.append)
    for speeds in found:
        assert [(each.prompt_characters, each.batch_size) for each in speeds] == [(8, 1), (8, 2), (16, 1), (16, 2)]
        for each in speeds:  # each run takes a tick
            assert each.characters_per_second.samples == (each.prompt_characters * each.batch_size,) * 3
            assert each.working_memory_bytes > 0
    assert sum(told) == 3 * 4 * (8 + 16) * (1 + 2)
    plain = measure_encoding(models[:1], ThroughputSettings(prompt_bytes=8, repeats=1))
    assert [(each.prompt_characters, each.batch_size) for each in plain[0]] == [(8, 1), (8, 8)]


def test_texts_are_of_the_sample():
    assert sample_text(100, 1) == sample_text(100, 1) != sample_text(100, 2)
    assert len(sample_text(100_000, 3)) == 100_000
    assert max(sample_text(5000, 4)) > 127


@pytest.mark.parametrize("length", [3, 257])
def test_a_length_that_does_not_fit(length):
    with pytest.raises(UsageError, match=f"--prompt-bytes {length}: a text has 4 to 256 characters here"):
        measure_encoding([model(random_canine)], ThroughputSettings(prompt_bytes=length))
