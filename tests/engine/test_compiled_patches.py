"""Whole patches as one compiled graph: the bytes of decoding operation by operation. Its kernels have tests of their own."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine import decoding, whole_patches
from marlin_cli.engine.cache import KeyValueCache
from marlin_cli.engine.compiled_patches import TAIL_ROWS, CompiledPatches, compiled_patches
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import metal_few_rows
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import QuantizationSettings

SHAPES = {
    "prefix": {},
    "learned positions, rotation in patches": {"global_positions": "learned", "local_positions": "learned+rope"},
    "grouped heads, window, no gate": {"global_kv_heads": 1, "local_kv_heads": 1, "ffn": "gelu", "attention_window": 5},
    "layernorm, neighbours, biases": {"norm": "layernorm", "rope_interleaved": True, "ffn_bias": True},
    "norms of heads, variance": {"qk_norm": True, "norm": "variance", "local_positions": "none"},
}


@pytest.fixture
def by_patches(monkeypatch):
    """Lets patches be decoded whole whatever the device is, but not compiled; returns the decoders that were made."""
    made = []
    monkeypatch.setattr(mx, "compile", lambda function: function)

    def patch_decoder(network, streams, bits):
        made.append(compiled_patches(network, streams))
        return made[-1]

    monkeypatch.setattr(decoding, "patch_decoder", patch_decoder)
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    return made


COMPILE = mx.compile


def random_bytes(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).tobytes()


def generated(network, prompts, sampling, max_bytes=60, stop=()):
    streams, reasons = [b""] * len(prompts), {}
    for piece in generate(network, prompts, Stopping(max_bytes, stop), sampling, None):
        streams[piece.stream] += piece.data
        reasons[piece.stream] = piece.stop_reason or reasons.get(piece.stream)
    return streams, reasons


def by_operations(monkeypatch, network, prompts, sampling, **how):
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "patch_decoder", lambda *_: None)
        return generated(network, prompts, sampling, **how)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def network(request, random_network, small_sizes):
    return random_network(MegaByteConfig(**{**small_sizes, "max_bytes": 400, **request.param}))


@pytest.mark.parametrize("prompt_bytes", [0, 3, 4, 17])
def test_greedy_bytes(network, prompt_bytes, by_patches, monkeypatch):
    prompts = [random_bytes(prompt_bytes + seed, prompt_bytes) for seed in range(3)]
    found = generated(network, prompts, Sampling())
    assert isinstance(by_patches[0], CompiledPatches)
    assert found == by_operations(monkeypatch, network, prompts, Sampling())


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.3, marks=pytest.mark.slow)])
def test_compiled(random_network, small_sizes, temperature, by_patches, monkeypatch):
    """On a CPU a C++ compiler takes its time for it, so there are few of these."""
    network = random_network(MegaByteConfig(**{**small_sizes, "max_bytes": 400}))
    prompts, sampling = [random_bytes(seed, 4 * seed + 1) for seed in range(3)], Sampling(temperature, top_k=40)
    expected = by_operations(monkeypatch, network, prompts, sampling)
    monkeypatch.setattr(mx, "compile", COMPILE)
    assert generated(network, prompts, sampling) == expected


def test_prompts_of_unequal_length(network, by_patches, monkeypatch):
    prompts = [random_bytes(seed, 4 * seed + 1) for seed in range(4)]
    assert generated(network, prompts, Sampling()) == by_operations(monkeypatch, network, prompts, Sampling())


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_drawn_bytes(network, filters, by_patches, monkeypatch):
    sampling = Sampling(1.3, seed=5, **filters)
    prompts = [b"ab", b"abcdef"]
    found = generated(network, prompts, sampling)
    assert found == by_operations(monkeypatch, network, prompts, sampling) and len(set(found[0][0])) > 3


def test_rows_go_from_the_tail_to_the_cache_and_on(random_network, small_sizes, by_patches, monkeypatch):
    """More patches than the tail has rows, and than the storage had room for."""
    network = random_network(MegaByteConfig(**{**small_sizes, "max_bytes": 4 * 400}))
    monkeypatch.setattr("marlin_cli.engine.cache.ROWS_PER_STEP", 24)
    monkeypatch.setattr(KeyValueCache.__init__, "__defaults__", (None, 24))
    wanted = 4 * (2 * TAIL_ROWS + 7)
    found = generated(network, [b"some prompt"], Sampling(), max_bytes=wanted)
    assert len(found[0][0]) == wanted
    assert found == by_operations(monkeypatch, network, [b"some prompt"], Sampling(), max_bytes=wanted)


def test_streams_that_stop_in_a_patch_leave_the_others_alone(network, by_patches, monkeypatch):
    prompts = [random_bytes(seed, 9) for seed in range(4)]
    whole = by_operations(monkeypatch, network, prompts[:1], Sampling())[0][0]
    stop = (whole[5:7],)
    found = generated(network, prompts, Sampling(), stop=stop)
    assert found == by_operations(monkeypatch, network, prompts, Sampling(), stop=stop) and found[1][0] == "stop"


def test_the_end_of_the_context(network, by_patches, monkeypatch):
    for left in (1, 4, 9):
        prompts = [random_bytes(left, 400 - left)]
        found = generated(network, prompts, Sampling())
        assert found == by_operations(monkeypatch, network, prompts, Sampling()) and found[1] == {0: "context"}


@pytest.mark.parametrize("format", FORMATS.keys())
def test_packed_weights(random_network, small_sizes, format, by_patches, monkeypatch):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64, "local_dim": 64}))
    packed = quantize_network(network, QuantizationSettings(global_format=format, local_format=format)).network
    prompts = [b"some", b"bytes"]
    assert generated(packed, prompts, Sampling()) == by_operations(monkeypatch, packed, prompts, Sampling())


def test_a_patch_that_was_queued_too_far_is_taken_back(random_network, small_sizes, by_patches):
    """Bytes that are pushed follow what was read, not what was queued."""
    network = random_network(MegaByteConfig(**small_sizes))
    state, sampling = Lockstep(network, [b"abcd"]), Sampling(1.0, seed=3)
    noise = Noise(3, 256)
    first = bytes(np.array(state.advance(sampling, noise, 40)).reshape(-1).tolist())
    state.push(mx.array([65]))
    again = Lockstep(network, [b"abcd" + first + b"A"])
    assert mx.allclose(state.logits, again.logits, atol=1e-5)
    rest, fresh = np.array(noise.take(2)), Noise(3, 256)
    fresh.take(4)
    assert np.array_equal(rest, np.array(fresh.take(2)))


def test_bytes_of_the_cache(random_network, small_sizes, by_patches, monkeypatch):
    network = random_network(MegaByteConfig(**small_sizes))
    state = Lockstep(network, [b"abcdefgh"])
    for _ in range(3):
        state.advance(Sampling(), Noise(0, 256), 40)
    found = state.cache_bytes["global"]
    monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
    assert found == Lockstep(network, [b"abcdefgh" + bytes(12 + 4)]).cache_bytes["global"]  # one patch is queued ahead


def test_what_goes_operation_by_operation(random_network, small_sizes, each_config):
    network = random_network(each_config)
    known = each_config.layout == "prefix" and not each_config.token_shift
    assert (compiled_patches(network, 1) is not None) == known
    assert compiled_patches(network, metal_few_rows.MOST_STREAMS + 1) is None
    assert whole_patches.patch_decoder(network, 1) is None  # this is no Metal


def test_packed_caches_go_operation_by_operation(random_network, small_sizes, monkeypatch):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64}))
    monkeypatch.setattr(whole_patches, "gpu", lambda: "metal")
    assert whole_patches.patch_decoder(network, 1) is not None
    assert whole_patches.patch_decoder(network, 1, CacheBits(8, 8)) is None
