"""Settings of low-rank adapters ([lora]), and the names that choose matrices."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from bigmodel.config.sections import SET, Section, setting

ALL = "all-linear"
# Parts of a matrix -> their names in Hugging Face models, which are the names in peft's target_modules. A name of a
# fused matrix (qkv_proj, Wqkv, gate_up_proj, Wi) chooses each of its parts.
PARTS: dict[str, tuple[str, ...]] = {
    "q_proj": ("q_proj", "q", "query", "qkv_proj", "Wqkv"),
    "k_proj": ("k_proj", "k", "key", "qkv_proj", "Wqkv"),
    "v_proj": ("v_proj", "v", "value", "qkv_proj", "Wqkv"),
    "o_proj": ("o_proj", "o", "dense", "Wo"),
    "gate_proj": ("gate_proj", "wi_0", "gate_up_proj", "Wi"),
    "up_proj": ("up_proj", "wi_1", "wi", "dense", "gate_up_proj", "Wi"),
    "down_proj": ("down_proj", "wo", "dense", "Wo"),
}
WITH_RANK: dict[str, Any] = {"only_with": {"rank": SET}}

if TYPE_CHECKING:
    WithFrom = Section
else:  # `from` is a word of Python
    WithFrom = create_model(
        "WithFrom",
        __base__=Section,
        **{
            "from": (
                Path | None,
                Field(
                    None,
                    description="folder of a peft adapter that the run continues; rank, alpha, dropout, rslora and "
                    "targets are the adapter's and may be left out",
                ),
            )
        },
    )

# Matrices of a block -> the parts of their rows, in order.
MATRICES: dict[str, tuple[str, ...]] = {
    "attention.query_key_value": ("q_proj", "k_proj", "v_proj"),
    "attention.source_key_value": ("k_proj", "v_proj"),
    "attention.output": ("o_proj",),
    "cross_attention.query": ("q_proj",),
    "cross_attention.key_value": ("k_proj", "v_proj"),
    "cross_attention.output": ("o_proj",),
    "feed_forward.gate_up": ("gate_proj", "up_proj"),
    "feed_forward.up": ("up_proj",),
    "feed_forward.down": ("down_proj",),
}


def is_target(target: str, matrix: str, part: str) -> bool:
    """Whether a name of `lora.targets` chooses this part of the matrix of that name."""
    if target == ALL or target in PARTS[part]:
        return True
    return any(fnmatchcase(name, target) or name.endswith(f".{target}") for name in (matrix, f"{matrix}.{part}"))


class LoraSettings(WithFrom):
    """Low-rank adapters (LoRA, Hu et al. 2021): W x + scale * B A dropout(x). A and B are trained, all other weights
    are frozen. A begins as in peft, B with zeros."""

    section = "lora"

    rank: int = Field(0, ge=0, description="rows of A and columns of B; 0: no adapters, all weights are trained")
    alpha: float = setting(
        0.0, **WITH_RANK, ge=0, description="the scale is alpha / rank, with rslora alpha / sqrt(rank); 0: alpha = rank"
    )
    rslora: bool = setting(False, **WITH_RANK, description="rank-stabilised scale (Kalajdzievski 2023)")
    dropout: float = setting(0.0, **WITH_RANK, ge=0, lt=1, description="dropout of an adapter's input")
    targets: list[str] = setting(
        [ALL],
        **WITH_RANK,
        min_length=1,
        description=f"matrices with an adapter: {ALL}, names as in peft ({', '.join(PARTS)}, and those of T5 and "
        'BERT), or patterns of our modules: "blocks.[0-3].attention.*", "query_key_value"',
    )

    @property
    def start_folder(self) -> Path | None:
        """`from`."""
        return getattr(self, "from")

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return (self.alpha or self.rank) / (math.sqrt(self.rank) if self.rslora else self.rank)
