"""The state of a run over a stream: what stands beside its unfinished output, and lets a later run go on."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.engine.fingerprints import bytes_of, digest_of
from marlin_cli.engine.stream_scoring import ScorerMemory
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.tensor_files import read_safetensors, write_safetensors
from marlin_cli.writing import writing

FORMAT, SUM = "marlin-surprise", "sha256"

TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8", mx.uint32: "U32"}


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        seen: bytes of the stream.
        digest: hexadecimal SHA-256 of these.
        written: bytes of the output.
        scorer, lines: see `StreamScorer.memory` and `LineCosts.memory`.
    """

    seen: int
    digest: str
    written: int
    scorer: ScorerMemory
    lines: Mapping[str, Any]


def write_run_state(path: Path, state: RunState, run: Mapping[str, str]) -> None:
    """Write a state; `run` says of what it is, and has to be the same for who reads it.

    Raises:
        OutputError: it cannot be written.
    """
    arrays = state.scorer.arrays
    parts = {name: (TYPES[array.dtype], tuple(array.shape), bytes_of(array)) for name, array in arrays.items()}
    facts = {
        "format": FORMAT,
        "run": json.dumps(run, sort_keys=True),
        "place": json.dumps([state.seen, state.digest, state.written]),
        "scorer": json.dumps(state.scorer.facts),
        "lines": json.dumps(state.lines),
    }
    with writing(path, private=True) as temporary:
        shapes = {name: (dtype, shape) for name, (dtype, shape, _) in parts.items()}
        contents = (data for _, _, data in parts.values())
        write_safetensors(temporary, shapes, contents, {**facts, SUM: digest_of(facts, parts)})


def read_run_state(path: Path, run: Mapping[str, str]) -> RunState:
    """What `write_run_state` wrote.

    Raises:
        UsageError: it is damaged, or of another run.
    """
    try:
        arrays, facts = read_safetensors(path)
        mx.eval(arrays)
        parts = {name: (TYPES[array.dtype], tuple(array.shape), bytes_of(array)) for name, array in arrays.items()}
        if digest_of({name: text for name, text in facts.items() if name != SUM}, parts) != facts[SUM]:
            raise ValueError("its bytes are not those that were written")
        seen, digest, written = json.loads(facts["place"])
        theirs, scorer, lines = (json.loads(facts[name]) for name in ("run", "scorer", "lines"))
        if facts["format"] != FORMAT or seen < 0 or written < 0 or not math.isfinite(lines["bits"]):
            raise ValueError("it holds no such state")
    except CheckpointError as error:
        raise UsageError(f"--resume: {error}; delete it to begin again") from None
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise UsageError(f"--resume: {path}: is damaged: {error}; delete it to begin again") from None
    if theirs != dict(run):
        other = next(name for name in {**run, **theirs} if run.get(name) != theirs.get(name))
        raise UsageError(f"--resume: {path}: is of a run with another {other}; leave --resume out to begin again")
    return RunState(seen, digest, written, ScorerMemory(arrays, scorer), lines)
