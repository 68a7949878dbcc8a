"""Activations counted: the tensors of one micro-batch, on torch's meta device. What the plan is held against.

In: settings of a run file. Out: bytes per rank. The model is built where tensors have shapes but no memory; one
micro-batch runs forward and backward, with activation checkpointing and the kernels' GPU path. Every
tensor is followed. The formulas of `bigmodel.planning`, which need no torch, are within 5%
of it, by a test.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel.config.deepspeed_config import packs_per_micro_batch
from bigmodel.config.settings import Settings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.kernels.linear_cross_entropy import CHUNK_BYTES
from bigmodel.kernels.linear_distillation import BLOCK_BYTES
from bigmodel.model.lora import add_adapters
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.teacher import Teacher
from bigmodel.model.transformer import Transformer
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.state_memory import WIDE, Plan, state_plan
from bigmodel.training.teacher import divergence_of, teacher_model
from bigmodel.training.trained import choose_trained
from bigmodel.training.zero.wrapping import wrap_blocks

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
    return bytes_.peak + chunk


def _eager(settings: Settings) -> Any:
    return settings.training.model_copy(update={"compile": False})


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _empty_batch(settings: Settings, packs: int) -> Batch:
    """What one rank has of them: of shared packed sequences its part."""
    data, numbers = settings.data, list(range(packs))
    length = data.sequence_length // settings.training.ranks_per_sequence
    data = data.model_copy(update={"sequence_length": length})
    source_seeds = (
        make_dropout_seeds(0, 0, numbers, data.source_sequence_length, "source")
        if data.source_sequence_length
        else None
    )
    keys = make_dropout_seeds(0, 0, numbers, data.sequence_length)
    return build_batch([()] * packs, _read_nothing, data, keys, source_seeds=source_seeds)


def _read_nothing(shard: Any) -> Any:
    raise AssertionError("an empty pack has no documents")
