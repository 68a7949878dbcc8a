"""Energy of a step, in joules: of the rank's GPU by NVML, of the node's processors by RAPL.

In: counters of the driver and the kernel. Out: joules since the last reading. A counter that cannot be read, as on a
machine without it or without permission (powercap is for root since Linux 5.10), gives NaN, so that a sum over ranks
is a number only where all can be read. RAPL has the processors, on some machines the memory; not fans or disks.
Cost: a read of a small file per processor, or a call of the driver, each step.

    /sys/class/powercap/intel-rapl:0/name                   package-0       also on AMD's processors
    /sys/class/powercap/intel-rapl:0/energy_uj              microjoules; begins again at 0 after
    /sys/class/powercap/intel-rapl:0/max_energy_range_uj    this many
    /sys/class/powercap/intel-rapl:0:0                      a part of intel-rapl:0, counted there

Sources: Documentation/power/powercap/powercap.rst and Documentation/ABI/testing/sysfs-class-powercap of Linux; NVML's
nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver was loaded (Volta and later).
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

POWERCAP = Path("/sys/class/powercap")
PACKAGE = "package"  # beginning of a processor's name; "psys" is the whole platform, with the processors again


class Joules(NamedTuple):
    """Joules since the last reading; NaN: unknown. 0 for hosts on all ranks but the first of a node."""

    device: float
    host: float


class Energy:
    """Call `take` once a step. gpu: UUID of the rank's GPU, "" without one. reads_host: the first rank of a node."""

    def __init__(self, gpu: str, reads_host: bool, powercap: Path = POWERCAP, nvml: Any = None) -> None:
        """nvml: an initialised library in place of pynvml."""
        self._gpu = _Gpu(gpu, nvml) if gpu else None
        self._zones = _zones(powercap) if reads_host else {}
        self._reads_host = reads_host
        self.take()  # the counters' begin

    def take(self) -> Joules:
        """The joules since the last call."""
        device = self._gpu.take() if self._gpu else math.nan
        return Joules(device, self._take_host() if self._reads_host else 0.0)

    def _take_host(self) -> float:
        total = 0.0 if self._zones else math.nan
        for zone, (before, most) in self._zones.items():
            now = _number(zone / "energy_uj")
            self._zones[zone] = now, most
            used = now - before
            total += (used + most if used < 0 else used) / 1e6
        return total


class _Gpu:
    def __init__(self, uuid: str, nvml: Any) -> None:
        self._before = math.nan
        try:
            self._nvml = nvml or _driver()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception:  # no library, no driver or no permission: nothing to read
            self._nvml = None

    def take(self) -> float:
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000 if self._nvml else math.nan
        except Exception:  # a GPU before Volta, or one that is lost
            now = math.nan
        before, self._before = self._before, now
        used = now - before
        return used if used >= 0 else math.nan  # the driver was loaded again


def _driver() -> Any:
    """NVML. Raises where there is no library or driver."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _zones(powercap: Path) -> dict[Path, tuple[float, float]]:
    """Processors that can be read: folder -> energy so far and range, in microjoules."""
    found = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):
        energy, most = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
        if zone.name.count(":") == 1 and _text(zone / "name").startswith(PACKAGE) and energy >= 0 and most > 0:
            found[zone] = energy, most
    return found


def _number(file: Path) -> float:
    try:
        return float(_text(file))
    except ValueError:
        return math.nan


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
