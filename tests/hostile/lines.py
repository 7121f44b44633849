"""Files of a document a line: prompts of `generate`, pairs of a ByT5, saved results of `bench`."""

import json
from pathlib import Path
from random import Random
from typing import Any

from .case import Case
from .materials import PACKED, PAIRS
from .mutations import ESCAPES, HUGE, changed, damaged, json_text, value

PROMPTS = [{"prompt": "ab", "id": 1}, {"prompt_hex": "61 62"}, {"prompt_base64": "YWI="}, "ab"]


def prompts(rng: Random, folder: Path, materials: Path) -> Case:
    """`generate --prompts`; the answers are JSON."""
    odd = (
        {"prompt": value(rng)},
        {"prompt_hex": "6"},
        {"prompt_base64": "=" * 9},
        {"prompt": "a", "id": value(rng)},
        {"prompt": "a" * 9_000},
    )
    documents: list[Any] = [rng.choice((*PROMPTS, *odd)) for _ in range(3)]
    documents[rng.randrange(3)] = changed(rng, rng.choice(PROMPTS)) if rng.random() < 0.5 else value(rng)
    content = rng.choice((b"\n", b"\r\n", b"\n\n", b"\x0b", "\u2028".encode())).join(json_text(rng, each) for each in documents)
    (folder / "prompts.jsonl").write_bytes(damaged(rng, content) if rng.random() < 0.2 else content)
    model = str(materials / rng.choice(("prefix", "gated")))
    name = rng.choice(("prompts.jsonl", "prompts.jsonl", "prompts.jsonl", "-", "/dev/null", "nothing", "."))
    return Case(["generate", model, "--prompts", name, "--max-bytes", "4"], stdin=content)


def prompt_bytes(rng: Random, folder: Path, materials: Path) -> Case:
    """A prompt of any bytes, by a pipe, a file or an option."""
    content = rng.choice(
        (b"", b"\0" * 50, b"\xff" * 50, b"\n" * 9, ESCAPES.encode(), rng.randbytes(60), b"<extra_id_99>" * 3, b"x" * 5_000)
    )
    (folder / "prompt").write_bytes(content)
    model = str(materials / rng.choice(("prefix", "paper", "lucid", *PACKED, "gated", "relu")))
    text = content.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    given = rng.choice((["-p", text], ["--prompt-file", "prompt"], ["--prompt-file", "-"], ["--hex", content.hex()], []))
    extra: list[str] = rng.choice(
        ([], [], ["--json"], ["--raw"], ["--stop", text[:5] or "x"], ["--temperature", "1", "--seed", "3"])
    )
    return Case(["generate", model, *given, *extra, "--max-bytes", "4"], raw=True, stdin=content)


def pairs(rng: Random, folder: Path, materials: Path) -> Case:
    """Inputs and answers of a ByT5, .jsonl and .tsv."""
    if rng.random() < 0.4:
        name = "pairs.tsv"
        cells = (b"a", b"", b"x" * 200, b"\xff\xfe", b'"a', b"a\rb", ESCAPES.encode(), b"\0")
        content = b"\n".join(b"\t".join(rng.choice(cells) for _ in range(rng.choice((2, 2, 3, 1, 4)))) for _ in range(5))
    else:
        name = "pairs.jsonl"
        rows = [json.loads(line) for line in PAIRS.splitlines()]
        odd = [
            {"source": "a"},
            {"input": "a", "output": value(rng)},
            {"source_hex": "zz", "target": ""},
            {"source_base64": "é", "target": "a"},
        ]
        odd += [
            {"source": "a", "target": "b", "language": value(rng)},
            {"source": "a", "target": "b", "group": ESCAPES},
            {"source": HUGE},
        ]
        chosen = [rng.choice((*rows, *odd)) if rng.random() < 0.8 else changed(rng, rng.choice(rows)) for _ in range(5)]
        content = b"\n".join(json_text(rng, each) for each in chosen)
    if rng.random() < 0.2:
        content = damaged(rng, content)
    (folder / name).write_bytes(content)
    model = str(materials / rng.choice(("gated", "gated", "relu")))
    kind = rng.randrange(3)
    if kind == 0:
        return Case(["bench", model, "--no-throughput", "--quality", name, *rng.choice(([], ["--format", "json"]))])
    if kind == 1:
        return Case(["calibrate", model, "--pairs", name, "-o", "new.safetensors"], ("new.safetensors",))
    argv = [
        "quantize",
        model,
        "--method",
        "gptq",
        "--sequential",
        "--sequential-bytes",
        "200",
        "--calibration-pairs",
        name,
        "-o",
        "out",
    ]
    return Case(argv, ("out",))


def results(rng: Random, folder: Path, materials: Path) -> Case:
    """Saved results that `bench --compare` reads, or that `--save` adds to."""
    lines = (materials / "results.jsonl").read_bytes().splitlines()
    documents = [json.loads(line) for line in lines]
    index = rng.randrange(len(documents))
    documents[index] = changed(rng, documents[index])
    content = (
        b"\n".join(json_text(rng, each) if n == index else json.dumps(each).encode() for n, each in enumerate(documents))
        + b"\n"
    )
    if rng.random() < 0.25:
        content = damaged(rng, content)
    (folder / "new.jsonl").write_bytes(content)
    (folder / "old.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    names = rng.choice((["old.jsonl", "new.jsonl"], ["new.jsonl", "old.jsonl"], ["new.jsonl", "new.jsonl"]))
    if rng.random() < 0.1:
        names = rng.choice(
            (["new.jsonl", "/dev/null"], ["new.jsonl", "."], ["nothing", "new.jsonl"], ["/dev/zero", "new.jsonl"])
        )
    return Case(
        ["bench", "--compare", *names, *rng.choice(([], ["--format", "json"], ["--format", "md"], ["--format", "csv"]))]
    )
