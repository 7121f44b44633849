"""`generate --window` and `--follow`, `bench --surprise` and `--quality --window`, from their options to their output."""

import json
import os

import pytest
from typer.testing import CliRunner

from marlin_cli.api import MegaByteModel
from marlin_cli.cli import app
from marlin_cli.commands import follow
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from small_networks import PACKABLE, random_weights

    path = tmp_path_factory.mktemp("models") / "model"
    MegaByteModel(random_weights(MegaByteConfig(**PACKABLE)), choose_device("cpu")).save(path)
    return str(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.log"
    path.write_bytes(b"one line is like another\n" * 20 + b"\xff\x00 and one is not\n" + b"one line is like another\n" * 9)
    return path


def invoke(*arguments, data=b""):
    result = CliRunner().invoke(app, [*map(str, arguments)], input=data)
    if isinstance(result.exception, UsageError):
        raise result.exception
    return result


def test_a_stream_goes_on_beyond_the_context(model):
    context = 96
    whole = invoke("generate", model, "-p", "ab", "--max-bytes", 300, "--window", 40, "--sinks", 2, "--raw")
    assert len(whole.stdout_bytes) == 300
    packed = invoke("generate", model, "-p", "x" * 200, "--max-bytes", 9, "--window", 40, "--kv-bits", 8, "--json")
    assert json.loads(packed.stdout)["generated_bytes"] == 9
    again = invoke("generate", model, "-p", "ab", "--max-bytes", 300, "--window", "restart", "--raw")
    plain = invoke("generate", model, "-p", "ab", "--max-bytes", 300, "--raw")
    assert len(again.stdout_bytes) == 300 and again.stdout_bytes[: context - 2] == plain.stdout_bytes


def test_surprise_tells_the_costliest_lines(model, text, tmp_path):
    found = json.loads(invoke("bench", model, "--surprise", text, "--top", 3, "--format", "json").stdout)
    assert found["bytes"] == len(text.read_bytes()) and found["lines"] == 30 and len(found["costliest"]) == 3
    table = invoke("bench", model, "--surprise", text, "--output", tmp_path / "c.jsonl").stdout
    assert "30 lines" in table and "costliest lines" in table
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 30
    lines = invoke("bench", model, "--surprise", text, "--format", "jsonl", "--kv-bits", 8, "--window", "64").stdout
    assert [json.loads(line)["line"] for line in lines.splitlines()] == list(range(1, 31))


def test_an_empty_file_is_told_in_a_line(model, tmp_path):
    (tmp_path / "log").touch()
    result = CliRunner().invoke(app, ["bench", str(model), "--surprise", str(tmp_path / "log")])
    assert isinstance(result.exception, UsageError) and not result.stdout
    assert str(result.exception) == f"--surprise {tmp_path / 'log'}: is empty; there is nothing to score"


def test_quality_of_streams_knows_the_cache(model, text):
    asked = ("bench", model, "--no-throughput", "--quality", text, "--window", 64, "--format", "json")
    plain, packed, sparse = (
        json.loads(invoke(*asked, *more).stdout) for more in ((), ("--kv-bits", "4"), ("--sparse", "1e-3"))
    )
    costs = [each["models"][0]["quality"]["all_domains"]["bits_per_byte"]["value"] for each in (plain, packed, sparse)]
    assert plain["quality_settings"]["window"] == {"bytes": 64, "sinks": None}
    assert costs[0] != costs[1] and costs[2] == pytest.approx(costs[0], abs=1e-2)
    assert [read <= there > 0 for read, there in sparse["models"][0]["quality"]["pages_read"]] == [True]


def test_what_is_followed_is_continued_at_each_pause(model, monkeypatch):
    parts = iter((b"one", None, b"two", None, None, b"three"))
    monkeypatch.setattr(follow.FollowedPipe, "read", lambda pipe, most: next(parts, b""))
    monkeypatch.setattr(follow.FollowedPipe, "has_more", False)
    monkeypatch.setattr(follow, "stdin_descriptor", lambda: os.open(os.devnull, os.O_RDONLY))
    found = [json.loads(line) for line in invoke("generate", model, "--follow", "--max-bytes", 5, "--json").stdout.splitlines()]
    assert [each["read_bytes"] for each in found] == [3, 6, 11] and {each["generated_bytes"] for each in found} == {5}
    alone = json.loads(invoke("generate", model, "-p", "onetwo", "--max-bytes", 5, "--json").stdout)
    assert found[1]["bytes_base64"] == alone["bytes_base64"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "{}", "--window", "1M"), "--window must be 8 to 96 bytes"),
        (("generate", "{}", "--window", "40", "--sinks", "10"), "for this model with 10 sinks"),
        (("generate", "{}", "--window", "restart", "--sinks", "2"), "leave --sinks out"),
        (("generate", "{}", "--window", "no"), "is not a size"),
        (("generate", "{}", "--sinks", "2"), "--sinks needs --window"),
        (("generate", "{}", "--sparse", "2"), "--sparse must be 0 or more and less than 1"),
        (("generate", "byt5-demo", "--window", "40"), "has no meaning for byt5-demo"),
        (("generate", "{}", "--window", "40", "--save-state", "s"), "no meaning beside --save-state"),
        (("generate", "{}", "--follow", "-p", "x"), "no meaning beside --prompt"),
        (("bench", "{}", "--window", "40"), "--window needs --quality or --surprise"),
        (("bench", "{}", "--top", "4"), "--top needs --surprise"),
        (("bench", "{}", "--surprise", "x", "--quality", "y"), "no meaning beside --surprise"),
        (("bench", "{}", "--quality", "x", "--window", "40", "--resume"), "no meaning beside --window"),
        (("bench", "{}", "--quality", "x", "--window", "40", "--stride-bytes", "4"), "no meaning beside --window"),
        (("bench", "{}", "--surprise", "x", "--resume"), "goes on beside its --output"),
        (("bench", "{}", "--surprise", "x", "--format", "csv"), "says nothing of a stream"),
        (("bench", "{}", "{}", "--surprise", "x"), "scores by one model, found 2"),
        (("bench", "{}", "--surprise", "x", "-o", "c.txt"), "name it .jsonl"),
    ],
)
def test_options_that_have_no_meaning_are_refused(model, arguments, said):
    with pytest.raises(UsageError, match=said):
        invoke(*(each.replace("{}", model) for each in arguments))
