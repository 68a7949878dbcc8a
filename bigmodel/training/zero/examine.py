"""A micro-batch computed outside of training: where it stops being finite, and how large its gradient is.

In: a model, outside of DeepSpeed's engine (its forward would begin a step), and a micro-batch. Out: the name of the
first module or gradient that is not finite, in the order of the computation; squares of the gradient, by parameter.
Training is not changed: the gradients are those of torch.autograd.grad, which does not run the hooks that collect them.
No whole gradient stays in memory. Costs a forward and a backward pass without compilation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(module: nn.Module, batch: Any, factor: float) -> str:
    """The first module whose output is not finite, "NAME, backward" for the first such gradient of the backward pass,
    "" if all are finite. factor: of the loss in the backward pass. Collective at ZeRO 3."""
    found: list[str] = []
    parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
    stance = torch.compiler.set_stance("force_eager")
    with stance, _watched(module, parameters, found):
        loss = module(batch).sum() * factor
        if not _is_finite(loss) and not found:
            found.append("the loss")
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return found[0] if found else ""


def squared_gradients(module: nn.Module, batch: Any, factor: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss sum, detached, and by parameter the sum of squares of the gradient of factor * loss, fp64. On this rank
    alone: nothing is added over ranks. Collective at ZeRO 3."""
    squares: dict[str, Tensor] = {}

    def see(name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            parts = gradient.detach().flatten().split(1 << 24)  # bounds the fp64 copy
            squares[name] = torch.stack([part.double().square().sum() for part in parts]).sum()
            return _small(gradient)

        return hook

    parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
    handles = [one.register_hook(see(name)) for name, one in parameters.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            loss = module(batch).sum()
            torch.autograd.grad(loss * factor, list(parameters.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return loss.detach(), squares


def _small(gradient: Tensor) -> Tensor:
    """Zeros of its shape in one element of memory."""
    return gradient.new_zeros(()).expand_as(gradient)


@contextmanager
def _watched(module: nn.Module, parameters: dict[str, Tensor], found: list[str]) -> Iterator[None]:
    """Inside, names of what is not finite are added to `found` in the order of the computation."""

    def see_output(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not all(_is_finite(one) for one in tensors if isinstance(one, Tensor) and one.is_floating_point()):
                found.append(name or "the loss")

        return hook

    def see_gradient(name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            if not _is_finite(gradient):
                found.append(f"{name.rpartition('.')[0] or name}, backward")
            return _small(gradient)

        return hook

    handles = [one.register_forward_hook(see_output(name)) for name, one in module.named_modules()]
    handles += [one.register_hook(see_gradient(name)) for name, one in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
