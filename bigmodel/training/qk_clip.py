"""Largest attention scores of a step, and QK-clip: the weights of queries and keys that keep them below a limit.

In: a model whose attention layers note the largest score of each query head in training. Out: the largest score of the
step, and factors for rows of weights (Kimi K2, MuonClip: arXiv 2507.20534, section 2.1). A score is scale * q . k of a
visible pair, before bias, cap and softmax. With m the largest score of query head h in the step, over all documents,
micro-batches and ranks, and t = optimizer.qk_clip,

    gamma_h = min(1, t / m_h),    key head g: kappa_g = sqrt(max of gamma_h over the query heads h that read it)
    rows of query head h times gamma_h / kappa_g, rows of key head g times kappa_g; their biases alike

after the update of the step. So all scores of head h are multiplied by exactly gamma_h, no head is scaled up, and none
that stays below the limit changes. A key head of its own shares the factor evenly, sqrt(gamma) each, as in the paper;
a shared one takes only what all its query heads have in common, as the paper leaves the shared rotary key unscaled. The
factors belong to the weights before the update, so the update itself may still raise a score.

Guarantees: a maximum does not depend on an order, so the factors are equal on any number of ranks, micro-batches and
recomputations; they follow from the step alone, so a resume needs no state; a skipped step scales nothing. Costs: see
`attention_and_largest`, one small all-reduce per step, and in steps that scale one more copy of the masters to the
weights of the forward pass. Moments are not scaled.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.model.transformer import Attention, CrossAttention, MixedAttention


class Clip(NamedTuple):
    """What a step's scores say. largest_score: None if not measured or not finite. num_heads: query heads that are
    scaled; None: QK-clip is off. row_factors: by parameter name, of the rows of weights and biases."""

    largest_score: float | None = None
    num_heads: int | None = None
    row_factors: dict[str, Tensor] | None = None


class AttentionScores:
    """Call `begin` before a step's micro-batches and `clip` after them, on every rank."""

    def __init__(self, model: nn.Module, settings: Settings, world: World) -> None:
        """Raises `UserError` if there is no attention, or if its weights are frozen and QK-clip is on."""
        self._world, self._limit = world, settings.optimizer.qk_clip
        self._layers: list[tuple[str, Any]] = []
        if not (self._limit or settings.metrics.attention_scores):
            return
        asked = f"optimizer.qk_clip = {self._limit:g}" if self._limit else "metrics.attention_scores = true"
        layers = ((name, layer) for name, layer in model.named_modules())
        self._layers = [(name, layer) for name, layer in layers if isinstance(layer, (Attention, CrossAttention))]
        if not self._layers:
            raise UserError(f"{asked}: this model has no attention; leave it out")
        if self._limit and (frozen := _frozen(model, self._layers)):
            raise UserError(
                f"{asked}: {frozen} is frozen (training.freeze, or [lora]) and cannot be scaled; set it to 0, or train "
                "the weights of all queries and keys"
            )

    def begin(self) -> None:
        """Forget the scores of the step before."""
        for _, layer in self._layers:
            layer.largest_Q = torch.full((layer.num_heads,), -torch.inf, device=self._world.device)

    def clip(self) -> Clip:
        """Of the scores since `begin`, over all ranks. Collective. Waits for the device."""
        if not self._layers:
            return Clip()
        told = self._world.largest(torch.cat([layer.largest_Q for _, layer in self._layers])).cpu()
        largest = float(told.max())
        score = largest if math.isfinite(largest) else None
        if not self._limit:
            return Clip(score)
        num_heads, factors = 0, dict[str, Tensor]()
        of_layers = told.split([layer.num_heads for _, layer in self._layers])
        for (name, layer), largest_Q in zip(self._layers, of_layers, strict=True):
            if scaled := int(is_above(largest_Q, self._limit).sum()):
                num_heads += scaled
                factors |= row_factors(name, layer, *head_factors(largest_Q, layer.num_kv_heads, self._limit))
        return Clip(score, num_heads, factors)


def is_above(largest_Q: Tensor, limit: float) -> Tensor:
    """Which heads are scaled. Not those whose score is not finite: their step is skipped, and 0 would end the head."""
    return largest_Q.isfinite() & (largest_Q > limit)


def head_factors(largest_Q: Tensor, num_kv_heads: int, limit: float) -> tuple[Tensor, Tensor]:
    """Factors of query heads (Q,) and of key heads (G,): see the file's docstring.

    Example: largest scores 400, 200, 50, 400 on 2 key heads, limit 100: gamma 1/4, 1/2, 1, 1/4; keys sqrt(1/2) and 1,
    queries sqrt(1/2) / 2, sqrt(1/2), 1, 1/4.
    """
    gamma_GR = torch.where(is_above(largest_Q, limit), limit / largest_Q, 1.0).unflatten(0, (num_kv_heads, -1))
    kappa_G = gamma_GR.amax(1).sqrt()
    return (gamma_GR / kappa_G[:, None]).flatten(), kappa_G


def row_factors(name: str, layer: Any, factor_Q: Tensor, factor_G: Tensor) -> dict[str, Tensor]:
    """Of the rows of the weights and biases that make a layer's queries and keys, by parameter name. name: of the
    layer. Rows of values have 1."""
    queries, keys = (factors.repeat_interleave(layer.head_dim) for factors in (factor_Q, factor_G))
    values = torch.ones_like(keys)
    matrices = {"query": queries, "key_value": torch.cat([keys, values])}
    if isinstance(layer, Attention):
        matrices = {"query_key_value": torch.cat([queries, keys, values])}
    if isinstance(layer, MixedAttention):
        matrices["source_key_value"] = torch.cat([keys, values])
    return {
        f"{name}.{matrix}.{kind}": factor_R
        for matrix, factor_R in matrices.items()
        for kind in ("weight", "bias")
        if getattr(getattr(layer, matrix), kind) is not None
    }


def _frozen(model: nn.Module, layers: list[tuple[str, Any]]) -> str:
    """The first weight of queries or keys that is not trained; empty: all are."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, layer in layers:
        ones = torch.ones(layer.num_heads), torch.ones(layer.num_kv_heads)
        for parameter in row_factors(name, layer, *ones):
            if parameter not in trained:
                return parameter
    return ""
