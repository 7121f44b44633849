"""Counters of energy, read from a tree like Linux's powercap."""

import pytest

from marlin_cli.bench.energy import EnergyCounter


@pytest.fixture
def zone(tmp_path):
    """Adds a zone with its counter and range in microjoules."""

    def add(name, value, largest=1000):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{largest}\n")

    return add


def test_packages_add_up_and_their_parts_do_not(zone, tmp_path):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl-mmio:0"):
        zone(name, 100)
    counter = EnergyCounter(tmp_path)
    before = counter.read()
    assert before == [100, 100]
    for name, value in (("intel-rapl:0", 350), ("intel-rapl:1", 400), ("intel-rapl:0:0", 900)):
        zone(name, value)
    assert counter.joules(before, counter.read()) == pytest.approx(550e-6)


def test_a_counter_that_turns_over(zone, tmp_path):
    zone("intel-rapl:0", 990)
    counter = EnergyCounter(tmp_path)
    before = counter.read()
    zone("intel-rapl:0", 20)
    assert counter.joules(before, counter.read()) == pytest.approx(30e-6)


def test_no_counters_and_no_permission_tell_nothing(zone, tmp_path):
    assert EnergyCounter(tmp_path).read() is None
    assert EnergyCounter(tmp_path).reason == f"unknown: {tmp_path} has no counters of processor packages"
    zone("intel-rapl:0", 5)
    zone("intel-rapl:1", 5)
    counter = EnergyCounter(tmp_path)
    before = counter.read()
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as unreadable as what only root may read
    assert counter.read() is None
    assert counter.joules(before, None) is None and counter.joules(None, before) is None
