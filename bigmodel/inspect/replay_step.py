"""One step of a run, taken apart by document, source and layer.

In: an engine that stands before the step, and the step's data. Out: `Measured`, equal on all ranks. No update is
applied. Guarantees: loss and gradient norm are computed as in training, with the same bytes, dropout and additions.

What is computed, and at what cost, in forward and backward passes of the step:
- 1: loss, gradient norm, and the gradient norm of each layer.
- 1: the loss of each document, and the largest activation of each document in each layer. Each document is a loss group
  of its own. Computed without compilation: the last bits may differ from the first pass.
- 1 per source: the gradient norm of the step with the labels of this source only.
- 1 micro-batch per document: the gradient norm of the documents with the most loss above the mean, with the labels of
  the document only.
The parts' gradients add up to the step's; their norms do not.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.data.load.batch import Batch
from bigmodel.data.load.stream import Step
from bigmodel.data.objectives.example import IGNORED
from bigmodel.data.plan.sharing import Place, attention_work, deal_evenly
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.training.zero.engine import Engine

LAYER = re.compile(r"(?:.*\.)?(?:extra_)?blocks\.\d+")


@dataclass
class Part:
    """A document's chunk in a step. loss: sum over its labels in nats. gradient_norm: of its share of the step's mean
    loss; None: not computed."""

    chunk: Chunk
    loss: float
    labels: int
    activation: float
    layer: str  # where the activation is
    rank: int
    micro_batch: int
    place: int  # among the documents of its micro-batch
    gradient_norm: float | None = None

    @property
    def mean(self) -> float:
        """Nats per label."""
        return self.loss / max(1, self.labels)

    def above(self, mean: float) -> float:
        """Nats above those of as many labels with the step's mean loss."""
        return self.loss - self.labels * mean

    def rank_key(self, mean: float) -> tuple[float, ...]:
        """For sorting: what is not finite first, then the most nats above the mean."""
        if not math.isfinite(self.loss):
            return (-math.inf,)
        return (-self.loss,) if not math.isfinite(mean) else (-self.above(mean),)


@dataclass
class Measured:
    """gradient_norms: by layer and by number of the source. activations: by layer."""

    loss: float
    gradient_norm: float
    parts: list[Part] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    sources: dict[int, float] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Where a chunk lies in a micro-batch: positions on the target side and on the source side."""

    chunk: Chunk
    target: slice
    source: slice


class Dissection:
    """The step on this rank. All methods are collective."""

    def __init__(self, engine: Engine, model: nn.Module, step: Step, place: Place, packs_per_micro_batch: int) -> None:
        self._engine, self._model, self._step, self._world = engine, model, step, engine.world
        self._batches = [batch.to(engine.world.device) for batch in step.micro_batches]
        self._spans = spans_of(step, place, packs_per_micro_batch)

    def whole(self) -> Measured:
        """The step as training computes it."""
        nats = torch.zeros(self._batches[0].num_loss_groups, device=self._world.device)
        for batch, last in _marked(self._batches):
            nats += self._pass(batch, last)
        loss = math.fsum(self._world.sum_(nats.tolist())) / self._step.weight
        norm = self._engine.gradient_norm()
        squares: dict[str, float] = {}
        for name in self._engine.trained():
            square = float(self._engine.gradient(name).double().square().sum())
            squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
        self._drop()
        return Measured(loss, norm, layers={name: math.sqrt(square) for name, square in squares.items()})

    def documents(self, found: Measured) -> None:
        """Add loss and largest activations of each document."""
        mine: list[Part] = []
        with torch.compiler.set_stance("force_eager"):
            for number, (batch, last) in enumerate(_marked(self._batches)):
                spans = self._spans[number]
                grouped = replace(batch, loss_groups=_groups(batch, spans), num_loss_groups=len(spans) + 1)
                with watched(self._model, spans, len(batch.tokens)) as largest:
                    losses = self._pass(grouped, last).tolist()
                mine += [self._part(span, losses[at], batch, largest, (number, at)) for at, span in enumerate(spans)]
                for layer, values in largest.items():
                    found.activations[layer] = _largest([found.activations.get(layer, 0.0), *values.tolist()])
        self._engine.gradient_norm()
        self._drop()
        found.parts = [part for parts in self._world.gather_objects(mine) for part in parts]
        told = self._world.gather_objects(found.activations)
        found.activations = {name: _largest([one.get(name, 0.0) for one in told]) for one in told for name in one}

    def sources(self, found: Measured) -> None:
        """Add the gradient norm of each source; with one source it is the step's."""
        numbers = sorted({part.chunk.source for part in found.parts})
        for source in numbers:
            found.sources[source] = found.gradient_norm if len(numbers) == 1 else self._source_norm(source)

    def worst(self, found: Measured, count: int) -> None:
        """Add the gradient norm of the first `count` documents."""
        for part in found.parts[:count]:
            batch = self._batches[part.micro_batch if part.rank == self._world.rank else 0]
            mine = self._spans[part.micro_batch][part.place : part.place + 1] if part.rank == self._world.rank else []
            part.gradient_norm = self._norm_of([(batch, mine)])

    def _source_norm(self, source: int) -> float:
        chosen = [[span for span in spans if span.chunk.source == source] for spans in self._spans]
        return self._norm_of(list(zip(self._batches, chosen, strict=True)))

    def _norm_of(self, parts: Sequence[tuple[Batch, Sequence[Span]]]) -> float:
        """The gradient norm with the labels of these spans only, in the step's mean."""
        for (batch, spans), last in _marked(parts):
            kept = torch.zeros_like(batch.labels, dtype=torch.bool)
            for span in spans:
                kept[span.target] = True
            self._pass(replace(batch, labels=torch.where(kept, batch.labels, IGNORED)), last)
        norm = self._engine.gradient_norm()
        self._drop()
        return norm

    def _part(self, span: Span, loss: float, batch: Batch, largest: dict[str, Tensor], where: tuple[int, int]) -> Part:
        labels = int((batch.labels[span.target] != IGNORED).sum())
        values = {layer: float(of_documents[where[1]]) for layer, of_documents in largest.items()}
        layer = max(values, key=lambda name: _order(values[name]), default="")
        return Part(span.chunk, loss, labels, values.get(layer, 0.0), layer, self._world.rank, *where)

    def _pass(self, batch: Any, last: bool) -> Tensor:
        return self._engine.micro_batch(batch, self._step.weight, last)

    def _drop(self) -> None:
        self._engine.update(0.0, skip=True)
        if self._model.teacher:
            self._model.teacher.take()


def spans_of(step: Step, place: Place, packs_per_micro_batch: int) -> list[list[Span]]:
    """The chunks of each of this rank's micro-batches, in their order there."""
    work = [attention_work(pack) for pack in step.packs]
    rounds = len(step.micro_batches)
    slots = deal_evenly(work, place.node_size, rounds, packs_per_micro_batch)[place.rank_in_node]
    found = []
    for batch, slot in zip(step.micro_batches, slots, strict=True):
        size = len(batch.tokens) // packs_per_micro_batch
        source_size = len(batch.source.tokens) // packs_per_micro_batch if batch.source else 0
        spans = []
        for number, at in enumerate(slot):
            end, source_end = number * size, number * source_size
            for chunk in step.packs[at]:
                first, source_first = end, source_end
                end, source_end = end + chunk.num_tokens, source_end + chunk.source_positions
                spans.append(Span(chunk, slice(first, end), slice(source_first, source_end)))
        found.append(spans)
    return found


def layer_of(name: str) -> str:
    """The block of a parameter, or the module outside of the blocks: "blocks.3", "embedding"."""
    match = LAYER.match(name)
    return match.group() if match else name.partition(".")[0]


@contextmanager
def watched(model: nn.Module, spans: Sequence[Span], num_rows: int) -> Iterator[dict[str, Tensor]]:
    """Inside, the largest absolute output of each block at each span is noted: block -> (spans,) fp32."""
    largest: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple | list) else output
            of_source = name.startswith("encoder.")
            ends = max((span.source.stop for span in spans), default=0) if of_source else num_rows
            if not isinstance(rows, Tensor) or rows.ndim < 2 or len(rows) < ends:
                return
            sizes = rows.detach().abs().flatten(1).amax(1).float()
            parts = [sizes[span.source if of_source else span.target] for span in spans]
            peaks = [part.max() if len(part) else sizes.new_zeros(()) for part in parts]
            largest[name] = torch.stack(peaks) if peaks else sizes.new_zeros(0)

        return hook

    handles = [one.register_forward_hook(see(name)) for name, one in model.named_modules() if LAYER.fullmatch(name)]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _groups(batch: Batch, spans: Sequence[Span]) -> Tensor:
    """(T,) the number of the span at each position; padding has the number after the last."""
    groups = torch.full_like(batch.labels, len(spans))
    for number, span in enumerate(spans):
        groups[span.target] = number
    return groups


def _marked(items: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    return ((item, number == len(items)) for number, item in enumerate(items, 1))


def _order(value: float) -> float:
    """For sorting: what is not finite is largest."""
    return value if math.isfinite(value) else math.inf


def _largest(values: Sequence[float]) -> float:
    return max(values, key=_order)
