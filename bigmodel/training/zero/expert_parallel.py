"""Expert parallelism: the experts of each layer are shared out over neighbouring ranks (GShard; Lepikhin et al. 2020).

In: the model and the number of consecutive ranks that share, n (`training.expert_parallel_ranks`). Each of them keeps
one n-th of each layer's experts. A layer sends its rows, which lie sorted by expert, to the ranks of their experts,
sorts what it got, multiplies, and sends the results back. Ranks that hold the same experts are n apart; ZeRO
partitions what it partitions of these over them.
Guarantee: the loss and gradient of one rank. No row is dropped, and a row's result depends on its own values alone. An
expert's gradient has the rows of all n ranks; DeepSpeed adds it over the ranks that hold the expert and divides by all
ranks, as every other gradient. Costs per layer and pass: 2 exchanges of rows, (n - 1) / n of them to other ranks; in
the forward pass one of counts, for which the host waits, because gloo and NCCL take sizes from the host. A rank
computes the rows that it gets: uneven loads of experts become uneven ranks.

Example: n = 2, 4 experts, rank 0 has rows of the experts 0 0 1 3, rank 1 of 0 2 2 3. Rank 0 holds the experts 0 and 1:
it keeps 0 0 1, gets 0, and sorts: 0 0 0 1, offsets 0 3 4.

The model does not know of this: `ExpertParallel` keeps the slice of each weight and replaces `Experts.forward`. With
`made_whole` no rank ever holds all experts.

Letters as in `bigmodel.model.experts`; N sharing ranks, P experts of a rank, R rows that a rank gets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmodel.metrics.phases import Phases
from bigmodel.model.experts import Experts
from bigmodel.training.slices import Slice


class ExpertParallel:
    """The experts of this rank. Construction cuts the weights; `connect` comes once the process group exists.

    slices: of the parameters that ranks share, by name.
    """

    def __init__(self, model: nn.Module, size: int, rank: int, phases: Phases) -> None:
        self.size, self.rank, self._phases = size, rank % size, phases
        self.slices: dict[str, Slice] = {}
        self.parameters: list[nn.Parameter] = []
        self._layers = [module for module in model.modules() if isinstance(module, Experts)]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for layer in self._layers:
            for parameter in (layer.gate_up, layer.down):
                cut(parameter, size, self.rank)
                self.slices[names[id(parameter)]] = Slice.of_rows(_whole_shape(parameter), size, self.rank)
                self.parameters.append(parameter)

    def connect(self, group: Any) -> None:
        """group: the ranks that share, in their order."""
        ranks = Ranks(group, self.size, self._phases)
        for layer in self._layers:
            layer.forward = partial(_shared, layer, layer.forward, ranks)  # type: ignore[method-assign]


@contextmanager
def made_whole(parameter: nn.Parameter, size: int, rank: int) -> Iterator[None]:
    """Inside, the experts of all ranks, to be filled with equal values on every rank; afterwards this rank's part. So a
    rank holds one whole parameter at a time. Other parameters are left as they are."""
    if not getattr(parameter, "is_of_experts", False):
        yield
        return
    if len(parameter) < _whole_shape(parameter)[0]:
        part, first = parameter.data, rank % size * len(parameter)
        parameter.data = part.new_empty(_whole_shape(parameter))
        parameter.data[first : first + len(part)] = part
    try:
        yield
    finally:
        cut(parameter, size, rank % size)


def cut(parameter: nn.Parameter, size: int, rank: int) -> None:
    """Keep the part of the rank among the `size` sharing ones, unless that is done."""
    shape = parameter.whole_shape = _whole_shape(parameter)
    if len(parameter) == shape[0]:
        parameter.data = parameter.data.chunk(size)[rank].clone()


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return getattr(parameter, "whole_shape", tuple(parameter.shape))


class Ranks(NamedTuple):
    """The sharing ranks, and the phases that count their exchanges."""

    group: Any
    size: int
    phases: Phases


def _shared(layer: Experts, forward: Any, ranks: Ranks, x_AH: Tensor, offsets_E1: Tensor) -> Tensor:
    """As `Experts.forward`, with the experts of all sharing ranks."""
    route = _route(offsets_E1, len(layer.gate_up), len(x_AH), ranks)
    y_RH = forward(Exchange.apply(x_AH, route, True), route.offsets_P1)
    return Exchange.apply(y_RH, route, False)


@dataclass(frozen=True)
class Route:
    """Where the rows of a layer go. sent, received: rows to and from each sharing rank. order_R: the received rows by
    expert; places_R: its inverse. num_rows: of this rank, with those behind the last expert's, which are not sent."""

    ranks: Ranks
    sent: Sequence[int]
    received: Sequence[int]
    order_R: Tensor
    places_R: Tensor
    offsets_P1: Tensor
    num_rows: int


def _route(offsets_E1: Tensor, num_held: int, num_rows: int, ranks: Ranks) -> Route:
    """Exchange the counts of rows. Waits for the device, once."""
    counts_NP = offsets_E1.diff().view(ranks.size, num_held)
    received_NP = torch.empty_like(counts_NP)
    with ranks.phases("exchange"):
        dist.all_to_all_single(received_NP, counts_NP, group=ranks.group)
    sent, received = torch.stack([counts_NP.sum(1), received_NP.sum(1)]).tolist()
    device = offsets_E1.device
    experts_NP = torch.arange(num_held, device=device).expand(ranks.size, num_held)
    experts_R = experts_NP.flatten().repeat_interleave(received_NP.flatten(), output_size=sum(received))
    order_R = experts_R.sort(stable=True).indices
    places_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=device))
    offsets_P1 = torch.zeros(num_held + 1, dtype=torch.int32, device=device)
    offsets_P1[1:] = received_NP.sum(0).cumsum(0)
    return Route(ranks, sent, received, order_R, places_R, offsets_P1, num_rows)


class Exchange(torch.autograd.Function):
    """`there`: rows by expert of this rank, (A, H), to rows by expert of all sharing ranks for this rank's experts,
    (R, H). Otherwise back; rows of no expert are 0. Each is the other's gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, route: Route, there: bool) -> Tensor:
        context.exchange = (route, there)
        return _send(x, route) if there else _return(x, route)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        route, there = context.exchange
        return (_return if there else _send)(gradients[0], route), None, None


def _send(x_AH: Tensor, route: Route) -> Tensor:
    got_RH = x_AH.new_empty(sum(route.received), x_AH.shape[1])
    given = x_AH[: sum(route.sent)].contiguous()
    with route.ranks.phases("exchange"):
        dist.all_to_all_single(got_RH, given, list(route.received), list(route.sent), group=route.ranks.group)
    return got_RH[route.order_R]


def _return(y_RH: Tensor, route: Route) -> Tensor:
    out_AH = y_RH.new_zeros(route.num_rows, y_RH.shape[1])
    given = y_RH[route.places_R]
    with route.ranks.phases("exchange"):
        dist.all_to_all_single(
            out_AH[: sum(route.sent)], given, list(route.sent), list(route.received), group=route.ranks.group
        )
    return out_AH
