"""ByGPT5: what it makes of given bytes, and bytes that go on from a prompt, alone and in a batch."""

import math

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import BYGPT5, random_bygpt5

from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.byte_decoding import ByteByByte
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.scoring import bits_of
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import CheckpointError, ConfigError, UsageError
from marlin_cli.models import preset
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.bygpt5_steps import BYGPT5 as ARCHITECTURE
from marlin_cli.ops.device import choose_device

DATA = "Bytes, é 東\x00.".encode()


def model_of(network):
    return ContinuingModel(network, choose_device("cpu"))


def collect(pieces):
    data, reasons = {}, {}
    for piece in pieces:
        data[piece.stream] = data.get(piece.stream, b"") + piece.data
        if piece.stop_reason:
            reasons[piece.stream] = piece.stop_reason
    return data, reasons


def greedy(network, ids, steps):
    """Without a cache, an id at a time."""
    ids, data = list(ids), b""
    for _ in range(steps):
        value = int(network(mx.array([ids]))[0, -1].argmax())
        if value == network.config.end_id:
            break
        ids.append(value)
        data += bytes([value - 3]) if 3 <= value < 259 else b""
    return data


@pytest.mark.parametrize("starts_all", [False, True])
def test_a_row_is_of_the_bytes_before_it(starts_all):
    network = random_bygpt5(starts_all=starts_all, start_id=1)
    logits = model_of(network).logits(DATA)
    assert logits.shape == (len(DATA), 384)
    for index in range(len(DATA)):
        before = [byte + 3 for byte in DATA[:index]]
        ids = [1, *before] if starts_all or not before else before
        assert mx.allclose(network(mx.array([ids]))[0, -1], logits[index], atol=1e-4)
    assert model_of(network).logits(b"").shape == (0, 384)
    windows = mx.array([list(DATA), list(reversed(DATA))])
    assert mx.allclose(network.predictions(windows)[0], logits, atol=1e-5)


def test_bits_of_windows():
    network = random_bygpt5()
    bits = bits_of(network, np.frombuffer(DATA, dtype=np.uint8), 5)
    for start in range(0, len(DATA), 5):
        window = DATA[start : start + 5]
        logits = np.array(model_of(network).logits(window), dtype=np.float64)
        for index, byte in enumerate(window):
            cost = np.log(np.exp(logits[index]).sum()) - logits[index, byte + 3]
            assert bits[start + index] == pytest.approx(cost / math.log(2), abs=1e-4)
    assert bits_of(network, np.zeros(0, dtype=np.uint8), 5).shape == (0,)
    assert model_of(network).bits_per_byte(DATA, 5) == pytest.approx(bits.mean(), abs=1e-6)


@pytest.mark.parametrize("bits", [CacheBits(), CacheBits(8, 8), CacheBits(4, 8)])
def test_prompts_alone_and_in_a_batch(bits):
    network = random_bygpt5(head_dim=32)
    prompts = [b"abc", b"", b"xyz", b"a longer one"]
    data, reasons = collect(generate(network, prompts, Stopping(40), Sampling(), bits))
    for stream, prompt in enumerate(prompts):
        if bits == CacheBits():
            assert data[stream] == greedy(network, [byte + 3 for byte in prompt] or [0], 40)
    for sampling in (Sampling(), Sampling(temperature=0.9, top_k=50, seed=3)):
        together, _ = collect(generate(network, prompts, Stopping(20), sampling, bits))
        for stream, prompt in enumerate(prompts):
            assert collect(generate(network, [prompt], Stopping(20), sampling, bits))[0][0] == together[stream]
    assert set(reasons) == {0, 1, 2, 3}


@pytest.mark.parametrize(("bits", "least", "most"), [(CacheBits(), 0, 1e-4), (CacheBits(8, 8), 1e-4, 0.3)])
def test_a_packed_cache_is_nearly_the_plain_one(bits, least, most):
    network = random_bygpt5(head_dim=32)
    state = ByteByByte(network, [[byte + 3 for byte in DATA]] * 2, bits)
    for byte in b"more":
        state.push(mx.array([byte + 3] * 2))
    expected = network(mx.array([[byte + 3 for byte in DATA + b"more"]]))[:, -1]
    assert least <= mx.abs(state.logits - expected).max().item() < most
    plain = 2 * 2 * (2 * 2 * 4 * 32) * (len(DATA) + 4)  # layers, streams; keys and values, heads, float32
    assert state.cache_bytes == {"decoder": plain if bits == CacheBits() else plain * 33 // 128}


def test_bits_that_no_head_has():
    with pytest.raises(UsageError, match="do not fit a head_dim of 16"):
        list(generate(random_bygpt5(), [b"a"], Stopping(1), Sampling(), CacheBits(8, 8)))


def test_a_prompt_in_blocks(monkeypatch):
    network = random_bygpt5()
    prompt = [[byte + 3 for byte in DATA]]
    whole = ByteByByte(network, prompt).logits
    monkeypatch.setattr("marlin_cli.engine.byte_decoding.SCORES_AT_ONCE", 3 * 2 * len(DATA))
    assert mx.allclose(ByteByByte(network, prompt).logits, whole, atol=1e-4)


def test_streams_that_are_kept():
    network = random_bygpt5()
    state = ByteByByte(network, [[5, 6], [7, 8], [9, 10]])
    state.keep([2, 0])
    state.push(mx.array([20, 30]))
    for row, ids in enumerate(([9, 10, 20], [5, 6, 30])):
        assert mx.allclose(state.logits[row], network(mx.array([ids]))[0, -1], atol=1e-4)
    assert state.positions == [3, 3] and state.advance(Sampling(), Noise(0, 384), 5).shape == (2, 1)


def test_the_ends_of_a_stream():
    network = random_bygpt5(max_bytes=12)
    whole, reasons = collect(generate(network, [b"abcd"], Stopping(100), Sampling()))
    assert reasons == {0: "context"} and len(whole[0]) <= 8
    assert collect(generate(network, [b"abcd"], Stopping(0), Sampling())) == ({0: b""}, {0: "length"})
    assert collect(generate(network, [b"x" * 12], Stopping(5), Sampling()))[1] == {0: "context"}
    stop = whole[0][2:4]
    data, reasons = collect(generate(network, [b"abcd"], Stopping(100, (stop,)), Sampling()))
    assert data[0] == whole[0][: whole[0].index(stop)] and reasons == {0: "stop"}
    first = int(network(mx.array([[byte + 3 for byte in b"abcd"]]))[0, -1].argmax())
    for ends in ({"end_id": first}, {"answer_end_ids": (2, first)}):
        ending = random_bygpt5(**ends)
        assert collect(generate(ending, [b"abcd"], Stopping(5), Sampling())) == ({0: b""}, {0: "special"})


def test_a_mark_before_a_text_takes_no_byte_of_the_context():
    network = random_bygpt5(starts_all=True, start_id=1, max_bytes=6)
    whole, reasons = collect(generate(network, [b"abcde"], Stopping(9), Sampling()))
    assert len(whole[0]) <= 1 and reasons == {0: "context"}
    assert model_of(network).logits(b"abcdef").shape == (6, 384)


def test_an_id_that_is_no_byte_is_read_on():
    """It gives nothing, or its name where names are asked for; a stop sequence does not go on over it."""
    network = random_bygpt5()
    hidden = network.decode(mx.array([[100, 101]]))[0, -1].sum().item()
    network.output.weight = mx.zeros_like(network.output.weight)
    network.output.weight[259 + 5] = hidden  # the likeliest after the prompt; the pad, which is no byte either, later
    data, reasons = collect(generate(network, [b"ab"], Stopping(3, (b"zz",)), Sampling()))
    assert (data, reasons) == ({0: b""}, {0: "length"})
    assert collect(generate(network, [b"ab"], Stopping(1), Sampling(), sentinels=True))[0] == {0: b"<extra_id_5>"}


def test_styles_are_single_ids():
    network = random_bygpt5(vocab_size=400, starts_all=True, start_id=1)
    ids = ARCHITECTURE.continuing.ids
    assert ids(network.config, b"<extra_id_3>a", True) == [262, 100] and len(ids(network.config, b"<extra_id_3>a", False)) == 13
    model = model_of(network)
    assert model.generate(b"<extra_id_3>a", 9, sentinels=True) != model.generate(b"<extra_id_3>a", 9)
    assert network.led(mx.array([[262, 100]])).tolist() == [[1, 262, 100]]


def test_what_cannot_be_read_is_one_line():
    network = random_bygpt5(max_bytes=4)
    with pytest.raises(UsageError, match="5 bytes do not fit the model's context of 4"):
        model_of(network).logits(b"abcde")
    with pytest.raises(UsageError, match="has 5 bytes, but the model's context is 4"):
        list(generate(network, [b"abcde"], Stopping(1), Sampling()))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9)])
def test_numbers_that_are_none(sampling):
    network = random_bygpt5()
    network.decoder.layers[1].ffn.down_proj.weight[0, 0] = mx.nan
    with pytest.raises(CheckpointError, match="not finite"):
        list(generate(network, [b"a"], Stopping(4), sampling))
    with pytest.raises(CheckpointError, match="not finite"):
        bits_of(network, np.frombuffer(DATA, dtype=np.uint8), 5)


@pytest.mark.parametrize(("name", "layers"), [("small", 4), ("base", 6), ("medium", 12)])
def test_presets(name, layers):
    config = preset(f"bygpt5-{name}")
    assert isinstance(config, ByGPT5Config) and (config.layers, config.vocab_size) == (layers, 384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"layers": 1 << 20}, "layers is 1,048,576, more than the 256"),
        ({"vocab_size": 200}, "vocab_size must hold"),
        ({"start_id": 384}, "start_id must be"),
        ({"heads": 0}, "heads must be"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ByGPT5Config(**BYGPT5 | changes)
