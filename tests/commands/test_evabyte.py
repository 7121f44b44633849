"""Chats and marks of EvaByte on the command line, and what has no chats."""

import json
import sys

import pytest
from block_recurrent_cases import random_block_recurrent
from evabyte_cases import evabyte_folder, random_evabyte

from marlin_cli import ContinuingModel, cli
from marlin_cli.engine.generation import Stopping
from marlin_cli.engine.sampling import Sampling
from marlin_cli.models.evabyte_ids import chat
from marlin_cli.ops.device import choose_device


@pytest.fixture
def marlin(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def test_a_chat(tmp_path, marlin):
    evabyte_folder(tmp_path / "model", random_evabyte())
    code, out, _ = marlin("generate", "model", "-p", "Hi.", "--chat", "--max-bytes", "8", "--json")
    model = ContinuingModel.from_pretrained(tmp_path / "model", device="cpu")
    text = chat([("user", b"Hi.")])
    expected = b"".join(piece.data for piece in model.pieces([text], Stopping(8), Sampling(), sentinels=True))
    assert code == 0 and json.loads(out)["prompt_bytes"] == len(text)
    assert json.loads(out)["text"].encode(errors="replace") == expected.decode(errors="replace").encode(errors="replace")


def test_what_has_no_chats(tmp_path, marlin):
    ContinuingModel(random_block_recurrent(), choose_device("cpu")).save(tmp_path / "other")
    code, out, error = marlin("generate", "other", "-p", "a", "--chat")
    assert code == 2 and not out and "a Block-Recurrent Transformer has no form of chats" in error
    code, _, error = marlin("generate", "other", "-p", "a", "--sentinel")
    assert code == 2 and "knows none" in error
    code, _, error = marlin("generate", "megabyte-demo", "-p", "a", "--chat")
    assert code == 2 and "--chat has no meaning for" in error


def test_bits_of_what_does_not_grow(tmp_path, marlin):
    ContinuingModel(random_block_recurrent(head_dim=32), choose_device("cpu")).save(tmp_path / "other")
    code, _, error = marlin("quantize", "other", "-o", "packed", "--kv-bits", "8")
    assert code == 2 and "keeps no keys and values that grow" in error and not (tmp_path / "packed").exists()
    code, _, error = marlin("quantize", "other", "-o", "packed", "--recipe", "smallest")  # which says kv_bits 4
    assert code == 0, error
    assert marlin("generate", "packed", "-p", "a", "--max-bytes", "3")[0] == 0
