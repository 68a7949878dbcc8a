"""Settings of the model: architecture, attention windows, rotary positions ([model])."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, create_model, model_validator

from bigmodel.config.classification_settings import ClassificationSettings
from bigmodel.config.expert_settings import ExpertSettings, problem_of_experts
from bigmodel.config.recurrent_settings import CELLS, PEEPHOLE_KINDS, RECURRENT, WITH_SOURCE, problem_of_recurrent
from bigmodel.config.sections import SAVED, SET, Section, setting

TWO_SIDES = {"kind": "encoder_decoder"}
LLAMA3, YARN = {"kind": "llama3"}, {"kind": "yarn"}


class RopeScalingSettings(Section):
    """Lower rotary frequencies, for documents longer than those of the previous training. Keys as in Hugging Face's
    `rope_scaling`: linear (Chen et al. 2023), llama3 (Llama 3.1), yarn (Peng et al. 2023)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1, description="divisor of the lowest frequencies; linear: of all frequencies")
    original_max_position_embeddings: int = setting(
        0,
        only_with={"kind": ("llama3", "yarn")},
        ge=0,
        description="longest document of the previous training, in tokens",
    )
    low_freq_factor: float = setting(
        1.0,
        only_with=LLAMA3,
        gt=0,
        description="frequencies with fewer turns in the original length are divided by factor",
    )
    high_freq_factor: float = setting(
        4.0, only_with=LLAMA3, gt=0, description="frequencies with more turns in the original length are unchanged"
    )
    beta_fast: float = setting(
        32.0, only_with=YARN, gt=0, description="frequencies with more turns in the original length are unchanged"
    )
    beta_slow: float = setting(
        1.0,
        only_with=YARN,
        gt=0,
        description="frequencies with fewer turns in the original length are divided by factor",
    )
    truncate: bool = setting(True, only_with=YARN, description="round both limits outwards to whole channels")
    attention_factor: float = setting(
        0.0, only_with=YARN, ge=0, description="factor of queries and keys after rotation; 0: 0.1 * ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _limits_make_sense(self) -> "RopeScalingSettings":
        if self.kind != "linear" and not self.original_max_position_embeddings:
            raise ValueError(
                f"model.rope_scaling.original_max_position_embeddings is missing: kind = {self.kind!r} needs the "
                "longest document, in tokens, of the previous training"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{low} = {getattr(self, low)} must be below {high} = {getattr(self, high)}"
                )
        return self


ROPE_SCALING_KEYS = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


if TYPE_CHECKING:

    class WithFrom(Section): ...

else:  # `from` is a word of Python
    WithFrom = create_model(
        "WithFrom",
        __base__=Section,
        **{
            "from": (
                Path | None,
                Field(
                    None,
                    description="Hugging Face folder, or directory of another run, whose weights the run starts from; "
                    "settings that it states may be left out; prepare.tokenizer is its tokenizer",
                ),
            )
        },
    )


# Shares of what is dropped in training. They change no weight's shape and no evaluation.
DRAWN = ("dropout", "attention_dropout", "embedding_dropout", "stochastic_depth")


class ModelSettings(WithFrom):
    """A transformer (decoder, encoder_decoder, encoder), or a recurrent model (rnn, lstm, gru, lstm_encoder_decoder),
    which reads few of these settings and refuses the others. The vocabulary comes from the data's manifest.

    `encoder_...` = 0: the encoder of an encoder-decoder has the decoder's value.
    """

    section = "model"
    _classification: ClassificationSettings | None = PrivateAttr(None)

    kind: Literal["decoder", "encoder_decoder", "encoder", "rnn", "lstm", "gru", "lstm_encoder_decoder"] = Field(
        "decoder",
        description="rnn (Elman 1990), lstm (Hochreiter & Schmidhuber 1997, with forget gate), gru (Cho et al. 2014): "
        "decoders of recurrent layers; lstm_encoder_decoder: an LSTM for the source, one for the target, and Luong's "
        "global attention (2015)",
    )
    num_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=2, description="size of the hidden state")
    num_heads: int = Field(12, ge=1, description="query heads")
    num_kv_heads: int = Field(
        12,
        ge=1,
        description="key and value heads; must divide num_heads (grouped-query attention); absent: the value of "
        "num_heads, which is 12 by default",
    )
    head_dim: int = Field(0, ge=0, description="channels of a head; 0: hidden_size / num_heads")
    intermediate_size: int = Field(2048, ge=1, description="size of the gated feed-forward layer")
    encoder_num_layers: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_hidden_size: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_num_heads: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_num_kv_heads: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_intermediate_size: int = setting(0, only_with=TWO_SIDES, ge=0)
    source_attention: Literal["cross", "mixed"] = setting(
        "cross",
        only_with=TWO_SIDES,
        description="attention of the decoder to the source: a second layer (cross), or one softmax over source and "
        "previous decoder tokens (mixed)",
    )
    separate_embeddings: bool = setting(
        False, only_with={"kind": WITH_SOURCE}, description="the encoder has its own embedding matrix"
    )
    peepholes: bool = setting(
        False,
        only_with={"kind": PEEPHOLE_KINDS},
        description="the gates also see the cell's own value (Gers & Schmidhuber 2000)",
    )
    backpropagation_tokens: int = setting(
        0,
        only_with={"kind": RECURRENT},
        ge=0,
        description="truncated back-propagation: every k tokens of a document the state goes on but its gradient ends; "
        "0: gradients reach the document's beginning",
    )
    position_embedding: Literal["rotary", "relative_bias", "learned", "sinusoidal"] = Field(
        "rotary",
        description="rotary (Su et al. 2021); relative_bias: T5's, shared by the layers of a side; learned: a vector "
        "for each position in a document, added to the embedded token (GPT-2, BERT); sinusoidal: sines and cosines of "
        "the position, added to the embedded token times sqrt(hidden_size) (Vaswani et al. 2017)",
    )
    max_positions: int = setting(
        0,
        only_with={"position_embedding": "learned"},
        ge=0,
        description="learned positions: the longest document, in tokens",
    )
    relative_buckets: int = setting(
        32, only_with={"position_embedding": "relative_bias"}, ge=4, description="learned distances per head"
    )
    relative_distance: int = setting(
        128, only_with={"position_embedding": "relative_bias"}, ge=4, description="longer distances share one bucket"
    )
    sliding_window: int = Field(
        0,
        ge=0,
        description="tokens that a query of a sliding layer attends to: itself and window - 1 before it (Hugging "
        "Face's sliding_window); in an encoder itself and window // 2 on each side; cross-attention always covers the "
        "whole source; 0: all layers attend to the whole document",
    )
    full_attention_every: int = setting(
        0,
        only_with={"sliding_window": SET},
        ge=0,
        description="k: layers k, 2k, 3k ... of a stack, counted from 1, attend to the whole document; "
        "Gemma 2: 2, Gemma 3: 6, OLMo 3: 4; 0: no layer does (Mistral)",
    )
    first_full_attention: int = setting(
        0,
        only_with={"full_attention_every": SET},
        ge=0,
        description="number of the first layer that attends to the whole document, counted from 1, at most k "
        "(ModernBERT: 1); 0: k",
    )
    sliding_rope_theta: float = setting(
        0.0,
        only_with={"position_embedding": "rotary", "sliding_window": SET},
        ge=0,
        description="rope_theta of the sliding layers (Gemma 3's rope_local_base_freq); 0: rope_theta",
    )
    attention_softcap: float = Field(
        0.0, ge=0, description="c: attention scores become c * tanh(score / c), at most c (Gemma 2: 50); 0: off"
    )
    attention_scale: float = Field(0.0, ge=0, description="factor of attention scores; 0: 1 / sqrt(head_dim); T5: 1")
    attention_bias: Literal["none", "qkv", "all"] = Field(
        "none", description="biases of queries, keys and values (Qwen2: qkv), and of the output too (BERT: all)"
    )
    activation: Literal["silu", "gelu", "gelu_erf", "relu"] = Field(
        "silu",
        description="of the feed-forward layer; gated silu is SwiGLU, gated gelu T5 v1.1's GEGLU; gelu is the tanh "
        "approximation, gelu_erf the exact one",
    )
    gated: bool = Field(True, description="gated feed-forward (Shazeer 2020); false: two matrices (T5 1.0, BERT)")
    feed_forward_bias: bool = Field(False, description="biases in the feed-forward layer (BERT)")
    experts: ExpertSettings | None = Field(
        None, description="mixture of experts in place of the feed-forward layer; absent: none"
    )
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm (BERT)")
    norm_bias: bool = setting(True, only_with={"norm": "layer"}, description="biases in LayerNorm (ModernBERT: false)")
    norm_placement: Literal["pre", "output", "sandwich", "post"] = Field(
        "pre",
        description="norm of a sublayer's input (pre), of its output (output: OLMo 2), of both (sandwich: Gemma 2), or "
        "of its sum with the residual stream (post: BERT)",
    )
    zero_centered_norm: bool = setting(
        False, only_with={"norm": "rms"}, description="RMSNorm multiplies by 1 + weight (Gemma)"
    )
    embedding_norm: bool = Field(
        False,
        description="norm of the embedded tokens (BERT); with norm_placement = pre the first attention then has no "
        "norm of its own (ModernBERT)",
    )
    embedding_scale: float = Field(1.0, gt=0, description="factor of embedded tokens (Gemma: sqrt(hidden_size))")
    num_token_types: int = Field(
        0, ge=0, description="embeddings of token types, added to embedded tokens (BERT: 2); every token has type 0"
    )
    num_mtp_modules: int = setting(
        0,
        only_with={"kind": ("decoder", "encoder_decoder")},
        why="a module is a further block of a transformer's decoder",
        ge=0,
        description="multi-token prediction (MTP) modules: each is a block that predicts one token further ahead",
    )
    mtp_loss_weight: float = setting(
        0.3,
        only_with={"num_mtp_modules": SET},
        gt=0,
        description="weight, in the gradient, of the mean loss of the MTP modules",
    )
    rope_theta: float = setting(
        10_000.0,
        only_with={"position_embedding": "rotary"},
        gt=0,
        description="base of the rotary frequencies (Su et al. 2021)",
    )
    rotary_fraction: float = setting(
        1.0,
        only_with={"position_embedding": "rotary"},
        gt=0,
        le=1,
        description="share of a head's channels that are rotated, the first ones (GPT-NeoX, Phi); 1: all",
    )
    rope_scaling: RopeScalingSettings | None = setting(
        None,
        only_with={"position_embedding": "rotary"},
        description="lower rotary frequencies, in the layers that attend to the whole document",
    )
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys")
    qk_norm_over: Literal["head", "all_heads"] = setting(
        "head",
        only_with={"qk_norm": True},
        description="over the channels of each head (Qwen3), or of all heads together (OLMo 2)",
    )
    tied_embeddings: bool = Field(False, description="the output head uses the embedding matrix")
    vectors: Path | None = Field(
        None,
        description="file of word vectors that the embeddings begin with: Word2Vec, text or binary, or GloVe, also "
        "compressed; hidden_size is the size of its vectors",
    )
    vectors_absent: Literal["normal", "model"] = setting(
        "normal",
        only_with={"vectors": SET},
        description="embeddings of tokens without a vector: normal, with the mean and deviation of the others in each "
        "channel; or as those of a model without vectors",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of each block's output, before it is added to the residual stream"
    )
    attention_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of attention weights, after the softmax; also of cross-attention"
    )
    embedding_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout of the embedded tokens, before the first block; also of the encoder's"
    )
    stochastic_depth: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of documents for which a sublayer of the last block is skipped (Huang et al. 2016); block l "
        "of L: l / L of it. The others are divided by 1 - share, so that evaluation needs no change",
    )
    norm_epsilon: float = Field(1e-5, gt=0)
    logit_softcap: float = Field(0.0, ge=0, description="c: logits become c * tanh(logit / c), at most c; 0: off")
    logit_scale: float = Field(1.0, gt=0, description="factor of logits (T5 1.0: 1 / sqrt(hidden_size))")
    mup_base_width: int = Field(
        0,
        ge=0,
        description="hidden_size at which the learning rate was found: muP (Yang et al. 2022, table 8) lets it hold at "
        "every width. Rates of matrices in blocks are divided by hidden_size / mup_base_width, their weight decay is "
        "multiplied by it, logits are divided by it; 0: off",
    )
    mup_base_head_dim: int = setting(
        0,
        only_with={"mup_base_width": SET},
        ge=0,
        description="head_dim at mup_base_width: attention scores are scaled by 1 / head_dim instead of its root, "
        "equal at this size; 0: heads are equally large at every width",
    )
    min_vocabulary: int = Field(
        0, ge=0, description="least rows of embedding and output head; model.from sets it to the folder's vocab_size"
    )
    vocabulary_multiple: int = Field(
        1, ge=1, description="rows of embedding and output head are a multiple of it; further rows stand for no token"
    )

    @property
    def draws_by_document(self) -> bool:
        """Whether dropout seeds belong to documents, not to places in packed sequences."""
        return bool(self.attention_dropout or self.embedding_dropout or self.stochastic_depth)

    def without_draws(self) -> "ModelSettings":
        """The same model without dropout."""
        return self.model_copy(update=dict.fromkeys(DRAWN, 0.0))

    def num_rows(self, num_tokens: int) -> int:
        """Rows of embedding and output head for that many tokens."""
        return -(-max(num_tokens, self.min_vocabulary) // self.vocabulary_multiple) * self.vocabulary_multiple

    @property
    def classification(self) -> ClassificationSettings | None:
        """Of the head; None: the model predicts tokens."""
        return self._classification

    def with_classes_of(self, classification: ClassificationSettings | None) -> "ModelSettings":
        """The same model with another head; pooling and head are resolved."""
        copy = self.model_copy()
        copy._classification = classification and classification.resolved(self.kind, self.norm_placement)
        return copy

    @property
    def is_recurrent(self) -> bool:
        return self.kind in RECURRENT

    @property
    def cell(self) -> str:
        """Of recurrent layers: rnn, lstm or gru."""
        return CELLS[self.kind]

    @property
    def has_source(self) -> bool:
        """Whether an encoder reads a source."""
        return self.kind in WITH_SOURCE

    @property
    def start_folder(self) -> Path | None:
        """`from`."""
        return getattr(self, "from")

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def width_ratio(self) -> float:
        """hidden_size over that of the base in muP; 1 without it."""
        return self.hidden_size / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def head_ratio(self) -> float:
        """head_dim over that of the base in muP; 1 without it."""
        return self.resolved_head_dim / self.mup_base_head_dim if self.mup_base_head_dim else 1.0

    @property
    def resolved_attention_scale(self) -> float | None:
        """Factor of attention scores; None: 1 / sqrt(head_dim), which the kernels know."""
        if self.head_ratio == 1.0:
            return self.attention_scale or None
        return (self.attention_scale or self.resolved_head_dim**-0.5) * self.head_ratio**-0.5

    @property
    def resolved_logit_scale(self) -> float:
        """Factor of the logits of tokens; a classification head's are not those of an output matrix."""
        return self.logit_scale if self.classification else self.logit_scale / self.width_ratio

    @property
    def expert_width(self) -> int:
        """Intermediate size of one expert."""
        return (self.experts and self.experts.width) or self.intermediate_size

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts, multi-token prediction modules included."""
        layers = self.num_layers + self.num_mtp_modules
        return layers - self.experts.first_dense_layers if self.experts else 0

    @property
    def rotary_channels(self) -> int:
        """Rotated channels of a head."""
        return int(self.resolved_head_dim * self.rotary_fraction)

    @property
    def encoder(self) -> "ModelSettings":
        """The settings of the encoder's blocks."""
        names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size")
        own = {name: getattr(self, f"encoder_{name}") or getattr(self, name) for name in names}
        return self.model_copy(update={**own, "kind": "encoder", "num_mtp_modules": 0})

    @model_validator(mode="before")
    @classmethod
    def _kv_heads_follow_heads(cls, table: Any) -> Any:
        if isinstance(table, dict) and "num_heads" in table:
            return {"num_kv_heads": table["num_heads"]} | table
        return table

    @model_validator(mode="after")
    def _sides_make_sense(self) -> "ModelSettings":
        if self.kind == "encoder_decoder":
            _check_heads(self.encoder)
            if self.encoder.hidden_size != self.hidden_size and not self.separate_embeddings:
                raise ValueError(
                    f"model.encoder_hidden_size = {self.encoder_hidden_size} differs from model.hidden_size = "
                    f"{self.hidden_size}: the two sides cannot share an embedding matrix; set "
                    "model.separate_embeddings = true"
                )
            if self.source_attention == "mixed" and self.position_embedding != "rotary":
                raise ValueError(
                    'model.source_attention = "mixed" needs model.position_embedding = "rotary": one softmax needs '
                    "distances between target and source tokens"
                )
        if self.position_embedding == "learned" and not self.max_positions:
            raise ValueError(
                'model.position_embedding = "learned" needs model.max_positions, the longest document in tokens'
            )
        _check_mup(self)
        if self.vectors and self.start_folder:
            raise ValueError(
                f"model.vectors = {self.vectors} and model.from = {self.start_folder}: the embeddings begin with those "
                "of the folder; leave one of them out"
            )
        buckets = self.relative_buckets
        if buckets % 4 or buckets // 2 >= self.relative_distance:
            raise ValueError(
                f"model.relative_buckets = {buckets} must be a multiple of 4 and below twice "
                f"model.relative_distance = {self.relative_distance}"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self, info: ValidationInfo) -> "ModelSettings":
        if info.context != SAVED and (problem := problem_of_experts(self)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        if not self.is_recurrent:
            _check_heads(self)
        return self

    @model_validator(mode="after")
    def _recurrent_layers_read_their_settings(self, info: ValidationInfo) -> "ModelSettings":
        if self.is_recurrent and info.context != SAVED and (problem := problem_of_recurrent(self)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _windows_and_rotation_make_sense(self) -> "ModelSettings":
        _check_window(self)
        _check_rotation(self)
        return self


def _check_heads(model: ModelSettings) -> None:
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise ValueError(
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_heads = {model.num_heads}; "
            f"the nearest multiple is {max(1, model.hidden_size // model.num_heads) * model.num_heads}"
        )
    if model.resolved_head_dim % 2 and model.position_embedding == "rotary":
        raise ValueError(
            f"model.hidden_size / model.num_heads = {model.resolved_head_dim} is odd; rotary positions need an even "
            "model.head_dim"
        )
    if model.num_heads % model.num_kv_heads:
        raise ValueError(
            f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}; "
            "choose a divisor of the heads"
        )


def _check_mup(model: ModelSettings) -> None:
    if not model.mup_base_width or model.is_recurrent:
        return
    given = f"model.mup_base_width = {model.mup_base_width}"
    if model.position_embedding == "sinusoidal":
        raise ValueError(
            f'{given} with model.position_embedding = "sinusoidal": those embeddings are scaled by sqrt(hidden_size), '
            "for which muP has no rule; choose another position embedding"
        )
    if model.kind == "encoder_decoder" and (
        model.encoder.hidden_size != model.hidden_size or model.encoder.resolved_head_dim != model.resolved_head_dim
    ):
        raise ValueError(
            f"{given}: one base width holds for both sides; give the encoder the hidden_size and head_dim of the "
            "decoder, or leave mup_base_width out"
        )


def _check_window(model: ModelSettings) -> None:
    every = model.full_attention_every
    if every and model.first_full_attention > every:
        raise ValueError(
            f"model.first_full_attention = {model.first_full_attention} must be at most model.full_attention_every = "
            f"{every}"
        )
    if every == 1:
        raise ValueError(
            f"model.full_attention_every = 1 leaves no layer with model.sliding_window = {model.sliding_window}; "
            "remove both, or set it to 2 or more"
        )
    for stack in (model, model.encoder) if model.kind == "encoder_decoder" else (model,):
        if every > stack.num_layers:
            remedy = "set it to 0 if that is intended"
            if stack is not model:
                remedy = f"use at most {stack.num_layers}, or more model.encoder_num_layers"
            raise ValueError(
                f"model.full_attention_every = {every} is more than the {stack.num_layers} layers of the "
                f"{'encoder' if stack is not model else model.kind}: no layer would attend to the whole document; "
                f"{remedy}"
            )
    for name in ("sliding_rope_theta", "rope_scaling") if model.sliding_window and not every else ():
        if getattr(model, name):
            raise ValueError(
                f"model.{name} needs layers with full attention, and model.full_attention_every = 0 makes all of them "
                "sliding; " + ("set model.rope_theta" if name == "sliding_rope_theta" else "remove it")
            )


def _check_rotation(model: ModelSettings) -> None:
    if model.position_embedding != "rotary" or model.is_recurrent:
        return
    for stack in (model, model.encoder) if model.kind == "encoder_decoder" else (model,):
        if stack.rotary_channels < 2 or stack.rotary_channels % 2:
            raise ValueError(
                f"model.rotary_fraction = {model.rotary_fraction} of a head of {stack.resolved_head_dim} channels is "
                f"{stack.rotary_channels}; it must be an even number of channels, at least 2: choose another fraction"
            )
