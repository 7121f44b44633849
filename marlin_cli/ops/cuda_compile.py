"""Compiles the text of a CUDA kernel by NVRTC, which MLX's CUDA packages bring, and keeps the outcome in the user's cache."""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from marlin_cli import console
from marlin_cli.errors import BackendError, OutputError
from marlin_cli.ops.cpu_build import cache_folder
from marlin_cli.ops.cuda_driver import compute_capability
from marlin_cli.ops.cuda_text import PRELUDE
from marlin_cli.private_files import NotPrivate, make_private_folder, open_private
from marlin_cli.text import one_line

LIBRARY = "libnvrtc.so.13"  # MLX has loaded it already
MOST_BYTES = 1 << 26  # of a compiled kernel
SUM_BYTES = 32


def compiled(texts: Sequence[str]) -> list[bytes]:
    """Machine code of each text for the first device: kept from an earlier run, or compiled now, all at once.

    Raises:
        BackendError: the compiler is not there, or takes one of them for wrong.
    """
    folder = _folder()
    keys = [_key(text) for text in texts]
    found = [_kept(folder, key) for key in keys]
    missing = [i for i, code in enumerate(found) if code is None]
    if missing:
        _announce()
        with ThreadPoolExecutor(len(missing)) as pool:
            for i, code in zip(missing, pool.map(compile_text, [texts[i] for i in missing]), strict=True):
                found[i] = code
                _keep(folder, keys[i], code)
    return [code for code in found if code is not None]


@functools.lru_cache(maxsize=64)
def machine_code(text: str) -> bytes:
    """Machine code of one text, kept in this process too. Raises as `compiled`."""
    return compiled([text])[0]


@functools.cache
def _announce() -> None:
    console.note("compiling the GPU's kernels for this model, once for this machine (a few seconds)")


def compile_text(text: str, architecture: str | None = None) -> bytes:
    """Machine code of a text, for the first device unless an architecture (sm_90a) is named.

    Raises:
        BackendError: see `compiled`.
    """
    library = _library()
    program = ctypes.c_void_p()
    source = (PRELUDE + text).encode()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source, b"marlin.cu", 0, None, None))
    options = [
        f"--gpu-architecture={architecture or _architecture()}", "--std=c++20", "--device-as-default-execution-space",
        "--disable-warnings", *(f"--include-path={path}" for path in _include_folders()),
    ]  # fmt: skip
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise BackendError(
                f"a GPU kernel does not compile: {one_line(_log_of(program))[:300]}; use MARLIN_KERNELS=reference"
            )
        size = ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _architecture() -> str:
    major, minor = compute_capability()
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _log_of(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(_library().nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value + 1)
    _check(_library().nvrtcGetProgramLog(program, log))
    text = log.value.decode(errors="replace")
    return next((line for line in text.splitlines() if "error" in line), text)


def _check(code: int) -> None:
    if code:
        raise BackendError(f"the CUDA compiler NVRTC fails with code {code}; use MARLIN_KERNELS=reference")


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BackendError(f"the CUDA compiler NVRTC does not load: {one_line(error)}; use MARLIN_KERNELS=reference") from None


def _include_folders() -> list[Path]:
    """Where MLX takes CUDA's own headers from."""
    package = Path(mx.__file__).parent
    toolkit = package.parent / "nvidia" / "cu13" / "include"
    if not toolkit.is_dir():
        toolkit = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda") / "include"
    return [package / "include" / "cccl", toolkit]


def _key(text: str) -> str:
    """All that decides what comes out."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    parts = (PRELUDE, text, _architecture(), f"{major.value}.{minor.value}", version("mlx"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _folder() -> Path | None:
    try:
        return make_private_folder(cache_folder() / "cubin")
    except (NotPrivate, OSError, OutputError) as error:
        _say_not_kept(one_line(error))
        return None


def _kept(folder: Path | None, key: str) -> bytes | None:
    """What was kept, if it is whole: its SHA-256 goes before it."""
    if folder is None:
        return None
    try:
        with open(open_private(folder / key), "rb") as file:
            data = file.read(MOST_BYTES)
    except (NotPrivate, OSError):
        return None
    return data[SUM_BYTES:] if hashlib.sha256(data[SUM_BYTES:]).digest() == data[:SUM_BYTES] else None


def _keep(folder: Path | None, key: str, code: bytes) -> None:
    """Whole or not at all; where that fails it is compiled again in the next run, which is said once."""
    if folder is None:
        return
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=folder)  # of mode 0600
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, folder / key)
    except OSError as error:
        _say_not_kept(one_line(error))
        if name is not None:
            Path(name).unlink(missing_ok=True)


@functools.cache
def _say_not_kept(reason: str) -> None:
    console.note(f"CUDA kernels are compiled anew in each run: {reason}")
