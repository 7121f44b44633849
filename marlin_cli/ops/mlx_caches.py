"""Where MLX keeps what it compiles at run time and loads it from: folders that nobody else can write, or none.

MLX itself takes `mlx/<version>` in the system's folder for temporary files, whoever made that.
"""

import functools
import os
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from marlin_cli import console
from marlin_cli.errors import OutputError
from marlin_cli.ops.cpu_build import cache_folder
from marlin_cli.private_files import NotPrivate, make_private_folder
from marlin_cli.text import one_line

# MLX keeps nothing where it cannot make the folder.
NOWHERE = "/dev/null/none"


@functools.cache
def use_private_caches(device: str) -> None:
    """See to it for a device (cpu, cuda, metal), before MLX compiles anything; one note where there is no such folder.

    Raises:
        UsageError: MARLIN_CACHE is needed and no absolute path.
    """
    if device == "cuda" and "MLX_PTX_CACHE_DIR" not in os.environ:
        os.environ["MLX_PTX_CACHE_DIR"] = _ptx_folder()
    if device == "cpu":
        folder = _temporary_files() / "mlx" / version("mlx") / "cpu"
        try:
            make_private_folder(folder)
        except (NotPrivate, OSError) as error:
            mx.disable_compile()
            console.note(f"MLX's compiled kernels are not used, as it would load them from {folder}: {one_line(error)}")


def _ptx_folder() -> str:
    try:
        return str(make_private_folder(cache_folder() / f"ptx-{version('mlx')}"))
    except (NotPrivate, OSError, OutputError) as error:
        console.note(f"CUDA kernels are compiled anew in each run: {one_line(error)}")
        return NOWHERE


def _temporary_files() -> Path:
    """As C++'s `temp_directory_path` has it."""
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    return Path(next((os.environ[name] for name in names if name in os.environ), "/tmp"))
