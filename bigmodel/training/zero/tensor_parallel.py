"""Tensor parallelism: neighbouring ranks share the matrices of each layer (Megatron-LM; Shoeybi et al. 2019), and the
positions between the layers (sequence parallelism; Korthikanti et al. 2022).

In: the model and the number of consecutive ranks that share, n (`training.tensor_parallel_ranks`). They get the same
batches. Each keeps one n-th of the heads (query, key, value and output matrices), of the feed-forward width, and of the
vocabulary (embedding and output matrix). Norms, dropout and the residual stream are of one n-th of the positions: each
attention and feed-forward layer gathers the positions before its first product, and adds the ranks' products up as it
gives each rank its positions back.
Guarantee: the loss and gradient of one rank. A rank's loss is that of its positions, so that all ranks together add up
as always. The gradient of a shared matrix is whole on its rank; of norms and of the biases of second products each rank
has the share of its positions. DeepSpeed adds up and divides by all ranks, for shared matrices over the ranks that hold
the same part, as for experts (bigmodel/training/zero/expert_parallel.py). Sums over the sharing ranks are in fp32, in
the order of ranks. Costs per layer and pass: 2 gathers and 2 sums, each of the hidden states of a micro-batch, (n - 1)
/ n of them to other ranks; the same once for the embedding and once for the head. What was gathered is not kept for the
backward but gathered again, 2 gathers a layer; with activation checkpointing the recomputation does that.

Example: n = 2, 8 positions, hidden_size 64, 4 heads of 16 channels, vocabulary 100. Rank 1 has positions 4 to 7, heads
2 and 3 and tokens 50 to 99. Its query matrix is (32, 64): it gathers (8, 64), multiplies to 2 heads of all positions,
attends, multiplies by its output matrix (64, 32) to a term of (8, 64), and gets its rows of the sum, (4, 64).

Evaluation is not shared: each rank has its own batches. The sharing ranks compute them together, one after the other.
Positions that n does not divide are filled up with zeros, which no rank reads.

The model does not know of this: `TensorParallel` cuts the weights and replaces the forward of layers. With
`build_parts` a rank holds its parts and one whole parameter at a time.

Letters: T positions, P positions of a rank, N ranks, H hidden_size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.config.parallel_settings import refuse_undivided_rows
from bigmodel.data.load.batch import Batch
from bigmodel.metrics.phases import Phases
from bigmodel.model.layers import FeedForward, Linear, product
from bigmodel.model.transformer import Attention, RelativeBias, Transformer
from bigmodel.training.slices import Slice
from bigmodel.training.trained import shape_of
from bigmodel.training.zero.shared_head import shared_head
from bigmodel.training.zero.sharing_ranks import Gather, Scatter, SharingRanks


class Part(NamedTuple):
    """What this rank has of a parameter, and its shape."""

    parameter: nn.Parameter
    slice: Slice
    shape: tuple[int, ...]

    def keep(self) -> None:
        """Cut the whole parameter; nothing if that is done."""
        if self.parameter.shape == self.slice.shape:
            flat = self.slice.take(self.parameter.data.flatten(), 0, self.slice.numel)
            self.parameter.data = flat.view(self.shape)
            self.parameter.whole_shape = self.slice.shape

    @contextmanager
    def made_whole(self) -> Iterator[None]:
        """Inside, the whole parameter, in which only this rank's part has its values; afterwards the part again."""
        mine = self.parameter.data.flatten()
        self.parameter.data = mine.new_empty(self.slice.shape)
        self.slice.put(self.parameter.data.view(-1), 0, mine)
        del mine
        try:
            yield
        finally:
            self.keep()


def parts_of(model: Transformer, size: int, rank: int) -> dict[str, Part]:
    """The parts of the rank, number `rank` of the `size` sharing ones, of a model that is whole or cut, by name. Raises
    `UserError` where the vocabulary cannot be divided."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts: dict[str, Part] = {}

    def by_rows(parameter: nn.Parameter, matrices: Sequence[int] = ()) -> None:
        rows, *across = shape_of(parameter)
        mine = Slice.of_rows((rows, *across), size, rank, matrices)
        parts[names[id(parameter)]] = Part(parameter, mine, (rows // size, *across))

    def by_columns(parameter: nn.Parameter) -> None:
        rows, columns = shape_of(parameter)
        mine = Slice.of_columns((rows, columns), size, rank)
        parts[names[id(parameter)]] = Part(parameter, mine, (rows, columns // size))

    def first(linear: Linear) -> None:
        by_rows(linear.weight, linear.parts)
        if linear.bias is not None:
            by_rows(linear.bias, linear.parts)

    refuse_undivided_rows(size, model.embedding.num_embeddings)
    by_rows(model.embedding.weight)
    by_rows(model.head.weight)  # which may be the same
    for module in model.modules():
        if isinstance(module, Attention):
            first(module.query_key_value)
            by_columns(module.output.weight)
        elif isinstance(module, FeedForward):
            first(module.gate_up if module.is_gated else module.up)
            by_columns(module.down.weight)
    return parts


def build_parts(
    build: Callable[[], Transformer], size: int, rank: int
) -> tuple[Transformer, Callable[[nn.Parameter], AbstractContextManager]]:
    """The model that `build` builds, with memory for the parts of this rank alone, without values; and a context
    manager that makes one parameter whole while it is filled, with equal values on every rank."""
    with torch.device("meta"):
        model = build()
    parts = {id(part.parameter): part for part in parts_of(model, size, rank % size).values()}
    for parameter in model.parameters():
        shape = parts[id(parameter)].shape if id(parameter) in parts else parameter.shape
        whole_shape = parameter.shape
        made = nn.Parameter(torch.empty(shape, dtype=parameter.dtype), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, made)  # a tied parameter stays one
        if id(parameter) in parts:
            parameter.whole_shape = tuple(whole_shape)

    def whole(parameter: nn.Parameter) -> AbstractContextManager:
        return parts[id(parameter)].made_whole() if id(parameter) in parts else nullcontext()

    return model, whole


class TensorParallel:
    """The parts of this rank. Construction cuts the weights, unless that is done; `connect` comes once the process
    group exists.

    slices: of the parameters that ranks share, by name.
    """

    def __init__(
        self,
        model: Transformer,
        size: int,
        rank: int,
        phases: Phases,
        recomputes: bool = False,
        whole: Callable[[nn.Parameter], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        """`recomputes`: blocks are, by activation checkpointing. `whole`: a parameter is whole inside. Raises
        `UserError` where the vocabulary cannot be divided."""
        self.size, self.rank, self._phases, self._model = size, rank % size, phases, model
        self._first_product = _first_product if recomputes else _first_product_gathered_again
        parts = parts_of(model, size, self.rank)
        for part in parts.values():
            with whole(part.parameter):
                part.keep()
        self.slices = {name: part.slice for name, part in parts.items()}
        self.parameters = [part.parameter for part in parts.values()]

    def connect(self, group: Any) -> None:
        """group: the ranks that share, in their order."""
        model = self._model
        ranks = self._ranks = SharingRanks(group, self.size, self.rank, self._phases)
        model.embedding.forward = partial(_embed, model.embedding, ranks)
        model.input.forward = partial(_enter, model.input.forward, ranks)  # type: ignore[method-assign]
        model.head.forward = partial(shared_head, model.head, ranks)
        for block in (*model.blocks, *model.extra_blocks):
            block.forward = partial(_with_own_seeds, block.forward, ranks)
        for module in model.modules():
            if isinstance(module, RelativeBias):
                module.forward = partial(_of_own_heads, module.forward, ranks)  # type: ignore[method-assign]
            elif isinstance(module, Attention):
                module.num_heads //= self.size
                module.num_kv_heads //= self.size
                module.first_head += self.rank * module.num_heads
                _put_before(module.query_key_value, self._first_product, ranks)
                _put_before(module.output, _second_product, ranks)
            elif isinstance(module, FeedForward):
                _put_before(module.gate_up if module.is_gated else module.up, self._first_product, ranks)
                _put_before(module.down, _second_product, ranks)

    def in_turn(self, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """`forward` of the batch of this rank. Each of the sharing ranks has another one, of any length."""
        outputs = []
        for number in range(self.size):
            box = [batch.to("cpu") if number == self.rank else None]
            with self._phases("communication"):
                dist.broadcast_object_list(box, group=self._ranks.group, group_src=number)
            theirs = box[0]
            assert theirs is not None, "the broadcast gives every rank a batch"
            outputs.append(forward(theirs.to(batch.tokens.device)))
        return outputs[self.rank]


def _put_before(linear: Linear, forward: Any, ranks: SharingRanks) -> None:
    linear.forward = partial(forward, linear, ranks)  # type: ignore[method-assign]


def _first_product(linear: Linear, ranks: SharingRanks, x_PH: Tensor) -> Tensor:
    """This rank's outputs for all positions."""
    return linear.product(Gather.apply(x_PH, ranks))


def _first_product_gathered_again(linear: Linear, ranks: SharingRanks, x_PH: Tensor) -> Tensor:
    """The same, without all positions in memory until the backward; of weights, ZeRO 3 frees what is gathered."""
    x_TH, own_PH = Gather.apply(x_PH, ranks), x_PH.detach()
    gathered = _place(x_TH)  # not the tensor: autograd holds the functions below
    weights = {_place(one): one for one in linear.parameters()}

    def keep(saved: Tensor) -> Tensor:
        place = _place(saved)
        return own_PH if place == gathered else weights.get(place, saved)

    def find(kept: Tensor) -> Tensor:
        return ranks.gather(own_PH) if kept is own_PH else kept.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, find):
        return linear.product(x_TH)


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Equal for two views of the same elements in the same order: a square matrix's transpose differs by strides."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _second_product(linear: Linear, ranks: SharingRanks, x_T: Tensor) -> Tensor:
    """(P, H): all ranks' inputs, for this rank's positions."""
    y_PH = Scatter.apply(product(x_T, linear.weight, None), ranks)
    return y_PH if linear.bias is None else y_PH + linear.bias


def _embed(embedding: nn.Embedding, ranks: SharingRanks, tokens_T: Tensor) -> Tensor:
    """(P, H): each rank embeds its part of the vocabulary, at all positions."""
    ranks.num_positions = len(tokens_T)
    row_T = tokens_T - ranks.rank * len(embedding.weight)
    is_here_T = (row_T >= 0) & (row_T < len(embedding.weight))
    x_TH = F.embedding(row_T.where(is_here_T, 0), embedding.weight)
    return Scatter.apply(x_TH.masked_fill(~is_here_T[:, None], 0.0), ranks)


def _enter(
    forward: Any, ranks: SharingRanks, x_PH: Tensor, positions_T: Tensor, seeds_T: Tensor | None = None
) -> Tensor:
    return forward(x_PH, ranks.own(positions_T), None if seeds_T is None else ranks.own(seeds_T))


def _with_own_seeds(
    forward: Any, ranks: SharingRanks, x_PH: Tensor, inputs: Any, seeds_T: Tensor, *rest: Any
) -> Tensor:
    return forward(x_PH, inputs, ranks.own(seeds_T), *rest)


def _of_own_heads(forward: Any, ranks: SharingRanks) -> Tensor:
    return forward().chunk(ranks.size)[ranks.rank]
