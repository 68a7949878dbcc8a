"""T5's relative position bias (Raffel et al. 2020) by distance, as `attention` takes it.

A distance is the position of the key minus that of the query. T5 learns one number for each head and bucket of
distances. With n buckets on a side, the first n // 2 hold one distance each; the others grow by a constant factor up to
`max_distance`, and the last holds all larger distances. Encoders are bidirectional: half of the buckets are for keys on
the right. Decoders have one side; keys on the right, which are masked, count as distance 0.

In: the learned table (B, H), as transformers stores it. Out: bias_HR (H, 2 * max_distance + 1) for `attention`.
Guarantees: exact (a product with zeros and ones); the gradient repeats bitwise. Cost: B * R * H products, far below one
attention. Make it once per step, not per layer: T5's layers share it.

Shape suffixes: B buckets, H heads, R distances from -max_distance to max_distance.
"""

import math

import torch
from torch import Tensor


def t5_bias(table_BH: Tensor, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """The learned table by distance: (H, 2 * max_distance + 1), differentiable.

    Raises ValueError where the buckets cannot be divided: fewer than 2 on a side, or more buckets than distances.
    """
    num_buckets = table_BH.shape[0]
    one_side = num_buckets // 2 if bidirectional else num_buckets
    if one_side < 2 or one_side // 2 >= max_distance or num_buckets % 2:
        raise ValueError(
            f"t5_bias got {num_buckets} buckets, bidirectional {bidirectional} and max_distance {max_distance}; it "
            "needs an even number of buckets, at least 2 on a side, and a max_distance above half the buckets of a side"
        )
    distance_R = torch.arange(-max_distance, max_distance + 1, device=table_BH.device)
    bucket_R = t5_buckets(distance_R, num_buckets, bidirectional, max_distance)
    chosen_RB = bucket_R[:, None] == torch.arange(num_buckets, device=table_BH.device)
    # A sum of products: a matrix product may round to TF32, and the gradient of indexing uses atomics.
    return (chosen_RB[:, :, None] * table_BH).sum(1).T.contiguous()


def t5_buckets(distance: Tensor, num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The bucket of each distance (position of the key - position of the query)."""
    if bidirectional:
        one_side = num_buckets // 2
        offset, steps = (distance > 0) * one_side, distance.abs()
    else:
        one_side = num_buckets
        offset, steps = torch.zeros_like(distance), (-distance).clamp(min=0)
    num_exact = one_side // 2
    growth = torch.log(steps.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    wide = num_exact + (growth * (one_side - num_exact)).long()
    return offset + torch.where(steps < num_exact, steps, wide.clamp(max=one_side - 1))
