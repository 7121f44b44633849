"""`EncodingModel`, the Python interface to networks that encode texts: UTF-8 in; states, vectors, labels or spans out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from marlin_cli.config import describe
from marlin_cli.engine import characters
from marlin_cli.engine.characters import AnswerSettings, Floats, Label, Text
from marlin_cli.engine.sentences import SplitSettings, sentences
from marlin_cli.engine.spans import OUTSIDE, Place, Span
from marlin_cli.errors import UsageError
from marlin_cli.model import Model, check_several, checked_text, checked_texts
from marlin_cli.models import Capability, architecture_of
from marlin_cli.ops.device import Device

if TYPE_CHECKING:
    from marlin_cli.quantization.plan import QuantizationSettings
    from marlin_cli.statistics import Statistics


class EncodingModel(Model):
    """A model that encodes texts, such as a CANINE or an LA-CANINE, and does what its head does.

    A text is bytes of UTF-8 or a list of code points; where a method takes a pair of texts, a tuple of two. States depend
    on how far an input is padded: `pad_to` is the length in positions (characters and marks) that the checkpoint was used
    with, None pads nothing. A text gives the same by itself and among many.

    Raises:
        InputError: by every method, for bytes that are no UTF-8, a number that is no code point, and a text that is too
            long, or under four positions where nothing pads it.
        UsageError: by every method, where the network's head does something else.
    """

    capability = Capability.ENCODES

    @classmethod
    def _with_cache(cls, network: Any, device: Device, kv_bits: int | tuple[int, int], **tables: Any) -> "EncodingModel":
        return cls(network, device, **tables)  # nothing is cached

    @property
    def splits(self) -> bool:
        """Does it cut texts into sentences, as an LA-CANINE does?"""
        return bool(self.config.head == "sentence")

    @property
    def split_settings(self) -> SplitSettings:
        """wtpsplit's settings, in a shorter window where the network reads no longer one."""
        plain = SplitSettings()
        window = min(plain.window_characters, self.config.longest)
        return SplitSettings(window_characters=window, stride_characters=min(plain.stride_characters, window))

    def encode(self, data: Text, *, pad_to: int | None = None) -> mx.array:
        """The states of a text or pair: [positions, d_model] float32, a row for each character and mark."""
        return self.encode_many([_one(data, "encode_many")], pad_to=pad_to)[0]

    def encode_many(self, texts: Sequence[Text], *, pad_to: int | None = None) -> list[mx.array]:
        """As `encode`, of each text."""
        return characters.encode(self.network, _several(texts, "encode"), pad_to)

    def check(self, data: Text, *, pad_to: int | None = None, where: str = "") -> None:
        """See that the model reads a text or pair; `where` begins what is said of one that it does not."""
        characters.check(self.network, _one(data), pad_to, where)

    def padding_needed(self, data: Text, *, where: str = "") -> int | None:
        """The positions that a text or pair must be padded to, to be read at all; None where it has as many."""
        return characters.padding_needed(self.network, _one(data), where)

    def places(self, data: bytes) -> list[Place]:
        """What each row of `encode` stands for: a character, or a mark."""
        return characters.places(self.network, checked_text(data))

    def pooled(self, data: Text, *, pad_to: int | None = None) -> mx.array:
        """One vector for a text or pair, by the network's pooler: [d_model] float32."""
        return self.pooled_many([_one(data, "pooled_many")], pad_to=pad_to)[0]

    def pooled_many(self, texts: Sequence[Text], *, pad_to: int | None = None) -> mx.array:
        """As `pooled`, of each text: [texts, d_model]."""
        return characters.pooled(self.network, _several(texts, "pooled"), pad_to)

    def scores_many(self, texts: Sequence[Text], *, pad_to: int | None = None) -> list[Floats]:
        """What the head gives each text [rows], or its positions [positions, rows], before it becomes probabilities."""
        return characters.scores(self.network, _several(texts, "scores_many"), pad_to)

    def classify(self, data: Text, *, pad_to: int | None = None) -> list[Label]:
        """Every label of a text or pair with its score, the best first."""
        return self.classify_many([_one(data, "classify_many")], pad_to=pad_to)[0]

    def classify_many(self, texts: Sequence[Text], *, pad_to: int | None = None) -> list[list[Label]]:
        """As `classify`, of each text."""
        return characters.classify(self.network, _several(texts, "classify"), pad_to)

    def label(self, data: bytes, *, pad_to: int | None = None) -> list[Span]:
        """The labelled spans of a text: its best label over all of it, its characters' labels, or its sentences."""
        return self.label_many([checked_text(data, "label_many")], pad_to=pad_to)[0]

    def label_many(self, texts: Sequence[bytes], *, pad_to: int | None = None) -> list[list[Span]]:
        """As `label`, of each text.

        Raises:
            UsageError: `pad_to` for a network that cuts texts: its windows have a length of their own.
        """
        texts = checked_texts(texts, "label")
        if not self.splits:
            return characters.label(self.network, texts, pad_to)
        if pad_to is not None:
            raise UsageError("pad_to has no meaning for a network that cuts texts into sentences; its settings have a window")
        return [[span for span, _ in self.sentences([text])] for text in texts]

    def tag_many(
        self,
        texts: Sequence[bytes],
        *,
        pad_to: int | None = None,
        outside: Sequence[str] = OUTSIDE,
        merge: bool = True,
        marks: bool = True,
    ) -> list[list[Span]]:
        """As `label_many` of a network that labels characters; for the arguments see `engine.characters.tag`."""
        return characters.tag(self.network, checked_texts(texts, "label"), pad_to, outside=outside, merge=merge, marks=marks)

    def answer(
        self, question: bytes, context: bytes, settings: AnswerSettings | None = None, *, pad_to: int | None = None
    ) -> list[Span]:
        """Spans of the context that answer the question, the best first."""
        return characters.answers(self.network, checked_text(question), checked_text(context), settings, pad_to)

    def choose(self, data: bytes, choices: Sequence[bytes], *, pad_to: int | None = None) -> Floats:
        """The probability of each choice to go with the text: [choices]; without `pad_to` as long as the longest."""
        return characters.choose(self.network, checked_text(data), checked_texts(choices, "choose"), pad_to)

    def sentences(
        self, pieces: Iterable[bytes], settings: SplitSettings | None = None, *, where: str = "the input"
    ) -> Iterator[tuple[Span, bytes]]:
        """The sentences of a stream of UTF-8 that may be cut anywhere, each as soon as it is sure, in bounded memory.

        Together they are the text; white space belongs to the sentence before it. `where` begins what is said of a stream
        that is no UTF-8.
        """
        if not self.splits:
            title = architecture_of(self.network).title
            raise UsageError(f"this {title} does not cut texts into sentences; take an LA-CANINE, or ask it to label")
        if isinstance(pieces, (str, bytes)):
            raise UsageError(f"pieces are a list or another stream of bytes, found {describe(pieces)}; for one text `label`")
        return sentences(self.network, map(checked_text, pieces), settings or self.split_settings, where)

    def quantize(
        self,
        global_bits: int = 4,
        local_bits: int = 8,
        *,
        statistics: "Statistics | None" = None,
        settings: "QuantizationSettings | None" = None,
    ) -> "EncodingModel":
        """A copy with packed weights: deep layers in `global_bits`; those over characters, and convolutions, in `local_bits`.

        `settings` says more than bits, and stands in for them when given.

        Raises:
            QuantizationError: a layer that cannot be packed so.
        """
        from marlin_cli.quantization.plan import settings_from_bits

        return self._packed(settings or settings_from_bits(global_bits, local_bits), statistics)


def _several(texts: Any, one: str) -> list[Text]:
    check_several(texts, one)
    return [_one(text) for text in texts]


def _one(data: Any, many: str = "") -> Text:
    """A text (bytes or code points), or a pair of texts.

    Args:
        many: the method that takes several texts, where there is one.

    Raises:
        UsageError: something else.
    """
    if isinstance(data, tuple):
        if len(data) != 2:
            several = f"; for several texts `{many}`" if many else ""
            raise UsageError(f"a tuple is a pair, of two texts, found {len(data)}{several}")
        first, second = (_text(each, many) for each in data)
        return first, second
    return _text(data, many)


def _text(data: Any, many: str) -> bytes | list[int]:
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes, bytearray, memoryview)):
        if all(isinstance(each, int) for each in data):
            return list(data)
    return checked_text(data, many)
