"""The choice of a token from logits: the likeliest one, or a draw among those that the settings leave.

In: logits of one token, in fp32. Out: an id. The order is that of transformers: repetition penalty, temperature, top-k,
top-p, min-p; a test holds the numbers equal to its logits processors. A draw takes one number of the request's own
generator, so it does not depend on other requests.

Letters in tensor names: V vocabulary, N ids that are left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigmodel.config.user_error import UserError

SMALLEST, LARGEST = 1e-30, 1e30  # of a divisor and of a logit, far inside the range of fp32


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the likeliest token. top_k 0: of all tokens. top_p: the likeliest tokens whose chances reach it.
    min_p: tokens with at least this share of the likeliest one's chance. repetition_penalty above 1: tokens of the
    prompt and the answer become less likely (Keskar et al. 2019). Raises `UserError` outside the ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0 on"),
            ("top_k", self.top_k >= 0, "0 for all tokens, or a number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 changes nothing"),
            ("seed", -(2**63) <= self.seed < 2**64, "a number of 64 bits"),
        ):
            if not fits:
                raise UserError(f"{name} = {getattr(self, name)}: must be {wanted}")

    @property
    def is_greedy(self) -> bool:
        """Whether the token is the argmax of the unchanged logits."""
        return self.temperature == 0 and self.repetition_penalty == 1


def penalize(logits_V: Tensor, used: Sequence[int], penalty: float) -> Tensor:
    """Logits of used tokens divided by the penalty, or multiplied where they are negative; finite for any penalty."""
    if penalty == 1:
        return logits_V
    ids = torch.tensor(sorted(set(used)), device=logits_V.device)
    logits_N = logits_V[ids]
    changed_N = torch.where(logits_N < 0, logits_N * penalty, logits_N / max(penalty, SMALLEST))
    return logits_V.index_copy(0, ids, changed_N.clamp(-LARGEST, LARGEST))


def chances(logits_V: Tensor, sampling: Sampling, used: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """The ids that are left, rising, and their chances (N,), which add up to 1. Needs temperature > 0."""
    logits_N = penalize(logits_V, used, sampling.repetition_penalty)
    if sampling.temperature < 1:  # the largest becomes 0, so that no quotient is infinite
        logits_N = logits_N - logits_N.max()
    logits_N = logits_N / max(sampling.temperature, SMALLEST)
    ids_N = torch.arange(len(logits_N), device=logits_N.device)
    if 0 < sampling.top_k < len(logits_N):
        is_left = logits_N >= logits_N.topk(sampling.top_k).values[-1]
        logits_N, ids_N = logits_N[is_left], ids_N[is_left]
    if sampling.top_p < 1:
        rising_N, order_N = logits_N.sort()
        is_left = rising_N.softmax(-1).cumsum(-1) > 1 - sampling.top_p
        is_left[-1] = True
        kept = order_N[is_left].sort().values
        logits_N, ids_N = logits_N[kept], ids_N[kept]
    if sampling.min_p > 0:
        chances_N = logits_N.softmax(-1)
        is_left = chances_N >= sampling.min_p * chances_N.max()
        logits_N, ids_N = logits_N[is_left], ids_N[is_left]
    return ids_N, logits_N.softmax(-1)


def choose(logits_V: Tensor, sampling: Sampling, used: Sequence[int], generator: torch.Generator) -> int:
    """The next token. `used`: ids of the prompt and the answer; the generator is on the CPU."""
    if sampling.temperature == 0:
        return int(penalize(logits_V, used, sampling.repetition_penalty).argmax())
    ids_N, chances_N = chances(logits_V, sampling, used)
    sums_N = chances_N.double().cumsum(-1)
    drawn = torch.rand((), generator=generator, dtype=torch.float64).to(sums_N.device) * sums_N[-1]
    return int(ids_N[torch.searchsorted(sums_N, drawn, right=True).clamp(max=len(ids_N) - 1)])
