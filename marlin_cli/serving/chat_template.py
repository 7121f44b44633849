"""Templates by which a model's folder says how a chat becomes a prompt: transformers' files, run without a way out."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError
from marlin_cli.files import check_regular
from marlin_cli.serving.refusals import Refusal, bad
from marlin_cli.text import one_line, quoted

# The files that hold a template, and the key of the second and third.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
KEY = "chat_template"

MOST_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the names that it may use.

    Attributes:
        source: the file that it stands in.
        special: texts of the model's own ids, such as eos_token.
    """

    text: str
    source: str
    special: Mapping[str, str]

    def prompt_of(self, messages: Sequence[Mapping[str, Any]], most_bytes: int) -> bytes:
        """The chat as a prompt that the model answers next.

        Raises:
            Refusal: 400: the template does not take these messages, or what it makes of them has more than `most_bytes`.
        """
        written: list[str] = []
        size = 0
        try:
            names = {**self.special, "messages": list(messages), "add_generation_prompt": True, "tools": None}
            for part in _compiled(self.text).generate(**names):
                written.append(part)
                size += len(part)
                if size > most_bytes:  # a character has a byte at least
                    raise bad(
                        f"messages: are more than {most_bytes:,} bytes as a prompt, which is all that the model reads",
                        "messages",
                    )
            return "".join(written).encode("utf-8")
        except Refusal:
            raise
        except Exception as error:  # a template is foreign code, which raises what it likes
            raise bad(
                f"messages: the model's template ({self.source}) does not take them: {one_line(error)[:300]}", "messages"
            ) from None


def find_template(model: Path) -> ChatTemplate | None:
    """The template of a model's folder, or None where it has none.

    Raises:
        CheckpointError: a file that is damaged, or a template that is none.
        UsageError: jinja2 is not installed.
    """
    folder = model if model.is_dir() else model.parent
    config = folder / "tokenizer_config.json"
    settings: Any = read_json(config, CheckpointError) if config.exists() else {}
    special = _special(settings) if isinstance(settings, dict) else {}
    for name in TEMPLATE_FILES:
        path = folder / name
        if not path.exists():
            continue
        if path.suffix == ".jinja":
            check_regular(path, CheckpointError)
            with path.open("rb") as file:
                text: Any = file.read(MOST_TEMPLATE_BYTES + 1).decode("utf-8", "replace")
        else:
            document = read_json(path, CheckpointError)
            text = document.get(KEY) if isinstance(document, dict) else None
            if isinstance(text, list):  # several, by name
                named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
                text = named.get("default")
        if text is None:
            continue
        if not isinstance(text, str) or len(text) > MOST_TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: {KEY} is no template, found {quoted(text)}; mend it or take the file away")
        _check(text, path)
        return ChatTemplate(text, str(path.name), special)
    return None


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens, which stand as they are or in the `content` of a table."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _check(text: str, path: Path) -> None:
    import jinja2

    try:
        _compiled(text)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{path}: {KEY} is no template: {one_line(error)[:300]}; mend it or take the file away") from None


def _compiled(text: str) -> Any:
    """As transformers compiles templates: nothing of Python is reached, and nothing given is changed."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def give_up(message: str) -> NoReturn:
        raise TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=give_up, strftime_now=now)
    return environment.from_string(text)
