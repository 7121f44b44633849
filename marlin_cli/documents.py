"""JSON and YAML from other hands: whatever is wrong with a document is one error of the family, and soon said."""

import json
from pathlib import Path
from typing import Any

from marlin_cli.errors import ConfigError, MarlinError
from marlin_cli.files import check_regular
from marlin_cli.text import one_line

# The largest config.json, index or recipe: those of a thousand layers take a few hundred thousand bytes.
MOST_JSON_BYTES = 4 << 20
MOST_YAML_BYTES = 64 << 10  # PyYAML reads some hundred thousand bytes a second


def read_json(path: Path, error: type[MarlinError] = ConfigError) -> Any:
    """The JSON document in `path`.

    Raises:
        MarlinError: as `error`: the file is missing, unreadable, too large or not JSON.
    """
    return parse_json(_read(path, MOST_JSON_BYTES, error), str(path), error)


def parse_json(text: str | bytes, where: str, error: type[MarlinError]) -> Any:
    """The value that a JSON text holds; `where` begins every error.

    Raises:
        MarlinError: as `error`: not UTF-8, not JSON, nested too deeply, or a number of more digits than Python takes.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise error(f"{where}: is not UTF-8, as JSON is: {problem.reason} at byte {problem.start:,}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: is not JSON: {one_line(problem)}") from None


def read_yaml(path: Path, error: type[MarlinError] = ConfigError) -> Any:
    """The YAML document in `path`: plain values, without aliases.

    Raises:
        MarlinError: as `error`: the file is missing, unreadable, too large or not YAML.
    """
    return parse_yaml(_read(path, MOST_YAML_BYTES, error), str(path), error)


def parse_yaml(text: str | bytes, where: str, error: type[MarlinError]) -> Any:
    """The value that a YAML text holds, with the safe loader's types; `where` begins every error.

    Aliases are refused: a few lines of them stand for a document of any size, and recipes need none.

    Raises:
        MarlinError: as `error`: not YAML, an alias, nested too deeply, or a value that Python cannot hold.
    """
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("an alias (*name); write the value itself")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Plain)
    # Beside its own errors the library lets those of its constructors of numbers, dates and keys through: any there is.
    except Exception as problem:
        raise error(f"{where}: cannot read as YAML: {one_line(problem)}") from None


def _read(path: Path, most_bytes: int, error: type[MarlinError]) -> bytes:
    check_regular(path, error)
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: cannot read: {problem.strerror}") from None
    if len(data) > most_bytes:
        raise error(f"{path}: is larger than {most_bytes:,} bytes, more than any file of its kind")
    return data
