"""Mixture of experts: a feed-forward layer of many experts, of which each token passes a few.

In: states (T, H). Out: of each token the sum of its k experts' outputs times their weights, plus the shared experts'.

    logits_TE = x W, in fp32        scores_TE: softmax or sigmoid of the logits
    experts of a token: the k largest scores + bias_E, of its groups only; their weights: scores, without the bias,
    normalised if asked for
    permute: rows by expert -> grouped gate and up -> activation -> grouped down -> unpermute: weighted, added

Guarantees: no token is dropped unless `capacity_factor` says so, and then by the earlier tokens of its own document
alone (`within_capacity`); padding passes no expert and is not counted; recomputation routes as the first pass did. The
number of an expert's tokens stays on the device. The loads of a step are counted once, also where the backward pass
recomputes a layer.

The balance loss and the router's z-loss are sums over labels, weighted as these, so that the engine's division by the
number of labels makes them means over the step, on any number of ranks and micro-batches. They change the gradient of
the loss sum, not its value (`Transformer`). With E experts, f_e the share of the step before's tokens that passed
expert e (they add up to k) and p_te the normalised scores, the balance loss of a layer is E * sum_e f_e * mean_t p_te.

Example: T = 4 tokens, the last one padding, k = 2 of E = 3 experts: 6 pairs of token and expert, sorted by expert;
loads (3, 2, 1), offsets (0, 3, 5, 6), rows 6 and 7 belong to no expert.

Letters: T positions, H hidden_size, E experts, K experts of a token, A = T * K pairs, I expert width, L expert layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.config.expert_settings import ExpertSettings
from bigmodel.config.settings import ModelSettings
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.kernels.grouped_matmul import grouped_matmul
from bigmodel.kernels.permute import expert_rows, permute, unpermute
from bigmodel.model.layers import ACTIVATIONS, FeedForward

NOTHING = 1e-20  # added to sums of sigmoids, as in DeepSeek-V3


def has_experts(settings: ModelSettings, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts. Multi-token prediction modules come after all layers."""
    return settings.experts is not None and layer >= settings.experts.first_dense_layers


class Recorded(NamedTuple):
    """Of a micro-batch. loads_LE: chosen pairs of token and expert, without padding, int64; dropped_L: of these, those
    beyond the capacity; term: balance loss and z-loss of all layers, times their weights, to be added to the loss sum;
    z_sum: sum of logsumexp(logits)^2 over labels and layers."""

    loads_LE: Tensor
    dropped_L: Tensor
    term: Tensor
    z_sum: Tensor


class Routing:
    """What the expert layers of a micro-batch read, and in training record. Made once, used by all of them."""

    def __init__(self, batch: Batch, records: bool) -> None:
        self.padding_T, self.positions_T, self.records = batch.padding, batch.positions, records
        self.weight_T = (batch.labels != IGNORED).float() if batch.weights is None else batch.weights
        self._layers: list[tuple[Tensor, Tensor, Tensor, Tensor]] | None = []

    def record(self, load_E: Tensor, dropped: Tensor, term: Tensor, z_sum: Tensor) -> None:
        """Of one layer. Recomputations come after `close` and are not recorded."""
        if self._layers is not None:
            self._layers.append((load_E, dropped, term, z_sum))

    def close(self) -> Recorded:
        """The records of all layers; afterwards nothing is recorded."""
        assert self._layers, "no layer with experts was computed, or its records were taken"
        loads, dropped, terms, z_sums = zip(*self._layers, strict=True)
        self._layers = None
        return Recorded(torch.stack(loads), torch.stack(dropped), torch.stack(terms).sum(), torch.stack(z_sums).sum())


class Router(nn.Module):
    """Logits of the experts, (T, E), fp32 at least. Its buffers, fp32 in a model of any precision: with balance = loss
    the `load` of the step before, as shares of its tokens that add up to K; with balance = bias the `bias`, (E,)."""

    load: Tensor | None
    bias: Tensor | None

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        experts = settings.experts
        assert experts is not None
        self.weight = nn.Parameter(torch.empty(experts.count, settings.hidden_size))
        self.even = experts.per_token / experts.count
        self.register_buffer("load", torch.empty(experts.count) if experts.balance == "loss" else None)
        self.register_buffer("bias", torch.empty(experts.count) if experts.balance == "bias" else None)
        self.reset()

    def reset(self) -> None:
        """The buffers of a start: even loads, no bias."""
        for name, value in (("load", self.even), ("bias", 0.0)):
            if (buffer := getattr(self, name)) is not None:
                setattr(self, name, torch.full(buffer.shape, value, dtype=torch.float32, device=buffer.device))

    def forward(self, x_TH: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        return x_TH.to(dtype) @ self.weight.to(dtype).T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Buffers move with the module, but stay fp32: a bias grows by 0.001, which bf16 rounds away."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Experts(nn.Module):
    """Gated feed-forward layers (Shazeer 2020): rows sorted by expert (A, H) to (A, H)."""

    def __init__(self, settings: ModelSettings, count: int, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[settings.activation]
        self.gate_up = nn.Parameter(torch.empty(count, 2 * width, settings.hidden_size))
        self.joined = {"gate_up": (width, width)}  # rows of the matrices that each expert's one holds
        self.down = nn.Parameter(torch.empty(count, settings.hidden_size, width))
        for parameter in self.parameters():
            parameter.is_of_experts = True  # its rows are experts: ranks may share them

    def forward(self, x_AH: Tensor, offsets_E1: Tensor) -> Tensor:
        """offsets_E1: expert e has rows [offsets[e], offsets[e + 1]); rows behind the last one give 0."""
        gate_AI, up_AI = grouped_matmul(x_AH, self.gate_up, offsets_E1).chunk(2, dim=-1)
        return grouped_matmul(self.activation(gate_AI) * up_AI, self.down, offsets_E1)


class MixtureOfExperts(nn.Module):
    """A feed-forward layer of experts."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        assert settings.experts is not None
        self.settings = settings.experts
        width = settings.expert_width
        self.router = Router(settings)
        self.experts = Experts(settings, self.settings.count, width)
        self.shared = FeedForward(settings, self.settings.shared * width) if self.settings.shared else None

    def forward(self, x_TH: Tensor, routing: Routing | None = None) -> Tensor:
        """routing None: all positions are tokens."""
        logits_TE = self.router(x_TH)
        scores_TE = logits_TE.softmax(-1) if self.settings.scores == "softmax" else logits_TE.sigmoid()
        experts_TK, weights_TK = self.choose(scores_TE)
        if routing is not None and routing.padding_T is not None:  # padding belongs to no expert
            experts_TK = experts_TK.masked_fill(routing.padding_T[:, None], self.settings.count)
        chosen_E = None
        if self.training and routing is not None and self.settings.capacity_factor:
            chosen_E, experts_TK = self._keep(experts_TK, routing.positions_T)
        place_TK, offsets_E1 = expert_rows(experts_TK, self.settings.count)
        y_AH = self.experts(permute(x_TH, place_TK), offsets_E1)
        out_TH = unpermute(y_AH, place_TK, weights_TK)
        if routing is not None and routing.records:
            load_E = offsets_E1.diff().long() if chosen_E is None else chosen_E
            dropped = load_E.sum() - offsets_E1[-1]
            routing.record(load_E, dropped, *self.terms(logits_TE, scores_TE, routing.weight_T))
        return out_TH if self.shared is None else out_TH + self.shared(x_TH)

    def choose(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and their weights, (T, K)."""
        ranked_TE = scores_TE.detach() if self.router.bias is None else scores_TE.detach() + self.router.bias
        if self.settings.groups_per_token < self.settings.groups:
            ranked_TE = _within_groups(ranked_TE, self.settings.groups, self.settings.groups_per_token)
        experts_TK = ranked_TE.topk(self.settings.per_token, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.settings.normalize_weights:
            weights_TK = _shares(weights_TK)
        return experts_TK, weights_TK * self.settings.route_scale

    def _keep(self, experts_TK: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """How often each expert was chosen, (E,); the choices, that of no expert where one is beyond its capacity."""
        count = self.settings.count
        chosen_ET = experts_TK.new_zeros((count + 1, len(experts_TK))).scatter_(0, experts_TK.T, 1)[:count]
        kept_ET = within_capacity(chosen_ET, positions_T, self.settings)
        dropped_TK = ~kept_ET.gather(0, experts_TK.T.clamp(max=count - 1)).T
        return chosen_ET.sum(1), experts_TK.masked_fill(dropped_TK, count)

    def terms(self, logits_TE: Tensor, scores_TE: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's balance loss and z-loss, times their weights; the sum of logsumexp(logits)^2, detached."""
        settings = self.settings
        squares_T = logits_TE.logsumexp(-1).square()
        z_sum = (squares_T * weight_T).sum()
        term = settings.router_z_weight * z_sum if settings.router_z_weight else z_sum.new_zeros(())
        if self.router.load is not None:
            p_TE = scores_TE if settings.scores == "softmax" else _shares(scores_TE)
            p_E = (p_TE * weight_T[:, None]).sum(0)
            term = term + settings.balance_weight * settings.count * (self.router.load * p_E).sum()
        return term, z_sum.detach()


def within_capacity(chosen_ET: Tensor, positions_T: Tensor, settings: ExpertSettings) -> Tensor:
    """(E, T) bool: where a choice, 1 in `chosen_ET` (int64), is kept. positions_T: from 0, without gaps, in each
    document; a GPU's scans are parallel along the last dimension only.

    Of the first n tokens of its document an expert takes at most

        capacity(n) = max(min_capacity, ceil(capacity_factor * K * n / E))

    the first that come, so that a later token, another document, the micro-batch and the rank change nothing. An expert
    that was full takes tokens again as n grows. With A(n) choices and room(n) = capacity(n) - A(n) it has taken
    A(n) + min(0, least room of the document so far): a choice is dropped where that least room falls below 0.

    Example: one expert of two, K = 1, factor 1, min_capacity 1, chosen by 4 tokens and then by every second one:
    capacity 1 1 2 2 3 3 4 4, kept 1 0 1 0 - 1 - 1.
    """
    positions, rate = len(positions_T), settings.capacity_factor * settings.per_token / settings.count
    # A capacity of all positions drops nothing; a larger one may exceed int64.
    capacity_T = ((positions_T + 1).double() * rate).clamp(max=positions).ceil().long()
    capacity_T = capacity_T.clamp(min=min(settings.min_capacity, positions))
    taken_ET, first_T = chosen_ET.cumsum(1), torch.arange(positions, device=positions_T.device) - positions_T
    before_ET = (taken_ET - chosen_ET)[:, first_T]  # by earlier documents
    room_ET = capacity_T - (taken_ET - before_ET)
    # Each document's room lies below all earlier ones': one running minimum serves all.
    below_T = (positions_T == 0).cumsum(0) * (2 * positions + 1)
    least_ET = ((room_ET - below_T).cummin(1).values + below_T).clamp(max=0)
    least_before_ET = least_ET.roll(1, 1).masked_fill(positions_T == 0, 0)
    return (chosen_ET > 0) & (least_ET == least_before_ET)


def _within_groups(ranked_TE: Tensor, groups: int, per_token: int) -> Tensor:
    """The same, -inf outside of a token's groups: those with the largest sums of their two best (DeepSeek-V3)."""
    ranked_TGE = ranked_TE.unflatten(1, (groups, -1))
    best_TG = ranked_TGE.topk(2, dim=-1).values.sum(-1).topk(per_token, dim=-1).indices
    outside_TG = ranked_TE.new_ones((len(ranked_TE), groups), dtype=torch.bool).scatter(1, best_TG, False)
    return ranked_TGE.masked_fill(outside_TG[:, :, None], -math.inf).flatten(1)


def _shares(scores: Tensor) -> Tensor:
    """Divided by their sum; 0 where all sigmoids are 0. No other sum has its bits changed."""
    return scores / (scores.sum(-1, keepdim=True) + NOTHING)


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The model's layers with experts, in the order of the records."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@torch.no_grad()
def balance(model: nn.Module, loads_LE: Tensor) -> None:
    """Move loads and biases by the loads of a whole step, over all ranks (L, E), after its update. A frozen router
    keeps its bias: its choice of experts is frozen too."""
    for layer, load_E in zip(mixtures(model), loads_LE.double(), strict=True):
        router, mean = layer.router, load_E.mean()
        if router.load is not None:  # an empty step would divide by 0: it has no labels, and is refused before
            router.load.copy_(load_E / mean * router.even)
        if router.bias is not None and router.weight.requires_grad:
            router.bias.add_((mean - load_E).sign().to(router.bias), alpha=layer.settings.bias_rate)
