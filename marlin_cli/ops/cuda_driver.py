"""The CUDA driver for the first device: what it says of itself, memory, and launches beside MLX's own, which cost it less."""

import ctypes
import functools
import weakref
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from marlin_cli.errors import BackendError

# CUdevice_attribute, CU_MEMHOSTALLOC, CUfunction_attribute, CUstream_flags
MULTIPROCESSORS, MAJOR, MINOR, SHARED_MEMORY_OF_A_BLOCK = 16, 75, 76, 97
PORTABLE_AND_MAPPED = 3
MOST_DYNAMIC_SHARED_BYTES = 8
NON_BLOCKING = 1
IPC_HANDLE_BYTES, OPEN_TO_PEERS = 64, 1  # CU_IPC_HANDLE_SIZE, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


def multiprocessors() -> int:
    """Of the first device: as many blocks of a whole multiprocessor each are resident at once."""
    return _attribute(MULTIPROCESSORS)


def shared_memory() -> int:
    """Bytes of shared memory that a block of the first device can have."""
    return _attribute(SHARED_MEMORY_OF_A_BLOCK)


def memory_bytes() -> int:
    """Of the first device."""
    _context()
    free, size = ctypes.c_size_t(), ctypes.c_size_t()
    _check(_driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(size)), "does not say how much memory there is")
    return size.value


def compute_capability() -> tuple[int, int]:
    """Of the first device, as 9 and 0 of an H200."""
    return _attribute(MAJOR), _attribute(MINOR)


def bus_address() -> str:
    """Of the first device, by which processes that see other devices know it too."""
    _context()
    text = ctypes.create_string_buffer(32)
    _check(_driver().cuDeviceGetPCIBusId(text, len(text), 0), "does not say where the device is")
    return text.value.decode()


class _IpcHandle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_ubyte * IPC_HANDLE_BYTES)]  # noqa: RUF012


def handle_of(address: int) -> bytes:
    """By which another process of this host opens memory that `Queue.allocate` gave, of a mebibyte at least.

    Raises:
        BackendError: the driver does not share memory.
    """
    handle = _IpcHandle()
    _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(address)), "does not share memory")
    return bytes(handle.data)


def opened(handle: bytes) -> int:
    """The address of another process's memory, maybe of another GPU, for as long as this process lives.

    Raises:
        BackendError: it cannot be reached from this GPU.
    """
    place = ctypes.c_uint64()
    given = _IpcHandle.from_buffer_copy(handle)
    code = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(place), given, ctypes.c_uint(OPEN_TO_PEERS))
    _check(code, "does not reach the memory of another rank's GPU")
    return place.value


class Queue:
    """Work for the first device in order, apart from MLX's own: copies and launches. MLX's results must be there before."""

    def __init__(self) -> None:
        self._context = _context()
        self._stream = ctypes.c_void_p()
        _check(_driver().cuStreamCreate(ctypes.byref(self._stream), NON_BLOCKING), "makes no stream")
        weakref.finalize(self, _driver().cuStreamDestroy_v2, self._stream).atexit = False

    def allocate(self, size: int) -> "Memory":
        """Zeroed memory of the device."""
        place = ctypes.c_uint64()
        _check(_driver().cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(max(size, 16))), f"gives no {size} bytes of memory")
        _check(_driver().cuMemsetD8Async(place, 0, ctypes.c_size_t(max(size, 16)), self._stream), "does not clear memory")
        return Memory(place.value, size)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes there, after what has been queued."""
        code = _driver().cuMemcpyHtoDAsync_v2(ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)), self._stream)
        _check(code, "does not copy to the device")

    def copy(self, to: int, address: int, size: int) -> None:
        """Copy bytes within the device, after what has been queued."""
        code = _driver().cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(to), ctypes.c_uint64(address), ctypes.c_size_t(size), self._stream
        )
        _check(code, "does not copy on the device")

    def read(self, address: int, size: int) -> bytes:
        """Bytes from there, after what has been queued."""
        data = ctypes.create_string_buffer(size)
        code = _driver().cuMemcpyDtoHAsync_v2(data, ctypes.c_uint64(address), ctypes.c_size_t(size), self._stream)
        _check(code, "does not copy from the device")
        self.wait()
        return data.raw

    def wait(self) -> None:
        """Until all that has been queued is done.

        Raises:
            BackendError: some of it failed.
        """
        _check(_driver().cuStreamSynchronize(self._stream), "did not end what it was given")

    def load(self, code: bytes, name: str, blocks: int, threads: int, shared_bytes: int) -> "Launcher":
        """A kernel from machine code; its blocks, which wait for each other, are on the device at once or not at all."""
        function = _function(code, name)
        size, lacking = ctypes.c_int(shared_bytes), f"gives a block no {shared_bytes} bytes of shared memory"
        _check(_driver().cuFuncSetAttribute(function, MOST_DYNAMIC_SHARED_BYTES, size), lacking)

        def launch(*arguments: "ctypes._SimpleCData[int] | ctypes._SimpleCData[float]") -> None:
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
            code = _driver().cuLaunchCooperativeKernel(
                function, blocks, 1, 1, threads, 1, 1, shared_bytes, self._stream, pointers
            )
            _check(code, f"does not launch {name}")

        return launch


Launcher = Callable[..., None]


class Memory:
    """Memory of the device, given back when nobody holds it."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, _free, address).atexit = False


def _free(address: int) -> None:
    _driver().cuMemFree_v2(ctypes.c_uint64(address))  # waits for what may still write there


def pinned(words: int) -> tuple[np.ndarray, int]:
    """Words [words] int32 of the host, zero, to which a kernel writes, and their address on both sides.

    Raises:
        BackendError: the driver has none to give.
    """
    _context()
    place = ctypes.c_void_p()
    code = _driver().cuMemHostAlloc(ctypes.byref(place), ctypes.c_size_t(4 * words), PORTABLE_AND_MAPPED)
    _check(code, "gives no memory of the host")
    assert place.value is not None
    memory = np.ctypeslib.as_array((ctypes.c_int32 * words).from_address(place.value))
    memory[:] = 0
    weakref.finalize(memory, _release, place.value).atexit = False
    return memory, place.value


def _release(place: int) -> None:
    _driver().cuCtxSynchronize()  # a kernel may still write there
    _driver().cuMemFreeHost(ctypes.c_void_p(place))


def _context() -> ctypes.c_void_p:
    """The device's context that MLX uses too, made this thread's."""
    mx.eval(mx.zeros((1,)) + 1)
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "has no context")
    _check(_driver().cuCtxSetCurrent(context), "has no context")
    return context


@functools.lru_cache(maxsize=64)
def _function(code: bytes, name: str) -> ctypes.c_void_p:
    """A kernel in the device's context; it stays there, as loading takes longer than many launches."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "does not load a kernel")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "does not find a kernel")
    return function


def _check(code: int, what: str) -> None:
    if code:
        raise BackendError(f"the CUDA driver {what} (code {code}); see nvidia-smi, or use MARLIN_KERNELS=reference")


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
