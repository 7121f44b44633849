"""A stand-in for `mx.fast.metal_kernel` under which code that launches kernels runs, every launch checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
from checks import UNSANITIZED, Check, Report, check
from compose import Size, as_array, capture

compose_kernel = mx.fast.metal_kernel
MOST_BUFFERS = 31  # of a Metal kernel


@dataclass
class Emulation:
    """What a call returned, and the launches that it made: names of kernels, and reports."""

    result: Any = None
    launched: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)


def emulate(
    call: Callable[[], Any], *, checks: frozenset[Check] = UNSANITIZED, change: Callable[[str], str] | None = None
) -> Emulation:
    """Run `call` with each of its Metal kernels emulated and checked; AssertionError at the first launch that fails.

    `change` is applied to each composed text. Kernels that were made before are not seen: forget them first.
    """
    emulation = Emulation()

    def metal_kernel(*arguments: Any, **options: Any) -> Callable[..., list[mx.array]]:
        return _Kernel(emulation, checks, change, *arguments, **options)

    with mock.patch.object(mx.fast, "metal_kernel", metal_kernel):
        emulation.result = call()
        mx.eval(emulation.result)
    return emulation


class _Kernel:
    """One kernel; takes what `mx.fast.metal_kernel` takes, and its calls what that one's calls take."""

    def __init__(
        self,
        emulation: Emulation,
        checks: frozenset[Check],
        change: Callable[[str], str] | None,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
    ) -> None:
        self._emulation, self._checks, self._change = emulation, checks, change
        self._name, self._row_contiguous = name, ensure_row_contiguous
        self._kernel = compose_kernel(
            name=name,
            input_names=list(input_names),
            output_names=list(output_names),
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
        )

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [as_array(given) for given in inputs]
        composed = capture(
            self._kernel,
            *arrays,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            template=template,
            init_value=init_value,
            row_contiguous=self._row_contiguous,
        )
        if len(composed.slots) > MOST_BUFFERS:
            raise AssertionError(f"{self._name} has {len(composed.slots)} buffers; Metal has {MOST_BUFFERS}")
        if self._change:
            composed = composed.changed(self._change)
        report = check(composed, arrays, checks=self._checks, name=self._name)
        self._emulation.launched.append(self._name)
        self._emulation.reports.append(report)
        return report.require().outputs
