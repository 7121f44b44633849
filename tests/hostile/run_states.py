"""What runs leave to go on from: the state of a prompt, and of a stream that was scored in part, with its output so far."""

import shutil
from pathlib import Path
from random import Random

from .case import Case
from .materials import TEXT
from .mutations import changed, damaged, json_text, value
from .safetensors_files import joined, parts
from .statistics_files import with_number


def prompt_state(rng: Random, folder: Path, materials: Path) -> Case:
    """What `generate --load-state` begins with. One that is not right is said, and the prompt is read as usual."""
    name = rng.choice(("prefix", "bygpt5"))
    (folder / "state").write_bytes(_spoiled(rng, (materials / f"{name}.state").read_bytes()))
    (folder / "text.txt").write_bytes(TEXT[: rng.choice((64, 64, 80, 2))])
    argv = ["generate", str(materials / name), "--prompt-file", "text.txt", "--max-bytes", "4", "--load-state", "state"]
    if rng.random() < 0.3:
        argv += rng.choice((["--save-state", "state"], ["--save-state", "new"], ["--kv-bits", "8"], ["--json"]))
    return Case(argv, ("new",), raw=True)


def unfinished_surprise(rng: Random, folder: Path, materials: Path) -> Case:
    """What `bench --surprise --resume` goes on with."""
    suffix = rng.choice((".jsonl", ".npy"))
    names = [f"costs{suffix}.unfinished", f"costs{suffix}.unfinished.state"]
    for each in names:
        shutil.copy(materials / each, folder / each)
    output, state = (folder / each for each in names)
    text, model = TEXT, "prefix"
    kind = rng.randrange(6)
    if kind == 0:
        output.write_bytes(damaged(rng, output.read_bytes()))
    elif kind == 1:
        text = rng.choice((TEXT[:100], TEXT[:-1], b"", TEXT.upper(), TEXT * 3))
    elif kind == 2:
        model = rng.choice(("lucid", "paper", "bygpt5", "spacebyte"))
    else:
        state.write_bytes(_spoiled(rng, state.read_bytes()))
    (folder / "text.txt").write_bytes(text)
    argv = ["bench", str(materials / model), "--surprise", "text.txt", "-o", f"costs{suffix}", "--resume"]
    if rng.random() < 0.2:
        argv += rng.choice((["--window", "64"], ["--top", "1"], ["--kv-bits", "8"], ["--format", "json"]))
    return Case(argv, (f"costs{suffix}",))


def _spoiled(rng: Random, good: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return damaged(rng, good)
    document, data = parts(good)
    facts = document["__metadata__"]
    if kind == 1:
        return joined(document, with_number(rng, document, data))
    if kind == 2:
        name = rng.choice([name for name in document if name != "__metadata__"])
        document[rng.choice((name, f"{name}.1", "keys.\x1b[31m"))] = rng.choice((document.pop(name), value(rng)))
    elif kind == 3:
        document["__metadata__"] = changed(rng, facts)
    else:
        key = rng.choice(list(facts))
        facts[key] = rng.choice((str(value(rng)), json_text(rng, value(rng)).decode("latin-1"), facts[key] + "0"))
    return joined(document, data)
