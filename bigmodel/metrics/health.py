"""Health: processors, memory, disk and network of the node, and the driver's readings of the ranks' GPUs.

In: rank records. Out: samples for the metrics endpoint. Runs in the exporter, so it costs a training step nothing; it
reads at most once a second. Readings that are not available are left out: no GPU, driver library or InfiniBand.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

READING_SECONDS = 1.0
INFINIBAND = Path("/sys/class/infiniband")
Samples = dict[str, list[list[Any]]]


class Health:
    def __init__(self, run_directory: Path) -> None:
        self._directory, self._read_at, self._samples = run_directory, 0.0, Samples()
        self._gpus = Gpus()

    def samples(self, records: Iterable[dict[str, Any]], alive: list[int]) -> Samples:
        if time.monotonic() - self._read_at > READING_SECONDS:
            self._read_at = time.monotonic()
            records = list(records)
            self._samples = {**node(self._directory), **processes(records, alive), **self._gpus.samples(records)}
        return self._samples


def node(run_directory: Path) -> Samples:
    memory = psutil.virtual_memory()
    found = {"node_memory_total_bytes": memory.total, "node_memory_available_bytes": memory.available}
    try:
        disk = psutil.disk_usage(str(run_directory))
        found |= {"disk_total_bytes": disk.total, "disk_free_bytes": disk.free}
    except OSError:
        pass  # the run directory was moved, or its file system is unavailable
    return {name: [[[], value]] for name, value in found.items()} | processors() | network()


def processors() -> Samples:
    """Seconds of all cores by mode, as far as the system counts them."""
    times = psutil.cpu_times()._asdict()
    modes = ("user", "nice", "system", "iowait", "steal")
    return {"node_cpu_seconds": [[[mode], times[mode]] for mode in modes if mode in times]}


def network() -> Samples:
    """Bytes by device: all network cards except loopback, and InfiniBand, which counts words of 4 bytes."""
    received, transmitted = [], []
    for name, count in psutil.net_io_counters(pernic=True).items():
        if name != "lo":
            received.append([[name], count.bytes_recv])
            transmitted.append([[name], count.bytes_sent])
    for port in sorted(INFINIBAND.glob("*/ports/*/counters")):
        name = f"{port.parts[-4]}:{port.parts[-2]}"
        for found, file in ((received, "port_rcv_data"), (transmitted, "port_xmit_data")):
            try:
                found.append([[name], 4 * int((port / file).read_text())])
            except (OSError, ValueError):
                continue
    return {"network_received_bytes": received, "network_transmitted_bytes": transmitted}


def processes(records: list[dict[str, Any]], alive: list[int]) -> Samples:
    found = []
    for record in records:
        if record["rank"] in alive:
            try:
                found.append([[str(record["rank"])], psutil.Process(record["pid"]).memory_info().rss])
            except psutil.Error:
                continue
    return {"process_resident_bytes": found}


# NVML's nvmlClocksEventReason bits (nvml.h), without the reasons for idle GPUs and for clocks set by the user.
THROTTLE_REASONS = {
    "power_cap": 0x4,
    "hardware": 0x8,
    "sync_boost": 0x10,
    "software_thermal": 0x20,
    "hardware_thermal": 0x40,
    "power_brake": 0x80,
}


class Gpus:
    """The ranks' GPUs through NVML; no samples without GPUs."""

    def __init__(self, nvml: Any = None) -> None:
        """nvml: an initialised library in place of pynvml; None: pynvml, if it and a driver are installed."""
        self._nvml = nvml
        self._handles: dict[str, Any] = {}
        self._events: Any = None
        self._xid_errors: dict[str, int] = {}
        if nvml is not None:
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        except Exception:  # no library, no driver or no permission: nothing to read
            return

    def samples(self, records: Iterable[dict[str, Any]]) -> Samples:
        found: Samples = {}
        if self._nvml is None:
            return found
        for record in records:
            if gpu := record.get("gpu"):
                self._read(gpu, str(record["rank"]), found)
        self._count_xid_errors()
        return found

    def _read(self, gpu: str, rank: str, found: Samples) -> None:
        nvml = self._nvml
        handle = self._handle(gpu)
        if handle is None:
            return
        readings = (
            ("device_temperature_celsius", [rank], lambda: nvml.nvmlDeviceGetTemperature(handle, 0)),
            ("device_power_watts", [rank], lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            ("device_ecc_errors", [rank, "corrected"], lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, 0, 0)),
            ("device_ecc_errors", [rank, "uncorrected"], lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, 1, 0)),
            ("device_xid_errors", [rank], lambda: self._xid_errors[gpu]),
        )
        for name, labels, read in readings:
            try:
                found.setdefault(name, []).append([labels, read()])
            except (nvml.NVMLError, KeyError):
                continue  # consumer cards have no ECC counters; some lack other readings too
        try:
            bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        except nvml.NVMLError:
            return
        rows = [[[rank, reason], int(bool(bits & bit))] for reason, bit in THROTTLE_REASONS.items()]
        found.setdefault("device_throttled", []).extend(rows)

    def _handle(self, gpu: str) -> Any:
        nvml = self._nvml
        if gpu not in self._handles:
            try:
                self._handles[gpu] = nvml.nvmlDeviceGetHandleByUUID(gpu)
            except nvml.NVMLError:
                self._handles[gpu] = None
                return None
            try:
                self._events = self._events or nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(self._handles[gpu], nvml.nvmlEventTypeXidCriticalError, self._events)
                self._xid_errors[gpu] = 0
            except nvml.NVMLError:
                pass
        return self._handles[gpu]

    def _count_xid_errors(self) -> None:
        nvml = self._nvml
        while self._events is not None:
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
            except nvml.NVMLError:
                return  # time-out: no event
            gpu = nvml.nvmlDeviceGetUUID(event.device)
            self._xid_errors[gpu] = self._xid_errors.get(gpu, 0) + 1
