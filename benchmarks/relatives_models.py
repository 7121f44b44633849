"""Small models of the relatives of ByT5, trained here by MLX on plain text: what each learns, and how. Measures nothing.

No weights of these architectures ship with marlin, and random ones say nothing of accuracy. So each learns something that
it is used for: ByGPT5 continues bytes; CANINE tags where words begin in text whose spaces were taken out; LA-CANINE finds
where lines ended in text that runs on; GBST gives back case and marks of letters, and starts from byt5-demo, since
copying is not learnt in minutes. They are small (0.3 to 7 million weights) and far from what they could become.
"""

import itertools
import math
import random
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten

from marlin_cli import load
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.corpus import Pair
from marlin_cli.files import shipped
from marlin_cli.models import ARCHITECTURES, architecture_of, config_as_mapping, linear_layers, set_modules
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.byt5_ids import FIRST_BYTE, ids_of_bytes
from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.gbst import GbstConfig
from marlin_cli.models.la_canine import LaCanineConfig
from marlin_cli.models.text_batch import batch_of as texts_of
from marlin_cli.quantization.distill import differentiable_linear
from marlin_cli.quantization.pair_batches import batch_of as pairs_of

DEMO = "byt5-demo"
LANGUAGES = "cs", "de", "en", "es", "fi", "fr", "hu", "pl", "sv", "tr"
HELD_OUT_SHARE = 10  # one line in so many is held out where no folder is
PIECE = 128  # characters or bytes that a network reads at once
ROWS = 8  # pieces in a batch
WARMUP = 20

Texts = Mapping[str, Sequence[str]]  # language -> lines


class Batch(NamedTuple):
    """What a network reads at once, and what it should predict.

    Attributes:
        inputs: as the architecture's `logits` takes it.
        targets: [predictions] the right one of the values.
        owners: [predictions] number of the text (piece or pair) in the batch; -1 for what does not count.
        sizes: [texts] bytes or characters of each.
    """

    inputs: Any
    targets: np.ndarray
    owners: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Task:
    """What a small model learns.

    Attributes:
        title: of the table.
        config: of the small model.
        unit: what bits are counted by.
        measure: what is better the larger it is: `best` is the share of predictions whose likeliest value is right, `f1` is
            of value 1, `exact` the share of whole answers that are right.
        learning_rate: of Adam at its highest.
        pieces: (lines of a language) -> what is read at once, for training and for measuring.
        batch: (configuration, some of these pieces) -> a batch.
        begin: gives a new network better weights than random ones.
    """

    title: str
    config: Any
    unit: str
    measure: str
    learning_rate: float
    pieces: Callable[[Sequence[str]], list[Any]]
    batch: Callable[[Any, Sequence[Any]], Batch]
    begin: Callable[[Any], None]


# Texts


def read_texts(folder: Path) -> dict[str, list[str]]:
    """The distinct lines of each language that has a file <language>.txt, with docs_ before or a country behind the name."""
    inner = folder / "multilingual"
    found: dict[str, list[str]] = {}
    for file in sorted((inner if inner.is_dir() else folder).rglob("*.txt")):
        name = file.stem.removeprefix("docs_").partition("_")[0]
        if name in LANGUAGES:
            lines = (unicodedata.normalize("NFC", " ".join(line.split())) for line in file.read_text("utf-8").splitlines())
            found.setdefault(name, []).extend(line for line in lines if sum(map(str.isalpha, line)) > 2)
    if not found:
        raise SystemExit(f"{folder}: holds none of {', '.join(f'{name}.txt' for name in LANGUAGES)}; name another folder")
    return {name: list(dict.fromkeys(lines)) for name, lines in found.items()}


def split_texts(corpus: Path, held_out: Path | None) -> tuple[Texts, Texts]:
    """Lines to train on and lines to measure on, none of which is in both."""
    train = read_texts(corpus)
    if held_out is None:
        measured = {name: lines[-(len(lines) // HELD_OUT_SHARE) :] for name, lines in train.items()}
        return {name: lines[: -(len(lines) // HELD_OUT_SHARE)] for name, lines in train.items()}, measured
    seen = {line for lines in train.values() for line in lines}
    return train, {name: [line for line in lines if line not in seen] for name, lines in read_texts(held_out).items()}


# Bytes that go on


def byte_pieces(lines: Sequence[str]) -> list[bytes]:
    """Whole windows of running text."""
    data = "\n".join(lines).encode()
    return [data[start : start + PIECE] for start in range(0, len(data) - PIECE + 1, PIECE)]


def continued(config: ByGPT5Config, pieces: Sequence[bytes]) -> Batch:
    """Every byte but the first by those before it."""
    windows = np.stack([np.frombuffer(piece, dtype=np.uint8) for piece in pieces])
    targets = np.roll(windows, -1, axis=1).astype(np.int64) + FIRST_BYTE
    owners = np.repeat(np.arange(len(pieces))[:, None], PIECE, axis=1)
    owners[:, -1] = -1  # what follows is not known
    return Batch(windows, targets.reshape(-1), owners.reshape(-1), np.full(len(pieces), PIECE - 1))


# Words and lines, by a mark at each character


def word_pieces(lines: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Text without its spaces, and which characters begin a word."""
    words = [word for line in lines for word in line.split()]
    marks = [int(index == 0) for word in words for index in range(len(word))]
    return _marked("".join(words), marks)


def line_pieces(lines: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Lines one after the other, and which characters end one."""
    marks = [int(index == len(line) - 1) for line in lines for index in range(len(line) + 1)]
    return _marked("".join(f"{line} " for line in lines), marks)


def _marked(text: str, marks: Sequence[int]) -> list[tuple[str, list[int]]]:
    return [(text[at : at + PIECE], list(marks[at : at + PIECE])) for at in range(0, len(text) - PIECE + 1, PIECE)]


def marked(config: CanineConfig | LaCanineConfig, pieces: Sequence[tuple[str, list[int]]]) -> Batch:
    """A yes or no for every character; the marks around a text do not count."""
    edge = [0] if config.marks else []
    targets = [[*edge, *marks, *edge] for _, marks in pieces]
    owners = [[*(-1 for _ in edge), *(number for _ in marks), *(-1 for _ in edge)] for number, (_, marks) in enumerate(pieces)]
    inputs = texts_of([text.encode() for text, _ in pieces], config)
    return Batch(inputs, np.concatenate(targets), np.concatenate(owners), np.array([len(marks) for _, marks in pieces]))


# Case and marks


def pairs_of_lines(lines: Sequence[str]) -> list[Pair]:
    """Segments as byt5-demo's training cut them, each with what is left of it without case and marks."""
    sys.path.insert(0, str(shipped(f"configs/models/{DEMO}")))
    from train import split_line, stripped

    segments = [text for line in lines for text in split_line(line, PIECE // 2)]
    return [Pair(stripped(text).encode(), text.encode()) for text in segments]


def restored(config: GbstConfig, pairs: Sequence[Pair]) -> Batch:
    """Every byte of the answers, and their ends."""
    rows = [[*ids_of_bytes(pair.target), config.end_id] for pair in pairs]
    owners = [[number] * len(row) for number, row in enumerate(rows)]
    sizes = np.array([len(row) - 1 for row in rows])
    return Batch(pairs_of([_example(pair) for pair in pairs], config), np.concatenate(rows), np.concatenate(owners), sizes)


class _Example(NamedTuple):
    source: bytes
    target: bytes
    size_bytes: int


def _example(pair: Pair) -> _Example:
    return _Example(pair.source, pair.target, len(pair.source) + len(pair.target))


# Beginnings


def as_t5_begins(network: Any) -> None:
    """Embeddings of unit variance, and queries as small as the scale would make them that T5's attention has not.

    With embeddings as small as MLX makes them, layers drown the bytes, and none is learnt of another for hundreds of steps.
    """
    network.embedding.weight = network.embedding.weight * network.config.d_model**0.5
    for path, layer in linear_layers(network).items():
        if path.endswith("q_proj"):
            layer.weight = layer.weight * network.config.head_dim**-0.5


def as_the_demo(network: Any) -> None:
    """byt5-demo's weights behind a front end that lets bytes through, mixed with means of their blocks."""
    demo = load(DEMO, device="cpu").network
    network.load_weights([(path, array.astype(mx.float32)) for path, array in tree_flatten(demo.parameters())], strict=False)
    front = network.front
    front.kernel = mx.zeros_like(front.kernel).at[0].add(1)
    front.proj.weight = mx.eye(network.config.d_model)
    front.score.weight = front.score.weight * 0


def as_it_is(network: Any) -> None:
    """Random weights."""


def gbst_config() -> GbstConfig:
    """byt5-demo's shape, and lucidrains' blocks of one to four bytes."""
    own = asdict(load(DEMO, device="cpu").network.config)
    return GbstConfig(**own | {"model_type": "gbst", "block_sizes": (1, 2, 3, 4)})


CHARACTERS: dict[str, Any] = {
    "d_model": 128, "ffn_dim": 384, "heads": 4, "layers": 3,
    "hash_buckets": 1024, "max_characters": 1024, "block_characters": 64,
}  # fmt: skip
TASKS: dict[str, Callable[[], Task]] = {
    "bygpt5": lambda: Task(
        "ByGPT5 continues bytes", ByGPT5Config(d_model=128, ffn_dim=384, heads=4, head_dim=32, layers=3), "byte", "best", 4e-3,
        byte_pieces, continued, as_t5_begins,
    ),
    "canine": lambda: Task(
        "CANINE tags where words begin", CanineConfig(**CHARACTERS, pooler=False, head="token", labels=("O", "word")),
        "character", "f1", 2e-3, word_pieces, marked, as_it_is,
    ),
    "la_canine": lambda: Task(
        "LA-CANINE finds ends of lines", LaCanineConfig(**CHARACTERS, adapter_dim=64), "character", "f1", 2e-3,
        line_pieces, marked, as_it_is,
    ),
    "gbst": lambda: Task(
        "GBST restores case and marks", gbst_config(), "byte", "exact", 5e-4, pairs_of_lines, restored, as_the_demo
    ),
}  # fmt: skip


# Training


class _Trained(nn.Module):
    """A linear layer whose gradient is written in the products of the forward pass, which is faster on a CPU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, array in layer.parameters().items():
            self[name] = array

    def __call__(self, x: mx.array) -> mx.array:
        y = differentiable_linear(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


def batches(task: Task, texts: Texts, seed: int) -> Iterator[Batch]:
    """Batches without end, of pieces of all languages alike."""
    draw = random.Random(seed)
    pieces = [each for each in map(task.pieces, texts.values()) if each]
    while True:
        yield task.batch(task.config, [draw.choice(draw.choice(pieces)) for _ in range(ROWS)])


def mean_bits(network: Any, batch: Batch) -> mx.array:
    """Bits of a prediction, which can be differentiated."""
    chosen = np.flatnonzero(batch.owners >= 0)
    logits = architecture_of(network).logits(network, batch.inputs)[mx.array(chosen)]
    return nn.losses.cross_entropy(logits, mx.array(batch.targets[chosen]), reduction="mean") / math.log(2)


def train(task: Task, texts: Texts, seconds: float, seed: int) -> tuple[Any, dict[str, float]]:
    """A network trained for so long, in float32, and how far it came."""
    mx.random.seed(seed)
    plain = ARCHITECTURES[task.config.model_type].network(task.config)
    task.begin(plain)
    network = plain
    set_modules(network, [(path, _Trained(layer)) for path, layer in linear_layers(plain).items()])
    network.train()
    step_of = nn.value_and_grad(network, mean_bits)
    adam = optimizers.AdamW(learning_rate=0.0, betas=[0.9, 0.98], weight_decay=0.01)
    began, recent = time.monotonic(), []
    for step, batch in zip(itertools.count(), batches(task, texts, seed), strict=False):
        done = (time.monotonic() - began) / seconds
        if done >= 1:
            break
        rise = min(1.0, (step + 1) / WARMUP)
        adam.learning_rate = task.learning_rate * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        loss, gradients = step_of(network, batch)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        adam.update(network, gradients)
        mx.eval(network.parameters(), adam.state, loss)
        recent = [*recent[-19:], float(loss)]
        if step % 10 == 0:
            print(f"{task.title}: step {step}, {np.mean(recent):.3f} bits", flush=True)
    trained = ARCHITECTURES[task.config.model_type].network(task.config)
    trained.load_weights(tree_flatten(network.parameters()))
    trained.eval()
    return trained, {"steps": step, "seconds": round(time.monotonic() - began), "bits": round(float(np.mean(recent)), 4)}


def trained(name: str, texts: Texts, models: Path, seconds: float, seed: int) -> Any:
    """The small model of a task as its folder in `models` has it, in 16 bits; trained first where there is none."""
    folder = models / name
    if not folder.exists():
        task = TASKS[name]()
        network, came = train(task, texts, seconds, seed)
        weights = {path: array.astype(mx.bfloat16) for path, array in tree_flatten(network.parameters())}
        write_model(folder, config_as_mapping(task.config), weights, None, {"trained": came}, overwrite=False)
        print(f"{task.title}: {came}", flush=True)
    return load(str(folder), device="cpu")
