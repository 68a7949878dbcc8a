"""The L1 penalty of any optimizer, decoupled: a proximal step after each update.

    w <- sign(w) max(|w| - rate * l1_penalty, 0)

This is forward-backward splitting (Duchi & Singer 2009; ISTA, Daubechies et al. 2004). Beside decoupled weight decay,
w <- (1 - rate * decay) w, it makes the elastic net (Zou & Hastie 2005). The other form, a term l1_penalty * sign(w) in
the gradient, is not offered: it never makes a weight exactly zero, and AdamW would divide it by the second moment, so
that weights with small gradients would be penalised most (Loshchilov & Hutter 2019 show this for weight decay).

In: an optimizer whose groups have `l1_penalty`. Out: the same optimizer; its step ends with the proximal step.
Guarantee: elementwise, so that shards of masters are treated as whole ones at every ZeRO stage; a skipped step changes
nothing. Costs: two passes over the penalised masters and 64 MiB.
"""

from typing import Any

import torch


class _Penalised:
    """Placed before an optimizer's class by `with_penalty`."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)  # type: ignore[misc]
        for group in self.param_groups:
            if size := group["lr"] * group["l1_penalty"]:
                for master in group["params"]:
                    if master.grad is not None:
                        shrink_(master, size)
        return result


def with_penalty(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    kind = type(optimizer)
    optimizer.__class__ = type(f"Penalised{kind.__name__}", (_Penalised, kind), {})
    return optimizer


def shrink_(weights: torch.Tensor, size: float) -> None:
    """Move weights towards 0 by `size`, at most to 0, in place."""
    for part in weights.view(-1).split(1 << 24):  # bounds the copy
        part.sub_(part.clamp(-size, size))
