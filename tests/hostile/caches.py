"""MARLIN_CACHE: its value, and what lies there already. Built libraries themselves are never damaged: they are code."""

import os
from pathlib import Path
from random import Random

from .case import Case
from .materials import TEXT
from .mutations import ESCAPES

# A compiler that fails at once, so that no input builds kernels.
COMPILER = "#!/bin/sh\necho compiler 1.0\ncase $1 in --version) exit 0;; esac\nprintf 'error: \\033[31mno\\n' >&2\nexit 1\n"


def cache(rng: Random, folder: Path, materials: Path) -> Case:
    """A run that needs kernels, predictions of a reference or scored passes from a cache that another hand has touched."""
    compiler = folder / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    (folder / "text.txt").write_bytes(TEXT)
    place = folder / "cache"
    place.mkdir(mode=0o700)
    environment = {"MARLIN_CACHE": str(place), "CXX": str(compiler)}
    kind = rng.randrange(9)
    if kind == 0:
        environment["MARLIN_CACHE"] = rng.choice(
            ("", ".", "relative", "/dev/null", "/proc/x", str(folder / "text.txt"), ESCAPES, "x" * 5_000)
        )
    elif kind == 1:
        place.chmod(rng.choice((0o777, 0o770, 0o000, 0o1777, 0o755)))
    elif kind == 2:
        place.rmdir()
        os.symlink(rng.choice(("nowhere", "cache", "/dev/null", ".")), place)
    elif kind == 3:
        for name in ("reference", "quality"):
            (place / name).write_bytes(b"a file")
    elif kind == 4:
        (place / "reference").mkdir()
        (place / "quality").mkdir(mode=0)
        os.symlink("/etc", place / "kernels")
    elif kind == 5:
        environment["CXX"] = rng.choice(("nothing", "/dev/null", "c++ -O2", ESCAPES, str(folder)))
    elif kind == 6:
        name = rng.choice(("MARLIN_THREADS", "MARLIN_KERNELS", "MARLIN_MARCH", "XDG_CACHE_HOME", "HOME", "TMPDIR"))
        environment[name] = rng.choice(("", "0", "-1", "9" * 400, "x", "\u0663", ESCAPES, "/dev/null", "reference"))
    model, other = str(materials / "packed"), str(materials / "prefix")
    argv = rng.choice((
        ["generate", model, "-p", "ab", "--max-bytes", "4"],
        ["bench", "--kernels"],
        ["bench", model, "--no-throughput", "--quality", "text.txt", "--reference", other],
        ["bench", model, "--no-throughput", "--quality", "text.txt", "--resume"],
    ))  # fmt: skip
    return Case(argv, ("relative", "x" * 5_000, ESCAPES), raw=argv[0] == "generate", environment=environment)
