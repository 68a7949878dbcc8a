"""ZeRO layouts: this rank's shards of the fp32 state under each stage, in one form.

In: the optimizer that DeepSpeed wrapped around ours. Out: for every parameter, the range of its elements on this rank
and its offset in a *master*, a flat fp32 tensor that the base optimizer updates. Moments have the masters' shape, so
one offset serves weight, moments and gradient. Only this file knows how a stage keeps its state. It depends on
internals of DeepSpeed 0.19.8; therefore that version is pinned, and tests compare every stage with plain torch.

Example, stage 3 on 2 ranks: of a parameter of 10 elements at offset 20, rank 1 has ParameterShard(start=5, numel=5,
master=0, offset=20): elements 20 to 24 of its master 0.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterShard:
    """Elements [start, start + numel) of a flattened parameter lie in a master from `offset` on."""

    start: int
    numel: int
    master: int  # index in `Layout.masters`
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The shard's elements of `flat`, a master, or a moment or gradient of its shape: a view."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


class Layout(Protocol):
    """The masters of one stage and their contents."""

    partitioned: bool  # whether ranks hold different masters; otherwise each rank holds all
    shares_frozen: bool  # whether ranks hold different parts of frozen parameters; otherwise each rank holds all
    offloaded: bool  # whether masters and gradients are on the CPU

    def masters(self) -> list[Tensor]: ...

    def members(self) -> list[list[nn.Parameter]]:
        """For each master, its parameters on any rank, in the same order on all ranks."""
        ...

    def shard(self, parameter: nn.Parameter) -> ParameterShard | None:
        """None if this rank has no element."""
        ...

    def frozen(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        """First element and elements of a frozen parameter on this rank, as a flat view in the forward's precision."""
        ...

    def gradients(self) -> list[list[Tensor]]:
        """For each master, its gradient in chunks, end to end; after the last micro-batch, before the update."""
        ...

    def publish(self) -> None:
        """Copy the masters, rounded, to the weights of the forward pass, on every rank."""
        ...


class Whole:
    """Stage 0, fp32, nothing partitioned: parameters are their own masters."""

    partitioned = offloaded = shares_frozen = False

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._number = {id(parameter): number for number, parameter in enumerate(self._parameters)}

    def masters(self) -> list[Tensor]:
        return list(self._parameters)

    def members(self) -> list[list[nn.Parameter]]:
        return [[parameter] for parameter in self._parameters]

    def shard(self, parameter: nn.Parameter) -> ParameterShard | None:
        return ParameterShard(0, parameter.numel(), self._number[id(parameter)], 0)

    def frozen(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter.detach().view(-1)

    def gradients(self) -> list[list[Tensor]]:
        return [[torch.zeros_like(p) if p.grad is None else p.grad] for p in self._parameters]

    def publish(self) -> None:
        """Nothing to do: the masters are the weights of the forward pass."""


class Runs:
    """Stages 1 and 2: each rank owns one range of a flat master; a parameter may be spread over several ranks."""

    partitioned, shares_frozen = True, False

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._zero = engine.optimizer
        self.offloaded = bool(getattr(self._zero, "cpu_offload", False))

    def masters(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def members(self) -> list[list[nn.Parameter]]:
        return [list(group) for group in self._zero.bit16_groups]

    def shard(self, parameter: nn.Parameter) -> ParameterShard | None:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return ParameterShard(here.start, here.numel, mapping.param_group_index, there.start)

    def frozen(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        return 0, parameter.detach().view(-1)

    def gradients(self) -> list[list[Tensor]]:
        if self.offloaded:
            return [[master.grad] for master in self.masters()]
        return [list(self._zero.averaged_gradients[number]) for number in range(len(self.masters()))]

    def publish(self) -> None:
        self._zero.update_lp_params()


class RunsInBf16(Runs):
    """Stage 1 in bf16 with fp32 sums, DeepSpeed's BF16_Optimizer: each master has one whole gradient tensor. Every rank
    holds all of the gradient, also of other ranks' masters, and takes from it the norm for clipping."""

    def masters(self) -> list[Tensor]:
        return list(self._zero.fp32_groups_flat_partition)

    def members(self) -> list[list[nn.Parameter]]:
        return [list(group) for group in self._zero.bf16_groups]

    def gradients(self) -> list[list[Tensor]]:
        return [[gradient] for gradient in self._zero.fp32_groups_gradient_flat_partition]

    def whole_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Of the shape of the parameter, which is whole too."""
        groups = zip(self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True)
        pairs = (pair for group, gradients in groups for pair in zip(group, gradients, strict=True))
        gradient = next(gradient for member, gradient in pairs if member is parameter)
        return gradient.view(parameter.shape)


class Shares:
    """Stage 3: each rank owns the same share of every parameter, padded at the end."""

    partitioned = shares_frozen = True

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._zero = engine.optimizer
        self.offloaded = bool(self._zero.offload_optimizer)

    def masters(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def members(self) -> list[list[nn.Parameter]]:
        return [list(group) for group in self._zero.fp16_groups]

    def shard(self, parameter: nn.Parameter) -> ParameterShard | None:
        number, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        share = parameter.ds_tensor.numel()
        start = share * self._zero._get_param_partition_rank(parameter)
        numel = min(share, parameter.ds_numel - start)
        return ParameterShard(start, numel, number, offset) if numel > 0 else None

    def frozen(self, parameter: nn.Parameter) -> tuple[int, Tensor]:
        share = parameter.ds_tensor.numel()
        start = min(share * self._zero._get_param_partition_rank(parameter), parameter.ds_numel)
        return start, parameter.ds_tensor.detach().view(-1)[: min(share, parameter.ds_numel - start)]

    def gradients(self) -> list[list[Tensor]]:
        if self.offloaded:
            return [[master.grad] for master in self.masters()]
        return [list(self._zero.averaged_gradients[number]) for number in range(len(self.masters()))]

    def publish(self) -> None:
        """Partitioned weights, persistent (unpartitioned) ones, and hpZ's second copies."""
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        kept_whole = self._zero.persistent_parameters
        if kept_whole:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)
        self._zero.invalidate_secondary_tensor()


LAYOUTS: dict[str, Any] = {
    "DeepSpeedZeroOptimizer": Runs,
    "BF16_Optimizer": RunsInBf16,
    "DeepSpeedZeroOptimizer_Stage3": Shares,
}


def layout_of(engine: Any, optimizer: torch.optim.Optimizer) -> Layout:
    """The layout of DeepSpeed's choice of optimizer; `engine` is DeepSpeed's, `optimizer` the base optimizer."""
    if engine.optimizer is optimizer:
        return Whole(engine, optimizer)
    kind = type(engine.optimizer).__name__
    assert kind in LAYOUTS, f"DeepSpeed chose {kind}, which has no layout in LAYOUTS"
    return LAYOUTS[kind](engine, optimizer)
