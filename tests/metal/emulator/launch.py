"""Compiling a composed kernel and running it, thread by thread, several times on the same inputs."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import metal_text
import toolchain
from compose import Buffer, Composed
from toolchain import Flavour


class Order(IntEnum):
    """In which order threadgroups, SIMD-groups and lanes take their turns. As in runtime/scheduler.h."""

    FORWARD = 0
    REVERSE = 1
    RANDOM = 2


class Poison(IntEnum):
    """What threadgroup memory holds before it is written. As in runtime/scheduler.h."""

    NAN = 0
    HUGE = 1
    MINUS_HUGE = 2
    RANDOM = 3


class Event(IntFlag):
    """What a run did that no kernel should. As in runtime/scheduler.h."""

    PARTIAL_SIMDGROUP = 1
    LEFT_BEFORE_BARRIER = 2
    UNDEFINED_LANE_READ = 4
    THREADGROUP_MEMORY_OVER = 8


EVENTS = {
    Event.PARTIAL_SIMDGROUP: "a SIMD-group function was called by only some of the lanes",
    Event.LEFT_BEFORE_BARRIER: "threads returned while others waited at a threadgroup barrier",
    Event.UNDEFINED_LANE_READ: "a shuffle read from a lane that does not exist or took no part",
    Event.THREADGROUP_MEMORY_OVER: "more than 32 KiB of threadgroup memory",
}


@dataclass(frozen=True)
class Run:
    """One run of a launch: `fill` is the byte that outputs hold before, or None for what the launch gives them."""

    order: Order
    poison: Poison
    seed: int
    fill: int | None

    def __str__(self) -> str:
        return f"{self.order.name.lower()} order, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What one run did and wrote."""

    events: Event
    written_input: int | None  # index of a buffer that is not an output
    threads: int
    collectives: int
    barriers: int
    threadgroup_bytes: int
    error: str  # empty when the launch ended
    outputs: tuple[bytes, ...]


class Crash(Exception):
    """The run ended the process: a sanitizer's message, or a signal."""


def compile_errors(composed: Composed) -> str | None:
    """What the strict pass says: address spaces mixed up or left out, C++ that Metal has not. None if nothing."""
    text = metal_text.as_cpp_with_address_spaces(composed.text, composed.constants)
    try:
        toolchain.refuse_errors(
            toolchain.program(text) + f"auto kernel_function = &{composed.instance};\n", Flavour.ADDRESS_SPACES
        )
    except toolchain.CompileError as error:
        return str(error)
    return None


def run(composed: Composed, buffers: Sequence[Buffer], runs: Sequence[Run], *, sanitized: bool = False) -> list[Outcome]:
    """Run a launch once for each of `runs`, in one process. CompileError, or Crash."""
    program = toolchain.executable(_program(composed), Flavour.SANITIZED if sanitized else Flavour.PLAIN)
    numbers = [*composed.grid, *composed.threadgroup, len(buffers)]
    for buffer in buffers:
        numbers += [len(buffer.content), buffer.is_output, buffer.offset]
    numbers.append(len(runs))
    for each in runs:
        numbers += [each.order, each.poison, each.seed, -1 if each.fill is None else each.fill]
    done = subprocess.run(
        [program],
        input=" ".join(str(int(number)) for number in numbers).encode() + b"\n" + b"".join(b.content for b in buffers),
        capture_output=True,
        check=False,
        # The fibres' stacks are not the ones that these two know.
        env={**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"},
    )
    if done.returncode:
        raise Crash(_reason(done.returncode, done.stderr.decode(errors="replace")))
    return _outcomes(done.stdout, [len(buffer.content) for buffer in buffers if buffer.is_output], len(runs))


def _program(composed: Composed) -> str:
    """The kernel's text with the function that calls it."""
    known = metal_text.parameters(composed.text, composed.kernel)
    table = ", ".join(f"emulator::{each.attribute}" if each.buffer is None else str(each.buffer) for each in known)
    return (
        toolchain.program(metal_text.as_cpp(composed.text, composed.constants))
        + '#line 1 "call"\n#include "arguments.h"\n'
        + f"static const int parameters[] = {{{table}}};\n"
        + f"void emulator::call_kernel() {{ emulator::call(&{composed.instance}, parameters); }}\n"
    )


def _outcomes(printed: bytes, output_bytes: Sequence[int], runs: int) -> list[Outcome]:
    outcomes = []
    position = 0
    for _ in range(runs):
        end = printed.index(b"\n", position)
        first, written, threads, collectives, barriers, memory, error = printed[position:end].decode().split(" ", 6)
        position = end + 1
        outputs = []
        for size in output_bytes:
            outputs.append(printed[position : position + size])
            position += size
        outcomes.append(
            Outcome(
                events=Event(int(first)),
                written_input=None if int(written) < 0 else int(written),
                threads=int(threads),
                collectives=int(collectives),
                barriers=int(barriers),
                threadgroup_bytes=int(memory),
                error=error,
                outputs=tuple(outputs),
            )
        )
    return outcomes


def _reason(code: int, printed: str) -> str:
    """The sanitizer's sentence and the kernel's line, from what may be pages."""
    lines = printed.splitlines()
    said = [line for line in lines if "ERROR: " in line or "runtime error: " in line or line.startswith("emulator: ")]
    places = [line.split(" in ", 1)[1] for line in lines if line.lstrip().startswith("#") and "kernel.metal" in line]
    return " at ".join([*said[:1], *places[:1]]) or f"ended with {code}: {printed[:500]}"
