"""The transformer: packed documents in, their loss out.

In: a `Batch` of T positions (for an encoder-decoder also S source positions). Out: the summed loss, the loss of each
position (both weighted where the batch has weights), or logits. Guarantees: documents cannot influence one another
(attention, positions and loss restart at each boundary); dropout depends on the batch's dropout seeds only, not on rank
or call order. The model does not know the number of machines: ZeRO is applied from outside.

    tokens -> embedding -> [ norm -> attention -> + -> norm -> feed-forward -> + ] x layers -> norm -> head -> loss

By default; `model.norm_placement` and other settings make the blocks those of Gemma, OLMo, T5, BERT and others.

Example: cu_seqlens [0, 5, 7, 8], hidden_size 64, vocabulary 32,000: tokens (8,) -> hidden states (8, 64) -> loss sum
() over the labels of three documents; the logits (8, 32000) exist only if `output` asks for them.

A decoder is causal (all positions of a document attend to its prefix, `batch.prefixes`), an encoder bidirectional. An
encoder-decoder is an encoder of the source and a decoder whose blocks attend to the encoder's states: by a second
attention (`cross`), or in one softmax with their own past (`mixed`).

Letters in tensor names: T positions of the micro-batch, S of its source side, H hidden_size, E the encoder's, Q query
heads, G key/value heads, K head_dim, F intermediate_size, V vocabulary. `x_TH` is a tensor of shape (T, H).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.config.layer_kinds import LayerKind, layer_kind
from bigmodel.config.settings import ModelSettings
from bigmodel.data.load.batch import Batch
from bigmodel.kernels.attention import TileMetadata, attention, attention_and_largest, make_tile_metadata
from bigmodel.kernels.attention_dropout import AttentionDropout, make_dropout
from bigmodel.kernels.linear_choices import linear_choices
from bigmodel.kernels.linear_cross_entropy import (
    IGNORED,
    Options,
    linear_cross_entropy_and_losses,
    linear_cross_entropy_per_token,
    linear_predictions,
)
from bigmodel.kernels.linear_distillation import Taught, linear_distillation
from bigmodel.kernels.mask import AttentionMask
from bigmodel.kernels.relative_bias import t5_bias
from bigmodel.model.attention_masks import AttentionMasks, Masks, attention_masks
from bigmodel.model.class_head import ClassHead
from bigmodel.model.experts import MixtureOfExperts, Routing, has_experts
from bigmodel.model.layers import FeedForward, Input, Linear, drop_documents, dropout, make_head_norm, make_norm
from bigmodel.model.loss_groups import by_group
from bigmodel.model.own_predictions import with_own_predictions
from bigmodel.model.rotary import Table, rotary_table, rotate
from bigmodel.model.teacher import Teacher

Output = Literal["loss_sum", "loss_per_position", "predictions", "choices", "logits"]
CROSS_SALT = 1 << 20  # added to the dropout salt of cross-attention: larger than all other salts


@dataclass(frozen=True)
class AttentionInputs:
    """Mask, tile metadata and positions of a batch: made once, used by all layers of one kind in a stack."""

    mask: AttentionMask
    tile_metadata: TileMetadata
    table: Table | None = None  # rotary, of the queries and their aligned keys
    bias_HR: Tensor | None = None
    source_table: Table | None = None  # mixed: rotary, of the source's keys
    rows: Tensor | None = None  # mixed: row numbers of the keys in source and decoder rows, last first (`mixed_rows`)
    dropout: AttentionDropout | None = None
    kernel: str = "triton"  # of `attention`
    routing: Routing | None = None  # of layers with experts

    def attend(
        self,
        q_TQK: Tensor,
        k_SGK: Tensor,
        v_SGK: Tensor,
        scale: float | None,
        softcap: float | None,
        first_head: int | None = None,
    ) -> Tensor:
        """(T, Q, K). Generation has inputs whose `attend` reads the keys of previous tokens from a cache.
        `first_head`: with dropout, the number of the first head for its draws."""
        rows, more = (q_TQK, k_SGK, v_SGK, self.mask, self.tile_metadata), self._dropout_from(first_head)
        return attention(*rows, scale, softcap, self.bias_HR, **more, kernel=self.kernel)

    def attend_and_measure(
        self,
        q_TQK: Tensor,
        k_SGK: Tensor,
        v_SGK: Tensor,
        scale: float | None,
        softcap: float | None,
        first_head: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attend`, and the largest score of each query head (Q,), before bias and cap."""
        rows = q_TQK, k_SGK, v_SGK, self.mask, self.tile_metadata
        return attention_and_largest(*rows, scale, softcap, self.bias_HR, **self._dropout_from(first_head))

    def _dropout_from(self, first_head: int | None) -> dict[str, Any]:
        return {} if self.dropout is None or first_head is None else {"dropout": self.dropout.from_head(first_head)}


Views = Mapping[LayerKind, AttentionInputs]


class EncoderOutput(NamedTuple):
    """For a decoder: the encoder's states (S, E) and, with cross-attention, its attention inputs. Without states the
    inputs have the source's keys in a cache."""

    states_SE: Tensor | None
    inputs: AttentionInputs | None
    seeds_S: Tensor | None = None  # dropout seeds of the source


class RelativeBias(nn.Embedding):
    """T5's learned bias by distance, (H, R), for all layers of a stack."""

    def __init__(self, settings: ModelSettings, sees_both_ways: bool) -> None:
        super().__init__(settings.relative_buckets, settings.num_heads)
        self.sees_both_ways, self.distance = sees_both_ways, settings.relative_distance

    def forward(self) -> Tensor:
        return t5_bias(self.weight, self.sees_both_ways, self.distance)


class Attention(nn.Module):
    """Attention inside each document, with grouped-query heads (Ainslie et al. 2023)."""

    largest_Q: Tensor | None = None  # if set: the largest scores of each query head in training so far

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.dropout, self.first_head = settings.attention_dropout, layer * settings.num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = (
            settings.num_heads,
            settings.num_kv_heads,
            settings.resolved_head_dim,
        )
        self.scale, self.softcap = settings.resolved_attention_scale, settings.attention_softcap or None
        has_bias = settings.attention_bias != "none"
        rows = tuple(heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads))
        self.query_key_value = Linear(settings.hidden_size, sum(rows), has_bias, parts=rows)
        self.output = Linear(self.num_heads * self.head_dim, settings.hidden_size, settings.attention_bias == "all")
        self.query_norm, self.key_norm = (
            make_head_norm(settings, number) for number in (self.num_heads, self.num_kv_heads)
        )

    def project(self, x_TH: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        heads_TNK = self.query_key_value(x_TH).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, self.head_dim))
        q_TQK, k_TGK, v_TGK = heads_TNK.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q_TQK, k_TGK = self.query_norm(q_TQK), self.key_norm(k_TGK)
        if inputs.table:
            q_TQK, k_TGK = rotate(q_TQK, inputs.table), rotate(k_TGK, inputs.table)
        return q_TQK, k_TGK, v_TGK

    def forward(self, x_TH: Tensor, inputs: AttentionInputs) -> Tensor:
        return self.output(_attend(self, inputs, *self.project(x_TH, inputs)).flatten(1))


def _attend(attention: Any, inputs: AttentionInputs, *rows: Tensor) -> Tensor:
    """The attention's output before its output matrix; in training also its largest scores, if asked for."""
    if attention.largest_Q is None or not attention.training:
        return inputs.attend(*rows, *_of_scores(attention))
    out_TQK, largest_Q = inputs.attend_and_measure(*rows, *_of_scores(attention))
    attention.largest_Q = torch.maximum(attention.largest_Q, largest_Q)
    return out_TQK


def _of_scores(attention: Any) -> tuple[Any, ...]:
    """Scale, cap and, with dropout, the number of the first head. Without dropout that number is not read:
    torch.compile then has one graph for all layers."""
    drops = attention.training and attention.dropout
    return (attention.scale, attention.softcap, *((attention.first_head,) if drops else ()))


class MixedAttention(Attention):
    """A decoder's own past and its source in one softmax. The source comes before the target, as in a prefix-LM."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__(settings, layer)
        rows, has_bias = self.num_kv_heads * self.head_dim, settings.attention_bias != "none"
        self.source_key_value = Linear(settings.encoder.hidden_size, 2 * rows, has_bias, parts=(rows, rows))

    def forward(self, x_TH: Tensor, inputs: AttentionInputs, states_SE: Tensor | None = None) -> Tensor:
        if states_SE is None:  # a step of generation: the source's keys are in the inputs' cache
            return super().forward(x_TH, inputs)
        assert inputs.source_table is not None, "mixed attention needs inputs from make_mixed_views"
        q_TQK, k_TGK, v_TGK = self.project(x_TH, inputs)
        source_SNK = self.source_key_value(states_SE).unflatten(-1, (2 * self.num_kv_heads, self.head_dim))
        source_k_SGK, source_v_SGK = source_SNK.split(self.num_kv_heads, dim=1)
        source_k_SGK = rotate(self.key_norm(source_k_SGK), inputs.source_table)
        k, v = (torch.cat(sides)[inputs.rows] for sides in ((source_k_SGK, k_TGK), (source_v_SGK, v_TGK)))
        out_TQK = _attend(self, inputs, q_TQK.flip(0), k, v).flip(0)
        return self.output(out_TQK.flatten(1))


class CrossAttention(nn.Module):
    """Every position of a target attends to its whole source; no position embedding, as in T5."""

    largest_Q: Tensor | None = None  # as in `Attention`

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.dropout, self.first_head = settings.attention_dropout, CROSS_SALT + layer * settings.num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = (
            settings.num_heads,
            settings.num_kv_heads,
            settings.resolved_head_dim,
        )
        self.scale, self.softcap = settings.resolved_attention_scale, settings.attention_softcap or None
        has_bias = settings.attention_bias != "none"
        self.query = Linear(settings.hidden_size, self.num_heads * self.head_dim, has_bias)
        rows = self.num_kv_heads * self.head_dim
        self.key_value = Linear(settings.encoder.hidden_size, 2 * rows, has_bias, parts=(rows, rows))
        self.output = Linear(self.num_heads * self.head_dim, settings.hidden_size, settings.attention_bias == "all")
        self.query_norm, self.key_norm = (
            make_head_norm(settings, number) for number in (self.num_heads, self.num_kv_heads)
        )

    def forward(self, x_TH: Tensor, source: EncoderOutput) -> Tensor:
        assert source.inputs is not None, "cross-attention needs an encoder output with attention inputs"
        q_TQK = self.query_norm(self.query(x_TH).unflatten(-1, (self.num_heads, self.head_dim)))
        if source.states_SE is None:
            none = q_TQK[:0]  # no keys beside those in the cache
            return self.output(_attend(self, source.inputs, q_TQK, none, none).flatten(1))
        k_SGK, v_SGK = self.key_value(source.states_SE).unflatten(-1, (2, self.num_kv_heads, self.head_dim)).unbind(1)
        rows = q_TQK, self.key_norm(k_SGK), v_SGK
        out_TQK = _attend(self, source.inputs, *rows)
        if torch.is_grad_enabled() and not out_TQK.requires_grad:
            # No target here has a source: gradients must be zero, not absent, because all ranks reduce them together.
            out_TQK = out_TQK + sum(row[:0].sum() for row in rows)
        return self.output(out_TQK.flatten(1))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream, with norms by `model.norm_placement`.

    In an encoder-decoder, decoder blocks attend to the source in the same attention (mixed) or in a second one (cross).
    `inputs` are the attention inputs of the block's `kind` of layer.
    """

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout, self.kind = layer, settings.dropout, layer_kind(settings, layer)
        self.death_rate = settings.stochastic_depth * min(1.0, (layer + 1) / settings.num_layers)
        self.is_mixed = settings.kind == "encoder_decoder" and settings.source_attention == "mixed"
        self.is_cross = settings.kind == "encoder_decoder" and not self.is_mixed
        self.placement = settings.norm_placement
        self.adapters: list[tuple[Any, bool]] = []  # of its matrices; whether they read the source
        is_normalised = layer == 0 and settings.embedding_norm and self.placement == "pre"  # by the embedding's norm
        self.attention_norm = nn.Identity() if is_normalised else make_norm(settings.hidden_size, settings)
        self.attention = (MixedAttention if self.is_mixed else Attention)(settings, layer)
        if self.is_cross:
            self.cross_attention_norm = make_norm(settings.hidden_size, settings)
            self.cross_attention = CrossAttention(settings, layer)
        self.feed_forward_norm = make_norm(settings.hidden_size, settings)
        self.has_experts = has_experts(settings, layer)
        self.feed_forward = MixtureOfExperts(settings) if self.has_experts else FeedForward(settings)
        if self.placement == "sandwich":
            self.attention_output_norm = make_norm(settings.hidden_size, settings)
            self.feed_forward_output_norm = make_norm(settings.hidden_size, settings)
            if self.is_cross:
                self.cross_attention_output_norm = make_norm(settings.hidden_size, settings)

    def forward(
        self, x_TH: Tensor, inputs: AttentionInputs, seeds_T: Tensor, source: EncoderOutput | None = None
    ) -> Tensor:
        for adapters, of_source in self.adapters:
            adapters.seeds_T = source.seeds_S if of_source and source else seeds_T
        seen = (source.states_SE,) if self.is_mixed and source else ()
        x_TH = self.add("attention", x_TH, seeds_T, (2, 0), inputs, *seen)
        if self.is_cross:
            x_TH = self.add("cross_attention", x_TH, seeds_T, (1, CROSS_SALT), source)
        routing = (inputs.routing,) if self.has_experts else ()
        return self.add("feed_forward", x_TH, seeds_T, (2, 1), *routing)

    def add(self, name: str, x_TH: Tensor, seeds_T: Tensor, salt: tuple[int, int], *inputs: Any) -> Tensor:
        """x plus the sublayer's output. The norm is of the sublayer's input (pre), of its output (output), of both
        (sandwich), or of the sum (post)."""
        sublayer, norm = getattr(self, name), getattr(self, f"{name}_norm")
        out_TH = sublayer(norm(x_TH) if self.placement in ("pre", "sandwich") else x_TH, *inputs)
        if self.placement == "sandwich":
            out_TH = getattr(self, f"{name}_output_norm")(out_TH)
        elif self.placement == "output":
            out_TH = norm(out_TH)
        x_TH = x_TH + self.drop(out_TH, seeds_T, *salt)
        return norm(x_TH) if self.placement == "post" else x_TH

    def drop(self, x_TH: Tensor, seeds_T: Tensor, times: int, plus: int = 0) -> Tensor:
        """Dropout and stochastic depth of salt times * layer + plus. Without them the layer's number is not read:
        torch.compile then has one graph for all layers."""
        if self.training and self.dropout:
            x_TH = dropout(x_TH, self.dropout, seeds_T, salt=times * self.layer + plus)
        if self.training and self.death_rate:
            x_TH = drop_documents(x_TH, self.death_rate, seeds_T, salt=times * self.layer + plus)
        return x_TH


class Head(nn.Module):
    """From hidden states to the loss, without T x V logits in memory.

    The loss is computed inside this module's forward: under ZeRO-3 the weight is whole only there. The value of
    loss_sum excludes the z-loss, its gradient includes it; loss_per_position is the plain cross-entropy. The same holds
    for the divergence from what is `taught`. For choices, the seeds of the draws,
    or None for the likeliest tokens, take the place of the labels.
    """

    def __init__(self, weight_VH: nn.Parameter, options: Options) -> None:
        super().__init__()
        self.weight = weight_VH
        self.options = options
        self.z_sum: Tensor | float = 0.0  # of the last loss_sum: sum of logsumexp(logits)^2 over its labels
        self.divergence_sum = torch.zeros(())  # of the last loss_sum with a teacher
        self.plain_sum = 0.0  # its loss is no other one

    def forward(
        self,
        x_TH: Tensor,
        labels_T: Tensor,
        output: Output,
        groups_T: Tensor | None = None,
        num_loss_groups: int = 1,
        weights_T: Tensor | None = None,
        taught: Taught | None = None,
    ) -> Tensor:
        softcap = self.options.logit_softcap
        if output == "loss_sum":
            if taught is None:
                sums, losses_T = linear_cross_entropy_and_losses(
                    x_TH, self.weight, labels_T, self.options, weights_T=weights_T
                )
            else:
                (sums, self.divergence_sum), losses_T = linear_distillation(
                    x_TH, self.weight, taught, labels_T, self.options, weights_T=weights_T
                )
            self.z_sum = sums.z_sum.detach()
            return sums.loss_sum if groups_T is None else by_group(sums.loss_sum, losses_T, groups_T, num_loss_groups)
        if output == "loss_per_position":
            return linear_cross_entropy_per_token(x_TH, self.weight, labels_T, softcap, weights_T=weights_T)
        if output == "predictions":
            return linear_predictions(x_TH, self.weight, labels_T, softcap)
        if output == "choices":
            return linear_choices(x_TH, self.weight, labels_T, softcap)
        logits_TV = x_TH.float() @ self.weight.float().T
        return softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV


def make_head(settings: ModelSettings, embedding: nn.Embedding, options: Options) -> nn.Module:
    """Of classes, or of tokens: with a matrix of its own, or the embedding's."""
    if settings.classification:
        return ClassHead(settings, options)
    rows, width = embedding.num_embeddings, settings.hidden_size
    weight_VH = embedding.weight if settings.tied_embeddings else nn.Parameter(torch.empty(rows, width))
    return Head(weight_VH, options)


def ahead(labels_T: Tensor, cu_seqlens: Tensor, steps: int, beyond: float = IGNORED) -> Tensor:
    """(T,) the label, or weight, `steps` positions later in the same document; `beyond` behind its end."""
    row_T = _rows(labels_T)
    document_T = torch.searchsorted(cu_seqlens, row_T, right=True)
    later_T = (row_T + steps).clamp(max=len(row_T) - 1)
    inside_T = (row_T + steps < len(row_T)) & (document_T[later_T] == document_T)
    return torch.where(inside_T, labels_T[later_T], beyond)


class Encoder(nn.Module):
    """The source side of an encoder-decoder: embedded sources (S, E) to normalised states for the decoder."""

    attention_kernel = "triton"

    def __init__(self, settings: ModelSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        if settings.separate_embeddings:
            self.embedding = nn.Embedding(vocabulary, settings.hidden_size)
        if settings.position_embedding == "relative_bias":
            self.relative_bias = RelativeBias(settings, sees_both_ways=True)
        self.input = Input(settings)
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.num_layers))
        self.norm = last_norm(settings)

    def forward(self, x_SE: Tensor, masks: Masks, positions_S: Tensor, seeds_S: Tensor) -> Tensor:
        views = make_views(self, masks, positions_S, seeds_S)
        for block in self.blocks:
            x_SE = block(x_SE, views[block.kind], seeds_S)
        return self.norm(x_SE)


def last_norm(settings: ModelSettings) -> nn.Module:
    """The norm after the last block of a stack; the last block itself ends with one if norms are of the sums."""
    return nn.Identity() if settings.norm_placement == "post" else make_norm(settings.hidden_size, settings)


def make_views(stack: nn.Module, masks: Masks, positions_T: Tensor, seeds_T: Tensor) -> Views:
    """Attention inputs of an encoder's or decoder's self-attention, one for each kind of layer."""
    settings, rows = stack.settings, len(positions_T)
    drops = dropout_of_weights(stack, seeds_T, seeds_T)
    schedules = {kind: make_tile_metadata(mask, rows, rows) for kind, mask in masks.items()}
    more: dict[str, Any] = {"dropout": drops, "kernel": stack.attention_kernel}
    if settings.position_embedding == "relative_bias":
        more["bias_HR"] = stack.relative_bias()
    if settings.position_embedding in ("relative_bias", "learned", "sinusoidal"):  # the latter: added by `Input`
        return {kind: AttentionInputs(mask, schedules[kind], **more) for kind, mask in masks.items()}
    tables = {kind: rotary_table(positions_T, settings, kind) for kind in masks}
    return {kind: AttentionInputs(mask, schedules[kind], tables[kind], **more) for kind, mask in masks.items()}


def dropout_of_weights(stack: nn.Module, query_seeds_T: Tensor, key_seeds_S: Tensor) -> AttentionDropout | None:
    """Of a stack's attention weights; None outside training."""
    rate = stack.settings.attention_dropout
    return make_dropout(rate, query_seeds_T, key_seeds_S) if rate and stack.training else None


def make_mixed_views(stack: nn.Module, masks: AttentionMasks, batch: Batch) -> Views:
    """Attention inputs of mixed attention. A target's positions continue those of its source."""
    assert batch.source, "mixed attention needs a batch with a source side"
    settings, side, rows = stack.settings, batch.source, len(batch.tokens)
    key_seeds = torch.cat([side.dropout_seeds, batch.dropout_seeds])[masks.key_rows]
    drops = dropout_of_weights(stack, batch.dropout_seeds.flip(0), key_seeds)
    behind_T = side.cu_seqlens.diff()[torch.searchsorted(batch.cu_seqlens, _rows(batch.tokens), right=True) - 1]
    return {
        kind: AttentionInputs(
            mask,
            make_tile_metadata(mask, rows, rows + len(side.tokens)),
            rotary_table(batch.positions + behind_T, settings, kind),
            source_table=rotary_table(side.positions, settings, kind),
            rows=masks.key_rows,
            dropout=drops,
        )
        for kind, mask in masks.stack.items()
    }


class Transformer(nn.Module):
    """The model. `forward(batch)` gives the loss summed over the batch's labels, in fp32, in nats: a scalar, or one sum
    per loss group (`batch.loss_groups`), which add up to it.

    z_loss, MTP modules and a teacher change the gradient of that sum, not its value; label_smoothing changes both
    (Options).
    """

    teacher: Teacher | None = None
    attention_kernel = "triton"  # of self-attention: a name of KERNELS in kernels/attention.py
    plain_sum: Tensor | float = 0.0  # as z_sum: a classification's loss without weights and focal factor

    def __init__(
        self, settings: ModelSettings, vocabulary: int, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(vocabulary, settings.hidden_size)
        self.input = Input(settings)
        if settings.kind == "encoder_decoder":
            self.encoder = Encoder(settings.encoder, vocabulary)
        if settings.position_embedding == "relative_bias":
            self.relative_bias = RelativeBias(settings, sees_both_ways=settings.kind == "encoder")
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.num_layers))
        extra = range(settings.num_layers, settings.num_layers + settings.num_mtp_modules)
        self.extra_blocks = nn.ModuleList(Block(settings, layer) for layer in extra)
        self.norm = last_norm(settings)
        self.head = make_head(settings, self.embedding, Options(z_loss, label_smoothing, settings.logit_softcap))
        # Over the micro-batches of a step; the caller resets them to 0.
        self.z_sum: Tensor | float = 0.0
        self.loads_LE: Tensor | float = 0.0  # of layers with experts: see `bigmodel.model.experts.Recorded`
        self.dropped_L: Tensor | float = 0.0
        self.router_z_sum: Tensor | float = 0.0

    def forward(self, batch: Batch, output: Output = "loss_sum") -> Tensor:
        """loss_sum: () or (loss groups,); loss_per_position: (T,), 0 without a label; logits: (T, V), with a
        classification head (D, C) of D documents and C classes. All fp32. predictions: (3, T) fp64, see
        `linear_predictions`; a classification head has none."""
        return self.read_out(*self.embed(batch), batch, output)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens (T, H), and embedded sources (S, E) or None."""
        x_TH = self.input(self.embedding(batch.tokens), batch.positions, batch.dropout_seeds)
        side = batch.source
        if side is None:
            return x_TH, None
        of_source = self.encoder.embedding if self.settings.separate_embeddings else self.embedding
        return x_TH, self.encoder.input(of_source(side.tokens), side.positions, side.dropout_seeds)

    def read_out(self, x_TH: Tensor, x_SE: Tensor | None, batch: Batch, output: Output) -> Tensor:
        """The rest of `forward`, after the embedding."""
        x_TH, views, source = self.trunk(x_TH, x_SE, batch)
        weights_T = batch.weights
        more = (batch.cu_seqlens, weights_T) if self.settings.classification else (weights_T,)
        states_TH, labels, groups = self.last_states(x_TH), batch.labels, (batch.loss_groups, batch.num_loss_groups)
        teacher = self.teacher if output == "loss_sum" and self.training else None
        result = self.head(states_TH, labels, output, *groups, *more, *([teacher.read(batch)] if teacher else []))
        if teacher:
            teacher.add(self.head.divergence_sum)
        if output == "loss_sum" and self.training:
            self.z_sum = self.z_sum + self.head.z_sum
            self.plain_sum = self.plain_sum + self.head.plain_sum
        if output == "loss_sum" and self.training and len(self.extra_blocks):
            extra = sum(
                self.head(
                    self.last_states(block(x_TH, views[block.kind], batch.dropout_seeds, source)),
                    ahead(batch.labels, batch.cu_seqlens, steps),
                    output,
                    weights_T=None if weights_T is None else ahead(weights_T, batch.cu_seqlens, steps, beyond=0.0),
                )
                for steps, block in enumerate(self.extra_blocks, 1)
            )
            weight = self.settings.mtp_loss_weight / len(self.extra_blocks) / max(1, result.numel())
            result = result + weight * (extra - extra.detach())
        routing = next((view.routing for view in views.values()), None)
        if output == "loss_sum" and routing is not None and routing.records:
            result = self._balanced(result, routing)
        return result

    def _balanced(self, result: Tensor, routing: Routing) -> Tensor:
        """With the gradient of the balance of experts; counts their loads."""
        loads_LE, dropped_L, term, z_sum = routing.close()
        self.loads_LE, self.router_z_sum = self.loads_LE + loads_LE, self.router_z_sum + z_sum
        self.dropped_L = self.dropped_L + dropped_L
        return result + (term - term.detach()) / max(1, result.numel())

    def hidden(self, x_TH: Tensor, batch: Batch, x_SE: Tensor | None = None) -> Tensor:
        """Embedded tokens (T, H) to the head's input (T, H)."""
        return self.last_states(self.trunk(x_TH, x_SE, batch)[0])

    def last_states(self, x_TH: Tensor) -> Tensor:
        """Normalised and scaled: the head's input."""
        x_TH = self.norm(x_TH)
        scale = self.settings.resolved_logit_scale
        return x_TH if scale == 1.0 else x_TH * scale

    def trunk(self, x_TH: Tensor, x_SE: Tensor | None, batch: Batch) -> tuple[Tensor, Views, EncoderOutput | None]:
        """Through all blocks: the states (T, H) before the last norm, the attention inputs, the encoder's output."""
        views, source = self.attention_inputs(x_SE, batch)
        if self.settings.experts:
            routing = Routing(batch, records=self.training and torch.is_grad_enabled())
            views = {kind: replace(view, routing=routing) for kind, view in views.items()}

        def through(x_TH: Tensor) -> Tensor:
            for block in self.blocks:
                x_TH = block(x_TH, views[block.kind], batch.dropout_seeds, source)
            return x_TH

        if self.training and batch.replaced is not None:
            x_TH = with_own_predictions(self, x_TH, batch, through)
        return through(x_TH), views, source

    def attention_inputs(self, x_SE: Tensor | None, batch: Batch) -> tuple[Views, EncoderOutput | None]:
        """The blocks' attention inputs, and the encoder's output; runs the encoder."""
        masks, side = attention_masks(batch, self.settings), batch.source
        if side is None or x_SE is None:
            return make_views(self, masks.stack, batch.positions, batch.dropout_seeds), None
        states_SE = self.encoder(x_SE, masks.encoder, side.positions, side.dropout_seeds)
        if masks.cross is None:
            return make_mixed_views(self, masks, batch), EncoderOutput(states_SE, None, side.dropout_seeds)
        tiles = make_tile_metadata(masks.cross, len(batch.tokens), len(side.tokens))
        drops = dropout_of_weights(self, batch.dropout_seeds, side.dropout_seeds)
        views = make_views(self, masks.stack, batch.positions, batch.dropout_seeds)
        seen = AttentionInputs(masks.cross, tiles, dropout=drops)
        return views, EncoderOutput(states_SE, seen, side.dropout_seeds)


def _rows(tokens_T: Tensor) -> Tensor:
    return torch.arange(len(tokens_T), device=tokens_T.device, dtype=torch.int32)
