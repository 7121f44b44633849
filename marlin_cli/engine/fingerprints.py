"""What tells whether two runs would compute the same numbers: the model's own bytes, and the arithmetic that reads them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli.models import config_as_mapping
from marlin_cli.ops import QuantizedLinear
from marlin_cli.ops.cpu import kernels, rows_are_exact

# Arrays hashed side by side; the library lets go of Python's lock meanwhile.
THREADS = 4


def fingerprint_of(network: Any) -> str:
    """Hexadecimal SHA-256 of a network in memory: of its configuration, and of name, type, shape and bytes of each array.

    Files say nothing here: what a checkpoint leaves open, was cast or packed on the way, is in the arrays. It reads every
    weight once, about as fast as memory does (a gigabyte in a third of a second on two cores), so it is asked for once a run.
    """
    arrays = dict(tree_flatten(network.parameters()))
    mx.eval(arrays)
    activation_bits = sorted({module.activation_bits for module in network.modules() if isinstance(module, QuantizedLinear)})
    facts = {"config": config_as_mapping(network.config), "activation_bits": activation_bits}
    return digest_of(facts, {name: (str(array.dtype), array.shape, bytes_of(array)) for name, array in arrays.items()})


def arithmetic_of(*, by_kernels: bool) -> str:
    """What the last bit of a result hangs on beside the numbers: which kernels, built how for which processor, or which MLX.

    Args:
        by_kernels: do the kernels of this project take rows through the layers?
    """
    module = kernels()[0] if by_kernels else None
    if module is None:
        return f"mlx {mx.__version__} {mx.default_device()}"  # type: ignore[attr-defined]
    # The folder's name is a hash of sources, compiler, flags, MLX and processor.
    return f"kernels {Path(str(module.__file__)).parent.name} rows {'exact' if rows_are_exact() else 'fast'}"


def digest_of(facts: Mapping[str, Any], arrays: Mapping[str, tuple[str, Iterable[int], memoryview]]) -> str:
    """Hexadecimal SHA-256 of plain facts, and of arrays: name -> (type, shape, bytes)."""
    with ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda each: hashlib.sha256(each[2]).hexdigest(), arrays.values())
        parts = [
            [name, dtype, list(shape), digest]
            for (name, (dtype, shape, _)), digest in zip(arrays.items(), digests, strict=True)
        ]
    text = json.dumps([facts, sorted(parts)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def bytes_of(array: mx.array) -> memoryview:
    """The bytes of an evaluated array; of one that does not stand in order in memory, those of a copy."""
    view = memoryview(array)  # type: ignore[arg-type]
    return (view if view.contiguous else memoryview(mx.contiguous(array))).cast("B")  # type: ignore[arg-type]
