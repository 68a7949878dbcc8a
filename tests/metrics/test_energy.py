"""Joules of a step from made counters, laid out as the kernel's documentation says."""

import math
from pathlib import Path

import pytest

from bigmodel.metrics.energy import Energy


def write_zone(powercap: Path, zone: str, name: str, energy: object, most: int = 1000_000_000) -> None:
    folder = powercap / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")


def test_processors_are_added_and_their_parts_and_the_platform_are_not(tmp_path: Path) -> None:
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        write_zone(tmp_path, zone, name, 5_000_000)
    energy = Energy("", True, tmp_path)
    assert energy.take().host == 0.0
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        write_zone(tmp_path, zone, name, 7_500_000)
    assert energy.take().host == 5.0


def test_a_counter_that_begins_again_at_its_range_loses_nothing(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000, most=1_000_000_000)
    energy = Energy("", True, tmp_path)
    write_zone(tmp_path, "intel-rapl:0", "package-0", 3_000_000, most=1_000_000_000)
    assert energy.take().host == 4.0
    write_zone(tmp_path, "intel-rapl:0", "package-0", 3_500_000, most=1_000_000_000)
    assert energy.take().host == 0.5


@pytest.mark.parametrize("what", ["none", "empty", "letters", "gone"])
def test_what_cannot_be_read_is_unknown_and_no_error(tmp_path: Path, what: str) -> None:
    if what != "none":
        write_zone(tmp_path, "intel-rapl:0", "package-0", {"empty": "", "letters": "many"}.get(what, 1))
    energy = Energy("", True, tmp_path)
    if what == "gone":
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert math.isnan(energy.take().host)
    assert math.isnan(energy.take().device)
    assert Energy("", False, tmp_path).take().host == 0.0


class Driver:
    """NVML with a GPU whose counter is given."""

    def __init__(self, *millijoules: int) -> None:
        self.readings = list(millijoules)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise RuntimeError("no such GPU")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.readings:
            raise RuntimeError("not supported")
        return self.readings.pop(0)


def test_a_gpu_is_read_and_one_without_a_counter_is_unknown(tmp_path: Path) -> None:
    energy = Energy("GPU-1", False, tmp_path, Driver(1_000, 351_000, 10, 20))
    assert energy.take().device == 350.0
    assert math.isnan(energy.take().device)  # the driver was loaded again
    assert energy.take().device == pytest.approx(0.01)
    assert math.isnan(energy.take().device)
    assert math.isnan(Energy("GPU-2", False, tmp_path, Driver(1, 2)).take().device)
