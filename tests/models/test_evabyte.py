"""EvaByte's network, ids, chats and pieces, and what of its configuration is refused."""

import mlx.core as mx
import numpy as np
import pytest
from evabyte_cases import random_evabyte

from marlin_cli.config import from_mapping
from marlin_cli.errors import ConfigError, QuantizationError
from marlin_cli.models import linear_layers, part_of, shared_inputs
from marlin_cli.models.evabyte import EvaByteConfig
from marlin_cli.models.evabyte_ids import bytes_of_mark, chat, ids_of_bytes, ids_with_marks
from marlin_cli.models.evabyte_steps import EVABYTE, ids_of
from marlin_cli.quantization.balanced_keys import with_balanced_keys

WINDOWS = np.random.default_rng(0).integers(0, 256, (2, 75), dtype=np.uint8)


def test_pieces_are_the_network_and_show_every_layer():
    network = random_evabyte()
    state = EVABYTE.start(network, WINDOWS)
    shown = []
    for piece in EVABYTE.pieces(network):
        state = piece.run(network, state)
        shown += piece.sources
    found = network.head(network.norm(state["rows"])).reshape(-1, 320)
    assert mx.array_equal(found, EVABYTE.logits(network, WINDOWS))
    assert sorted(shown) == sorted(set(shared_inputs(network).values()) - {"output"})
    assert {path for path in linear_layers(network) if part_of(path) == "head"} == {"output", "drafts"}


def test_what_caches_would_hold_is_shown():
    network, seen = random_evabyte(), {}
    EVABYTE.pass_through(network, WINDOWS[0], lambda path, keys, values: seen.update({path: (keys.shape, values.shape)}))
    assert seen == {f"layers.{n}.attention": ((1, 2, 75, 32), (1, 2, 75, 32)) for n in (0, 1)}


def test_heads_guess_further_bytes():
    """Head j + 1 stands where the byte after j others is guessed: its rows are those of the checkpoint in their order."""
    network = random_evabyte()
    hidden = network.decode(ids_of(network, WINDOWS))
    guesses = network.further(hidden)
    assert guesses.shape == (2, 75, 2, 320)
    assert mx.allclose(guesses[..., 1, :], hidden @ network.drafts.weight[320:].T, atol=1e-4)


def test_ids_and_names_of_marks():
    assert ids_of_bytes(b"\x00a\xff") == [64, 161, 319]
    assert ids_with_marks(b"<bos>a<|eot_id|><bos><extra_id_63><extra_id_11>") == [
        161,
        11,
        1,
        63,
        *ids_of_bytes(b"<extra_id_11>"),
    ]
    assert [bytes_of_mark(mark) for mark in (9, 12, 64)] == [b"<|start_header_id|>", b"<extra_id_12>", b""]


def test_a_chat():
    text = chat([("user", b"Hi.")])
    assert text == (
        b"<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        b"<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    newlines = [74, 74]
    assert ids_with_marks(text)[:11] == [9, *ids_of_bytes(b"system"), 10, *newlines, 11]


def test_keys_that_chunks_read_too_are_not_scaled():
    with pytest.raises(QuantizationError, match="not queries alone read the keys of an EvaByte"):
        with_balanced_keys(random_evabyte(), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 3}, "d_model 64 is not made of 3 heads"),
        ({"chunk_bytes": 5}, "window_bytes 32 is not made of chunks of 5"),
        ({"chunk_bytes": 0}, "chunk_bytes must be at least 1"),
        ({"vocab_size": 319}, "vocab_size must be at least 320"),
        ({"end_ids": []}, "end_ids must be ids below 320"),
        ({"end_ids": [320]}, "end_ids must be ids below 320"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 1e-30"),
        ({"norm_eps": 0.0}, "norm_eps must be at least 1e-30"),  # MLX has no such norm
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"max_bytes": 1 << 40}, "more than the"),
    ],
)
def test_impossible_configurations(changes, message):
    sizes = {"d_model": 64, "heads": 2, "window_bytes": 32, "chunk_bytes": 8}
    with pytest.raises(ConfigError, match=message):
        from_mapping(EvaByteConfig, sizes | changes, "config.json")
