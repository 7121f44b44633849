"""Every check of one launch of a Metal kernel, and the report of what they found.

    kernel = mx.fast.metal_kernel(name=..., input_names=..., output_names=..., source=...)
    composed = capture(kernel, x, w, grid=..., threadgroup=..., template=..., output_shapes=..., output_dtypes=...)
    check(composed, [x, w], expected, tolerance=1e-6).require()

`expected` is one array an output (or None: not compared), from a float32 reference; `tolerance` the largest difference as a
share of the largest expected number. A report that found nothing is true; `require` raises AssertionError with all it found.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import mlx.core as mx
import numpy as np
from compose import Composed, buffers_of, from_bytes
from launch import EVENTS, Crash, Order, Outcome, Poison, Run, compile_errors, run
from toolchain import CompileError


class Check(Enum):
    """What is checked; the value is how reports name it."""

    ADDRESS_SPACES = "address spaces"  # compiled with device, constant and threadgroup as distinct spaces, as C++14
    COMPILES = "compiles"
    CONVERGENCE = "convergence"  # barriers and SIMD-group functions are met by all threads
    EVENTS = "events"  # shuffles from nowhere, too much threadgroup memory, the end of the process
    INPUTS = "inputs"  # stay as they were
    WRITTEN = "written"  # every element of the outputs
    ORDER = "order"  # no result depends on the order of threads, or on threadgroup memory that nobody wrote
    RESULT = "result"
    SANITIZERS = "sanitizers"  # AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exact size


ALL = frozenset(Check)
SOUND: list[tuple[str, str, int]] = []  # launches of this process that passed: kernel, digest of its text, checks
UNSANITIZED = ALL - {Check.SANITIZERS}

# Pairs of runs that differ in the fill tell unwritten elements, in the order races, in the poison uninitialised memory. A NaN
# is swallowed by max() and a huge number by min(), so there are several poisons.
RUNS = (
    Run(Order.FORWARD, Poison.NAN, 0, 0xAA),
    Run(Order.REVERSE, Poison.HUGE, 1, 0x55),
    Run(Order.FORWARD, Poison.MINUS_HUGE, 2, 0xAA),
    Run(Order.RANDOM, Poison.RANDOM, 7, 0x55),
    Run(Order.RANDOM, Poison.RANDOM, 8, 0xAA),
)
SANITIZED_RUNS = (RUNS[0], RUNS[3])


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    check: Check
    message: str

    def __str__(self) -> str:
        return f"{self.check.value}: {self.message}"


@dataclass
class Report:
    """What the checks of one launch found."""

    kernel: str
    checked: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    outputs: list[mx.array] = field(default_factory=list)  # of the first run, if it ended
    threads: int = 0  # run in all
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        found = "".join(f"\n  {finding}" for finding in self.findings) or " nothing wrong"
        return f"{self.kernel}, {len(self.checked)} checks:{found}"

    def require(self) -> "Report":
        """AssertionError with all that was found, if anything was."""
        if self.findings:
            raise AssertionError(str(self))
        return self

    def found(self, check: Check) -> list[str]:
        """The messages of one check."""
        return [finding.message for finding in self.findings if finding.check is check]

    def add(self, check: Check, messages: Sequence[str]) -> None:
        """Note that a check was made, and what it found."""
        self.checked.append(check)
        self.findings += [Finding(check, message) for message in dict.fromkeys(messages)]


def check(
    composed: Composed,
    inputs: Sequence[Any],
    expected: Sequence[mx.array | None] | mx.array | None = None,
    tolerance: float = 0.0,
    checks: frozenset[Check] = ALL,
    name: str | None = None,
) -> Report:
    """Run every check of `checks` on one launch. Later ones are left out where an earlier one makes them meaningless.

    `name`, where given, counts a launch that passes in `SOUND`.
    """
    started = time.perf_counter()
    report = Report(composed.kernel)
    _check(report, composed, inputs, _as_list(expected), tolerance, checks)
    report.seconds = time.perf_counter() - started
    report.checked = [each for each in report.checked if each in checks]
    report.findings = [each for each in report.findings if each.check in checks]
    if report and name:
        text = hashlib.sha256(composed.text.encode()).hexdigest()[:16]
        SOUND.append((name, f"{composed.instance} {text}", len(report.checked)))
    return report


def _check(
    report: Report,
    composed: Composed,
    inputs: Sequence[Any],
    expected: Sequence[mx.array | None],
    tolerance: float,
    checks: frozenset[Check],
) -> None:
    if Check.ADDRESS_SPACES in checks:
        errors = compile_errors(composed)
        report.add(Check.ADDRESS_SPACES, [errors] if errors else [])
    buffers = buffers_of(composed, inputs)
    runs = [_started_from(composed, each) for each in RUNS]
    try:
        outcomes = run(composed, buffers, runs)
    except (CompileError, Crash) as error:
        report.add(Check.COMPILES if isinstance(error, CompileError) else Check.EVENTS, [str(error)])
        if isinstance(error, CompileError):
            return
        outcomes = []
    report.threads = sum(outcome.threads for outcome in outcomes)
    if outcomes:
        report.add(Check.COMPILES, [])
        report.add(Check.CONVERGENCE, [outcome.error for outcome in outcomes if outcome.error])
        report.add(Check.EVENTS, [text for event, text in EVENTS.items() if any(event & o.events for o in outcomes)])
        report.add(Check.INPUTS, [_written(composed, o.written_input) for o in outcomes if o.written_input is not None])
        if report.found(Check.CONVERGENCE):
            return
        _compare_runs(report, composed, runs, outcomes)
        report.outputs = _arrays(composed, outcomes[0])
        report.add(Check.RESULT, _differences(report.outputs, expected, tolerance))
    if Check.SANITIZERS in checks:
        try:
            run(composed, buffers, [_started_from(composed, each) for each in SANITIZED_RUNS], sanitized=True)
        except Crash as error:
            report.add(Check.SANITIZERS, [str(error)])
        else:
            report.add(Check.SANITIZERS, [])


def _started_from(composed: Composed, each: Run) -> Run:
    return each if composed.init_value is None else Run(each.order, each.poison, each.seed, None)


def _written(composed: Composed, buffer: int) -> str:
    return f"buffer {buffer} ({composed.slots[buffer].role.name.lower()} {composed.slots[buffer].index}) was written to"


def _compare_runs(report: Report, composed: Composed, runs: Sequence[Run], outcomes: Sequence[Outcome]) -> None:
    """Runs must agree to the last bit; elements that still hold the fill in two runs of different fills were never written."""
    unwritten: list[str] = []
    dependent: list[str] = []
    for index, dtype in enumerate(composed.output_dtypes):
        results = [np.frombuffer(o.outputs[index], np.uint8).reshape(-1, dtype.size) for o in outcomes]
        never = np.zeros(len(results[0]), bool)
        if composed.init_value is None:
            never = (results[0] == runs[0].fill).all(1) & (results[1] == runs[1].fill).all(1)
        if never.any():
            unwritten.append(f"output {index}: {_count(never)} were never written")
        for each, result in zip(runs[1:], results[1:], strict=True):
            different = (result != results[0]).any(1) & ~never
            if different.any():
                message = f"output {index}: {_count(different)} are order-dependent or from unwritten threadgroup memory"
                dependent.append(f"{message} ({runs[0]}, against {each})")
    report.add(Check.WRITTEN, unwritten)
    report.add(Check.ORDER, dependent)


def _count(elements: np.ndarray[Any, Any]) -> str:
    return f"{int(elements.sum())} of {elements.size} elements (first {int(np.argmax(elements))})"


def _arrays(composed: Composed, outcome: Outcome) -> list[mx.array]:
    launches = zip(outcome.outputs, composed.output_shapes, composed.output_dtypes, strict=True)
    return [from_bytes(content, shape, dtype) for content, shape, dtype in launches]


def _differences(outputs: Sequence[mx.array], expected: Sequence[mx.array | None], tolerance: float) -> list[str]:
    messages = []
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=False)):
        if wanted is None:
            continue
        if output.shape != wanted.shape:
            messages.append(f"output {index} has the shape {output.shape}, expected {wanted.shape}")
            continue
        found, exact = (np.array(array.astype(mx.float32), np.float64) for array in (output, wanted))
        if (np.isnan(found) != np.isnan(exact)).any():
            messages.append(f"output {index}: {int(np.isnan(found).sum())} NaN, expected {int(np.isnan(exact).sum())}")
            continue
        with np.errstate(invalid="ignore"):  # infinities that agree
            error = np.where(found == exact, 0.0, np.abs(found - exact))
        largest = np.nanmax(np.abs(exact[np.isfinite(exact)]), initial=0.0)
        if np.nanmax(error, initial=0.0) > tolerance * largest:
            share = np.nanmax(error) / largest if largest else np.inf
            messages.append(f"output {index} is {share:.2e} of its largest number off, tolerance {tolerance:.2e}")
    return messages


def _as_list(expected: Sequence[mx.array | None] | mx.array | None) -> Sequence[mx.array | None]:
    return [expected] if isinstance(expected, mx.array) else expected or []
