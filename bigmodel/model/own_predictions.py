"""Scheduled sampling, the model's part: a first pass predicts decoder inputs for the pass that is trained.

In: embedded tokens, a batch with rows to replace (`bigmodel.data.load.own_inputs`), the way through the decoder. Out:
embedded tokens of the second pass. Guarantees: no gradient passes through the first pass; it has the dropout of the
second; the encoder runs once, for both; every rank makes the pass, also without rows to replace. Costs: a forward pass
of the decoder, and of the output matrix over the replaced rows.

Letters in tensor names as in `bigmodel.model.transformer`; R replaced rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigmodel.data.load.batch import Batch


def with_own_predictions(model: Any, x_TH: Tensor, batch: Batch, through: Callable[[Tensor], Tensor]) -> Tensor:
    """`through`: embedded tokens (T, H) to the states before the last norm."""
    assert batch.replaced is not None, "a batch without rows to replace"
    with torch.no_grad():
        states_RH = model.last_states(through(x_TH.detach()))[batch.predicted_at]
        chosen_R = model.head(states_RH, batch.choice_seeds, "choices")
    rows_R = batch.replaced
    x_RH = model.input(model.embedding(chosen_R), batch.positions[rows_R], batch.dropout_seeds[rows_R])
    return x_TH.index_copy(0, batch.replaced, x_RH)
