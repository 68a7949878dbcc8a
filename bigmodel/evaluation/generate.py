"""Text generation, token by token; draws are keyed by a seed.

In: a forward function, of the training engine or of a model from a checkpoint. Out: text. Under ZeRO-3 a forward
pass is collective, and all ranks generate the same text. Costs one whole forward pass per token: there is no
key-value cache; samples have a few hundred tokens.
"""

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from bigmodel.data.load.batch import IGNORED, Batch, SourceSide, real_documents
from bigmodel.data.store.tokenizer import Tokenizer

Forward = Callable[[Batch, str], Tensor]
ANSWER_TOKENS = 48  # per example
SHOWN_CHARACTERS = 400  # per text of an example


def generate(
    forward: Forward,
    tokenizer: Tokenizer,
    prompt: str = "",
    tokens: int = 100,
    temperature: float = 0.8,
    top: int = 40,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> str:
    """The prompt and at most `tokens` tokens after it; the end-of-document token ends it early.

    temperature: 0 takes the likeliest token. top: draw among the `top` likeliest tokens.
    The text depends only on weights, prompt and `seed`.
    """
    ids = [tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    drawing = temperature, top, torch.Generator().manual_seed(seed)
    return tokenizer.decode(_continue(forward, ids, None, tokenizer.eos, tokens, *drawing, device)[1:])


def answer(
    forward: Forward,
    tokenizer: Tokenizer,
    source: list[int],
    tokens: int = 100,
    temperature: float = 0.0,
    top: int = 40,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[int]:
    """Ids that an encoder-decoder generates for the ids of a source text, without begin and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return _answer(forward, tokenizer, [*source, tokenizer.eos], tokens, temperature, top, generator, device)


def _answer(forward: Forward, tokenizer: Tokenizer, source: list[int], *how: Any) -> list[int]:
    """Like `answer`, for the exact source ids: the source of a prefix has no end token."""
    return _continue(forward, [tokenizer.bos], source, tokenizer.eos, *how)[1:]


def examples(forward: Forward, tokenizer: Tokenizer, batch: Batch, number: int, device: torch.device | str) -> str:
    """Source, target and generated text of the first `number` documents of a batch with a source side."""
    assert batch.source, "the batch has no source side"
    edges = zip(pairwise(batch.source.cu_seqlens.tolist()), pairwise(batch.cu_seqlens.tolist()), strict=True)
    real = [edge for edge, is_real in zip(edges, real_documents(batch), strict=True) if is_real]
    shown = []
    for (source_start, source_end), (start, end) in real[:number]:
        source = batch.source.tokens[source_start:source_end].tolist()
        said = _answer(forward, tokenizer, source, ANSWER_TOKENS, 0.0, 1, torch.Generator(), device)
        wanted = [token for token in batch.labels[start:end].tolist() if token != IGNORED]
        for name, ids in (("source", source), ("target", wanted), ("model", said)):
            words = readable(tokenizer, ids).strip()
            shown.append(f"[{name}]\n{words[:SHOWN_CHARACTERS]}{' ...' if len(words) > SHOWN_CHARACTERS else ''}")
    return "\n".join(shown)


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of the ids; special tokens of the objectives by number, as <61>."""
    parts = []
    for is_mark, group in groupby(ids, key=lambda token: token >= tokenizer.vocabulary):
        run = list(group)
        parts.append("".join(f"<{token}>" for token in run) if is_mark else tokenizer.decode(run))
    return "".join(parts)


def _continue(
    forward: Forward,
    ids: list[int],
    source: list[int] | None,
    eos: int,
    tokens: int,
    temperature: float,
    top: int,
    generator: torch.Generator,
    device: torch.device | str,
) -> list[int]:
    for _ in range(tokens):
        logits_V = forward(one_document(ids, source).to(device), "logits")[-1].float().cpu()
        chosen = _draw(logits_V, temperature, top, generator)
        if chosen == eos:
            break
        ids = [*ids, chosen]
    return ids


def _draw(logits_V: Tensor, temperature: float, top: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    likeliest, ids = logits_V.topk(min(top, len(logits_V)))
    chances = torch.softmax(likeliest / temperature, dim=-1)
    return int(ids[torch.multinomial(chances, 1, generator=generator)])


def one_document(ids: list[int], source: list[int] | None = None) -> Batch:
    """A batch of one document without labels."""
    count = len(ids)
    return Batch(
        tokens=torch.tensor(ids),
        labels=torch.full((count,), IGNORED),
        positions=torch.arange(count),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        dropout_seeds=torch.zeros(count, dtype=torch.int64),
        num_tokens=count,
        num_labels=0,
        num_documents=1,
        source=None if source is None else _source_side(source),
    )


def _source_side(ids: list[int]) -> SourceSide:
    count = len(ids)
    return SourceSide(
        tokens=torch.tensor(ids, dtype=torch.int64),
        positions=torch.arange(count),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        dropout_seeds=torch.zeros(count, dtype=torch.int64),
        num_tokens=count,
    )
