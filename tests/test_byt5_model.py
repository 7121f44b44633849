"""`ByT5Model` on small random networks: answers alone and in a batch, caches, packing, saving, encoders alone."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from marlin_cli import ByT5Config, ByT5Model, load
from marlin_cli.engine import sampling as sampling_module
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling, draw, without
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import CheckpointError, ConfigError, UsageError
from marlin_cli.models.byt5_ids import bytes_of_ids, bytes_with_sentinels, ids_of_bytes, ids_with_sentinels

SMALL = {"d_model": 64, "ffn_dim": 64, "heads": 2, "head_dim": 32, "encoder_layers": 3, "decoder_layers": 2}
INPUTS = [b"a", b"", b"\x00\xff binary", "ragged \N{LATIN SMALL LETTER E WITH ACUTE}".encode() * 4]


def random_model(**changes):
    model = ByT5Model.from_config(ByT5Config(**{**SMALL, **changes}), device="cpu")
    mx.random.seed(3)
    parameters = tree_map(
        lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5), model.network.parameters()
    )
    model.network.update(parameters)
    for layer in model.network.decoder.layers if model.config.decoder_layers else ():
        layer.cross.o_proj.weight = layer.cross.o_proj.weight * 8  # or all inputs would have one answer
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


def test_every_byte_goes_through_and_sentinels_are_reachable():
    data = bytes(range(256))
    assert bytes_of_ids(ids_of_bytes(data)) == data
    ids = ids_with_sentinels(b"a<extra_id_0>b<extra_id_124><extra_id_125>", 384)
    assert ids[:4] == [100, 259, 101, 383]
    assert bytes_with_sentinels(ids) == b"a<extra_id_0>b<extra_id_124><extra_id_125>"


def test_cached_decoding_is_the_full_pass(model):
    """Greedy answers are the likeliest ids of a teacher-forced pass over themselves."""
    for data in INPUTS:
        found = model.answers([data], AnswerLimits(12))[0][0]
        target = [model.config.start_id, *found.ids]
        logits = model.network(mx.array([[*ids_of_bytes(data), 1]]), mx.array([target]))[0]
        expected = mx.argmax(logits, axis=-1).tolist()
        assert list(found.ids) == expected[: len(found.ids)]
        if found.stop_reason == "end":
            assert expected[-1] == model.config.end_id


@pytest.mark.parametrize("factor", [1, 4])
def test_an_input_has_the_same_answer_alone_and_in_a_batch(factor):
    for pooling in ("mean", "max"):
        model = random_model(downsample_factor=factor, pooling=pooling, local_window=5)
        for sampling, beams in ((Sampling(), None), (Sampling(0.9, seed=4), None), (None, Beams(3, 2))):
            limits = AnswerLimits(10, min_length=3)
            together = model.answers(INPUTS, limits, sampling, beams)
            for index, data in enumerate(INPUTS):
                alone = model.answers([data], limits, sampling, beams)[0]
                assert [each.ids for each in together[index]] == [each.ids for each in alone]
                assert all(a.score == pytest.approx(b.score, abs=1e-3) for a, b in zip(together[index], alone, strict=True))
        assert len({answers[0].ids for answers in together}) > 1


def test_limits(model):
    data = INPUTS[3]
    free = model.answers([data], AnswerLimits(20, min_length=20))[0][0]
    assert len(free.ids) == 20 and free.stop_reason == "length"
    forced = model.answers([data], AnswerLimits(6, prefix=b"xyz"))[0][0]
    assert forced.data.startswith(b"xyz")
    bytes_there = [value for value in free.ids if 3 <= value < 259]
    stop = bytes_of_ids(bytes_there[2:4])
    stopped = model.generate(data, 20, min_length=20, stop=[stop])
    assert stopped == free.data[: free.data.index(stop)] or stop not in free.data
    pieces = list(model.pieces([data, b"b"], Stopping(9), Sampling()))
    assert b"".join(piece.data for piece in pieces if piece.stream == 0) == model.generate(data, 9)


def test_pieces_are_the_answer(model):
    """Prefixes, stop sequences and special ids too, whether sentinels are shown or not."""
    free = model.answers([INPUTS[3]], AnswerLimits(30, 30), Sampling(1.5, seed=2))[0][0]
    stops = [bytes([value - 3]) for value in free.ids[8:12] if 3 <= value < 259][:1]
    assert stops and any(value >= 259 for value in free.ids)
    for limits in (AnswerLimits(30, 30, b"xy"), AnswerLimits(30, 30, stop=(stops[0] + b"?", b"?" + stops[0], *stops))):
        for sentinels in (False, True):
            found = model.answers([INPUTS[3]], limits, Sampling(1.5, seed=2), sentinels=sentinels)[0][0]
            pieces = list(model.pieces([INPUTS[3]], limits, Sampling(1.5, seed=2), sentinels=sentinels))
            whole = bytes_with_sentinels(found.ids) if sentinels else found.data
            assert b"".join(piece.data for piece in pieces) == whole
            assert pieces[-1].stop_reason == found.stop_reason
    assert bytes(model.generate_stream(INPUTS[3], 30, min_length=30, temperature=1.5, seed=2)) == free.data


def test_beams_do_not_score_worse_than_greedy(model):
    for data in INPUTS:
        greedy = model.answers([data], AnswerLimits(8, min_length=8))[0][0]
        best = model.answers([data], AnswerLimits(8, min_length=8), None, Beams(16))[0][0]
        assert best.score >= greedy.score - 1e-3


def test_a_score_means_the_same_greedy_and_by_beams(model):
    for data in INPUTS:
        for limits in (AnswerLimits(8), AnswerLimits(8, min_length=8), AnswerLimits(8, prefix=b"xy")):
            greedy = model.answers([data], limits)[0][0]
            searched = model.answers([data], limits, None, Beams(1))[0][0]
            assert (searched.ids, searched.score) == (greedy.ids, pytest.approx(greedy.score, abs=1e-3))


def test_logits_bits_and_states(model):
    logits = model.logits(b"source", b"target")
    assert logits.shape == (7, 384) and logits.dtype == mx.float32
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = -sum(log_probabilities[row, value].item() for row, value in enumerate([*ids_of_bytes(b"target"), 1]))
    assert model.bits(b"source", b"target") == pytest.approx(expected / np.log(2), rel=1e-4)
    assert model.bits_per_byte(b"source", b"target") == pytest.approx(expected / np.log(2) / 6, rel=1e-4)
    assert model.encode(b"source").shape == (6, 64)


def test_packing_saving_and_loading(model, tmp_path):
    packed = model.quantize(bits=4, cross_bits=8, kv_bits=8)
    modes = {path: packed.quantization.get(path, packed.quantization) for path in (
        "encoder.layers.0.attention.q_proj", "encoder.layers.0.ffn.down_proj", "decoder.layers.1.cross.k_proj",
    )}  # fmt: skip
    assert [table["mode"] for table in modes.values()] == ["nvfp4", "mxfp8", "mxfp8"]
    assert packed.quantization["output"] is False
    packed.save(tmp_path / "packed")
    again = load(tmp_path / "packed", device="cpu")
    assert isinstance(again, ByT5Model) and again.kv_bits == 8 and again.config == model.config
    assert mx.array_equal(again.logits(b"ab", b"cd"), packed.logits(b"ab", b"cd"))
    assert again.answers(INPUTS, AnswerLimits(5))[0][0].ids == packed.answers(INPUTS, AnswerLimits(5))[0][0].ids


def test_packed_keys_and_values_of_the_input(model):
    plain = model.network.memory(model.network.encode(mx.array([ids_of_bytes(INPUTS[3])])))[0]
    from marlin_cli.engine.encoder_decoder import PackedMemory

    queries = mx.random.normal((1, 2, 3, 32))
    expected = np.array(plain.attend(queries))
    for bits, share, tolerance in ((4, 0.3, 0.3), (8, 0.6, 0.08)):
        packed = PackedMemory(plain, bits)
        assert packed.nbytes < share * plain.nbytes / 2
        error = np.abs(np.array(packed.attend(queries)) - expected)
        assert np.sqrt((error**2).mean() / (expected**2).mean()) < tolerance


def test_an_encoder_alone(tmp_path):
    encoder = random_model(decoder_layers=0)
    encoder.save(tmp_path / "encoder")
    again = load(tmp_path / "encoder", device="cpu")
    assert mx.allclose(again.encode(b"abc"), encoder.encode(b"abc"))
    for ask in (lambda: again.generate(b"abc"), lambda: again.logits(b"a", b"b")):
        with pytest.raises(UsageError, match="encoder alone"):
            ask()


def test_what_is_refused(model):
    with pytest.raises(UsageError, match="choose one"):
        model.answers([b"a"], None, Sampling(1.0), Beams())
    with pytest.raises(UsageError, match="max_bytes"):
        random_model(max_bytes=3).generate(b"abcd")
    with pytest.raises(CheckpointError, match="holds a MegaByte, which continues"):
        ByT5Model.from_pretrained("megabyte-demo")
    with pytest.raises(UsageError, match="float16"):
        ByT5Model.from_pretrained("byt5-demo", dtype=mx.float16)


# Several ends


def test_any_of_the_ends_ends_an_answer():
    """Greedily, drawn and in a batch: an answer is that of the model without its ends, cut where the first of them comes."""
    for sampling in (Sampling(), Sampling(0.9, seed=4)):
        free = [found.ids for (found,) in random_model(answer_end_ids=()).answers(INPUTS, AnswerLimits(12), sampling)]
        assert all(len(ids) == 12 for ids in free)
        ends = {max(ids, key=ids.index) for ids in free[2:]}  # what comes last for the first time
        expected = [next((ids[:n] for n, value in enumerate(ids) if value in ends), ids) for ids in free]
        # Greedily this model writes one id for ever.
        assert any((sampling.temperature == 0 or ids) and len(ids) < 12 for ids in expected)
        ended = random_model(answer_end_ids=tuple(sorted(ends)))
        for answers, ids in zip(ended.answers(INPUTS, AnswerLimits(12), sampling), expected, strict=True):
            assert answers[0].ids == ids
            assert answers[0].stop_reason == ("end" if len(ids) < 12 else "length")


@pytest.mark.parametrize("kernels", [True, False])
def test_none_of_the_ends_comes_before_the_least_length(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(sampling_module, "kernels", lambda: (None, "none"))
    free = random_model(answer_end_ids=()).answers(INPUTS, AnswerLimits(8))
    ends = {value for (found,) in free for value in found.ids}
    ended = random_model(answer_end_ids=tuple(sorted(ends)))
    for sampling, beams in ((Sampling(), None), (Sampling(0.9, seed=4), None), (None, Beams(3))):
        for answers in ended.answers(INPUTS, AnswerLimits(8, min_length=5), sampling, beams):
            assert not ends.intersection(answers[0].ids[:5]) and len(answers[0].ids) >= 5


def test_costs_are_those_before_ends_are_forbidden():
    """Without a kernel, with it: the same ids and costs, whatever is forbidden."""
    mx.random.seed(0)
    logits = mx.random.normal((5, 384))
    likeliest = mx.argsort(-logits, axis=-1)[:, :3].reshape(-1).tolist()
    expected = -(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for forbidden in ((), likeliest[:1], likeliest):
        ids, costs = draw(logits, [forbidden], [Sampling()], None)
        plain = mx.argmax(without(logits, forbidden), axis=-1).tolist()
        assert ids == plain and not set(ids).intersection(forbidden)
        assert costs == pytest.approx([expected[row, value].item() for row, value in enumerate(ids)], abs=1e-5)


def test_beams_end_at_any_of_the_ends():
    free = random_model(answer_end_ids=()).answers(INPUTS, AnswerLimits(10), None, Beams(1))
    first, second = free[0][0].ids[4], free[3][0].ids[6]
    ended = random_model(answer_end_ids=(first, second)).answers(INPUTS, AnswerLimits(10), None, Beams(1))
    for (before,), (after,) in zip(free, ended, strict=True):
        cut = next((n for n, value in enumerate(before.ids) if value in (first, second)), 10)
        assert after.ids == before.ids[:cut] and after.stop_reason == ("end" if cut < 10 else "length")


def test_inputs_and_targets_end_as_the_tokenizer_ends_them():
    one, other = random_model(), random_model(answer_end_ids=(40, 41))
    assert other.bits(b"source", b"target") == one.bits(b"source", b"target")
    assert mx.array_equal(other.logits(b"source", b"target"), one.logits(b"source", b"target"))
    assert not mx.array_equal(random_model(end_id=2).logits(b"source", b"target"), one.logits(b"source", b"target"))


@pytest.mark.parametrize("ends", [(), (1,), (13, 1), None])
def test_ends_are_kept(ends, tmp_path):
    model = random_model(answer_end_ids=ends)
    model.save(tmp_path / "saved")
    document = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert document.get("answer_end_ids") == (None if ends is None else list(ends))
    again = load(tmp_path / "saved", device="cpu").config
    assert again == model.config and again.answer_ends == ((1,) if ends is None else ends)


def test_ends_that_are_no_ids_are_refused():
    for ends in ((1, 384), (-1,)):
        with pytest.raises(ConfigError, match=r"answer_end_ids must be below vocab_size \(384\), found"):
            ByT5Config(**SMALL, answer_end_ids=ends)
