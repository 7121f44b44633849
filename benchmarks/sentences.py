"""Memory and speed of `marlin label` on a stream: text is piped in, and what the process holds is read as it goes (Linux).

    python benchmarks/sentences.py MODEL [--language cs] [--megabytes 50] [--options '--window 256 --stride 256']

Without a model it takes a random LA-CANINE of next to no weights: what grows with the text would show.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "calibration/sample/multilingual"
STEPS = 10


def small_model(folder: str) -> str:
    """The path of a random network that is quick."""
    from marlin_cli import EncodingModel
    from marlin_cli.models.la_canine import LaCanineConfig

    config = LaCanineConfig(d_model=8, layers=1, heads=1, ffn_dim=8, hash_functions=1, hash_buckets=512, max_characters=512)
    EncodingModel.from_config(config, device="cpu").save(f"{folder}/model")
    return f"{folder}/model"


def held(job: "subprocess.Popen[bytes]") -> int:
    """Bytes of memory that a running process has."""
    lines = Path(f"/proc/{job.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--language")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--options", default="--window 256 --stride 256 --threshold 1 --longest 500")
    arguments = parser.parse_args()
    text = b"".join(file.read_bytes() for file in sorted(SAMPLE.glob("*.txt")))
    total = int(arguments.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or small_model(folder)
        language = ["--language", arguments.language] if arguments.language else []
        command = [sys.executable, "-m", "marlin_cli", "label", model, *language, *shlex.split(arguments.options)]
        started, sent, memory = time.perf_counter(), 0, []
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as job:
            assert job.stdin is not None
            while sent < total:
                job.stdin.write(text)
                sent += len(text)
                if sent > len(memory) * total / STEPS:
                    memory.append(held(job))
            memory.append(held(job))
            job.stdin.close()
    characters = len(text.decode("utf-8", errors="ignore")) * sent // len(text)
    seconds = time.perf_counter() - started
    print(json.dumps({"bytes": sent, "characters_per_second": round(characters / seconds), "resident_bytes": memory}))


if __name__ == "__main__":
    main()
