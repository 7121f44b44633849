"""Ids of networks whose ids are the bytes, and perhaps others behind them. Those of T5's kind stand in `byt5_ids`."""

from collections.abc import Callable, Container
from typing import Any

from marlin_cli.errors import UsageError
from marlin_cli.text import with_article


def ids_of_prompt_of(title: str) -> Callable[[Any, bytes, bool], bytes]:
    """What `Continuing.ids` is where the bytes are the ids; it raises `UsageError` for sentinels, of which there are none."""

    def ids_of_prompt(config: Any, prompt: bytes, sentinels: bool) -> bytes:
        if sentinels:
            raise UsageError(f"--sentinel: {with_article(title)} knows none; leave it out")
        return prompt

    return ids_of_prompt


def ends(config: Any) -> Container[int]:
    """What `Continuing.ends` is there: all ids that are no bytes."""
    return range(256, config.vocab_size)
