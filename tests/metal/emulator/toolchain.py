"""Clang as the emulator's compiler: what is missing, the flags, and a cache of what was built, by hash."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).resolve().parent
SHIM, RUNTIME = HERE / "shim", HERE / "runtime"
MLX_HEADERS = Path(mx.__file__).resolve().parent / "include"  # the wheels of Linux have the Metal headers too
OLDEST_CLANG = 17  # the first whose __bf16 computes

LANGUAGE = [
    "-fPIC",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-march=native",
    # As Metal without fast math: no fused products, no wider intermediate results, 1.0 is a float.
    "-ffp-contract=off",
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    *("-Xclang", "-cl-single-precision-constant"),
    "-Wno-everything",
    *("-isystem", str(SHIM), "-isystem", str(RUNTIME), "-iquote", str(SHIM), "-I", str(MLX_HEADERS)),
]


class Flavour(Enum):
    """How a kernel is compiled: to run, to run under the sanitizers, or for its errors alone."""

    PLAIN = ("-std=gnu++17", "-O1")
    SANITIZED = (
        "-std=gnu++17",
        "-O1",
        "-g",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize=vptr,function",
        "-fno-sanitize-recover=all",
    )
    # Metal 3 is C++14; clang takes C++17 with a warning, which is an error here.
    ADDRESS_SPACES = ("-std=gnu++14", "-DEMULATOR_ADDRESS_SPACES", "-Werror=c++17-extensions", "-Werror=narrowing")


class CompileError(Exception):
    """The compiler refused a text; the message is what it said."""


@functools.cache
def compiler() -> str | None:
    """The first clang++ that can do it."""
    for name in filter(None, [os.environ.get("MARLIN_CLANG"), "clang++-19", "clang++"]):
        path = shutil.which(name)
        version = path and re.search(r"clang version (\d+)", _run([path, "--version"]).stdout)
        if version and int(version[1]) >= OLDEST_CLANG:
            return path
    return None


@functools.cache
def missing() -> str | None:
    """Why the emulator cannot run here, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the Metal emulator switches stacks by hand on Linux on x86-64 only"
    path = compiler()
    if path is None:
        return "no clang++-19 (or clang++ from 17 on) to run Metal kernels with: apt-get install clang-19 libclang-rt-19-dev"
    folder = Path(_run([path, "-print-resource-dir"]).stdout.strip()) / "lib"
    if not any(folder.rglob("libclang_rt.asan*.a")):
        return "clang has no AddressSanitizer to run Metal kernels under: apt-get install libclang-rt-19-dev"
    return None


def program(text: str) -> str:
    """The text of a kernel with the prelude's macros taken back, as C++ headers need."""
    return '#line 1 "kernel.metal"\n' + text + "\n#undef std\n#undef double\n"


def executable(text: str, flavour: Flavour) -> Path:
    """Build a kernel (C++ text that defines `emulator::call_kernel`) with the runtime; CompileError if it is refused."""
    header = _prelude(flavour)
    objects = [_object(RUNTIME / name, flavour) for name in ("fibre.cpp", "scheduler.cpp", "main.cpp")]

    def build(source: Path, target: Path) -> None:
        source.write_text(text, encoding="utf-8")
        link = ["-include-pch", str(header), str(source), *map(str, objects), "-o", str(target)]
        _compile([*LANGUAGE, *flavour.value, *link])

    return _cached(f"{flavour.name}-{text}", ".exe", build)


def refuse_errors(text: str, flavour: Flavour) -> None:
    """CompileError if the text has errors; nothing is built."""
    header = _prelude(flavour)

    def build(source: Path, target: Path) -> None:
        source.write_text(text, encoding="utf-8")
        _compile([*LANGUAGE, *flavour.value, "-include-pch", str(header), "-fsyntax-only", str(source)])
        target.touch()

    _cached(f"{flavour.name}-errors-{text}", ".checked", build)


@functools.cache
def _prelude(flavour: Flavour) -> Path:
    """What stands before every kernel, compiled once."""
    text = (SHIM / "prelude.h").read_text(encoding="utf-8")
    if flavour is Flavour.ADDRESS_SPACES:
        # Clang, unlike Apple's compiler, refuses `constant int strides[2]` as a parameter; a pointer is the same.
        name = "mlx/backend/metal/kernels/utils.h"
        utilities = (MLX_HEADERS / name).read_text(encoding="utf-8").replace("#pragma once", "")
        utilities = re.sub(r"constant const int64_t (\w+)\[\d\]", r"constant const int64_t* \1", utilities)
        text = text.replace(f'#include "{name}"', utilities)

    def build(source: Path, target: Path) -> None:
        source = source.with_suffix(".h")
        source.write_text(text.replace("#pragma once", ""), encoding="utf-8")
        header = ["-x", "c++-header", str(source), "-Xclang", "-fno-pch-timestamp", "-o", str(target)]
        # MLX's own header has inline variables, which Apple's compiler takes.
        _compile([*LANGUAGE, *flavour.value, "-Wno-c++17-extensions", *header])

    return _cached(f"{flavour.name}-prelude-{text}", ".pch", build)


@functools.cache
def _object(source: Path, flavour: Flavour) -> Path:
    def build(_: Path, target: Path) -> None:
        _compile(["-std=gnu++17", "-O2", *flavour.value[1:], "-I", str(RUNTIME), "-c", str(source), "-o", str(target)])

    return _cached(f"{flavour.name}-{source.name}", ".o", build)


def _cached(key: str, suffix: str, build) -> Path:
    """What `build(source, target)` makes of a key, made once for each compiler, flags, shim and runtime."""
    digest = hashlib.sha256((_fingerprint() + key).encode()).hexdigest()[:24]
    target = _folder() / (digest + suffix)
    if not target.exists():
        # Built aside and renamed: several processes may want it at once.
        with tempfile.TemporaryDirectory(dir=_folder()) as aside:
            made = Path(aside) / target.name
            source = _folder() / f"{digest}.cpp" if suffix == ".pch" else Path(aside) / "kernel.cpp"
            build(source, made)
            made.replace(target)
    return target


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"marlin-metal-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def _fingerprint() -> str:
    files = sorted(path for folder in (SHIM, RUNTIME) for path in folder.rglob("*") if path.is_file())
    parts = [_run([str(compiler()), "--version"]).stdout, platform.processor(), mx.__version__, str(HERE), *LANGUAGE]
    return "\n".join([*parts, *map(str, Flavour), *(path.read_text(encoding="utf-8") for path in files)])


def _compile(arguments: Sequence[str]) -> None:
    done = _run([str(compiler()), *arguments])
    if done.returncode:
        raise CompileError("\n".join(line for line in done.stderr.splitlines() if "error" in line) or done.stderr)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
