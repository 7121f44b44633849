"""The wheel in fresh environments of every Python that is promised and found: without a compiler, then with one.

Interpreters are looked for as pythonX.Y on PATH, in pyenv's folder, and in MARLIN_PYTHONS (paths, a colon between them).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_cli import version

ROOT = Path(__file__).resolve().parents[1]
PROMISED = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What does not ask for a checkout, nor for peers: texts, files, options, networks of every architecture, the whole path.
FAST_PART = (
    "test_cli.py", "test_config.py", "test_console.py", "test_documents.py", "test_text.py", "test_tiny.py", "test_writing.py",
    "models", "page", "corpus/test_corpus.py", "commands/test_info.py", "quantization/test_encoders.py",
)  # fmt: skip

ASK = ["generate", "megabyte-demo", "-p", "To install ", "--max-bytes", "24", "--device", "cpu"]

NOTHING = "/nonexistent"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the extra `cpu` is Linux's")]


def interpreter(name: str) -> Path | None:
    """The interpreter of a version such as 3.12, or None."""
    given = [Path(each) for each in os.environ.get("MARLIN_PYTHONS", "").split(":") if each]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [each for each in given if each.name == f"python{name}"]
    found += [Path(each) for each in [shutil.which(f"python{name}")] if each and "pyenv/shims" not in each]
    return next(iter([*found, *sorted(pyenv.glob(f"versions/{name}.*/bin/python{name}"))]), None)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    for module in ("build", "hatchling"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.iterdir())


class Installed:
    """A fresh environment with the wheel and pytest, and beside it the tests without the code."""

    def __init__(self, python: Path, wheel: Path, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv/bin"
        subprocess.run([python, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet", "--only-binary", ":all:"]
        done = subprocess.run([*pip, f"{wheel}[cpu]", "pytest"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def run(self, *command: str | Path, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MARLIN", "PYTHON"))}
        environment = {
            **inherited,
            "PATH": f"{self.bin}:{path}",
            "MARLIN_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            **variables,
        }
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
        return done


@pytest.fixture(scope="module", params=PROMISED)
def installed(request, wheel, tmp_path_factory):
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no python{request.param} on PATH, in pyenv's folder or in MARLIN_PYTHONS")
    return Installed(python, wheel, tmp_path_factory.mktemp(f"python{request.param}"))


def test_it_runs_without_a_compiler(installed):
    nothing = {"path": NOTHING, "CXX": NOTHING}
    said = installed.run("marlin", "--version", **nothing).stdout
    assert re.fullmatch(rf"marlin {version.__version__}(, commit [0-9a-f]{{12}})?, kernels {version.kernels()}\n", said)
    said = installed.run("marlin", *ASK, **nothing)
    assert "no C++ compiler" in said.stderr
    here = {**os.environ, "MARLIN_KERNELS": "reference", "HF_HUB_OFFLINE": "1"}
    same = subprocess.run([sys.executable, "-m", "marlin_cli", *ASK], env=here, capture_output=True, text=True, check=True)
    assert said.stdout == same.stdout and len(said.stdout) > 10
    python = installed.bin / "python"
    tests = [f"tests/{name}" for name in FAST_PART]
    print(installed.run(python, "-m", "pytest", "-q", "-m", "not slow and not peers", *tests, **nothing).stdout)


def test_it_builds_its_kernels_with_one(installed):
    python = installed.bin / "python"
    include = installed.run(python, "-c", "import sysconfig; print(sysconfig.get_path('include'))", path=NOTHING).stdout.strip()
    if not (Path(include) / "Python.h").is_file():
        pytest.skip(f"no headers of this Python in {include}")
    first = installed.run("marlin", *ASK, path=os.environ["PATH"])
    assert "building the CPU kernels" in first.stderr
    again = installed.run("marlin", *ASK, path=os.environ["PATH"])
    assert again.stderr == "" and again.stdout == first.stdout
    assert "marlin's, " in installed.run("marlin", "info", path=os.environ["PATH"]).stdout
