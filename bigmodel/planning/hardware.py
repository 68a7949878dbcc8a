"""The machines that a plan is about: figures of `[hardware]` in the cluster file, filled up from the table of devices.

In: the section, nodes, GPUs per node. Out: `Hardware`, in SI units, and a row for each figure that was assumed.
Imports no torch.

Example: nothing but gpu = "H100 SXM", 2 nodes of 8: 989e12 FLOP/s, 50 GB/s between nodes assumed.
"""

from typing import NamedTuple

from bigmodel.config.hardware_settings import HardwareSettings
from bigmodel.metrics.flops import DEVICE_PEAK_FLOPS
from bigmodel.planning.devices import DEVICES, NETWORKS
from bigmodel.planning.part import Row

GB, TERA = 1e9, 1e12
ASSUMED_GPU, ASSUMED_NETWORK = "H100 SXM", "InfiniBand NDR"
# 419 unexpected interruptions in 54 days on 16,384 GPUs: Llama 3, arXiv 2407.21783, table 5.
GPU_HOURS_BETWEEN_FAILURES = round(54 * 24 * 16384 / 419, -2)
# Writing, guideline for 32 nodes: NVIDIA DGX SuperPOD H100 reference architecture, storage performance, "better".
STORAGE_GIGABYTES_PER_SECOND, STORAGE_NODES, LEAST_STORAGE = 20.0, 32, 2.0


class Hardware(NamedTuple):
    """Of one GPU where nothing else is said. Rates in bytes per second, one way."""

    name: str
    nodes: int
    gpus_per_node: int
    memory_gib: float
    peak_flops: float
    achievable: float  # share of the peak: see `bigmodel.planning.devices`
    memory_rate: float
    node_rate: float
    link_rate: float
    storage_rate: float  # of all nodes
    watts: float
    price_per_hour: float  # 0: not given
    failure_seconds: float  # of one GPU: mean time between failures of a job, times its GPUs
    rows: tuple[Row, ...]  # figures with where they come from

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def ring_rate(self) -> float:
        """What a GPU sends in a ring over all ranks: the adapters of a node work at once, NVLink is the other bound."""
        return self.node_rate if self.nodes == 1 else min(self.node_rate, self.gpus_per_node * self.link_rate)

    @property
    def job_failure_seconds(self) -> float:
        """Mean seconds between two failures of the job."""
        return self.failure_seconds / self.ranks


def hardware_of(settings: HardwareSettings, nodes: int, gpus_per_node: int) -> Hardware:
    """A setting above 0 goes before the table's figure."""
    device = DEVICES[settings.gpu or ASSUMED_GPU]
    network = NETWORKS[settings.network or ASSUMED_NETWORK]
    storage = max(LEAST_STORAGE, STORAGE_GIGABYTES_PER_SECOND * nodes / STORAGE_NODES)
    found = Hardware(
        name=settings.gpu or ASSUMED_GPU,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        memory_gib=settings.memory_gib or device.memory_gib,
        peak_flops=TERA * settings.peak_tflops or DEVICE_PEAK_FLOPS[device.torch_name],
        achievable=device.achievable,
        memory_rate=GB * (settings.memory_gigabytes_per_second or device.memory_gigabytes_per_second),
        node_rate=GB * (settings.node_gigabytes_per_second or device.node_gigabytes_per_second),
        link_rate=GB * (settings.link_gigabytes_per_second or network.gigabytes_per_second),
        storage_rate=GB * (settings.storage_gigabytes_per_second or storage),
        watts=settings.watts_per_gpu or device.watts,
        price_per_hour=settings.price_per_gpu_hour,
        failure_seconds=3600 * (settings.hours_between_failures_per_gpu or GPU_HOURS_BETWEEN_FAILURES),
        rows=(),
    )
    return found._replace(rows=tuple(_rows(found, settings)))


def _rows(found: Hardware, settings: HardwareSettings) -> list[Row]:
    device, network = DEVICES[found.name], NETWORKS[settings.network or ASSUMED_NETWORK]
    gpu = device.source if settings.gpu else f"assumed: [hardware] gpu is not set; {device.source}"
    rows = [
        Row("GPU", f"{found.name}, {found.peak_flops / TERA:,.0f} TFLOP/s", _given(settings.peak_tflops, gpu)),
        Row(
            "memory of a GPU",
            f"{found.memory_gib:,.1f} GiB, {found.memory_rate / GB:,.0f} GB/s",
            _given(settings.memory_gib or settings.memory_gigabytes_per_second, device.source),
        ),
        Row(
            "inside a node",
            f"{found.node_rate / GB:,.0f} GB/s",
            _given(settings.node_gigabytes_per_second, device.source) + "; one way",
        ),
    ]
    if found.nodes > 1:
        source = network.source if settings.network else f"assumed: {ASSUMED_NETWORK}, {network.source}"
        note = _given(settings.link_gigabytes_per_second, source) + "; one way"
        rows.append(Row("between nodes, per GPU", f"{found.link_rate / GB:,.1f} GB/s", note))
    return rows


def _given(setting: float, source: str) -> str:
    return "of the cluster file" if setting else source
