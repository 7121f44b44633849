"""The ids that begin and end what a T5 in transformers' layout reads and writes: of the model, and of its tokenizer.

An input ends as the tokenizer ends it, whatever ends an answer: transformers' ByT5Tokenizer ends it with the id 1, unless
tokenizer_config.json has another one for its `eos_token`. An answer ends at any of the ids that generation_config.json
lists as `eos_token_id`, and never where it lists none; without that file config.json says it, and 1 where it does not.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_cli.checkpoints.foreign import read_object
from marlin_cli.config import describe
from marlin_cli.errors import AssumptionWarning, ConfigError
from marlin_cli.models.byt5_ids import FIRST_SPECIAL
from marlin_cli.text import quoted

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"

END = "eos_token_id"
END_OF_INPUTS = 1  # </s> in ByT5Tokenizer

# Ids by transformers' name -> (marlin's, where neither file says one). generation_config.json goes before config.json.
IDS: Mapping[str, tuple[str, int]] = {"decoder_start_token_id": ("start_id", 0), "pad_token_id": ("pad_id", 0)}


def ids_of_folder(folder: Path, document: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """marlin's fields for the special ids of a folder whose config.json holds `document`.

    An assumed end of inputs that is none of answers is said as an `AssumptionWarning`.

    Raises:
        ConfigError: an id that is no whole number or not below `vocab_size`, or a tokenizer_config.json of other types.
    """
    where = folder / CONFIG
    beside = folder / GENERATION_CONFIG
    generation = read_object(beside) if beside.is_file() else None
    ids: dict[str, Any] = {}
    for theirs, (ours, default) in IDS.items():
        value, source = (generation or {}).get(theirs), beside
        if value is None:
            value, source = document.get(theirs), where
        ids[ours] = default if value is None else _id(theirs, value, source, vocab_size)
    if generation is None:
        ends = _ids(document.get(END, END_OF_INPUTS), where, vocab_size)
    else:
        ends = _ids(generation.get(END), beside, vocab_size)
    tokenizer = folder / TOKENIZER_CONFIG
    ids["end_id"] = END_OF_INPUTS
    if tokenizer.is_file():
        ids["end_id"] = _id("the id of eos_token", _end_of_inputs(read_object(tokenizer), tokenizer), tokenizer, vocab_size)
    if not tokenizer.is_file() and ends and END_OF_INPUTS not in ends:
        warnings.warn(
            f"{folder}: holds no {TOKENIZER_CONFIG}; inputs are ended with the id {END_OF_INPUTS}, as ByT5's are, though"
            f" answers end with {', '.join(map(quoted, ends[:4]))}",
            AssumptionWarning,
            stacklevel=2,
        )
    if ends != (ids["end_id"],):
        ids["answer_end_ids"] = ends
    return ids


def tokenizer_config(end_id: int) -> dict[str, Any] | None:
    """tokenizer_config.json for inputs that end so; None where ByT5Tokenizer does it by itself."""
    if end_id == END_OF_INPUTS:
        return None
    token = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"added_tokens_decoder": {str(end_id): token}, "eos_token": "</s>", "tokenizer_class": "ByT5Tokenizer"}


def _end_of_inputs(document: Mapping[str, Any], where: Path) -> int:
    """The id that a tokenizer ends inputs with, as ByT5Tokenizer finds it."""
    end = document.get("eos_token")
    content = end.get("content") if isinstance(end, dict) else end
    if content is None:
        return END_OF_INPUTS
    if not isinstance(content, str):
        raise ConfigError(f"{where}: eos_token should be a text, found {describe(content)}")
    table = document.get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: added_tokens_decoder should be a table, found {describe(table)}")
    for key, token in table.items():
        if isinstance(token, dict) and token.get("content") == content:
            if not re.fullmatch("[0-9]{1,9}", key):
                raise ConfigError(f"{where}: a key of added_tokens_decoder should be an id, found {describe(key)}")
            return int(key)
    sentinel = re.fullmatch(r"<extra_id_([0-9]{1,4})>", content)
    return END_OF_INPUTS if sentinel is None else FIRST_SPECIAL + int(sentinel[1])


def _ids(value: Any, where: Path, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id`: one id or a list of them, each once; none for None."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(_id(END, each, where, vocab_size) for each in values))


def _id(name: str, value: Any, where: Path, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{where}: {name} should be a whole number, found {describe(value)}")
    if not 0 <= value < vocab_size:
        raise ConfigError(f"{where}: {name} should be below vocab_size ({vocab_size:,}), found {quoted(value)}")
    return value
