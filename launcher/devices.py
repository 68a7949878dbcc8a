"""Devices: the GPUs that are visible to a rank, and a check that there are enough.

All GPUs of a node's allocation are visible to each of its ranks, in the same order; a rank uses the one with number
LOCAL_RANK. Reasons: DeepSpeed selects device LOCAL_RANK, and NCCL copies directly between two GPUs of a node only if a
process may open the other's GPU. If SLURM gives each task one GPU (--gpus-per-task, --gpu-bind), that is kept, and the
trainer uses it. Pure functions; not yet run on a machine with GPUs.
"""

from collections.abc import Mapping, Sequence

from bigmodel.config.settings import UserError


def given_devices(device_files: Sequence[str], visible: str | None) -> list[str]:
    """A node's GPUs under the names that CUDA accepts: numbers, or those in CUDA_VISIBLE_DEVICES (`visible`).

    device_files: the names in /dev. As in CUDA, the list ends at -1.
    """
    numbers = [name.removeprefix("nvidia") for name in device_files if name.removeprefix("nvidia").isdecimal()]
    if visible is None:
        return sorted(numbers, key=int)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    chosen = names[: names.index("-1")] if "-1" in names else names
    return chosen[: len(numbers)]


def device_variables(
    device_files: Sequence[str], local_size: int, host: str, environment: Mapping[str, str]
) -> dict[str, str]:
    """Variables for each of the `local_size` ranks of a node, given their inherited environment; empty without GPUs.

    GPUs are in PCI bus order, as in nvidia-smi, SLURM and our processor binding; CUDA's default puts the fastest first.
    Raises `UserError` for more ranks than devices.
    """
    names = given_devices(device_files, environment.get("CUDA_VISIBLE_DEVICES"))
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    has_its_own = len(names) == 1 and on_node.isdecimal() and int(on_node) >= local_size
    if names and len(names) < local_size and not has_its_own:
        raise UserError(
            f"{local_size} ranks on {host}, with {len(names)} visible GPU(s) ({','.join(names)}): each rank needs its "
            "own; start fewer ranks per node, or make more GPUs visible (CUDA_VISIBLE_DEVICES, srun's --gpu-bind)"
        )
    order = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return {"CUDA_DEVICE_ORDER": order, "CUDA_VISIBLE_DEVICES": ",".join(names)} if names else {}
