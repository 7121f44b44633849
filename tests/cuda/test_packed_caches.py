"""Whole stages over packed caches: rows packed as MLX packs them, pages that are added, and what decoding gives by them."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import packed_rows
import pytest
from cuda_emulator import OwnQueue, compiler, emulate
from test_stages import close, from_device, loaded, network_of, random_ids, to_device

from marlin_cli.engine import cache as engine_cache
from marlin_cli.engine import decoding
from marlin_cli.engine.cache import ROWS_PER_PAGE, CacheBits
from marlin_cli.engine.cuda_pages import PagesOnDevice
from marlin_cli.engine.cuda_patches import PatchDecoder, global_stage
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.stage_caches import GraphCache
from marlin_cli.engine.stopping import Stopping
from marlin_cli.ops import cuda_stages
from marlin_cli.ops.cuda_stages import takes_stage

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux here")]
WIDE = {"global_heads": 2, "max_bytes": 1024}  # heads of 32, and rows of two pages and more


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(engine_cache, "pack_rows", packed_rows.pack_rows)
    monkeypatch.setattr(decoding, "fuse", lambda network: None)


def with_small_values(network):
    """Half a head of values that are 0, others that have no scale in nvfp4, one among its subnormals, or a large one."""
    weight = network["global"].layers[0].attention.v_proj
    factors = np.ones(weight.weight.shape[0], np.float32)
    factors[:16], factors[16:24], factors[24:28], factors[28:32] = 0, 1e-7, -0.0, 1e-6
    factors[32:48], factors[48:] = 2e-3, 300
    weight.weight = weight.weight * mx.array(factors)[:, None]
    return network


CASES = [
    ({"global_kv_heads": 1, "qk_norm": True}, CacheBits(8, 4), 3),
    ({}, CacheBits(4, 4), 1), ({"attention_window": 2}, CacheBits(8, 8), 2), ({"rope_interleaved": True}, CacheBits(16, 4), 9),
    ({}, CacheBits(8, 16), 16),
]  # fmt: skip
EACH_CASE = pytest.mark.parametrize(
    ("options", "bits", "streams"),
    [pytest.param(*case, marks=[] if i < 2 or mx.cuda.is_available() else pytest.mark.slow) for i, case in enumerate(CASES)],
)


def check_steps(options, bits, streams):
    """Patches behind a cache that MLX began, some of it filler, in the last row of a page and in the next page."""
    network = with_small_values(network_of(**{**WIDE, **options}))
    stage = global_stage(network)
    if bits.is_packed:
        stage = replace(stage, key_bits=bits.keys, value_bits=bits.values, page_rows=ROWS_PER_PAGE)
    assert takes_stage(stage, streams)
    padding = mx.array([row % 2 for row in range(streams)]) if streams > 1 else None
    filler = [] if padding is None else padding.tolist()
    own, other = (GraphCache(network["global"], network.stages[0].config, False, filler, bits) for _ in range(2))
    begun = ROWS_PER_PAGE - 2
    rows = mx.random.normal((streams, begun, stage.dim), key=mx.random.key(1))
    for cache in (own, other):
        mx.eval(cache.run(rows))
    device, queue = loaded(stage, streams, network.config.patch_size)
    filled, pages = to_device(queue, padding), PagesOnDevice(bits)
    out = queue.allocate(streams * stage.last.rows * 4)
    for patch in range(4):
        ids = random_ids(streams, network.config.patch_size, patch + 1)[..., 0]
        hidden = other.run(network.token_rows(0, ids[:, None], 0, None))[:, -1]
        expected = network.to_next(0, hidden)[:, 0]
        if bits.is_packed:
            pages.use(own.layers, [(0, device)])
        else:
            device.set_caches([layer.with_room() for layer in own.layers])
        given = to_device(queue, ids)
        mx.synchronize()
        device.step(given.address, begun + patch, 0 if filled is None else filled.address, out.address)
        close(from_device(queue, out, np.float32).reshape(expected.shape), expected, 3e-5)
        for layer in own.layers:
            layer.wrote(1)
    assert own.nbytes == other.nbytes and own.layers[0].rows == begun + 4
    for mine, theirs in zip(own.layers, other.layers, strict=True):
        for part, wanted in zip(mine.stored(), theirs.stored(), strict=True):
            for array, right in zip(part, wanted, strict=True):
                if array.dtype == mx.float32:
                    close(array, right, 1e-5)
                else:
                    assert np.array_equal(np.array(array), np.array(right))


@EACH_CASE
def test_rows_are_packed_bit_for_bit(options, bits, streams):
    check_steps(options, bits, streams)


@pytest.mark.parametrize(
    ("bits", "looks"),
    [(CacheBits(), 50_000), *(pytest.param(CacheBits(8, 8), looks, marks=pytest.mark.slow) for looks in (50_000, 0))],
)
def test_many_rows_are_split_among_more_blocks(bits, looks, monkeypatch):
    """From the third patch on: what is few is joined of four parts. With values looked at, and with barriers."""
    monkeypatch.setattr(cuda_stages, "MOST_LOOKS", looks)
    if not mx.cuda.is_available():
        monkeypatch.setattr(cuda_stages, "multiprocessors", lambda: 7)
    check_steps({"global_heads": 1}, bits, 1)


FAULTS = {
    "a row beside its place": ("rows + seen % ROWS_A_PAGE, writes", "rows + (seen + 1) % ROWS_A_PAGE, writes"),
    "keys that are not turned": ("    Head::spread(head.key);\n", ""),
    "a scale that clips": ("return exponent + up;", "return exponent;"),
}


@pytest.mark.skipif(mx.cuda.is_available(), reason="it plants a fault in the emulator")
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if i == 0 else pytest.mark.slow) for i, name in enumerate(FAULTS)]
)
def test_a_fault_is_found(fault, monkeypatch):
    right, wrong = FAULTS[fault]

    def edit(text):
        assert "stack(" not in text or right in text
        return OwnQueue.__dict__["edit_as_it_was"](text).replace(right, wrong)

    monkeypatch.setattr(OwnQueue, "edit_as_it_was", OwnQueue.edit, raising=False)
    monkeypatch.setattr(OwnQueue, "edit", staticmethod(edit))
    with pytest.raises(AssertionError):
        check_steps(*CASES[0])


@pytest.mark.parametrize(
    ("bits", "sampling", "backwards"),
    [
        (CacheBits(8, 8), Sampling(1.3, top_k=50), False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [
            (CacheBits(4, 4), Sampling(), False), (CacheBits(4, 8), Sampling(), True),
        ]),
    ],
)  # fmt: skip
def test_bytes_are_those_of_operations(bits, sampling, backwards, monkeypatch):
    """Prompts that end inside a patch, a page that is added as they go on, and a stream that stops."""
    if not mx.cuda.is_available():
        monkeypatch.setattr(OwnQueue, "backwards", backwards)
    network = network_of(format="mxfp8", **WIDE)
    prompts = [bytes(range(97, 122)) * 20, b"abcd", b"", b"abcdefghi"]
    asked = []

    def generated(*stop):
        streams = [b""] * len(prompts)
        for piece in generate(network, prompts, Stopping(max_bytes=19, stop=stop), sampling, bits):
            streams[piece.stream] += piece.data
        return streams

    queue = PatchDecoder.queue
    monkeypatch.setattr(PatchDecoder, "queue", lambda *arguments: asked.append(1) or queue(*arguments))
    whole = generated()
    stop = whole[0][6:8]
    stopped = generated(stop)
    assert asked
    monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
    assert generated() == whole and {len(stream) for stream in whole} == {19}
    assert generated(stop) == stopped and len(stopped[0]) < 19


def test_what_was_queued_too_far_is_taken_back(monkeypatch):
    """Logits, and ids pushed, between whole patches of three streams and a filler, where a page ends."""
    network, sampling = network_of(format="mxfp8", **WIDE), Sampling(1.3, top_k=50, top_p=0.8, min_p=0.02)
    prompt = bytes(range(97, 97 + 4 * 21)) * 6  # 126 patches and the row that leads them
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(decoding, "patch_decoder", lambda *_: None)
        state, noise = Lockstep(network, [prompt, prompt[4:], prompt[8:]], CacheBits(8, 8)), Noise(0, 256)
        ids, logits = [], []
        for pushed in range(2):
            for _ in range(1 if whole else 4):
                ids += np.array(state.advance(sampling, noise, 64)).T.tolist()
            logits.append(np.array(state.logits))
            for byte in b"wxyz"[: 4 - 2 * pushed]:
                state.push(mx.array([byte] * 3))
        found.append((ids, np.stack(logits), state.positions, state.cache_bytes["global"]))
    (ids, logits, *rest), (expected_ids, expected_logits, *expected_rest) = found
    assert ids == expected_ids and rest == expected_rest
    assert np.abs(logits - expected_logits).max() < 1e-3
