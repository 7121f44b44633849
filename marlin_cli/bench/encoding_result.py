"""The result of a bench run over models that encode texts: what was measured of each, and with which settings."""

from dataclasses import dataclass

from marlin_cli.bench.encoding_speed import EncodingSpeed
from marlin_cli.bench.machine import Machine
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.quality.texts import TextQuality


@dataclass(frozen=True)
class TextSettings:
    """Which texts the models were compared on, and with what."""

    corpora: tuple[str, ...]  # paths or names of recipes; what is no UTF-8 is left out
    window_bytes: int  # a text, cut between characters; the last one of a file may be shorter
    max_bytes: int | None  # in all, an equal share for each domain
    reference: str  # the model that the others are compared with


@dataclass(frozen=True)
class EncodingModelReport:
    """What was measured of one model. Sizes are by part of the model."""

    model: str
    weights: dict[str, int]  # how many numbers; a packed one counts once
    stored_weight_bytes: dict[str, int]  # in its checkpoint
    loaded_weight_bytes: dict[str, int]  # in memory: on a CPU, 16-bit weights become float32
    speeds: tuple[EncodingSpeed, ...] | None  # by length and batch size
    quality: TextQuality | None


@dataclass(frozen=True)
class EncodingReport:
    """One run of `marlin bench` over models that encode texts."""

    machine: Machine
    throughput_settings: ThroughputSettings | None
    quality_settings: TextSettings | None
    peak_resident_bytes: int  # of the whole process, all models loaded
    models: tuple[EncodingModelReport, ...]
