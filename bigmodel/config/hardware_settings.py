"""Section `[hardware]` of a cluster file: devices, links, storage, price and failures, for `bigmodel plan`."""

import difflib

from pydantic import Field, ValidationInfo, field_validator

from bigmodel.config.sections import Section
from bigmodel.planning.devices import DEVICES, NETWORKS

LEAST, MOST = 1e-6, 1e12  # of a figure above 0: quotients and products stay numbers


class HardwareSettings(Section):
    """Devices and links, for `bigmodel plan` alone. `gpu` and `network` give the figures; a setting above 0 replaces
    one."""

    gpu: str = Field("", description=f"{', '.join(DEVICES)}; empty: H100 SXM is assumed")
    network: str = Field(
        "", description=f"between nodes: {', '.join(NETWORKS)}; empty: InfiniBand NDR is assumed where nodes > 1"
    )
    memory_gib: float = Field(0, ge=0, description="memory of a GPU")
    memory_gigabytes_per_second: float = Field(0, ge=0, description="bandwidth of a GPU's memory")
    peak_tflops: float = Field(0, ge=0, description="dense bf16 matrix products of a GPU")
    node_gigabytes_per_second: float = Field(0, ge=0, description="of a GPU to the others of its node, one way")
    link_gigabytes_per_second: float = Field(0, ge=0, description="of a GPU to other nodes, one way")
    storage_gigabytes_per_second: float = Field(
        0, ge=0, description="writing of checkpoints, all nodes together; 0: 20 for each 32 nodes, 2 at least"
    )
    watts_per_gpu: float = Field(0, ge=0, description="power of a GPU at work; 0: its thermal design power (TDP)")
    price_per_gpu_hour: float = Field(0, ge=0, description="in your currency; 0: money is not computed")
    hours_between_failures_per_gpu: float = Field(
        0, ge=0, description="mean time between unexpected failures of a job, times its GPUs; 0: 50,700, of Llama 3"
    )

    @field_validator("*")
    @classmethod
    def _is_a_size(cls, value: str | float, info: ValidationInfo) -> str | float:
        if isinstance(value, float) and value > 0 and not LEAST <= value <= MOST:
            raise ValueError(
                f"hardware.{info.field_name} = {value:g}: must be between {LEAST:g} and {MOST:g}, or 0: not given"
            )
        return value

    @field_validator("gpu", "network")
    @classmethod
    def _is_known(cls, value: str, info: ValidationInfo) -> str:
        known = list(DEVICES if info.field_name == "gpu" else NETWORKS)
        if value and value not in known:
            by_letters = {one.casefold(): one for one in known}
            near = difflib.get_close_matches(value.casefold(), list(by_letters), n=1, cutoff=0.4)
            hint = f"did you mean {by_letters[near[0]]!r}? " if near else ""
            raise ValueError(f"hardware.{info.field_name} = {value!r} is not known; {hint}known: {', '.join(known)}")
        return value
