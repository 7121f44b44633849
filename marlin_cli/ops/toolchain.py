"""The compiler and libraries that the CPU kernels are built with: found, called, and told apart. Builds nothing itself."""

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

import mlx.core as mx

from marlin_cli.files import shipped
from marlin_cli.text import one_line, quoted

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNB_DOMAIN=mlx", "-DNB_COMPACT_ASSERTIONS")
QUICKER = "-O1"  # for nanobind's own source, which is no loop: two seconds less
INCLUDED = re.compile(r'^#include "([^"]+)"', re.MULTILINE)

# The slowest source takes half a minute on a fast machine; a compiler that waits for a licence or a network takes for ever.
VERSION_SECONDS = 10.0
CALL_SECONDS = 900.0

# What compilers and systems say (in the C locale) of a lack that is none of the compiler: of room, memory, processes.
PASSING = ("No space left", "quota exceeded", "annot allocate memory", "temporarily unavailable", "Killed", "ends with -")


class BuildError(Exception):
    """The kernels cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Toolchain:
    """What the kernels are built with."""

    compiler: str
    version: str
    march: str  # MARLIN_MARCH, else native; more flags may follow, as in "x86-64-v3 -mavxvnni"
    includes: tuple[Path, ...]
    binding: Path  # nanobind's source
    sources: tuple[Path, ...]
    libraries: tuple[tuple[Path, str], ...]  # folder, name

    def objects(self, folder: Path, threading: tuple[str, ...]) -> dict[Path, list[str]]:
        """Objects in a folder, and the call of the compiler that makes each: the longest first, so that none is left at last.

        MLX's headers take a compiler longer than most sources that include them: those are one text, and what they share is
        read and made once.
        """
        together = [source for source in self.sources if reaches_mlx(source)]
        alone = sorted(set(self.sources) - set(together), key=lambda source: (-source.stat().st_size, source))
        of_binding = self._compile([self.binding], folder / f"{self.binding.stem}.o", (*threading, QUICKER))
        calls = [self._compile(together, folder / "together.o", threading), of_binding]
        calls += [self._compile([source], folder / f"{source.stem}.o", threading) for source in alone]
        return {Path(call[-1]): call for call in calls}

    def _compile(self, sources: list[Path], output: Path, flags: tuple[str, ...]) -> list[str]:
        """The call that makes an object of sources, one after another as one text."""
        call = [self.compiler, *FLAGS, *f"-march={self.march}".split(), *flags, *(f"-I{folder}" for folder in self.includes)]
        before = [part for source in sources[:-1] for part in ("-include", str(source))]
        return [*call, *before, "-c", str(sources[-1]), "-o", str(output)]

    def link(self, objects: list[Path], output: Path, threading: tuple[str, ...]) -> list[str]:
        """The call of the compiler that makes the module."""
        libraries = [part for folder, name in self.libraries for part in (f"-L{folder}", f"-l{name}", f"-Wl,-rpath,{folder}")]
        return [self.compiler, "-shared", *threading, *map(str, objects), "-o", str(output), *libraries]

    def fingerprint(self) -> str:
        """SHA-256 of all that decides what comes out, and whether it does: whoever mends one of them tries again.

        That is sources, compiler, flags, MLX, Python, the processor, and where headers and libraries lie.
        """
        digest = hashlib.sha256()
        facts = [self.version, stamp(Path(self.compiler)), *FLAGS, QUICKER, self.march, version("mlx"), _processor()]
        facts += [platform.machine(), str(sysconfig.get_config_var("EXT_SUFFIX"))]
        facts += [stamp(folder) for folder in self.includes]
        facts += [f"{stamp(folder)} {name}" for folder, name in self.libraries]
        for fact in facts:
            digest.update(f"{fact}\n".encode(errors="surrogateescape"))
        for source in (self.binding, *self.sources, *sorted(shipped("kernels").glob("*.hpp"))):
            digest.update(source.read_bytes())
        return digest.hexdigest()


def find_compiler() -> str:
    """The path of the compiler: CXX, else the first of `COMPILERS` that is there.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX")
    compiler = next((path for name in ([wanted] if wanted else COMPILERS) if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({one_line(wanted) if wanted else ', '.join(COMPILERS)})")
    return compiler


def version_of(compiler: str) -> str:
    """What a compiler says of itself.

    Raises:
        BuildError: it does not run.
    """
    said, problem = call([compiler, "--version"], VERSION_SECONDS, set())
    if problem is not None:
        raise BuildError(f"{compiler} does not run: {one_line(problem)[:200]}")
    return said


def find_toolchain(compiler: str, said: str) -> Toolchain:
    """A compiler, which said `said` of itself, and the libraries of this machine.

    Raises:
        BuildError: a package is missing.
    """
    try:
        import nanobind
        import scipy_openblas32
    except ImportError as error:
        raise BuildError(f"the package {error.name} is missing (pip install 'marlin-cli[cpu]')") from None
    mlx = Path(mx.__file__).parent
    binding = Path(nanobind.source_dir())
    return Toolchain(
        compiler=compiler,
        version=f"{compiler} {said} nanobind {nanobind.__version__}",
        march=os.environ.get("MARLIN_MARCH", "native"),
        includes=(
            Path(nanobind.include_dir()),
            binding.parent / "ext" / "robin_map" / "include",
            binding,
            mlx / "include",
            Path(sysconfig.get_path("include")),
        ),
        binding=binding / "nb_combined.cpp",
        sources=tuple(sorted(shipped("kernels").glob("*.cpp"))),
        libraries=((mlx / "lib", "mlx"), (Path(scipy_openblas32.get_lib_dir()), scipy_openblas32.get_library())),
    )


def reaches_mlx(source: Path) -> bool:
    """Does a source include MLX's headers, or one beside it that does?"""
    names = INCLUDED.findall(source.read_text(encoding="utf-8"))
    beside = (source.with_name(name) for name in names)
    return any(name.startswith("mlx/") for name in names) or any(path.exists() and reaches_mlx(path) for path in beside)


def stamp(path: Path) -> str:
    """A path, where it leads, when that was changed and how large it is: other text after an installation or an update."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{path} {error.strerror}"
    return f"{path} {path.resolve()} {status.st_mtime_ns} {status.st_size}"


def call_all(commands: list[list[str]]) -> str | None:
    """Run compilers side by side; what the first that fails says, or None. An interrupt ends them all."""
    running: set[subprocess.Popen[bytes]] = set()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(lambda command: call(command, CALL_SECONDS, running)[1], commands)
        return next((problem for problem in results if problem is not None), None)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            _end(process)
        pool.shutdown()


def call(command: list[str], limit_seconds: float, running: "set[subprocess.Popen[bytes]]") -> tuple[str, str | None]:
    """What a command writes to stdout, and, if it fails or takes too long, what it says of that.

    Args:
        running: holds the process as long as it runs.
    """
    # A file takes any number of messages; a pipe would have to be read until all that hold it are gone.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                env={**os.environ, "LC_ALL": "C"},  # messages that `is_passing` knows
                start_new_session=True,  # a compiler is several processes, which end together
            )  # fmt: skip
        except (OSError, ValueError) as error:
            return "", one_line(error)
        running.add(process)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return "", f"{command[0]} does not end within {limit_seconds:g} s"
        finally:
            _end(process)
            running.discard(process)
        said, complaint = (_beginning(file) for file in (out, errors))
        return said, None if code == 0 else complaint or f"{quoted(command[0])} ends with {code}"


def is_passing(problem: str) -> bool:
    """Does a failure say nothing of the compiler: no room, no memory, killed?"""
    return any(sign in problem for sign in PASSING)


def _beginning(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(1 << 20).decode(errors="replace")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            process.kill()
        process.wait()


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
