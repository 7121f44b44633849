"""What a corpus is called on the command line, and the files or repositories that it stands for."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from marlin_cli.config import from_mapping
from marlin_cli.errors import CorpusError
from marlin_cli.files import sha256_of_file, shipped

DOMAINS = ("multilingual", "code", "binary")
DOMAIN_NAME = "[a-z][a-z0-9_]*"
UNNAMED_DOMAIN = "other"  # of a path that is given no name
STDIN = "-"
HUB_PREFIX = "hf:"
TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Source:
    """One stream of bytes: files, tables whose rows hold text or bytes, a dataset on the hub, or stdin."""

    domain: str
    weight: float  # chance that the next window comes from here, against the weights of the others
    files: tuple[Path, ...] = ()
    hub: str | None = None  # name[/config][@split], without the prefix
    stdin: bool = False

    @property
    def keeps_compressed(self) -> bool:
        """Binary data is taken as it lies; elsewhere .gz and .zst are read through."""
        return self.domain == "binary"


@dataclass(frozen=True)
class RecipeSource:
    """A source in a recipe file; `path` is relative to it."""

    domain: str
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A recipe file: sources, and the checksums (as `sha256sum` writes them) of the files that it may rely on."""

    sources: tuple[RecipeSource, ...]
    checksums: str | None = None


def parse_source(text: str) -> list[Source]:
    """The sources that `text` names: a recipe, `[name=]path[:weight]`, `[name=]hf:name[:weight]`, or `-`.

    A path may be a file, a folder (every file below it, hidden ones left out), or a glob pattern. In a folder that has
    a subfolder called multilingual, code or binary, each subfolder is a domain. A path without a name is of the domain
    `other`. A recipe is the name of a shipped one, or a .yaml file without a name before it.

    Raises:
        CorpusError: nothing of that name, or no bytes in it.
    """
    name, rest, weight = _split(text)
    if name is None and rest.endswith((".yaml", ".yml")):
        if not Path(rest).is_file():
            raise CorpusError(f"{rest}: no such recipe")
        return _read_recipe(Path(rest))
    if not Path(text).exists() and (shipped("calibration") / f"{text}.yaml").is_file():
        return _read_recipe(shipped("calibration") / f"{text}.yaml")
    if rest == STDIN:
        return [Source(name or UNNAMED_DOMAIN, weight, stdin=True)]
    if rest.startswith(HUB_PREFIX):
        return [Source(name or UNNAMED_DOMAIN, weight, hub=rest.removeprefix(HUB_PREFIX))]
    path = Path(rest).expanduser()
    if name is None and path.is_dir():
        folders = sorted(each for each in path.iterdir() if each.is_dir() and re.fullmatch(DOMAIN_NAME, each.name))
        if any(folder.name in DOMAINS for folder in folders):
            return [Source(folder.name, weight, _files(folder, text)) for folder in folders]
    return [Source(name or UNNAMED_DOMAIN, weight, _files(path, text))]


def _split(text: str) -> tuple[str | None, str, float]:
    """Name, path and weight; an existing path that contains = or : is taken as it stands."""
    if Path(text).exists():
        return None, text, 1.0
    match = re.fullmatch(rf"(?:({DOMAIN_NAME})=)?(.+?)(?::(\d+(?:\.\d+)?))?", text, re.DOTALL)
    if match is None:
        raise CorpusError(f"--corpus {text!r} is not [name=]path[:weight]")
    name, rest, weight = match.groups()
    if weight is not None and float(weight) == 0:
        raise CorpusError(f"--corpus {text!r}: the weight must be above 0")
    return name, rest, float(weight or 1.0)


def _files(path: Path, text: str) -> tuple[Path, ...]:
    """The regular files of a path, a folder or a pattern, sorted, without empty ones."""
    if path.is_dir():
        found = [file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not found:
            raise CorpusError(f"{text}: no such file, folder, pattern or shipped recipe")
    files = tuple(sorted(file for file in found if file.is_file() and file.stat().st_size > 0))
    if not files:
        raise CorpusError(f"{text}: holds no bytes")
    return files


def _read_recipe(path: Path) -> list[Source]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorpusError(f"{path}: cannot read as YAML: {' '.join(str(error).split())}") from None
    recipe = from_mapping(Recipe, document, str(path))
    if not recipe.sources:
        raise CorpusError(f"{path}: names no sources")
    if recipe.checksums is not None:
        _check_sums(path.parent / recipe.checksums)
    sources = []
    for source in recipe.sources:
        if not source.weight > 0:
            raise CorpusError(f"{path}: the weight of {source.path!r} must be above 0")
        sources.append(Source(source.domain, source.weight, _files(path.parent / source.path, f"{path}: {source.path}")))
    return sources


def _check_sums(path: Path) -> None:
    """Compare the files that a SHA256SUMS file lists with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"{path}: cannot read the checksums: {error.strerror}") from None
    for line in lines:
        wanted, _, name = line.partition("  ")
        file = path.parent / name
        if not file.is_file():
            raise CorpusError(f"{file}: is missing, but {path.name} lists it; install marlin again")
        if sha256_of_file(file) != wanted:
            raise CorpusError(f"{file}: its SHA-256 is not the one in {path.name}; install marlin again")
