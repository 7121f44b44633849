"""A loaded model as the server has it: what it reads, how requests are made for it, and what schedules its streams."""

from collections.abc import Callable
from typing import Any

from marlin_cli.api import AnyModel
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.engine.scheduling import Scheduler, SchedulerLimits
from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES, Capability, continuing_of
from marlin_cli.models.byt5_ids import FIRST_BYTE, bytes_with_sentinels
from marlin_cli.serving.asks import Ask
from marlin_cli.serving.chat_template import find_template
from marlin_cli.serving.served import Served, answering_request, continuing_request


def served_model(
    model: AnyModel, path: str, name: str | None, limits: SchedulerLimits
) -> tuple[Served, Callable[[], Scheduler[Any]]]:
    """What is served, and what makes schedulers of it.

    Args:
        path: as the model was named; its folder may hold a chat template.
        name: what clients call it; None: the last part of `path`.

    Raises:
        CheckpointError: a chat template that is damaged.
        UsageError: a model that neither continues nor answers.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    folder = locate_model(path)
    called = name or path.rstrip("/").rpartition("/")[2] or folder.name
    template, most, network = find_template(folder), model.config.max_bytes, model.network
    request: Callable[[Ask], Any]
    able: Any = model  # of a class with a scheduler, as is seen below
    if architecture.capability is Capability.CONTINUES:
        continuing = continuing_of(network)
        # Marks stand behind the bytes, of an EvaByte before them.
        has_sentinels = any(map(continuing.sentinel, (continuing.first_byte - 1, continuing.first_byte + 256)))
        first_byte, text_of, request = continuing.first_byte, continuing.sentinel, continuing_request
    elif architecture.capability is Capability.ANSWERS and model.config.decoder_layers:
        first_byte, has_sentinels, text_of, request = FIRST_BYTE, True, _sentinel, answering_request
    else:
        raise UsageError(f"{path}: is a {architecture.title} that encodes texts, and is not served; ask marlin encode")
    served = Served(
        called, architecture.title, architecture.capability, most, first_byte, has_sentinels, text_of, request, template
    )
    return served, lambda: able.scheduler(limits)


def _sentinel(id: int) -> bytes:
    return bytes_with_sentinels([id])
