"""How byt5-demo was made: text to segments, segments to weights; measure.py has its error rates.

    python train.py prepare --corpus CORPUS --segments segments.txt.xz
    python train.py train   --segments segments.txt.xz --out checkpoint/

CORPUS holds `train/multilingual/<language>.txt`, `train/code/*.txt` and `heldout/multilingual/docs_<language>.txt`.
Needs torch and transformers (the extra `peers`); one GPU for ten minutes, or a CPU for a day.
"""

import argparse
import hashlib
import json
import lzma
import math
import multiprocessing
import random
import re
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Languages whose letters carry diacritics or case, that is with something to restore.
RESTORED = (
    "af be bg ca cs cy da de el en eo es et eu fi fr ga hr hu id is it kk lt lv mk mn nb nl om pl pt_BR ro ru sk sl sq sr sv"
    " tr uk vi"
).split()
SEGMENT_BYTES = 190  # the longest segment; with the end mark it fits the longest bucket
BUCKET_TOKENS = (48, 112, 192)  # padded lengths, one compiled program each
OTHER_SCRIPT_SHARE = 0.25  # of the segments of languages outside RESTORED, taken in each epoch
CODE_SEGMENTS_PER_KIND = 1200
VALIDATION_BLOCK_LINES, VALIDATION_EVERY_BLOCKS = 50, 50  # whole blocks, so that neighbours stay on one side
# Buckets of the relative position that the first heads start with: offsets +1, -1, 0, +2, -2; the decoder's -1, -2, -3, 0.
ENCODER_NEIGHBOURS, DECODER_NEIGHBOURS, NEIGHBOUR_BIAS = (17, 1, 0, 18, 2), (1, 2, 3, 0), 4.0
POSITION_RATE = 20.0  # of the learning rate, for relative biases: a few scalars that must grow to several units
FIRST_BYTE_ID, END_ID, PAD_ID = 3, 1, 0

MARKS = re.compile("[\u0300-\u036f]+")
SENTENCE_END = re.compile(r"(?<=[.!?…:;])\s+")
LETTERS_WITHOUT_MARKS = str.maketrans(
    {"đ": "d", "ð": "d", "ł": "l", "ø": "o", "ħ": "h", "ŧ": "t", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe", "þ": "th"}
    | {"Đ": "D", "Ð": "D", "Ł": "L", "Ø": "O", "Ħ": "H", "Ŧ": "T", "ẞ": "SS", "Æ": "AE", "Œ": "OE", "Þ": "TH"}
)


class Segment(NamedTuple):
    language: str
    split: str  # train, validation or heldout
    text: str  # the target: NFC, one line, at most SEGMENT_BYTES


# ---- the task -------------------------------------------------------------------------------------------------------


def without_diacritics(text: str) -> str:
    """The text without combining marks of the Latin, Greek and Cyrillic scripts, in NFC; other scripts' marks stay."""
    if text.isascii():
        return text
    plain = unicodedata.normalize("NFD", text).translate(LETTERS_WITHOUT_MARKS)
    return unicodedata.normalize("NFC", MARKS.sub("", plain))


def stripped(text: str) -> str:
    """The source of the task: lower case, then without diacritics."""
    return without_diacritics(text.lower())


def partly_stripped(text: str) -> str:
    """Each word stripped or left with even odds, the same odds for the same text in every run."""
    draw = random.Random(zlib.crc32(text.encode()))
    return " ".join(stripped(word) if draw.random() < 0.5 else word for word in text.split(" "))


# Source of a target, and its share in training: mostly the task, some of what people also type.
VARIANTS: tuple[tuple[Callable[[str], str], float], ...] = (
    (stripped, 0.75),
    (without_diacritics, 0.10),
    (str.lower, 0.05),
    (partly_stripped, 0.05),
    (str, 0.05),
)


# ---- segments -------------------------------------------------------------------------------------------------------


def split_line(line: str, limit_bytes: int) -> Iterator[str]:
    """Sentences of a line packed up to a limit; a sentence over it is cut between words, a word over it between letters."""
    packed = ""
    for sentence in SENTENCE_END.split(line):
        for piece in _pieces(sentence, limit_bytes):
            if packed and len(f"{packed} {piece}".encode()) <= limit_bytes:
                packed = f"{packed} {piece}"
                continue
            if packed:
                yield packed
            packed = piece
    if packed:
        yield packed


def _pieces(sentence: str, limit_bytes: int) -> Iterator[str]:
    while len(sentence.encode()) > limit_bytes:
        head = sentence.encode()[:limit_bytes].decode(errors="ignore")
        cut = head.rfind(" ")
        head = head[:cut] if cut > 0 else head
        yield head.rstrip()
        sentence = sentence[len(head) :].lstrip()
    if sentence:
        yield sentence


def distinct_lines(path: Path) -> list[str]:
    lines = (unicodedata.normalize("NFC", line).strip() for line in path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if any(letter.isalpha() for letter in line)))


def segments_of_corpus(corpus: Path, seed: int) -> Iterator[Segment]:
    """Every segment of the corpus; training lines are cut twice, once at the full length and once at drawn lengths."""
    draw = random.Random(seed)
    for path in sorted((corpus / "train/multilingual").glob("*.txt")):
        lines = distinct_lines(path)
        for number, line in enumerate(lines):
            held = number // VALIDATION_BLOCK_LINES % VALIDATION_EVERY_BLOCKS == VALIDATION_EVERY_BLOCKS // 2
            for text in split_line(line, SEGMENT_BYTES):
                yield Segment(path.stem, "validation" if held else "train", text)
            if not held:
                for text in split_line(line, draw.randint(60, SEGMENT_BYTES)):
                    yield Segment(path.stem, "train", text)
        held_out = corpus / f"heldout/multilingual/docs_{path.stem}.txt"
        if path.stem in RESTORED and held_out.exists():
            seen = set(lines)  # a heading that both sides have would measure memory
            for line in distinct_lines(held_out):
                if line not in seen:
                    for text in split_line(line, SEGMENT_BYTES):
                        yield Segment(path.stem, "heldout", text)
    for path in sorted((corpus / "train/code").glob("*.txt")):
        fitting = [line for line in distinct_lines(path) if len(line.encode()) <= SEGMENT_BYTES]
        for text in draw.sample(fitting, CODE_SEGMENTS_PER_KIND):
            yield Segment("code", "train", text)


def prepare(options: argparse.Namespace) -> None:
    """Write the corpus's segments, one a line: language, split and text between tabs."""
    with lzma.open(options.segments, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines("\t".join(segment) + "\n" for segment in segments_of_corpus(options.corpus, options.seed))


def read_segments(path: Path) -> list[Segment]:
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [Segment(*line.rstrip("\n").split("\t", 2)) for line in file]


# ---- training -------------------------------------------------------------------------------------------------------


def token_ids(text: str) -> list[int]:
    return [byte + FIRST_BYTE_ID for byte in text.encode()] + [END_ID]


def encode_segment(segment: Segment) -> list[bytes]:
    """The target, then its source in every variant, as bytes; code is copied in all of them."""
    text = segment.text
    return [text.encode(), *((text if segment.language == "code" else make(text)).encode() for make, _ in VARIANTS)]


class Bucket(NamedTuple):
    rows: Any  # int16 [segments, 1 + variants, tokens], padded: target first
    share: Any  # float32 [segments]: the odds of being taken in an epoch
    language: Any  # int64 [segments]: index into the sorted names


def buckets_of(segments: list[Segment], names: list[str], pool: Any, device: str) -> list[Bucket]:
    import numpy as np
    import torch

    encoded = pool.map(encode_segment, segments, chunksize=2048)
    lengths = np.array([[len(each) for each in row] for row in encoded])  # bytes; the end mark is one token more
    longest = lengths.max(axis=1) + 1
    buckets = []
    for shorter, tokens in zip((0, *BUCKET_TOKENS), BUCKET_TOKENS, strict=False):
        chosen = np.flatnonzero((longest > shorter) & (longest <= tokens))
        rows = np.full((len(chosen), 1 + len(VARIANTS), tokens), PAD_ID, np.int16)
        position, ends = np.arange(tokens), lengths[chosen][..., None]
        every_byte = b"".join(each for index in chosen for each in encoded[index])
        rows[position < ends] = np.frombuffer(every_byte, np.uint8).astype(np.int16) + FIRST_BYTE_ID
        rows[position == ends] = END_ID
        languages = [segments[index].language for index in chosen]
        share = [1.0 if name in RESTORED or name == "code" else OTHER_SCRIPT_SHARE for name in languages]
        buckets.append(
            Bucket(
                torch.from_numpy(rows).to(device),
                torch.tensor(share, device=device),
                torch.tensor([names.index(name) for name in languages], device=device, dtype=torch.int64),
            )
        )
    return buckets


def new_model() -> Any:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=384,
        d_model=256,
        d_kv=32,
        d_ff=640,
        num_layers=6,
        num_decoder_layers=2,
        num_heads=8,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=PAD_ID,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        tokenizer_class="ByT5Tokenizer",
    )
    model = T5ForConditionalGeneration(config)
    # Newer transformers tie the head whatever the config says, and start it at a scale meant for Adafactor.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5)
    _start_as_a_copier(model)
    return model


def _start_as_a_copier(model: Any) -> None:
    """Begin with heads that look at neighbouring bytes and cross-attention that looks at like bytes.

    Copying is most of the task, and needs both. From transformers' own start neither appears for thousands of steps.
    """
    import torch

    with torch.no_grad():
        for stack, buckets in ((model.encoder, ENCODER_NEIGHBOURS), (model.decoder, DECODER_NEIGHBOURS)):
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [bucket, head]
            for head, bucket in enumerate(buckets):
                bias[bucket, head] += NEIGHBOUR_BIAS
        for block in model.decoder.block:
            cross = block.layer[1].EncDecAttention
            cross.q.weight.copy_(cross.k.weight * model.config.d_kv**-0.5)


def loss_of(model: Any, source: Any, target: Any) -> Any:
    """Mean cross-entropy in nats a target token (end mark included) of [batch, tokens] ids, teacher-forced."""
    import torch

    start = torch.full_like(target[:, :1], PAD_ID)
    logits = model(
        input_ids=source,
        attention_mask=(source != PAD_ID).long(),
        decoder_input_ids=torch.cat([start, target[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=PAD_ID)


def epoch_batches(buckets: list[Bucket], batch_tokens: int) -> Iterator[tuple[Any, Any]]:
    """Source and target [batch, tokens] of every segment drawn for one epoch, buckets mixed, remainders left out."""
    import torch

    odds = torch.tensor([share for _, share in VARIANTS], device=buckets[0].rows.device)
    plan = []
    for bucket in buckets:
        taken = torch.nonzero(torch.rand_like(bucket.share) < bucket.share).flatten()
        taken = taken[torch.randperm(len(taken), device=taken.device)]
        rows = batch_tokens // bucket.rows.shape[2]
        plan += [(bucket.rows, taken[start : start + rows]) for start in range(0, len(taken) - rows + 1, rows)]
    random.shuffle(plan)
    for table, index in plan:
        variant = 1 + torch.multinomial(odds, len(index), replacement=True)
        yield table[index, variant].long(), table[index, 0].long()


def validation_loss(model: Any, buckets: list[Bucket], batch_tokens: int) -> float:
    """Nats a target token over the validation segments of the restored languages, on the task's own source."""
    import torch

    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for bucket in buckets:
            rows = bucket.rows[bucket.share == 1.0]
            for part in rows.split(batch_tokens // rows.shape[2]):
                source, target = part[:, 1].long(), part[:, 0].long()
                counted = int((target != PAD_ID).sum())
                total += float(loss_of(model, source, target)) * counted
                tokens += counted
    model.train()
    return total / tokens


def save(model: Any, folder: Path, notes: dict[str, Any]) -> None:
    """Write the model in bfloat16 as transformers does, and the notes beside it."""
    import copy

    import torch

    copied = copy.deepcopy(model).to(torch.bfloat16)
    copied.generation_config.max_length = 1024  # transformers' default of 20 would cut every answer
    copied.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "notes.json").write_text(json.dumps(notes, indent=2) + "\n")


def train(options: argparse.Namespace) -> None:
    segments = read_segments(options.segments)
    with multiprocessing.Pool() as pool:  # forked before the GPU is touched
        import torch

        random.seed(options.seed)
        torch.manual_seed(options.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        device = "cuda" if torch.cuda.is_available() else "cpu"
        names = sorted({segment.language for segment in segments})
        by_split = {
            split: buckets_of([each for each in segments if each.split == split], names, pool, device)
            for split in ("train", "validation")
        }
    for number, bucket in enumerate(by_split["train"]):
        print(f"bucket {BUCKET_TOKENS[number]}: {len(bucket.rows)} segments", flush=True)
    model = new_model().to(device)
    named = dict(model.named_parameters())
    positions = [named.pop(name) for name in list(named) if "relative_attention_bias" in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in named.values() if weight.ndim == 2], "weight_decay": options.weight_decay},
            {"params": [weight for weight in named.values() if weight.ndim != 2], "weight_decay": 0.0},
            {"params": positions, "weight_decay": 0.0, "rate": POSITION_RATE},
        ],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )
    program = torch.compile(model, dynamic=False) if options.compile else model
    model.train()
    began = time.monotonic()
    seen_tokens = step = epoch = 0
    log: list[dict[str, float]] = []
    progress = 0.0
    losses = []
    while progress < 1.0:
        epoch += 1
        for source, target in epoch_batches(by_split["train"], options.batch_tokens):
            # By steps, or by the clock where that would run out first: the rate reaches zero in either case.
            progress = max(step / options.steps, (time.monotonic() - began) / options.seconds)
            if progress >= 1.0:
                break
            rate = options.learning_rate * min(1.0, (step + 1) / options.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = group.get("rate", 1.0) * rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress)))
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = loss_of(program, source, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step += 1
            if step % options.log_steps == 0:
                with torch.autocast(device, dtype=torch.bfloat16):
                    validation = validation_loss(model, by_split["validation"], options.batch_tokens)
                log.append(
                    {
                        "step": step,
                        "seconds": round(time.monotonic() - began, 1),
                        "train_nats": round(float(torch.stack(losses).mean()), 5),
                        "validation_nats": round(validation, 5),
                    }
                )
                print(log[-1], flush=True)
                losses = []
            seen_tokens += target.numel()
    seconds = round(time.monotonic() - began, 1)
    settings = ("seed", "batch_tokens", "learning_rate", "weight_decay", "warmup_steps")
    notes = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "steps": step,
        "epochs": epoch,
        "padded_target_tokens_seen": seen_tokens,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in settings},
        "segments_sha256": hashlib.sha256(options.segments.read_bytes()).hexdigest(),
        "log": log,
    }
    save(model, options.out, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="cut a corpus into segments")
    preparing.add_argument("--corpus", type=Path, required=True)
    training = commands.add_parser("train", help="train and save a checkpoint")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=20_000)
    training.add_argument("--seconds", type=float, default=math.inf, help="end the schedule by then")
    training.add_argument("--batch-tokens", type=int, default=49_152)
    training.add_argument("--learning-rate", type=float, default=2e-3)
    training.add_argument("--weight-decay", type=float, default=0.05)
    training.add_argument("--warmup-steps", type=int, default=500)
    training.add_argument("--log-steps", type=int, default=500)
    training.add_argument("--compile", action="store_true")
    for each in (preparing, training):
        each.add_argument("--segments", type=Path, required=True)
        each.add_argument("--seed", type=int, default=20_261_123)
    options = parser.parse_args()
    {"prepare": prepare, "train": train}[options.command](options)


if __name__ == "__main__":
    main()
