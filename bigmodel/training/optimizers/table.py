"""The optimizers of `optimizer.kind`, one row each, with all facts that other files need.

To add one: a file in this folder with its class and `build(groups, settings)`; a row in `OPTIMIZERS`; a field in
`OptimizerSettings` for each new setting (declared with `only_with=READ_BY_OPTIMIZER`, see
`bigmodel.config.sections.setting`); a test of one update against the paper. The row decides: the states that the engine
makes, shards and saves by parameter name; the memory plan; the names in a DeepSpeed JSON; the settings that are errors
with other kinds; the cases in which tests compare the engine with plain torch at every ZeRO stage
(tests/support/exactness.py). Imports neither torch nor deepspeed, because settings are checked against this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple


class State(NamedTuple):
    """A tensor that an optimizer keeps for each parameter, in fp32, initially zero.

    shape "parameter": that of the parameter; on the device of its master and sharded like it. "rows", "columns": a
    vector with one element per row or column of a matrix, whole on every rank. "number": the number of updates, equal
    on all ranks; not saved, because it follows from the engine's.
    """

    key: str
    shape: Literal["parameter", "rows", "columns", "number"] = "parameter"


STEP = State("step", "number")
MOMENT = State("exp_avg")
ADAMW = (STEP, MOMENT, State("exp_avg_sq"))


@dataclass(frozen=True)
class Optimizer:
    """A row of the table."""

    about: str  # its paper and its states
    build: str  # "module:function": parameter groups and `OptimizerSettings` to a torch optimizer
    reads: tuple[str, ...]  # settings of [optimizer] that it reads, without those that all read
    states: tuple[State, ...]  # of a parameter
    matrices: Literal["none", "hidden", "all"] = "none"  # the matrices that have `states_of_matrices` instead
    states_of_matrices: tuple[State, ...] = ()
    crosses_ranks: bool = False  # needs whole matrices or sums over ranks: the engine sets its attribute `shards`
    mup_power: float | None = None  # muP: power of the width with which rates of hidden matrices fall; None: refused
    cycles_beta1: bool = False  # beta1 may change from step to step: schedule.beta1_range
    json_types: tuple[str, ...] = ()  # optimizer.type in a DeepSpeed JSON; "auto" becomes the first
    stages: tuple[int, ...] = (0, 1, 2, 3)  # supported ZeRO stages
    offloads: tuple[str, ...] = ("cpu", "nvme")  # supported devices of offloaded states
    limits: str = ""  # the reason why other stages and offloads are not supported

    def states_of(self, matrices: bool) -> tuple[State, ...]:
        """The states of a parameter; `matrices`: it is treated as a matrix."""
        return self.states_of_matrices if matrices else self.states

    @property
    def builder(self) -> Callable[..., Any]:
        return resolve_name(self.build)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        about="AdamW (Loshchilov & Hutter 2019)",
        build="bigmodel.training.optimizers.adamw:build",
        reads=("beta1", "beta2", "epsilon"),
        states=ADAMW,
        cycles_beta1=True,
        json_types=("AdamW", "Adam"),
        mup_power=1.0,
    ),
    "lion": Optimizer(
        about="Lion (Chen et al. 2023), one moment",
        build="bigmodel.training.optimizers.lion:build",
        reads=("beta1", "beta2"),
        states=(MOMENT,),
        cycles_beta1=True,
        json_types=("Lion",),
        mup_power=1.0,
    ),
    "muon": Optimizer(
        about="Muon (Jordan et al. 2024) on hidden matrices, AdamW on the rest",
        build="bigmodel.training.optimizers.muon:build",
        reads=("beta1", "beta2", "epsilon", "momentum", "matrix_scale", "joined_matrices", "adamw_rate_factor"),
        states=ADAMW,
        matrices="hidden",
        states_of_matrices=(MOMENT,),
        crosses_ranks=True,
        json_types=("Muon",),
        mup_power=0.5,
    ),
    "adafactor": Optimizer(
        about="Adafactor (Shazeer & Stern 2018), a vector of rows and one of columns for each matrix",
        build="bigmodel.training.optimizers.adafactor:build",
        reads=("epsilon", "beta2_decay", "update_clipping", "least_scale"),
        states=(STEP, State("variance")),
        matrices="all",
        states_of_matrices=(STEP, State("row_var", "rows"), State("col_var", "columns")),
        crosses_ranks=True,
        json_types=("Adafactor",),
    ),
    "ademamix": Optimizer(
        about="AdEMAMix (Pagliardini et al. 2024), AdamW with a second, slower moment",
        build="bigmodel.training.optimizers.ademamix:build",
        reads=("beta1", "beta2", "epsilon", "alpha", "beta3", "ema_warmup_steps"),
        states=(*ADAMW, State("exp_avg_slow")),
        json_types=("AdEMAMix",),
        mup_power=1.0,
    ),
}
