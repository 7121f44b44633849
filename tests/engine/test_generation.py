"""Generation: batches equal single runs, stop sequences, limits, and sampling."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Noise, Sampling, sample
from marlin_cli.engine.stopping import StopMatcher, Stopping
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig


def run(network, prompts, stopping, sampling=None):
    results = [b""] * len(prompts)
    reasons = [None] * len(prompts)
    for piece in generate(network, prompts, stopping, sampling or Sampling()):
        assert reasons[piece.stream] is None, "a piece after the end"
        results[piece.stream] += piece.data
        reasons[piece.stream] = piece.stop_reason
    return results, reasons


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, seed=3)])
def test_a_batch_gives_what_each_prompt_gives_alone(each_network, sampling):
    prompts = [b"", b"a", b"abcd", b"abcdefghi", b"0123456789abcdef", b"xy", b"\x00\xff\x80"]
    together, reasons = run(each_network, prompts, Stopping(20), sampling)
    assert reasons == ["length"] * len(prompts)
    for prompt, expected in zip(prompts, together, strict=True):
        assert run(each_network, [prompt], Stopping(20), sampling)[0][0] == expected
        assert len(expected) == 20


def test_greedy_takes_the_likeliest_byte_of_the_full_pass(each_network):
    prompt = b"prompt"
    output = run(each_network, [prompt], Stopping(12))[0][0]
    data = list(prompt)
    for byte in output:
        assert byte == each_network(mx.array([data + [0]]))[0, len(data)].argmax().item()
        data.append(byte)


def test_a_stop_sequence_ends_a_stream_and_is_left_out(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    free = run(network, [b"ab", b"abc"], Stopping(30))[0]
    stop = free[0][7:10]
    cut = free[0].index(stop)
    results, reasons = run(network, [b"ab", b"abc"], Stopping(30, (stop,)))
    assert results[0] == free[0][:cut] and reasons[0] == "stop"
    assert results[1] == (free[1].split(stop)[0])


def test_the_end_of_the_context_ends_a_stream(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    results, reasons = run(network, [b"x" * 90, b"x" * 96, b"y"], Stopping(10))
    assert [len(result) for result in results] == [6, 0, 10]
    assert reasons == ["context", "context", "length"]
    with pytest.raises(UsageError, match="the prompt has 97 bytes, but the model's context is 96"):
        run(network, [b"x" * 97], Stopping(10))


def test_no_bytes_are_asked_for(random_network, small_sizes):
    assert run(random_network(MegaByteConfig(**small_sizes)), [b"x"], Stopping(0)) == ([b""], ["length"])


def test_a_special_id_ends_a_stream(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes, vocab_size=300))
    network.output.weight = mx.concatenate([network.output.weight[:256] * 0, network.output.weight[256:]])
    results, reasons = run(network, [b"abc"], Stopping(50))
    assert reasons == ["special"] and len(results[0]) < 50


@pytest.mark.parametrize(
    ("sequences", "data", "freed"),
    [
        ((b"ab",), b"xaab", b"xa"),
        ((b"aab",), b"aaab", b"a"),
        ((b"abab", b"ba"), b"aba", b"a"),
        ((b"\x00",), b"ab\x00", b"ab"),
        ((b"ab", b"xabc"), b"xab", b"x"),
    ],
)
def test_bytes_are_held_only_while_they_may_begin_a_stop(sequences, data, freed):
    matcher = StopMatcher(sequences)
    out = b""
    for byte in data:
        part, stopped = matcher.push(byte)
        out += part
    assert stopped and out == freed and matcher.flush() == b""


def test_held_bytes_come_out_when_no_stop_follows():
    matcher = StopMatcher((b"abc",))
    assert [matcher.push(byte)[0] for byte in b"xab"] == [b"x", b"", b""]
    assert matcher.flush() == b"ab"


def test_filters_keep_what_they_say():
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    noise = Noise(0, 4)
    seen = {name: set() for name in ("top_k", "top_p", "min_p", "all")}
    settings = {
        "top_k": Sampling(1.0, top_k=2), "top_p": Sampling(1.0, top_p=0.7), "min_p": Sampling(1.0, min_p=0.25),
        "all": Sampling(1.0),
    }  # fmt: skip
    for _ in range(200):
        now = noise.take(1)[0]
        for name, each in settings.items():
            seen[name].add(sample(logits, each, now).item())
    assert seen == {"top_k": {0, 1}, "top_p": {0, 1}, "min_p": {0, 1, 2}, "all": {0, 1, 2, 3}}


def test_draws_follow_the_probabilities():
    probabilities = np.array([0.6, 0.3, 0.1])
    noise = Noise(1, 3)
    counts = np.zeros(3)
    for _ in range(1500):
        counts[sample(mx.log(mx.array(probabilities[None])), Sampling(1.0), noise.take(1)[0]).item()] += 1
    assert np.abs(counts / 1500 - probabilities).max() < 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_k": -1}, "top_k"),
     ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"min_p": 2.0}, "min_p")],
)  # fmt: skip
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**values)
