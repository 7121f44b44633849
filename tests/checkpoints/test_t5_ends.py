"""Where inputs and answers of a Hugging Face folder end: the tokenizer's id, and any of those that generation lists."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from marlin_cli import load
from marlin_cli.checkpoints import fingerprint
from marlin_cli.errors import AssumptionWarning, ConfigError

DATA = Path(__file__).parents[1] / "data" / "byt5"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DATA / "gated", tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    """Change keys of a JSON file; those that are None are left out."""
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def ends_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumptionWarning)
        config = load(folder, device="cpu").config
    return config.end_id, config.answer_ends


# eos_token_id of config.json and of generation_config.json (None: no such key) -> what ends answers, as in transformers.
ANSWERS = [
    (1, 1, (1,)), (1, 13, (13,)), (13, 1, (1,)), (1, [13], (13,)), (1, [1, 13, 1], (1, 13)), (1, [], ()), (13, None, ()),
    ([1, 13], "no file", (1, 13)), (13, "no file", (13,)), ([], "no file", ()), (None, "no file", (1,)),
]  # fmt: skip


@pytest.mark.parametrize("own, generation, ends", ANSWERS)
def test_what_ends_answers(own, generation, ends, folder):
    edit(folder / "config.json", eos_token_id=own)
    if generation == "no file":
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", eos_token_id=generation)
    assert ends_of(folder) == (1, ends)


TOKEN = {"lstrip": False, "special": True}
# tokenizer_config.json -> what ends inputs, as transformers' ByT5Tokenizer does it with this file.
INPUTS = {
    "nothing": ({}, 1),
    "the usual": ({"eos_token": "</s>"}, 1),
    "a token with its options": ({"eos_token": {"content": "</s>", **TOKEN}}, 1),
    "another name": ({"eos_token": "<end>"}, 1),
    "a sentinel": ({"eos_token": "<extra_id_3>"}, 262),
    "its own table": ({"eos_token": "</s>", "added_tokens_decoder": {"2": {"content": "</s>"}, "1": {"content": "x"}}}, 2),
    "a table without it": ({"eos_token": "</s>", "added_tokens_decoder": {"0": {"content": "<pad>"}}}, 1),
    "pads": ({"eos_token": "<pad>", "added_tokens_decoder": {"0": {"content": "<pad>"}}}, 0),
}


@pytest.mark.parametrize("case", INPUTS)
def test_what_ends_inputs(case, folder):
    document, end = INPUTS[case]
    before = fingerprint(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    assert ends_of(folder) == (end, (1,))
    assert fingerprint(folder) != before
    edit(folder / "generation_config.json", eos_token_id=[13, 14])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the tokenizer says it: nothing is assumed
        assert load(folder, device="cpu").config.end_id == end


def test_an_end_that_is_assumed_is_said(folder):
    edit(folder / "generation_config.json", eos_token_id=[13, 14])
    with pytest.warns(
        AssumptionWarning, match=r"model: holds no tokenizer_config\.json; .* the id 1,.* end with 13, 14"
    ) as caught:
        load(folder, device="cpu")
    assert len(caught) == 1 and str(caught[0].message).isprintable()


REFUSED = {
    "text": ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id should be a whole number, found str '1'"),
    "a flag": ("generation_config.json", {"eos_token_id": True}, "eos_token_id should be a whole number, found bool True"),
    "a list in a list": ("generation_config.json", {"eos_token_id": [1, [2]]}, r"should be a whole number, found list \[2\]"),
    "beyond the vocabulary": (
        "generation_config.json", {"eos_token_id": [1, 384]}, r"generation_config.json: eos_token_id .*, found 384",
    ),
    "negative": ("generation_config.json", {"eos_token_id": -1}, r"eos_token_id should be below vocab_size \(384\), found -1"),
    "a start that is text": ("config.json", {"decoder_start_token_id": "a"}, "config.json: decoder_start_token_id should be"),
    "a token that is a number": ("tokenizer_config.json", {"eos_token": 1}, "eos_token should be a text, found int 1"),
    "a list of tokens": (
        "tokenizer_config.json", {"eos_token": "x", "added_tokens_decoder": [1]}, "added_tokens_decoder should be a table",
    ),
    "a key that is no id": (
        "tokenizer_config.json", {"eos_token": "x", "added_tokens_decoder": {"\x1b[2J": {"content": "x"}}},
        r"should be an id, found str '\\x1b\[2J'",
    ),
    "an end beyond the vocabulary": (
        "tokenizer_config.json", {"eos_token": "<extra_id_200>"}, "tokenizer_config.json: the id of eos_token .*, found 459",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_ids_that_are_refused(case, folder):
    name, changes, says = REFUSED[case]
    (folder / "generation_config.json").write_text("{}")
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit(folder / name, **changes)
    with pytest.raises(ConfigError, match=says) as caught:
        ends_of(folder)
    assert str(folder) in str(caught.value) and str(caught.value).isprintable()
