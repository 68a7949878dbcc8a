"""Memory plan: bytes on each rank by ZeRO stage, computed without a GPU.

In: settings of a run file, number of ranks. Out: bytes per rank, by part and stage. Frozen parameters (adapters,
`training.freeze`) are weights only. A teacher ([distillation]) is whole on each rank at every stage.
Weights, gradients, masters and moments follow from the parameters' shapes (`bigmodel.planning`). For activations the
model is built on torch's meta device, where tensors have shapes but no memory; they are counted by one micro-batch
forward and backward, with activation checkpointing and the kernels' GPU path; every tensor is followed. Tests compare
the counts with engines of each stage.

Not counted: the CUDA context and libraries (one or two GB), buffers of NCCL, fragmentation of the allocator.
Formulas: Rajbhandari et al. 2020 (ZeRO), plus our fp32 sums of gradients.
"""

import copy
import weakref
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel.config.deepspeed_config import packs_per_micro_batch, resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.store.manifest import MANIFEST, Manifest
from bigmodel.kernels.linear_cross_entropy import CHUNK_BYTES
from bigmodel.kernels.linear_distillation import BLOCK_BYTES
from bigmodel.model.lora import add_adapters
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.teacher import Teacher
from bigmodel.model.transformer import Transformer
from bigmodel.pictures import INK, MEMORY, figure, quiet, title
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.state_memory import WIDE, Plan, is_offloaded, state_plan
from bigmodel.sizes import amount, counted_noun
from bigmodel.training.teacher import divergence_of, teacher_model
from bigmodel.training.trained import choose_trained
from bigmodel.training.zero.wrapping import wrap_blocks

GIB = 2**30
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages made inside the context. `peak`: their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        return out

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def model_without_memory(settings: Settings, vocabulary: int) -> Transformer:
    with torch.device("meta"):
        training = settings.training
        model = build_model(settings.model, vocabulary, training.z_loss, training.label_smoothing)
        add_adapters(model, settings.lora)
    choose_trained(model, settings)
    return model


def teacher_without_memory(settings: Settings, vocabulary: int) -> Teacher | None:
    if settings.distillation.teacher is None:
        return None
    return Teacher(teacher_model(settings, vocabulary, "meta"), vocabulary, divergence_of(settings))


def state_bytes(settings: Settings, effective: dict[str, Any], vocabulary: int, ranks: int) -> Plan:
    """Bytes of a rank between and during steps, without activations."""
    plan = state_plan(parameters_of(settings, vocabulary), settings, effective, ranks)
    if teacher := teacher_without_memory(settings, vocabulary):
        plan.device["teacher"] = sum(one.numel() * one.element_size() for one in teacher.model.parameters())
    return plan


def activation_bytes(settings: Settings, effective: dict[str, Any], vocabulary: int) -> int:
    """Peak bytes of the tensors of one micro-batch, forward and backward, on a GPU."""
    model = model_without_memory(settings, vocabulary).to(TYPES[settings.training.precision])
    wrap_blocks(model, settings.model_copy(update={"training": _eager(settings)}), stage=1)
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        # A gradient is added to the sums or put into a bucket as soon as it is computed.
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    model.teacher = teacher_without_memory(settings, vocabulary)
    batch = _empty_batch(settings, packs_per_micro_batch(effective))
    with LiveBytes() as bytes_:
        model(batch.to("meta")).backward()
    columns = vocabulary * (2 if model.teacher else 1)
    logits = min(CHUNK_BYTES, WIDE * len(batch.tokens) * columns)
    width = TYPES[settings.training.precision].itemsize
    chunk = logits + logits * vocabulary // columns // WIDE * width  # logits and their gradient
    if model.teacher:  # probabilities and logarithms of both models, of a block
        chunk += 4 * min(BLOCK_BYTES, WIDE * len(batch.tokens) * vocabulary)
    return (bytes_.peak + chunk) // settings.training.sequence_parallel_ranks


def _eager(settings: Settings) -> Any:
    return settings.training.model_copy(update={"compile": False})


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _empty_batch(settings: Settings, packs: int) -> Batch:
    data, numbers = settings.data, list(range(packs))
    source_seeds = (
        make_dropout_seeds(0, 0, numbers, data.source_sequence_length, "source")
        if data.source_sequence_length
        else None
    )
    keys = make_dropout_seeds(0, 0, numbers, data.sequence_length)
    return build_batch([()] * packs, _read_nothing, data, keys, source_seeds=source_seeds)


def _read_nothing(shard: Any) -> Any:
    raise AssertionError("an empty pack has no documents")


def plans(settings: Settings, effective: dict[str, Any], vocabulary: int, ranks: int) -> dict[int, Plan]:
    """Plans by ZeRO stage, without the stages that the precision or an offload forbids."""
    activations = activation_bytes(settings, effective, vocabulary)
    found = {}
    for stage in range(4):
        changed = copy.deepcopy(effective)
        zero = changed["zero_optimization"]
        zero["stage"] = stage
        if stage == 0 and (settings.training.precision != "fp32" or is_offloaded(zero, "offload_optimizer")):
            continue
        if stage < 3:
            zero.pop("offload_param", None)
        plan = state_bytes(settings, changed, vocabulary, ranks)
        found[stage] = Plan(plan.device | {"activations": activations}, plan.host)
    return found


def show_memory(
    settings: Settings, ranks: int, device_gib: float, png: Path | None = None, vocabulary: int = 0
) -> None:
    """Print a table with a column per stage; the run's own stage is marked. `png`: draw it too.

    Default of `vocabulary`: that of the prepared data, or `prepare.vocabulary` before data exist.
    """
    effective, settings = resolve_deepspeed(settings, ranks)
    vocabulary = vocabulary or vocabulary_of(settings)
    device_bytes = int(device_gib * GIB)
    by_stage = plans(settings, effective, vocabulary, ranks)
    chosen = effective["zero_optimization"]["stage"]
    sizes = [(one.numel(), one.requires_grad) for one in model_without_memory(settings, vocabulary).parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    of_them = f" ({trained:,} trained)" if trained < parameters else ""
    totals = {stage: sum(plan.device.values()) for stage, plan in by_stage.items()}
    name, unit = ("GiB", GIB) if max(totals.values()) >= GIB else ("MiB", GIB // 1024)
    table = Table(
        f"{name} on each rank",
        *(Column(f"ZeRO {stage}{' (yours)' if stage == chosen else ''}", justify="right") for stage in by_stage),
    )
    for part in MEMORY:
        amounts = [plan.device.get(part, 0) for plan in by_stage.values()]
        if any(amounts):
            table.add_row(part, *(amount(number / unit) if number else "-" for number in amounts))
    table.add_section()
    table.add_row("on the device", *(amount(total / unit) for total in totals.values()), style="bold")
    if device_bytes:
        fits = ("fits" if total < device_bytes else Text("too large", "red") for total in totals.values())
        table.add_row(f"of {device_gib:,g} GiB", *fits)
    if any(plan.host for plan in by_stage.values()):
        table.add_row("off the device", *(amount(sum(p.host.values()) / unit) for p in by_stage.values()))
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(  # no title of the table: it would break at the table's width
        f"{parameters:,} parameters{of_them}, vocabulary {vocabulary:,}, {settings.training.precision}, "
        f"{settings.optimizer.kind},\n{counted_noun(ranks, 'rank')}, "
        f"micro-batches of {packs_per_micro_batch(effective)} x {settings.data.sequence_length:,} tokens",
        soft_wrap=True,
    )
    console.print(table)
    console.print("Not counted: the CUDA context, buffers of NCCL, fragmentation of the allocator.")
    if png:
        draw_memory(by_stage, chosen, device_bytes, png, unit, name)
        console.print(f"picture: {png}", markup=False, soft_wrap=True)


def vocabulary_of(settings: Settings) -> int:
    if (settings.data.directory / MANIFEST).exists():
        return Manifest.read(settings.data.directory).vocabulary + num_special_tokens(settings.data)
    return settings.prepare.vocabulary


def draw_memory(
    by_stage: dict[int, Plan], chosen: int, device_bytes: int, png: Path, unit: int = GIB, name: str = "GiB"
) -> None:
    """A bar per stage, stacked by part; offloaded parts as a hatched bar below."""
    drawn = figure(9, 4.2)
    axes = drawn.subplots()
    bars = [
        (f"ZeRO {stage}{' (yours)' if stage == chosen else ''}", plan.device, "") for stage, plan in by_stage.items()
    ]
    bars += [(f"ZeRO {stage}, off the device", plan.host, "//") for stage, plan in by_stage.items() if plan.host]
    for place, (_, parts, hatch) in enumerate(bars):
        left = 0.0
        for part, colour in MEMORY.items():
            width = parts.get(part, 0) / unit
            axes.barh(place, width, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            left += width
        axes.annotate(f" {amount(left)}", (left, place), va="center", fontsize=9)
    used = [part for part in MEMORY if any(parts.get(part) for _, parts, _ in bars)]
    for part in used:
        axes.barh(0, 0, color=MEMORY[part], label=part)
    if device_bytes:
        axes.axvline(device_bytes / unit, color=INK, linewidth=1.5, linestyle=(0, (5, 3)))
        axes.annotate("device", (device_bytes / unit, -0.6), color=INK, fontsize=9, ha="center")
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    title(axes, "Memory of a rank by ZeRO stage")
    axes.set_xlabel(f"{name} on each rank")
    axes.margins(x=0.08)
    quiet(axes, "x")
    drawn.legend(frameon=False, ncols=4, loc="outside lower center", fontsize=9)
    drawn.savefig(png)
