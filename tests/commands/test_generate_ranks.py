"""`marlin generate` by ranks: what one process writes, by rank 0 alone; one that dies is named, nothing finished is lost."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import shared_models
from ring import ended, ring

TIMES = ("first_byte_ms", "wall_ms", "bytes_per_second")
PROMPTS = ["", "abcdefg", "The rest is here.", "0123456789" * 4, "x", "Another one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    for name in ("grouped", "byt5", "bygpt5"):
        shared_models.write(folder, name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt, "id": prompt}) + "\n" for prompt in PROMPTS))
    return folder


def command(folder: Path, model: str, *options: str) -> list[str]:
    given = ["--prompts", str(folder / "prompts.jsonl"), "--max-bytes", "20", "--device", "cpu", *options]
    return ["-m", "marlin_cli", "generate", str(folder / model), *given]


def lines(text: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in text.splitlines()]


def alone(arguments: list[str]) -> list[dict[str, Any]]:
    return lines(subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("model", "part"), [("grouped", "global"), ("byt5", "encoder"), pytest.param("bygpt5", None, marks=pytest.mark.slow)]
)
def test_ranks_write_what_one_process_writes(model: str, part: str | None, folder: Path) -> None:
    drawn = ["--temperature", "0.7", "--seed", "5"]
    expected = alone(command(folder, model, *drawn))
    assert len(expected) == len(PROMPTS)
    for split in [[], *([] if part is None else [["--split", part]])]:
        with ring(command(folder, model, *drawn, "--batch-size", "2", *split), folder) as processes:
            first, second = ended(processes)
        assert [(code, errors) for code, _, errors in (first, second)] == [(0, ""), (0, "")]
        assert _but_scores(lines(first[1])) == _but_scores(expected)
        assert second[1] == ""


def _but_scores(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over ranks round otherwise."""
    return [{**each, "score": round(each.get("score", 0), 3)} for each in documents]


@pytest.mark.slow
def test_beams_of_many_inputs_go_to_all_ranks(folder: Path) -> None:
    searched = ["--beams", "3", "--n-best", "2"]
    expected = alone(command(folder, "byt5", *searched))
    assert len(expected) == 2 * len(PROMPTS)
    with ring(command(folder, "byt5", *searched, "--batch-size", "2"), folder) as processes:
        first, second = ended(processes)
    assert (first[0], second) == (0, (0, "", ""))
    assert _but_scores(lines(first[1])) == _but_scores(expected)


def test_one_prompt_is_streamed_by_ranks_that_share_a_model(folder: Path) -> None:
    arguments = ["-m", "marlin_cli", "generate", str(folder / "grouped"), "-p", "abc", "--max-bytes", "20", "--device", "cpu"]
    expected = subprocess.run([sys.executable, *arguments, "--raw"], capture_output=True, check=True).stdout
    with ring([*arguments, "--json", "--split", "global"], folder) as processes:
        first, second = ended(processes)
    assert (first[0], second) == (0, (0, "", ""))
    assert base64.b64decode(lines(first[1])[0]["bytes_base64"]) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["grouped", "--split", "encoder"],
            "--split .encoder.: .* is a MegaByte, .* share the global; take --split global",
        ),
        (["bygpt5", "--split", "global"], "--split has no meaning for .*, a model that continues bytes one by one"),
        (["grouped", "--split", "global"], "--split global shares a model among ranks, and this process is alone"),
    ],
)
def test_a_split_that_cannot_be_is_refused(options: list[str], expected: str, folder: Path) -> None:
    model, *rest = options
    result = subprocess.run([sys.executable, *command(folder, model, *rest)], capture_output=True, text=True)
    assert result.returncode == 2
    assert re.search(expected, result.stderr), result.stderr


def test_ranks_of_which_one_has_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    """Both find theirs in their own folder."""
    for rank, model in (("0", "grouped"), ("1", "dense")):
        shared_models.write(tmp_path, model)
        (tmp_path / model).rename(tmp_path / rank)
    program = (
        "import os; os.chdir(os.environ['FOLDER'] + '/' + os.environ['MLX_RANK']); from marlin_cli.cli import main; main()"
    )
    arguments = ["-c", program]
    with ring(
        [*arguments, "generate", ".", "-p", "a", "--device", "cpu"], folder, environment={"FOLDER": str(tmp_path)}
    ) as processes:
        first, second = ended(processes)
    assert (first[0], first[2]) == (1, "marlin: rank 1 has another model than rank 0; start all ranks on the same job\n")
    assert (second[0], second[1:]) == (1, ("", ""))


@pytest.mark.parametrize("model", ["grouped", pytest.param("byt5", marks=pytest.mark.slow)])
def test_what_was_finished_is_written_when_a_rank_dies(model: str, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * (number % 7)}) + "\n" for number in range(3000)))
    arguments = ["-m", "marlin_cli", "generate", str(folder / model), "--prompts", str(prompts), "--max-bytes", "20"]
    with ring([*arguments, "--device", "cpu", "--batch-size", "2"], folder) as (first, second):
        assert first.stdout is not None
        assert first.stdout.readline().startswith('{"index": 0, ')
        os.kill(second.pid, signal.SIGKILL)
        begun = time.monotonic()
        [(code, out, errors)] = ended([first])
        assert time.monotonic() - begun < 2
    assert code == 1
    assert errors.splitlines()[-1] == "marlin: rank 1 of 2 ended without finishing its share"
    documents = [json.loads(line) for line in out.splitlines()]
    assert all(document["stop_reason"] for document in documents)
    assert len({document["index"] for document in documents}) == len(documents) < 2999
