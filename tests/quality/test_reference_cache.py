"""What is kept changes no number, and takes no more room than it may."""

import hashlib
import os

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quality.held_out import Windowing, cut, files_by_domain
from marlin_cli.quality.quality import measure_quality
from marlin_cli.quality.reference_cache import ReferenceCache

DATA = np.arange(12, dtype=np.uint8).reshape(2, 6)
ENTRY_BYTES = 2 * 6 * 256 * 4 + 128 + 32


def values(data):
    return mx.random.normal((*data.shape, 256))


def never():
    pytest.fail("computed again")


def test_kept_values_are_those_computed(tmp_path):
    first = ReferenceCache(tmp_path / "new", "model")(DATA, lambda: values(DATA))
    again = ReferenceCache(tmp_path / "new", "model")
    assert mx.array_equal(again(DATA, never), first)
    assert (again.hits, again.misses) == (1, 0)


@pytest.mark.parametrize("changed", ["model", "bytes", "shape"])
def test_another_model_or_other_bytes_are_computed(tmp_path, changed):
    ReferenceCache(tmp_path, "model")(DATA, lambda: values(DATA))
    data = {"bytes": DATA[::-1], "shape": DATA.reshape(3, 4)}.get(changed, DATA)
    other = ReferenceCache(tmp_path, "another" if changed == "model" else "model")
    other(data, lambda: values(data))
    assert (other.hits, other.misses) == (0, 1)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[1000] ^= 1  # a number a little off
    path.write_bytes(data)


def of_another_version(path):
    path.unlink()
    np.save(path, np.zeros((2, 6, 256), np.float32))


ZEROS = bytes(ENTRY_BYTES - 32)
DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]), "flipped": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"), "without a digest": of_another_version,
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "not npy": lambda path: path.write_bytes(ZEROS + hashlib.sha256(ZEROS).digest()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    ReferenceCache(tmp_path, "model")(DATA, lambda: values(DATA))
    [path] = tmp_path.iterdir()
    DAMAGE[damage](path)
    expected = values(DATA)
    assert mx.array_equal(ReferenceCache(tmp_path, "model")(DATA, lambda: expected), expected)
    assert mx.array_equal(ReferenceCache(tmp_path, "model")(DATA, never), expected)


def test_old_files_make_room_and_those_of_this_run_do_not(tmp_path):
    def fill(cache, numbers):
        for number in numbers:
            cache(DATA + np.uint8(number), lambda: values(DATA))

    fill(ReferenceCache(tmp_path, "model"), range(3))
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (1000 + age, 1000 + age))
    small = ReferenceCache(tmp_path, "model", 3 * ENTRY_BYTES)
    fill(small, range(10, 20))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * ENTRY_BYTES
    again = ReferenceCache(tmp_path, "model", 3 * ENTRY_BYTES)
    fill(again, range(10, 20))
    assert again.hits == 3  # the first three of a run that is too large, each time


def test_a_comparison_with_kept_predictions_is_the_same_to_the_last_bit(tmp_path, random_network, small_sizes):
    config = MegaByteConfig(**small_sizes)
    reference, other = random_network(config, seed=0), random_network(config, seed=1)
    (tmp_path / "file").write_bytes(bytes(range(256)) + b"\0" * 40 + "h\u00e9llo".encode())
    windows = cut(files_by_domain(str(tmp_path / "file")), Windowing(window_bytes=48, stride_bytes=20))
    plain = measure_quality({"other": other}, windows, reference)
    assert measure_quality({"other": other}, windows, reference, kept_reference=ReferenceCache(tmp_path / "c", "m")) == plain
    kept = ReferenceCache(tmp_path / "c", "m")
    assert measure_quality({"other": other}, windows, reference, kept_reference=kept) == plain
    assert kept.misses == 0 < kept.hits
