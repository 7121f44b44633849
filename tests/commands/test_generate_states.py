"""`marlin generate --save-state` and `--load-state` as a user runs them."""

import os
import subprocess
import sys

import pytest

MARLIN = [sys.executable, "-m", "marlin_cli", "generate"]
PROMPT = "def main(arguments):\n    for each in arguments:\n        "


def run(*arguments, model=()):
    environment = {**os.environ, "MARLIN_ROWS": "exact"}
    return subprocess.run([*MARLIN, *model, *arguments], input=b"", capture_output=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    file = tmp_path_factory.mktemp("states") / "state"
    result = run("-p", PROMPT, "--max-bytes", "0", "--save-state", str(file))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    return file


def test_a_later_prompt_that_begins_alike_has_the_same_bytes(saved):
    asked = ("-p", PROMPT + "print(", "--max-bytes", "24", "--temperature", "0.5", "--seed", "3")
    plain, from_file = run(*asked), run(*asked, "--load-state", str(saved))
    assert (from_file.returncode, from_file.stderr) == (0, b"")
    assert from_file.stdout == plain.stdout and len(plain.stdout) == 24
    assert run(*asked, "--json", "--load-state", str(saved)).returncode == 0


def test_a_file_that_does_not_fit_is_told_and_changes_nothing(saved, tmp_path):
    damaged, asked = tmp_path / "damaged", ("-p", PROMPT, "--max-bytes", "8")
    data = bytearray(saved.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    plain = run(*asked)
    for arguments, said in (
        (
            ("--load-state", str(damaged)),
            f"{damaged}: is damaged: its bytes are not those that were written; the prompt is read",
        ),
        (
            ("--load-state", str(saved), "--v-bits", "8"),
            f"{saved}: is the state of another value_bits: '16', and here it is '8'",
        ),
    ):
        result = run(*asked, *arguments)
        assert result.returncode == 0 and result.stderr.count(b"\n") == 1
        assert result.stderr.decode().startswith(said) and result.stderr.endswith(b"the prompt is read as usual\n")
        assert result.stdout == plain.stdout or "--v-bits" in arguments


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("-p", "abc", "--save-state", "{}/new"), 2, "--save-state: --prompt has 3 bytes, and a state is of 4 or more"),
        (("--prompts", "x", "--save-state", "{}/new"), 2, "--save-state has no meaning beside --prompts; leave one out"),
        (("--prompts", "x", "--load-state", "{}/new"), 2, "--load-state has no meaning beside --prompts; leave one out"),
        (
            ("byt5-demo", "-p", "x", "--load-state", "{}/new"),
            2,
            "--load-state has no meaning for byt5-demo, a model that answers",
        ),
        (("-p", "a prompt", "--save-state", "{}"), 1, "is a folder; name a file to write"),
        (("-p", "a prompt", "--save-state", "{}/no/file"), 1, "the folder {}/no does not exist; make it first"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, code, said, tmp_path):
    result = run(*(argument.format(tmp_path) for argument in arguments))
    assert result.returncode == code and result.stderr.count(b"\n") == 1
    assert said.format(tmp_path) in result.stderr.decode()
    assert list(tmp_path.iterdir()) == [] and result.stdout == b""
