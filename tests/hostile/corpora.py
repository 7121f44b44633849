"""Corpora of `calibrate` and `bench --quality`: raw, packed and tables; folders, links, pipes, devices; names with escapes."""

import gzip
import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

from .case import Case
from .materials import TEXT
from .mutations import ESCAPES, HUGE, damaged, json_text, value

ROWS = [{"text": "row one of several, long enough to be a window of bytes by itself, or nearly so"}, {"text": "two"}] * 4


def rows(rng: Random, folder: Path, materials: Path) -> Case:
    """JSON a line, as it is or packed: values that are no text, other columns, broken lines."""
    lines = [json_text(rng, _row(rng)) if rng.random() < 0.3 else json.dumps(rng.choice(ROWS)).encode() for _ in range(6)]
    content = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\r")).join(lines)
    name = "rows" + rng.choice((".jsonl", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".jsonl.zst", ".json"))
    (folder / name).write_bytes(_packed(rng, content, name))
    return _use(rng, name, materials)


def packed(rng: Random, folder: Path, materials: Path) -> Case:
    """.gz and .zst that are damaged, cut, of several parts, or of other files."""
    name = "text" + rng.choice((".gz", ".zst", ".txt.gz", ".gz.zst"))
    content = _packed(rng, TEXT * rng.choice((1, 50)), name)
    kind = rng.randrange(6)
    if kind == 0:
        content = rng.choice((b"", b"\0" * 100, b"x" * 100, content[:4], content[:-4], content * 3, content + b"tail"))
    elif kind == 1:
        content = _packed(rng, bytes(rng.choice((2**20, 2**25))), name)  # grows a thousandfold
    else:
        content = damaged(rng, content)
    (folder / name).write_bytes(content)
    return _use(rng, name, materials)


def parquet(rng: Random, folder: Path, materials: Path) -> Case:
    """Parquet: damaged bytes, columns of other types and names."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {
        "text": ["abc" * 40, None, "", "x"], "bytes": [b"\xff" * 90, b"", None, b"y"], "n": [1, 2, 3, None],
        "tags": [["a"], [], None, ["b" * 99]], ESCAPES: ["a", "b", "c", "d"], "messages": [[{"role": "user",
        "content": "a"}]] * 4,
    }  # fmt: skip
    names = rng.sample(list(columns), rng.choice((1, 2, 3)))
    table = pyarrow.table({name: columns[name] for name in names})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        table, buffer, compression=rng.choice(("none", "gzip", "zstd")), row_group_size=rng.choice((1, 2, 4))
    )
    content = buffer.getvalue()
    (folder / "rows.parquet").write_bytes(damaged(rng, content) if rng.random() < 0.6 else content)
    return _use(rng, "rows.parquet", materials)


def places(rng: Random, folder: Path, materials: Path) -> Case:
    """Folders, patterns and names: loops of links, pipes, devices, nothing, all that a shell lets through."""
    data = folder / "data"
    data.mkdir()
    (data / "a.txt").write_bytes(TEXT)
    kind = rng.randrange(12)
    name = "data"
    if kind == 0:
        for index in range(rng.choice((1, 2, 3))):
            os.symlink(".", data / f"loop{index}")
        name = rng.choice(("data", "data/**", "data/**/*", "data/*/*/*/*.txt", "data/**/**/**"))
    elif kind == 1:
        os.mkfifo(data / "pipe")
        name = rng.choice(("data", "data/pipe", "data/*", "name=data/pipe"))
    elif kind == 2:
        name = rng.choice(
            ("/dev/zero", "/dev/null", "/dev/stdin", "/dev/urandom:2", "x=/dev/full", "/proc/self/mem", "/proc/kmsg")
        )
    elif kind == 3:
        os.symlink("/dev/zero", data / "zero")
        os.symlink("nowhere", data / "dangling")
        name = rng.choice(("data", "data/zero", "data/dangling", "data/*"))
    elif kind == 4:
        name = rng.choice(
            (
                ESCAPES,
                "x" * 300,
                "a/" * 3_000,
                "\udcff",
                "",
                " ",
                "[",
                "data/[",
                "data/[a-",
                "**",
                "=data",
                "A=data",
                "x=",
                ":1",
            )
        )
    elif kind == 5:
        name = "data/a.txt:" + rng.choice(("0", "-1", "1e999", "nan", "1e-300", "9" * 400, "x", ""))
    elif kind == 6:
        (data / f"bad{ESCAPES}").write_bytes(b"" if rng.random() < 0.5 else TEXT)
        (data / f"bad{ESCAPES}.jsonl").write_bytes(b'{"text": 5}\n')
    elif kind == 7:
        (data / "closed").mkdir(mode=0)
        os.symlink("self", data / "self")
        name = rng.choice(("data", "data/self", "data/closed", "data/self/*"))
    elif kind == 8:
        name = rng.choice(
            ("hf:", "hf:x", "hf:a/b", "hf:../x", "hf:a/b/c@d:0.5", "hf:" + ESCAPES, "hf:" + "x" * 900, "owner/name")
        )
    elif kind == 9:
        (folder / "default").write_bytes(b"")
        name = rng.choice(("default", "./default", "~", "~nobody-of-that-name/x", "$HOME", "-", "x=-", "-:2"))
    elif kind == 10:
        deep = data
        for _ in range(200):
            deep = deep / "d"
        deep.mkdir(parents=True)
        (deep / "b.txt").write_bytes(TEXT)
    else:
        name = rng.choice(("multilingual", "code", "binary"))
        (data / name).mkdir()
        (data / name / "c.jsonl.gz").write_bytes(b"not packed")
    return _use(rng, name.replace("\x00", ""), materials, ["--corpus", "data/a.txt"] if rng.random() < 0.2 else [])


def _use(rng: Random, name: str, materials: Path, more: list[str] | None = None) -> Case:
    model = str(materials / rng.choice(("prefix", "prefix", "paper")))
    kind = rng.randrange(5)
    if kind < 3:
        argv = [
            "calibrate",
            model,
            "--corpus",
            name,
            *(more or []),
            "--seq-bytes",
            "96",
            "--max-bytes",
            "1k",
            "-o",
            "new.safetensors",
        ]
        return Case(argv, ("new.safetensors",), stdin=TEXT)
    if kind == 3:
        argv = ["bench", model, "--no-throughput", "--quality", name, "--max-quality-bytes", "1k", "--window-bytes", "64"]
        return Case(argv, stdin=TEXT)
    argv = [
        "calibrate",
        str(materials / "gated"),
        "--corpus",
        name,
        "--seq-bytes",
        "96",
        "--max-bytes",
        "1k",
        "-o",
        "new.safetensors",
    ]
    return Case(argv, ("new.safetensors",), stdin=TEXT)


def _row(rng: Random) -> Any:
    return rng.choice((
        {"text": value(rng)}, {"text": "x" * 90, "extra": value(rng)}, {"content": "other column " * 9}, {ESCAPES: "x" * 70},
        value(rng),
        {"messages": [{"role": "user", "content": "hello"}]}, {"text": ["a list", "of texts"]}, {"id": HUGE,
        "text": "abc" * 40}, {},
    ))  # fmt: skip


def _packed(rng: Random, content: bytes, name: str) -> bytes:
    import zstandard

    for suffix in Path(name).suffixes:
        if suffix == ".gz":
            content = gzip.compress(content, 1, mtime=0)
        elif suffix == ".zst":
            content = zstandard.compress(content)
    return damaged(rng, content) if rng.random() < 0.15 else content
