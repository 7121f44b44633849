"""The Python interface: `load` a model, then ask it for what it can do, or for a packed copy of itself."""

from pathlib import Path
from typing import TypeAlias

import mlx.core as mx

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.checkpoints import ImportOptions as ImportOptions
from marlin_cli.checkpoints import architecture_of
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.errors import UsageError
from marlin_cli.models import Architecture, Capability, architecture_named
from marlin_cli.ranks import ALONE, Ranks
from marlin_cli.text import quoted, with_article

# The design document's names of the first models of each kind.
MegaByteModel = ContinuingModel
ByT5Model = AnsweringModel

AnyModel: TypeAlias = ContinuingModel | AnsweringModel | EncodingModel

MODELS: dict[Capability, type[AnyModel]] = {
    Capability.CONTINUES: ContinuingModel,
    Capability.ANSWERS: AnsweringModel,
    Capability.ENCODES: EncodingModel,
}


def encode(text: str) -> bytes:
    """Text as the bytes (UTF-8) that a byte-level model reads: its whole tokenizer."""
    return text.encode("utf-8")


def decode(data: bytes, errors: str = "replace") -> str:
    """Bytes as text (UTF-8); `errors` as in `bytes.decode`."""
    return data.decode("utf-8", errors=errors)


def architecture_at(path: str | Path) -> Architecture:
    """The architecture of the model at a path (a shipped name, a repository on the hub). No weight is read.

    Raises:
        CheckpointError, ConfigError: there is no model, or its configuration is damaged.
    """
    where = locate_model(str(path))
    return architecture_named({"model_type": architecture_of(where)}, str(path))


def capability_of(path: str | Path) -> Capability:
    """What the model at a path does with bytes; see `architecture_at`."""
    return architecture_at(path).capability


def load(
    path: str | Path,
    *,
    device: str = "auto",
    kv_bits: int | tuple[int, int] | None = None,
    activation_bits: int = 16,
    dtype: mx.Dtype | None = None,
    options: ImportOptions | None = None,
    split: Ranks = ALONE,
    streams: bool = False,
) -> AnyModel:
    """Read any supported model; see `Model.from_pretrained`. What it can do is said by its class."""
    found = MODELS[capability_of(path)]
    return found.from_pretrained(
        path, device=device, kv_bits=kv_bits, activation_bits=activation_bits, dtype=dtype, options=options, split=split,
        streams=streams,
    )  # fmt: skip


def ranks_to_split(part: str | None, model: str, ranks: Ranks) -> Ranks:
    """The ranks that share a model: all of the job where --split names its part, else none.

    Raises:
        UsageError: another part than the model's, or a process that is alone.
    """
    if part is None:
        return ALONE
    architecture = architecture_at(model)
    if architecture.split is None or architecture.split.part != part:
        known = "each rank holds all" if architecture.split is None else f"ranks share the {architecture.split.part}"
        mend = "leave it out" if architecture.split is None else f"take --split {architecture.split.part}"
        raise UsageError(f"--split {quoted(part)}: {model} is {with_article(architecture.title)}, of which {known}; {mend}")
    if ranks.size == 1:
        raise UsageError(f"--split {part} shares a model among ranks, and this process is alone; start it by mlx.launch -n 2")
    return ranks
