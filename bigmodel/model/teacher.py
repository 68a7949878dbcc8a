"""The teacher of a distillation: a frozen model that reads the student's batches.

In: a `Batch`. Out: what `linear_distillation` compares the student with. Guarantees: evaluation mode, so no dropout; no
gradients; the same packed documents, and with them the same masks, as the student. The teacher is no module of the
student: no optimizer, no ZeRO stage and no checkpoint sees its parameters; each rank holds it whole. Costs: a forward
pass of the teacher for each micro-batch, and (T, E) states until the head is done.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.data.load.batch import Batch
from bigmodel.kernels.linear_distillation import Divergence, Taught


class Teacher:
    """num_tokens: of the data; rows of either output matrix beyond them stand for no token and are not compared."""

    def __init__(self, model: nn.Module, num_tokens: int, divergence: Divergence, origin: str = "", sha256: str = ""):
        """origin, sha256: where its weights are from, and of their content."""
        self.model: Any = model.eval().requires_grad_(False)
        self.num_tokens, self.divergence = num_tokens, divergence
        self.origin, self.sha256 = origin, sha256
        self._sum: Tensor | float = 0.0

    @torch.no_grad()
    def read(self, batch: Batch) -> Taught:
        x_TH, x_SE = self.model.embed(batch)
        states_TE, head = self.model.hidden(x_TH, batch, x_SE), self.model.head
        return Taught(states_TE, head.weight[: self.num_tokens], self.divergence, head.options.logit_softcap)

    def add(self, divergence_sum: Tensor) -> None:
        """Add the divergences of a micro-batch."""
        self._sum = self._sum + divergence_sum.detach()

    def take(self) -> float:
        """The sum since the last call. Waits for the device."""
        taken, self._sum = float(self._sum), 0.0
        return taken
