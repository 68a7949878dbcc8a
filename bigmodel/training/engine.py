"""The engine: a model and its update under DeepSpeed ZeRO. The only file that imports deepspeed.

Takes a model whose forward gives a summed loss, and batches; gives loss sums, the global gradient norm and updated
weights. Guarantees, for ZeRO 0 to 3:
- the gradient is that of (sum of all losses of the step) / (number of all targets of the step), whatever the
  number of ranks and micro-batches: the loss is a sum, divided once by a count that the plan knows;
- gradients are added up in fp32, also under bf16;
- the norm is known before the update and equal on all ranks; a skipped update leaves weights and moments bitwise
  as they were;
- the state is read and written by parameter name, in fp32 and to the last bit, so that a checkpoint knows
  nothing of ranks and stages.
Costs: DeepSpeed's own; reading the state is one collective per tensor.

How each stage keeps its fp32 state differs; the four `_Stage...` classes below are all that knows of it. They rest
on internals of DeepSpeed 0.19.8, which is why that version is pinned and tests compare every stage with plain torch.
"""

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmodel.config import Settings, UserError
from bigmodel.training.distributed import World
from bigmodel.training.optim import build_optimizer
from bigmodel.training.phases import Phases

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("weight", *MOMENTS)  # what `read_state` gives of each parameter
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "wait",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single", "barrier",
)  # fmt: skip


class Engine:
    """One model in training. Make it on every rank at the same place; every method is collective.

    updates: how many updates were applied since the weights were new; skipped ones do not count.
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
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._adamw = build_optimizer(model, settings.optimizer)
        self._engine = _initialize(model, self._adamw, effective, settings)
        _time_communication(self.phases)
        self._stage = _stage_of(self._engine, self._adamw)
        self._norm: float | None = None
        self._make_moments()

    def micro_batch(self, batch: Any, num_targets: int, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; gives its loss sum, detached.

        num_targets: of the whole step, over all ranks and micro-batches. last: of this rank's in this step.
        DeepSpeed averages over ranks, hence the factor of the world size; its own division by the number of
        micro-batches is off.
        """
        assert num_targets > 0, "a step has at least one target"
        self._engine.set_gradient_accumulation_boundary(last)
        with self.phases("forward"):
            loss_sum = self._engine(batch)
        with self.phases("backward"):
            self._engine.backward(loss_sum * (self.world.size / num_targets), scale_wrt_gas=False)
        self._norm = None
        return loss_sum.detach()

    def gradient_norm(self) -> float:
        """The L2 norm of the whole gradient, before clipping, after the last micro-batch; may be inf or nan."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for gradient in self._stage.gradients():
            for piece in gradient.detach().flatten().split(1 << 24):  # bounds the fp64 copy
                total += piece.double().square().sum()
        squares = float(total)
        if self._stage.partitioned:
            (squares,) = self.world.sum_([squares])
        self._norm = math.sqrt(squares)
        return self._norm

    def gradient(self, name: str) -> Tensor:
        """The whole gradient of a parameter, in fp32, after the last micro-batch and before the update."""
        return self._stage.gradient(self._parameters[name]).detach().float().clone()

    def update(self, learning_rate: float, skip: bool = False) -> None:
        """Clip as configured and take one AdamW step; `skip` drops the gradient and changes nothing else."""
        assert self._norm is not None, "gradient_norm() comes after the last micro-batch and before update()"
        assert skip or math.isfinite(self._norm), f"an update with gradient norm {self._norm} must be skipped"
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        with _frozen(self._adamw) if skip else contextlib.nullcontext():
            self._engine.step()
        self.updates += 0 if skip else 1
        self._norm = None

    @torch.no_grad()
    def forward(self, batch: Any, output: str = "loss_sum") -> Tensor:
        """The model's output in evaluation mode, without gradients; training goes on as if it had not happened."""
        module = self._engine.module
        training = module.training
        module.eval()
        try:
            return self._engine(batch, output)
        finally:
            module.train(training)

    def names(self) -> list[str]:
        """Parameter names, in the model's order; tied weights appear once."""
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape, also where only a part of it is here."""
        return self._shapes[name]

    @torch.no_grad()
    def read_state(self, name: str) -> dict[str, Tensor]:
        """weight, exp_avg and exp_avg_sq of a parameter: whole, fp32, copies, on every rank."""
        parameter = self._parameters[name]
        whole = {key: self._stage.read(parameter, None if key == "weight" else key) for key in STATE}
        return {key: tensor.view(self._shapes[name]) for key, tensor in whole.items()}

    @torch.no_grad()
    def write_states(self, state_of: Callable[[str], Mapping[str, Tensor]], updates: int) -> None:
        """Replace the whole state: `state_of(name)` gives what `read_state(name)` gave, on every rank."""
        for name, parameter in self._parameters.items():
            state = state_of(name)
            for key in STATE:
                value = state[key].to(device=self.world.device, dtype=torch.float32)
                assert tuple(value.shape) == self._shapes[name], f"{key}.{name}: {tuple(value.shape)}"
                self._stage.write(parameter, None if key == "weight" else key, value.flatten())
        for master in self._stage.masters():
            self._adamw.state[master]["step"].fill_(float(updates))
        self._stage.publish()
        self.updates = updates

    def _make_moments(self) -> None:
        """AdamW makes its moments at the first update; here they exist from the start, so they can be read."""
        for master in self._stage.masters():
            state = self._adamw.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
        self._stage.link_moments()


class _Stage(Protocol):
    """How one ZeRO stage keeps the fp32 state. `key` None means the master weight."""

    partitioned: bool  # whether gradients() differ from rank to rank

    def masters(self) -> list[Tensor]: ...
    def gradients(self) -> list[Tensor]: ...
    def gradient(self, parameter: nn.Parameter) -> Tensor: ...
    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor: ...
    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None: ...
    def link_moments(self) -> None: ...
    def publish(self) -> None: ...


class _Stage0:
    """fp32, nothing partitioned: parameters are their own masters."""

    partitioned = False

    def __init__(self, engine: Any, adamw: torch.optim.AdamW) -> None:
        self._adamw = adamw

    def masters(self) -> list[Tensor]:
        return [parameter for group in self._adamw.param_groups for parameter in group["params"]]

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.masters() if parameter.grad is not None]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        return self._tensor(parameter, key).detach().clone()

    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        self._tensor(parameter, key).copy_(value.view_as(parameter))

    def link_moments(self) -> None:
        """Nothing to link: the moments are whole."""

    def publish(self) -> None:
        """Nothing to publish: the masters are what the forward pass reads."""

    def _tensor(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        return parameter if key is None else self._adamw.state[parameter][key]


class _Fragments:
    """Stages 1 and 2: each rank owns one run of a flat master; a parameter may lie on several ranks."""

    partitioned = True

    def __init__(self, engine: Any, adamw: torch.optim.AdamW) -> None:
        self._zero = engine.optimizer

    def masters(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def gradients(self) -> list[Tensor]:
        return [piece for group in self._zero.averaged_gradients.values() for piece in group]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """Assembled by adding the bits: each element is on one rank, and 0 is added to it as an integer.

        Adding floats, as DeepSpeed's own reading does, turns -0.0 into 0.0.
        """
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if parameter._hp_mapping is not None:
            place = parameter._hp_mapping.lp_fragment_address
            whole.narrow(0, place.start, place.numel).copy_(parameter._hp_mapping.get_hp_fragment(key))
        dist.all_reduce(whole.view(torch.int32))
        return whole

    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        if parameter._hp_mapping is not None:
            place = parameter._hp_mapping.lp_fragment_address
            parameter._hp_mapping.get_hp_fragment(key).copy_(value.narrow(0, place.start, place.numel))

    def link_moments(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()

    def publish(self) -> None:
        self._zero.update_lp_params()


class _FragmentsInBf16(_Fragments):
    """Stage 1 in bf16 with fp32 sums, which DeepSpeed gives to its BF16_Optimizer: gradients are whole there."""

    def masters(self) -> list[Tensor]:
        return list(self._zero.fp32_groups_flat_partition)

    def gradients(self) -> list[Tensor]:
        return list(self._zero.fp32_groups_gradient_flat_partition)


class _Stage3:
    """Weights partitioned too: each rank owns the same share of every parameter, padded at the end."""

    partitioned = True

    def __init__(self, engine: Any, adamw: torch.optim.AdamW) -> None:
        self._zero = engine.optimizer

    def masters(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)

    def gradients(self) -> list[Tensor]:
        return [piece for group in self._zero.averaged_gradients.values() for piece in group]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        return self._zero.get_full_hp_param(parameter, key).detach().clone()

    def write(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        share = parameter.ds_tensor.numel()
        start = min(share * self._zero._get_param_partition_rank(parameter), value.numel())
        mine = value.new_zeros(share)
        count = min(share, value.numel() - start)
        mine[:count] = value[start : start + count]
        self._zero.set_local_hp_param(mine, parameter, key)

    def link_moments(self) -> None:
        """Nothing to link: moments are looked up by master."""

    def publish(self) -> None:
        """Round the masters into the forward weights, the partitioned ones and those kept whole."""
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        kept_whole = self._zero.persistent_parameters
        if kept_whole:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)


def _stage_of(engine: Any, adamw: torch.optim.AdamW) -> _Stage:
    stages: dict[str, Callable[[Any, torch.optim.AdamW], _Stage]] = {
        "AdamW": _Stage0,
        "DeepSpeedZeroOptimizer": _Fragments,
        "BF16_Optimizer": _FragmentsInBf16,
        "DeepSpeedZeroOptimizer_Stage3": _Stage3,
    }
    kind = type(engine.optimizer).__name__
    assert kind in stages, f"DeepSpeed chose {kind}, which the engine does not know"
    return stages[kind](engine, adamw)


def _initialize(model: nn.Module, adamw: torch.optim.AdamW, effective: dict[str, Any], settings: Settings) -> Any:
    """deepspeed.initialize, quiet; what it refuses in the configuration becomes a `UserError`."""
    # torch 2.13 renames collectives that DeepSpeed 0.19.8 calls; nothing that a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with _quiet():
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError
        from pydantic import ValidationError

        # On CPUs DeepSpeed compiles a C++ op at its first start (1 to 3 minutes) that only its inference calls.
        # Declared unbuildable, it is left alone, and a kill during that build cannot leave a lock behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # torch 2.13 renames collectives that DeepSpeed 0.19.8 calls by their old names, and warns once per process.
        warnings.filterwarnings(
            "ignore", message=".*is deprecated.*Please use .torch.distributed", category=FutureWarning
        )
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=adamw, config=copy.deepcopy(effective), dist_init_required=False
            )
        except (DeepSpeedConfigError, ValidationError) as error:
            source = settings.training.deepspeed or "the default DeepSpeed configuration"
            lines = [str(error)]
            if isinstance(error, ValidationError):
                lines = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError(f"{source}: DeepSpeed refuses {'; '.join(lines)}") from None
    return engine


class _Timed:
    """DeepSpeed's backend, or a handle of its: time inside a collective, or waiting for one, is communication."""

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


def _time_communication(phases: Phases) -> None:
    """DeepSpeed speaks to torch.distributed through one object, looked up at each call."""
    from deepspeed.comm import comm

    comm.cdb = _Timed(comm.cdb._inner if isinstance(comm.cdb, _Timed) else comm.cdb, phases)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints progress of its own; errors still come as exceptions, warnings through logging."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _frozen(adamw: torch.optim.AdamW) -> Iterator[None]:
    """DeepSpeed's step with an optimizer that does nothing. A learning rate of 0 would still move the moments."""
    adamw.step = lambda *arguments, **named: None
    try:
        yield
    finally:
        del adamw.step
