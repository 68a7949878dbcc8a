"""Text from a model: one token after another, drawn by a key.

Takes a forward function, so that it serves the training engine (under ZeRO-3, where a forward is collective, all
ranks generate the same text) and a model loaded from a checkpoint alike. Costs one whole forward pass per token:
there is no cache of keys and values, which is right for samples of a few hundred tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bigmodel.data.batch import IGNORED, Batch
from bigmodel.data.tokenizer import Tokenizer

Forward = Callable[[Batch, str], Tensor]


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
    """Continue `prompt` by at most `tokens` tokens, ending early at the end-of-document token.

    temperature: 0 takes the likeliest token. top: draw among the likeliest so many.
    The text depends on the weights, the prompt and `seed` only.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    for _ in range(tokens):
        logits_V = forward(_one_document(ids).to(device), "logits")[-1].float().cpu()
        chosen = _draw(logits_V, temperature, top, generator)
        if chosen == tokenizer.eos:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[1:])


def _draw(logits_V: Tensor, temperature: float, top: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    likeliest, ids = logits_V.topk(min(top, len(logits_V)))
    chances = torch.softmax(likeliest / temperature, dim=-1)
    return int(ids[torch.multinomial(chances, 1, generator=generator)])


def _one_document(ids: list[int]) -> Batch:
    """A batch of one document without targets."""
    count = len(ids)
    return Batch(
        tokens=torch.tensor(ids),
        targets=torch.full((count,), IGNORED),
        positions=torch.arange(count),
        offsets=torch.tensor([0, count], dtype=torch.int32),
        keys=torch.zeros(count, dtype=torch.int64),
        num_positions=count,
        num_targets=0,
        num_documents=1,
    )
