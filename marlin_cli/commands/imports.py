"""`--import` where a command names several models: which of them takes the options."""

from collections.abc import Iterable, Mapping

from marlin_cli.checkpoints import ImportOptions, tells_all
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.engine.heads import with_heads


def imports_of(models: Iterable[str | None], given: ImportOptions) -> Mapping[str, ImportOptions]:
    """The options of each model by its name, with a number in place of heads=auto; nothing where none are given.

    They are of the models whose files leave something open. Where there is none all get them, so that reading the first says
    why they have no meaning.

    Args:
        models: names; None stands for no model.

    Raises:
        MarlinError: a model that is not there, or heads=auto that cannot be told.
    """
    if given == ImportOptions():
        return {}
    places = {name: locate_model(name) for name in models if name is not None}
    takers = {name: path for name, path in places.items() if not tells_all(path, given)}
    return {name: with_heads(path, given) for name, path in (takers or places).items()}
