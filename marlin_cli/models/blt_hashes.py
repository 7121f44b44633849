"""Rows of the hash tables of a Byte Latent Transformer: which of them stand for the bytes up to each one."""

import functools
from collections.abc import Sequence

import mlx.core as mx

# The base of each hash function's polynomial.
PRIMES = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899, 9576890767, 3628273133, 2860486313, 5463458053,
    3367900313,
)  # fmt: skip


def hash_rows(ids: mx.array, before: mx.array | None, lengths: Sequence[int], functions: int, buckets: int) -> mx.array:
    """Rows [n, rows, functions x lengths] of the tables, that lie behind each other, for ids [n, rows].

    The hash of a length g is the sum of id[t - g + 1 + j] * prime^j over j < g, modulo 2^64, with ids before a text as 0.

    Args:
        before: ids [n, kept] that came before; what is missing of them is 0. None: a text begins here.
    """
    n, rows = ids.shape
    most = max(lengths, default=1) - 1
    kept = mx.zeros((n, 0), dtype=mx.int64) if before is None else before.astype(mx.int64)[:, max(0, before.shape[1] - most) :]
    everything = mx.concatenate([mx.zeros((n, most - kept.shape[1]), dtype=mx.int64), kept, ids.astype(mx.int64)], axis=1)
    found: list[mx.array] = []
    for function in range(functions):
        for length in lengths:
            first = most - length + 1
            total = mx.zeros((n, rows), dtype=mx.int64)
            for power in range(length):
                total = total + everything[:, first + power : first + power + rows] * _power(PRIMES[function], power)
            # mx.remainder has the divisor's sign, as the tables' authors ask.
            found.append(mx.remainder(total, mx.array(buckets, dtype=mx.int64)) + len(found) * buckets)
    return mx.stack(found, axis=-1) if found else mx.zeros((n, rows, 0), dtype=mx.int64)


@functools.cache
def _power(prime: int, power: int) -> mx.array:
    """prime^power as a signed number of 64 bits, which wraps."""
    value = pow(prime, power, 1 << 64)
    return mx.array(value - (1 << 64) if value >> 63 else value, dtype=mx.int64)
