"""Samples in training: text by whole forward passes, one token each.

In: a forward function of the training engine. Out: text. Under ZeRO-3 a forward pass is collective, and all ranks make
the same ones, so they all generate the same text. Costs one whole forward pass per token, for a few hundred tokens;
everything else generates with `bigmodel.generation.engine`.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from bigmodel.data.load.batch import IGNORED, Batch, real_documents
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.generation.far_labels import next_input
from bigmodel.generation.prompts import pack
from bigmodel.generation.text import readable

Forward = Callable[[Batch, str], Tensor]
ANSWER_TOKENS = 48  # per example
SHOWN_CHARACTERS = 400  # per text of an example
TEMPERATURE, TOP_K = 0.8, 40  # of a sample


def sample(forward: Forward, tokenizer: Tokenizer, tokens: int, device: torch.device | str = "cpu") -> str:
    """At most `tokens` tokens from the begin token on; the end token ends them early."""
    generator = torch.Generator().manual_seed(0)

    def draw(logits_V: Tensor) -> int:
        likeliest, ids = logits_V.topk(min(TOP_K, len(logits_V)))
        chances = torch.softmax(likeliest / TEMPERATURE, dim=-1)
        return int(ids[torch.multinomial(chances, 1, generator=generator)])

    return tokenizer.decode(_continue(forward, tokenizer, None, tokens, draw, device))


def examples(
    forward: Forward,
    tokenizer: Tokenizer,
    batch: Batch,
    number: int,
    device: torch.device | str,
    target_ahead: int = 1,
) -> str:
    """Source, target and likeliest text of the first `number` documents of a batch with a source side."""

    def likeliest(logits_V: Tensor) -> int:
        return int(logits_V.argmax())

    assert batch.source, "the batch has no source side"
    edges = zip(pairwise(batch.source.cu_seqlens.tolist()), pairwise(batch.cu_seqlens.tolist()), strict=True)
    real = [edge for edge, is_real in zip(edges, real_documents(batch), strict=True) if is_real]
    shown = []
    for (source_start, source_end), (start, end) in real[:number]:
        source = batch.source.tokens[source_start:source_end].tolist()
        said = _continue(forward, tokenizer, source, ANSWER_TOKENS, likeliest, device, target_ahead)
        wanted = [token for token in batch.labels[start:end].tolist() if token != IGNORED]
        for name, ids in (("source", source), ("target", wanted), ("model", said)):
            words = readable(tokenizer, ids).strip()
            shown.append(f"[{name}]\n{words[:SHOWN_CHARACTERS]}{' ...' if len(words) > SHOWN_CHARACTERS else ''}")
    return "\n".join(shown)


def _continue(
    forward: Forward,
    tokenizer: Tokenizer,
    source: list[int] | None,
    tokens: int,
    choose: Callable[[Tensor], int],
    device: torch.device | str,
    target_ahead: int = 1,
) -> list[int]:
    """Ids after the begin token, without the end token. A source has exactly its own ids: that of a prefix has no end
    token."""
    inputs, answer = [tokenizer.bos], list[int]()
    for _ in range(tokens):
        batch = pack([inputs], None if source is None else [source]).to(device)
        chosen = choose(forward(batch, "logits")[-1].float().cpu())
        if chosen == tokenizer.eos:
            break
        answer.append(chosen)
        inputs.append(next_input(tokenizer.bos, answer, target_ahead))
    return answer
