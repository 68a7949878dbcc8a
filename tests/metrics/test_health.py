"""Readings of the node are those of the machine; what NVML says reaches the page under the right rank.

No GPU is at hand where this was written: a driver library of the same interface plays two of them.
"""

from pathlib import Path
from typing import Any

import psutil
import pytest

import bigmodel.metrics.health as health
from bigmodel.metrics.health import Gpus, network, node


def test_a_run_directory_that_is_gone_costs_the_disk_only(tmp_path: Path) -> None:
    here, gone = node(tmp_path), node(tmp_path / "gone")
    assert here["disk_free_bytes"][0][1] == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.2)
    assert set(here) - set(gone) == {"disk_free_bytes", "disk_total_bytes"}


def test_infiniband_counts_words_of_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = tmp_path / "mlx5_0" / "ports" / "1" / "counters"
    counters.mkdir(parents=True)
    (counters / "port_rcv_data").write_text("1000\n")
    (counters / "port_xmit_data").write_text("N/A (no PMA)\n")
    monkeypatch.setattr(health, "INFINIBAND", tmp_path)
    found = network()
    assert [["mlx5_0:1"], 4000] in found["network_received_bytes"]
    assert "mlx5_0:1" not in [labels[0] for labels, _ in found["network_transmitted_bytes"]]
    assert "lo" not in [labels[0] for labels, _ in found["network_received_bytes"]]


class Driver:
    """nvidia-ml-py as far as it is used: GPU-a is hot, GPU-b has no ECC and fell off the bus once."""

    nvmlEventTypeXidCriticalError = 8

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.events: list[str] = []

    def nvmlDeviceGetHandleByUUID(self, gpu: str) -> str:
        if gpu not in ("GPU-a", "GPU-b"):
            raise self.NVMLError("Not Found")
        return gpu

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceRegisterEvents(self, gpu: str, kind: int, events: str) -> None:
        assert (kind, events) == (8, "events")

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return {"GPU-a": 88, "GPU-b": 40}[gpu]

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 693_500

    def nvmlDeviceGetTotalEccErrors(self, gpu: str, kind: int, since: int) -> int:
        if gpu == "GPU-b":
            raise self.NVMLError("Not Supported")
        return (2, 1)[kind]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return {"GPU-a": 0x40 | 0x4, "GPU-b": 0x1}[gpu]

    def nvmlEventSetWait_v2(self, events: str, milliseconds: int) -> Any:
        if not self.events:
            raise self.NVMLError("Timeout")
        return type("Event", (), {"device": self.events.pop()})

    def nvmlDeviceGetUUID(self, gpu: str) -> str:
        return gpu


def test_what_the_driver_says_stands_under_the_rank_of_the_gpu() -> None:
    driver = Driver()
    gpus = Gpus(driver)
    records = [{"rank": 4, "gpu": "GPU-a"}, {"rank": 5, "gpu": "GPU-b"}, {"rank": 6, "gpu": "GPU-c"}, {"rank": 7}]
    found = gpus.samples(records)
    assert found["device_temperature_celsius"] == [[["4"], 88], [["5"], 40]]
    assert found["device_power_watts"] == [[["4"], 693.5], [["5"], 693.5]]
    assert found["device_ecc_errors"] == [[["4", "corrected"], 2], [["4", "uncorrected"], 1]]
    slowed = {tuple(labels) for labels, value in found["device_throttled"] if value}
    assert slowed == {("4", "hardware_thermal"), ("4", "power_cap")}
    assert len(found["device_throttled"]) == 12
    assert found["device_xid_errors"] == [[["4"], 0], [["5"], 0]]
    driver.events = ["GPU-b", "GPU-b"]
    gpus.samples(records)
    assert gpus.samples(records)["device_xid_errors"] == [[["4"], 0], [["5"], 2]]


def test_without_a_gpu_the_real_library_is_silent() -> None:
    pytest.importorskip("pynvml")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA driver here")
    assert Gpus().samples([{"rank": 0, "gpu": "GPU-a"}]) == {}
