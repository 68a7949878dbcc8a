"""Scheduled sampling, the data's part: which decoder inputs are replaced by the model's own predictions.

In: a batch, its packs, the share of the step. Out: the batch with the rows to replace and the rows of the predictions.
Guarantees: a draw depends on the seed, the pass, the document and the place in it, not on rank, pack or step. So an
input that is replaced at one share is also replaced at any larger one, and a resumed run repeats the draws. An input is
replaced only where a row of the same document predicts it, and where it has a label of its own: never a start token,
a prompt, a source or padding.

Example: inputs BOS 11 12 13 with labels 11 12 13 EOS. Row 2, the input 12, takes the prediction of row 1.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.data.plan.shuffle import Chunk, Pack
from bigmodel.data.randomness import make_key, words


def with_own_inputs(
    batch: Batch, packs: Sequence[Pack], seed: int, share: float, ahead: int = 1, drawn: bool = False
) -> Batch:
    """`ahead`: rows from an input to the row whose label is that token. `drawn`: predictions are drawn."""
    size = len(batch.tokens) // max(1, len(packs))
    labels, positions = batch.labels.numpy(), batch.positions.numpy()
    predicts = labels != IGNORED
    predicted = np.zeros_like(predicts)
    predicted[ahead:] = predicts[:-ahead]
    replaced = np.flatnonzero(predicts & predicted & (positions >= ahead))
    replaced = replaced[_words("replaced", seed, packs, size)[replaced] < _threshold(share)]
    seeds = None
    if drawn:
        seeds = torch.from_numpy(_words("drawn", seed, packs, size)[replaced].view(np.int64))
    rows = torch.from_numpy(replaced)
    return replace(batch, replaced=rows, predicted_at=rows - ahead, choice_seeds=seeds)


def _threshold(share: float) -> np.uint64:
    return np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def _words(name: str, seed: int, packs: Sequence[Pack], size: int) -> np.ndarray:
    """(T,) uint64: a random word for each place of each document."""
    words_T = np.zeros(len(packs) * size, dtype=np.uint64)
    for number, pack in enumerate(packs):
        start = number * size
        for chunk in pack:
            words_T[start : start + chunk.num_tokens] = words(_key(name, seed, chunk), chunk.num_tokens)
            start += chunk.num_tokens
    return words_T


def _key(name: str, seed: int, chunk: Chunk) -> int:
    return make_key("scheduled sampling", name, seed, chunk.source, chunk.epoch, chunk.shard, chunk.row, chunk.start)
