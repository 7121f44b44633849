"""Every option of every command against every family of models: used, or refused in one line that names it."""

import os
import sys
from typing import get_args

import mlx.core as mx
import pytest
from canine_cases import random_canine, random_la_canine
from decoder_cases import random_bygpt5
from mlx.utils import tree_map
from typer.main import get_command

from marlin_cli import ByT5Config, ByT5Model, EncodingModel, MegaByteModel, cli
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.commands.given import INPUTS, OUTPUTS, TEXTS, name_of
from marlin_cli.commands.options import parse_import_options, parse_size
from marlin_cli.commands.uses import CONTINUING, HEADS, MODELS, SERVED_BY, USES, Family
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.errors import UsageError
from marlin_cli.models.bygpt5_steps import BYGPT5
from marlin_cli.models.byt5_steps import BYT5
from marlin_cli.models.canine import Head
from marlin_cli.models.canine_steps import CANINE
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.models.megabyte_steps import MEGABYTE
from marlin_cli.ops.device import choose_device

COMMANDS = get_command(cli.app).commands

# Commands that have no shipped model of their own.
NEED_A_MODEL = ("quantize", "label", "encode", "serve")

# What stands after an option that takes a value, and what it needs beside it.
VALUES = {
    "--prompt": "ab",
    "--prompt-file": "SHORT",
    "--hex": "61",
    "--prompts": "PROMPTS",
    "--max-bytes": "4",
    "--max-length": "4",
    "--temperature": "0.5",
    "--top-k": "3",
    "--top-p": "0.5",
    "--min-p": "0.1",
    "--seed": "1",
    "--stop": "x",
    "--stop-hex": "78",
    "--kv-bits": "16",
    "--k-bits": "16",
    "--v-bits": "16",
    "--activation-bits": "16",
    "--beams": "2",
    "--n-best": "2",
    "--length-penalty": "0.5",
    "--early-stopping": "true",
    "--min-length": "1",
    "--prefix": "a",
    "--input-prefix": "a",
    "--save-state": "out.state",
    "--load-state": "TEXT",
    "--speculate": "auto",
    "--draft": "MODEL",
    "--prediction-file": "SHORT",
    "--batch-size": "2",
    "--import": "heads=2",
    "--device": "cpu",
    "--split": "global",
    "--ranks": "2",
    "--link": "10,1",
    "--corpus": "TEXT",
    "--pairs": "PAIRS",
    "--output": "OUT",
    "--seq-bytes": "32",
    "--noise-density": "0.2",
    "--span-bytes": "3",
    "--shard": "0/1",
    "--show": "STATS",
    **dict.fromkeys(("--global-bits", "--local-bits", "--encoder-bits", "--decoder-bits", "--cross-bits", "--wo-bits"), "8"),
    "--patcher-bits": "8",
    "--hash-bits": "8",
    "--global-format": "int8",
    "--local-format": "int8",
    "--group-size": "32",
    "--stats": "STATS",
    "--method": "rtn",
    "--domain-weight": "other=1",
    "--sequential-bytes": "1k",
    "--target-bpw": "9",
    "--save-recipe": "r.yaml",
    "--calibration-corpus": "TEXT",
    "--calibration-pairs": "PAIRS",
    "--distill-steps": "1",
    "--distill-corpus": "TEXT",
    "--distill-pairs": "PAIRS",
    "--recipe": "balanced",
    "--override": ".*q_proj=int8",
    "--report": "page.html",
    "--export": "compressed-tensors",
    "--prompt-bytes": "8",
    "--decode-bytes": "2",
    "--repeats": "1",
    "--seconds": "0",
    "--quality": "SCORED",
    "--reference": "MODEL",
    "--window-bytes": "32",
    "--stride-bytes": "32",
    "--max-bytes-per-file": "64",
    "--max-quality-bytes": "1k",
    "--reference-cache": "0",
    "--formats": "nvfp4",
    "--push": "owner/name",
    "--format": "json",
    "--plot": "plot.svg",
    "--chart": "speed",
    "--against": "MODEL",
    "--save": "saved",
    "--compare": "saved saved",
    "--context": "8",
    "--batch": "1",
    "--bits": "4",
    "--bandwidth": "9",
    **dict.fromkeys(("--second", "--question", "--choice"), "abc"),
    "--language": "cs",
    "--threshold": "0.1",
    "--best": "1",
    "--outside": "O",
    "--pad-to": "64",
    "--window": "64",
    "--sinks": "2",
    "--sparse": "0.001",
    "--surprise": "SCORED",
    "--top": "3",
    "--stride": "32",
    "--longest": "9",
    "--dtype": "bfloat16",
    "--pool": "mean",
    "--host": "127.0.0.1",
    "--port": "0",
    "--name": "tiny",
    "--api-key": "key",
    "--api-key-file": "SHORT",
    "--max-streams": "2",
    "--max-waiting": "2",
    "--cache-memory": "1G",
    "--state-memory": "1M",
    "--state-folder": "STATES",
    "--drain-seconds": "1",
    "--rows": "fast",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model of each family."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"patch_size": 4, "max_bytes": 96, "global_layers": 1, "local_layers": 1}
    wide = {f"{part}_{name}": value for part in ("global", "local") for name, value in (("dim", 32), ("heads", 1))}
    network = MegaByteModel(_network(MegaByteConfig(**sizes, **wide)), choose_device("cpu"))
    network.save(folder / "continues")
    for name, layers in (("answers", 1), ("encoder_alone", 0)):
        sizes = {"d_model": 32, "ffn_dim": 32, "heads": 1, "head_dim": 32, "encoder_layers": 1, "decoder_layers": layers}
        config = ByT5Config(**sizes, labels=() if layers else ("O", "A"))
        model = ByT5Model.from_config(config, device="cpu")
        mx.random.seed(1)
        model.network.update(tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.5, model.network.parameters()))
        model.save(folder / name)
    device = choose_device("cpu")
    for head in get_args(Head):
        labels = ("O", "A", "B") if head in ("sequence", "token") else ()
        EncodingModel(random_canine(layers=1, head=head, labels=labels), device).save(folder / head)
    EncodingModel(random_la_canine(layers=1, adapter_dim=32, language="cs"), device).save(folder / "sentence")
    bytewise = random_bygpt5(d_model=32, heads=1, head_dim=32, layers=1, max_bytes=96)
    ContinuingModel(bytewise, device).save(folder / "bytewise")
    by_head = {head: folder / head for head in HEADS}
    return {family: folder / family.name.lower() for family in Family} | {Family.ENCODES: by_head["token"]} | by_head


def _network(config):
    from marlin_cli.models.megabyte import MegaByte

    mx.random.seed(0)
    return MegaByte(config)


@pytest.fixture
def marlin(tmp_path, monkeypatch, capfd):
    """Run the program in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARLIN_ROWS", os.environ.get("MARLIN_ROWS", "fast"))  # serve says it to the process, for good

    def run(*arguments, stdin=os.devnull):
        monkeypatch.setattr(sys, "argv", ["marlin", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", open(stdin))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def refusal(code, out, err):
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("marlin: "), (code, out, err)
    return err


def options_of(command):
    return {name_of(parameter): parameter for parameter in COMMANDS[command].params if parameter.name != "help"}


@pytest.mark.parametrize("command", USES)
def test_every_option_has_its_line_in_the_table(command):
    assert set(USES) == set(COMMANDS)
    options = options_of(command)
    assert list(options) == [option for option in options if option in USES[command]]
    assert USES[command].keys() == options.keys()
    for option, uses in USES[command].items():
        assert uses, f"{option} has a use for no family"
        for each in uses.values():
            assert {*each.needs, *each.without, *each.unless} <= options.keys() - {option}
    assert {*OUTPUTS, *INPUTS, *TEXTS} <= {option for table in USES.values() for option in table}


@pytest.fixture(autouse=True)
def rows_as_they_are(monkeypatch):
    """A command that drafts would set how rows are computed, for all tests after it."""
    monkeypatch.setenv("MARLIN_ROWS", os.environ.get("MARLIN_ROWS", "fast"))


def _arguments(command, option, model, seen=()):
    """The option with a value, and what it needs."""
    if not option.startswith("--"):
        return []
    parameter = options_of(command)[option]
    value = [] if parameter.is_flag else VALUES[option].replace("MODEL", str(model)).split()
    needs = {each.needs for each in USES[command][option].values()}
    others = [_arguments(command, each[0], model) for each in needs if each]
    return [option, *value, *(others[0] if others else [])]


# Families that a command serves, and the architectures of the small models.
SERVED = {command: next(table[each] for each in MODELS if each in table).keys() for command, table in USES.items()}
ARCHITECTURE = {
    Family.CONTINUES: MEGABYTE, Family.BYTEWISE: BYGPT5,
    Family.ANSWERS: BYT5, Family.ENCODER_ALONE: BYT5, Family.ENCODES: CANINE,
}  # fmt: skip


def has_part(use, family):
    return not use.parts or ARCHITECTURE[family].parts & {*use.parts}


def has_head(use, family):
    return not use.heads or ("token" if family is Family.ENCODES else family) in use.heads


REFUSED = [
    (command, option, family)
    for command, table in USES.items()
    for option, uses in table.items()
    for family in Family
    if family in SERVED[command] and not (family in uses and has_part(uses[family], family) and has_head(uses[family], family))
] + [
    (command, option, head)
    for command, table in USES.items()
    for option, uses in table.items()
    for head in HEADS
    if Family.ENCODES in uses and not has_head(uses[Family.ENCODES], head)
]


@pytest.mark.parametrize(
    ("command", "family"), [(command, family) for command in USES for family in Family if family not in SERVED[command]]
)
def test_a_command_names_those_that_serve_a_model_which_it_does_not(command, family, models, marlin):
    err = refusal(*marlin(command, models[family], *(("--output", "x") if command in ("calibrate", "quantize") else ())))
    assert f"{models[family]}: is {family.value}, for which marlin {command} has no use; ask {SERVED_BY[family]}" in err


@pytest.mark.parametrize(("command", "option", "family"), REFUSED)
def test_an_option_without_a_use_for_a_model_is_refused(command, option, family, models, marlin, tmp_path):
    for name in ("TEXT", "PAIRS", "STATS", "SCORED"):
        (tmp_path / name).write_bytes(b"")
    arguments = _arguments(command, option, models[family])
    if "--output" not in arguments and command in ("calibrate", "quantize"):
        arguments += ["--output", "out.safetensors"]
    err = refusal(*marlin(command, models[family], *arguments))
    assert option in err or any(each in err for each in arguments if each.startswith("--")), err
    assert "has no meaning for" in err and (
        (HEADS[family] if family in HEADS else family.value) in err
        or "; it is for one that " in err
        or ", whose parts are " in err
        or (family is Family.ENCODER_ALONE and Family.ANSWERS.value in err)
    )


USED = [
    (command, option, family)
    for command, table in USES.items()
    for option, uses in table.items()
    for family, use in [*uses.items(), *((head, uses[Family.ENCODES]) for head in HEADS if Family.ENCODES in uses)]
    if (command in ("label", "encode") and family in HEADS and (command, family) != ("label", "none"))
    or (command == "bench" and family in ("none", "sentence"))
    or (family in SERVED[command] and has_part(use, family))
    if has_head(use, family) and command != "serve"  # which does not end by itself: tests/serving has its own
    # The first writes nothing, the second is for shapes and extras that these small models and this place lack, and ranks.
    if not (family is Family.ENCODER_ALONE and (command == "generate" or option == "--no-throughput"))
    and option not in ("--show", "--merge", "--compare", "--import", "--balance-keys", "--dequantize", "--plot", "--split")
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option", "family"), USED)
def test_an_option_with_a_use_is_taken(command, option, family, models, marlin, tmp_path):
    (tmp_path / "TEXT").write_bytes(b"some bytes of text\n" * 400)
    (tmp_path / "PAIRS.tsv").write_bytes(b"source\ttarget\n" * 40)
    (tmp_path / "PROMPTS").write_bytes(b'"ab"\n')
    (tmp_path / "SHORT").write_bytes(b"ab")
    (tmp_path / "TABS").write_bytes(b"ab\tcd\n")
    arguments = _arguments(command, option, models[family])
    if "--output" not in arguments and command in ("calibrate", "quantize"):
        arguments += ["--output", "OUT"]
    if "--sequential" in arguments and "--sequential-bytes" not in arguments:
        arguments += ["--sequential-bytes", "2k"]
    if command == "calibrate":
        arguments = [*arguments, *([] if "--max-bytes" in arguments else ["--max-bytes", "256"])]
        arguments += [] if {"--corpus", "--pairs"} & {*arguments} else ["--corpus", "TEXT"]
    if command == "generate" and not {"--max-bytes", "--max-length"} & {*arguments}:
        arguments += ["--max-bytes", "3"]
    if "--save-state" in arguments:
        arguments += ["--prompt", "a patch"]
    kind = Family.ENCODES if family in HEADS else family
    if command == "bench" and not {"--kernels", "--plan", "--surprise"} & {*arguments}:
        timed = {"--prompt-bytes": "8", "--decode-bytes": "1", "--repeats": "1"}
        if "--no-throughput" in arguments:
            arguments += ["--quality", "SCORED"] if "--quality" not in arguments else []
        else:
            arguments += [
                each for pair in timed.items() if pair[0] not in arguments and kind in USES[command][pair[0]] for each in pair
            ]
    stdin = os.devnull
    if command in ("label", "encode"):
        head = "token" if family is Family.ENCODES else family
        beside = {"answer": ["--question", "ab"], "choice": ["--choice", "ab"]}.get(head, [])
        arguments += beside if command == "label" and option not in beside else []
        if "--tabs" in arguments:
            stdin = "TABS"
        elif not {"--prompt", "--prompt-file", "--hex", "--prompts"} & {*arguments}:
            arguments += ["--prompt", "abcd"]
        pads = USES[command]["--pad-to"].get(Family.ENCODES)
        if "--pad-to" not in arguments and head in HEADS and has_head(pads, head):
            arguments += ["--pad-to", "16"]
    texts = family is Family.ENCODES or family in HEADS
    if "--quality" in arguments and texts and "--reference" not in arguments:
        arguments += ["--reference", str(models[family])]
    if "--quality" in arguments and family in CONTINUING and not {"--window-bytes", "--window"} & {*arguments}:
        arguments += ["--window-bytes", "64"]  # of a context of 96
    if "--window" in arguments and family is Family.BYTEWISE:  # which has no rows that a window lets go
        arguments[arguments.index("--window") + 1] = "restart"
    if "--export" in arguments:
        arguments += ["--local-bits" if family is Family.CONTINUES else "--wo-bits", "4"]
    names = {
        "OUT": {"calibrate": "out.safetensors", "bench": "out.json", "encode": "out.npy"}.get(command, "out"),
        "PAIRS": "PAIRS.tsv",
        "STATS": "STATS.safetensors",
    }
    names["SCORED"] = "TEXT" if family in CONTINUING or texts else "PAIRS.tsv"
    if "STATS" in arguments:
        made = ("--corpus", tmp_path / "TEXT", "--max-bytes", "256", "--output", "STATS.safetensors")
        code, _, err = marlin("calibrate", models[family], *made)
        assert code == 0, err
    model = [] if "--kernels" in arguments else [models[family]]
    code, out, err = marlin(command, *model, *(names.get(each, each) for each in arguments), stdin=stdin)
    assert code == 0, err
    assert out or any((tmp_path / name).exists() for name in names.values())


BESIDE = [
    (command, option, other)
    for command, table in USES.items()
    for option, uses in table.items()
    for other in sorted({each for use in uses.values() for each in use.without})
    if all(other in use.without for use in uses.values())
]


@pytest.mark.parametrize(("command", "option", "other"), BESIDE)
def test_an_option_without_a_use_beside_another_is_refused(command, option, other, marlin):
    own = _arguments(command, option, "m") if option.startswith("--") else ["m"]
    own += ["m"] if command in NEED_A_MODEL else []
    err = refusal(*marlin(command, *own, *_arguments(command, other, "m")[: 1 + len(VALUES.get(other, "").split())]))
    assert "has no meaning beside" in err or "needs" in err


NEEDS = [(command, option) for command, table in USES.items() for option, uses in table.items() if [*uses.values()][0].needs]


@pytest.mark.parametrize(("command", "option"), NEEDS)
def test_an_option_without_what_it_needs_is_refused(command, option, marlin):
    model = ["m"] if command in NEED_A_MODEL else []
    own = _arguments(command, option, "m")[: 1 if options_of(command)[option].is_flag else 2]
    assert f"{option} needs " in refusal(*marlin(command, *model, *own))


ONCE = [
    (command, option)
    for command in USES
    for option, parameter in options_of(command).items()
    if option.startswith("--") and not parameter.multiple and not parameter.is_flag
]


@pytest.mark.parametrize(("command", "option"), ONCE)
def test_a_second_value_is_refused(command, option, marlin):
    model = ["m"] if command in NEED_A_MODEL else []
    value = [option, *VALUES[option].split()]
    assert f"{option} is given 2 times" in refusal(*marlin(command, *model, *value, *value))


def test_a_flag_may_stand_twice_and_repeatable_options_do(models, marlin):
    code, _, err = marlin(
        "generate", models[Family.CONTINUES], "-p", "a", "--max-bytes", "1", "--raw", "--raw", "--stop", "x", "--stop", "y"
    )
    assert (code, err) == (0, "")


NUMBERS = {
    "huge size": (["generate", "--max-bytes", "9" * 27], "--max-bytes: '999"),
    "size of hundreds of digits": (["bench", "--prompt-bytes", "9" * 400], "--prompt-bytes: '999"),
    "negative k": (["generate", "-p", "a", "--temperature", "1", "--top-k", "-1"], "top_k must be 0 or more"),
    "whole number of many digits": (["generate", "--top-k", "9" * 5000], "--top-k"),
    "no temperature": (["generate", "--temperature", "nan"], "--temperature must be a finite number, found nan"),
    "endless": (["bench", "--seconds", "1e400"], "--seconds must be a finite number, found inf"),
    "no bandwidth": (["bench", "--plan", "--bandwidth", "nan"], "--bandwidth must be a finite number"),
    "bits beyond all": (["bench", "--plan", "--bits", str(10**400)], "--bits: <a whole number of"),
    "a seed beyond 64 bits": (["calibrate", "--seed", str(1 << 70), "-o", "s.safetensors"], "--seed"),
    "a share that is none": (["quantize", "m", "-o", "x", "--stats", "s", "--domain-weight", "x=nan"], "is not DOMAIN=SHARE"),
    "a domain twice": (
        ["quantize", "m", "-o", "x", "--stats", "s", "--domain-weight", "x=1", "--domain-weight", "x=2"], "'x' has two"
    ),
    "a shard of many": (["calibrate", "-o", "s.safetensors", "--shard", f"0/{10**30}"], "is not INDEX/COUNT"),
    "more than a kernel counts": (["generate", "-p", "a", "--temperature", "1", "--top-k", str(1 << 40)], "top_k must be"),
    "a penalty beyond numbers": (["generate", "byt5-demo", "--beams", "2", "--length-penalty", "1e300"], "length_penalty"),
    "more streams than fit": (["bench", "--batch", str(1 << 40)], "--batch"),
    "more beams than any search": (["generate", "byt5-demo", "-p", "a", "--beams", str(10**9)], "--beams"),
    "an empty path": (["bench", "--save", ""], "--save is empty"),
    "an empty model": (["generate", ""], "MODEL is empty"),
    "a name longer than any": (["quantize", "m", "-o", "x" * 5000], "has 5,000 characters"),
    "bytes that are no UTF-8": (["generate", "--device", os.fsdecode(b"\xff\x1b[31m")], "--device"),
    "one output for two": (["bench", "--output", "x.json", "--save", "./x.json"], "--output and --save both name x.json"),
    "an output that is read": (["bench", "--quality", "name=TEXT", "--save", "TEXT"], "would replace what --quality names"),
    "statistics over weights": (["calibrate", "-o", "model/model.safetensors"], "a part of the model there"),
    "results over a configuration": (["bench", "--save", "LINK"], "--save LINK would replace a part of the model there"),
    "sums over a part": (["calibrate", "--merge", "TEXT", "b", "-o", "TEXT"], "would replace what MODEL|FILE names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS)
def test_values_that_no_option_takes(kind, marlin, tmp_path):
    (tmp_path / "TEXT").write_bytes(b"text")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).touch()
    (tmp_path / "LINK").symlink_to(tmp_path / "model" / "config.json")
    arguments, words = NUMBERS[kind]
    err = refusal(*marlin(*arguments))
    assert words in err and len(err) < 1300 and "\x1b" not in err, err


def test_devices_take_what_everybody_writes(marlin, models):
    quick = ("--prompt-bytes", "8", "--decode-bytes", "1", "--repeats", "1", "--device", "cpu")
    outputs = ("--output", "/dev/null", "--format", "json", "--report", "/dev/null")
    assert marlin("bench", models[Family.CONTINUES], *quick, *outputs)[0] == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1.5k", 1536), ("9007199254740993", 9007199254740993), ("0.3k", 307), ("7T", 7 << 40), ("2MiB", 2 << 20)],
)
def test_sizes_are_exact(text, size):
    assert parse_size(text, "--x") == size


def test_the_code_of_a_language_is_text():
    """YAML takes no for false, and 16 for a number."""
    assert parse_import_options(["language=no"]).language == "no"
    assert parse_import_options(["language=16"]).language == "16"
    assert parse_import_options(["rope=no", "heads=2"]) == ImportOptions(rope=False, heads=2)


@pytest.mark.parametrize("text", ["1e400", "-1", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000, str(1 << 63), "nan", ""])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match=r"^--x: "):
        parse_size(text, "--x")
