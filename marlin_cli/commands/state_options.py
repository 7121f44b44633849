"""`--save-state` and `--load-state` as what keeps the prompt of a run."""

from pathlib import Path

from marlin_cli.commands.options import about
from marlin_cli.commands.prompts import Prompt
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.state_files import StateFile
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.errors import UsageError
from marlin_cli.writing import check_output_file


def check_state_output(save: str | None) -> None:
    """Refuse a file that could not be written, before a model is read.

    Raises:
        OutputError: see `writing`.
    """
    if save is not None:
        check_output_file(Path(save))


def check_one_reader(ranks: int, save: str | None, load: str | None) -> None:
    """Refuse states where several ranks read a prompt, each of which would have one of its own.

    Raises:
        UsageError: there are several, and a state is asked for.
    """
    if ranks > 1 and (save is not None or load is not None):
        option = "--save-state" if load is None else "--load-state"
        raise UsageError(f"{option}: a state is what one process has read, and here {ranks} ranks read; run one alone")


def state_file(model: ContinuingModel, prompt: Prompt, load: str | None, save: str | None) -> StateFile:
    """What knows the beginning of the prompt, and writes its state.

    Raises:
        UsageError: a prompt of which there is nothing to write.
    """
    with about("--save-state:" if load is None else "--load-state:"):
        kind = kind_of(model.network, model.cache_bits)
    if save is not None and not kind.units.whole(len(prompt.data)):
        least = kind.units.size + kind.units.slack
        raise UsageError(f"--save-state: {prompt.where} has {len(prompt.data)} bytes, and a state is of {least} or more")
    return StateFile(kind, None if load is None else Path(load), None if save is None else Path(save))
