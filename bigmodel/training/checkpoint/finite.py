"""Whether all numbers of a rank's share are finite, in the pass of its writer.

In: fp32 tensors. Out: the first one that is not finite, in words. A sum meets every NaN and infinity: a
finite sum proves finite numbers, in one pass without a copy. Only a tensor whose sum is not finite is looked at again,
because finite numbers can add up to infinity. Cost: 4 bytes of memory traffic a number, in the thread that writes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bigmodel.training.slices import parse_place, parts_of


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """tensors: flat, by "KEY.NAME@START". "": all are finite."""
    for place, tensor in tensors.items():
        if bool(torch.isfinite(tensor.sum())):
            continue
        wrong = torch.nonzero(~torch.isfinite(tensor)).flatten()
        if len(wrong):
            name, _, start = place.rpartition("@")
            key, _, parameter = name.partition(".")
            first = int(wrong[0])
            begin, runs = parse_place(start)
            at = next(parts_of(runs, begin + first, 1)).first if runs else begin + first
            return (
                f"{key} of {parameter}: {len(wrong):,} of {len(tensor):,} numbers not finite, the first is "
                f"{float(tensor[first])} at {at}"
            )
    return ""
