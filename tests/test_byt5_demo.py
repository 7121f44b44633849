"""The files that ship as byt5-demo: the task's definition, the pairs, the checkpoint's shapes, and its golden values."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs/models/byt5-demo"
GOLDEN = ROOT / "tests/data/byt5_demo_golden"


@pytest.fixture(scope="module")
def task():
    """The training script as a module; it imports torch only inside what trains."""
    specification = importlib.util.spec_from_file_location("byt5_demo_train", DEMO / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs():
    return [json.loads(line) for line in (DEMO / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Příliš ŽLUŤOUČKÝ kůň", "prilis zlutoucky kun"),
        ("Łódź, Straße, smørrebrød, Þór", "lodz, strasse, smorrebrod, thor"),
        ("İstanbul'un IŞIĞI", "istanbul'un isigi"),
        ("Điều CHỈNH độ", "dieu chinh do"),
        ("Ελληνικά ΌΛΑ", "ελληνικα ολα"),
        ("Їжак Йосип, Ёлка", "іжак иосип, елка"),
        ("日本語が Linux で", "日本語が linux で"),  # the mark of が belongs to the letter
        ("हिन्दी", "हिन्दी"),
        ("plain ascii 123", "plain ascii 123"),
    ],
)
def test_stripping_takes_case_and_marks_of_three_scripts_alone(task, text, source):
    assert task.stripped(text) == source


def test_stripping_again_changes_nothing(task, pairs):
    assert all(task.stripped(pair["source"]) == pair["source"] for pair in pairs)


@pytest.mark.parametrize("limit_bytes", [20, 61, 190])
@pytest.mark.parametrize(
    "line",
    [
        "One sentence. Another one, which is longer than the first! A third?",
        "Ένα-δύο-τρία " * 20,
        "字" * 200,
        "word",
    ],
)
def test_segments_keep_every_letter_and_the_limit(task, line, limit_bytes):
    segments = list(task.split_line(line, limit_bytes))
    assert "".join("".join(segments).split()) == "".join(line.split())
    assert all(0 < len(segment.encode()) <= limit_bytes for segment in segments)


def test_pairs_are_of_the_task_in_many_languages(task, pairs):
    assert all(pair["source"] == task.stripped(pair["target"]) for pair in pairs)
    languages = {pair["language"] for pair in pairs}
    assert len(languages) >= 20 and languages <= set(task.RESTORED)
    assert 200 <= len(pairs) <= 400


def test_the_checkpoint_is_bfloat16_of_the_configured_shapes():
    config = json.loads((DEMO / "config.json").read_text())
    assert (config["model_type"], config["feed_forward_proj"], config["tie_word_embeddings"]) == ("t5", "gated-gelu", False)
    assert (DEMO / "model.safetensors").stat().st_size < 16_000_000
    with safe_open(DEMO / "model.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        assert {each.get_dtype() for each in slices.values()} == {"BF16"}
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    assert shapes["lm_head.weight"] == shapes["shared.weight"] == (config["vocab_size"], width)
    for stack, layers, feed_forward in (("encoder", config["num_layers"], 1), ("decoder", config["num_decoder_layers"], 2)):
        assert f"{stack}.block.{layers}.layer.0.SelfAttention.q.weight" not in shapes
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            assert shapes[f"{block}.0.SelfAttention.q.weight"] == (inner, width)
            assert shapes[f"{block}.{feed_forward}.DenseReluDense.wo.weight"] == (width, config["d_ff"])
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and "relative_attention_bias" not in name]
    assert all(columns % 32 == 0 for _, columns in linear)


def test_the_card_states_what_was_measured():
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    scores = json.loads((DEMO / "training.json").read_text())["heldout"]
    for language, score in scores.items():
        row = f"| {language} | {score['characters']:,} | {100 * score['copy_cer']:.2f} | {100 * score['cer']:.2f} |"
        assert row in card
        assert score["cer"] < score["copy_cer"]


def test_golden_logits_prefer_the_target_of_text():
    golden = load_file(f"{GOLDEN}.safetensors")
    for pair in "01":
        target, logits = golden[f"{pair}.target"], golden[f"{pair}.logits"]
        assert logits.shape == (len(target) + 1, 384) and logits.dtype == np.float32
        assert golden[f"{pair}.encoder"].shape == (len(golden[f"{pair}.source"]) + 1, 256)
        wanted = np.append(target.astype(int) + 3, 1)
        assert np.mean(logits.argmax(axis=-1) == wanted) > 0.9


@pytest.mark.peers
def test_golden_values_are_what_transformers_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/peers"))
    import make_byt5_golden as maker

    model = maker.load_model(DEMO).cpu()
    golden = load_file(f"{GOLDEN}.safetensors")
    for number in range(3):
        source, target = (golden[f"{number}.{name}"].tobytes() for name in ("source", "target"))
        encoder, logits = maker.forced(model, source, target)
        np.testing.assert_allclose(encoder.numpy(), golden[f"{number}.encoder"], atol=1e-4)
        np.testing.assert_allclose(logits.numpy(), golden[f"{number}.logits"], atol=1e-4)
    lines = [json.loads(line) for line in Path(f"{GOLDEN}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 12
    assert maker.greedy(model, [line["source"] for line in lines], 8192) == [line["output"] for line in lines]
