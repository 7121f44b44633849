"""The error family: what is wrong, what was found, what to do, in one sentence each.

The command line prints a `MarlinError` as one line and exits with its `exit_code`. Every other exception is a
bug and keeps its traceback.
"""


class MarlinError(Exception):
    """Something the user can mend. The message is one line and names the file or option it is about."""

    exit_code = 1


class UsageError(MarlinError):
    """The command line or a call's arguments contradict themselves."""

    exit_code = 2


class ConfigError(MarlinError):
    """A configuration (model, recipe, settings) has an unknown key, a wrong type or an impossible value."""


class CheckpointError(MarlinError):
    """A checkpoint file is damaged, unsafe, of an unknown layout, or disagrees with its configuration."""


class CorpusError(MarlinError):
    """A corpus can not be found, read or decompressed, or holds no bytes."""


class InputError(MarlinError):
    """What a model is given cannot be read as the model reads it: not text, too long, too short, no such character."""


class StatisticsError(MarlinError):
    """A statistics file is damaged or belongs to another model or run."""


class QuantizationError(MarlinError):
    """A weight can not be stored in the format asked for."""


class BackendError(MarlinError):
    """MLX is not installed with a usable backend, or the device asked for is not there."""


class OutputError(MarlinError):
    """A result can not be written where it was asked for."""


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's that asks the process to end. What saves its work on Ctrl-C saves it here too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class AssumptionWarning(UserWarning):
    """What a file does not say, and what was assumed in its place. No error: the caller may know that it is right."""


class DistributedError(MarlinError):
    """The processes that share a job cannot find each other, disagree, or one of them ended."""
