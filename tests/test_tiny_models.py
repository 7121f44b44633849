"""A tiny model of every architecture: decoding is its full pass, a file is the model, and every command takes it."""

import json
import os
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from marlin_cli import cli, load
from marlin_cli.api import MODELS
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import QuantizationError, UsageError
from marlin_cli.models import architecture_of, continuing_of, linear_layers, part_of
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.ops.device import choose_device

DATA = "Bytes, é 東\x00 and more of them.".encode()
PROMPTS = [b"abc", b"", b"xyz", b"a longer one"]


def model_of(network):
    return MODELS[architecture_of(network).capability](network, choose_device("cpu"))


def predictions(network, data):
    """Logits [bytes, 256] of the bytes alone."""
    first = continuing_of(network).first_byte
    return model_of(network).logits(data)[:, first : first + 256]


def collect(pieces):
    data, reasons = {}, {}
    for piece in pieces:
        data[piece.stream] = data.get(piece.stream, b"") + piece.data
        if piece.stop_reason:
            reasons[piece.stream] = piece.stop_reason
    return data, reasons


# Continuing


def test_cached_decoding_is_the_full_pass(each_continuing):
    way, continuing = way_of(each_continuing), continuing_of(each_continuing)
    ids = continuing.ids(each_continuing.config, DATA, False)
    full = model_of(each_continuing).logits(DATA)
    for start in (1, 5, 17):
        state = way.begin(each_continuing, [ids[:start]], None)
        for position in range(start, len(ids)):
            assert mx.allclose(state.logits[0], full[position], atol=1e-4), (start, position)
            state.push(mx.array([ids[position]]))
        assert state.positions == [len(ids)] and sum(state.cache_bytes.values()) > 0
    assert mx.allclose(way.begin(each_continuing, [ids[:0]], None).logits[0], full[0], atol=1e-4)


def test_what_is_predicted_does_not_see_what_follows(each_continuing):
    changed = DATA[:7] + bytes(len(DATA) - 7)
    same = predictions(each_continuing, DATA) - predictions(each_continuing, changed)
    assert mx.abs(same[:8]).max().item() < 1e-5 < mx.abs(same[8:]).max().item()


def test_streams_alone_and_in_a_batch(each_continuing):
    model = model_of(each_continuing)
    for bits in (CacheBits(), CacheBits(8, 4)):
        if bits != CacheBits() and not architecture_of(each_continuing).packed_keys(each_continuing.config).paths:
            continue
        model.cache_bits = bits
        for sampling in (Sampling(), Sampling(temperature=0.9, top_k=50, seed=3)):
            together, reasons = collect(model.pieces(PROMPTS, Stopping(20, (b"zz",)), sampling))
            assert set(reasons) == set(range(len(PROMPTS)))
            for stream, prompt in enumerate(PROMPTS):
                assert collect(model.pieces([prompt], Stopping(20, (b"zz",)), sampling))[0][0] == together[stream]


def test_an_id_a_step_or_several_are_the_same_draws(each_continuing):
    config, sampling = each_continuing.config, Sampling(temperature=1.0, seed=4)
    drawn = []
    for most in (12, 1):
        state = way_of(each_continuing).begin(each_continuing, [continuing_of(each_continuing).ids(config, b"ab", False)], None)
        noise, ids = Noise(sampling.seed, config.vocab_size), []
        while len(ids) < 12:
            ids += state.advance(sampling, noise, min(most, 12 - len(ids)))[0].tolist()
        drawn.append(ids)
    assert drawn[0] == drawn[1]


def test_bits_are_those_of_the_logits(each_continuing):
    model, total, size = model_of(each_continuing), 0.0, 11
    for start in range(0, len(DATA), size):
        window = DATA[start : start + size]
        logits = np.array(model.logits(window), dtype=np.float64)
        columns = np.frombuffer(window, dtype=np.uint8).astype(int) + continuing_of(each_continuing).first_byte
        total += (np.log2(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(window)), columns] / np.log(2)).sum()
    assert model.bits_per_byte(DATA, size) == pytest.approx(total / len(DATA), abs=1e-4)


# Answering


def test_greedy_answers_are_the_full_pass(each_answering):
    model = model_of(each_answering)
    for source in PROMPTS:
        answer = model.answers([source])[0][0]
        logits = each_answering(
            mx.array([[*ids_of_bytes(source), model.config.end_id]]), mx.array([[model.config.start_id, *answer.ids]])
        )[0]
        expected = mx.argmax(logits, axis=-1).tolist()
        assert list(answer.ids) == expected[: len(answer.ids)]
    together = [found[0].ids for found in model.answers(PROMPTS)]
    assert together == [model.answers([source])[0][0].ids for source in PROMPTS]


def test_states_are_those_of_the_bytes(each_answering):
    model = model_of(each_answering)
    states = model.encode(DATA)
    total = mx.array([len(DATA)])
    assert states.shape == (each_answering.state_lengths(total).item(), model.config.d_model)
    whole = each_answering.encode(mx.array([[*ids_of_bytes(DATA), model.config.end_id]]))[0]
    assert mx.allclose(states, whole[: len(states)], atol=1e-4)


def test_bits_of_an_answer(each_answering):
    model = model_of(each_answering)
    logits = np.array(model.logits(b"source", b"to"), dtype=np.float64)
    wanted = [*ids_of_bytes(b"to"), model.config.end_id]
    costs = np.log2(np.exp(logits).sum(axis=-1)) - logits[range(3), wanted] / np.log(2)
    assert model.bits(b"source", b"to") == pytest.approx(costs.sum(), abs=1e-4)


# Encoding


def test_a_text_is_encoded_alone_as_in_a_batch(each_encoding):
    model = model_of(each_encoding)
    texts = [DATA, b"abcd", "ěščř ž".encode()]
    for text, rows in zip(texts, model.encode_many(texts), strict=True):
        assert mx.allclose(model.encode(text), rows, atol=1e-5)
        assert len(rows) == len(text.decode()) + 2 * each_encoding.config.marks


def test_labels_lie_in_the_text(each_encoding):
    for span in model_of(each_encoding).label(DATA):
        assert DATA[span.first_byte : span.end_byte].decode() == DATA.decode()[span.first_character : span.end_character] != ""


def test_a_saved_encoder_is_the_model(each_encoding, tmp_path):
    model = model_of(each_encoding)
    for name, each in (("model", model), ("packed", model.quantize())):
        each.save(tmp_path / name)
        again = load(tmp_path / name, device="cpu")
        assert type(again) is type(model) and again.config == model.config
        assert mx.array_equal(again.encode(DATA), each.encode(DATA)) and again.label(DATA) == each.label(DATA)


def test_every_command_for_encoders(each_encoding, tmp_path, marlin):
    model_of(each_encoding).save(tmp_path / "model")
    (tmp_path / "few").write_bytes(b"16 bytes a line\n" * 24)
    marlin("calibrate", "model", "--corpus", "few", "--hessian", "-o", "stats.safetensors")
    for method, options in METHODS.items():
        if "--kv-bits" in options:
            continue  # there is no cache
        given = [each.replace("INPUT", "corpus").replace("DATA", "few") for each in options]
        how = ("--method", method.partition(",")[0], *given)
        report = json.loads(marlin("quantize", "model", *how, "-o", "out", "--overwrite", "--json"))
        packed = {part["part"] for part in report["parts"] if part["relative_error"] is not None}
        assert packed == {"global", "local"}, (method, report)
        assert load("out", device="cpu").encode(DATA).shape[1] == 32
    marlin("quantize", "out", "--dequantize", "-o", "plain")
    assert load("plain", device="cpu").quantization is None


# All


def test_a_saved_model_is_the_model(each_tiny, tmp_path):
    model = model_of(each_tiny)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model", device="cpu")
    assert type(again) is type(model) and again.config == model.config
    assert again.generate(b"abc", 12) == model.generate(b"abc", 12)
    packed = model.quantize()
    packed.save(tmp_path / "packed")
    assert load(tmp_path / "packed", device="cpu").generate(b"abc", 12) == packed.generate(b"abc", 12)
    assert {part_of(path) for path in linear_layers(packed.network)} == {part_of(path) for path in linear_layers(each_tiny)}


@pytest.fixture
def marlin(tmp_path, monkeypatch, capfd):
    """Run the program in this process, in a folder with a corpus and pairs: what it printed; it must succeed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"16 bytes a line\n" * 256)  # any window of 64 bytes is like the others
    (tmp_path / "pairs.tsv").write_bytes("".join(f"source {n}\ttarget\n" for n in range(40)).encode())

    def run(*arguments, stdin=os.devnull):
        monkeypatch.setattr(sys, "argv", ["marlin", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", open(stdin))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        assert caught.value.code in (0, None), captured.err
        return captured.out

    return run


CALIBRATED = ("--stats", "stats.safetensors")
METHODS = {
    "rtn": (), "gptq": CALIBRATED, "awq+gptq": CALIBRATED,
    "gptq, sequential": ("--sequential", "--sequential-bytes", "1k", "--calibration-INPUT", "DATA"),
    "mse, automatic": ("--target-bpw", "9", "--calibration-INPUT", "DATA"),
    "mse, distilled": ("--distill-steps", "1", "--distill-INPUT", "DATA"),
    "mse, balanced": (*CALIBRATED, "--balance-keys", "--kv-bits", "8"),
}  # fmt: skip


def test_every_command(each_tiny, tmp_path, marlin):
    model_of(each_tiny).save(tmp_path / "model")
    answers = architecture_of(each_tiny).continuing is None
    names = {"INPUT": "pairs" if answers else "corpus", "DATA": "pairs.tsv" if answers else "text"}

    def named(option):
        return names.get(option, option.replace("INPUT", names["INPUT"]))

    marlin("calibrate", "model", *map(named, ("--INPUT", "DATA", "--max-bytes", "512", "--hessian")), "-o", "stats.safetensors")
    for method, options in METHODS.items():
        keys = architecture_of(each_tiny).packed_keys(each_tiny.config)
        if "--balance-keys" in options and not (keys.paths and keys.queries_alone):
            continue  # what is remembered does not grow, or more than queries read it
        how = ("--method", method.partition(",")[0], *map(named, options))
        report = json.loads(marlin("quantize", "model", *how, "-o", "out", "--overwrite", "--json"))
        assert any(part["relative_error"] is not None for part in report["parts"]), method
        assert json.loads(marlin("generate", "out", "-p", "ab", "--max-bytes", "3", "--json"))["prompt_bytes"] == 2
    marlin("quantize", "out", "--dequantize", "-o", "plain")
    (tmp_path / "prompts").write_text('"ab"\n"x"\n')
    lines = marlin("generate", "plain", "--prompts", "prompts", "--max-bytes", "4", "--seed", "3", "--temperature", "1")
    assert [json.loads(line)["index"] for line in lines.splitlines()] == [0, 1]
    assert marlin("generate", "plain", "--max-bytes", "4", stdin="prompts") == marlin(
        "generate", "plain", "--max-bytes", "4", "--batch-size", "1", stdin="prompts"
    )


def test_bench(each_tiny, tmp_path, marlin):
    """Speed, plan and roofline where its arithmetic is known, and quality beside a packed copy of itself."""
    model = model_of(each_tiny)
    model.save(tmp_path / "model")
    model.quantize().save(tmp_path / "packed")
    answers = architecture_of(each_tiny).continuing is None
    timed = ("--prompt-bytes", "8", "--decode-bytes", "8", "--repeats", "1", *(() if answers else ("--roofline",)))
    found = json.loads(marlin("bench", "model", *timed, "--format", "json"))["models"][0]
    assert sum(found["weights"].values()) == sum(array.size for _, array in tree_flatten(each_tiny.parameters()))
    quality = ("--quality", "pairs.tsv" if answers else "text", "--max-quality-bytes", "1k")
    windows = () if answers else ("--window-bytes", "64")
    found = json.loads(
        marlin("bench", "packed", "model", "--no-throughput", *quality, *windows, "--reference", "model", "--format", "json")
    )
    if answers:
        assert found["models"][0]["quality"] is not None
        return
    packed, own = (each["quality"]["all_domains"] for each in found["models"])
    window = (tmp_path / "text").read_bytes()[:64]
    assert own["bits_per_byte"]["value"] == pytest.approx(model.bits_per_byte(window), rel=1e-5)
    assert own["against_reference"]["kl_bits_per_byte"]["value"] == 0 < packed["against_reference"]["kl_bits_per_byte"]["value"]
    plan = marlin("bench", "model", "--plan", "--bandwidth", "10", "--context", "32")
    assert "reading a byte takes" in plan
    marlin("quantize", "model", "-o", "out", "--report", "page.html")
    assert "KL divergence" in (tmp_path / "page.html").read_text()


def test_a_rotated_model_or_why_not(each_tiny):
    """What can be turned says its streams, what cannot says why."""
    architecture = architecture_of(each_tiny)
    try:
        streams = architecture.rotation(each_tiny.config)
    except QuantizationError as error:
        assert architecture.title in str(error) and "cannot be rotated" in str(error)
    else:
        paths = set(linear_layers(each_tiny))
        assert {layer for layers in streams.readers.values() for layer in layers} <= paths
        assert all(any(path.startswith(f"{block}.") for path in paths) for block in streams.blocks)


def test_longer_than_the_context_is_one_line(each_tiny):
    model = model_of(each_tiny)
    with pytest.raises(UsageError, match="97 bytes"):
        model.generate(b"x" * 97)
