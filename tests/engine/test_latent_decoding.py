"""Cached decoding of Byte Latent Transformers: at every byte the full pass, with patches that end where each text says."""

import mlx.core as mx
import numpy as np
import pytest
from blt_cases import random_blt

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.latent_decoding import LatentRows, latent_rows
from marlin_cli.errors import UsageError
from marlin_cli.models.blt_config import StackConfig

DATA = ("Bytes, é 東\x00 and more of them; " * 3).encode()[:90]
TEXTS = [DATA, DATA[::-1], bytes(range(90)), b"a" * 90]


def ids_of(texts):
    return mx.array([list(text) for text in texts]) + 4


CASES = {
    "windows": {},
    "all seen": {"patcher_window": None, "local_window": None},
    "windows of two": {"patcher_window": 2, "local_window": 2},
    "cut at a length": {"max_patch_bytes": 3},
    "7B, one reader": {"patches": StackConfig(48, 96, 2, 2), "cross_every_layer": False},
    "hardly a patch": {"threshold": 100.0},
    "a patch a byte": {"threshold": 0.0},
    "no hashes": {"hash_lengths": ()},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_every_byte_is_the_full_pass_alone_and_beside_others(changes):
    network = random_blt(**changes)
    full = np.array(network.predictions(ids_of(TEXTS) - 4))
    for texts, start in (([0], 5), ([0, 1, 2, 3], 1), ([3, 1], 40)):
        ids = ids_of([TEXTS[text] for text in texts])
        state = way_of(network).begin(network, [row[:start].tolist() for row in ids], None)
        for position in range(start, ids.shape[1]):
            assert np.abs(np.array(state.logits) - full[texts, position]).max() < 1e-4, position
            state.push(ids[:, position])


def test_prompts_in_slices(monkeypatch):
    network = random_blt()
    ids = network.led(ids_of(TEXTS))
    whole = np.array(network.head(network.decode(ids))[:, -1])
    for rows in (4, 28, 128):  # of four texts together
        monkeypatch.setattr("marlin_cli.engine.latent_decoding.ROWS_AT_ONCE", rows)
        assert np.abs(np.array(LatentRows(network, 4).read(ids)) - whole).max() < 1e-4


def test_texts_that_leave_do_not_disturb_the_others():
    network = random_blt()
    ids = network.led(ids_of(TEXTS))
    rows, alone = LatentRows(network, 4), LatentRows(network, 1)
    rows.read(ids[:, :30])
    rows.keep([2, 0])
    alone.read(ids[2:3, :30])
    for position in range(30, 60):
        together = np.array(rows.read(ids[:, position : position + 1][mx.array([2, 0])]))
        assert np.abs(together[0] - np.array(alone.read(ids[2:3, position : position + 1]))[0]).max() < 1e-4
    assert rows.patches[0] == alone.patches[0] and len(set(rows.patches)) == 2


def test_bytes_keep_a_window_and_patches_all_their_rows():
    network = random_blt(max_bytes=4000)
    rows, held = LatentRows(network, 1), []
    for _ in range(3):
        rows.read(mx.random.randint(4, 260, (1, 400)))
        held.append(rows.nbytes)
    of_a_patch = 2 * 2 * 64 * 4  # keys and values of two layers in float32
    patches = rows.patches[0]
    assert patches > 100 and held[-1] < patches * of_a_patch + 100_000
    assert rows._encoder[0].nbytes <= 2 * 16 * 2 * 32 * 4 + 1  # at most two windows


def test_bits_of_a_cache_are_refused():
    with pytest.raises(UsageError, match="--kv-bits: what a Byte Latent Transformer remembers keeps its own type"):
        latent_rows(random_blt(), 1, CacheBits(8, 8))
