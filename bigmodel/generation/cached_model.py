"""A model with a key-value cache: prompts first, then one token of every sequence at a time.

In: prompts as ids, then ids of chosen tokens. Out: logits of the next token of each sequence, fp32. Guarantees: the
logits of a whole forward pass, within rounding, for every architecture (a test for each): prompts run through the
model's packed forward pass, which also records their keys and values; later tokens run through the same blocks with
inputs that read the cache. Costs: a prompt as in evaluation; a token one pass over the weights and the keys that it
attends to. The weights must not change meanwhile.

A sequence of mixed attention has its source in the cache before its own tokens. Cross-attention has a store of its own
for sources, whose keys are computed once.

Letters in tensor names: B sequences in the first B slots, T packed tokens of prompts, V vocabulary, and those of
`bigmodel.generation.cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.layer_kinds import LayerKind, kinds_of
from bigmodel.generation.cache import Span, Store, attend, span
from bigmodel.generation.lean import is_lean, lean_copy, wide_table
from bigmodel.generation.prompts import pack
from bigmodel.model.rotary import Table, rotary_table
from bigmodel.model.transformer import AttentionInputs, EncoderOutput, Transformer


@dataclass(frozen=True)
class Prompt:
    """Ids of a decoder's first tokens, at least one; of an encoder-decoder also of its source. The first `prefix`
    tokens of a decoder attend to one another in both directions."""

    ids: Sequence[int]
    source: Sequence[int] | None = None
    prefix: int = 0


class CachedModel:
    """Sequences in the slots 0 to count - 1. `max_positions`: of one sequence, its source included."""

    def __init__(self, model: Transformer, slots: int, max_positions: int) -> None:
        settings = model.settings
        self.model, self.slots, self.max_positions = model, slots, max_positions
        weight = model.embedding.weight
        self.device = weight.device
        self._is_mixed = settings.kind == "encoder_decoder" and settings.source_attention == "mixed"
        self._is_cross = settings.kind == "encoder_decoder" and not self._is_mixed
        self._stepping = lean_copy(model, slots) if is_lean(model) else model
        self._tokens = Store(settings, slots, max_positions, weight)
        self._sources = Store(settings, slots, max_positions, weight) if self._is_cross else None
        self._kinds: list[LayerKind] = [
            kind for kind in kinds_of(settings) if any(kind == b.kind for b in model.blocks)
        ]
        self.lengths: list[int] = []  # cached positions of each sequence
        self._source_lengths: list[int] = []
        self._tables: dict[LayerKind, Table] = {}
        self._bias_HR: Tensor | None = None
        with torch.inference_mode():
            if settings.position_embedding == "rotary":
                places = torch.arange(max_positions, device=self.device)
                self._tables = {kind: rotary_table(places, settings, kind) for kind in self._kinds}
                if is_lean(model):
                    self._tables = {kind: wide_table(table) for kind, table in self._tables.items()}
            elif settings.position_embedding == "relative_bias":
                self._bias_HR = model.relative_bias()

    @property
    def count(self) -> int:
        return len(self.lengths)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        """Take prompts into the next free slots; logits (len(prompts), V) of the tokens after them."""
        model, first = self.model, self.count
        assert first + len(prompts) <= self.slots, f"{len(prompts)} prompts for {self.slots - first} free slots"
        ids = [prompt.ids for prompt in prompts]
        sources = [prompt.source or () for prompt in prompts] if self._is_mixed or self._is_cross else None
        batch = pack(ids, sources, [prompt.prefix for prompt in prompts]).to(self.device)
        own, theirs = [list(map(len, side)) for side in (ids, sources or [()] * len(ids))]
        cached = [one + other for one, other in zip(own, theirs, strict=True)] if self._is_mixed else own
        assert max(*cached, *theirs) <= self.max_positions, "a prompt longer than a slot"
        x_TH, x_SE = model.embed(batch)
        views, source = model.attention_inputs(x_SE, batch)
        for layer, block in enumerate(model.blocks):
            inputs: Any = _Recording(views[block.kind], self._tokens, layer, first, cached)
            seen = source
            if self._sources is not None and source is not None and source.inputs is not None:
                of_source: Any = _Recording(source.inputs, self._sources, layer, first, theirs)
                seen = EncoderOutput(source.states_SE, of_source)
            x_TH = block(x_TH, inputs, batch.dropout_seeds, seen)
        self.lengths += cached
        self._source_lengths += theirs
        return model.head(model.last_states(x_TH[batch.cu_seqlens[1:].long() - 1]), None, "logits")

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; logits (B, V) of the tokens after them."""
        model, count = self._stepping, self.count
        assert len(tokens) == count, f"{len(tokens)} tokens for {count} sequences"
        assert max(self.lengths) < self.max_positions, "a slot is full"
        positions_B = torch.tensor(self.lengths, device=self.device)
        x_BH = model.input(model.embedding(torch.tensor(tokens, device=self.device)), positions_B)
        places = self._tokens.places(positions_B)
        tables = {kind: (cos[positions_B], sin[positions_B]) for kind, (cos, sin) in self._tables.items()}
        spans = {kind: self._span(kind, positions_B, x_BH) for kind in self._kinds}
        of_source = span([0] * count, self._source_lengths, x_BH)
        for layer, block in enumerate(model.blocks):
            inputs: Any = _Cached(self._tokens, layer, spans[block.kind], tables.get(block.kind), places)
            source = None
            if self._sources is not None:
                seen: Any = _Cached(self._sources, layer, of_source)
                source = EncoderOutput(None, seen)
            x_BH = block(x_BH, inputs, None, source)
        self.lengths = [length + 1 for length in self.lengths]
        return model.head(model.last_states(x_BH), None, "logits")

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Afterwards sequence i is the former sequence order[i]; the others are gone."""
        moves = [(to, of) for to, of in enumerate(order) if to != of]
        if moves:
            for store, lengths in ((self._tokens, self.lengths), (self._sources, self._source_lengths)):
                if store is not None:
                    to, of = zip(*moves, strict=True)
                    store.copy(to, of, max(lengths[one] for one in of))
        self.lengths, self._source_lengths = (
            [lengths[of] for of in order] for lengths in (self.lengths, self._source_lengths)
        )

    def drop(self, slot: int) -> None:
        """Remove a sequence; the last one takes its slot."""
        last = self.count - 1
        self.keep([last if one == slot else one for one in range(last)])

    def _span(self, kind: LayerKind, positions_B: Tensor, like: Tensor) -> Span:
        window = self.model.settings.sliding_window if kind == "sliding" else self.max_positions
        first = [max(0, place + 1 - window) for place in self.lengths]
        seen = span(first, [place + 1 for place in self.lengths], like)
        if self._bias_HR is None:
            return seen
        reach = self._bias_HR.shape[1] // 2
        place_P = torch.arange(seen.first, seen.last, device=like.device)
        distance_BP = (place_P - positions_B[:, None]).clamp(-reach, reach)
        bias_BQP = self._bias_HR[:, distance_BP + reach].transpose(0, 1)
        bias_BGRP = bias_BQP.unflatten(1, (self.model.settings.num_kv_heads, -1))
        return Span(seen.first, seen.last, seen.mask, bias_BGRP.to(like.dtype))


class _Recording:
    """Attention inputs of prompts whose keys and values also go into the cache, from slot `first` on."""

    routing = None

    def __init__(self, inner: AttentionInputs, store: Store, layer: int, first: int, lengths: list[int]) -> None:
        self._inner, self._store, self._layer, self._first, self._lengths = inner, store, layer, first, lengths
        self.table, self.source_table, self.rows = inner.table, inner.source_table, inner.rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        in_order = (k, v) if self.rows is None else (k.flip(0), v.flip(0))  # mixed: the last key comes first
        parts = zip(*(side.split(self._lengths) for side in in_order), strict=True)
        for slot, sides in enumerate(parts, self._first):
            self._store.fill(self._layer, slot, *sides)
        return self._inner.attend(q, k, v, scale, softcap)


class _Cached:
    """Attention inputs of one token of each sequence. Without `places` no keys are added."""

    routing = None

    def __init__(
        self, store: Store, layer: int, seen: Span, table: Table | None = None, places: Tensor | None = None
    ) -> None:
        self._store, self._layer, self._seen, self.table, self._places = store, layer, seen, table, places

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        if self._places is not None:
            self._store.append(self._layer, self._places, k, v)
        return attend(q, *self._store.layers[self._layer], self._seen, scale, softcap)
