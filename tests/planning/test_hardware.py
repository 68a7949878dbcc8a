"""Figures of devices and networks: known names, what the cluster file replaces, what a ring gets."""

from pathlib import Path

import pytest

from bigmodel.config.hardware_settings import HardwareSettings
from bigmodel.config.settings import UserError
from bigmodel.launcher.cluster import load_cluster
from bigmodel.metrics.flops import DEVICE_PEAK_FLOPS
from bigmodel.planning.devices import DEVICES
from bigmodel.planning.hardware import hardware_of


def test_every_device_has_a_peak_and_can_reach_a_part_of_it() -> None:
    for name, device in DEVICES.items():
        assert device.torch_name in DEVICE_PEAK_FLOPS, name
        assert 0.5 < device.achievable < 1, name
        assert 10 < 1e9 * device.memory_gigabytes_per_second / (device.memory_gib * 2**30) < 100, name  # times a second


def test_the_example_of_the_docstring() -> None:
    found = hardware_of(HardwareSettings(gpu="H100 SXM"), nodes=2, gpus_per_node=8)
    assert (found.peak_flops, found.memory_rate, found.node_rate) == (989e12, 3350e9, 450e9)
    assert (found.link_rate, found.watts, round(found.memory_gib, 1)) == (50e9, 700, 79.1)
    notes = {row.name: row.note for row in found.rows}
    assert notes["between nodes, per GPU"].startswith("assumed: InfiniBand NDR")
    assert "assumed" not in notes["GPU"]


def test_without_a_gpu_it_is_assumed_and_said() -> None:
    found = hardware_of(HardwareSettings(), nodes=1, gpus_per_node=8)
    assert found.name == "H100 SXM"
    assert found.rows[0].note.startswith("assumed: [hardware] gpu is not set")
    assert "between nodes, per GPU" not in [row.name for row in found.rows]


def test_figures_of_the_cluster_file_go_before_those_of_the_table() -> None:
    given = HardwareSettings(gpu="B200", memory_gib=100, peak_tflops=2000, watts_per_gpu=900, price_per_gpu_hour=4)
    found = hardware_of(given, nodes=1, gpus_per_node=8)
    assert (found.memory_gib, found.peak_flops, found.watts, found.price_per_hour) == (100, 2000e12, 900, 4)
    assert found.memory_rate == 8000e9
    assert found.rows[0].note == "of the cluster file"


@pytest.mark.parametrize(
    ("network", "nodes", "gpus", "gigabytes"),
    [
        ("InfiniBand NDR", 1, 8, 450),  # NVLink
        ("InfiniBand NDR", 4, 8, 400),  # eight adapters at once
        ("InfiniBand NDR", 4, 1, 50),
        ("InfiniBand XDR", 4, 8, 450),  # NVLink is the narrower one
        ("Ethernet 100", 4, 8, 12.5),
    ],
)
def test_a_ring_runs_at_its_narrowest_link(network: str, nodes: int, gpus: int, gigabytes: float) -> None:
    assert hardware_of(HardwareSettings(gpu="H100 SXM", network=network), nodes, gpus).ring_rate == gigabytes * 1e9


def test_failures_come_as_often_as_llama_3_says() -> None:
    found = hardware_of(HardwareSettings(), nodes=2048, gpus_per_node=8)
    assert found.job_failure_seconds / 3600 == pytest.approx(54 * 24 / 419, rel=1e-3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('gpu = "H100 SMX"', r"hardware.gpu = 'H100 SMX' is not known; did you mean 'H100 SXM'\?.*MI300X"),
        ('gpu = "h200"', r"did you mean 'H200'\?"),
        ('network = "infiniband"', r"hardware.network = 'infiniband' is not known; .*InfiniBand NDR"),
        ("memory = 80", r"hardware.memory: unknown setting; did you mean 'memory_gib'\?"),
        ("peak_tflops = -1", r"hardware.peak_tflops = -1: input should be greater than or equal to 0"),
        ("storage_gigabytes_per_second = 1e-320", r"= 9.99989e-321: must be between 1e-06 and 1e\+12, or 0: not given"),
        ("memory_gib = 1e300", r"memory_gib = 1e\+300: must be between 1e-06 and 1e\+12"),
    ],
)
def test_what_is_not_known_is_said_with_the_nearest_name(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(f"[hardware]\n{line}\n")
    with pytest.raises(UserError, match=message):
        load_cluster(file)
