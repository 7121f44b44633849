"""`AnsweringModel`, the Python interface to networks that answer an input: bytes in, bytes, logits or states out."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from marlin_cli.engine import byte_states
from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerRequest
from marlin_cli.engine.answer_scoring import bits_of_answers
from marlin_cli.engine.answering import answer, answer_with_beams
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import Piece, Scheduler, SchedulerLimits
from marlin_cli.engine.spans import OUTSIDE, Place, Span
from marlin_cli.engine.speculation import Speculation, check_verified, speculation_of
from marlin_cli.engine.stopping import StopMatcher, Stopping
from marlin_cli.errors import UsageError
from marlin_cli.model import Model, checked_text, checked_texts
from marlin_cli.models import Capability
from marlin_cli.models.byt5_ids import FIRST_BYTE, FIRST_SPECIAL, bytes_with_sentinels, ids_of_bytes, ids_with_sentinels
from marlin_cli.ops.device import Device

if TYPE_CHECKING:
    from marlin_cli.quantization.plan import QuantizationSettings
    from marlin_cli.statistics import Statistics


class AnsweringModel(Model):
    """A model that answers an input, such as a ByT5 or a GBST; an encoder alone encodes it.

    Attributes:
        kv_bits: bits of the keys and values that the decoder reads of an input.
    """

    capability = Capability.ANSWERS

    def __init__(
        self,
        network: Any,
        device: Device,
        *,
        kv_bits: int = 16,
        quantization: dict[str, Any] | None = None,
        marlin: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, device, quantization=quantization, marlin=marlin)
        self.kv_bits = kv_bits

    @classmethod
    def _with_cache(cls, network: Any, device: Device, kv_bits: int | tuple[int, int], **tables: Any) -> "AnsweringModel":
        if not isinstance(kv_bits, int):
            raise UsageError("kv_bits: a model that answers keeps keys and values in one width; give one number")
        return cls(network, device, kv_bits=kv_bits, **tables)

    def generate(
        self,
        input_bytes: bytes,
        max_length: int = 256,
        *,
        min_length: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        beams: Beams | None = None,
        prefix: bytes = b"",
        stop: Sequence[bytes] = (),
        sentinels: bool = False,
        speculate: str | int = "off",
        prediction: bytes = b"",
    ) -> bytes:
        """The best answer to an input; see `answers`.

        Args:
            speculate: off, auto, or bytes that are drafted ahead at once; see `marlin_cli.engine.speculation`.
            prediction: what the answer may be, for drafts, which else come from the input.
        """
        limits = AnswerLimits(max_length, min_length, prefix, tuple(stop))
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        inputs, wanted = [checked_text(input_bytes, "answers")], speculation_of(speculate, prediction)
        return self.answers(inputs, limits, sampling, beams, sentinels=sentinels, speculation=wanted)[0][0].data

    def answers(
        self,
        inputs: Sequence[bytes],
        limits: AnswerLimits | None = None,
        sampling: Sampling | None = None,
        beams: Beams | None = None,
        *,
        sentinels: bool = False,
        speculation: Speculation | None = None,
    ) -> list[list[Answer]]:
        """The answers to each of many inputs of any lengths, best first: one, or the n best of a beam search.

        Args:
            sentinels: `<extra_id_N>` in an input stands for that special id.
            speculation: how answers are drafted ahead, which changes none of them.

        Raises:
            UsageError: an input longer than `max_bytes`, beams that would be sampled or drafted, drafts that nothing verifies,
                or an encoder alone.
        """
        limits = limits or AnswerLimits()
        sources = [self._source(data, sentinels=sentinels) for data in checked_texts(inputs, "generate")]
        if beams is not None:
            if sampling is not None and sampling.temperature:
                raise UsageError("beams and a temperature do not go together; choose one")
            check_verified(speculation or Speculation(), "no id of a beam is known before the end")
            return answer_with_beams(self.network, sources, limits, beams, memory_bits=self.kv_bits)
        found: dict[int, Answer] = {}
        for news in answer(self.network, sources, limits, sampling, memory_bits=self.kv_bits, speculation=speculation):
            found.update({stream: new for stream, new in news if isinstance(new, Answer)})
        return [[found[stream]] for stream in range(len(sources))]

    def generate_stream(
        self,
        input_bytes: bytes,
        max_length: int = 256,
        *,
        min_length: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        prefix: bytes = b"",
        stop: Sequence[bytes] = (),
        sentinels: bool = False,
    ) -> Iterator[int]:
        """The bytes of `generate` without beams, each (an int) as soon as it is decoded; with `sentinels` their texts too."""
        limits = AnswerLimits(max_length, min_length, prefix, tuple(stop))
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        for piece in self.pieces([checked_text(input_bytes, "pieces")], limits, sampling, sentinels=sentinels):
            yield from piece.data

    def pieces(
        self,
        prompts: Sequence[bytes],
        stopping: Stopping | AnswerLimits,
        sampling: Sampling,
        *,
        sentinels: bool = False,
        speculation: Speculation | None = None,
    ) -> Iterator[Piece]:
        """Decode answers to many inputs side by side, each byte as soon as it is decoded; those of a prefix come first.

        Args:
            sentinels: `<extra_id_N>` stands for that special id, in an input and in an answer.
            speculation: how answers are drafted ahead, which changes none of them.

        Raises:
            UsageError: see `answers`.
        """
        limits = stopping if isinstance(stopping, AnswerLimits) else AnswerLimits(stopping.max_bytes, stop=stopping.stop)
        sources = [self._source(prompt, sentinels=sentinels) for prompt in checked_texts(prompts, "generate")]
        matchers = [StopMatcher(limits.stop) for _ in sources]
        if limits.prefix:
            yield from (Piece(stream, limits.prefix) for stream in range(len(sources)))
        for news in answer(self.network, sources, limits, sampling, memory_bits=self.kv_bits, speculation=speculation):
            for stream, new in news:
                if isinstance(new, Answer):
                    yield Piece(stream, matchers[stream].flush(), new.stop_reason, speculated=new.speculated)
                elif FIRST_BYTE <= new < FIRST_SPECIAL:
                    data, _ = matchers[stream].push(new - FIRST_BYTE)
                    if data:
                        yield Piece(stream, data)
                else:  # no stop sequence goes on over a special id
                    data = matchers[stream].flush() + (bytes_with_sentinels([new]) if sentinels else b"")
                    if data:
                        yield Piece(stream, data)

    def scheduler(self, limits: SchedulerLimits | None = None) -> Scheduler[AnswerRequest]:
        """Answers that come and go beside each other; see `marlin_cli.engine.scheduling`. One thread owns it and the model.

        Raises:
            UsageError: an encoder alone.
        """
        return scheduler_of(self.network, limits, CacheBits(self.kv_bits, self.kv_bits))

    def logits(self, source: bytes, target: bytes) -> mx.array:
        """Logits [len(target) + 1, vocab] float32, teacher-forced: row i predicts byte i of the target, the last its end.

        Raises:
            UsageError: see `answers`.
        """
        if not self.config.decoder_layers:
            raise UsageError("the model is an encoder alone and has no logits; ask it to encode")
        ids = mx.array([self._source(checked_text(source))])
        return self.network(ids, mx.array([[self.config.start_id, *ids_of_bytes(checked_text(target))]]))[0]

    def bits(self, source: bytes, target: bytes) -> float:
        """Bits that `target` and its end cost as the answer to `source`."""
        sources, targets = [self._source(checked_text(source))], [checked_text(target)]
        return float(bits_of_answers(self.network, sources, targets, memory_bits=self.kv_bits)[0])

    def bits_per_byte(self, source: bytes, target: bytes) -> float:
        """Bits that a byte of `target` costs, those of its end among them.

        Raises:
            UsageError: no target; see `answers`.
        """
        target = checked_text(target)
        if not target:
            raise UsageError("bits_per_byte needs at least one byte of target")
        return self.bits(source, target) / len(target)

    def encode(self, data: bytes, *, marks: bool = False) -> mx.array:
        """The encoder's states [states, d_model] float32 of an input, one a byte, or one for all bytes of a GBST's row.

        The end of an input, which is read too, has a state of its own, the last, with `marks` alone.

        Raises:
            UsageError: an input longer than `max_bytes`; or states that gptq+hadamard rotated, which mean nothing outside.
        """
        return self.encode_many([checked_text(data, "encode_many")], marks=marks)[0]

    def encode_many(self, texts: Sequence[bytes], *, marks: bool = False) -> list[mx.array]:
        """As `encode`, of each input."""
        if (self.marlin or {}).get("rotated_states"):
            raise UsageError("gptq+hadamard has rotated this model's encoder states; encode with one packed by another method")
        texts = checked_texts(texts, "encode")
        for text in texts:
            self._check_length(text)
        found = byte_states.states(self.network, texts)
        if marks:
            return list(found)
        return [rows[: byte_states.rows_of(self.network, len(text))] for rows, text in zip(found, texts, strict=True)]

    def places(self, data: bytes) -> list[Place]:
        """What each row of `encode(data, marks=True)` stands for: a byte, or the end."""
        return byte_states.places(self.network, checked_text(data))

    def pooled(self, data: bytes) -> mx.array:
        """One vector for an input, the mean of its states and its end's: [d_model] float32. Nothing was trained to make one.

        Raises:
            UsageError: see `encode`.
        """
        return self.pooled_many([checked_text(data, "pooled_many")])[0]

    def pooled_many(self, texts: Sequence[bytes]) -> mx.array:
        """As `pooled`, of each input: [inputs, d_model]."""
        rows = [states.mean(axis=0) for states in self.encode_many(checked_texts(texts, "pooled"), marks=True)]
        return mx.stack(rows) if rows else mx.zeros((0, self.config.d_model))

    def label(self, data: bytes) -> list[Span]:
        """The labelled spans of an input; see `tag_many`."""
        return self.tag_many([checked_text(data, "tag_many")])[0]

    def tag_many(self, texts: Sequence[bytes], *, outside: Sequence[str] = OUTSIDE, merge: bool = True) -> list[list[Span]]:
        """The labelled spans of each input; see `engine.byte_states.tag`.

        Raises:
            UsageError: the model has no labels, or an input longer than `max_bytes`.
        """
        texts = checked_texts(texts, "label")
        for text in texts:
            self._check_length(text)
        return byte_states.tag(self.network, texts, outside=outside, merge=merge)

    def quantize(
        self,
        bits: int = 4,
        *,
        encoder_bits: int | None = None,
        decoder_bits: int | None = None,
        cross_bits: int | None = None,
        kv_bits: int = 16,
        statistics: "Statistics | None" = None,
        settings: "QuantizationSettings | None" = None,
    ) -> "AnsweringModel":
        """A copy with packed weights; each part in `bits` unless its own are given, `wo` in 8 at least.

        Raises:
            QuantizationError: a layer that cannot be packed so.
        """
        from marlin_cli.quantization.plan import QuantizationSettings, format_from_bits

        chosen = {"encoder": encoder_bits, "decoder": decoder_bits, "cross": cross_bits}
        formats = {f"{part}_format": format_from_bits(bits if own is None else own) for part, own in chosen.items()}
        settings = settings or QuantizationSettings(kv_bits=kv_bits, **formats)  # type: ignore[arg-type]
        return self._packed(settings, statistics)

    def _source(self, data: bytes, *, sentinels: bool = False) -> list[int]:
        """The ids of an input: its bytes and the end."""
        self._check_length(data)
        ids = ids_with_sentinels(data, self.config.vocab_size) if sentinels else ids_of_bytes(data)
        return [*ids, self.config.end_id]

    def _check_length(self, data: bytes) -> None:
        if len(data) > self.config.max_bytes:
            raise UsageError(f"{len(data):,} bytes do not fit the model's max_bytes of {self.config.max_bytes:,}")
