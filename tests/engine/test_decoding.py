"""Cached decoding equals the full forward pass at every byte, alone and in ragged batches."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine import decoding
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig

TOLERANCE = 1e-5


def random_bytes(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).tobytes()


def full_logits(network, data: bytes) -> np.ndarray:
    return np.array(network(mx.array(np.frombuffer(data, dtype=np.uint8).astype(np.int32))[None])[0])


@pytest.mark.parametrize("prompt_bytes", [0, 1, 3, 4, 5, 8, 9, 16, 17, 33])
def test_cached_decoding_equals_the_full_pass(each_network, prompt_bytes):
    data = random_bytes(0, 60)
    full = full_logits(each_network, data)
    state = Lockstep(each_network, [data[:prompt_bytes]])
    if prompt_bytes == 0 and each_network.config.layout == "megabyte_pytorch":
        full[0] = np.array(each_network.logits_of_nothing(1)[0])  # it generates from nothing as it does not train
    for position in range(prompt_bytes, 50):
        assert np.abs(np.array(state.logits[0]) - full[position]).max() < TOLERANCE, position
        state.push(mx.array([data[position]]))


def test_streams_of_unequal_length_decode_as_alone(each_network):
    patch = each_network.config.patch_size
    lengths = [2 * patch + 1, 5 * patch + 1, 1, patch + 1]
    data = [random_bytes(seed, 90) for seed in range(4)]
    full = [full_logits(each_network, each) for each in data]
    streams = [0, 1, 2, 3]
    state = Lockstep(each_network, [each[:length] for each, length in zip(data, lengths, strict=True)])
    for step in range(24):
        if step == 10:
            state.keep([3, 0, 1])
            streams = [3, 0, 1]
        for row, stream in enumerate(streams):
            expected = full[stream][lengths[stream] + step]
            assert np.abs(np.array(state.logits[row]) - expected).max() < TOLERANCE, (step, stream)
        state.push(mx.array([data[stream][lengths[stream] + step] for stream in streams]))


def test_a_prompt_longer_than_a_prefill_chunk_is_read_in_pieces(each_network, monkeypatch):
    data = random_bytes(3, 61)
    whole = Lockstep(each_network, [data, data[:33]] if each_network.config.patch_size == 4 else [data]).logits
    monkeypatch.setattr(decoding, "PREFILL_ROWS", 3)
    pieces = Lockstep(each_network, [data, data[:33]] if each_network.config.patch_size == 4 else [data]).logits
    assert mx.abs(whole - pieces).max().item() < TOLERANCE


def test_decoding_stops_growing_at_the_end_of_the_context(each_network):
    config = each_network.config
    data = random_bytes(4, config.max_bytes)
    state = Lockstep(each_network, [data[:-1]])
    assert np.abs(np.array(state.logits[0]) - full_logits(each_network, data)[-1]).max() < TOLERANCE
    state.push(mx.array([data[-1]]))
    assert state.positions == [config.max_bytes]


def test_the_local_cache_is_a_patch_long_and_the_global_one_grows(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    state = Lockstep(network, [b""])
    sizes = []
    for _ in range(40):
        state.push(mx.array([65]))
        mx.eval(state.logits)
        sizes.append(state.cache_bytes)
    row_bytes = 2 * 4 * network.config.global_dim * network.config.global_layers
    assert [size["global"] // row_bytes for size in sizes] == [1 + (n + 1) // 4 for n in range(40)]
    local_row = 2 * 4 * network.config.local_dim * network.config.local_layers
    assert {size["local"] // local_row for size in sizes} == {1, 2, 3, 4}


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.35)])
def test_a_packed_global_cache_is_small_and_close(random_network, small_sizes, bits, tolerance):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64, "max_bytes": 400}))
    data = random_bytes(5, 300)
    plain, packed = (Lockstep(network, [data], CacheBits(b, b)) for b in (16, bits))
    for byte in random_bytes(6, 20):
        plain.push(mx.array([byte]))
        packed.push(mx.array([byte]))
    reference = np.array(plain.logits)
    assert np.abs(np.array(packed.logits) - reference).max() < tolerance * np.abs(reference).max()
    # float32 rows here: 4 bits and an 8-bit scale for 16 (nvfp4), or 8 bits and one for 32 (mxfp8).
    assert packed.cache_bytes["global"] / plain.cache_bytes["global"] == (bits + 8 / (16 if bits == 4 else 32)) / 32


@pytest.mark.parametrize(
    ("head_dim", "bits", "message"),
    [(8, 4, "do not fit a head_dim of 8"), (16, 8, "do not fit a head_dim of 16"), (352, 4, "no Hadamard rotation"),
     (64, 5, "must be 4, 8 or 16")],
)  # fmt: skip
def test_cache_bits_that_do_not_fit_are_refused(random_network, small_sizes, head_dim, bits, message):
    network = random_network(MegaByteConfig(**small_sizes, global_head_dim=head_dim))
    with pytest.raises(UsageError, match=message):
        Lockstep(network, [b"x"], CacheBits(bits, bits))
