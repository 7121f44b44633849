"""What stands on the command line, checked before a command runs: once each, of possible values, of use, no file twice.

Commands are made of `Command`, which does all that needs no model; `check_models` does the rest when the models are named.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperOption

from marlin_cli.commands.uses import HEADS, MODELS, SERVED_BY, USES, Family, Use, Uses
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.text import quoted
from marlin_cli.writing import is_part_of_a_model

if TYPE_CHECKING:
    from marlin_cli.models import Architecture

# Options whose text is what a model reads or writes: it may be empty, and of any length.
TEXTS = (
    "--prompt", "--hex", "--stop", "--stop-hex", "--prefix", "--input-prefix",
    "--second", "--question", "--choice", "--outside",
)  # fmt: skip

# Characters of any other value; systems take no longer paths.
LONGEST_VALUE = 4096

# Whole numbers beyond this are none that a kernel takes, nor a seed.
LARGEST_NUMBER = (1 << 64) - 1

# Options that name files to write, and those that name what is read. Of --output alone a folder may take the place of
# the MODEL that it is made from, which --overwrite allows.
OUTPUTS = ("--output", "--save", "--report", "--plot", "--save-recipe", "--save-state")
INPUTS = (
    "MODEL", "MODEL|FILE", "--draft", "--prediction-file", "--stats", "--recipe", "--corpus", "--pairs", "--quality",
    "--reference", "--against", "--compare", "--surprise", "--calibration-corpus", "--calibration-pairs",
    "--distill-corpus", "--distill-pairs",
)  # fmt: skip


class Command(TyperCommand):
    """A command that takes each option once (but for repeatable ones) and refuses those that have no use beside others."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer has it, with the checks of this module after it.

        Raises:
            UsageError: see there.
        """
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            if not str(error).startswith("Got unexpected extra argument"):
                raise
            takes_files = any(name_of(each) == "--prompt-file" for each in self.params)
            hint = "; a text is given with -p, a file with --prompt-file or through a pipe" if takes_files else ""
            among = ", ".join(map(quoted, given[:8]))
            raise UsageError(f"{ctx.info_name}: an argument too many among {among}{hint}") from None
        if not ctx.resilient_parsing:
            self._check_once(ctx, given)
            values = options_given(ctx)
            _check_values(values)
            _check_uses(ctx.info_name, list(values), frozenset(Family))
            _check_files(values)
        return rest

    def _check_once(self, ctx: Any, args: list[str]) -> None:
        _, _, order = self.make_parser(ctx).parse_args(args=args)
        for option, count in Counter(order).items():
            if count > 1 and isinstance(option, TyperOption) and not (option.multiple or option.is_flag):
                raise UsageError(f"{name_of(option)} is given {count} times; it takes one value")


def name_of(parameter: Any) -> str:
    """The long form of an option, or how the help text calls an argument."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return str(next(each for each in parameter.opts if each.startswith("--")))


def options_given(context: typer.Context) -> dict[str, Any]:
    """The options and arguments of the command line by name, with their values; those left out are not there."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            given[name_of(parameter)] = context.params.get(parameter.name or "")
    return given


def check_models(context: typer.Context, models: Sequence[str]) -> None:
    """Refuse options that none of the models has a use for. Reads config.json, and weights' names where they decide.

    Raises:
        UsageError: there is such an option, or the command has no use for a model.
        MarlinError: a model that is not there or cannot be read.
    """
    from marlin_cli.api import architecture_at
    from marlin_cli.checkpoints.location import locate_model

    command, given = context.info_name or "", list(options_given(context))
    families: set[Family] = set()
    parts: set[str] = set()
    heads: set[str] = set()
    for model in models:
        try:
            path = locate_model(model)
        except CheckpointError as error:
            is_text = any(each.isspace() for each in model) and any(
                name_of(each) == "--prompt" for each in context.command.params
            )
            raise CheckpointError(f"{error}; a text is given with -p" if is_text else str(error)) from None
        architecture = architecture_at(path)
        found, possible = _families_of(architecture), _heads_of(architecture)
        _check_served(command, found, model)
        # Weights alone tell an encoder alone, and heads: they are looked at where it matters.
        if any(_is_open(USES[command][option], found, possible) for option in given):
            found, possible = _seen_in_weights(path, found, possible)
            _check_served(command, found, model)
        families |= found
        heads |= possible
        parts |= architecture.parts
    _check_uses(command, given, frozenset(families), " and ".join(models[:2]), frozenset(parts), frozenset(heads))


def _is_open(uses: Uses, families: set[Family], heads: set[str]) -> bool:
    """Does it depend on which of these families, or heads, a model has?"""
    wanted = {head for use in uses.values() for head in use.heads}
    return any(len(some & all_) not in (0, len(all_)) for some, all_ in (({*uses}, families), (wanted or heads, heads)))


def _check_served(command: str, families: set[Family], model: str) -> None:
    """Raise `UsageError` for a model that a command has no use for."""
    served = next(USES[command][each] for each in MODELS if each in USES[command])
    if not families & served.keys():
        (family,) = families
        raise UsageError(f"{model}: is {family.value}, for which marlin {command} has no use; ask {SERVED_BY[family]}")


def _families_of(found: "Architecture") -> set[Family]:
    """Those that a model may be of, as far as its architecture tells."""
    from marlin_cli.models import Capability, Reading

    if found.continuing is not None:
        return {Family.CONTINUES if found.continuing.reading is Reading.PATCHES else Family.BYTEWISE}
    return {Family.ENCODES} if found.capability is Capability.ENCODES else {Family.ANSWERS, Family.ENCODER_ALONE}


def _heads_of(found: "Architecture") -> set[str]:
    """The heads that the architecture of what encodes texts may have; of another none."""
    return set(getattr(found.config, "kinds_of_head", ()))


def _seen_in_weights(path: Path, candidates: set[Family], heads: set[str]) -> tuple[set[Family], set[str]]:
    """Of those that a model's architecture leaves open, its family and its head."""
    from marlin_cli.checkpoints import read_checkpoint

    if len(candidates) == 1 and len(heads) < 2:
        return candidates, heads
    config = read_checkpoint(path, check_values=False).config
    if heads:
        return candidates, {str(config.get("head", "none"))}
    return {Family.ANSWERS if config.get("decoder_layers") else Family.ENCODER_ALONE}, heads


def _check_uses(
    command: str,
    given: Sequence[str],
    families: frozenset[Family],
    models: str = "",
    parts: frozenset[str] | None = None,
    heads: frozenset[str] = frozenset(),
) -> None:
    """Raise `UsageError` for an option that none of `families` has a use for, beside the others that are given.

    Args:
        parts: of the models; None where they are not known.
        heads: of those that encode texts.
    """
    for option in given:
        uses = [USES[command][option].get(family) for family in Family if family in families]
        reasons = [_refusal(option, use, given) for use in uses]
        if None not in reasons:
            named = families - {Family.ENCODER_ALONE} or families  # where it does not matter whether there is a decoder
            what = " and ".join(family.value for family in Family if family in named)
            hint = _instead(command, option, families, parts)
            raise UsageError(f"{option} {next(filter(None, reasons), f'has no meaning for {models}, {what}{hint}')}")
        wanted = {part for use in uses if use is not None for part in use.parts}
        if parts is not None and wanted and not wanted & parts:
            hint = _instead(command, option, families, parts)
            raise UsageError(f"{option} has no meaning for {models}, whose parts are {', '.join(sorted(parts))}{hint}")
        fitting = {head for use in uses if use is not None for head in use.heads}
        if heads and fitting and not fitting & heads:
            does = [HEADS[head] for head in HEADS if head in heads]
            said = f", which {does[0]}" if len(does) == 1 else ""
            wanted_of = " or ".join(HEADS[head] for head in HEADS if head in fitting)
            raise UsageError(f"{option} has no meaning for {models}{said}; it is for one that {wanted_of}")


def _instead(command: str, option: str, families: frozenset[Family], parts: frozenset[str] | None) -> str:
    """The options that ask the same of the parts that the models have, as the end of a message; empty if there are none."""
    kind = option.rpartition("-")[2]
    found = [
        each
        for each, uses in USES[command].items()
        if each.endswith(f"-{kind}") and any({*use.parts} & (parts or set()) for of, use in uses.items() if of in families)
    ]
    return f"; it has {', '.join(found)}" if found and any(use.parts for use in USES[command][option].values()) else ""


def _refusal(option: str, use: Use | None, given: Sequence[str]) -> str | None:
    """What is wrong with an option of this use; empty where it has none, None where nothing is."""
    if use is None:
        return ""
    if use.needs and not any(each in given for each in use.needs):
        return f"needs {' or '.join(use.needs)}"
    beside = [each for each in use.without if each in given and not any(other in given for other in use.unless)]
    return f"has no meaning beside {beside[0]}; leave one out" if beside else None


def _check_values(given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for numbers that no option takes, and for names that are none."""
    for option, value in given.items():
        for each in _flat(value):
            if isinstance(each, float) and not math.isfinite(each):
                raise UsageError(f"{option} must be a finite number, found {each}")
            if isinstance(each, int) and abs(each) > LARGEST_NUMBER:
                raise UsageError(f"{option}: {quoted(each)} does not fit 64 bits")
            if isinstance(each, str) and option not in TEXTS:
                if not each:
                    raise UsageError(f"{option} is empty; name something or leave it out")
                if len(each) > LONGEST_VALUE:
                    raise UsageError(f"{option}: {quoted(each)} has {len(each):,} characters, more than any name")


def _check_files(given: Mapping[str, Any]) -> None:
    """Raise `UsageError` where two outputs are one file, or an output is what is read or a part of a model."""
    outputs = [(option, Path(given[option])) for option in OUTPUTS if option in given]
    for (one, path), (other, same) in combinations(outputs, 2):
        if _are_same(path, same):
            raise UsageError(f"{one} and {other} both name {same}; each needs a file of its own")
    inputs = [(option, path) for option in INPUTS for value in _flat(given.get(option)) for path in _paths_in(value)]
    for one, path in outputs:
        for other, same in inputs:
            if same.exists() and _are_same(path, same) and (one, other) != ("--output", "MODEL"):
                raise UsageError(f"{one} {path} would replace what {other} names; write to another file")
        if is_part_of_a_model(path):
            raise UsageError(f"{one} {path} would replace a part of the model there; write to another file")


def _are_same(one: Path, other: Path) -> bool:
    """Do they name one place? What is neither file nor folder, such as /dev/null, takes anything from everybody."""
    if one.exists() and not (one.is_file() or one.is_dir()):
        return False
    return os.path.realpath(one) == os.path.realpath(other) or (one.exists() and other.exists() and one.samefile(other))


def _paths_in(text: str) -> Iterator[Path]:
    """The path that a value of the form [name=]path[:weight] may hold."""
    for each in {text, text.partition("=")[2] or text}:
        yield from (Path(os.path.expanduser(found)) for found in {each, each.rpartition(":")[0] or each})


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)
