"""LA-CANINE: the numbers of wtpsplit 2.2.2 with every kind of adapters."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import DATA, LA_CASES, LA_KINDS, SHAPE, batch, golden_la_network

from marlin_cli.checkpoints.la_canine import LANGUAGES
from marlin_cli.errors import ConfigError
from marlin_cli.models.la_canine import PADDING, LaCanineConfig
from marlin_cli.tensor_files import read_safetensors

TOLERANCE = 1e-4
EVERY = 41


@pytest.mark.parametrize("kind", LA_KINDS)
def test_the_numbers_of_wtpsplit(kind, tmp_path):
    expected, _ = read_safetensors(DATA / "la_canine_golden.safetensors")
    network = golden_la_network(
        tmp_path / "model", kind, "cs" if LA_KINDS[kind].get("language_adapter", "on") == "on" else None
    )
    for lengths, total in LA_CASES:
        ids, _ = batch(lengths, total, PADDING)
        found = np.array(network(mx.array(ids), None if set(lengths) == {total} else mx.array(lengths)))
        found = np.concatenate([found[:, ::EVERY], found[:, -1:]], axis=1)
        theirs = np.array(expected[f"{kind}.{total}.{'.'.join(map(str, lengths))}"])
        assert found.shape == theirs.shape
        assert np.abs(found - theirs).max() < TOLERANCE, (lengths, total)


def test_a_language_has_adapters_of_its_own(tmp_path):
    ids = mx.array(batch((20,), 20)[0])
    found = [golden_la_network(tmp_path / code, "on", code)(ids) for code in ("cs", "de")]
    assert not mx.allclose(*found, atol=1e-2)


def test_the_languages_are_those_of_the_tables():
    assert len(LANGUAGES) == LA_KINDS["on"]["n_languages"] == len(set(LANGUAGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows must be"),
        ({"adapter_dim": 64}, "adapter_dim is 64, more than the 32"),
        ({"lookahead": -1}, "lookahead must be"),
        ({"language": "cs"}, "no adapters"),
        ({"layers": 0}, "layers must be"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LaCanineConfig(**SHAPE | changes)
