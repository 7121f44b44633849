"""Makes the emulator and the tables beside these tests importable, skips where it cannot run, offers it as a fixture, and
counts what was checked."""

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


@pytest.fixture(autouse=True)
def counted(record_property):
    """Leaves with each test the launches that passed every check, for the line at the end."""
    if toolchain.missing():
        yield
        return
    import checks

    checks.SOUND.clear()
    yield
    record_property("metal", list(checks.SOUND))


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [
        report for each in terminalreporter.stats.values() for report in each if getattr(report, "when", "") == "teardown"
    ]
    launches = [
        tuple(launch) for report in reports for name, value in report.user_properties if name == "metal" for launch in value
    ]
    kernels = sorted({name for name, _, _ in launches})
    if kernels:
        variants = len({(name, variant) for name, variant, _ in launches})
        terminalreporter.write_line(
            f"Metal emulator: {sum(count for _, _, count in launches):,} checks passed in {len(launches):,} launches of"
            f" {variants:,} variants of {len(kernels)} kernels ({', '.join(kernels)})"
        )
