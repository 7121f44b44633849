"""`ContinuingModel`, the Python interface to networks that continue bytes: logits, bits per byte, the bytes that follow."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.draft_model import drafts_of
from marlin_cli.engine.drafts import DraftSource
from marlin_cli.engine.endless import Window
from marlin_cli.engine.generation import generate
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import check_cache, scheduler_of
from marlin_cli.engine.scheduling import Piece, Request, Scheduler, SchedulerLimits
from marlin_cli.engine.scoring import bits_of
from marlin_cli.engine.speculation import Speculation, speculation_of
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import UsageError
from marlin_cli.model import Model, checked_text, checked_texts
from marlin_cli.models import Capability, continuing_of
from marlin_cli.ops.device import Device

if TYPE_CHECKING:
    from marlin_cli.quantization.plan import QuantizationSettings
    from marlin_cli.statistics import Statistics

# Windows of `bits_per_byte` unless the caller says otherwise, in bytes.
SCORING_WINDOW_BYTES = 2048


class ContinuingModel(Model):
    """A model that continues bytes, such as a MegaByte or a ByGPT5.

    Attributes:
        cache_bits: bits of the cache's keys and values (of a MegaByte, the global one).
    """

    capability = Capability.CONTINUES

    def __init__(
        self,
        network: Any,
        device: Device,
        *,
        cache_bits: CacheBits | None = None,
        quantization: dict[str, Any] | None = None,
        marlin: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, device, quantization=quantization, marlin=marlin)
        self.cache_bits = cache_bits or CacheBits()
        self._draft_source: Callable[[Request, bytes], DraftSource] | None = None

    def draft_with(self, other: "ContinuingModel") -> None:
        """Let a smaller MegaByte draft what streams ask to have drafted, in place of the text itself. No byte changes.

        Raises:
            UsageError: a model that cannot.
        """
        self._draft_source = drafts_of(other.network)

    @classmethod
    def _with_cache(cls, network: Any, device: Device, kv_bits: int | tuple[int, int], **tables: Any) -> "ContinuingModel":
        bits = (kv_bits, kv_bits) if isinstance(kv_bits, int) else kv_bits
        return cls(network, device, cache_bits=CacheBits(*bits), **tables)

    def cached(self, window: Window | None = None, share_left: float | None = None) -> "ContinuingModel":
        """The same network, with a cache that forgets.

        Args:
            window: how streams go on beyond the model's context: what stays in view, or that the context is read again.
            share_left: of a softmax, what pages of the cache that are not read may have at most, see `docs/endless.md`.

        Raises:
            UsageError: the network, or the device, cannot have it.
        """
        bits = replace(self.cache_bits, window=window, share_left=share_left)
        check_cache(self.network, bits)
        return ContinuingModel(
            self.network, self.device, cache_bits=bits, quantization=self.quantization, marlin=self.marlin
        )  # fmt: skip

    @property
    def context_bytes(self) -> int | None:
        """How many bytes a stream may have; None: any number."""
        return int(self.config.max_bytes) if self.cache_bits.window is None else None

    def logits(self, data: bytes) -> mx.array:
        """Logits [len(data), vocab] float32: row i is the distribution of byte i given the bytes before it.

        Byte b has column b of a MegaByte, a SpaceByte or a Block-Recurrent Transformer, b + 3 of a ByGPT5, b + 4 of a
        Byte Latent Transformer, and b + 64 of an EvaByte.

        Raises:
            UsageError: more bytes than the model's context.
        """
        data = checked_text(data)
        if len(data) > self.config.max_bytes:
            raise UsageError(f"{len(data)} bytes do not fit the model's context of {self.config.max_bytes}")
        window = mx.array(np.frombuffer(data, dtype=np.uint8).astype(np.int32))[None]
        return continuing_of(self.network).predictions(self.network, window)[0]

    def bits_per_byte(self, data: bytes, window_bytes: int | None = None) -> float:
        """Mean bits that a byte of `data` costs, in disjoint windows, each from an empty context.

        Raises:
            UsageError: no bytes.
        """
        data = checked_text(data)
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
        sentinels: bool = False,
        speculate: str | int = "off",
        prediction: bytes = b"",
    ) -> bytes:
        """At most `max_bytes` bytes that follow `prompt`, without the stop sequence that ended them; see `pieces`.

        Args:
            speculate: off, auto, or patches that are drafted ahead at once; see `marlin_cli.engine.speculation`.
            prediction: what may follow, for drafts.
        """
        sampling, stopping = Sampling(temperature, top_k, top_p, min_p, seed), Stopping(max_bytes, tuple(stop))
        pieces = self.pieces(
            [checked_text(prompt, "pieces")], stopping, sampling, sentinels=sentinels,
            speculation=speculation_of(speculate, prediction),
        )  # fmt: skip
        return b"".join(piece.data for piece in pieces)

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
        sentinels: bool = False,
        speculate: str | int = "off",
        prediction: bytes = b"",
    ) -> Iterator[int]:
        """The bytes of `generate`, each (an int) as soon as it is decoded."""
        sampling, stopping = Sampling(temperature, top_k, top_p, min_p, seed), Stopping(max_bytes, tuple(stop))
        pieces = self.pieces(
            [checked_text(prompt, "pieces")], stopping, sampling, sentinels=sentinels,
            speculation=speculation_of(speculate, prediction),
        )  # fmt: skip
        for piece in pieces:
            yield from piece.data

    def pieces(
        self,
        prompts: Sequence[bytes],
        stopping: Stopping,
        sampling: Sampling,
        *,
        sentinels: bool = False,
        keeper: PromptKeeper | None = None,
        speculation: Speculation | None = None,
    ) -> Iterator[Piece]:
        """Decode many prompts of any lengths side by side; see `marlin_cli.engine.generation.generate`.

        Args:
            sentinels: `<extra_id_N>` stands for that special id of a ByGPT5 or EvaByte, in a prompt and in what follows it.
            keeper: of a single prompt: what knows its beginning and keeps its state, such as a `StateFile`.
            speculation: how streams are drafted ahead, which changes none of their bytes.
        """
        return generate(
            self.network, checked_texts(prompts, "generate"), stopping, sampling, self.cache_bits, sentinels=sentinels,
            keeper=keeper, speculation=speculation, draft_source=self._draft_source,
        )  # fmt: skip

    def scheduler(self, limits: SchedulerLimits | None = None, keeper: PromptKeeper | None = None) -> Scheduler[Request]:
        """Streams that come and go beside each other; see `marlin_cli.engine.scheduling`. One thread owns it and the model.

        Args:
            keeper: what knows the beginnings of prompts, and keeps what is read of them, such as a `prompt_store`.
        """
        return scheduler_of(self.network, limits, self.cache_bits, keeper, self._draft_source)

    def prompt_store(self, folder: str | Path | None = None, limits: StoreLimits | None = None) -> PromptStore:
        """A store of prompts for the `scheduler` of this model, in memory and, where one is given, in a folder.

        Raises:
            OutputError: the folder cannot be made, or others may write in it.
        """
        kind = kind_of(self.network, self.cache_bits)
        return PromptStore(kind, None if folder is None else Path(folder), limits)

    def quantize(
        self,
        global_bits: int = 4,
        local_bits: int = 8,
        kv_bits: int = 16,
        *,
        decoder_bits: int | None = None,
        statistics: "Statistics | None" = None,
        settings: "QuantizationSettings | None" = None,
    ) -> "ContinuingModel":
        """A copy with packed weights. `settings` says more than bits, and stands in for them when given.

        A MegaByte or SpaceByte has a global and a local part, a ByGPT5 a decoder (4 bits unless said), a Byte Latent
        Transformer a decoder (8 unless said), an encoder and a patcher beside its global part, an EvaByte a global one, and a
        Block-Recurrent Transformer has states beside it, which take the local bits; bits of another part say nothing.

        Raises:
            QuantizationError: a layer that cannot be packed so.
        """
        from marlin_cli.quantization.plan import settings_from_bits

        return self._packed(settings or settings_from_bits(global_bits, local_bits, kv_bits, decoder_bits), statistics)
