"""CPU twins of the operations: the extension built by `cpu_build`, or None where it cannot be had."""

import functools
import os
from types import ModuleType

import mlx.core as mx

from marlin_cli import console
from marlin_cli.errors import UsageError
from marlin_cli.ops.cpu_build import BuildError, load_kernels
from marlin_cli.ops.ways import use_ways


def thread_count() -> int:
    """Threads that kernels use: MARLIN_THREADS, else the processors of this process.

    Raises:
        UsageError: MARLIN_THREADS is not a number above 0.
    """
    wanted = os.environ.get("MARLIN_THREADS")
    if wanted is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UsageError(f"MARLIN_THREADS must be a number above 0, found {wanted!r}")
    return int(wanted)


def rows_are_exact() -> bool:
    """MARLIN_ROWS: `fast` (the default), or `exact`: a row of a result is the same bits whichever rows are beside it.

    Raises:
        UsageError: another value.
    """
    wanted = os.environ.get("MARLIN_ROWS", "fast")
    if wanted not in ("fast", "exact"):
        raise UsageError(f"MARLIN_ROWS must be fast or exact, found {wanted!r}")
    return wanted == "exact"


def wanted_kernels() -> str:
    """MARLIN_KERNELS: `auto` (the default) or `reference`.

    Raises:
        UsageError: another value.
    """
    wanted = os.environ.get("MARLIN_KERNELS", "auto")
    if wanted not in ("auto", "reference"):
        raise UsageError(f"MARLIN_KERNELS must be auto or reference, found {wanted!r}")
    return wanted


@functools.cache
def kernels() -> tuple[ModuleType | None, str]:
    """The extension, and the reason why it is or is not there. Says once on stderr when it cannot be had."""
    if wanted_kernels() == "reference":
        return None, "MARLIN_KERNELS=reference"
    threads, exact = thread_count(), rows_are_exact()
    try:
        module = load_kernels()
        module.set_threads(threads)
        module.set_exact_rows(exact)
        _check(module)
        ways = use_ways(module)
    except BuildError as error:
        console.note(f"CPU kernels are not there, so MLX's slower ones run: {error}")
        return None, str(error)
    return module, f"built for this machine, {threads} threads, {'rows exact' if exact else ways}"


def _check(module: ModuleType) -> None:
    """Arrays must cross: nanobind's version has to be the one that MLX was built with."""
    x, weight = mx.ones((1, 32)), mx.ones((2, 32))
    try:
        right = mx.array_equal(module.linear(x, weight), mx.full((1, 2), 32.0)).item()
    except TypeError:
        raise BuildError("this nanobind does not speak with this MLX; install marlin-cli[cpu] again") from None
    if not right:
        raise BuildError("the built kernels compute wrongly here")
