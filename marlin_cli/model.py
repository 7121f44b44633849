"""`Model`: what all models have in common, whatever they do with bytes: reading, packing and writing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli.checkpoints import Checkpoint, ImportOptions, architecture_of, check_weights, lasting, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.config import check_same, describe
from marlin_cli.engine.disk_layers import DiskLinear, is_larger_than_memory, leave_layers_on_disk
from marlin_cli.engine.disk_tables import DiskTable, is_short_of, leave_on_disk
from marlin_cli.engine.heads import with_heads
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.models import ARCHITECTURES, Capability, Share, architecture_named, build, config_as_mapping, settings_for
from marlin_cli.models.splitting import Cut, share_among, share_of
from marlin_cli.ops import round_activations
from marlin_cli.ops.device import Device, choose_device
from marlin_cli.ranks import ALONE, Ranks
from marlin_cli.text import with_article

if TYPE_CHECKING:
    from marlin_cli.quantization.plan import QuantizationSettings
    from marlin_cli.statistics import Statistics

AnyModel = TypeVar("AnyModel", bound="Model")


class Encodes(Protocol):
    """What models have that make states and vectors of an input, whatever else they do with it."""

    def encode(self, data: bytes) -> mx.array:
        """The states of an input: [rows, d_model] float32."""

    def encode_many(self, texts: Sequence[bytes]) -> list[mx.array]:
        """As `encode`, of each input."""

    def pooled(self, data: bytes) -> mx.array:
        """One vector for an input: [d_model] float32."""

    def pooled_many(self, texts: Sequence[bytes]) -> mx.array:
        """As `pooled`, of each input: [inputs, d_model]."""


def checked_text(data: Any, many: str = "") -> bytes:
    """A text as bytes, whatever holds them.

    Args:
        many: the method that takes several texts, where there is one.

    Raises:
        UsageError: something else, such as a str or a list.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    mend = ": call .encode()" if isinstance(data, str) else ""
    several = f"; for several texts `{many}`" if many else ""
    raise UsageError(f"a text is bytes, found {describe(data)}{mend}{several}")


def checked_texts(texts: Any, one: str) -> list[bytes]:
    """Several texts as bytes.

    Args:
        one: the method that takes one text.

    Raises:
        UsageError: a single text, or one of them is something else.
    """
    check_several(texts, one)
    return [checked_text(text) for text in texts]


def check_several(texts: Any, one: str) -> None:
    """Raise `UsageError` for a single text where several are taken; `one` is the method that takes it."""
    if isinstance(texts, (str, bytes, bytearray, memoryview)):
        raise UsageError(f"several texts are a list of bytes, found {describe(texts)}; for one text `{one}`")


class Model:
    """A network ready to run, on one device. What it does with bytes is said by the classes below this one.

    Attributes:
        network: the MLX module.
        device: where it runs, and why.
        quantization: the `quantization` table of its config.json (mlx-lm's convention), or None.
        marlin: marlin's own table of its config.json, or None.
    """

    capability: ClassVar[Capability]

    def __init__(
        self,
        network: Any,
        device: Device,
        *,
        quantization: dict[str, Any] | None = None,
        marlin: dict[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.device = device
        self.quantization = quantization
        self.marlin = marlin

    def __repr__(self) -> str:
        """What it is, how it is packed, and where it runs."""
        packed = (self.quantization or {}).get("mode")
        how = "not packed" if packed is None else f"packed ({(self.marlin or {}).get('formats') or packed})"
        title = ARCHITECTURES[self.config.model_type].title
        return f"<{type(self).__name__}: {title}, {how}, on {self.device.name}>"

    @property
    def config(self) -> Any:
        """The network's configuration, of its architecture's own class."""
        return self.network.config

    @classmethod
    def from_pretrained(
        cls: type[AnyModel],
        path: str | Path,
        config: Any = None,
        *,
        device: str = "auto",
        kv_bits: int | tuple[int, int] | None = None,
        activation_bits: int = 16,
        dtype: mx.Dtype | None = None,
        options: ImportOptions | None = None,
        split: Ranks = ALONE,
        streams: bool = False,
    ) -> AnyModel:
        """Read any supported checkpoint: a path, the name of a shipped model, or a repository on the hub.

        Args:
            config: what the model should be; a checkpoint that says otherwise is refused.
            device: auto, metal, cuda or cpu.
            kv_bits: 4, 8 or 16 bits of the keys and values that are kept (of a model that continues bytes, those
                of the whole context, and a pair for keys and values; of one that answers, what the decoder reads of an
                input); as the checkpoint says if None. Refused by networks that keep none.
            activation_bits: 16, or 8 to round what packed layers multiply, which is faster on a CPU and costs some accuracy.
            dtype: of weights and activations; float32 on a CPU and as the architecture has it elsewhere if None.
            options: what a foreign checkpoint does not reveal. What is assumed where it says nothing is an
                `AssumptionWarning`, and stands in `marlin["assumed"]`.
            split: ranks that share it: each holds a part and runs all that the others run, in the same order.
            streams: where memory is short of it, linear layers that lie in safetensors files stay there, and each is read
                when it multiplies (`engine.disk_layers`).

        Raises:
            CheckpointError, ConfigError: the checkpoint cannot be used, or does something else with bytes.
            UsageError: a type in which the network overflows, bits of what it does not keep, or ranks that cannot share it.
            BackendError: the device is not there.
        """
        where = locate_model(str(path))
        share: Share | None = None

        def wanted(checkpoint: Checkpoint) -> dict[str, Cut]:
            nonlocal share
            architecture = architecture_named(checkpoint.config, str(path))
            share = share_among(split, architecture, str(path))
            settings = settings_for(checkpoint.config, str(path))
            return share.cuts(settings, checkpoint.weights, str(path))

        options = with_heads(where, options or ImportOptions())
        # Looking at all values would bring what stays on disk into memory.
        own = ARCHITECTURES.get(architecture_of(where))
        late = split.size == 1 and (streams or (own is not None and bool(own.looked_up)))
        checkpoint = read_checkpoint(where, options, check_values=not late, wanted=None if split.size == 1 else wanted)
        chosen = choose_device(device)
        architecture = architecture_named(checkpoint.config, str(path))
        if architecture.capability is not cls.capability:
            found = f"{architecture.title}, which {architecture.capability.value}"
            raise CheckpointError(f"{path}: holds a {found}; take load, or name a model that {cls.capability.value}")
        if architecture.overflows_in_float16 and dtype is not None and dtype == mx.float16:
            raise UsageError(f"dtype: {with_article(architecture.title)} overflows in float16; use bfloat16 or float32")
        number = dtype or chosen.dtype or (mx.bfloat16 if architecture.overflows_in_float16 else None)
        network = build(
            checkpoint.config, checkpoint.weights, checkpoint.quantization, where=str(path), dtype=number, share=share
        )
        tables = architecture.looked_up if share is None else frozenset()
        left: list[str] = []
        if tables and is_short_of(network, tables):
            left += leave_on_disk(network, checkpoint.stored, tables)
        if streams and share is None and is_larger_than_memory(network):
            left += leave_layers_on_disk(network, checkpoint.stored)
        if late:
            check_weights(checkpoint, left)
        if config is not None:
            check_same(network.config, config, str(path))
        keeps_keys = bool(architecture.packed_keys(network.config).paths)
        if kv_bits not in (None, 16, (16, 16)) and not keeps_keys:
            raise UsageError(f"--kv-bits: this {architecture.title} keeps no keys and values; leave it out")
        round_activations(network, activation_bits)
        if kv_bits is None:
            # A recipe may speak of a cache that a model has not.
            kv_bits = int((checkpoint.marlin or {}).get("kv_bits", 16)) if keeps_keys else 16
        return cls._with_cache(network, chosen, kv_bits, quantization=checkpoint.quantization, marlin=checkpoint.marlin)

    @classmethod
    def from_config(cls: type[AnyModel], config: Any, *, seed: int = 0, device: str = "auto") -> AnyModel:
        """A model with random weights, for training, tests and timing."""
        chosen = choose_device(device)
        mx.random.seed(seed)
        return cls(ARCHITECTURES[config.model_type].network(config), chosen)

    @classmethod
    def _with_cache(
        cls: type[AnyModel], network: Any, device: Device, kv_bits: int | tuple[int, int], **tables: Any
    ) -> AnyModel:
        raise NotImplementedError

    def _packed(self: AnyModel, settings: "QuantizationSettings", statistics: "Statistics | None") -> AnyModel:
        """A copy with packed weights.

        Raises:
            QuantizationError: a layer that cannot be packed so.
        """
        from marlin_cli.quantization.apply import quantize_network

        self._check_whole()
        result = quantize_network(self.network, settings, statistics)
        tables = {"quantization": result.quantization, "marlin": {**lasting(self.marlin), **result.marlin}}
        return self._with_cache(result.network, self.device, settings.kv_bits, **tables)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder with config.json, model.safetensors and a card, in one step.

        Raises:
            OutputError: the folder exists, or cannot be written.
            UsageError: ranks share the network.
        """
        from marlin_cli.quantization.card import CARD, plain_card_of

        self._check_whole()
        weights, config = dict(tree_flatten(self.network.parameters())), config_as_mapping(self.config)
        card = plain_card_of(config, self.marlin, sum(array.nbytes for array in weights.values())).encode()
        write_model(Path(path), config, weights, self.quantization, self.marlin, overwrite=overwrite, beside={CARD: card})

    def _check_whole(self) -> None:
        """Raise `UsageError` for a network that ranks share."""
        if share_of(self.network) is not None:
            raise UsageError("this rank holds a part of the model alone; load it in one process to pack or save it")
        if any(isinstance(module, DiskTable) for module in self.network.modules()):
            raise UsageError("its hash tables stay in their file, as memory is short; marlin quantize packs it")
        if any(isinstance(module, DiskLinear) for module in self.network.modules()):
            raise UsageError("its layers stay in their files, as memory is short; marlin quantize packs it")
