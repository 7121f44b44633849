"""Folders of ByGPT5 (uniformers): a T5 decoder under T5's names, with an empty place where the encoder would be read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_cli.checkpoints import hugging_face
from marlin_cli.checkpoints.foreign import Checkpoint, Taken, read_object
from marlin_cli.checkpoints.t5_ends import CONFIG, TOKENIZER_CONFIG
from marlin_cli.checkpoints.transformers_folder import check_layers, has_model_type, number, take_head, tensors_of
from marlin_cli.errors import ConfigError
from marlin_cli.models.byt5_ids import FIRST_SPECIAL
from marlin_cli.text import quoted

MODEL_TYPE = "bygpt5"

# A whole ByT5's file serves too: uniformers leaves these out when it reads one.
UNREAD = re.compile(r"^encoder\.|^decoder\.block\.\d+\.layer\.1\.|^decoder\.embed_tokens\.weight$")

# Fields of ByT5 that say nothing about a decoder alone.
OF_ENCODER = ("encoder_layers", "decoder_layers", "model_type")


def recognises(path: Path) -> bool:
    """Is this a folder of ByGPT5, or of a T5 that is said to be a decoder and to have no encoder?"""
    if has_model_type(path, (MODEL_TYPE,)):
        return "layers" not in read_object(_folder(path) / CONFIG)  # marlin's own field
    if not has_model_type(path, ("t5",)):
        return False
    document = read_object(_folder(path) / CONFIG)
    return document.get("is_decoder") is True and document.get("is_encoder_decoder") is False


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights.

    Raises:
        CheckpointError: weights that are missing, left over or of shapes that do not fit together.
        ConfigError: a configuration that is not of T5 over bytes.
    """
    where = _folder(path) / CONFIG
    document = read_object(where)
    config = config_from(document, where)
    foreign = tensors_of(path, lambda name: UNREAD.match(name) is not None)
    check_layers(path, foreign, config["layers"])
    taken = Taken(foreign)
    weights = {ours: taken.take(theirs) for ours, theirs in names_of({**config, "tied_head": True}).items()}
    config["tied_head"], config["scaled_head"] = take_head(taken, path, document, weights)
    taken.finish()
    return Checkpoint(path, "bygpt5", config, weights)


def config_from(document: dict[str, Any], where: Path) -> dict[str, Any]:
    """marlin's fields of its config.json.

    Raises:
        ConfigError: a configuration that is not of T5 over bytes.
    """
    of_t5 = hugging_face.config_from(where.parent, document)
    config = {name: value for name, value in of_t5.items() if name not in OF_ENCODER}
    config |= {"model_type": MODEL_TYPE, "layers": of_t5["decoder_layers"]}
    return config | _start(where.parent, document, config["vocab_size"])


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    return hugging_face.files(path)


def names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """transformers' name of every weight, by marlin's."""
    whole = {**config, "encoder_layers": 0, "decoder_layers": config["layers"]}
    return {ours: theirs for ours, theirs in hugging_face.names_of(whole).items() if not UNREAD.match(theirs)}


def _start(folder: Path, document: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The id before the first byte, and whether it leads every text: by config.json, else by the tokenizer's mark.

    Released models were trained from the middle of texts and have none: there it is what T5's decoder begins with.
    """
    where = folder / TOKENIZER_CONFIG
    tokenizer = read_object(where) if where.is_file() else {}
    given = number(document, "bos_token_id", -1, folder / CONFIG)
    if given < 0:
        mark = tokenizer.get("bos_token")
        given = _id_of_mark(mark.get("content") if isinstance(mark, dict) else mark)
    if given < 0:
        given = number(document, "decoder_start_token_id", 0, folder / CONFIG)
    if given >= vocab_size:
        raise ConfigError(f"{where}: the mark of a beginning is id {quoted(given)}, and there are {vocab_size}")
    return {"start_id": given, "starts_all": tokenizer.get("add_bos_token") is True}


def _id_of_mark(mark: Any) -> int:
    """The id of a mark that ByT5's tokenizer knows, -1 for others."""
    sentinel = re.fullmatch(r"<extra_id_(\d{1,4})>", mark) if isinstance(mark, str) else None
    if sentinel:
        return FIRST_SPECIAL + int(sentinel[1])
    return {"<pad>": 0, "</s>": 1, "<unk>": 2}.get(mark, -1) if isinstance(mark, str) else -1


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
