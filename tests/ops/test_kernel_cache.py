"""The cache of built kernels: what nobody else can have written and nothing has damaged is loaded, anything else is not.

A script stands for the compiler, and what it writes is no library: `imported` is replaced by what reads it.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from marlin_cli import private_files
from marlin_cli.errors import OutputError, UsageError
from marlin_cli.files import shipped, user_cache
from marlin_cli.ops import cpu, cpu_build, toolchain
from marlin_cli.ops.cpu_build import BuildError, load_kernels

pytest.importorskip("nanobind")
pytest.importorskip("scipy_openblas32")

# Counts links, and does what it is told to.
COMPILER = """#!/bin/sh
folder=$(dirname "$0")
. "$folder/what"
if [ "$1" = --version ]; then version; exit; fi
while [ $# -gt 0 ]; do
  case "$1" in
    -shared) linking=yes;;
    -o) out=$2;;
    -include) echo x >> "$folder/shared";;
  esac
  shift
done
if [ -n "$linking" ]; then echo x >> "$folder/links"; link "$out"; exit; fi
echo x >> "$folder/compiles"
compile "$out"
"""
PLAIN = {"version": "echo 1", "compile": "echo object > $1", "link": "echo whole > $1"}


class Compiler:
    """The script, and how often it was asked for a library."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.path = folder / "c++"
        self.path.write_text(COMPILER)
        self.path.chmod(0o755)
        self.does()

    def does(self, **parts: str) -> None:
        text = "".join(f"{name}() {{ {body}\n}}\n" for name, body in {**PLAIN, **parts}.items())
        (self._folder / "what").write_text(text)

    @property
    def links(self) -> int:
        file = self._folder / "links"
        return len(file.read_text().split()) if file.exists() else 0

    @property
    def compiles(self) -> int:
        file = self._folder / "compiles"
        return len(file.read_text().split()) if file.exists() else 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("MARLIN_CACHE", str(path))
    return path


@pytest.fixture
def compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler(tmp_path / "bin")
    monkeypatch.setenv("CXX", str(found.path))

    def imported(module: Path) -> str:
        text = module.read_text()
        if text != "whole\n":
            raise ImportError(f"wrong ELF class: {text}")
        return text

    monkeypatch.setattr(cpu_build, "imported", imported)
    return found


def library(cache: Path) -> Path:
    [found] = [path for path in cache.glob("*/marlin_cpu*") if path.suffix != ".sha256"]
    return found


def test_it_is_built_once_for_this_user_alone(compiler: Compiler, cache: Path) -> None:
    before = os.umask(0)
    try:
        load_kernels()
    finally:
        os.umask(before)
    assert compiler.links == 1
    folders = [cache, *(path for path in cache.iterdir() if path.is_dir())]
    assert [path.stat().st_mode & 0o777 for path in folders] == [0o700, 0o700]
    assert {path.stat().st_mode & 0o777 for path in folders[1].iterdir()} == {0o600}
    load_kernels()
    assert compiler.links == 1


def test_sources_that_include_mlx_s_headers_are_compiled_as_one(compiler: Compiler, tmp_path: Path) -> None:
    load_kernels()
    kernels = sorted(shipped("kernels").glob("*.cpp"))
    sharing = [source.name for source in kernels if toolchain.reaches_mlx(source)]
    assert len((tmp_path / "bin" / "shared").read_text().split()) == len(sharing) - 1
    assert compiler.compiles == len(kernels) - len(sharing) + 3  # what looks for OpenMP, the binding, those that are one
    assert {"marlin_gemm.cpp", "activations.cpp"} <= set(sharing) and "marlin_gemm_fixed.cpp" not in sharing


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a cache that its group can write": (lambda cache: cache.chmod(0o770), "cache can be written by group"),
    "a cache that everybody can write": (lambda cache: cache.chmod(0o707), "cache can be written by everybody"),
    "a folder that others can write": (lambda cache: library(cache).parent.chmod(0o777), "can be written by everybody"),
    "a folder above that others can write": (lambda cache: cache.parent.chmod(0o777), "can be written by everybody"),
    "a library that others can write": (lambda cache: library(cache).chmod(0o666), "can be written by everybody"),
    "a link to the library": (
        lambda cache: library(cache).rename(cache / "moved") and library_link(cache, cache / "moved"),
        "is a link",
    ),
    "a digest that is a pipe": (lambda cache: piped(next(cache.glob("*/*.sha256"))), "is no regular file"),
}


def library_link(cache: Path, target: Path) -> None:
    digest = next(cache.glob("*/*.sha256"))
    digest.with_name(digest.name.removesuffix(".sha256")).symlink_to(target)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("hazard", OTHERS)
def test_what_others_could_have_written_is_not_loaded(
    hazard: str, compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernels()
    change, message = OTHERS[hazard]
    change(cache)
    monkeypatch.setattr(cpu_build, "imported", lambda module: pytest.fail("loaded"))
    monkeypatch.setattr(private_files, "_is_own_group", lambda number: False)
    try:
        with pytest.raises(BuildError, match=f"not to be trusted: /.*{message}") as caught:
            load_kernels()
    finally:
        cache.parent.chmod(0o700)
    assert "\n" not in str(caught.value)
    assert compiler.links == 1


@pytest.mark.parametrize("which", ["cache", "library"])
def test_what_another_user_owns_is_not_loaded(
    which: str, compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernels()
    if os.geteuid() == 0:
        os.chown(cache if which == "cache" else library(cache), 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BuildError, match=r"not to be trusted: /.* belongs to user \d+"):
        load_kernels()


def test_a_lock_that_is_a_link_is_not_followed(compiler: Compiler, cache: Path, tmp_path: Path) -> None:
    load_kernels()
    library(cache).unlink()
    lock, precious = library_folder(cache) / "lock", tmp_path / "precious"
    lock.unlink()
    lock.symlink_to(precious)
    with pytest.raises(BuildError, match=r"lock is a link; remove it"):
        load_kernels()
    assert not precious.exists()


def library_folder(cache: Path) -> Path:
    return next(cache.glob("*/lock")).parent


def test_a_shared_folder_above_with_a_sticky_bit_is_no_hazard(compiler: Compiler, cache: Path) -> None:
    cache.parent.chmod(0o1777)
    try:
        load_kernels()
    finally:
        cache.parent.chmod(0o700)


@pytest.mark.parametrize("damage", [b"", b"who", b"HOLE\n", b"whole\nand more"], ids=["empty", "cut", "flipped", "longer"])
def test_a_damaged_library_is_never_loaded_but_built_again(
    damage: bytes, compiler: Compiler, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernels()
    library(cache).write_bytes(damage)
    load_kernels()
    assert compiler.links == 2
    assert library(cache).read_text() == "whole\n"
    assert "is damaged or of another machine, so it is built again" in capsys.readouterr().err.replace("\n", " ")


def test_a_library_without_its_digest_is_built_again(compiler: Compiler, cache: Path) -> None:
    load_kernels()
    next(cache.glob("*/*.sha256")).unlink()
    load_kernels()
    assert compiler.links == 2


def test_a_library_of_another_machine_is_built_again(compiler: Compiler, cache: Path) -> None:
    """Whole, and with the right digest: copied with its folder."""
    compiler.does(link="echo foreign > $1")
    with pytest.raises(BuildError, match="does not load: wrong ELF class: foreign"):
        load_kernels()
    with pytest.raises(BuildError, match=r"does not load.*\(delete .*failure.txt to try again\)"):
        load_kernels()
    assert compiler.links == 1  # what a build does not mend is not built again
    next(cache.glob("*/failure.txt")).unlink()
    compiler.does()
    assert load_kernels() is not None
    assert compiler.links == 2


def test_a_killed_build_leaves_nothing_that_counts(compiler: Compiler, cache: Path) -> None:
    """The compiler kills marlin while it links, half way."""
    compiler.does(link="echo who > $1; kill -9 $PPID")
    code = "from marlin_cli.ops.cpu_build import load_kernels; load_kernels()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -9
    [left] = cache.glob("*/build-*")
    assert list(cache.glob("*/marlin_cpu*")) == []
    compiler.does()
    load_kernels()
    assert compiler.links == 2
    assert not left.exists()


def test_two_at_once_build_one(compiler: Compiler, cache: Path) -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(load_kernels())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, compiler.links) == (["whole\n"] * 2, 1)


def test_a_failure_is_remembered_until_something_changes(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.does(compile='echo "error: no \033[31mluck" >&2; exit 1')
    with pytest.raises(BuildError, match=r"the build fails: error: no \\x1b\[31mluck \(see .*build.log\)"):
        load_kernels()
    made = compiler.compiles
    with pytest.raises(BuildError, match=r"no \\x1b\[31mluck .*\(delete .*failure.txt to try again\)"):
        load_kernels()
    assert (compiler.compiles, compiler.links) == (made, 0)
    os.utime(compiler.path, (1, 1))  # another compiler under the same name and of the same version
    with pytest.raises(BuildError, match="luck"):
        load_kernels()
    assert compiler.compiles > made
    monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-g"))
    compiler.does()
    assert load_kernels() is not None


@pytest.mark.parametrize("problem", ["No space left on device", "g++: fatal error: Killed signal terminated program cc1plus"])
def test_a_failure_that_passes_is_not_remembered(problem: str, compiler: Compiler) -> None:
    compiler.does(compile=f'echo "error: {problem}" >&2; exit 1')
    with pytest.raises(BuildError, match="the build fails"):
        load_kernels()
    compiler.does()
    assert load_kernels() is not None


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "CALL_SECONDS", 0.2)
    compiler.does(compile=f"sleep 1000 & echo $! >> {tmp_path}/pids; wait")
    with pytest.raises(BuildError, match=r"the build fails: /.* does not end within 0.2 s"):
        load_kernels()
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    with pytest.raises(BuildError, match="to try again"):
        load_kernels()


def test_a_compiler_that_hangs_when_asked_for_its_version(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "VERSION_SECONDS", 0.1)
    compiler.does(version="exec sleep 1000")
    with pytest.raises(BuildError, match=r"does not run: .* does not end within 0.1 s$"):
        load_kernels()
    compiler.does(version="exit 3")
    with pytest.raises(BuildError, match=r"does not end within 0.1 s \(delete .* to try again\)"):
        load_kernels()  # not asked again
    compiler.does()
    os.utime(compiler.path, (1, 1))
    assert load_kernels() is not None


def test_a_compiler_that_writes_nothing(compiler: Compiler) -> None:
    compiler.does(link=":")
    with pytest.raises(BuildError, match="writes no library"):
        load_kernels()


@pytest.mark.parametrize("named", ["", "cache", "./cache", "~/cache", "\033[31m"])
def test_a_cache_that_is_no_absolute_path_is_refused(named: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_CACHE", named)
    with pytest.raises(UsageError, match="MARLIN_CACHE must be an absolute path") as caught:
        load_kernels()
    assert repr(named) in str(caught.value)
    assert compiler.compiles == 0


@pytest.mark.parametrize("home", ["", "relative", "/"])
def test_without_a_home_there_is_no_cache(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARLIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as its specification has it
    monkeypatch.setenv("HOME", home)
    with pytest.raises(OutputError, match="no place for a cache: HOME names no folder"):
        user_cache()
    with pytest.raises(BuildError, match="no place for a cache"):
        load_kernels()


def test_a_home_that_is_not_there_or_cannot_be_written(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MARLIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="cannot write to the cache /.*: Not a directory"):
        load_kernels()


def test_a_full_disk(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BuildError, match="cannot write to the cache /.*: No space left on device"):
            load_kernels()
    assert load_kernels() is not None  # nothing was remembered


def test_a_cache_that_is_there_and_cannot_be_written_serves(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernels()
    monkeypatch.setattr(cpu_build, "locked", lambda path: pytest.fail("locked"))
    assert load_kernels() is not None


def test_the_reason_is_shown_and_the_reference_runs(
    compiler: Compiler, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    module, reason = cpu.kernels.__wrapped__()
    assert module is None
    assert "not to be trusted" in reason
    assert capsys.readouterr().err.startswith("CPU kernels are not there, so MLX's slower ones run: the cache is not to")


def test_a_cache_that_is_a_link_to_itself_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        private_files.make_private_folder(tmp_path / "loop")
