"""Devices: which GPUs a rank sees, and that there is one for it.

Every rank of a node sees all GPUs that the node was given, in one order, and takes the one numbered LOCAL_RANK. Not one
GPU per rank: DeepSpeed selects the device numbered LOCAL_RANK, and NCCL copies between two GPUs of a node directly only
where a process may open its neighbour's. Where SLURM has shut every task in with a GPU of its own (--gpus-per-task,
--gpu-bind) that is kept; the trainer then takes its only one. Pure functions; none has been run beside a GPU.
"""

from collections.abc import Mapping, Sequence

from bigmodel.config.settings import UserError


def given_devices(device_files: Sequence[str], visible: str | None) -> list[str]:
    """The names of a node's GPUs as CUDA takes them: numbers, or what CUDA_VISIBLE_DEVICES (`visible`) leaves of them.

    `device_files`: the names in /dev. As for CUDA, the list ends at -1.
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
    """What to set for each of `local_size` ranks of a node, given the environment that they inherit; empty: no GPU.

    The order is that of the PCI bus, by which nvidia-smi, SLURM and the binding to processors count; CUDA by itself
    puts the fastest first. Raises `UserError` for more ranks than devices.
    """
    names = given_devices(device_files, environment.get("CUDA_VISIBLE_DEVICES"))
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    has_its_own = len(names) == 1 and on_node.isdecimal() and int(on_node) >= local_size
    if names and len(names) < local_size and not has_its_own:
        raise UserError(
            f"{local_size} ranks on {host}, where each sees {len(names)} GPU(s) ({','.join(names)}): a rank needs one "
            "of its own; start fewer per node, or give the node more (see CUDA_VISIBLE_DEVICES, and srun's --gpu-bind)"
        )
    order = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return {"CUDA_DEVICE_ORDER": order, "CUDA_VISIBLE_DEVICES": ",".join(names)} if names else {}
