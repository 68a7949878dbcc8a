"""Parameter groups, and the optimizer that DeepSpeed runs on flat fp32 masters.

In: a model and settings. Out: a `torch.optim.Optimizer` whose states are known before the first update (`states_of`),
so that they can be read and written by parameter name. Weight decay and L1 penalty: of matrices; embeddings and
one-dimensional parameters (norms) have none; `optimizer.groups` overrides this for the parameters that it names. A head
tied to the embedding counts as embedding, an untied head as a matrix. With `model.mup_base_width` the rates and the
weight decay of matrices in blocks depend on the width (`width_factor`).
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from bigmodel.config.settings import ModelSettings, OptimizerSettings, UserError
from bigmodel.training.optimizers.penalty import with_penalty
from bigmodel.training.optimizers.table import OPTIMIZERS, State

IN_BLOCKS = re.compile(r"(encoder\.|extra_|)blocks\.")
BLOCK = re.compile(r"(encoder\.|)blocks\.(\d+)\.")


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Parameter groups for `torch.optim`. Every trained parameter is in exactly one.

    A group has `weight_decay`, `l1_penalty`, `rate_factor` (multiplies the scheduled learning rate), `matrices`:
    whether the optimizer treats its parameters as matrices (Muon: hidden matrices; Adafactor: all matrices), and
    `parts`: the rows of each part of such a matrix that is updated by itself; empty: the whole. Experts that ranks
    share (`training.expert_parallel_ranks`) are in groups of their own, with DeepSpeed's `moe` and `name`.
    Raises `UserError` where a pattern of `optimizer.groups` matches no parameter.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, float, bool, tuple[int, ...], str], list[nn.Parameter]] = {}
    parts = rows_of_parts(model) if settings.joined_matrices == "parts" else {}
    factors = layer_factors([name for name, _ in model.named_parameters()], settings.layer_decay)
    of_model = getattr(model, "settings", None)
    met: set[str] = set()
    matrices = OPTIMIZERS[settings.kind].matrices
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        matrix = len(shape) >= 2 and id(parameter) not in embeddings
        decay, penalty = (settings.weight_decay, settings.l1_penalty) if matrix else (0.0, 0.0)
        as_matrix = matrices == "hidden" and matrix and not name.startswith("head.")
        as_matrix |= matrices == "all" and len(shape) == 2
        factor = settings.adamw_rate_factor if matrices == "hidden" and not as_matrix else 1.0
        for given in [one for one in settings.groups if fnmatchcase(name, one.parameters)]:
            met.add(given.parameters)
            decay = decay if given.weight_decay is None else given.weight_decay
            penalty = penalty if given.l1_penalty is None else given.l1_penalty
            factor = given.learning_rate_factor
        factor *= factors[name]
        if len(shape) >= 2:
            of_width = width_factor(of_model, settings, name)
            factor, decay = factor * of_width, decay / of_width
        shared = getattr(parameter, "group_name", "")
        key = (decay, penalty, factor, as_matrix, parts.get(id(parameter), ()), shared)
        groups.setdefault(key, []).append(parameter)
    for given in settings.groups:
        if given.parameters not in met:
            names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            raise UserError(
                f'optimizer.groups: parameters = "{given.parameters}" matches no trained parameter; '
                f"names are for example {', '.join(names[:3])} and {names[-1]}"
            )
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "l1_penalty": penalty,
            "rate_factor": factor,
            "matrices": as_matrix,
            "parts": rows,
            **({"moe": True, "name": shared} if shared else {}),
        }
        for (decay, penalty, factor, as_matrix, rows, shared), parameters in sorted(
            groups.items(), key=lambda item: item[0], reverse=True
        )
    ]


def expert_group(size: int) -> str:
    """DeepSpeed's name of the groups of `size` ranks that share experts."""
    return f"ep_size_{size}"


def width_factor(model: ModelSettings | None, settings: OptimizerSettings, name: str) -> float:
    """muP's factor of the learning rate of the matrix `name` (`model.mup_base_width`); 1 without it.

    Width ratio m: AdamW, Lion and AdEMAMix change every weight by about the rate, so that an output moves by inputs
    times rate: 1 / m where the inputs grow with the width (Yang et al. 2022, table 8): matrices of blocks, LoRA's A
    (Hayou et al. 2024) and the classification head, whose logits are not divided by m. Muon's updates have a spectral
    norm of its matrix_scale: match_rms_adamw, which grows as sqrt(m), needs 1 / sqrt(m), original 1 (Yang, Simon &
    Bernstein 2023: the spectral norm of an update is to be that of sqrt(outputs / inputs)); LoRA's A, whose outputs
    are the rank, another 1 / sqrt(m). LoRA's B has the rank as inputs: 1.

    Weight decay is divided by this factor: rate * decay, the share that a step removes, is that of the base, as in
    Yang's `MuAdamW`. Otherwise decay would vanish with width (Wang & Aitchison 2024; Kosson et al. 2025).
    """
    if model is None or not model.mup_base_width:
        return 1.0
    power = OPTIMIZERS[settings.kind].mup_power
    assert power is not None, f"optimizer.kind = {settings.kind!r} has no rule for width"
    if settings.kind == "muon" and settings.matrix_scale == "original":
        power = 0.0
    if name.startswith("head."):  # under Muon, too, AdamW's
        power = 1.0 if model.classification else 0.0
    elif not IN_BLOCKS.match(name) or name.endswith(".b.weight"):
        power = 0.0
    elif name.endswith(".a.weight") and settings.kind == "muon":
        power += 0.5
    return float(model.width_ratio**-power)


def rows_of_parts(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Of weights that hold several matrices, query, key and value or gate and up: the rows of each, by id."""
    found = {id(module.weight): module.parts for module in model.modules() if getattr(module, "parts", ())}
    joined = [
        (module, name, rows) for module in model.modules() for name, rows in getattr(module, "joined", {}).items()
    ]
    return found | {id(getattr(module, name)): rows for module, name, rows in joined}  # of experts


def layer_factors(names: Sequence[str], decay: float) -> dict[str, float]:
    """Factor of the learning rate by parameter name (`optimizer.layer_decay`), from 1 at the top downwards.

    Of n blocks the last has decay, the first decay^n, what embeds the tokens decay^(n + 1); heads, the last norm and
    multi-token prediction modules have 1. An encoder-decoder has two stacks, each counted from its own top; an
    embedding of both is that of the deeper one. As in BEiT; ELECTRA's code has one more power of decay below the heads.
    """
    depths = {"": 0, "encoder.": 0}
    for name in names:
        if found := BLOCK.match(name):
            depths[found[1]] = max(depths[found[1]], int(found[2]) + 1)
    return {name: decay ** _height(name, depths) for name in names}


def _height(name: str, depths: Mapping[str, int]) -> int:
    """Number of layers from the top of its stack."""
    if found := BLOCK.match(name):
        return depths[found[1]] - int(found[2])
    side = "encoder." if name.startswith("encoder.") else ""
    if name.removeprefix(side).startswith("relative_bias."):  # of the first block
        return depths[side]
    if name == "embedding.weight":
        return max(depths.values()) + 1
    return depths[side] + 1 if name.removeprefix(side).startswith(("embedding.", "input.")) else 0


def states_of(settings: OptimizerSettings, group: dict[str, Any]) -> tuple[State, ...]:
    """The optimizer's states for each parameter of a group."""
    return OPTIMIZERS[settings.kind].states_of(group["matrices"])


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.kind`, on the model's parameter groups."""
    optimizer = OPTIMIZERS[settings.kind].builder(parameter_groups(model, settings), settings)
    return with_penalty(optimizer) if any(group["l1_penalty"] for group in optimizer.param_groups) else optimizer
