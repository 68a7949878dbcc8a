"""Ranks with a fault, for tests: training with a flipped bit, or a value that is not finite, on one of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.ranks import command

FLIPPED, BROKEN, POISONED, LOUD = "flipped", "broken", "poisoned", "loud"


@dataclass(frozen=True)
class Fault:
    """kind: flipped: a bit of a weight in this rank's copy, before step `step` is computed; broken: the output of
    `module` is not finite on this rank, `times` times from that step on; poisoned: it is not finite on any rank for one
    in five micro-batches, which their tokens tell; loud: gradients of data step `step` are 2,000 times as large."""

    kind: str
    rank: int = 1
    step: int = 3
    module: str = "blocks.1.feed_forward"
    times: int = 1
    backward: bool = False


def train(fault: Fault, arguments: list[str], output: Path) -> int:
    """On a rank: `python -m bigmodel ARGUMENTS` with the fault; the exit code of the command."""
    from bigmodel.training import loop

    class Stream(loop.Stream):
        def __next__(self) -> Any:
            step = super().__next__()
            Engine.at = step.number + 1
            return step

    class Engine(loop.Engine):
        at, left = 0, fault.times

        def __init__(self, model: Any, *more: Any) -> None:
            super().__init__(model, *more)
            self.batch: Any = None
            self.model = model
            if fault.kind != FLIPPED:
                model.register_forward_pre_hook(self.remember)
                model.get_submodule(fault.module).register_forward_hook(self.spoil)

        def remember(self, module: Any, inputs: Any) -> None:
            self.batch = inputs[0]

        def spoil(self, module: Any, inputs: Any, output: Any) -> Any:
            poisoned = fault.kind == POISONED and int(self.batch.tokens.sum()) % 5 == 0
            here = fault.kind == BROKEN and self.world.rank == fault.rank and self.at >= fault.step
            if not module.training or not (poisoned or (here and self.left > 0)):
                return output
            self.left -= here
            if not fault.backward:
                return output * float("nan")
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output

        def micro_batch(self, batch: Any, num_labels: float, last: bool) -> Any:
            if fault.kind == FLIPPED and self.world.rank == fault.rank and self.at == fault.step and self.left:
                self.left = 0
                flip(self.model.get_submodule(fault.module).weight.data)
            is_loud = fault.kind == LOUD and self.at == fault.step
            return super().micro_batch(batch, num_labels / 2000 if is_loud else num_labels, last)

    loop.Engine, loop.Stream = Engine, Stream  # type: ignore[misc]
    return command(arguments, output)


def flip(weight: Any) -> None:
    """Flip the lowest bit of the mantissa of one element."""
    import torch

    integers = weight.view(-1).view(torch.int32 if weight.element_size() == 4 else torch.int16)
    integers[7] ^= 1
