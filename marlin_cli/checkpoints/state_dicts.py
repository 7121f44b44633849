"""Which tensors of a training script's file are the model: tables in tables, prefixes of wrappers, copies of one model.

A network in another (EMA, Lightning, DDP, FSDP, torch.compile, accelerate) has its names behind prefixes, and a file may
hold it twice, as trained and as its mean over the training. A layout's marker, a name that it always has, tells where.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from marlin_cli.checkpoints.pickle_reader import TensorReference
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

Copy = Literal["ema", "model"]

# Keys under which training scripts put the state dict of a model, the nearest to the weights last.
WRAPPERS = ("checkpoint", "state_dict", "model_state_dict", "model", "module")

# What data parallelism, torch.compile and training classes put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")

# What torch.compile, FSDP and the recomputing of activations put before the names of any module.
INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

MOST_TABLES_DEEP = 8


@dataclass(frozen=True)
class Table:
    """Tensors of one dict of a file by name, what all names stand under (it ends with a dot), and the dict around it."""

    under: str
    tensors: Mapping[str, TensorReference]
    beside: Mapping[Any, Any]


def tables_of(document: Mapping[Any, Any]) -> Iterator[Table]:
    """Every dict with tensors that is reached by names alone, outer ones first; one in several or in itself comes once."""
    seen: set[int] = set()
    waiting: list[tuple[str, Mapping[Any, Any], Mapping[Any, Any], int]] = [("", document, {}, 0)]
    while waiting:
        under, table, beside, depth = waiting.pop(0)
        if id(table) in seen:
            continue
        seen.add(id(table))
        tensors = {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, TensorReference)}
        if tensors:
            yield Table(under, tensors, beside)
        if depth < MOST_TABLES_DEEP:
            inner = ((key, value) for key, value in table.items() if isinstance(key, str) and isinstance(value, dict))
            waiting.extend((f"{under}{key}.", value, table, depth + 1) for key, value in inner)


def innermost(document: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """The dict that lies under `WRAPPERS` in a document, and the one around it."""
    beside: Mapping[Any, Any] = {}
    seen: set[int] = set()
    while id(document) not in seen:
        seen.add(id(document))
        inner = next((document[key] for key in WRAPPERS if isinstance(document.get(key), dict)), None)
        if inner is None:
            break
        beside, document = document, inner
    return document, beside


def without_prefixes(names: Sequence[str]) -> dict[str, str]:
    """Names without the `PREFIXES` that all of them have -> the names."""
    plain = list(names)
    while prefix := next((each for each in PREFIXES if plain and all(name.startswith(each) for name in plain)), ""):
        plain = [name.removeprefix(prefix) for name in plain]
    return dict(zip(plain, names, strict=True))


@dataclass(frozen=True)
class Model:
    """Where a model stands among names: its own names -> those in the file, and its prefix."""

    names: Mapping[str, str]
    prefix: str
    others: tuple[str, ...]  # prefixes of further copies of it
    outside: tuple[str, ...]  # names in the file that belong to no copy

    @property
    def kind(self) -> Copy:
        """Is it the mean over the training, or the model as trained?"""
        return "ema" if _rank(self.prefix) == 0 else "model"


def find_model(names: Sequence[str], markers: Sequence[str], copy: Copy | None, path: Path) -> Model | None:
    """The model of which one of `markers` is a name; the mean over the training goes first, unless `copy` says another.

    None where no marker is there.

    Raises:
        CheckpointError: several models, none of the kind that `copy` names, or two tensors of one name.
    """
    plain = _without_wrappers(names, path)
    prefixes = _prefixes(plain, markers)
    if not prefixes:
        return None
    allowed = [each for each in prefixes if copy is None or (copy == "ema") == (_rank(each) == 0)]
    if not allowed:
        there = "the mean over the training alone" if copy == "model" else "no mean over the training (EMA)"
        raise CheckpointError(f"{path}: the import option weights is {copy}, but the file holds {there}")
    best = [each for each in allowed if _rank(each) == min(map(_rank, allowed))]
    if len(best) > 1:
        found = " and ".join(quoted(each or "no prefix") for each in best[:2])
        raise CheckpointError(f"{path}: holds {len(best)} models, under {found}; save the state dict of one")
    (prefix,) = best
    others = tuple(each for each in prefixes if each != prefix)
    within = tuple(each for each in others if each.startswith(prefix))
    own = {
        name.removeprefix(prefix): full
        for name, full in plain.items()
        if name.startswith(prefix) and not name.startswith(within)
    }
    outside = tuple(full for name, full in plain.items() if not name.startswith((prefix, *others)))
    return Model(own, prefix, others, outside)


def names_of_models(names: Sequence[str], markers: Sequence[str], path: Path) -> list[set[str]]:
    """The own names of every model of which one of `markers` is a name, and of further copies of it.

    Without any marker they are all names, less what all of them have before them.

    Raises:
        CheckpointError: two tensors of one name.
    """
    plain = _without_wrappers(names, path)
    prefixes = _prefixes(plain, markers)
    if not prefixes:
        return [set(without_prefixes(names))]
    return [{name.removeprefix(prefix) for name in plain if name.startswith(prefix)} for prefix in prefixes]


def _without_wrappers(names: Sequence[str], path: Path) -> dict[str, str]:
    """Names without what wrappers put inside them -> the names."""
    plain: dict[str, str] = {}
    for name in names:
        short = name
        for part in INSIDE:
            short = short.replace(part, "")
        if short in plain:
            raise CheckpointError(
                f"{path}: {quoted(name)} and {quoted(plain[short])} are names of one tensor; save one model alone"
            )
        plain[short] = name
    return plain


def _prefixes(plain: Iterable[str], markers: Sequence[str]) -> list[str]:
    """What stands before a marker."""
    return sorted(
        {name.removesuffix(marker) for marker in markers for name in plain if name == marker or name.endswith(f".{marker}")}
    )


def _rank(prefix: str) -> int:
    """0 for the mean over the training, 1 for a model as trained, 2 for the copy that ema_pytorch keeps of that."""
    parts = prefix.split(".")
    if not any("ema" in part.split("_") for part in parts):
        return 2 if "online_model" in parts else 1
    return 2 if "online_model" in parts else 0
