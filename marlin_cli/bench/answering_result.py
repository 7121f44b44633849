"""The result of a bench run over models that answer: what was measured of each, and with which settings."""

from dataclasses import dataclass

from marlin_cli.bench.answering_speed import AnsweringSpeed
from marlin_cli.bench.machine import Machine
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.quality.pairs import PairQuality


@dataclass(frozen=True)
class PairSettings:
    """Which pairs the models were scored on."""

    pairs: tuple[str, ...]  # files, or models that ship them
    max_bytes: int | None = None  # of inputs and answers together; pairs at even steps through the file
    reference: str | None = None  # the model that the others are compared with


@dataclass(frozen=True)
class AnsweringModelReport:
    """What was measured of one model. Sizes are by part of the model."""

    model: str
    weights: dict[str, int]  # how many numbers; a packed one counts once
    stored_weight_bytes: dict[str, int]  # in its checkpoint
    loaded_weight_bytes: dict[str, int]  # in memory: on a CPU, 16-bit weights become float32
    kv_bits: int
    speeds: tuple[AnsweringSpeed, ...] | None  # by batch size
    quality: PairQuality | None


@dataclass(frozen=True)
class AnsweringReport:
    """One run of `marlin bench` over models that answer."""

    machine: Machine
    throughput_settings: ThroughputSettings | None
    quality_settings: PairSettings | None
    peak_resident_bytes: int  # of the whole process, all models loaded
    models: tuple[AnsweringModelReport, ...]
