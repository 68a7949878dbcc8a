"""Work: what attention has to look at in packs, counted from their plan alone.

Takes packs and the settings of the data, gives sums that the model's operations follow from
(`bigmodel.metrics.flops`). Guarantees: the pairs are those that the masks of `bigmodel.kernels.mask` let through.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import objectives_of
from bigmodel.data.plan.shuffle import PLAIN, Fragment, Pack

LAID_BEFORE = ("prefix", "span_corruption")  # objectives whose source stands before their targets on one side


class Work(NamedTuple):
    """Sums over the documents of packs, each of n positions and, of an encoder-decoder, s positions of source."""

    positions: int = 0  # n
    source_positions: int = 0  # s
    pairs: int = 0  # (query, key) pairs on the decoder's side: n (n + 1) / 2, more where a prefix sees itself
    squares: int = 0  # n^2: if all positions see each other
    source_pairs: int = 0  # s^2
    cross_pairs: int = 0  # n s


def count_work(packs: Iterable[Pack], data: DataSettings) -> Work:
    """Over all pieces of the packs."""
    kinds = [objective.settings.kind for objective in objectives_of(data)]
    total = [0] * len(Work._fields)
    for piece in (piece for pack in packs for piece in pack):
        n, s, p = piece.positions, piece.source_positions, _prefix(piece, data, kinds)
        for place, amount in enumerate((n, s, (n * (n + 1) + p * (p - 1)) // 2, n * n, s * s, n * s)):
            total[place] += amount
    return Work(*total)


def _prefix(piece: Fragment, data: DataSettings, kinds: Sequence[str]) -> int:
    """First positions that all of the document sees: a source before its targets, and the first of these."""
    if not data.bidirectional_prefix or piece.objective == PLAIN or piece.source_positions:
        return 0
    laid = piece.objective >= len(kinds) or kinds[piece.objective] in LAID_BEFORE  # beyond the objectives: pairs
    return piece.positions - piece.targets + 1 if laid and piece.positions > piece.targets else 0
