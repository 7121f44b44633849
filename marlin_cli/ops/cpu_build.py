"""Builds the CPU kernels for this machine at first use, and loads them. Knows its cache, not operations."""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from marlin_cli import console
from marlin_cli.errors import OutputError
from marlin_cli.files import user_cache
from marlin_cli.ops.toolchain import (
    BuildError,
    Toolchain,
    call_all,
    find_compiler,
    find_toolchain,
    is_passing,
    stamp,
    version_of,
)
from marlin_cli.private_files import NotPrivate, locked, make_private_folder, read_private, sha256_of_private
from marlin_cli.text import one_line

__all__ = ["BuildError", "cache_folder", "load_kernels"]

MODULE = "marlin_cpu"
# How GNU's OpenMP waits, which it reads when it is loaded. A step is many products with little between them, and its two pools
# (MLX's thread has one of its own) are more threads than processors: it would then sleep after each product, and waking costs
# more than a small product. A thread waits awake for a fraction of a millisecond; the user's own settings win.
WAITING = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "20000"}
OPENMP = "-fopenmp"  # where the compiler has it; without it the kernels run on one thread


def load_kernels() -> ModuleType:
    """The extension module, built now if this machine has none yet.

    A library is loaded only from a folder that nobody else can write (see `private_files`), and only if its SHA-256 is the
    one that was kept when it was built: one that is cut short or damaged is built again.

    Raises:
        BuildError: a compiler or a package is missing, the build fails, or the cache is not to be trusted.
        UsageError: MARLIN_CACHE is no absolute path.
    """
    compiler = find_compiler()
    root = _cache_root()
    with _cache_errors(root):
        toolchain, module = _place(compiler, root)
        found = _loaded(module)
        if found is None:  # only now: a cache that cannot be written serves too
            with locked(module.with_name("lock")):
                found = _loaded(module) or _built(toolchain, module)
        return found


def are_built() -> bool:
    """Does this machine have the extension already? Builds and loads nothing.

    Raises:
        BuildError, UsageError: as `load_kernels`, but that a build is not tried.
    """
    compiler = find_compiler()
    root = _cache_root()
    with _cache_errors(root):
        _, module = _place(compiler, root)
        return _is_whole(module)


def _cache_root() -> Path:
    try:
        return cache_folder()
    except OutputError as error:
        raise BuildError(str(error)) from None


@contextlib.contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    """What goes wrong with the cache as a `BuildError`."""
    try:
        yield
    except NotPrivate as error:
        raise BuildError(f"the cache is not to be trusted: {error}") from None
    except OutputError as error:
        raise BuildError(str(error)) from None
    except OSError as error:
        raise BuildError(f"cannot write to the cache {root}: {error.strerror or error}") from None


def _place(compiler: str, root: Path) -> tuple[Toolchain, Path]:
    """How the library of this machine is built, and where it lies when it is."""
    make_private_folder(root)
    toolchain = find_toolchain(compiler, _version_once(compiler, root))
    folder = make_private_folder(root / toolchain.fingerprint()[:16])
    return toolchain, folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def cache_folder() -> Path:
    """Where built kernels are kept: MARLIN_CACHE, else the user's cache folder.

    Raises:
        UsageError, OutputError: see `user_cache`.
    """
    return user_cache() if "MARLIN_CACHE" in os.environ else user_cache() / "kernels"


def _loaded(module: Path) -> ModuleType | None:
    """The library at a path, if it is there and the very one that was built, and loads."""
    with contextlib.suppress(ImportError):
        if _is_whole(module):
            return imported(module)
    return None


def _is_whole(module: Path) -> bool:
    """Is the library at a path the very one that was built?"""
    try:
        return read_private(_digest_of(module), 64).decode("ascii", "replace") == sha256_of_private(module)
    except FileNotFoundError:
        return False


def _built(toolchain: Toolchain, module: Path) -> ModuleType:
    """A new library at a path, whose folder is locked.

    One that is there and does not load may be of another machine, or its own libraries have moved: a build mends that too.
    """
    failure = module.with_name("failure.txt")
    _raise_remembered(failure)
    if module.exists():
        console.note(f"{module} is damaged or of another machine, so it is built again")
    _build(toolchain, module, failure)
    try:
        return imported(module)
    except ImportError as error:
        raise _failed(failure, f"{module} does not load: {one_line(error)[:200]}") from None


def imported(module: Path) -> ModuleType:
    """The library at a path as a Python module; `ImportError` where it does not load."""
    specification = importlib.util.spec_from_file_location(MODULE, module)
    assert specification is not None and specification.loader is not None
    with _environment(WAITING):
        kernels = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(kernels)
    return kernels


def _digest_of(module: Path) -> Path:
    return module.with_name(f"{module.name}.sha256")


def _build(toolchain: Toolchain, module: Path, failure: Path) -> None:
    """Compile in a folder beside the final name, then rename: a killed build leaves nothing that loads.

    A failure is remembered, so that the next run does not pay for it again, unless it will pass by itself.
    """
    console.note(f"building the CPU kernels with {toolchain.compiler}, once for this machine (about half a minute)")
    for left in module.parent.glob("build-*"):  # by builds that were killed; the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=module.parent) as name:
        folder = Path(name)
        probe = folder / "probe.cpp"
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", encoding="utf-8")
        found = call_all([[toolchain.compiler, OPENMP, str(probe), "-o", str(probe.with_suffix(""))]]) is None
        threading = (OPENMP,) if found else ()
        objects, output = toolchain.objects(folder, threading), folder / module.name
        problem = call_all(list(objects.values())) or call_all([toolchain.link(list(objects), output, threading)])
        if problem is None and not output.is_file():
            problem = f"error: {toolchain.compiler} writes no library"
        if problem is None:
            _put(_digest_of(module), hashlib.sha256(output.read_bytes()).hexdigest().encode(), folder)
            _put(module, output.read_bytes(), folder)
            return
    first = next((line for line in problem.splitlines() if "error" in line), problem[:200])
    message = f"the build fails: {one_line(first)[:200]}"
    if is_passing(problem):
        raise BuildError(message)
    log = module.parent / "build.log"
    _put(log, problem.encode(errors="replace"), module.parent)
    raise _failed(failure, f"{message} (see {log})")


def _version_once(compiler: str, root: Path) -> str:
    """What the compiler says of itself. One that cannot say it is not asked again before it changes."""
    key = hashlib.sha256(stamp(Path(compiler)).encode(errors="surrogateescape")).hexdigest()[:16]
    failure = root / f"compiler-{key}.txt"
    _raise_remembered(failure)
    try:
        return version_of(compiler)
    except BuildError as error:
        raise (error if is_passing(str(error)) else _failed(failure, str(error))) from None


def _raise_remembered(failure: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        reason = one_line(read_private(failure, 2000).decode(errors="replace"))
        raise BuildError(f"{reason} (delete {failure} to try again)")


def _failed(failure: Path, message: str) -> BuildError:
    """The error, which is remembered where that is possible."""
    with contextlib.suppress(OSError):
        _put(failure, message.encode(errors="replace"), failure.parent)
    return BuildError(message)


def _put(path: Path, data: bytes, scratch: Path) -> None:
    """Write a file that only this user can write, whole or not at all; `scratch` is a folder of the same file system."""
    handle, name = tempfile.mkstemp(dir=scratch)  # of mode 0600, whatever the umask
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


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
