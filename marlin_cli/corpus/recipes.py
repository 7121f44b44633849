"""Recipe files: which corpora, how often each is drawn, how many bytes. Reads and checks them; opens no corpus."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from marlin_cli.config import from_mapping
from marlin_cli.documents import read_yaml
from marlin_cli.errors import ConfigError, CorpusError
from marlin_cli.files import sha256_of_file, shipped

SUFFIXES = (".yaml", ".yml")
DOMAIN_NAME = r"[a-z0-9_]+"


@dataclass(frozen=True)
class RecipeSource:
    """A source in a recipe."""

    domain: str  # multilingual, code, binary, or a name of your own
    path: str  # file, folder or pattern, relative to the recipe; or hf:name[/config][@split]
    weight: float = 1.0  # against the weights of the others

    def __post_init__(self) -> None:
        if not re.fullmatch(DOMAIN_NAME, self.domain):
            raise ConfigError(f"the domain {self.domain!r} is not a name of a-z, 0-9 and _")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"the weight of {self.path!r} must be above 0 and finite, found {self.weight}")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says. The two sizes hold where the caller names none."""

    sources: tuple[RecipeSource, ...]
    checksums: str | None = None  # file as `sha256sum` writes it, relative to the recipe; lists all that is read
    max_bytes: int | None = None  # None: all there is
    seq_bytes: int = 16384  # bytes of a window

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("names no sources")
        for key, value in (("max_bytes", self.max_bytes), ("seq_bytes", self.seq_bytes)):
            if value is not None and value < 1:
                raise ConfigError(f"{key} must be at least 1, found {value}")


def find_recipe(name: str | Path) -> Path | None:
    """The file of a recipe that is named by its path or, if it ships with marlin, by its name; None for other names.

    Raises:
        CorpusError: the path of a recipe that is not there.
    """
    text = str(name)
    if text.endswith(SUFFIXES):
        if not os.path.isfile(text):
            raise CorpusError(f"{text}: no such recipe")
        return Path(text)
    if re.fullmatch(r"[A-Za-z0-9_-]+", text):
        path = shipped("calibration") / f"{text}.yaml"
        if os.path.isfile(path):
            return path
    return None


def load_recipe(name: str | Path) -> Recipe:
    """The recipe in a .yaml file, or the shipped one of that name.

    Raises:
        CorpusError: there is none, or it is not YAML.
        ConfigError: a key or a value that a recipe does not have.
    """
    path = find_recipe(name)
    if path is None:
        raise CorpusError(f"{name}: no such recipe; name a .yaml file or a shipped recipe, such as default")
    return from_mapping(Recipe, read_yaml(path, CorpusError), str(path))


def check_sums(sums: Path, used: Iterable[Path]) -> None:
    """Compare the files that a SHA256SUMS file lists with it, and see that it lists every file that is used.

    Raises:
        CorpusError: naming the file that is missing, changed or not listed.
    """
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{sums}: cannot read the checksums: {error}") from None
    listed = set()
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            raise CorpusError(f"{sums}: line {number} is not a checksum and a name; write it with sha256sum")
        file = sums.parent / match[2]
        if not file.is_file():
            raise CorpusError(f"{file}: is missing, but {sums.name} lists it; restore it, or install marlin again")
        try:
            found = sha256_of_file(file)
        except OSError as error:
            raise CorpusError(f"{file}: cannot read: {error.strerror}") from None
        if found != match[1]:
            raise CorpusError(f"{file}: its SHA-256 is not the one in {sums.name}; restore it, or install marlin again")
        listed.add(file.resolve())
    for file in used:
        if file.resolve() not in listed:
            raise CorpusError(f"{file}: is not listed in {sums.name}; remove it, or list it")
