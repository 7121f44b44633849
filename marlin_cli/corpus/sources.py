"""What a corpus is called on the command line, and the files or repositories that it stands for. Opens none of them."""

import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from marlin_cli.corpus.patterns import files_below, files_matching
from marlin_cli.corpus.recipes import DOMAIN_NAME, Recipe, check_sums, find_recipe, load_recipe
from marlin_cli.errors import CorpusError
from marlin_cli.text import quoted

DOMAINS = ("multilingual", "code", "binary")
UNNAMED_DOMAIN = "other"  # of a path that is given no name: nothing is guessed from its bytes
STDIN = "-"
HUB_PREFIX = "hf:"

MOST_SHOWN = 200  # characters of a name in a message


@dataclass(frozen=True)
class Source:
    """One stream of bytes: files (raw, or tables whose rows hold text or bytes), a dataset on the hub, or stdin."""

    domain: str
    weight: float  # chance that the next window comes from here, against the weights of the others
    files: tuple[Path, ...] = ()
    hub: str | None = None  # name[/config][@split], without the prefix
    stdin: bool = False

    @property
    def keeps_compressed(self) -> bool:
        """Binary data is taken as it lies; elsewhere .gz, .zst, .bz2 and .xz are read through."""
        return self.domain == "binary"


def parse_source(text: str) -> list[Source]:
    """The sources that `text` names: a recipe, `[name=]path[:weight]`, `[name=]hf:name[:weight]`, or `-` for stdin.

    A recipe is a .yaml file or the name of a shipped one, which wins over a file of that name (`./default` is the
    file). A path is a file, a folder (every regular file below it; hidden ones left out, linked folders not entered) or
    a pattern of files, in which ** enters no linked folders. An existing path wins over the readings of its = and :
    characters. The name is the domain; without one it is `other`, except that a folder with subfolders multilingual,
    code or binary is a source for each.

    Raises:
        CorpusError: nothing of that name, no bytes in it, or no permission to read it.
        ConfigError: a recipe with a wrong key or value.
    """
    if not text:
        raise CorpusError("--corpus '': is empty; name a recipe, a path, hf:name, or - for stdin")
    found = find_recipe(text)
    if found is not None:
        return _sources_of_recipe(found, load_recipe(found))
    name, rest, weight = _split(text)
    domain = name or UNNAMED_DOMAIN
    if rest == STDIN:
        return [Source(domain, weight, stdin=True)]
    if rest.startswith(HUB_PREFIX):
        return [Source(domain, weight, hub=_hub_name(rest, _shown(text)))]
    path = Path(os.path.expanduser(rest))
    domains = [domain for domain in DOMAINS if os.path.isdir(path / domain)]
    if name is None and domains:
        return [Source(domain, weight, _files(path / domain, _shown(text))) for domain in domains]
    return [Source(domain, weight, _files(path, _shown(text)))]


def _sources_of_recipe(path: Path, recipe: Recipe) -> list[Source]:
    sources = []
    for entry in recipe.sources:
        where = f"{path}: {_shown(entry.path)}"
        if entry.path.startswith(HUB_PREFIX):
            sources.append(Source(entry.domain, entry.weight, hub=_hub_name(entry.path, where)))
        else:
            sources.append(Source(entry.domain, entry.weight, _files(path.parent / entry.path, where)))
    if recipe.checksums is not None:
        check_sums(path.parent / recipe.checksums, (file for source in sources for file in source.files))
    return sources


def _split(text: str) -> tuple[str | None, str, float]:
    """Name, path and weight."""
    if os.path.exists(text):
        return None, text, 1.0
    named = re.fullmatch(rf"({DOMAIN_NAME})=(.+)", text, re.DOTALL)
    name, rest = (named[1], named[2]) if named else (None, text)
    weighted = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", rest, re.DOTALL)
    if weighted is None or weighted[1] == HUB_PREFIX.rstrip(":") or os.path.exists(rest):
        return name, rest, 1.0
    weight = float(weighted[2])
    if not (weight > 0 and math.isfinite(weight)):
        raise CorpusError(f"--corpus {_shown(text)}: the weight must be above 0 and finite, found {weighted[2]}")
    return name, weighted[1], weight


def _hub_name(text: str, where: str) -> str:
    name = text.removeprefix(HUB_PREFIX)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}(@[\w.+\-\[\]:%]+)?", name):
        raise CorpusError(f"{where}: is not hf:name[/config][@split], such as hf:owner/name/config@train")
    return name


def _files(path: Path, text: str) -> tuple[Path, ...]:
    """The regular files of a path, a folder or a pattern, sorted, without empty ones; `text` begins the errors."""
    if os.path.isdir(path):
        found = list(files_below(path))
    elif os.path.exists(path):
        if not os.path.isfile(path):
            raise CorpusError(f"{text}: is not a regular file; pipe its bytes in and name -")
        found = [path]
    else:
        found = list(files_matching(str(path)))
        if not found:
            hint = "; a domain is named with a-z, 0-9 and _" if re.match(r"[^=/]*=", text) else ""
            raise CorpusError(f"{text}: no such file, folder, pattern or shipped recipe{hint}")
    files = []
    for file in sorted(found):
        try:
            status = file.stat()
        except OSError:
            continue  # a link to nothing, or gone meanwhile
        if stat.S_ISREG(status.st_mode) and status.st_size > 0:
            files.append(file)
    if not files:
        raise CorpusError(f"{text}: holds no bytes")
    for file in files:
        if not os.access(file, os.R_OK):
            raise CorpusError(f"{file}: no permission to read")
    return tuple(files)


def _shown(text: str) -> str:
    return text if text.isprintable() and len(text) <= MOST_SHOWN else quoted(text)
