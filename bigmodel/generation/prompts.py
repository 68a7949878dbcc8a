"""Prompts as one packed batch without labels, as the model reads them in training."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from bigmodel.data.load.batch import IGNORED, Batch, SourceSide


def pack(
    prompts: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
    prefixes: Sequence[int] | None = None,
) -> Batch:
    """A batch with one document for each prompt, end to end, without padding.

    sources: of an encoder-decoder, one for each prompt. prefixes: of a decoder, how many first tokens of each prompt
    attend to one another in both directions.
    """
    tokens_T, positions_T, cu_seqlens = _laid_out(prompts)
    count = len(tokens_T)
    return Batch(
        tokens=tokens_T,
        labels=torch.full((count,), IGNORED),
        positions=positions_T,
        cu_seqlens=cu_seqlens,
        dropout_seeds=torch.zeros(count, dtype=torch.int64),
        num_tokens=count,
        num_labels=0,
        num_documents=len(prompts),
        prefixes=torch.tensor(prefixes, dtype=torch.int32) if prefixes and any(prefixes) else None,
        source=None if sources is None else _source_side(sources),
    )


def _source_side(sources: Sequence[Sequence[int]]) -> SourceSide:
    tokens_S, positions_S, cu_seqlens = _laid_out(sources)
    seeds_S = torch.zeros(len(tokens_S), dtype=torch.int64)
    return SourceSide(tokens_S, positions_S, cu_seqlens, seeds_S, len(tokens_S))


def _laid_out(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T,), positions (T,) and the ends (D+1,) of the texts."""
    tokens = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    positions = torch.tensor([place for text in texts for place in range(len(text))], dtype=torch.int64)
    return tokens, positions, torch.tensor([0, *accumulate(map(len, texts))], dtype=torch.int32)
