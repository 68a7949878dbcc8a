"""muP's factors in the weights of an export, because no Hugging Face class has them (`model.mup_base_width`).

In: settings of a model and the source of its weights. Out: settings without muP and weights of a model with the same
logits: the output matrix is divided by the width ratio; queries, or the weight of their norm, by the root of the head
ratio. Costs: a multiplication of what is read. Exact where the factors are powers of 2, else rounded once in fp32.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from bigmodel.config.settings import ModelSettings, UserError
from bigmodel.training.checkpoint.format import WeightSource

QUERIES = ("attention.query_key_value.", "cross_attention.query.")


def without_mup(model: ModelSettings) -> ModelSettings:
    """The settings of the same model without muP. Raises `UserError` where a factor has no place in the weights."""
    if model.tied_embeddings and model.width_ratio != 1.0 and not model.classification:
        raise UserError(
            f"model.mup_base_width = {model.mup_base_width} with model.tied_embeddings = true: logits are divided by "
            f"{model.width_ratio:g}, which no Hugging Face class does, and the output matrix is the embedding, so that "
            "it cannot hold the factor; train with model.tied_embeddings = false to export"
        )
    return model.model_copy(update={"mup_base_width": 0, "mup_base_head_dim": 0})


def folded(source: WeightSource, model: ModelSettings) -> WeightSource:
    """The weights of the model of `without_mup`."""
    if model.width_ratio == model.head_ratio == 1.0:
        return source

    def read(name: str, key: str, start: int, numel: int) -> Tensor:
        return _scaled(source.reader(name, key, start, numel), name, source.shape(name), start, model)

    return replace(source, reader=read)


def _scaled(values: Tensor, name: str, shape: list[int], start: int, model: ModelSettings) -> Tensor:
    """`values`: elements of the flattened weight from `start` on."""
    if name == "head.weight" and not model.classification:
        return values / model.width_ratio
    factor = model.head_ratio**-0.5
    if model.qk_norm and name.endswith("query_norm.weight"):
        shift = 1.0 if model.zero_centered_norm else 0.0  # its norms multiply by 1 + weight
        return (values + shift) * factor - shift
    if not model.qk_norm and any(f".{part}" in name for part in QUERIES):
        side = model.encoder if name.startswith("encoder.") else model
        rows = side.num_heads * side.resolved_head_dim
        end = rows * math.prod(shape[1:])
        place = torch.arange(start, start + len(values))
        return torch.where(place < end, values * factor, values)
    return values
