"""ByT5 against transformers' T5: the same states, logits, greedy answers and beams, ragged batches included."""

import base64
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli import load
from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.engine.answer_requests import Answer, AnswerLimits
from marlin_cli.engine.answering import answer, answer_with_beams
from marlin_cli.engine.beams import Beams
from marlin_cli.errors import AssumptionWarning, CheckpointError
from marlin_cli.models import build

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

pytestmark = pytest.mark.peers

TOLERANCE = 1e-4
INPUTS = 100
MOST_IDS = 24
TINY = {"vocab_size": 384, "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {
    "gated, untied": TINY | GATED,
    "relu, tied": TINY | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "gated, tied, another start": TINY | GATED | {"tie_word_embeddings": True, "decoder_start_token_id": 259},
    "relu, untied, 422 ids, few buckets": TINY
    | {"feed_forward_proj": "relu", "tie_word_embeddings": False, "vocab_size": 422, "decoder_start_token_id": 259,
       "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
}  # fmt: skip
SMALL = GATED | {
    "vocab_size": 384, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_decoder_layers": 4, "num_heads": 6,
}  # fmt: skip


def make(options, folder, seed=0):
    """A random T5 with outspoken biases and a head of its own where it has one, saved and read by both."""
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{"decoder_start_token_id": 0} | options)).eval()
    with torch.no_grad():
        if not options["tie_word_embeddings"]:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * options["d_model"] ** -0.5)
        for name, parameter in model.named_parameters():
            if "relative_attention" in name:
                parameter.normal_(0, 1)
            if "EncDecAttention.o" in name:
                parameter.mul_(8)  # or all inputs would have the same answer
        if options["tie_word_embeddings"]:
            model.shared.weight.mul_(0.3)  # or each id would follow itself
        head = model.lm_head.weight
        head[1] += 0.25 * head.std() * torch.randn_like(head[1])  # some answers end early, some do not
    model.save_pretrained(folder)
    checkpoint = read_checkpoint(folder)
    return model, build(checkpoint.config, checkpoint.weights, where="here", dtype=mx.float32)


def ragged(count, longest, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [[*generator.integers(3, 259, length - 1).tolist(), 1] for length in lengths]


def theirs_of(sources):
    longest = max(map(len, sources))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in sources])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
    return {"input_ids": ids, "attention_mask": mask}


def cut(row, end=1):
    row = list(row)
    return row[: row.index(end)] if end in row else row


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_states_and_logits(name, tmp_path):
    model, network = make(MODELS[name], tmp_path)
    sources = ragged(4, 300)
    start = model.config.decoder_start_token_id
    target = torch.tensor([[start, *row] for row in np.random.default_rng(1).integers(3, 259, (4, 200)).tolist()])
    theirs = model(**theirs_of(sources), decoder_input_ids=target)
    batch = theirs_of(sources)
    lengths = mx.array([len(source) for source in sources])
    ids = mx.array(batch["input_ids"].numpy())
    states = np.array(network.encode(ids, lengths))
    for row, source in enumerate(sources):
        expected = theirs.encoder_last_hidden_state[row, : len(source)].numpy()
        assert np.abs(states[row, : len(source)] - expected).max() < TOLERANCE
    logits = np.array(network(ids, mx.array(target.numpy()), lengths))
    assert np.abs(theirs.logits.numpy()).max() > 0.5
    assert np.abs(logits - theirs.logits.numpy()).max() < TOLERANCE


@torch.no_grad()
def test_labels_of_bytes(tmp_path):
    """T5ForTokenClassification: scores of a ragged batch, and the labels of bytes that follow from them."""
    torch.manual_seed(0)
    config = transformers.T5Config(**TINY | GATED, num_labels=5, id2label={index: f"L{index}" for index in range(5)})
    theirs = transformers.T5ForTokenClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    inputs = [b"abc", "K\u016f\u0148 \u6771\u4eac".encode(), bytes(range(200))]
    batch = theirs_of([[*(byte + 3 for byte in data), 1] for data in inputs])
    expected = theirs(**batch).logits
    assert expected.abs().max() > 1
    for data, states, wanted in zip(inputs, model.encode_many(inputs, marks=True), expected, strict=True):
        scores = np.array(model.network.label_scores(states))
        assert np.abs(scores - wanted[: len(data) + 1].numpy()).max() < TOLERANCE
    found = model.tag_many(inputs, outside=(), merge=False)
    for data, spans, wanted in zip(inputs, found, expected, strict=True):
        assert [span.label for span in spans] == [f"L{index}" for index in wanted[: len(data)].argmax(-1).tolist()]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["SequenceClassification", "QuestionAnswering"])
def test_heads_that_read_the_decoder_are_named(kind, tmp_path):
    getattr(transformers, f"T5For{kind}")(transformers.T5Config(**TINY | GATED)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"holds a T5For{kind}, whose head reads the decoder"):
        load(tmp_path)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 259])
def test_byt5_small(start, tmp_path):
    """The published shape: states and logits of a ragged batch, and 100 inputs answered greedily and with 4 beams."""
    model, network = make(SMALL | {"decoder_start_token_id": start}, tmp_path)
    sources = ragged(3, 256)
    batch = theirs_of(sources)
    target = torch.tensor([[start, 68, 69, 70, 200, 258]] * 3)
    theirs = model(**batch, decoder_input_ids=target)
    lengths = mx.array([len(source) for source in sources])
    ids = mx.array(batch["input_ids"].numpy())
    states = np.array(network.encode(ids, lengths))
    for row, source in enumerate(sources):
        expected = theirs.encoder_last_hidden_state[row, : len(source)].numpy()
        assert np.abs(states[row, : len(source)] - expected).max() < TOLERANCE
    logits = np.array(network(ids, mx.array(target.numpy()), lengths))
    assert np.abs(logits - theirs.logits.numpy()).max() < TOLERANCE
    sources = ragged(INPUTS, 24)
    made = {**theirs_of(sources), "max_new_tokens": 6, "do_sample": False}
    ours = {}
    for news in answer(network, sources, AnswerLimits(6)):
        ours.update({stream: new for stream, new in news if isinstance(new, Answer)})
    assert [ours[n].ids for n in range(INPUTS)] == [tuple(cut(row[1:])) for row in model.generate(**made, num_beams=1).tolist()]
    best = answer_with_beams(network, sources, AnswerLimits(6), Beams(4))
    expected = [tuple(cut(row[1:])) for row in model.generate(**made, num_beams=4).tolist()]
    assert [each.ids for (each,) in best] == expected
    assert len(set(expected)) > INPUTS // 4


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers(name, tmp_path):
    model, network = make(MODELS[name], tmp_path)
    sources = ragged(INPUTS, 60)
    for minimum, prefix in ((0, b""), (5, b"ab")):
        start = [model.config.decoder_start_token_id, *[byte + 3 for byte in prefix]]
        theirs = model.generate(
            **theirs_of(sources), decoder_input_ids=torch.tensor([start] * INPUTS), max_new_tokens=MOST_IDS,
            min_new_tokens=minimum or None, do_sample=False, num_beams=1,
        )  # fmt: skip
        limits = AnswerLimits(MOST_IDS, min_length=minimum, prefix=prefix)
        ours = {}
        for news in answer(network, sources, limits):
            ours.update({stream: new for stream, new in news if isinstance(new, Answer)})
        expected = [tuple(cut(row[1:])) for row in theirs.tolist()]
        assert [ours[stream].ids for stream in range(INPUTS)] == expected
        assert len(set(expected)) > INPUTS // 4


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [Beams(4), Beams(4, answers=3, length_penalty=0.6, early_stopping=True), Beams(5, 5, 2.0, "never")],
    ids=["default", "n best, early", "never"],
)
def test_beams(name, settings, tmp_path):
    model, network = make(MODELS[name], tmp_path)
    sources = ragged(INPUTS, 60)
    theirs = model.generate(
        **theirs_of(sources), max_new_tokens=MOST_IDS, do_sample=False, num_beams=settings.count,
        num_return_sequences=settings.answers, length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ours = [each for found in answer_with_beams(network, sources, AnswerLimits(MOST_IDS), settings) for each in found]
    assert [each.ids for each in ours] == [tuple(cut(row[1:])) for row in theirs.sequences.tolist()]
    assert np.abs(np.array([each.score for each in ours]) - theirs.sequences_scores.numpy()).max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("least", [0, 6])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_ends(count, least, tmp_path):
    """Ids that generation_config.json lists; inputs end with the tokenizer's all the same."""
    model, _ = make(MODELS["gated, untied"], tmp_path)
    sources = ragged(40, 40)
    made = {**theirs_of(sources), "max_new_tokens": MOST_IDS, "do_sample": False}
    seen = [value for row in model.generate(**made, num_beams=1)[:, 3:].tolist() for value in row if value > 1]
    ends = sorted(set(seen), key=seen.count)[-count:]
    model.generation_config.eos_token_id = ends[0] if count == 1 else ends
    model.save_pretrained(tmp_path)
    with pytest.warns(AssumptionWarning, match="holds no tokenizer_config.json"):
        checkpoint = read_checkpoint(tmp_path)
    network = build(checkpoint.config, checkpoint.weights, where="here", dtype=mx.float32)
    limits = AnswerLimits(MOST_IDS, min_length=least)
    ours = {}
    for news in answer(network, sources, limits):
        ours.update({stream: new for stream, new in news if isinstance(new, Answer)})

    def expected(beams):
        rows = model.generate(**made, num_beams=beams, min_new_tokens=least or None)[:, 1:].tolist()
        return [tuple(row[: next((n for n, value in enumerate(row) if value in ends), len(row))]) for row in rows]

    assert [ours[stream].ids for stream in range(len(sources))] == expected(1)
    assert 0 < sum(each.stop_reason == "end" for each in ours.values())
    best = answer_with_beams(network, sources, limits, Beams(4))
    assert [each.ids for (each,) in best] == expected(4)


def marlin(*arguments, stdin=b""):
    """What the program writes."""
    command = [sys.executable, "-m", "marlin_cli", "generate", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=300).stdout


def decoded(rows, *, sentinels=False):
    """Ids as the program writes them: bytes, and sentinels by name where they are asked for."""
    names = {value: b"<extra_id_%d>" % (value - 259) for value in range(259, 384)} if sentinels else {}
    return [b"".join(bytes([v - 3]) if 3 <= v < 259 else names.get(v, b"") for v in cut(row[1:])) for row in rows.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_five_best_of_the_program_for_each_early_stopping(early_stopping, tmp_path):
    model, _ = make(MODELS["gated, untied"], tmp_path)
    sources = ragged(12, 40)
    prompts = tmp_path / "prompts.jsonl"
    data = [bytes(value - 3 for value in source[:-1]) for source in sources]
    prompts.write_text("".join(json.dumps({"prompt_hex": each.hex()}) + "\n" for each in data))
    output = marlin(
        tmp_path, "--prompts", prompts, "--beams", 5, "--n-best", 5, "--max-length", 9, "--length-penalty", 0.8,
        "--early-stopping", str(early_stopping).lower(),
    )  # fmt: skip
    documents = [json.loads(line) for line in output.splitlines()]
    theirs = model.generate(
        **theirs_of(sources), max_new_tokens=9, do_sample=False, num_beams=5, num_return_sequences=5, length_penalty=0.8,
        early_stopping=early_stopping, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert [(each["index"], each["rank"]) for each in documents] == [(n, rank) for n in range(12) for rank in range(5)]
    assert [base64.b64decode(each["bytes_base64"]) for each in documents] == decoded(theirs.sequences)
    scores = np.array([each["score"] for each in documents])
    assert np.abs(scores - theirs.sequences_scores.numpy()).max() < TOLERANCE


@torch.no_grad()
def test_a_language_before_each_word(tmp_path):
    """As grapheme-to-phoneme models are asked: `<eng-us>: word`, through transformers' own tokenizer."""
    model, _ = make(MODELS["gated, untied"], tmp_path)
    words = ["word", "na\u00efve", "", "stra\u00dfe"]
    batch = transformers.ByT5Tokenizer()([f"<eng-us>: {word}" for word in words], padding=True, return_tensors="pt")
    expected = decoded(model.generate(**batch, max_new_tokens=10, do_sample=False, num_beams=1))
    lines = "".join(f"{word}\n" for word in words).encode()
    limits = ("--max-length", 10, "--batch-size", 3)
    found = marlin(tmp_path, *limits, "--input-prefix", "<eng-us>: ", stdin=lines)
    assert found == b"".join(each + b"\n" for each in expected)
    typed = "".join(f"<eng-us>: {word}\n" for word in words).encode()
    assert marlin(tmp_path, *limits, stdin=typed) == found
    assert marlin(tmp_path, *limits, "--input-prefix", "<ger>: ", stdin=lines) != found


@torch.no_grad()
def test_gaps_named_by_sentinels_are_filled(tmp_path):
    """As fine-tuned models are asked: `<extra_id_0>` in text is one id, in inputs and in answers."""
    model, _ = make(MODELS["gated, untied"], tmp_path)
    texts = ["The <extra_id_0> walks in <extra_id_1> park", "<extra_id_124>", "none"]
    batch = transformers.ByT5Tokenizer()(texts, padding=True, return_tensors="pt")
    assert (batch["input_ids"][0] >= 259).sum() == 2
    expected = model.generate(**batch, max_new_tokens=20, do_sample=False, num_beams=1)
    found = marlin(tmp_path, "--sentinel", "--max-length", 20, stdin="".join(f"{text}\n" for text in texts).encode())
    assert found == b"".join(each + b"\n" for each in decoded(expected, sentinels=True))
    assert b"<extra_id_" in found
    assert marlin(tmp_path, "--max-length", 20, stdin="".join(f"{text}\n" for text in texts).encode()) != found


@torch.no_grad()
def test_a_file_of_an_encoder_alone(tmp_path):
    """As diffusion models and retrievers keep it: transformers' T5EncoderModel, saved by itself."""
    config = transformers.T5Config(**MODELS["gated, untied"])
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path)
    found = load(tmp_path, device="cpu")
    assert found.config.decoder_layers == 0
    ids = transformers.ByT5Tokenizer()("an encoder alone", return_tensors="pt")["input_ids"]
    expected = model(input_ids=ids).last_hidden_state[0, :-1].numpy()
    assert np.abs(np.array(found.encode(b"an encoder alone")) - expected).max() < TOLERANCE
