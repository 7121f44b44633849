"""The result of a bench run over models that continue bytes: what was measured of each, and with which settings."""

from dataclasses import dataclass, field

from marlin_cli.bench.machine import Machine
from marlin_cli.bench.throughput import Throughput, ThroughputSettings
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.endless import Window
from marlin_cli.quality.held_out import Windowing
from marlin_cli.quality.quality import Quality


@dataclass(frozen=True)
class QualitySettings:
    """Which bytes the models were scored on."""

    corpora: tuple[str, ...]  # paths or names of recipes
    windowing: Windowing
    reference: str | None = None  # the model that the others are compared with
    window: Window | None = None  # each file is a stream, read in this window
    denominator: str = "bytes as they lie in the files, 0x00 and what is no text included"  # of bits per byte


@dataclass(frozen=True)
class ModelReport:
    """What was measured of one model. Sizes are by part of the model."""

    model: str
    stored_weight_bytes: dict[str, int]  # in its checkpoint
    loaded_weight_bytes: dict[str, int]  # in memory: on a CPU, 16-bit weights become float32
    cache_bits: CacheBits
    throughput: Throughput | None
    quality: Quality | None
    weights: dict[str, int] = field(default_factory=dict)  # how many numbers; a packed one counts once


@dataclass(frozen=True)
class Report:
    """One run of `marlin bench`."""

    machine: Machine
    throughput_settings: ThroughputSettings | None
    quality_settings: QualitySettings | None
    peak_resident_bytes: int  # of the whole process, all models loaded
    models: tuple[ModelReport, ...]
