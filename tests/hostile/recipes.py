"""Recipes in YAML: those of corpora, and those of bit widths."""

import json
from pathlib import Path
from random import Random
from typing import Any

from .case import Case
from .materials import TEXT
from .mutations import ESCAPES, HUGE, changed, damaged

CORPUS = {
    "sources": [{"domain": "code", "path": "a.txt", "weight": 1.0}, {"domain": "binary", "path": "data"}],
    "seq_bytes": 96,
}
PACKING = {"global_format": "nvfp4", "local_format": "mxfp8", "kv_bits": 16, "overrides": {"global.*o_proj$": "mxfp8"}}

# YAML that means more than it says, or something else.
TEXTS = (
    "a: &a [x]\nb: [*a, *a]", "a: &a\n  b: *a", "!!python/object/apply:os.getcwd []", "!!binary x", "sources: !!set {a, b}",
    "? [a]\n: b",
    "? {a: b}\n: c", "a: 2026-13-45", "a: 12:99:99", "a: 0x" + "f" * 9_000, "a: " + "9" * 9_000, "a: .inf", "<<: 1",
    "<<: {sources: 1}",
    "- " * 3_000 + "a", "[" * 3_000, "{" * 3_000, "a: |\n  x\n b", "\ta: b", "%YAML 9.9\n---\na: b", "a: b\n---\nc: d", "",
    "null", "~", "5",
    "sources:\n- {domain: code, path: a.txt}\nsources: []", '"\\x1b[31m": 1', 'a: "\\ud800"', "a: !<tag:x> b", "\ufeffa: b",
    "\0", "a: \x1b[31m",
    "overrides: {'(': int4}", "overrides: {'(a+)+$': int4}", "overrides: [a, b]", "overrides: {'': int4}", "kv_bits: yes",
    "kv_bits: 1_6",
    "sources: [{domain: code, path: /dev/zero}]", "sources: [{domain: code, path: recipe.yaml, weight: .nan}]",
    "checksums: a.txt",
    "sources: [{domain: code, path: '~'}]", "sources: [{domain: code, path: ''}]", "sources: [{domain: '', path: a.txt}]",
)  # fmt: skip


def corpus_recipe(rng: Random, folder: Path, materials: Path) -> Case:
    """A recipe of `calibrate --corpus`."""
    (folder / "a.txt").write_bytes(TEXT)
    (folder / "data").mkdir()
    (folder / "data" / "b.bin").write_bytes(TEXT)
    document = {
        **CORPUS,
        rng.choice(("checksums", "max_bytes", "seq_bytes")): rng.choice((1, 0, "a.txt", "SUMS", 2**70, None, ESCAPES)),
    }
    document = changed(rng, CORPUS if rng.random() < 0.6 else document)
    (folder / "SUMS").write_bytes(rng.choice((b"", b"x", b"0" * 64 + b"  a.txt\n", b"\xff", b"0" * 64 + b"  /etc/passwd\n")))
    (folder / "recipe.yaml").write_bytes(_yaml(rng, document))
    argv = ["calibrate", str(materials / "prefix"), "--corpus", "recipe.yaml", "--max-bytes", "1k", "-o", "new.safetensors"]
    return Case(argv, ("new.safetensors",))


def packing_recipe(rng: Random, folder: Path, materials: Path) -> Case:
    """A recipe of `quantize --recipe`."""
    keys = ("group_size", "encoder_format", "wo_format", "balance_keys", "method", "local_format", "overrides")
    document = changed(
        rng, PACKING if rng.random() < 0.6 else {**PACKING, rng.choice(keys): rng.choice((0, 16, 3, "int4", {}, None, ESCAPES))}
    )
    (folder / "recipe.yaml").write_bytes(_yaml(rng, document))
    model = str(materials / rng.choice(("prefix", "paper", "gated")))
    if rng.random() < 0.5:
        return Case(["quantize", model, "--recipe", "recipe.yaml", "--dry-run"])
    return Case(["quantize", model, "--recipe", "recipe.yaml", "-o", "out"], ("out",))


def _yaml(rng: Random, document: Any) -> bytes:
    """JSON is YAML; or a text that is not."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(TEXTS).encode()
    text = json.dumps(document).replace(json.dumps(HUGE), "9" * 6_000)
    if kind == 1:
        return damaged(rng, text.encode())
    if kind == 2 and text.endswith("}"):
        return (text[:-1] + ", " + json.dumps("k") + ": {" + rng.choice(TEXTS).replace("\n", " ") + "}}").encode()
    return text.encode()
