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
from marlin_cli.files import check_regular, sha256_of_file, shipped
from marlin_cli.text import quoted

SUFFIXES = (".yaml", ".yml")
DOMAIN_NAME = r"[a-z0-9_]+"

# The largest sizes that a corpus takes: what 64 bits count, and a window that fits memory.
MOST_BYTES = (1 << 63) - 1
MOST_WINDOW_BYTES = 1 << 30

MOST_NAME = 1024  # characters
MOST_SUMS_BYTES = 64 << 20


@dataclass(frozen=True)
class RecipeSource:
    """A source in a recipe."""

    domain: str  # multilingual, code, binary, or a name of your own
    path: str  # file, folder or pattern, relative to the recipe; or hf:name[/config][@split]
    weight: float = 1.0  # against the weights of the others

    def __post_init__(self) -> None:
        if not re.fullmatch(DOMAIN_NAME, self.domain):
            raise ConfigError(f"the domain {quoted(self.domain)} is not a name of a-z, 0-9 and _")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(f"the weight of {quoted(self.path)} must be above 0 and finite, found {self.weight}")


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
        if self.checksums is not None and not (self.checksums.isprintable() and len(self.checksums) <= MOST_NAME):
            raise ConfigError(f"checksums {quoted(self.checksums)} is no name of a file")
        for key, value, most in (("max_bytes", self.max_bytes, MOST_BYTES), ("seq_bytes", self.seq_bytes, MOST_WINDOW_BYTES)):
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{key} must be at least 1 and at most {most}, found {quoted(value)}")


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
    check_regular(sums, CorpusError)
    try:
        with sums.open("rb") as opened:
            data = opened.read(MOST_SUMS_BYTES + 1)
    except OSError as error:
        raise CorpusError(f"{sums}: cannot read the checksums: {error.strerror}") from None
    if len(data) > MOST_SUMS_BYTES:
        raise CorpusError(f"{sums}: is larger than {MOST_SUMS_BYTES:,} bytes, more than any list of checksums")
    # Names are bytes, as the system has them.
    lines = os.fsdecode(data).removesuffix("\n").split("\n") if data else []
    listed = set()
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+?)\r?", line)
        if match is None:
            raise CorpusError(f"{sums}: line {number} is not a checksum and a name; write it with sha256sum")
        file = sums.parent / match[2]
        if not os.path.isfile(file):
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
