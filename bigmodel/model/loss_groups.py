"""The loss of a batch by loss group. T positions, P loss groups."""

import torch
from torch import Tensor


def by_group(loss_sum: Tensor, losses_T: Tensor, groups_T: Tensor, num_loss_groups: int) -> Tensor:
    """(loss groups,) sums of the positions' losses; the gradient of their sum is that of `loss_sum`."""
    is_of_PT = groups_T == torch.arange(num_loss_groups, device=groups_T.device)[:, None]
    sums_P = (losses_T.double() * is_of_PT).sum(1).to(losses_T.dtype)  # no atomics: repeats bitwise
    return sums_P + (loss_sum - loss_sum.detach()) / num_loss_groups
