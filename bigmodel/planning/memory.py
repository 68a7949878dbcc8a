"""Bytes on each GPU by part, at the run's ZeRO stage and at the others. Imports no torch.

In: a `Context`. Out: bytes by part, on the device and offloaded to its node. Weights, gradients, masters, moments and
buffers: `state_memory` (within 1% of engines, by a test). Activations and loss buffers: `activation_memory` (within 5%
of the tensors that the code makes, by a test). A teacher is whole on each rank. Framework and fragmentation margin are
estimates, the same for every model: what they stand on is beside each.
"""

import copy
from typing import Any

from bigmodel.config.deepspeed_config import packs_per_micro_batch
from bigmodel.config.distillation_settings import DistillationSettings
from bigmodel.config.lora_settings import LoraSettings
from bigmodel.config.parallel_settings import degrees_of
from bigmodel.config.settings import Settings, UserError
from bigmodel.config.start_folder import model_of
from bigmodel.planning.activation_memory import Taught, activation_parts
from bigmodel.planning.context import Context
from bigmodel.planning.parameters import active_of, parameters_of
from bigmodel.planning.part import Part, Row
from bigmodel.planning.state_memory import Plan, bytes_of, is_offloaded, state_plan
from bigmodel.sizes import amount, counted_noun
from bigmodel.training.optimizers.table import OPTIMIZERS

GIB = 2**30
# A process with torch's kernels on a GPU before its first tensor: 781 MB by nvidia-smi (pytorch issue 34323).
CUDA_CONTEXT = 800_000_000
# NCCL's first communicator after an all-reduce: 1.6 GB (NVIDIA/nccl issue 864; 0.69 GB on 4 A100: issue 964).
COMMUNICATOR = 1_600_000_000
# What a first all-to-all adds on 8 H100: 4.34 - 1.06 GB (NVIDIA/nccl issue 1685).
ALL_TO_ALL = 3_280_000_000
FRAGMENTATION = 0.05  # of all tensors: an assumption, not measured on our runs
PARTS = {  # in the order of every table, with what each holds
    "weights": "in the run's precision",
    "teacher": "whole on each GPU",
    "gathered weights": "whole layers on their way through ZeRO 3",
    "gradients": "sums in fp32",
    "reduce buckets": "of DeepSpeed, in fp32",
    "masters": "fp32 weights",
    "moments": "of the optimizer, fp32",
    "average of weights": "training.ema_decay",
    "activations": "at the peak of a micro-batch",
    "loss buffers": "logits of a chunk, gradients of head and states",
    "framework": "CUDA context 0.8 GB, NCCL 1.6 GB, all-to-all 3.3 GB: estimates",
    "fragmentation": f"{FRAGMENTATION:.0%} of the tensors: an assumption",
}


def memory_of(context: Context) -> Plan:
    """Bytes of one GPU by part, as the run's settings and DeepSpeed JSON are. Raises `UserError` for a bad teacher."""
    settings, effective = context.settings, context.effective
    plan = state_plan(parameters_of(settings, context.vocabulary), settings, effective, context.ranks)
    device, taught = dict(plan.device), None
    if settings.distillation.teacher:
        taught, device["teacher"] = _teacher(settings)
    device |= activation_parts(settings, context.vocabulary, packs_per_micro_batch(effective), taught)
    device["fragmentation"] = int(FRAGMENTATION * sum(device.values()))
    device["framework"] = CUDA_CONTEXT
    if context.ranks > 1:
        shares = settings.training.sharing_ranks > 1
        device["framework"] += COMMUNICATOR * (1 + shares) + ALL_TO_ALL * shares
    return Plan({name: device[name] for name in PARTS if device.get(name)}, plan.host)


def stages_of(context: Context) -> dict[str, Context]:
    """The run at each ZeRO stage that its precision and optimizer allow, and from stage 2 on with the optimizer's state
    in the memory of the node; its own is marked."""
    zero, precision = context.effective["zero_optimization"], context.settings.training.precision
    row, found = OPTIMIZERS[context.settings.optimizer.kind], {}
    own = (zero["stage"], is_offloaded(zero, "offload_optimizer"))
    for stage, offloads in [(stage, offloads) for offloads in (False, True) for stage in row.stages]:
        name = f"ZeRO {stage}{', offload' if offloads else ''}"
        offered = stage > 1 and "cpu" in row.offloads if offloads else stage > 0 or precision == "fp32"
        if (stage, offloads) == own:
            found[f"{name} (yours)"] = context
        elif offered:
            found[name] = at_stage(context, stage, offloads)
    return found


def at_stage(context: Context, stage: int, offloads: bool) -> Context:
    """The same run at another stage, with or without its optimizer's state in the memory of the node."""
    effective = copy.deepcopy(context.effective)
    zero = effective["zero_optimization"]
    zero["stage"] = stage
    if stage < 3 or not offloads:
        zero.pop("offload_param", None)
    if offloads != is_offloaded(zero, "offload_optimizer"):
        zero["offload_optimizer"] = {"device": "cpu" if offloads else "none"}
    return context._replace(effective=effective)


def memory_part(context: Context) -> Part:
    """Of the run as it is; `numbers["by_stage"]` has the other stages. Rows are in GiB, or in MiB for a small model."""
    plan = memory_of(context)
    total = sum(plan.device.values())
    name, unit = unit_of(tensors_of(plan))
    rows = [Row(part, f"{amount(number / unit)} {name}", PARTS[part]) for part, number in plan.device.items()]
    rows.append(Row("on each GPU", f"{amount(total / unit)} {name}"))
    if plan.host:
        node = sum(plan.host.values()) * context.cluster.ranks_on_node
        rows.append(Row("in the memory of a node", f"{amount(node / unit)} {name}", "offloaded, of all its ranks"))
    numbers: dict[str, Any] = _numbers(plan)
    numbers["by_stage"] = {stage: _numbers(memory_of(other)) for stage, other in stages_of(context).items()}
    return Part("memory of each GPU", rows, numbers)


def tensors_of(plan: Plan) -> int:
    """Bytes on the device without the framework's."""
    return sum(plan.device.values()) - plan.device.get("framework", 0)


def unit_of(number: float) -> tuple[str, int]:
    """Name and bytes of the unit that shows `number` well."""
    return ("GiB", GIB) if number >= GIB else ("MiB", GIB // 1024)


def headlines(context: Context) -> list[str]:
    """What is planned, in lines of less than 80 columns: the model, how it is trained, and degrees if ranks share."""
    settings = context.settings
    parameters = parameters_of(settings, context.vocabulary)
    numel = sum(one.numel for one in parameters)
    trained = sum(one.numel for one in parameters if one.is_trained)
    parts = [f"{active_of(parameters, settings):,} active"] if settings.model.experts else []
    parts += [f"{trained:,} trained"] if trained < numel else []
    of_them = f" ({', '.join(parts)})" if parts else ""
    degrees = degrees_of(settings.training)
    size = f"{packs_per_micro_batch(context.effective)} x {settings.data.sequence_length:,} tokens"
    return [
        f"{numel:,} parameters{of_them}, vocabulary {context.vocabulary:,}",
        f"{settings.training.precision}, {settings.optimizer.kind}, {counted_noun(context.ranks, 'rank')}, "
        f"micro-batches of {size}",
        *([degrees] if degrees else []),
    ]


def _numbers(plan: Plan) -> dict[str, Any]:
    parts = {f"{part.replace(' ', '_')}_bytes": number for part, number in plan.device.items()}
    return {"device": parts, "device_bytes": sum(plan.device.values()), "host_bytes": sum(plan.host.values())}


def _teacher(settings: Settings) -> tuple[Taught, int]:
    """What a micro-batch sees of the teacher, and its bytes."""
    folder = settings.distillation.teacher
    assert folder is not None, "a run without a teacher"
    try:
        theirs, rows, _ = model_of(folder)
    except UserError as error:
        raise UserError(f"distillation.teacher = {folder}: {error}") from None
    width = bytes_of(settings.distillation.precision or settings.training.precision)
    theirs = theirs.model_copy(update={"num_mtp_modules": 0})
    alone = {"model": theirs, "lora": LoraSettings(), "distillation": DistillationSettings()}
    numel = sum(one.numel for one in parameters_of(settings.model_copy(update=alone), rows))
    return Taught(theirs, width), width * numel
