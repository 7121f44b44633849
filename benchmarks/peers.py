"""The other benchmarks beside other packages, each with small settings, gathered in one Markdown table.

    python benchmarks/peers.py [--only products,megabyte_roofline] [--seconds 400]

Each script runs in a process of its own, one after another, and compares outputs itself. A script that fails, or that takes
longer than --seconds, is a row that says so, and the exit status is then 1. Needs the extra `peers`: `make peers-bench`.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

# What each script is run with, and beside what it measures.
SCRIPTS = {
    "products": ("mx.quantized_matmul, torch", ["--sizes", "1024", "--repeats", "5"]),
    "megabyte_generation": ("MEGABYTE-pytorch", ["--lengths", "512", "--bytes", "24", "--rounds", "3"]),
    "megabyte_roofline": ("torch with both caches", ["--bytes", "64", "--rounds", "3"]),
    "key_value_cache": ("a 16-bit cache", ["--context", "8k"]),
    "byt5_generation": ("transformers, CTranslate2", []),
}


def run(name: str, options: list[str], seconds: float) -> tuple[bool, list[str]]:
    """Did the script end well, and the lines it printed; or the last line of its error."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, [f"took more than {seconds:.0f} s"]
    if done.returncode:
        return False, [f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    return True, done.stdout.strip().splitlines()


def processor() -> str:
    """The processor's name where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(name for name in SCRIPTS if (FOLDER / f"{name}.py").exists()))
    parser.add_argument("--seconds", type=float, default=400)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in SCRIPTS]:
        parser.error(f"unknown script {unknown[0]}; known: {', '.join(SCRIPTS)}")
    print(f"{datetime.date.today()}, {processor()}, {os.cpu_count()} logical CPUs, {platform.system()}\n")
    print("| script | beside | result |\n| --- | --- | --- |")
    whole = True
    for name in names:
        beside, options = SCRIPTS[name]
        good, lines = run(name, options, arguments.seconds)
        whole = whole and good
        for line in lines:
            print(f"| `{name}.py` | {beside} | {line.replace('|', chr(92) + '|')} |", flush=True)
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
