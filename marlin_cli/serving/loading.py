"""A loaded model as the server has it: what it reads, how requests are made for it, and what schedules its streams."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli.api import AnyModel
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.endless import Window
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.scheduling import Scheduler, SchedulerLimits
from marlin_cli.engine.speculation import Speculation
from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES, Capability, continuing_of
from marlin_cli.models.byt5_ids import FIRST_BYTE, bytes_with_sentinels
from marlin_cli.serving.asks import Ask
from marlin_cli.serving.chat_template import find_template
from marlin_cli.serving.served import Served, answering_request, continuing_request
from marlin_cli.text import with_article


@dataclass(frozen=True)
class KeptPrompts:
    """What a server keeps of the prompts it has read, so that one that begins alike is not read again.

    Attributes:
        memory_bytes: 0 keeps none in memory.
        folder: where files go; None: nowhere.
        is_asked_for: by the user, who is told where a model cannot.
    """

    memory_bytes: int = 256 << 20
    folder: Path | None = None
    is_asked_for: bool = False

    def store_for(self, model: AnyModel) -> PromptStore | None:
        """The store of a model; None where nothing is kept of it.

        Raises:
            OutputError: a folder that cannot be made, or in which others may write.
            UsageError: the user asks for what this model cannot do.
        """
        if not isinstance(model, ContinuingModel) or not (self.memory_bytes or self.folder):
            return None
        try:
            return model.prompt_store(self.folder, StoreLimits(memory_bytes=self.memory_bytes))
        except UsageError:
            if self.is_asked_for:
                raise
            return None


def viewed(model: AnyModel, window: Window | None) -> AnyModel:
    """A model whose streams go on beyond its context, if a window is given.

    Raises:
        UsageError: it answers, or cannot have such a window.
    """
    if window is None:
        return model
    if not isinstance(model, ContinuingModel):
        raise UsageError("--window: is of models that continue bytes; leave it out")
    return model.cached(window)


def served_model(
    model: AnyModel,
    path: str,
    name: str | None,
    limits: SchedulerLimits,
    store: PromptStore | None = None,
    speculation: Speculation | None = None,
) -> tuple[Served, Callable[[], Scheduler[Any]]]:
    """What is served, and what makes schedulers of it.

    Args:
        path: as the model was named; its folder may hold a chat template.
        name: what clients call it; None: the last part of `path`.
        store: of prompts; of a model that continues bytes alone.
        speculation: how streams are drafted ahead.

    Raises:
        CheckpointError: a chat template that is damaged.
        UsageError: a model that neither continues nor answers, or drafts that nothing verifies.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    folder = locate_model(path)
    called = name or path.rstrip("/").rpartition("/")[2] or folder.name
    template, most, network = find_template(folder), model.config.max_bytes, model.network
    request: Callable[[Ask, Speculation], Any]
    drafted = speculation or Speculation()
    able: Any = model  # of a class with a scheduler, as is seen below
    if architecture.capability is Capability.CONTINUES:
        continuing = continuing_of(network)
        # Marks stand behind the bytes, of an EvaByte before them.
        has_sentinels = any(map(continuing.sentinel, (continuing.first_byte - 1, continuing.first_byte + 256)))
        first_byte, text_of, request = continuing.first_byte, continuing.sentinel, continuing_request
    elif architecture.capability is Capability.ANSWERS and model.config.decoder_layers:
        first_byte, has_sentinels, text_of, request = FIRST_BYTE, True, _sentinel, answering_request
    else:
        raise UsageError(
            f"{path}: is {with_article(architecture.title)} that encodes texts, and is not served; ask marlin encode"
        )
    served = Served(
        called, architecture.title, architecture.capability, most, first_byte, has_sentinels, text_of,
        lambda ask: request(ask, drafted), template, drafted,
        isinstance(model, ContinuingModel) and model.context_bytes is None,
    )  # fmt: skip
    if drafted.most and not drafted.adapts:
        able.scheduler(limits).admit(served.request(Ask(b"", 0)))  # refuses what could never be verified
    return served, lambda: able.scheduler(limits) if store is None else able.scheduler(limits, store)


def _sentinel(id: int) -> bytes:
    return bytes_with_sentinels([id])
