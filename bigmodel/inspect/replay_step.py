"""One step of a run, taken apart by document, source and layer.

In: an engine that stands before the step, and the step's data. Out: `Measured`, equal on all ranks. No update is
applied. Guarantees: loss and gradient norm are computed as in training, with the same bytes, dropout and additions.

What is computed, and at what cost:
- loss, gradient norm, and the gradient norm of each layer: forward and backward of the step.
- each document alone, in a batch of its own: loss, norm of its share of the step's gradient, largest activation of each
  block. A forward and a backward pass per document, as many tokens as the step has in all; each rank computes its own
  documents. Without compilation, and in other shapes: the last bits may differ from those in the step.
- the gradient norm of each source: forward and backward of the step per source, with the labels of this source only.

The parts' gradients add up to the step's, before pruning drops some of it; their norms do not.
"""

import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.data.load.alone import Place as Where
from bigmodel.data.load.alone import alone
from bigmodel.data.load.batch import Batch
from bigmodel.data.load.stream import Step
from bigmodel.data.objectives.example import IGNORED
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.sharing import Place, attention_work, deal_evenly
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.training.zero.engine import Engine

LAYER = re.compile(r"(?:.*\.)?(?:extra_)?blocks\.\d+")
TOLD_SECONDS = 10.0  # a line of progress each


@dataclass(frozen=True)
class Part:
    """A document's chunk in a step. loss: weighted sum over its labels in nats; weight: of these labels, their number
    where each has 1. gradient_norm: of its share of the gradient of the step's mean loss."""

    chunk: Chunk
    loss: float
    labels: int
    weight: float
    gradient_norm: float
    activation: float
    layer: str  # where the activation is

    @property
    def rank_key(self) -> float:
        """For sorting: what is not finite first, then the largest gradient."""
        return -self.gradient_norm if math.isfinite(self.loss + self.gradient_norm) else -math.inf


@dataclass
class Measured:
    """parts: `Part.rank_key` first. sources: gradient norm by number of the source. layers: gradient norms;
    activations: by block."""

    loss: float
    gradient_norm: float
    layers: dict[str, float]
    parts: list[Part] = field(default_factory=list)
    sources: dict[int, float] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)


Span = tuple[Chunk, Where]  # a chunk, and where it lies in its micro-batch


class Dissection:
    """The step on this rank. All methods are collective."""

    def __init__(self, engine: Engine, model: nn.Module, step: Step, place: Place, packs_per_micro_batch: int) -> None:
        self._engine, self._model, self._weight, self._world = engine, model, step.weight, engine.world
        self._batches = [batch.to(engine.world.device) for batch in step.micro_batches]
        self._spans = spans_of(step, place, packs_per_micro_batch)

    def measure(self) -> Measured:
        found = self._whole()
        self._documents(found)
        numbers = sorted({part.chunk.source for part in found.parts})
        for source in numbers:
            if len(numbers) == 1:
                found.sources[source] = found.gradient_norm
            elif self._engine.is_at_smallest_scale and not math.isfinite(found.gradient_norm):
                # its gradient may not be finite, and the engine could not drop it
                found.sources[source] = largest(
                    [one.gradient_norm for one in found.parts if one.chunk.source == source]
                )
            else:
                found.sources[source] = self._source_norm(source)
        return found

    def _whole(self) -> Measured:
        """The step as training computes it."""
        nats = torch.zeros(self._batches[0].num_loss_groups, device=self._world.device)
        for number, batch in enumerate(self._batches, 1):
            nats += self._engine.micro_batch(batch, self._weight, number == len(self._batches))
        loss = math.fsum(self._world.sum_(nats.tolist())) / self._weight
        norm = self._engine.gradient_norm()
        squares: dict[str, float] = {}
        for name in self._engine.trained():
            square = float(self._engine.gradient(name).double().square().sum())
            squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
        self._drop()
        return Measured(loss, norm, {name: math.sqrt(square) for name, square in squares.items()})

    def _documents(self, found: Measured) -> None:
        """Add the documents, and the largest activations."""
        pairs = zip(self._batches, self._spans, strict=True)
        mine = [(batch, span) for batch, spans in pairs for span in spans]
        rounds = max(self._world.gather_objects(len(mine)))
        parts: list[Part] = []
        peaks: dict[str, float] = {}
        told = time.monotonic()
        for number in range(rounds):  # as many on every rank: under ZeRO 3 ranks compute together
            part, activations = self._alone(*mine[min(number, len(mine) - 1)]) if mine else self._nothing()
            if number < len(mine):
                parts.append(part)
                for layer, value in activations.items():
                    peaks[layer] = largest([peaks.get(layer, 0.0), value])
            if self._world.rank == 0 and time.monotonic() - told > TOLD_SECONDS:
                told = time.monotonic()
                print(f"document {number + 1} of {rounds} of this rank", file=sys.stderr, flush=True)
        found.parts = [part for parts in self._world.gather_objects(parts) for part in parts]
        found.parts.sort(key=lambda part: part.rank_key)
        for of_rank in self._world.gather_objects(peaks):
            for layer, value in of_rank.items():
                found.activations[layer] = largest([found.activations.get(layer, 0.0), value])

    def _alone(self, batch: Batch, span: Span) -> tuple[Part, dict[str, float]]:
        """A document, and the largest activation of each block."""
        chunk, where = span
        own = alone(batch, where)
        with watched(self._model) as peaks:
            loss, squares = self._engine.squared_gradients(own, self._weight)
        activations = {layer: float(value) for layer, value in peaks.items()}
        layer = max(activations, key=lambda name: order(activations[name]), default="")
        norm = math.sqrt(sum(float(square) for square in squares.values()))
        weight = own.num_labels if own.weights is None else float(own.weights.sum())
        part = Part(chunk, float(loss), own.num_labels, weight, norm, activations.get(layer, 0.0), layer)
        return part, activations

    def _nothing(self) -> tuple[Any, dict[str, float]]:
        """A rank of padding only takes part in what is collective."""
        self._engine.squared_gradients(self._batches[0], self._weight)
        return None, {}

    def _source_norm(self, source: int) -> float:
        """The gradient norm with the labels of this source only, in the step's mean."""
        for number, (batch, spans) in enumerate(zip(self._batches, self._spans, strict=True), 1):
            kept = torch.zeros_like(batch.labels, dtype=torch.bool)
            for chunk, where in spans:
                kept[where.targets] = chunk.source == source
            weights = None if batch.weights is None else torch.where(kept, batch.weights, 0)
            own = replace(batch, labels=torch.where(kept, batch.labels, IGNORED), weights=weights)
            self._engine.micro_batch(own, self._weight, number == len(self._batches))
        norm = self._engine.gradient_norm()
        self._drop()
        return norm

    def _drop(self) -> None:
        self._engine.update(0.0, skip=True)
        if self._model.teacher:
            self._model.teacher.take()


def spans_of(step: Step, place: Place, packs_per_micro_batch: int) -> list[list[Span]]:
    """The chunks of each of this rank's micro-batches, in their order there."""
    work = attention_work(PackTable.of_packs(step.packs))
    rounds = len(step.micro_batches)
    slots = deal_evenly(work, place.node_size, rounds, packs_per_micro_batch)[place.rank_in_node]
    found = []
    for batch, slot in zip(step.micro_batches, slots, strict=True):
        size = len(batch.tokens) // packs_per_micro_batch
        source_size = len(batch.source.tokens) // packs_per_micro_batch if batch.source else 0
        spans: list[Span] = []
        number = 0
        for place_of_pack, at in enumerate(slot):
            end, source_end = place_of_pack * size, place_of_pack * source_size
            for chunk in step.packs[at]:
                first, source_first = end, source_end
                end, source_end = end + chunk.num_tokens, source_end + chunk.source_positions
                spans.append((chunk, Where(number, slice(first, end), slice(source_first, source_end))))
                number += 1
            number += (end, source_end) != ((place_of_pack + 1) * size, (place_of_pack + 1) * source_size)  # padding
        found.append(spans)
    return found


def layer_of(name: str) -> str:
    """The block of a parameter, or the module outside of the blocks: "blocks.3", "embedding"."""
    match = LAYER.match(name)
    return match.group() if match else name.partition(".")[0]


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, the largest absolute output of each block is noted."""
    peaks: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple | list) else output
            peaks[name] = rows.detach().abs().amax().float()

        return hook

    handles = [one.register_forward_hook(see(name)) for name, one in model.named_modules() if LAYER.fullmatch(name)]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def order(value: float) -> float:
    """For sorting: what is not finite is largest."""
    return value if math.isfinite(value) else math.inf


def largest(values: Sequence[float]) -> float:
    return max(values, key=order)
