"""Settings of drawing at the ends of what numbers of 32 bits can say."""

import mlx.core as mx
import pytest

from marlin_cli.engine.sampling import Sampling, draw, sample

LOGITS = mx.array([[1.0, 9.0, -mx.inf, 8.5], [40.0, 90.0, -mx.inf, 80.0]])
NOISE = mx.array([[0.0, 0.0, 5.0, 2.0]])


def both(settings):
    """By operations and by what draws for streams."""
    return [sample(LOGITS, settings, NOISE).tolist(), draw(LOGITS, [()], [settings], NOISE)[0]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-40, 1e-37, 1e-20])
def test_a_temperature_next_to_nothing_draws_the_likeliest(temperature):
    assert both(Sampling(temperature)) == [[1, 1]] * 2


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-45, 1e-20])
def test_a_share_next_to_nothing_keeps_the_likeliest(top_p):
    assert both(Sampling(1.0, top_p=top_p)) == [[1, 1]] * 2


@pytest.mark.parametrize("temperature", [1e20, 1e40, 1e308])
def test_a_temperature_without_end_draws_by_noise_and_never_what_is_barred(temperature):
    assert both(Sampling(temperature)) == [[3, 3]] * 2


def test_what_is_asked_for_is_kept_where_it_can_be():
    settings = Sampling(0.7, top_p=0.9)
    assert (settings.temperature, settings.top_p, Sampling().temperature) == (0.7, 0.9, 0.0)
