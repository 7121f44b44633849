"""The Python interface: `load` a model, then ask it for logits, bits per byte, bytes, or a quantised copy of itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from marlin_cli.byt5_model import ByT5Model
from marlin_cli.checkpoints import ImportOptions, architecture_of, lasting, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.config import check_same
from marlin_cli.engine.decoding import CacheBits
from marlin_cli.engine.generation import Piece, Stopping, generate
from marlin_cli.engine.heads import with_heads
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scoring import bits_of
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.models import build, config_as_mapping
from marlin_cli.models.megabyte import MegaByte, MegaByteConfig
from marlin_cli.ops import round_activations
from marlin_cli.ops.device import Device, choose_device

if TYPE_CHECKING:
    from marlin_cli.quantization.plan import QuantizationSettings
    from marlin_cli.statistics import Statistics

# Windows of `bits_per_byte` unless the caller says otherwise, in bytes.
SCORING_WINDOW_BYTES = 2048


def encode(text: str) -> bytes:
    """Text as the bytes (UTF-8) that a byte-level model reads: its whole tokenizer."""
    return text.encode("utf-8")


def decode(data: bytes, errors: str = "replace") -> str:
    """Bytes as text (UTF-8); `errors` as in `bytes.decode`."""
    return data.decode("utf-8", errors=errors)


class MegaByteModel:
    """A MegaByte ready to run, on one device.

    Attributes:
        network: the MLX module.
        config: its `MegaByteConfig`.
        device: where it runs, and why.
        cache_bits: bits of the global cache's keys and values.
        quantization: the `quantization` table of its config.json (mlx-lm's convention), or None.
        marlin: marlin's own table of its config.json, or None.
    """

    def __init__(
        self,
        network: MegaByte,
        device: Device,
        *,
        cache_bits: CacheBits | None = None,
        quantization: dict[str, Any] | None = None,
        marlin: dict[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.device = device
        self.cache_bits = cache_bits or CacheBits()
        self.quantization = quantization
        self.marlin = marlin

    @property
    def config(self) -> MegaByteConfig:
        return self.network.config

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: MegaByteConfig | None = None,
        *,
        device: str = "auto",
        kv_bits: int | tuple[int, int] | None = None,
        activation_bits: int = 16,
        dtype: mx.Dtype | None = None,
        options: ImportOptions | None = None,
    ) -> "MegaByteModel":
        """Read any supported checkpoint: a path, the name of a shipped model, or a repository on the hub.

        Args:
            config: what the model should be; a checkpoint that says otherwise is refused.
            device: auto, metal, cuda or cpu.
            kv_bits: 4, 8 or 16 bits for the global cache, or for its keys and its values; as the checkpoint says if None.
            activation_bits: 16, or 8 to round what packed layers multiply, which is faster on a CPU and costs some accuracy.
            dtype: type of weights and activations; float32 on a CPU and as stored elsewhere if None.
            options: what a foreign checkpoint does not reveal. What is assumed where it says nothing is an
                `AssumptionWarning`, and stands in `marlin["assumed"]`.

        Raises:
            CheckpointError, ConfigError: the checkpoint cannot be used.
            BackendError: the device is not there.
        """
        where = locate_model(str(path))
        checkpoint = read_checkpoint(where, with_heads(where, options or ImportOptions()))
        chosen = choose_device(device)
        network = build(
            checkpoint.config,
            checkpoint.weights,
            checkpoint.quantization,
            where=str(path),
            dtype=chosen.dtype if dtype is None else dtype,
        )
        if not isinstance(network, MegaByte):
            raise CheckpointError(
                f"{path}: holds a {checkpoint.config['model_type']}, which is not taken here; name a MegaByte"
            )
        if config is not None:
            check_same(network.config, config, str(path))
        round_activations(network, activation_bits)
        if kv_bits is None:
            kv_bits = int((checkpoint.marlin or {}).get("kv_bits", 16))
        return cls(
            network,
            chosen,
            cache_bits=CacheBits(kv_bits, kv_bits) if isinstance(kv_bits, int) else CacheBits(*kv_bits),
            quantization=checkpoint.quantization,
            marlin=checkpoint.marlin,
        )

    def logits(self, data: bytes) -> mx.array:
        """Logits [len(data), vocab] float32: row i is the distribution of byte i given the bytes before it.

        Raises:
            UsageError: more bytes than the model's context.
        """
        if len(data) > self.config.max_bytes:
            raise UsageError(f"{len(data)} bytes do not fit the model's context of {self.config.max_bytes}")
        return self.network(mx.array(np.frombuffer(data, dtype=np.uint8).astype(np.int32))[None])[0]

    def bits_per_byte(self, data: bytes, window_bytes: int | None = None) -> float:
        """Mean bits that a byte of `data` costs, in disjoint windows, each from an empty context.

        Raises:
            UsageError: no bytes.
        """
        if not data:
            raise UsageError("bits_per_byte needs at least one byte")
        window = min(window_bytes or SCORING_WINDOW_BYTES, self.config.max_bytes)
        return float(bits_of(self.network, np.frombuffer(data, dtype=np.uint8), window).mean())

    def generate(
        self,
        prompt: bytes,
        max_bytes: int = 256,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[bytes] = (),
    ) -> bytes:
        """At most `max_bytes` bytes that follow `prompt`, without the stop sequence that ended them."""
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        return b"".join(piece.data for piece in self.pieces([prompt], Stopping(max_bytes, tuple(stop)), sampling))

    def generate_stream(
        self,
        prompt: bytes,
        max_bytes: int = 256,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[bytes] = (),
    ) -> Iterator[int]:
        """The bytes of `generate`, each (an int) as soon as it is decoded."""
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        for piece in self.pieces([prompt], Stopping(max_bytes, tuple(stop)), sampling):
            yield from piece.data

    def pieces(self, prompts: Sequence[bytes], stopping: Stopping, sampling: Sampling) -> Iterator[Piece]:
        """Decode many prompts of any lengths side by side; see `marlin_cli.engine.generation.generate`."""
        return generate(self.network, prompts, stopping, sampling, self.cache_bits)

    def quantize(
        self,
        global_bits: int = 4,
        local_bits: int = 8,
        kv_bits: int = 16,
        *,
        statistics: "Statistics | None" = None,
        settings: "QuantizationSettings | None" = None,
    ) -> "MegaByteModel":
        """A copy with packed weights. `settings` says more than bits, and stands in for them when given.

        Raises:
            QuantizationError: a layer that cannot be packed so.
        """
        from marlin_cli.quantization.apply import quantize_network
        from marlin_cli.quantization.plan import settings_from_bits

        settings = settings or settings_from_bits(global_bits, local_bits, kv_bits)
        result = quantize_network(self.network, settings, statistics)
        return MegaByteModel(
            result.network,
            self.device,
            cache_bits=CacheBits(settings.kv_bits, settings.kv_bits),
            quantization=result.quantization,
            marlin={**lasting(self.marlin), **result.marlin},
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder with config.json and model.safetensors, in one step.

        Raises:
            OutputError: the folder exists, or cannot be written.
        """
        write_model(
            Path(path),
            config_as_mapping(self.config),
            dict(tree_flatten(self.network.parameters())),
            self.quantization,
            self.marlin,
            overwrite=overwrite,
        )


def load(
    path: str | Path,
    *,
    device: str = "auto",
    kv_bits: int | None = None,
    activation_bits: int = 16,
    options: ImportOptions | None = None,
) -> MegaByteModel | ByT5Model:
    """Read any supported model; see `MegaByteModel.from_pretrained` and `ByT5Model.from_pretrained`."""
    if architecture_of(locate_model(str(path))) == "byt5":
        if options not in (None, ImportOptions()):
            raise UsageError(f"{path}: import options have no meaning for ByT5, the model says all")
        return ByT5Model.from_pretrained(path, device=device, kv_bits=kv_bits, activation_bits=activation_bits)
    return MegaByteModel.from_pretrained(path, device=device, kv_bits=kv_bits, activation_bits=activation_bits, options=options)
