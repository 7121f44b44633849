"""ByGPT5: what it makes of given bytes, and bytes that go on from a prompt, alone and in a batch."""

import math

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import BYGPT5, random_bygpt5

from marlin_cli.engine.byte_decoding import bits_of, generate, logits_of, prompt_ids
from marlin_cli.engine.generation import Stopping
from marlin_cli.engine.sampling import Sampling
from marlin_cli.errors import ConfigError, InputError, UsageError
from marlin_cli.models.bygpt5 import ByGPT5Config

DATA = "Bytes, é 東\x00.".encode()


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
    logits = logits_of(network, DATA)
    assert logits.shape == (len(DATA), 384)
    for index in range(len(DATA)):
        before = [byte + 3 for byte in DATA[:index]]
        ids = [1, *before] if starts_all or not before else before
        assert mx.allclose(network(mx.array([ids]))[0, -1], logits[index], atol=1e-4)
    assert logits_of(network, b"").shape == (0, 384)


def test_bits_of_windows():
    network = random_bygpt5()
    bits = bits_of(network, DATA, 5)
    for start in range(0, len(DATA), 5):
        window = DATA[start : start + 5]
        logits = np.array(logits_of(network, window), dtype=np.float64)
        for index, byte in enumerate(window):
            cost = np.log(np.exp(logits[index]).sum()) - logits[index, byte + 3]
            assert bits[start + index] == pytest.approx(cost / math.log(2), abs=1e-4)
    assert bits_of(network, b"", 5).shape == (0,)


def test_prompts_alone_and_in_a_batch():
    network = random_bygpt5()
    prompts = [prompt_ids(network.config, text) for text in (b"abc", b"", b"xyz", b"a longer one")]
    data, reasons = collect(generate(network, prompts, Stopping(40), Sampling()))
    for stream, prompt in enumerate(prompts):
        assert data[stream] == greedy(network, prompt, 40)
    for sampling in (Sampling(), Sampling(temperature=0.9, top_k=50, seed=3)):
        together, _ = collect(generate(network, prompts, Stopping(20), sampling))
        for stream, prompt in enumerate(prompts):
            assert collect(generate(network, [prompt], Stopping(20), sampling))[0][0] == together[stream]
    assert set(reasons) == {0, 1, 2, 3}


def test_the_ends_of_a_stream():
    network = random_bygpt5(max_bytes=12)
    prompt = prompt_ids(network.config, b"abcd")
    whole, reasons = collect(generate(network, [prompt], Stopping(100), Sampling()))
    assert reasons == {0: "context"} and len(whole[0]) <= 8
    assert collect(generate(network, [prompt], Stopping(0), Sampling())) == ({0: b""}, {0: "length"})
    assert collect(generate(network, [prompt_ids(network.config, b"x" * 12)], Stopping(5), Sampling()))[1] == {0: "context"}
    stop = whole[0][2:4]
    data, reasons = collect(generate(network, [prompt], Stopping(100, (stop,)), Sampling()))
    assert data[0] == whole[0][: whole[0].index(stop)] and reasons == {0: "stop"}
    first = int(network(mx.array([prompt]))[0, -1].argmax())
    for ends in ({"end_id": first}, {"answer_end_ids": (2, first)}):
        ending = random_bygpt5(**ends)
        assert collect(generate(ending, [prompt], Stopping(5), Sampling())) == ({0: b""}, {0: "special"})


def test_styles_are_single_ids():
    config = random_bygpt5(vocab_size=400, starts_all=True, start_id=1).config
    assert prompt_ids(config, b"<extra_id_3>a", sentinels=True) == [1, 262, 100]
    assert len(prompt_ids(config, b"<extra_id_3>a")) == 14
    assert prompt_ids(random_bygpt5().config, b"") == [0]


def test_what_cannot_be_read_is_one_line():
    network = random_bygpt5(max_bytes=4)
    with pytest.raises(InputError, match="has 5 bytes, the model's context is 4"):
        logits_of(network, b"abcde")
    for prompt in ([], [5] * 5):
        with pytest.raises(UsageError, match="context is 1 to 4"):
            list(generate(network, [prompt], Stopping(1), Sampling()))


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
