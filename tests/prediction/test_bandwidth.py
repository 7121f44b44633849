"""Bandwidths by a clock that only counts; that they are true is for benchmarks to show."""

import itertools

import pytest

from marlin_cli.prediction.bandwidth import measure_bandwidth


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_bytes_over_the_fastest_run(activation_bits):
    # Every run takes two ticks less than the one before it, so the last of each is the fastest.
    gaps = itertools.cycle([9.0, 0.0, 7.0, 0.0, 2.0, 0.0])
    times = itertools.accumulate(itertools.chain([0.0], gaps))
    found = measure_bandwidth(
        ("nvfp4", "int8"), side=256, repeats=2, clock=lambda: next(times), activation_bits=activation_bits
    )  # fmt: skip
    assert found.copy == 2 * 256 * 256 * 4 / 2
    assert found.matvec == found.of(None) == 256 * 256 * 4 / 2
    # Layers of 64 x 64, as many as fill a quarter of the dense matrix, and one.
    for name, bits in (("nvfp4", 4.5), ("int8", 9.0)):  # int8: 32-bit scale and bias to 64 weights
        one = 64 * 64 * bits / 8
        assert found.of(name) == pytest.approx((1 + 256 * 256 // one) * one / 2)
