"""The last rank is killed in the middle of each phase, by `ranks.py killed`: how long the others go on, what is left."""

import argparse
import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from launched import model_of, prompts_of, run, start, text_of

from marlin_cli.files import user_cache

PHASES = ("loading", "prompt", "decoding", "streams", "scoring", "calibrating")
READY = "in the phase"
PATIENCE_SECONDS = 120.0


def killed(given: argparse.Namespace, folder: Path) -> None:
    path = model_of(given, folder)
    for phase in given.phases.split(","):
        if phase in ("scoring", "calibrating"):
            _corpus(phase, path, given, folder)
        elif phase == "streams":
            command = ["-m", "marlin_cli", "generate", path, "--prompts", str(prompts_of(given, folder))]
            command += ["--max-bytes", str(given.bytes), "--device", given.device]
            lines, said = _kill(command, given, folder, lambda processes, lines: len(lines[0]) >= 2)
            whole = sum("bytes_base64" in json.loads(line) for line in lines[0])
            print(f"killed while {phase}: {said}; {whole} of {given.prompts} outputs were written, all whole", flush=True)
        else:
            command = [str(Path(__file__).with_name("ranks.py")), "phase", "--phases", phase, "--folder", path]
            command += ["--device", given.device]
            _, said = _kill(command, given, folder, lambda processes, lines: any(READY in line for line in lines[-1]))
            print(f"killed while {phase}: {said}", flush=True)


def phase(given: argparse.Namespace) -> None:
    """What a rank does: the same phase again and again, until it is ended."""
    from marlin_cli.api import MegaByteModel
    from marlin_cli.engine.sampling import Sampling
    from marlin_cli.engine.stopping import Stopping
    from marlin_cli.ranks import joined

    with joined() as ranks:
        if given.phases == "loading":
            print(READY, flush=True)
            while True:
                MegaByteModel.from_pretrained(given.folder, device=given.device, split=ranks)
        with ranks.computing():
            model = MegaByteModel.from_pretrained(given.folder, device=given.device, split=ranks)
            prompt, most = (bytes(range(256)) * 16, 8) if given.phases == "prompt" else (b"a prompt", 4096)
            begun = False
            while True:
                for _ in model.pieces([prompt], Stopping(most), Sampling()):
                    if not begun:
                        print(READY, flush=True)
                    begun = True


def _corpus(phase: str, path: str, given: argparse.Namespace, folder: Path) -> None:
    """It is killed when some of the work has been saved; the job goes on from there."""
    text, output = text_of(given.corpus_bytes, folder), folder / f"{phase}.{'json' if phase == 'scoring' else 'safetensors'}"
    command = ["-m", "marlin_cli", "bench" if phase == "scoring" else "calibrate", path, "--device", given.device]
    window = str(given.window_bytes)
    if phase == "scoring":
        command += ["--no-throughput", "--quality", f"words={text}", "--window-bytes", window]
        kept = (user_cache() / "quality", "*.journal")
    else:
        command += ["--corpus", f"words={text}", "--seq-bytes", window]
        kept = (folder, f"*{output.stem}.rank-{given.ranks - 1}-of-*")

    begun = time.time()

    def saved() -> int:
        found = [each.stat() for each in kept[0].glob(kept[1]) if each.is_file()]
        return sum(each.st_size for each in found if each.st_mtime > begun)

    _, said = _kill([*command, "-o", str(output)], given, folder, lambda processes, lines: saved() > 0)
    size = saved()
    begun = time.perf_counter()
    run([*command, "-o", str(output), "--resume"], given.ranks, given, folder)
    resumed, output_of_resumed = time.perf_counter() - begun, output.read_bytes()
    output.unlink()
    begun = time.perf_counter()
    run([*command, "-o", str(output)], given.ranks, given, folder)
    whole = time.perf_counter() - begun
    same = output.read_bytes() == output_of_resumed
    if phase == "scoring":
        same = _quality(output.read_bytes()) == _quality(output_of_resumed)
    print(f"killed while {phase}: {said}; {size:,} bytes were kept", end="; ")
    print(f"--resume took {resumed:.1f} s, a whole run {whole:.1f} s", end=": ")
    print("same result" if same else "OTHER RESULT", flush=True)


def _quality(document: bytes) -> object:
    return json.loads(document)["models"][0]["quality"]


def _kill(
    command: list[str],
    given: argparse.Namespace,
    folder: Path,
    ready: Callable[[list["subprocess.Popen[str]"], list[list[str]]], bool],
) -> tuple[list[list[str]], str]:
    """Kill the last rank when it is time: the lines that each wrote, and what the others did then."""
    with _started(command, given, folder) as (processes, lines, errors):
        begun = time.perf_counter()
        while not ready(processes, lines):
            time.sleep(0.02)
            ended = [process.poll() for process in processes]
            if time.perf_counter() - begun > PATIENCE_SECONDS or any(code is not None for code in ended):
                return lines, f"NOT REACHED (exit codes {ended}; {' '.join(line.strip() for line in errors[0][-3:])})"
        time.sleep(given.seconds)
        processes[-1].send_signal(signal.SIGKILL)
        begun = time.perf_counter()
        for process in processes[:-1]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        taken = time.perf_counter() - begun
        codes = [process.returncode for process in processes[:-1]]
    last = errors[0][-1].strip() if errors[0] else "nothing"
    return lines, f"the others ended {taken:.2f} s later with {codes}: {last}"


@contextlib.contextmanager
def _started(
    command: list[str], given: argparse.Namespace, folder: Path
) -> Iterator[tuple[list["subprocess.Popen[str]"], list[list[str]], list[list[str]]]]:
    """Ranks, and the lines of stdout and stderr of each, which grow. None is left when the block is."""
    processes = start(command, given.ranks, given, folder, stderr=subprocess.PIPE)
    lines: list[list[str]] = [[] for _ in processes]
    errors: list[list[str]] = [[] for _ in processes]

    def read(file: IO[str], to: list[str]) -> None:
        for line in file:
            to.append(line)

    threads = []
    for process, out, error in zip(processes, lines, errors, strict=True):
        for file, to in ((process.stdout, out), (process.stderr, error)):
            assert file is not None
            threads.append(threading.Thread(target=read, args=(file, to), daemon=True))
            threads[-1].start()
    try:
        yield processes, lines, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join(5)
