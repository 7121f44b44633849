"""`marlin label` on small random models, as a user runs it: places of spans, pipes, pairs, questions, sentences of a stream."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine, random_la_canine
from mlx.utils import tree_map

from marlin_cli import ByT5Config, ByT5Model, EncodingModel, cli, load
from marlin_cli.commands import label_run
from marlin_cli.commands.pipes import as_they_come, blocks_of_pipe, lines_of_pipe
from marlin_cli.commands.prompts import Prompt
from marlin_cli.engine.sentences import SplitSettings
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.ops.device import choose_device

# Of one to four bytes, with a mark that combines, a control code, and signs made of several characters.
TEXTS = [
    "Kůň a\N{COMBINING ACUTE ACCENT}b.",
    "東京 𝔘𝔫𝔦 \x1b[31m!",
    "\N{FAMILY} \N{SNOWMAN}!",
    "plain text",
]
MODELS = {
    "tags": {"head": "token", "labels": ("O", "A", "B")},
    "classifies": {"head": "sequence", "labels": ("x", "y", "z")},
    "finds": {"head": "answer"},
    "chooses": {"head": "choice"},
    "reads": {},
}
SPLIT = ("--threshold", "0.5", "--window", "64", "--stride", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, device = tmp_path_factory.mktemp("models"), choose_device("cpu")
    for name, config in MODELS.items():
        EncodingModel(random_canine(**config), device).save(path / name)
    EncodingModel(random_la_canine(adapter_dim=32, language="cs"), device).save(path / "splits")
    for name, labels in (("bytes", ("O", "A", "B")), ("no labels", ())):
        sizes = {"d_model": 32, "ffn_dim": 32, "heads": 1, "head_dim": 32, "encoder_layers": 1, "decoder_layers": 0}
        model = ByT5Model.from_config(ByT5Config(**sizes, labels=labels), device="cpu")
        mx.random.seed(1)
        model.network.update(
            tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.5 * 2, model.network.parameters())
        )
        model.save(path / name)
    return path


@pytest.fixture
def label(folder, monkeypatch, capfdbinary):
    """Run the program in this process: (exit code, lines of stdout, stderr)."""

    def run(model, *arguments, stdin=b""):
        read, write = os.pipe()
        os.write(write, stdin)
        os.close(write)
        monkeypatch.setattr(sys, "argv", ["marlin", "label", str(folder / model), *map(str, arguments)])
        before = set(threading.enumerate())
        with open(read) as piped:
            monkeypatch.setattr(sys, "stdin", piped)
            with pytest.raises(SystemExit) as caught:
                cli.main()
            # Else one that still reads, after an error, would read the next test's pipe under the same number.
            for reader in set(threading.enumerate()) - before:
                reader.join(timeout=1)
        captured = capfdbinary.readouterr()
        return caught.value.code, captured.out.splitlines(), captured.err.decode()

    return run


def objects(result):
    code, lines, err = result
    assert (code, err) == (0, "")
    assert all(line.isascii() and line.decode().isprintable() for line in lines)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("model", ["tags", "bytes"])
@pytest.mark.parametrize("merging", [(), ("--no-merge",)])
def test_spans_lie_where_they_say_in_bytes_and_in_characters(label, model, merging):
    stdin = "\n".join(TEXTS).encode()
    found = objects(label(model, "--outside", "none", *merging, stdin=stdin))
    assert [each["index"] for each in found] == [0, 1, 2, 3]
    for text, each in zip(TEXTS, found, strict=True):
        data = text.encode()
        assert (each["bytes"], each["characters"]) == (len(data), len(text))
        assert "".join(f"{span['first_byte']}-{span['end_byte']} " for span in each["spans"]).startswith("0-")
        assert each["spans"][-1]["end_byte"] == len(data)
        for span in each["spans"]:
            own = data[span["first_byte"] : span["end_byte"]]
            assert span["text"] == own.decode(errors="replace")
            around = text[span["first_character"] : span["end_character"]].encode()
            if model == "tags":
                assert around == own
            else:  # a byte may be a part of a character
                assert own in around and len(around) <= len(own) + 6


def test_bytes_that_are_no_text_have_labels_and_no_characters(label):
    (found,) = objects(label("bytes", "--hex", "ff c3 61 80", "--outside", "none"))
    assert found["characters"] is None and found["bytes"] == 4
    assert {span["first_character"] for span in found["spans"]} == {None}
    assert "".join(span["text"] for span in found["spans"]).replace("\N{REPLACEMENT CHARACTER}", "?") == "??a?"
    code, lines, err = label("tags", stdin=b"abcd\n\xff\nabcd")
    assert code == 1 and len(lines) == 1 and err.count("\n") == 1
    assert "stdin: line 2: is not UTF-8 (invalid start byte at byte 0); CANINE reads characters, convert it first" in err


def test_many_texts_give_what_each_gives_alone(label):
    for model in ("tags", "classifies", "bytes"):
        stdin = "\n".join(TEXTS).encode()
        one, many = (objects(label(model, "--batch-size", size, stdin=stdin)) for size in (1, 16))
        assert without_scores(one) == without_scores(many)
        assert scores_of(one) == pytest.approx(scores_of(many), abs=1e-4)


def without_scores(value):
    if isinstance(value, dict):
        return {key: without_scores(each) for key, each in value.items() if key != "score"}
    return [without_scores(each) for each in value] if isinstance(value, list) else value


def scores_of(value):
    if isinstance(value, dict):
        return [each for key, one in value.items() for each in ([one] if key == "score" else scores_of(one))]
    return [each for one in value for each in scores_of(one)] if isinstance(value, list) else []


def test_classes_of_texts_and_pairs(label, folder):
    model = load(folder / "classifies", device="cpu")
    expected = [each._asdict() for each in model.classify(("Kůň".encode(), b"horse"))]
    (found,) = objects(label("classifies", "--tabs", stdin="Kůň\thorse\r\n".encode()))
    assert found["labels"] == expected and len(expected) == 3
    (same,) = objects(label("classifies", "-p", "Kůň", "--second", "horse", "--best", 2))
    assert same["labels"] == expected[:2]
    row = json.dumps({"prompt": "Kůň", "second": "horse", "id": [1]}).encode()
    (row_found,) = objects(label("classifies", "--prompts", "-", "--threshold", expected[1]["score"], stdin=b"\n" + row))
    assert row_found["labels"] == expected[:2] and row_found["id"] == [1]


def test_lines_end_with_or_without_a_carriage_return(label):
    texts = "Kůň a kráva\nplain text"
    expected = label("classifies", stdin=texts.encode())
    assert len(objects(expected)) == 2
    assert label("classifies", stdin=texts.replace("\n", "\r\n").encode() + b"\r\n") == expected


def test_what_a_head_does_not_read_may_be_of_any_length(label):
    row = json.dumps({"prompt": "plain", "second": "x" * 1000}).encode()
    code, out, _ = label("tags", "--prompts", "-", stdin=row)
    assert (code, len(out)) == (0, 1)


def test_columns_that_a_head_does_not_read_are_said_once(label):
    rows = b'{"prompt": "abcd", "question": "why?"}\n{"prompt": "efgh", "question": "who?", "choices": ["a"]}\n'
    code, out, err = label("tags", "--prompts", "-", stdin=rows)
    assert (code, len(out)) == (0, 2)
    assert [line for line in err.splitlines() if "is not read" in line] == [
        f"marlin: stdin: what stands under '{name}' is not read: a model that labels characters reads none"
        for name in ("question", "choices")
    ]


def test_a_stream_that_is_no_text_is_named(label, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"abc\xff")
    for options, name in (
        (["--prompt-file", tmp_path / "text.txt"], tmp_path / "text.txt"),
        (["--hex", "ff"], "--hex"),
        ([], "stdin"),
    ):
        code, lines, err = label("splits", *options, stdin=b"\xff")
        assert (code, lines) == (1, []) and err.startswith(f"marlin: {name}: is not UTF-8")


def test_a_short_window_has_a_stride_that_fits(label):
    text = ("Kůň. " * 40).encode()
    short = label("splits", "--threshold", "0.5", "--window", "32", stdin=text)
    assert short == label("splits", "--threshold", "0.5", "--window", "32", "--stride", "32", stdin=text)
    assert "".join(sentence["text"] for sentence in objects(short)).encode() == text


def test_answers_lie_in_the_text(label, folder):
    context = "Jiří šel do 東京, včera."
    (found,) = objects(label("finds", "--question", "Kdo?", "-p", context, "--best", 5, "--longest", 4))
    expected = load(folder / "finds", device="cpu").answer(
        b"Kdo?", context.encode(), label_run.AnswerSettings(best=5, longest=4)
    )
    assert [span["score"] for span in found["spans"]] == [span.score for span in expected]
    for span in found["spans"]:
        assert span["text"] == context[span["first_character"] : span["end_character"]]
        assert span["label"] == "answer" and len(span["text"]) <= 4
    rows = "\n".join(json.dumps({"prompt": context, "question": question}) for question in ("Kdo?", "Kam?"))
    assert len(objects(label("finds", "--prompts", "-", stdin=rows.encode()))) == 2


def test_choices_come_the_likeliest_first(label):
    (found,) = objects(label("chooses", "-p", "He went", "--choice", " home.", "--choice", " to sea.\x1b"))
    assert {each["text"] for each in found["choices"]} == {" home.", " to sea.\x1b"}
    scores = [each["score"] for each in found["choices"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)


REFUSED = {
    "no question": ("finds", ["-p", "abcd"], b"", "--prompt: has no question; give --question"),
    "an empty context": ("finds", ["-p", "", "--question", "a"], b"", "--prompt: is empty; there is nothing to answer from"),
    "a question that is no text": ("finds", ["-p", "a", "--question", os.fsdecode(b"\xff")], b"", "the question: is not UTF-8"),
    "a question without end": ("finds", ["-p", "abc", "--question", "a" * 300], b"", "--prompt: the question has 300 char"),
    "no choices": ("chooses", ["-p", "abcd"], b"", "--prompt: has no choices; give --choice"),
    "a choice that is too long": ("chooses", ["-p", "abcd", "--choice", "a" * 300], b"", "takes 307 positions"),
    "choices that are none": ("chooses", ["--prompts", "-"], b'{"prompt": "a", "choices": 3}', "line 1: choices should be a"),
    "a question that is a number": ("finds", ["--prompts", "-"], b'{"prompt": "a", "question": 3}', "line 1: question should"),
    "a line that is no pair": ("classifies", ["--tabs"], b"a\tb\nab", "stdin: line 2: has 0 tabs, a pair has one"),
    "a choice that is empty": ("chooses", ["-p", "abcd", "--choice", "a", "--choice", ""], b"", "--prompt: a choice is empty"),
    "a text that is too long": ("tags", ["-p", "a" * 300], b"", "302 positions with its marks, and the model reads 256"),
    "a pair of which one is no text": ("classifies", ["--tabs"], b"abcd\t\xff\n", "line 1: the second text: is not UTF-8"),
    "no rows": ("tags", ["--prompts", "-"], b"\n", "no prompts; write one JSON object a line"),
    "a file that is not there": ("tags", ["--prompts", "nowhere"], b"", "nowhere: cannot read: it is not there"),
    "a folder": ("splits", ["--prompt-file", "."], b"", ".: cannot read: Is a directory"),
    "no head": ("reads", ["-p", "abcd"], b"", "has no head that labels; it encodes, and marlin encode gives its states"),
    "no labels": ("no labels", ["-p", "abcd"], b"", "has no head that labels; it encodes, and marlin encode gives"),
    "no threshold": ("splits", ["-p", "abcd", "--threshold", "2"], b"", "threshold must be from 0 to 1"),
    "a window of no molecules": ("splits", ["-p", "abcd", "--window", "30", "--stride", "8"], b"", "multiple of 4"),
    "no padding": ("tags", ["-p", "abcd", "--pad-to", "3"], b"", "pad_to (--pad-to) must be from 4 to 256"),
    "a stream that is no text": ("splits", [], "Kůň".encode() + b"\xff", "is not UTF-8 (invalid start byte at byte 5)"),
    "bytes too many": ("bytes", ["-p", "a" * 40_000], b"", "--prompt: 40,000 bytes, but the model reads 32,768"),
    "two texts": ("tags", ["-p", "abcd", "--hex", "61"], b"", "--prompt has no meaning beside --hex"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_one_line(label, kind):
    model, arguments, stdin, message = REFUSED[kind]
    code, _, err = label(model, *arguments, stdin=stdin)
    assert code in (1, 2) and err.count("\n") == 1 and message in err, err


def test_a_text_is_named_by_nobody(folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["marlin", "label", str(folder / "tags")])
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(SystemExit):
        cli.main()
    assert "there is no text: give -p, --prompt-file or --prompts, or a pipe" in capfd.readouterr().err


@pytest.mark.parametrize("model", ["tags", "classifies"])
def test_a_line_that_is_too_short_is_padded_and_a_blank_one_has_nothing(label, folder, model):
    lines = [b"abcd", b"", b"a", b" \t\r", b"some text", b"b"]
    options = ("--outside", "none") if model == "tags" else ()
    found = objects(label(model, *options, stdin=b"\n".join(lines)))
    name = "spans" if model == "tags" else "labels"
    assert [each["index"] for each in found] == [0, 1, 2, 3, 4, 5] and [each["bytes"] for each in found] == [4, 0, 1, 2, 9, 1]
    assert [each.get("padded_to") for each in found] == [None, None, 4, None, None, 4]
    assert found[1][name] == found[3][name] == [] and all(found[index][name] for index in (0, 2, 4, 5))
    # The others say what they say by themselves, and the short ones what they say padded.
    plain = load(folder / model, device="cpu")
    for index, pad_to in ((0, None), (2, 4), (4, None), (5, 4)):
        if model == "tags":
            scores = [span.score for span in plain.tag_many([lines[index]], pad_to=pad_to, outside=("none",))[0]]
        else:
            scores = [each.score for each in plain.classify(lines[index], pad_to=pad_to)]
        assert np.allclose([each["score"] for each in found[index][name]], scores, atol=1e-5)
    # What is asked for is done to all of them, and needs no word.
    asked = ("--pad-to", "16", *options)
    assert all("padded_to" not in each for each in objects(label(model, *asked, stdin=b"\n".join(lines))))


def test_blank_lines_for_every_head(label):
    assert [each["spans"] for each in objects(label("bytes", "--outside", "none", stdin=b"\n\n"))] == [[], []]
    assert [each["spans"] for each in objects(label("finds", "--question", "ab", stdin=b"\n \n"))] == [[], []]
    assert [each["choices"] for each in objects(label("chooses", "--choice", "ab", stdin=b"\nabc"))][0] == []
    assert [each["labels"] for each in objects(label("classifies", "--tabs", stdin=b"\n\t\n"))] == [[], []]


def test_a_file_among_the_arguments(label):
    code, _, err = label("tags", "texts.txt")
    assert code == 2 and err.count("\n") == 1 and "an argument too many among " in err
    assert err.endswith("'texts.txt'; a text is given with -p, a file with --prompt-file or through a pipe\n")


def test_what_labels_is_not_asked_to_answer(folder):
    for model, commands in (
        ("bytes", r"to encode \(marlin encode\), or to label \(marlin label\)$"),
        ("no labels", r"encode\)$"),
    ):
        with pytest.raises(UsageError, match=commands):
            load(folder / model, device="cpu").generate(b"abcd")


def test_nothing_comes_of_nothing(label):
    for model in ("tags", "splits", "bytes"):
        assert label(model, stdin=b"") == (0, [], "")


# Sentences

STORY = "Žluťoučký kůň. Úpěl ďábelské\nódy!   A co dál?\n\nNic 𝔘𝔫𝔦. 東京は大きい。\x1bそうです。" * 4


def test_sentences_are_the_stream(label, tmp_path):
    file = tmp_path / "story"
    file.write_text(STORY)
    found = objects(label("splits", *SPLIT, stdin=STORY.encode()))
    assert len(found) > 5 and "".join(each["text"] for each in found) == STORY
    assert [each["sentence"] for each in found] == [*range(len(found))]
    for each in found:
        assert STORY[each["first_character"] : each["end_character"]] == each["text"]
        assert STORY.encode()[each["first_byte"] : each["end_byte"]].decode() == each["text"]
    for arguments in (("-p", STORY), ("--prompt-file", file), ("--hex", STORY.encode().hex())):
        assert objects(label("splits", *SPLIT, *arguments)) == found
    row = json.dumps({"prompt": STORY, "id": "a"}).encode()
    rows = objects(label("splits", *SPLIT, "--prompts", "-", stdin=row + b"\n" + row))
    assert rows == [{"index": index, "id": "a", **each} for index in (0, 1) for each in found]


def test_a_line_for_each_sentence(label):
    found = objects(label("splits", *SPLIT, stdin=STORY.encode()))
    code, lines, err = label("splits", *SPLIT, "--lines", stdin=STORY.encode())
    assert (code, err) == (0, "")
    assert [line.decode() for line in lines] == [" ".join(each["text"].strip().splitlines()) for each in found]


def test_lines_on_a_terminal_drive_nothing(folder, monkeypatch):
    model, written = load(folder / "splits", device="cpu"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    monkeypatch.setattr(label_run, "is_viewed", lambda raw: not raw)
    settings = SplitSettings(threshold=1.0, window_characters=64)
    for raw in (False, True):
        label_run.write_lines(model.sentences([b"a\x1b[31mb"], settings), raw=raw)
    assert written.getvalue() == "a\N{REPLACEMENT CHARACTER}[31mb\n".encode() + b"a\x1b[31mb\n"


def run_split(folder, *arguments, **options):
    command = [sys.executable, "-m", "marlin_cli", "label", str(folder / "splits"), *SPLIT, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_slow_pipe_has_its_sentences_and_a_signal_ends_it(folder):
    with run_split(folder) as job:
        job.stdin.write(STORY.encode())
        job.stdin.flush()
        first = json.loads(job.stdout.readline())  # it comes though the pipe is open
        assert STORY.startswith(first["text"])
        job.send_signal(signal.SIGTERM)
        assert job.stderr.read() == b""
    assert job.returncode == 143


def test_a_closed_pipe_ends_quietly(folder):
    with run_split(folder, "--longest", "5") as job:
        job.stdout.close()
        job.stdin.write(STORY.encode() * 20)
        job.stdin.close()
        assert job.stderr.read() == b""
    assert job.returncode == 0


def test_scores_that_are_no_numbers_are_an_error(folder):
    model = load(folder / "tags", device="cpu")
    model.network.output.bias = mx.full(model.network.output.bias.shape, float("nan"))
    text = label_run.Text(Prompt(b"abcd"))
    request = label_run.Request(None, None, ("O",), True, None, label_run.AnswerSettings(), 16)
    with pytest.raises(CheckpointError, match="its predictions are not finite"):
        label_run.run(model, [text], request)


# Pipes


def test_lines_of_a_pipe_have_numbers_and_a_largest_size():
    read, write = os.pipe()
    os.write(write, b"a\n\nb")
    os.close(write)
    assert list(lines_of_pipe(read, "p")) == [("p: line 1", b"a"), ("p: line 2", b""), ("p: line 3", b"b")]
    os.close(read)
    with open("/dev/zero", "rb") as endless, pytest.raises(UsageError, match="p: line 1 is longer than 16,777,216 bytes"):
        next(lines_of_pipe(endless.fileno(), "p"))


def test_a_pause_stands_where_nothing_is_there():
    read, write = os.pipe()
    blocks = blocks_of_pipe(read, "p")
    os.write(write, b"ab")
    assert [next(blocks), next(blocks)] == [b"ab", b""]
    os.write(write, b"c")
    os.close(write)
    assert list(blocks) == [b"c", b""]
    os.close(read)


def test_an_error_comes_after_what_was_before_it():
    def inputs():
        yield from (1, 2)
        raise UsageError("three")

    batches = as_they_come(inputs(), 2)
    taken = []
    with pytest.raises(UsageError, match="three"):
        for batch in batches:
            taken += batch
    assert taken == [1, 2]
    assert np.array_equal([each for batch in as_they_come(iter(range(100)), 7) for each in batch], range(100))
