"""Makes the emulator and the tables beside these tests importable, skips where it cannot run, and offers it as a fixture."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "emulator")]

import toolchain  # noqa: E402 (found by the line above)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = toolchain.missing()
    for item in items:
        if reason and item.get_closest_marker("metal"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def emulated():
    """Runs a call whose Metal kernels are emulated: `emulated(call, sanitized=False, change=None)`, as `drop_in.emulate`."""
    import checks
    import drop_in

    from marlin_cli.ops import metal_kernels

    def run(call, *, sanitized=False, change=None):
        metal_kernels.kernel.cache_clear()
        try:
            return drop_in.emulate(call, checks=checks.ALL if sanitized else checks.UNSANITIZED, change=change)
        finally:
            metal_kernels.kernel.cache_clear()

    return run
