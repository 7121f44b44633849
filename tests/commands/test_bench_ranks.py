"""`marlin bench --quality` by ranks: the numbers of one process, whether each has the models or all share them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared_models
from ring import ended, ring
from small_networks import ENCODING

from marlin_cli.api import MODELS
from marlin_cli.models import ARCHITECTURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    for name in ("grouped", "byt5"):
        shared_models.write(folder, name)
    config = ENCODING["canine"]
    MODELS[ARCHITECTURES[config.model_type].capability].from_config(config, device="cpu").save(folder / "canine")
    rng = np.random.default_rng(0)
    (folder / "bytes.bin").write_bytes(rng.integers(0, 256, 40_000, dtype=np.uint8).tobytes())
    (folder / "text.txt").write_text("Words that stand in lines. " * 150)
    pairs = [{"source": "word " * (number % 5 + 1), "target": "drow" * (number % 3)} for number in range(300)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def command(folder: Path, model: str, *options: str) -> list[str]:
    scored = {"grouped": "bytes.bin", "byt5": "pairs.jsonl", "canine": "text.txt"}[model]
    common = ["--no-throughput", "--format", "json", "--device", "cpu", "--quality", str(folder / scored)]
    if model == "canine":
        common += ["--reference", str(folder / model), "--window-bytes", "60"]
    if model == "grouped":
        common += ["--window-bytes", "96"]
    return ["-m", "marlin_cli", "bench", str(folder / model), *common, *options]


def quality(out: str) -> Any:
    return json.loads(out)["models"][0]["quality"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("model", ["grouped", pytest.param("byt5", marks=SLOW), pytest.param("canine", marks=SLOW)])
def test_ranks_score_as_one_process(model: str, folder: Path) -> None:
    alone = subprocess.run([sys.executable, *command(folder, model)], capture_output=True, text=True, check=True)
    with ring(command(folder, model), folder) as processes:
        first, second = ended(processes)
    assert (first[0], second) == (0, (0, "", "")), first[2]
    assert quality(first[1]) == quality(alone.stdout)


@pytest.mark.parametrize(("model", "part"), [("grouped", "global"), pytest.param("byt5", "encoder", marks=SLOW)])
def test_ranks_that_share_a_model_score_nearly_as_one_process(model: str, part: str, folder: Path) -> None:
    alone = subprocess.run([sys.executable, *command(folder, model)], capture_output=True, text=True, check=True)
    with ring(command(folder, model, "--split", part), folder) as processes:
        first, second = ended(processes)
    assert (first[0], second) == (0, (0, "", "")), first[2]
    every, name = ("all_domains", "bits_per_byte") if model == "grouped" else ("all_pairs", "bits_per_target_byte")
    mine, theirs = (quality(out)[every][name]["value"] for out in (first[1], alone.stdout))
    assert abs(mine - theirs) < 1e-5
    held, whole = (json.loads(out)["models"][0]["loaded_weight_bytes"] for out in (first[1], alone.stdout))
    assert held[part] < 0.7 * whole[part]
    assert {name: size for name, size in held.items() if name != part} == {n: s for n, s in whole.items() if n != part}
