"""The wheel in fresh environments of every Python that is promised and found: without a compiler, then with one; and on ARM.

Interpreters are looked for as pythonX.Y on PATH, in pyenv's folder, and in MARLIN_PYTHONS (paths, a colon between them).
MARLIN_ARM_ROOT names a folder with an ARM Debian and its Python, which QEMU runs:

    mmdebstrap --variant=extract --include=python3,libstdc++6,libgomp1 --architectures=arm64 trixie FOLDER

Packages come from the index that pip knows.
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

# As Linux with the C library of MLX's wheels, and as macOS, call themselves.
PLATFORMS = {
    "x86_64": [f"manylinux_2_{glibc}_x86_64" for glibc in (17, 27, 28, 34, 35)],
    "aarch64": [f"manylinux_2_{glibc}_aarch64" for glibc in (17, 27, 28, 34, 35)],
    "macos": [f"macosx_{release}_0_arm64" for release in (11, 12, 13, 14)],
}

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


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--only-binary", ":all:"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def for_platform(name: str, python: str, folder: Path) -> list[str | Path]:
    """What asks pip for the wheels of another machine."""
    platforms = [part for platform in PLATFORMS[name] for part in ("--platform", platform)]
    return ["--target", folder, "--python-version", python, "--implementation", "cp", *platforms]


class Installed:
    """A fresh environment with the wheel and pytest, and beside it the tests without the code."""

    def __init__(self, python: Path, wheel: Path, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv/bin"
        subprocess.run([python, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        pip("--python", self.bin / "python", "install", f"{wheel}[cpu]", "pytest")
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


def answered_here() -> str:
    """What this interpreter answers to `ASK` without kernels of marlin's own."""
    here = {**os.environ, "MARLIN_KERNELS": "reference", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "marlin_cli", *ASK]
    said = subprocess.run(command, env=here, capture_output=True, text=True, check=True).stdout
    assert len(said) > 10
    return said


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
    assert said.stdout == answered_here()
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


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PROMISED)
def test_every_machine_has_wheels_of_all_it_needs(python, platform, wheel, tmp_path):
    """Markers are read as of Linux, so a Mac's backend is named; nothing is downloaded but what tells the dependencies."""
    needed = [wheel, "mlx"] if platform == "macos" else [f"{wheel}[cpu]"]
    pip("install", "--dry-run", *for_platform(platform, python, tmp_path), *needed)


def test_it_runs_on_arm(wheel, tmp_path):
    root, qemu = Path(os.environ.get("MARLIN_ARM_ROOT", NOTHING)), shutil.which("qemu-aarch64")
    if qemu is None or not (root / "usr/bin/python3").exists():
        pytest.skip("no qemu-aarch64, or no ARM Debian in MARLIN_ARM_ROOT")
    python = (root / "usr/bin/python3").readlink().name
    pip("install", *for_platform("aarch64", python.removeprefix("python"), tmp_path / "site"), f"{wheel}[cpu]")
    (tmp_path / "tmp").mkdir()
    environment = {
        "PATH": NOTHING,  # a compiler of this machine's would be taken for ARM's
        "PYTHONPATH": str(tmp_path / "site"),
        "TMPDIR": str(tmp_path / "tmp"),  # where MLX keeps what it compiled for this machine
        "MARLIN_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    # QEMU 7.2's widest vectors make OpenBLAS's products wrong, numpy's too.
    command = [qemu, "-cpu", "cortex-a76", "-L", root, root / "usr/bin" / python, "-m", "marlin_cli", *ASK]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (said.returncode, said.stdout) == (0, answered_here()), said.stderr[-2000:]
