"""Recurrent models: packed documents in, their loss out, as `bigmodel.model.transformer` and with its head.

    rnn, lstm, gru:
        tokens -> embedding -> norm -> [ layer -> dropout ] x layers -> norm -> head -> loss
    lstm_encoder_decoder:
        source -> embedding -> norm -> [ layer -> dropout ] x layers -> states s
        tokens -> embedding -> norm -> [ layer -> dropout ] x layers -> attention to s -> norm -> head -> loss

Each layer of the target begins with the last state of the source's layer of the same number; documents without a source
begin with zeros, as all documents of a model without encoder do. The attention is Luong's (2015), global, with the
score "general": c = sum over the source of softmax(h W s) s, then tanh(V [c; h]). Unlike Bahdanau's (2014), and without
Luong's input feeding, no state waits for the attention of the token before, so that layers run over all tokens at once.

Guarantees: a document's states and gradients depend on its own tokens alone, bitwise; dropout on the dropout seeds
alone. Documents are read left to right; `data.bidirectional_prefix` has no effect.

Letters in tensor names: T rows, S rows of the source, N documents, H hidden_size, K channels of an attention head.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bigmodel.config.settings import ModelSettings
from bigmodel.data.load.batch import Batch, SourceSide
from bigmodel.kernels.attention import make_tile_metadata
from bigmodel.kernels.linear_cross_entropy import Options
from bigmodel.kernels.mask import cross
from bigmodel.model.layers import EMBEDDING_SALT, Linear, dropout, make_norm
from bigmodel.model.recurrent.layer import Layer, State
from bigmodel.model.recurrent.timeline import Timeline, timeline
from bigmodel.model.transformer import AttentionInputs, EncoderOutput, Transformer, Views, make_head

MOST_CHANNELS = 256  # of a head, in the GPU kernels


def attention_heads(width: int) -> int:
    """Luong's attention has one head; above 256 channels as few as the kernels can compute."""
    return next(heads for heads in range(1, width + 1) if width % heads == 0 and width // heads <= MOST_CHANNELS)


class Normalised(nn.Module):
    """Embedded tokens (T, H), normalised and dropped; takes the place of the transformer's `Input`."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.norm = make_norm(settings.hidden_size, settings)
        self.dropout = settings.embedding_dropout

    def forward(self, x_TH: Tensor, _positions_T: Tensor, seeds_T: Tensor | None = None) -> Tensor:
        x_TH = self.norm(x_TH)
        if not (self.training and self.dropout):
            return x_TH
        assert seeds_T is not None, "dropout of embeddings needs the batch's seeds"
        return dropout(x_TH, self.dropout, seeds_T, EMBEDDING_SALT)


class SourceEncoder(nn.Module):
    """The source side of an encoder-decoder."""

    def __init__(self, settings: ModelSettings, vocabulary: int) -> None:
        super().__init__()
        if settings.separate_embeddings:
            self.embedding = nn.Embedding(vocabulary, settings.hidden_size)
        self.input = Normalised(settings)
        self.blocks = nn.ModuleList(Layer(settings, layer) for layer in range(settings.num_layers))


class Attends(Protocol):
    """What the attention is computed with: `AttentionInputs`, or the sources kept for generation."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> Tensor: ...


class SourceAttention(nn.Module):
    """tanh(V [c; h]) with c from a document's source."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.num_heads = attention_heads(width)
        self.query, self.combine = Linear(width, width), Linear(2 * width, width)

    def forward(self, x_TH: Tensor, states_SH: Tensor | None, inputs: Attends) -> Tensor:
        """Without states the inputs keep them."""
        q_TQK = self.query(x_TH).unflatten(-1, (self.num_heads, -1))
        s_SQK = q_TQK if states_SH is None else states_SH.unflatten(-1, (self.num_heads, -1))
        found_TH = inputs.attend(q_TQK, s_SQK, s_SQK, 1.0, None).flatten(1)
        return torch.tanh(self.combine(torch.cat((found_TH, x_TH), -1)))


class Recurrent(Transformer):
    """The embedding, head and loss of a `Transformer` around recurrent layers."""

    def __init__(
        self, settings: ModelSettings, vocabulary: int, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        nn.Module.__init__(self)
        self.settings = settings
        self.embedding = nn.Embedding(vocabulary, settings.hidden_size)
        self.input = Normalised(settings)
        if settings.has_source:
            self.encoder = SourceEncoder(settings, vocabulary)
            self.source_attention = SourceAttention(settings)
        self.blocks = nn.ModuleList(Layer(settings, layer) for layer in range(settings.num_layers))
        self.extra_blocks = nn.ModuleList()
        self.norm = make_norm(settings.hidden_size, settings)
        self.head = make_head(settings, self.embedding, Options(z_loss, label_smoothing, settings.logit_softcap))
        self.z_sum: Tensor | float = 0.0  # over the micro-batches of a step; the caller resets it to 0

    def trunk(self, x_TH: Tensor, x_SE: Tensor | None, batch: Batch) -> tuple[Tensor, Views, EncoderOutput | None]:
        """Through all layers: the states (T, H) before the last norm, no attention inputs, the encoder's output."""
        x_TH, source, _ = self.advance(x_TH, x_SE, batch)
        return x_TH, {}, source

    def advance(
        self, x_TH: Tensor, x_SH: Tensor | None, batch: Batch
    ) -> tuple[Tensor, EncoderOutput | None, list[State]]:
        """As `trunk`, with the last states of each layer, by document: (D, H) each."""
        line, side = timeline(batch.cu_seqlens, len(x_TH)), batch.source
        assert (side is not None) == self.settings.has_source, (
            f"model.kind = {self.settings.kind!r} and the batch's source"
        )
        if side is None or x_SH is None:
            x_TH, last = self.layers(self.blocks, x_TH, line, batch.dropout_seeds, None)
            return x_TH, None, by_document(last, line, batch)
        states_SH, first = self.encode(x_SH, side, batch)
        x_TH, last = self.layers(self.blocks, x_TH, line, batch.dropout_seeds, first)
        mask = cross(batch.cu_seqlens, side.cu_seqlens)
        inputs = AttentionInputs(mask, make_tile_metadata(mask, len(x_TH), len(states_SH)))
        x_TH = self.source_attention(x_TH, states_SH, inputs)
        return x_TH, EncoderOutput(states_SH, inputs, side.dropout_seeds), by_document(last, line, batch)

    def encode(self, x_SH: Tensor, side: SourceSide, batch: Batch) -> tuple[Tensor, list[State]]:
        """States of the source (S, H), and the last ones of each layer by document."""
        line = timeline(side.cu_seqlens, len(x_SH))
        states_SH, last = self.layers(self.encoder.blocks, x_SH, line, side.dropout_seeds, None)
        return states_SH, by_document(last, line, batch)

    def layers(
        self, layers: nn.ModuleList, x_TH: Tensor, line: Timeline, seeds_T: Tensor, first: Sequence[State] | None
    ) -> tuple[Tensor, list[State]]:
        """Rows of the batch through a stack. first: states of each layer by document; None: zeros. Gives the last
        states in the order of `line.documents_N`."""
        x_TH, seeds_T, last = x_TH[line.order_T], seeds_T[line.order_T], []
        for number, layer in enumerate(layers):
            begin = None if first is None else tuple(state[line.documents_N] for state in first[number])
            x_TH, state = layer(x_TH, line, seeds_T, begin)
            last.append(state)
        return x_TH[line.place_T], last


def by_document(last: Sequence[State], line: Timeline, batch: Batch) -> list[State]:
    """States (D, H) of all documents of a batch, zero for empty ones."""
    count = len(batch.cu_seqlens) - 1
    return [
        tuple(state.new_zeros(count, state.shape[1]).index_copy(0, line.documents_N, state) for state in of_layer)
        for of_layer in last
    ]


def build_model(
    settings: ModelSettings, vocabulary: int, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Transformer:
    """The model of `model.kind`."""
    kind = Recurrent if settings.is_recurrent else Transformer
    return kind(settings, vocabulary, z_loss, label_smoothing)
