"""Prompts from files, pipes and devices: read whole where they end, refused in one line where they do not."""

import gzip
import io
import json
import os
import sys
import threading
import types

import pytest
from typer.testing import CliRunner

from marlin_cli.cli import app
from marlin_cli.commands import prompts
from marlin_cli.commands.prompts import Prompt, one_prompt, read_prompts
from marlin_cli.errors import UsageError


def piped(path, data: bytes) -> str:
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(data,)).start()
    return str(path)


def test_pipes_are_read_to_their_end(tmp_path):
    assert one_prompt(None, piped(tmp_path / "one", b"\x00\xff"), None) == Prompt(b"\x00\xff")
    lines = b'\xef\xbb\xbf"a"\r\n\n{"prompt": "b", "id": 7}\n{"prompt_hex": "00ff"}'
    assert read_prompts(piped(tmp_path / "many", lines)) == [Prompt(b"a"), Prompt(b"b", 7), Prompt(b"\x00\xff")]


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="the system has no /dev/zero")
def test_a_device_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_PROMPT_BYTES", 1000)
    monkeypatch.setattr("marlin_cli.corpus.lines.MOST_LINE_BYTES", 1000)
    with pytest.raises(UsageError, match="/dev/zero: a prompt of more than 1,000 bytes, which no model reads"):
        one_prompt(None, "/dev/zero", None)
    with pytest.raises(UsageError, match="/dev/zero: line 1 is longer than 1,000 bytes"):
        read_prompts("/dev/zero")


def test_stdin_has_the_same_bounds(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_PROMPT_BYTES", 9)

    def stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))

    stdin(b"123456789")
    assert one_prompt(None, "-", None) == Prompt(b"123456789")
    stdin(b"1234567890")
    with pytest.raises(UsageError, match="stdin: a prompt of more than 9 bytes"):
        one_prompt(None, None, None)


def test_files_of_prompts_have_a_largest_size_and_number(tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(str(number))}\n" for number in range(9)))
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 8)
    with pytest.raises(UsageError, match="holds more than 8 prompts"):
        read_prompts(str(path))
    monkeypatch.setattr(prompts, "MOST_PROMPTS_BYTES", 20)
    with pytest.raises(UsageError, match="is larger than 20 bytes"):
        read_prompts(str(path))


def test_a_file_named_txt_has_a_text_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'one\r\n\n"two"\n{3}')
    assert [prompt.data for prompt in read_prompts(str(path))] == [b"one", b'"two"', b"{3}"]
    path.write_bytes(b"\n")
    with pytest.raises(UsageError, match="no prompts; write a text a line"):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\n\n", "no prompts"),
        (b'"a"\n[1]', "line 2: expected a string or an object, found list"),
        (b'{"prompt": "a", "prompt_hex": "00"}', "line 1: needs one of prompt"),
        (b'{"prompt": 5}', "line 1: needs one of prompt"),
        (b'{"prompt_base64": "?"}', "line 1: prompt_base64 is not base64"),
        (b'"\\ud800"', "line 1: the prompt holds half of a surrogate pair"),
        (b"9" * 5000, "line 1: is not JSON"),
        (b"[" * 100_000, "line 1: is not JSON"),
        (gzip.compress(b'"a"', mtime=0), "line 1: is not UTF-8"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, data, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_prompts(str(path))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["NaN", "-Infinity", '[{"a": 1e999}]'])
def test_a_name_that_json_cannot_say_is_refused(name, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "x", "id": {name}}}')
    with pytest.raises(UsageError, match=r"prompts\.jsonl: line 1: id holds a number that is not finite"):
        read_prompts(str(file))


@pytest.mark.parametrize("command", ["generate", "encode", "label"])
def test_a_text_in_the_place_of_the_model_is_told_where_it_belongs(command):
    found = CliRunner().invoke(app, [command, "to be or not"]).exception
    assert str(found).startswith("to be or not: no such file") and str(found).endswith("; a text is given with -p")
    assert "-p" not in str(CliRunner().invoke(app, [command, "nowhere"]).exception)
