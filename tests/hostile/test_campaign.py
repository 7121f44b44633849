"""400 inputs of the campaign, the same ones each time: none comes to a bad end. `make hostile` runs thousands."""

import fcntl
from dataclasses import replace

import pytest

from hostile.campaign import Worker, share, worker
from hostile.case import Case
from hostile.judge import BAD, Outcome, verdict
from hostile.kinds import KINDS
from hostile.materials import PACKED, RELATIVES, prepare

SEED = 0
INPUTS = share(400)


@pytest.fixture(scope="session")
def materials(tmp_path_factory, worker_id):
    """The good files, made once for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    with (root / "hostile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "hostile").exists():
            prepare(root / "half-made").rename(root / "hostile")
    return root / "hostile"


@pytest.fixture(scope="session")
def hostile_worker(materials):
    with worker(materials) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_comes_to_a_bad_end(kind: str, hostile_worker: Worker):
    results = [hostile_worker.run(kind, SEED, number) for number in range(INPUTS[kind])]
    bad = [f"{result.verdict} --number {result.number}: {result.reason}" for result in results if result.verdict in BAD]
    assert not bad, f"python -m tests.hostile.run --kind {kind!r} --seeds {SEED} --number N --keep FOLDER makes it again"


def test_the_files_that_are_damaged_are_good(materials, hostile_worker: Worker, tmp_path):
    """A campaign on files that are refused anyway would find nothing."""
    models = ["prefix", "paper", "lucid", *PACKED, "gated", "relu", *RELATIVES, "model.gguf"]
    commands = [["generate", str(materials / name), "-p", "ab", "--max-bytes", "4"] for name in models]
    commands += [["quantize", str(materials / name), "--dry-run"] for name in ("prefix", "paper", "lucid", "gated")]
    commands += [["calibrate", "--show", str(materials / f"{name}.safetensors")] for name in ("plain", "hessian", "byt5")]
    results = str(materials / "results.jsonl")
    commands += [["bench", "--compare", results, results]]
    for argv in commands:
        outcome = hostile_worker.outcome(Case(argv, raw=True), tmp_path)
        assert verdict(Case(argv, raw=True), outcome) == ("ok", ""), (argv, outcome.stderr)


# What the judge must see; `c` is a command that names a file.
CASE = Case(["generate", "model"], ("out",))
GOOD = Outcome(
    {"code": 0, "killed_for": "", "children_left": False, "peak_bytes": 1, "seconds": 0.1, "wall_seconds": 0.1}, b"", b"", ()
)
REFUSED = {**GOOD.answer, "code": 1}
VERDICTS = {
    "ok": (CASE, GOOD),
    "refused": (CASE, replace(GOOD, answer=REFUSED, stderr=b"marlin: model: no such file\n")),
    "HANG": (CASE, replace(GOOD, answer={**GOOD.answer, "killed_for": "time", "code": -9})),
    "MEMORY": (CASE, replace(GOOD, answer={**GOOD.answer, "peak_bytes": 2 << 30})),
    "CRASH": (CASE, replace(GOOD, answer={**GOOD.answer, "code": -11})),
    "TRACEBACK": (CASE, replace(GOOD, answer=REFUSED, stderr=b"Traceback (most recent call last):\nValueError: x\n")),
    "RAW": (CASE, replace(GOOD, answer=REFUSED, stderr=b"marlin: model: \x1b[31m\n")),
    "SILENT": (replace(CASE, refuse=True), GOOD),
    "NAN": (CASE, replace(GOOD, stdout=b"bits/byte  nan\n")),
    "LEFT": (CASE, replace(GOOD, left=(".out.abc.unfinished",))),
    "LINES": (CASE, replace(GOOD, answer=REFUSED, stderr=b"a warning of a library\nmarlin: model: no such file\n")),
    "VAGUE": (CASE, replace(GOOD, answer=REFUSED, stderr=b"marlin: something is wrong\n")),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str):
    assert verdict(*VERDICTS[name])[0] == name
