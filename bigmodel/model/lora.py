"""Low-rank adapters (LoRA, Hu et al. 2021) of the matrices in a model's blocks.

In: a model and `LoraSettings`. Out: the same model, whose matrices W have adapters A, B: W x + scale * B A dropout(x).
A fused matrix has one adapter for each of its parts, as peft sees them: blocks.0.attention.query_key_value with
lora.q_proj.a.weight (R, H) and lora.q_proj.b.weight (heads * head_dim, R), and so on; R is the rank.

Guarantees: names and values of the model's own weights do not change; without the training mode an adapter is linear,
so that B A can be added to W (`bigmodel.training.checkpoint.merged`). Dropout depends on the batch's dropout seeds,
layer and part only.
Costs: a copy of a fused matrix's output, if one of its parts has an adapter.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.config.lora_settings import ALL, MATRICES, PARTS, LoraSettings, is_target
from bigmodel.config.settings import UserError
from bigmodel.model.layers import Linear, dropout
from bigmodel.model.transformer import Block

SALT = 1 << 22  # added to the dropout salts: larger than all others
SALTS_OF_LAYER = 64
OF_SOURCE = ("attention.source_key_value", "cross_attention.key_value")  # their input is the encoder's output


class Adapter(nn.Module):
    """B A x for one part of a matrix."""

    def __init__(self, inputs: int, rows: int, rank: int) -> None:
        super().__init__()
        self.a, self.b = Linear(inputs, rank), Linear(rank, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Adapters(nn.ModuleDict):
    """The adapters of one matrix, by part. `seeds_T`, set by the block: dropout seeds of the input's positions."""

    def __init__(
        self, inputs: int, rows: Mapping[str, int], chosen: set[str], settings: LoraSettings, salt: int
    ) -> None:
        """rows: of all parts of the matrix, in order; chosen: the parts with an adapter."""
        super().__init__({part: Adapter(inputs, rows[part], settings.rank) for part in rows if part in chosen})
        self.rows, self.scale, self.rate, self.salt = dict(rows), settings.scale, settings.dropout, salt
        self.seeds_T: Tensor | None = None

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The matrix's output `out` for input `x`, plus the adapters'."""
        parts = [
            part + self.scale * self[name](self._drop(x, number)) if name in self else part
            for number, (name, part) in enumerate(zip(self.rows, out.split([*self.rows.values()], -1), strict=True))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _drop(self, x_TH: Tensor, number: int) -> Tensor:
        if not (self.training and self.rate):
            return x_TH
        assert self.seeds_T is not None, "dropout of adapters needs the block's seeds"
        return dropout(x_TH, self.rate, self.seeds_T, self.salt + number)


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Give every chosen matrix of the model's blocks its adapters; multi-token prediction modules get none.

    Their weights are not initialised. Raises `UserError` for a target without a matrix.
    """
    if not settings.rank:
        return
    met: set[str] = set()
    names: list[str] = []
    for name, block in blocks_of(model):
        for number, (path, matrix, rows) in enumerate(matrices_of(block)):
            full = f"{name}.{path}"
            names.append(full)
            hits = {part: {one for one in settings.targets if is_target(one, full, part)} for part in rows}
            met.update(*hits.values())
            if chosen := {part for part in rows if hits[part]}:
                salt = SALT + SALTS_OF_LAYER * block.layer + 4 * number
                matrix.lora = Adapters(matrix.in_features, rows, chosen, settings, salt)
                block.adapters.append((matrix.lora, path in OF_SOURCE))
    for target in settings.targets:
        if target not in met:
            raise UserError(f'lora.targets: "{target}" is no matrix of this model; {_near(target, names)}')


def blocks_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and blocks, without multi-token prediction modules."""
    for name, module in model.named_modules():
        if isinstance(module, Block) and not name.startswith("extra_blocks."):
            yield name, module


def matrices_of(block: Any) -> Iterator[tuple[str, Linear, dict[str, int]]]:
    """Path, matrix and rows of its parts, for the matrices that the block has."""
    for path, parts in MATRICES.items():
        module: Any = block
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None:
            yield path, module, dict(zip(parts, module.parts or (module.out_features,), strict=True))


def _near(target: str, names: list[str]) -> str:
    known = [ALL, *dict.fromkeys(alias for aliases in PARTS.values() for alias in aliases), *names]
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"use {ALL}, {', '.join(PARTS)}, or names as {names[0]}"


def base_of(name: str) -> str | None:
    """The weight that an adapter's weight belongs to; None for all other weights."""
    matrix, found, _ = name.partition(".lora.")
    return f"{matrix}.weight" if found else None


def first_row(adapter: str, total: int, rows: int) -> int:
    """Where an adapter's rows begin in its matrix of `total` rows: "blocks.0.attention.query_key_value.lora.v_proj"."""
    matrix, _, part = adapter.partition(".lora.")
    parts = next(parts for path, parts in MATRICES.items() if matrix.endswith(f".{path}"))
    place = parts.index(part)
    return total - rows * (len(parts) - place) if place else 0  # only the first part may be larger
