"""Builds the CPU kernels for this machine at first use, and loads them. Knows compilers and caches, not operations."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from marlin_cli import console
from marlin_cli.files import shipped, user_cache
from marlin_cli.text import one_line
from marlin_cli.writing import writing

MODULE = "marlin_cpu"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNB_DOMAIN=mlx", "-DNB_COMPACT_ASSERTIONS")
# How GNU's OpenMP waits, which it reads when it is loaded. A step is many products with little between them, and its two pools
# (MLX's thread has one of its own) are more threads than processors: it would then sleep after each product, and waking costs
# more than a small product. A thread waits awake for a fraction of a millisecond; the user's own settings win.
WAITING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "20000"}
OPENMP = "-fopenmp"  # where the compiler has it; without it the kernels run on one thread


class BuildError(Exception):
    """The kernels cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """What the kernels are built with."""

    compiler: str
    version: str
    march: str  # MARLIN_MARCH, else native
    includes: tuple[Path, ...]
    sources: tuple[Path, ...]
    libraries: tuple[tuple[Path, str], ...]  # folder, name

    def compile(self, source: Path, output: Path, threading: tuple[str, ...]) -> list[str]:
        """The call of the compiler that makes an object of one source."""
        includes = [f"-I{folder}" for folder in self.includes]
        return [self.compiler, *FLAGS, f"-march={self.march}", *threading, *includes, "-c", str(source), "-o", str(output)]

    def link(self, objects: list[Path], output: Path, threading: tuple[str, ...]) -> list[str]:
        """The call of the compiler that makes the module."""
        libraries = [part for folder, name in self.libraries for part in (f"-L{folder}", f"-l{name}", f"-Wl,-rpath,{folder}")]
        return [self.compiler, "-shared", *threading, *map(str, objects), "-o", str(output), *libraries]

    def fingerprint(self) -> str:
        """SHA-256 of all that decides what comes out: sources, compiler, flags, MLX, Python and the processor."""
        digest = hashlib.sha256()
        for fact in (self.version, *FLAGS, self.march, version("mlx"), sysconfig.get_config_var("EXT_SUFFIX"), _processor()):
            digest.update(f"{fact}\n".encode())
        for source in (*self.sources, *sorted(shipped("kernels").glob("*.hpp"))):
            digest.update(source.read_bytes())
        return digest.hexdigest()


def load_kernels() -> ModuleType:
    """The extension module, built now if this machine has none yet.

    Raises:
        BuildError: a compiler or a package is missing, or the build fails.
    """
    toolchain = find_toolchain()
    folder = cache_folder() / toolchain.fingerprint()[:16]
    module = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not module.exists():
                _build(toolchain, module)
    except OSError as error:
        raise BuildError(f"cannot write to the cache {folder}: {error.strerror}") from None
    specification = importlib.util.spec_from_file_location(MODULE, module)
    assert specification is not None and specification.loader is not None
    try:
        with _environment(WAITING):
            kernels = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(kernels)
    except ImportError as error:
        raise BuildError(f"{module} does not load: {one_line(error)}") from None
    return kernels


def find_toolchain() -> Toolchain:
    """The compiler and libraries of this machine.

    Raises:
        BuildError: one of them is missing.
    """
    wanted = os.environ.get("CXX")
    compiler = next((path for name in ([wanted] if wanted else COMPILERS) if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({wanted or ', '.join(COMPILERS)})")
    try:
        import nanobind
        import scipy_openblas32
    except ImportError as error:
        raise BuildError(f"the package {error.name} is missing (pip install 'marlin-cli[cpu]')") from None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} does not run: {one_line(error)}") from None
    mlx = Path(mx.__file__).parent
    binding = Path(nanobind.source_dir())
    return Toolchain(
        compiler=compiler,
        version=f"{compiler} {version} nanobind {nanobind.__version__}",
        march=os.environ.get("MARLIN_MARCH", "native"),
        includes=(
            Path(nanobind.include_dir()),
            binding.parent / "ext" / "robin_map" / "include",
            binding,
            mlx / "include",
            Path(sysconfig.get_path("include")),
        ),
        sources=(binding / "nb_combined.cpp", *sorted(shipped("kernels").glob("*.cpp"))),
        libraries=((mlx / "lib", "mlx"), (Path(scipy_openblas32.get_lib_dir()), scipy_openblas32.get_library())),
    )


def cache_folder() -> Path:
    """Where built kernels are kept: MARLIN_CACHE, else the user's cache folder."""
    return user_cache() if "MARLIN_CACHE" in os.environ else user_cache() / "kernels"


def _build(toolchain: Toolchain, module: Path) -> None:
    """Compile beside the final name, then rename: a killed build leaves nothing that loads.

    A failure is remembered, so that the next run does not pay for it again.
    """
    failure = module.parent / "failure.txt"
    if failure.exists():
        raise BuildError(f"{failure.read_text(encoding='utf-8')} (delete {module.parent} to try again)")
    console.note(f"building the CPU kernels with {toolchain.compiler}, once for this machine (about half a minute)")
    with tempfile.TemporaryDirectory(dir=module.parent) as folder:
        probe, objects = Path(folder) / "probe.cpp", [Path(folder) / f"{source.stem}.o" for source in toolchain.sources]
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", encoding="utf-8")
        found = _run([toolchain.compiler, OPENMP, str(probe), "-o", str(probe.with_suffix(""))]) is None
        threading = (OPENMP,) if found else ()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [toolchain.compile(*each, threading) for each in zip(toolchain.sources, objects, strict=True)]
            problem = next((problem for problem in pool.map(_run, jobs) if problem), None)
        output = Path(folder) / module.name
        problem = problem or _run(toolchain.link(objects, output, threading))
        if problem is None:
            output.replace(module)
            return
    (module.parent / "build.log").write_text(problem, encoding="utf-8")
    first = next((line for line in problem.splitlines() if "error" in line), problem[:200])
    message = f"the build fails: {one_line(first)[:200]} (see {module.parent / 'build.log'})"
    with writing(failure) as temporary:
        temporary.write_text(message, encoding="utf-8")
    raise BuildError(message)


def _run(command: list[str]) -> str | None:
    """What a failing command says, or None."""
    result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode == 0 else result.stderr or f"{command[0]} ends with {result.returncode}"


@contextlib.contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """These variables for a while, unless one of them is set; then none."""
    own = {} if defaults.keys() & os.environ.keys() else defaults
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time: the others wait and find the module built."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
