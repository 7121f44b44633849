"""What the CUDA driver says of the first device, and memory of the host that the device writes to: MLX has neither."""

import ctypes
import functools
import weakref

import mlx.core as mx
import numpy as np

from marlin_cli.errors import BackendError

MULTIPROCESSORS, SHARED_MEMORY_OF_A_BLOCK = 16, 97  # CUdevice_attribute
PORTABLE_AND_MAPPED = 3  # CU_MEMHOSTALLOC


def multiprocessors() -> int:
    """Of the first device: as many blocks of a whole multiprocessor each are resident at once."""
    return _attribute(MULTIPROCESSORS)


def shared_memory() -> int:
    """Bytes of shared memory that a block of the first device can have."""
    return _attribute(SHARED_MEMORY_OF_A_BLOCK)


def pinned(words: int) -> tuple[np.ndarray, int]:
    """Words [words] int32 of the host, zero, to which a kernel writes, and their address on both sides.

    Raises:
        BackendError: the driver has none to give.
    """
    place = ctypes.c_void_p()
    mx.eval(mx.zeros((1,)) + 1)  # the device's context, of which the memory is
    if _driver().cuMemHostAlloc(ctypes.byref(place), ctypes.c_size_t(4 * words), PORTABLE_AND_MAPPED) or place.value is None:
        raise BackendError("the CUDA driver gives no memory of the host; see nvidia-smi")
    memory = np.ctypeslib.as_array((ctypes.c_int32 * words).from_address(place.value))
    memory[:] = 0
    weakref.finalize(memory, _release, place.value).atexit = False
    return memory, place.value


def _release(place: int) -> None:
    mx.synchronize()  # a kernel may still write there
    _driver().cuMemFreeHost(ctypes.c_void_p(place))


@functools.cache
def _attribute(number: int) -> int:
    value = ctypes.c_int()
    if _driver().cuDeviceGetAttribute(ctypes.byref(value), number, 0):
        raise BackendError("the CUDA driver does not answer; see nvidia-smi")
    return value.value


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"the CUDA driver does not load: {error}") from None
    if driver.cuInit(0):
        raise BackendError("the CUDA driver does not start; see nvidia-smi")
    return driver
