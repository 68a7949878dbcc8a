"""The engine: a model and its update under DeepSpeed ZeRO. The only file that imports deepspeed.

In: a model whose forward gives a summed loss; micro-batches. Out: loss sums, the global gradient norm, updated
weights. Guarantees, for ZeRO 0 to 3:
- the gradient is that of (sum of all losses of the step) / (number of all labels of the step), for any number of ranks
  and micro-batches: the loss is a sum, divided once by a count from the plan;
- gradients are accumulated in fp32, also under bf16 and fp16;
- the norm is known before the update and equal on all ranks; a skipped update leaves weights and moments bitwise
  unchanged;
- parameters without `requires_grad` are frozen: no gradient, no master, no optimizer state, no part in the norm; their
  state is the weight in the precision of the forward pass;
- state is read and written by name of a parameter or buffer, in fp32, exactly: a checkpoint depends on neither ranks
  nor stages. Each rank gives its own part, without communication.
Costs: DeepSpeed's own, without its copies and sums of gradients on one rank. bigmodel/training/zero/layouts.py knows
where each stage keeps its state.

Example: 2 ranks with 2 micro-batches each, of 3, 5, 4 and 0 labels. Each call is micro_batch(batch, num_labels=12,
last=...); the gradient is that of (sum of 12 losses) / 12, as on one rank with one batch.
"""

import contextlib
import io
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmodel.config.deepspeed_config import QUANTIZED, for_deepspeed, state_folder
from bigmodel.config.deepspeed_json import value_at
from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.metrics.phases import Phases
from bigmodel.training.optimizers.groups import build_optimizer, expert_group, states_of
from bigmodel.training.optimizers.shards import Part, Shards
from bigmodel.training.optimizers.table import OPTIMIZERS, STEP
from bigmodel.training.slices import Place, Slice, parts_of
from bigmodel.training.zero.context_parallel import sequence_of
from bigmodel.training.zero.examine import first_nonfinite, squared_gradients
from bigmodel.training.zero.expert_parallel import ExpertParallel, cut, made_whole
from bigmodel.training.zero.held_zeros import HeldZeros
from bigmodel.training.zero.layouts import ParameterShard, layout_of
from bigmodel.training.zero.mmap_state import MappedFiles
from bigmodel.training.zero.tensor_parallel import TensorParallel
from bigmodel.training.zero.wrapping import hide_gathers, wrap_blocks

WEIGHT, AVERAGE = "weight", "ema"  # keys of the state, in addition to the optimizer's
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # state of DeepSpeed's loss scaler
MARK = "shares_parameters"  # name of a module
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "wait",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single", "barrier",
)  # fmt: skip

# Elements at a time in fp64. On a CPU the copy of a part stays in the cache: 4 million elements take 5 ms, not 46.
PART, PART_ON_CPU = 1 << 24, 1 << 16

# The first element in the flattened tensor, or a `Place` of several ranges; and the elements: fp32, one-dimensional.
Piece = tuple[int | Place, Tensor]


class Engine:
    """One model in training. Construction is collective, and so are its methods, except `owned` and those that need no
    tensor.

    updates: the number of updates applied since initialization, without skipped ones. buffers: of the model, by name,
    equal on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        effective: dict[str, Any],
        world: World,
        phases: Phases | None = None,
    ) -> None:
        self.world = world
        self.phases = phases or Phases(world.device)
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}
        stage = effective["zero_optimization"]["stage"]
        self._shared = _share(model, settings, stage, world, self.phases)
        self._tensors = self._shared if isinstance(self._shared, TensorParallel) else None
        self._slices: dict[str, Slice] = self._shared.slices if self._shared else {}
        self._shapes |= {name: one.shape for name, one in self._slices.items()}
        wrap_blocks(model, settings, stage)
        self._optimizer = build_optimizer(model, settings.optimizer)
        states = {
            id(parameter): states_of(settings.optimizer, group)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._states = {name: states[id(parameter)] for name, parameter in self._trained.items()}
        self._engine = _initialize(model, self._optimizer, effective, settings, self._shared)
        _time_communication(self.phases)
        _reduce_nothing_on_one_rank(self._engine.optimizer, world.size)
        if offload := getattr(self._engine.optimizer, "parameter_offload", None):  # ZeRO-3
            hide_gathers(offload)
        self._layout = layout_of(self._engine, self._optimizer)
        if self._shared and not self._layout.partitioned:
            self._engine.clip_fp32_gradients = self._clip
        self._shards = {name: self._layout.shard(parameter) for name, parameter in self._trained.items()}
        self._names = {id(parameter): name for name, parameter in self._trained.items()}
        self.buffers = dict(self._engine.module.named_buffers())  # loads and biases of experts
        self._shapes |= {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}
        self._squares: dict[int, Tensor] = {}  # of the gradients of the step, by id: `gradient_norm`
        if world.device.type == "cpu":
            _norm_from_squares(self._engine.optimizer, self._squares)
        self._sequence = sequence_of(settings, world, self.phases)
        self._compiles = settings.training.compile
        self._norm: float | None = None
        self._zeros: HeldZeros | None = None
        self._ema_decay = settings.training.ema_decay
        self._averages: list[Tensor] = []
        self._vectors: dict[str, dict[str, Tensor]] = {name: {} for name in self._parameters}  # replicated on all ranks
        self._counts_collectives = bool(value_at(effective, "comms_logger.enabled"))
        folder = state_folder(effective)
        self._make_states(MappedFiles(folder).place if folder else lambda tensor: tensor)
        if OPTIMIZERS[settings.optimizer.kind].crosses_ranks:
            self._optimizer.shards = Shards(self._whole_matrices, self._parts, self._sum)

    def micro_batch(self, batch: Any, num_labels: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; gives its loss sum, or one sum per loss group, detached.

        num_labels: of the whole step, over all ranks and micro-batches, or the sum of their weights. last: this rank's
        last micro-batch of the step.
        DeepSpeed averages over ranks, hence the factor world size; its division by the number of micro-batches is off.
        """
        assert num_labels > 0, "a step needs at least one label"
        self._engine.set_gradient_accumulation_boundary(last)
        with self._sequence.shared() if self._sequence else contextlib.nullcontext():
            with self.phases("forward"):
                loss_sum = self._engine(self._sequence.share(batch) if self._sequence else batch)
            with self.phases("backward"):
                self._engine.backward(loss_sum.sum() * (self.world.size / num_labels), scale_wrt_gas=False)
        self._norm = None
        return loss_sum.detach()

    def gradient_norm(self) -> float:
        """The global L2 norm of the gradient, before clipping, after the last micro-batch; may be inf or nan."""
        if self._zeros:
            self._zeros.drop_gradients()
        by_master = self._layout.gradients()
        gradients = [chunk for chunks in by_master for chunk in chunks]
        self._squares.clear()
        self._squares.update((id(gradient), sum_of_squares(gradient)) for gradient in gradients)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for square in self._squares.values():
            total += square.to(total.device)
        squares = float(total)
        (of_ranks,) = self.world.sum_([squares])
        if not self._layout.partitioned and self._shared and math.isfinite(of_ranks):
            squares = self._squares_of_replicas(by_master)
        elif self._layout.partitioned or not math.isfinite(of_ranks):  # replicas: also what only one has spoilt
            squares = of_ranks
        self._norm = math.sqrt(squares) / self.loss_scale
        return self._norm

    def _squares_of_replicas(self, gradients: list[list[Tensor]]) -> float:
        """The square of the norm at stage 0, where ranks hold different experts, or parts of matrices, and the rest
        alike."""
        assert self._shared, "without shared parameters all ranks hold all"
        ours = {id(parameter) for parameter in self._shared.parameters}
        of_shared, rest = 0.0, 0.0
        for members, chunks in zip(self._layout.members(), gradients, strict=True):
            squares = math.fsum(float(self._squares[id(chunk)]) for chunk in chunks)
            if id(members[0]) in ours:
                of_shared += squares if self.world.rank < self._shared.size else 0.0  # once of each part
            else:
                rest += squares
        return rest + self.world.sum_([of_shared])[0]

    def _clip(self) -> None:
        """Clip at stage 0 by the norm over all ranks' parts; DeepSpeed's own takes the mean of the ranks' norms."""
        limit = self._engine.gradient_clipping()
        assert self._norm is not None, "the norm comes before the update"
        factor = min(1.0, limit / (self._norm + 1e-6))
        for chunks in self._layout.gradients():
            for chunk in chunks:
                chunk.mul_(factor)

    def gradient(self, name: str) -> Tensor:
        """The whole gradient of a trained parameter, in fp32, after the last micro-batch and before the update."""
        shard, chunks = self._shards[name], self._layout.gradients()
        flat = None if shard is None else torch.cat([chunk.flatten() for chunk in chunks[shard.master]])
        chunk = None if shard is None or flat is None else shard.of(flat).detach().float()
        return self._assemble(name, shard, chunk) / self.loss_scale

    def update(
        self,
        learning_rate: float,
        skip: bool = False,
        betas: tuple[float, float] | None = None,
        row_factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Clip as configured and apply one update; `skip` drops the gradient, and in fp16 lowers the loss scale.
        `betas` replace those of the optimizer. `row_factors`, equal on all ranks: by parameter name a factor of each
        row of the updated weight.
        """
        assert self._norm is not None, "gradient_norm() comes after the last micro-batch and before update()"
        assert skip or math.isfinite(self._norm), f"an update with gradient norm {self._norm} must be skipped"
        lowers = skip and not math.isfinite(self._norm)
        assert not (lowers and self.is_at_smallest_scale), "the loss scale cannot be lowered: stop the run"
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
            if betas:
                group["betas"] = betas
        with _frozen(self._optimizer) if skip else contextlib.nullcontext():
            self._engine.step()
        assert skip or not getattr(self._engine.optimizer, "overflow", False), "DeepSpeed skipped a finite step"
        self.updates += 0 if skip else 1
        self._norm = None
        if row_factors and not skip:
            self._scale_rows(row_factors)
        if not skip and self._averages:
            masters = [master.detach() for master in self._layout.masters()]
            torch._foreach_lerp_(self._averages, masters, 1.0 - self._ema_decay)

    @torch.no_grad()
    def _scale_rows(self, row_factors: Mapping[str, Tensor]) -> None:
        for name, factor_R in row_factors.items():
            if (shard := self._shards[name]) is not None:
                elements = shard.of(self._flat(shard, WEIGHT))
                scale_rows(elements, shard.start, math.prod(self._shapes[name][1:]), factor_R.to(elements.device))
        self._layout.publish()

    def examine(self, batch: Any, num_labels: float) -> str:
        """Compute a micro-batch of the step again and name where it is not finite: see `first_nonfinite`. Collective;
        no effect on training."""
        with self._sequence.shared() if self._sequence else contextlib.nullcontext():
            mine = self._sequence.share(batch) if self._sequence else batch
            return first_nonfinite(self._engine.module, mine, self.world.size / num_labels)

    def squared_gradients(self, batch: Any, num_labels: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss sum of a batch of this rank, and by parameter the squares of its share of the step's gradient: see
        `examine.squared_gradients`. Collective; no effect on training."""
        scale = self.loss_scale
        loss_sum, squares = squared_gradients(self._engine.module, batch, scale / num_labels)
        return loss_sum, {name: square / scale**2 for name, square in squares.items()}

    @torch.no_grad()
    def forward(self, batch: Any, output: str = "loss_sum") -> Tensor:
        """The model's output in evaluation mode, without gradients; no effect on training."""
        run = partial(evaluated, self._engine, output=output, compiled=self._compiles)
        return self._tensors.in_turn(run, batch) if self._tensors else run(batch)

    def report_collectives(self) -> None:
        """Print DeepSpeed's table of all collectives so far, if the JSON's `comms_logger` is on. Collective."""
        if self._counts_collectives:
            from deepspeed import comm

            comm.log_summary()

    @property
    def deepspeed_norm(self) -> float | None:
        """DeepSpeed's own gradient norm of the last update, by which it clips; None at stage 0."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode: dropout is on."""
        return self._engine.module.training

    @property
    def loss_scale(self) -> float:
        """The factor of the loss in fp16; 1 in bf16 and fp32."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    @property
    def scales_loss(self) -> bool:
        """Whether the loss scale is dynamic: it may cause a non-finite gradient, and `update(skip=True)` lowers it."""
        return bool(self.scaler_state())

    @property
    def is_at_smallest_scale(self) -> bool:
        """Whether the dynamic loss scale of fp16 cannot be lowered again."""
        if not self.scales_loss:
            return False
        scaler = self._engine.optimizer.loss_scaler
        return bool(scaler.cur_scale <= scaler.min_scale and scaler.cur_hysteresis <= 1)

    # --- the state, by parameter name

    def names(self) -> list[str]:
        """Names of parameters, in the model's order, then of buffers; tied weights appear once."""
        return [*self._parameters, *self.buffers]

    def trained(self) -> list[str]:
        """Names of the parameters that are not frozen."""
        return list(self._trained)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape, on every rank."""
        return self._shapes[name]

    def keys(self, name: str) -> list[str]:
        """Keys of a parameter's state: "weight"; if it is trained, the optimizer's states, and "ema" for averages."""
        if name not in self._trained:
            return [WEIGHT]
        states = [state.key for state in self._states[name] if state.shape != "number"]
        return [WEIGHT, *states, *([AVERAGE] if self._averages else [])]

    @torch.no_grad()
    def owned(self, name: str) -> dict[str, Piece]:
        """By key, the elements that this rank owns, as views; a key without such elements is absent.

        Each element has exactly one owner.
        """
        chunks = {}
        for key, (first, elements) in self._held(name).items():
            if self._is_replicated(name, key):  # each rank that holds them owns a share
                copy, copies = self._copies(name)
                edges = [elements.numel() * number // copies for number in (copy, copy + 1)]
                first, elements = first + edges[0], elements[edges[0] : edges[1]]
            if elements.numel():
                chunks[key] = (self._place(name, first), elements)
        return chunks

    @torch.no_grad()
    def write(self, read: Callable[[str, str, int, int], Tensor], updates: int, scaler: dict[str, float]) -> None:
        """Replace the whole state. Collective.

        read(name, key, start, numel): these elements of the flattened tensor in fp32; called for this rank's elements.
        """
        for name in self.names():
            for key, (first, elements) in self._held(name).items():
                self._fill(name, first, elements, partial(read, name, key))
        for master in self._layout.masters():
            if STEP.key in self._optimizer.state[master]:
                self._optimizer.state[master][STEP.key].fill_(float(updates))
        self._layout.publish()
        self.updates = updates
        for name, value in scaler.items():
            setattr(self._engine.optimizer.loss_scaler, name, value)

    @torch.no_grad()
    def write_weights(self, names: Iterable[str], read: Callable[[str, int, int], Tensor]) -> None:
        """Replace weights and their averages. Collective.

        read(name, start, numel): these elements of the flattened weight in fp32; called for this rank's elements.
        """
        for name in names:
            for key, (first, elements) in self._held(name).items():
                if key in (WEIGHT, AVERAGE):
                    self._fill(name, first, elements, partial(read, name))
        self._layout.publish()

    def hold_zeros(self, names: Iterable[str]) -> None:
        """From now on, elements of these weights that are 0 stay 0 in every update, and have no gradient."""
        self._zeros = HeldZeros(self._layout, self._optimizer, [self._trained[name] for name in names])

    @torch.no_grad()
    def set_to_zero(self, name: str, where: Tensor) -> None:
        """Zero elements of a weight and of its average; the forward pass sees it after `publish`. where: flat, of the
        whole weight."""
        for key, (first, elements) in self._held(name).items():
            if key in (WEIGHT, AVERAGE):
                elements.view(-1).masked_fill_(self._taken(name, where, first, elements.numel()).to(elements.device), 0)

    def publish(self) -> None:
        """Copy the masters to the weights of the forward pass. Collective."""
        with torch.no_grad():
            self._layout.publish()

    def scaler_state(self) -> dict[str, float]:
        """The state of dynamic loss scaling in fp16; otherwise empty."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return {}
        return {name: getattr(scaler, name) for name in LOSS_SCALER}

    @torch.no_grad()
    def whole(self, name: str, key: str) -> Tensor:
        """A whole tensor of a parameter's state, in fp32, copied to every rank. Collective."""
        if name in self.buffers:
            return self.buffers[name].clone()
        if key in self._vectors[name]:
            return self._vectors[name][key].clone()
        if name not in self._trained:
            return self._whole_frozen(name)
        shard = self._shards[name]
        chunk = None if shard is None else shard.of(self._flat(shard, key))
        return self._assemble(name, shard, chunk)

    def alike(self, whole_state: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of what all ranks hold alike: whole weights of the forward pass, buffers of the model; and
        with `whole_state` the optimizer's state and averages that a checkpoint takes from several ranks."""
        for name, parameter in self._parameters.items():
            if getattr(parameter, "ds_persist", True) and name not in self._slices:  # else ranks hold different parts
                yield name, parameter.detach()
        yield from self._engine.module.named_buffers()
        for name in self._trained if whole_state else ():
            for key, (_, elements) in self.held(name).items():
                if key != WEIGHT and name not in self._slices and self._is_replicated(name, key):
                    yield f"{key} of {name}", elements

    def _whole_frozen(self, name: str) -> Tensor:
        start, elements = self._layout.frozen(self._parameters[name])
        if self._is_replicated(name, WEIGHT) and name not in self._slices:
            return elements.float().view(self._shapes[name]).clone()
        shard = ParameterShard(start, elements.numel(), -1, 0) if elements.numel() else None
        return self._assemble(name, shard, elements.float())

    def state_tensors(self) -> list[Tensor]:
        """All tensors that offloading moves off the device: masters, their gradients, moments, averages; no copies."""
        masters = self._layout.masters()
        moments = [self._optimizer.state[master] for master in masters]
        return [
            *masters,
            *(master.grad for master in masters if master.grad is not None),
            *(tensor for state in moments for name, tensor in state.items() if name != "step"),
            *self._averages,
        ]

    @property
    def holds_all(self) -> bool:
        """Whether this rank alone holds the whole state."""
        return not self._layout.partitioned and not self._layout.shares_frozen and not self._slices

    @torch.no_grad()
    def held(self, name: str) -> dict[str, Piece]:
        """By key, this rank's elements of a parameter's state, as views."""
        return {key: (self._place(name, first), elements) for key, (first, elements) in self._held(name).items()}

    def _held(self, name: str) -> dict[str, tuple[int, Tensor]]:
        """`held`, counted from the first element of this rank's slice."""
        if name in self.buffers:
            return {WEIGHT: (0, self.buffers[name].view(-1))}
        if name not in self._trained:
            return {WEIGHT: self._layout.frozen(self._parameters[name])}
        shard, held = self._shards[name], {key: (0, vector) for key, vector in self._vectors[name].items()}
        if shard is not None:
            for key in [key for key in self.keys(name) if key not in held]:
                held[key] = (shard.start, shard.of(self._flat(shard, key)))
        return held

    def _is_replicated(self, name: str, key: str) -> bool:
        """Whether every rank holds the same elements; of shared parameters, every rank with the same part."""
        if name in self.buffers:
            return True
        if name not in self._trained:
            return not self._layout.shares_frozen
        return key in self._vectors[name] or not self._layout.partitioned

    def _copies(self, name: str) -> tuple[int, int]:
        """Of what is replicated: the number of this rank's copy, and of all copies."""
        size = self._shared.size if self._shared and name in self._slices else 1
        return self.world.rank // size, self.world.size // size

    def _place(self, name: str, start: int) -> int | Place:
        return self._slices[name].place(start) if name in self._slices else start

    def _taken(self, name: str, whole: Tensor, start: int, numel: int) -> Tensor:
        """These elements of this rank's slice, from the flat whole."""
        return self._slices[name].take(whole, start, numel) if name in self._slices else whole[start : start + numel]

    def _fill(self, name: str, start: int, elements: Tensor, read: Callable[[int, int], Tensor]) -> None:
        """Fill elements of this rank's slice. read(start, numel): these elements of the flat whole."""
        if name not in self._slices:
            elements.copy_(read(start, elements.numel()))
            return
        rest = elements
        for run in parts_of(self._slices[name].runs, start, elements.numel()):
            rest[: run.numel].view(run.repeats, run.length).copy_(run._replace(first=0).of(read(run.first, run.span)))
            rest = rest[run.numel :]

    def _flat(self, shard: ParameterShard, key: str) -> Tensor:
        master = self._layout.masters()[shard.master]
        if key == WEIGHT:
            return master.detach()
        return self._averages[shard.master] if key == AVERAGE else self._optimizer.state[master][key]

    def _assemble(self, name: str, shard: ParameterShard | None, chunk: Tensor | None) -> Tensor:
        """The whole tensor, by adding the ranks' bits as integers: each element is on one rank, 0 on the others.

        Adding floats, as DeepSpeed does, would turn -0.0 into 0.0.
        """
        shape, replicated = self._shapes[name], self._is_replicated(name, WEIGHT)
        flat = torch.zeros(math.prod(shape), dtype=torch.float32, device=self.world.device)
        first_copy = not replicated or name not in self._slices or self._copies(name)[0] == 0
        if shard is not None and chunk is not None and first_copy:
            if name in self._slices:
                self._slices[name].put(flat, shard.start, chunk)
            else:
                flat.narrow(0, shard.start, shard.numel).copy_(chunk)
        if not replicated or name in self._slices:
            dist.all_reduce(flat.view(torch.int32))
        return flat.view(shape)

    def _whole_matrices(self, master: Tensor, flat: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to each whole matrix of which `flat`, of the master's shape, holds a part. Collective.

        In rounds of as many matrices as ranks; each rank changes one and broadcasts it.
        """
        names = self._names_in(master)
        changed = torch.zeros_like(flat)
        size, rank = (self.world.size, self.world.rank) if self._layout.partitioned else (1, 0)
        for first in range(0, len(names), size):
            turn = names[first : first + size]
            matrices = []
            for name in turn:
                shard = self._shards[name]
                chunk = shard.of(flat) if shard else None
                matrices.append(self._assemble(name, shard, chunk))
            if rank < len(turn):
                matrices[rank] = change(matrices[rank]).contiguous()  # broadcast sends memory, in its own order
            for owner, name in enumerate(turn):
                if self._layout.partitioned:
                    dist.broadcast(matrices[owner], owner)
                if shard := self._shards[name]:
                    shard.of(changed).copy_(self._taken(name, matrices[owner].flatten(), shard.start, shard.numel))
        return changed

    def _names_in(self, master: Tensor) -> list[str]:
        """The parameters of a master on any rank, in the same order on all ranks."""
        pairs = zip(self._layout.masters(), self._layout.members(), strict=True)
        members = next(members for one, members in pairs if one is master)
        return [self._names[id(parameter)] for parameter in members]

    def _parts(self, master: Tensor) -> list[Part]:
        return [
            Part(self._shapes[name], self._shards[name], tuple(self._vectors[name].values()))
            for name in self._names_in(master)
        ]

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, if their masters are partitioned."""
        if not self._layout.partitioned:
            return values
        total = values.to(self.world.device)  # masters may lie on the CPU
        dist.all_reduce(total)
        return total.to(values.device)

    def _make_states(self, place: Callable[[Tensor], Tensor]) -> None:
        """Make the optimizer's states now, not at the first update, so that a checkpoint can fill them. `place` moves a
        tensor to its final memory.
        """
        for master, members in zip(self._layout.masters(), self._layout.members(), strict=True):
            master.data = place(master.data)
            if self._layout.offloaded:
                master.grad = place(master.grad)
            names = [self._names[id(parameter)] for parameter in members]
            for key, shape in self._states[names[0]]:
                if shape == "number":
                    self._optimizer.state[master][key] = torch.zeros((), dtype=torch.float32, device=master.device)
                elif shape == "parameter":
                    zeros = torch.zeros_like(master, memory_format=torch.preserve_format)
                    self._optimizer.state[master][key] = place(zeros)
                else:
                    for name in names:
                        self._vectors[name][key] = master.new_zeros(self._shapes[name][shape == "columns"])
            if self._ema_decay:
                self._averages.append(place(master.detach().clone()))


def evaluated(engine: Any, batch: Any, output: str, compiled: bool) -> Tensor:
    """The output of DeepSpeed's engine in evaluation mode; restores the module's mode afterwards."""
    module = engine.module
    training = module.training
    module.eval()
    # Generation has batches of many lengths; each length would be compiled anew.
    eager = torch.compiler.set_stance("force_eager") if compiled and output == "logits" else None
    try:
        with eager or contextlib.nullcontext():
            return engine(batch, output)
    finally:
        module.train(training)


@contextlib.contextmanager
def creation(effective: dict[str, Any], sharing: int = 1) -> Iterator[Callable[[nn.Parameter], Any]]:
    """Construct a model inside; under ZeRO-3 each parameter is partitioned as soon as its module exists, so that no
    rank ever holds the whole model. Gives a context manager that gathers one parameter while it is filled, with equal
    values on every rank. `sharing`: number of ranks that share experts; a rank keeps its own of what was filled.
    """
    if effective["zero_optimization"]["stage"] != 3:
        rank = dist.get_rank() if sharing > 1 else 0
        yield lambda parameter: made_whole(parameter, sharing, rank) if sharing > 1 else contextlib.nullcontext()
        return
    with _quiet():
        deepspeed = import_deepspeed()
        _refuse_quantization_without_kernels(effective)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
        context = _partitioning(sharing)(config_dict_or_path=for_deepspeed(effective))
    with context:
        yield partial(_made_whole, sharing)


def _partitioning(sharing: int) -> Any:
    """DeepSpeed's `Init`. Where ranks share experts, it partitions these over the ranks that hold the same ones, by
    the marks that stage 3 reads."""
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    if sharing == 1:
        return Init
    rank = dist.get_rank()
    groups._create_expert_and_data_parallel(sharing)

    class SharedInit(Init):
        def _post_init_method(self, module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                if getattr(parameter, "is_of_experts", False):
                    cut(parameter, sharing, rank % sharing)
                    _mark_part(parameter, sharing)
            super()._post_init_method(module)

    return SharedInit


def _mark_part(parameter: Any, sharing: int) -> None:
    """By these marks stage 3 partitions it over the ranks that hold the same part."""
    from deepspeed.utils import groups

    name = expert_group(sharing)
    parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = name


@contextlib.contextmanager
def _cut_at_stage_3(sharing: int, parameter: Any) -> Iterator[None]:
    """Gather a parameter that is to be cut inside; then partition this rank's part over the ranks that hold it."""
    is_partitioned = hasattr(parameter, "ds_id")
    if is_partitioned:
        parameter.all_gather()
    yield
    _mark_part(parameter, sharing)
    if is_partitioned:
        group = parameter.ds_process_group = parameter.ds_zero_partition_process_group
        parameter.ds_zero_partition_rank = dist.get_rank(group)
        parameter.ds_zero_partition_world_size = dist.get_world_size(group)
        parameter.ds_shape, parameter.ds_numel, parameter.ds_tensor = parameter.shape, parameter.numel(), None
        parameter.partition(has_been_updated=True)


@contextlib.contextmanager
def _made_whole(sharing: int, parameter: Any) -> Iterator[None]:
    """Gather a partitioned parameter; afterwards each rank keeps its share of the new values."""
    parameter.all_gather()
    try:
        with made_whole(parameter, sharing, dist.get_rank()) if sharing > 1 else contextlib.nullcontext():
            yield
    finally:
        parameter.partition(has_been_updated=True)


def _share(
    model: Any, settings: Settings, stage: int, world: World, phases: Phases
) -> ExpertParallel | TensorParallel | None:
    """Keep this rank's experts, or parts of matrices, where ranks share them, and mark them as what DeepSpeed calls
    experts. Raises `UserError` where all are frozen: DeepSpeed would see no expert to train."""
    training = settings.training
    shared: ExpertParallel | TensorParallel | None = None
    if training.expert_parallel_ranks > 1:
        shared = ExpertParallel(model, training.expert_parallel_ranks, world.rank, phases)
        name, what = "expert_parallel_ranks", "expert"
    elif training.tensor_parallel_ranks > 1:
        recomputes = training.activation_checkpointing != "none"
        size = training.tensor_parallel_ranks
        if stage == 3:
            _make_groups(size)
            shared = TensorParallel(model, size, world.rank, phases, recomputes, partial(_cut_at_stage_3, size))
        else:
            shared = TensorParallel(model, size, world.rank, phases, recomputes)
        name, what = "tensor_parallel_ranks", "shared matrix"
    if shared is None:
        return None
    if not any(parameter.requires_grad for parameter in shared.parameters):
        raise UserError(
            f"training.freeze = {training.freeze} with training.{name} = {shared.size}: no {what} is trained; set "
            f"{name} to 1"
        )
    for parameter in shared.parameters:
        parameter.allreduce, parameter.group_name = False, expert_group(shared.size)
    return shared


def _make_groups(size: int) -> None:
    """DeepSpeed's, of `size` neighbours, and of ranks that far apart."""
    with _quiet():
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
        deepspeed.utils.groups._create_expert_and_data_parallel(size)


def _mark(model: nn.Module, size: int) -> None:
    """Add a module by which DeepSpeed's engine knows that ranks share parameters, and has their groups made:
    `ep_size_N`, of N neighbours, and of ranks N apart."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Mark(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = size  # for DeepSpeed's own checkpoints, which are not used

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            groups._create_expert_and_data_parallel(size)

    model.add_module(MARK, Mark())


def _initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    effective: dict[str, Any],
    settings: Settings,
    shared: ExpertParallel | TensorParallel | None,
) -> Any:
    """deepspeed.initialize, without its output; an error in the configuration becomes a `UserError`."""
    with _quiet():
        deepspeed = import_deepspeed()
        _refuse_quantization_without_kernels(effective)
        from deepspeed.runtime.config import DeepSpeedConfigError
        from pydantic import ValidationError

        marked = shared is not None and effective["zero_optimization"]["stage"] < 3  # stage 3 reads the parameters
        if shared and marked:
            _mark(model, shared.size)
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=for_deepspeed(effective), dist_init_required=False
            )
        except (DeepSpeedConfigError, ValidationError) as error:
            source = settings.training.deepspeed or "the default DeepSpeed configuration"
            lines = [str(error)]
            if isinstance(error, ValidationError):
                lines = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError(f"{source}: DeepSpeed refuses {'; '.join(lines)}") from None
        except (AssertionError, NotImplementedError) as error:  # of values that do not go together
            if not str(error):
                raise
            source = settings.training.deepspeed or "the default DeepSpeed configuration"
            raise UserError(f"{source}: DeepSpeed refuses this configuration: {error}") from None
        except ValueError as error:
            if "not supported on your device" not in str(error):
                raise
            raise UserError(
                f"training.precision = {settings.training.precision}: this device does not support it; use fp32, or "
                "bf16 where supported"
            ) from None
        if marked:
            delattr(model, MARK)
        if shared:
            shared.connect(deepspeed.utils.groups._get_expert_parallel_group(expert_group(shared.size)))
    return engine


def _refuse_quantization_without_kernels(effective: dict[str, Any]) -> None:
    """ZeRO++ quantizes with a CUDA kernel, which DeepSpeed builds at its first use."""
    asked = [name for name in QUANTIZED if effective["zero_optimization"].get(name)]
    if not asked:
        return
    from deepspeed.accelerator import get_accelerator

    try:
        get_accelerator().create_op_builder("QuantizerBuilder").load()
    except Exception as error:  # whatever a compiler, a loader or DeepSpeed says
        raise UserError(
            f"zero_optimization.{asked[0]} = true: this machine cannot build or load DeepSpeed's CUDA kernel for it "
            f"({str(error).strip() or type(error).__name__}); remove the key, or run on GPUs with a CUDA compiler"
        ) from None


def forget_groups() -> None:
    """For another engine in this process: DeepSpeed keeps the group of hpZ, and refuses to make it again."""
    with _quiet():
        import_deepspeed().utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


class _Timed:
    """DeepSpeed's backend, or one of its handles; counts time in or waiting for a collective as communication."""

    def __init__(self, inner: Any, phases: Phases) -> None:
        self._inner, self._phases = inner, phases

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in COLLECTIVES:
            return value

        def timed(*arguments: Any, **named: Any) -> Any:
            with self._phases("communication"):
                result = value(*arguments, **named)
            return _Timed(result, self._phases) if hasattr(result, "wait") else result

        return timed


def scale_rows(elements: Tensor, start: int, columns: int, factor_R: Tensor) -> None:
    """Multiply elements [start, start + numel) of a flattened (R, columns) matrix by the factors of their rows, in
    place."""
    row, missing = divmod(start, columns)
    first = min(elements.numel(), (columns - missing) % columns)  # the end of a row that begins on another rank
    whole = (elements.numel() - first) // columns
    if first:
        elements[:first].mul_(factor_R[row])
        row += 1
    elements[first : first + whole * columns].view(whole, columns).mul_(factor_R[row : row + whole, None])
    if first + whole * columns < elements.numel():
        elements[first + whole * columns :].mul_(factor_R[row + whole])


def sum_of_squares(values: Tensor) -> Tensor:
    """The sum of squares, fp64, without an fp64 copy of more than a part."""
    parts = values.detach().flatten().split(PART_ON_CPU if values.is_cpu else PART)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for part in parts:
        total += part.double().square().sum()
    return total


def _norm_from_squares(zero: Any, squares: dict[int, Tensor]) -> None:
    """ZeRO 1 and 2 on a CPU: DeepSpeed's norm for clipping, equal in fp32, from the `squares` of `gradient_norm`. Its
    own takes an fp64 copy of each gradient, 11 ns an element.
    """
    from deepspeed import comm
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

    if type(zero).__name__ != "DeepSpeedZeroOptimizer":  # other stages
        return

    def norm(gradients: list[Tensor], _parameters: Any, norm_type: float = 2) -> Tensor:
        assert norm_type == 2, "DeepSpeed clips by the L2 norm"
        parts = [squares[id(gradient)] for gradient in gradients]  # none: this rank owns nothing of the group
        total = torch.stack(parts).sum().float() if parts else torch.zeros(())
        comm.all_reduce(total, group=zero.dp_process_group)
        total = total.sqrt()
        mask_nan_or_inf_with_val_inplace(total, device=zero.device)
        return total

    zero.get_grad_norm_direct = norm


def _reduce_nothing_on_one_rank(zero: Any, num_ranks: int) -> None:
    """ZeRO 1 and 2 on one rank: no copies of gradients to a bucket, no division by 1, no sum over one rank; same bits.
    Not with offload or overlap_comm, which work in the bucket, nor where gradients, their sums and communication have
    several types, as DeepSpeed casts them there.
    """
    if num_ranks > 1 or type(zero).__name__ != "DeepSpeedZeroOptimizer" or zero.cpu_offload or zero.overlap_comm:
        return
    if zero.dtype == zero.gradient_accumulation_dtype == zero.communication_data_type:
        zero.contiguous_gradients = False
        zero.buffered_reduce_fallback = lambda *_arguments, **_named: None


def _time_communication(phases: Phases) -> None:
    """Replace the one object through which DeepSpeed calls torch.distributed; it is looked up at each call."""
    from deepspeed.comm import comm

    comm.cdb = _Timed(comm.cdb._inner if isinstance(comm.cdb, _Timed) else comm.cdb, phases)


def import_deepspeed() -> Any:
    """The module, without its news and its builds at a start."""
    # torch 2.13 renamed collectives that DeepSpeed 0.19.8 calls by their old names, and warns once per process.
    for words in (r"`torch\.distributed\.\w+` is deprecated", ".*is deprecated.*Please use .torch.distributed"):
        warnings.filterwarnings("ignore", words, FutureWarning)
    import deepspeed

    # On CPUs DeepSpeed compiles a C++ op at its first start (1 to 3 minutes) that only its inference uses.
    # Declared incompatible, it is not built, and a kill during the build cannot leave a lock behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_is_news)
    for handler in logger.handlers:  # made at the first import, in _quiet: what it wrote to stdout would be lost
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # tests compare ours with plain torch at every stage


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what DeepSpeed prints; errors still come as exceptions, warnings through logging."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _frozen(optimizer: Any) -> Iterator[None]:
    """Make the optimizer's step do nothing inside. A learning rate of 0 would still change the moments."""
    optimizer.step = lambda *arguments, **named: None
    try:
        yield
    finally:
        del optimizer.step
