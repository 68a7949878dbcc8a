"""Attention masks of a batch, for every stack and layer. Only this file chooses them.

In: a batch and the model's settings. Out: the masks that training uses (`attention_masks`), and the same masks as
matrices to draw (`mask_matrices`). `bigmodel.data.plan.visible_pairs` counts the attended pairs from document lengths
alone. Guarantee: tests hold all three equal, and equal to the outputs that change when an input changes.
`kernels/mask.py` defines and pictures the masks. A query attends to:

    stack            full layer (whole document)             sliding layer of window w
    decoder          itself and all before it; also to       itself and w - 1 before it; inside a prefix also
                     the whole prefix, if the document       the rest of the prefix after it
                     has one (data.bidirectional_prefix)
    decoder, mixed   its source, itself, all before it       itself and w - 1 before it: its past, and where
                                                             that is shorter, the end of its source
    encoder          all                                     itself, and w // 2 on either side
    cross-attention  its whole source                        its whole source

Documents never attend to one another. Layers k, 2k, 3k ... of a stack, counted from 1, are full, with k =
`model.full_attention_every`; multi-token prediction (MTP) modules are numbered after the last layer.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bigmodel.config.layer_kinds import LayerKind, kinds_of
from bigmodel.config.settings import ModelSettings
from bigmodel.data.load.batch import Batch
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, intervals, mixed, mixed_rows, prefix_lm

Masks = Mapping[LayerKind, AttentionMask]  # of a stack, by kind of layer


class AttentionMasks(NamedTuple):
    """Masks of one batch, each made once and shared by all layers of its kind."""

    stack: Masks  # of the decoder, or of the only stack
    encoder: Masks | None = None  # of an encoder-decoder's encoder
    cross: AttentionMask | None = None  # of the decoder's cross-attention, if it has one
    key_rows: Tensor | None = None  # mixed: `mixed_rows`, row numbers of the keys of `stack` in source and target


def recurrent_masks(batch: Batch) -> AttentionMasks:
    """Recurrent layers have none; the attention of their encoder-decoder sees the whole source."""
    return AttentionMasks({}, cross=cross(batch.cu_seqlens, batch.source.cu_seqlens) if batch.source else None)


def attention_masks(batch: Batch, settings: ModelSettings) -> AttentionMasks:
    """The masks of a batch in a model."""
    side, window = batch.source, settings.sliding_window
    has_encoder = settings.kind == "encoder_decoder"
    assert has_encoder == (side is not None), (
        f"model.kind = {settings.kind!r} and a batch with source: {side is not None}"
    )
    before: dict[LayerKind, int | None] = {"full": None, "sliding": window - 1}
    kinds = kinds_of(settings)
    if side is None:
        if settings.kind == "encoder":
            return AttentionMasks(_both_ways(batch.cu_seqlens, settings))
        if batch.prefixes is not None:
            return AttentionMasks({kind: prefix_lm(batch.cu_seqlens, batch.prefixes, before[kind]) for kind in kinds})
        return AttentionMasks({kind: causal(batch.cu_seqlens, before[kind]) for kind in kinds})
    encoder = _both_ways(side.cu_seqlens, settings.encoder)
    if settings.source_attention == "cross":
        own = {kind: causal(batch.cu_seqlens, before[kind]) for kind in kinds}
        return AttentionMasks(own, encoder, cross(batch.cu_seqlens, side.cu_seqlens))
    both = {kind: mixed(batch.cu_seqlens, side.cu_seqlens, before[kind]) for kind in kinds}
    rows = mixed_rows(batch.cu_seqlens, side.cu_seqlens, len(batch.tokens), len(side.tokens))
    return AttentionMasks(both, encoder, key_rows=rows)


def _both_ways(cu_seqlens: Tensor, settings: ModelSettings) -> Masks:
    reach: dict[LayerKind, int | None] = {"full": None, "sliding": settings.sliding_window // 2}
    return {kind: bidirectional(cu_seqlens, reach[kind]) for kind in kinds_of(settings)}


# ---- as matrices, to draw ---------------------------------------------------------------------------------------


class MaskMatrix(NamedTuple):
    """One mask in the batch's order: a row is a query, a column a key."""

    name: str  # "decoder", or "decoder, layer 6, 12: whole document"
    query_side: Literal["target", "source"]  # "target": the tokens of the batch itself
    key_sides: tuple[Literal["target", "source"], ...]  # the columns: these sides, end to end
    lo_Q: Tensor  # a query attends to the keys with lo <= place < hi
    hi_Q: Tensor
    place_K: Tensor

    def sees(self, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> Tensor:
        """(rows, columns) bool: the matrix, or the given rows and columns."""
        place_K = self.place_K[columns]
        return (self.lo_Q[rows, None] <= place_K) & (place_K < self.hi_Q[rows, None])


def mask_matrices(batch: Batch, settings: ModelSettings) -> list[MaskMatrix]:
    """Every mask of the model once: of the decoder (or the only stack), cross-attention, the encoder."""
    num_labels = len(batch.tokens)
    masks = recurrent_masks(batch) if settings.is_recurrent else attention_masks(batch, settings)
    num_sources = len(batch.source.tokens) if batch.source else 0
    found, seeds_T, seeds_S = [], torch.arange(num_labels), torch.arange(num_sources)
    for kind, mask in masks.stack.items():
        name = ("encoder" if settings.kind == "encoder" else "decoder") + _layers_of(settings, kind)
        lo_Q, hi_Q = intervals(mask, num_labels)
        if masks.key_rows is None:
            found.append(MaskMatrix(name, "target", ("target",), lo_Q, hi_Q, seeds_T))
        else:  # mixed: queries and keys are reversed
            places = masks.key_rows.argsort()
            found.append(MaskMatrix(name, "target", ("source", "target"), lo_Q.flip(0), hi_Q.flip(0), places))
    if masks.cross is not None:
        edges = intervals(masks.cross, num_labels)
        found.append(MaskMatrix("cross-attention", "target", ("source",), *edges, seeds_S))
    for kind, mask in (masks.encoder or {}).items():
        name = "encoder" + _layers_of(settings.encoder, kind)
        found.append(MaskMatrix(name, "source", ("source",), *intervals(mask, num_sources), seeds_S))
    return found


def _layers_of(settings: ModelSettings, kind: LayerKind) -> str:
    """The layers of this kind, counted from 1, as text; empty where all attend to the whole document."""
    if not settings.sliding_window:
        return ""
    extent = "whole document" if kind == "full" else f"window of {settings.sliding_window}"
    if len(kinds_of(settings)) == 1:
        return f": {extent}"
    every = settings.full_attention_every
    full = list(
        range(settings.first_full_attention or every, settings.num_layers + settings.num_mtp_modules + 1, every)
    )
    listed = ", ".join(map(str, full[:3])) + (" ..." if len(full) > 3 else "")
    return f", layer {listed}: {extent}" if kind == "full" else f", other layers: {extent}"
