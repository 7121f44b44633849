"""Cached decoding of SpaceByte: at every byte the full pass, with patches that begin where each text says."""

import mlx.core as mx
import numpy as np
import pytest
from spacebyte_cases import random_spacebyte

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.space_decoding import SpaceRows, space_rows
from marlin_cli.errors import UsageError

DATA = ("Bytes, é 東\x00 and more of them; " * 3).encode()[:90]
TEXTS = [DATA, DATA[::-1], bytes(range(60, 150)), b"a" * 90]


def ids_of(texts):
    return mx.array([list(text) for text in texts])


CASES = {
    "learned positions": {},
    "rotated positions": {"positions": "learned+rope"},
    "all seen": {"local_window": None},
    "a window of one byte, of two patches": {"local_window": 1, "global_window": 2},
    "grouped, another norm": {"global_kv_heads": 2, "local_kv_heads": 1, "norm": "variance", "qk_norm": False},
    "no initial blocks": {"initial_layers": 0},
    "periodic": {"patch_rule": "periodic", "max_patches": 32},
    "little room": {"max_patches": 9},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_every_byte_is_the_full_pass_alone_and_beside_others(changes):
    network = random_spacebyte(**changes)
    full = np.array(network(network.led(ids_of(TEXTS))))
    for texts, start in (([0], 5), ([0, 1, 2, 3], 1), ([3, 1], 40)):
        ids = ids_of([TEXTS[text] for text in texts])
        state = way_of(network).begin(network, [row[:start].tolist() for row in ids], None, None)
        for position in range(start, ids.shape[1]):
            assert np.abs(np.array(state.logits) - full[texts, position]).max() < 1e-4, position
            state.push(ids[:, position])


def test_prompts_in_slices(monkeypatch):
    network = random_spacebyte(global_window=3)
    ids = network.led(ids_of(TEXTS))
    whole = np.array(network(ids)[:, -1])
    for rows in (4, 28, 128):  # of four texts together
        monkeypatch.setattr("marlin_cli.engine.space_decoding.ROWS_AT_ONCE", rows)
        assert np.abs(np.array(SpaceRows(network, 4).read(ids)) - whole).max() < 1e-4


def test_texts_that_leave_do_not_disturb_the_others():
    network = random_spacebyte()
    ids = network.led(ids_of(TEXTS))
    rows, alone = SpaceRows(network, 4), SpaceRows(network, 1)
    rows.read(ids[:, :30])
    rows.keep([2, 0])
    alone.read(ids[2:3, :30])
    for position in range(30, 60):
        together = np.array(rows.read(ids[:, position : position + 1][mx.array([2, 0])]))
        assert np.abs(together[0] - np.array(alone.read(ids[2:3, position : position + 1]))[0]).max() < 1e-4
    assert rows.patches[0] == alone.patches[0] and len(set(rows.patches)) == 2


def test_bytes_keep_a_window_and_patches_all_their_rows():
    network, held = random_spacebyte(max_bytes=4095, max_patches=2048), []
    rows = SpaceRows(network, 1)
    for _ in range(3):
        rows.read(mx.random.randint(0, 254, (1, 400)))
        held.append(rows.nbytes)
    of_a_patch = 2 * 2 * 64 * 4  # keys and values of two layers in float32
    windows = 3 * 2 * 2 * 17 * 32 * 4  # of three layers, at most two of each
    assert rows.patches[0] > 100 and held[-1] <= rows.patches[0] * of_a_patch + windows


def test_bits_of_a_cache_are_refused():
    with pytest.raises(UsageError, match="--kv-bits: what a SpaceByte remembers keeps its own type"):
        space_rows(random_spacebyte(), 1, CacheBits(8, 8))
