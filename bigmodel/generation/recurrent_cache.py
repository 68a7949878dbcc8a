"""The cache of a recurrent model: the last states of every sequence, and the source's where there is one.

In: prompts as ids, then ids of chosen tokens; the methods of `bigmodel.generation.cached_model.CachedModel`. Out:
logits of the next token of each sequence, fp32. Guarantee: the logits of a whole forward pass, within rounding. Costs:
a token one pass over the weights whatever came before it; memory does not grow with the text.

Letters in tensor names: B sequences in the first B slots, S source positions, H hidden_size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel.generation.cache import Span, attend, span
from bigmodel.generation.cached_model import CachedModel, Prompt
from bigmodel.generation.prompts import pack
from bigmodel.model.recurrent.layer import State
from bigmodel.model.recurrent.model import Recurrent
from bigmodel.model.recurrent.timeline import one_step
from bigmodel.model.transformer import Transformer


def make_cache(model: Transformer, slots: int, max_positions: int) -> CachedModel:
    """The cache that fits the model."""
    return (RecurrentCache if isinstance(model, Recurrent) else CachedModel)(model, slots, max_positions)


class _Source:
    """Attention of one token of each sequence to the kept states of its source."""

    def __init__(self, states_BGSK: Tensor, seen: Span) -> None:
        self._states, self._seen = states_BGSK, seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        return attend(q, self._states, self._states, self._seen, scale, softcap)


class RecurrentCache(CachedModel):
    """Sequences in the slots 0 to count - 1. `max_positions`: of one sequence, and of one source."""

    def __init__(self, model: Recurrent, slots: int, max_positions: int) -> None:
        self.model, self.slots, self.max_positions = model, slots, max_positions
        self.device = model.embedding.weight.device
        self.lengths: list[int] = []
        self._last_states: list[State] = []  # by layer
        self._source_states: list[Tensor] = []  # (S, H) of each sequence

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        model, first = self.model, self.count
        assert first + len(prompts) <= self.slots, f"{len(prompts)} prompts for {self.slots - first} free slots"
        ids = [prompt.ids for prompt in prompts]
        sources = [prompt.source or () for prompt in prompts] if model.settings.has_source else None
        batch = pack(ids, sources).to(self.device)
        x_TH, source, states = model.advance(*model.embed(batch), batch)
        if batch.source and source and source.states_SE is not None:
            self._source_states += source.states_SE.split(batch.source.cu_seqlens.diff().tolist())
        self._last_states = [
            tuple(torch.cat(sides) for sides in zip(before, new, strict=True)) if first else new
            for before, new in zip(self._last_states or states, states, strict=True)
        ]
        self.lengths += map(len, ids)
        return model.head(model.last_states(x_TH[batch.cu_seqlens[1:].long() - 1]), None, "logits")

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        model, count = self.model, self.count
        assert len(tokens) == count, f"{len(tokens)} tokens for {count} sequences"
        assert max(self.lengths) < self.max_positions, "a slot is full"
        line = one_step(count, self.device)
        x_BH = model.input(model.embedding(torch.tensor(tokens, device=self.device)), line.order_T)
        x_BH, self._last_states = model.layers(model.blocks, x_BH, line, line.order_T, self._last_states)
        if self._source_states:
            x_BH = model.source_attention(x_BH, None, self._attention(x_BH))
        self.lengths = [length + 1 for length in self.lengths]
        return model.head(model.last_states(x_BH), None, "logits")

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        self.lengths = [self.lengths[of] for of in order]
        self._source_states = [self._source_states[of] for of in order] if self._source_states else []
        self._last_states = [tuple(side[list(order)] for side in state) for state in self._last_states]

    def _attention(self, like: Tensor) -> _Source:
        lengths, heads = [len(states_SH) for states_SH in self._source_states], self.model.source_attention.num_heads
        states_BSH = torch.nn.utils.rnn.pad_sequence(self._source_states, batch_first=True)
        return _Source(states_BSH.unflatten(-1, (heads, -1)).transpose(1, 2), span([0] * len(lengths), lengths, like))
