"""What is installed: the wheel has all that runs and nothing else, and says which marlin it is."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import marlin_cli
from marlin_cli import version

ROOT = Path(__file__).resolve().parents[1]


def files_in(kind):
    """Paths in the wheel or sdist, as its builder gathers them."""
    module = pytest.importorskip(f"hatchling.builders.{kind}")
    builder = {"wheel": "WheelBuilder", "sdist": "SdistBuilder"}[kind]
    builder = getattr(module, builder)(str(ROOT))
    with builder.config.set_build_data({"artifacts": [], "force_include": {}}):
        included = [file.distribution_path for file in builder.recurse_included_files()]
        forced = [file.distribution_path for file in builder.recurse_forced_files(builder.config.force_include)]
    return {Path(path).as_posix() for path in [*included, *forced]}


@pytest.mark.parametrize("kind, below", [("wheel", "marlin_cli/"), ("sdist", "")])
def test_the_sample_is_whole_with_what_looks_compiled_in_it(kind, below):
    sample = {below + path.relative_to(ROOT).as_posix() for path in (ROOT / "calibration").rglob("*") if path.is_file()}
    assert any(path.endswith(".pyc") for path in sample) and sample <= files_in(kind)


def test_the_wheel_has_all_that_runs_and_nothing_else():
    found = files_in("wheel")
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "marlin_cli").rglob("*.py")}
    kernels = {f"marlin_cli/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").iterdir()}
    assert code | kernels | {"marlin_cli/py.typed"} <= found
    demo = {f"marlin_cli/configs/models/megabyte-demo/{name}" for name in ("config.json", "model.safetensors", "train.py")}
    assert demo | {"marlin_cli/calibration/default.yaml"} <= found
    folders = {path.split("/")[1] for path in found if path.count("/") > 1}
    assert all(path.startswith("marlin_cli/") for path in found)
    assert folders <= {path.name for path in (ROOT / "marlin_cli").iterdir()} | {"kernels", "calibration", "configs"}
    code_alone = [path for path in found if "/calibration/" not in path]  # the sample has binaries
    assert not [path for path in code_alone if path.endswith((".pyc", ".so"))]


def test_it_says_which_marlin_it_is():
    assert re.fullmatch(r"marlin [\d.]+(, commit [0-9a-f]{12})?, kernels [0-9a-f]{12}", version.described())
    assert version.kernels() == version.kernels()


def test_what_was_built_tells_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(version, "PACKAGE", tmp_path / "marlin_cli")
    (tmp_path / "marlin_cli" / "kernels").mkdir(parents=True)
    assert version.commit() is None
    (tmp_path / "marlin_cli" / "commit.txt").write_text("0123456789ab\n")
    (tmp_path / "marlin_cli" / "kernels" / "a.cpp").write_text("int a;")
    one = version.described()
    assert one.startswith(f"marlin {marlin_cli.__version__}, commit 0123456789ab, kernels ")
    (tmp_path / "marlin_cli" / "kernels" / "a.cpp").write_text("int b;")
    assert version.described() != one


@pytest.mark.slow
def test_wheel_and_sdist_are_built_and_checked(tmp_path):
    for module in ("build", "twine", "hatchling"):
        pytest.importorskip(module)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    made = sorted(tmp_path.iterdir())
    assert [file.suffix for file in made] == [".whl", ".gz"]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *made], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", made[0]], check=True)
    with zipfile.ZipFile(made[0]) as wheel:
        assert "marlin_cli/version.py" in wheel.namelist()
    said = subprocess.run(
        [python, "-c", "from marlin_cli.version import described; print(described())"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == version.described()
