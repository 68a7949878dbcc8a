"""Settings: a TOML run file, read into frozen, typed values.

Takes a path and `--set a.b=1` overrides, gives `Settings`. Imports neither torch nor deepspeed, so the
launcher and a login node can read a run file in milliseconds. Everything a user can get wrong raises
`UserError`, whose text names the setting, its value, what is needed and the remedy; the command line
prints it without a traceback and exits with code 2.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class UserError(ValueError):
    """Something the user can mend: printed without a traceback, exit code 2. Secrets inside URLs are not shown."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


def without_secrets(text: str) -> str:
    """A text with URLs, as it may be shown or stored: passwords and keys inside them become ***."""
    text = re.sub(r"(://[^/@?\s]*:)[^/@?\s]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:key|secret|token|password)[^=&\s]*=)[^&\s'\":;,]+", r"\1***", text)


class Section(BaseModel):
    """A table of the run file. Unknown keys are errors; values cannot be changed after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSettings(Section):
    directory: Path = Field(
        Path("runs/run"), description="where everything this run writes goes; from the current folder"
    )
    seed: int = Field(1, ge=0, lt=2**63, description="keys every random draw: order, dropout, initial weights")


class SourceSettings(Section):
    """One named source of documents to prepare."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100, description="source name; becomes a folder")
    files: list[str] = Field(
        min_length=1,
        description="paths, URLs (s3://, gs://, abfs://, hdfs://, what fsspec knows) or glob patterns of .parquet, "
        ".arrow, .jsonl (also .gz, .zst), .txt or .mds (also .gz, .zstd) files",
    )
    column: str = Field("text", description="column that holds the text; a.b is field b of column a")
    target_column: str | None = Field(None, description="second text of a source-target pair (encoder-decoder data)")


class DecontaminationSettings(Section):
    """Documents that share a run of words with evaluation text are dropped."""

    files: list[str] = Field(min_length=1, description="evaluation files, of the same kinds as a source's")
    column: str = Field("text", description="column that holds their text")
    ngram: int = Field(13, ge=1, description="length of the run, in words, without case and punctuation")


class PrepareSettings(Section):
    """How raw text becomes shards."""

    sources: list[SourceSettings] = Field([], description="empty: the embedded corpus, Python's own standard library")
    embedded: Literal["text", "pairs"] = Field(
        "text", description="of the embedded corpus: code and documentation, or pairs of a function and what it does"
    )
    vocabulary: int = Field(
        32_000, ge=258, le=2**32 - 1, description="tokens in the trained tokenizer, special ones included"
    )
    tokenizer: Path | None = Field(
        None, description='"train", or a tokenizer.json or Hugging Face tokenizer folder to use instead'
    )
    validation_share: float = Field(0.02, gt=0, lt=0.5, description="share of documents, by hash, kept for validation")
    shard_tokens: int = Field(32_000_000, ge=1_000, description="a shard is closed at this many tokens")
    content: Literal["tokens", "text"] = Field(
        "tokens", description="what shards hold: token ids, or text that is tokenized as it streams"
    )
    unicode_nfc: bool = Field(False, description="bring text into Unicode's composed normal form")
    remove_control_characters: bool = Field(False, description="remove them all but tab, line feed, carriage return")
    min_characters: int = Field(0, ge=0, description="shorter documents are dropped")
    max_characters: int = Field(0, ge=0, description="longer documents are dropped; 0: no limit")
    deduplicate: bool = Field(True, description="keep the first of equal texts over all sources")
    decontaminate: DecontaminationSettings | None = None
    malformed_share: float = Field(0.0, ge=0, le=1, description="records of a source that may be malformed (dropped)")
    workers: int = Field(0, ge=0, description="processes; 0: one per core")
    scheduler: str = Field("", description="address of a Dask scheduler whose workers do the work; empty: this machine")

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _train_means_none(cls, value: Any) -> Any:
        return None if value == "train" else value

    @model_validator(mode="after")
    def _names_and_limits_make_sense(self) -> "PrepareSettings":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"prepare.sources: two sources are named {name!r}; give each its own name")
        if self.max_characters and self.max_characters < self.min_characters:
            raise ValueError(
                f"prepare.max_characters = {self.max_characters} is below prepare.min_characters = "
                f"{self.min_characters}: no document would be left; raise it, or set 0 for no limit"
            )
        return self


class CurriculumStage(Section):
    """A mix that comes into force later."""

    from_tokens: int = Field(ge=1, description="tokens given before it, over all lanes; holds from the next windows on")
    mix: dict[str, float] = Field(min_length=1, description="share of tokens per source, as in data.mix")


class ObjectiveSettings(Section):
    """What is asked of a document (`bigmodel.data.objectives` has each with its source)."""

    kind: Literal["causal", "prefix", "fill_in_the_middle", "span_corruption", "ul2", "masked"] = Field(
        description="masked is for encoders, fill_in_the_middle for decoders; ul2 stands for its seven denoisers"
    )
    share: float = Field(
        1.0, gt=0, description="of the texts' tokens, read or asked for, on the average; relative to others"
    )
    ahead: int = Field(1, ge=1, description="causal: predict the token so many ahead")
    prefix_share: float = Field(0.5, gt=0, lt=1, description="prefix: of a document that is read, not predicted")
    spm_share: float = Field(0.5, ge=0, le=1, description="fill_in_the_middle: documents in the order suffix first")
    density: float = Field(0.15, gt=0, lt=1, description="span_corruption, masked: share of the tokens that is hidden")
    mean_span: float = Field(3.0, ge=1, description="span_corruption: mean length of a hidden span")


class DataSettings(Section):
    """Which shards to read and how they are packed."""

    directory: Path = Field(Path("data/embedded"), description="prepared shards: the folder with manifest.json")
    remote: str = Field(
        "", description="URL of the same folder in a store; what data.directory lacks is fetched from there"
    )
    context_tokens: int = Field(2048, ge=2, description="longer documents are split into pieces of this length")
    pack_tokens: int = Field(2048, ge=2, description="positions in a pack")
    source_pack_tokens: int = Field(
        0, ge=0, description="positions in a pack's source side, for an encoder; 0: one side"
    )
    source_context_tokens: int = Field(0, ge=0, description="longest source; 0: source_pack_tokens")
    pack_documents: int = Field(
        0, ge=0, description="documents in a pack, at most; 0: one for 16 of pack_tokens, 256 at least"
    )
    lanes: int = Field(1, ge=1, description="independent streams of documents; packs_per_step is a multiple")
    window_packs: int = Field(
        500, ge=1, description="packs planned together (of pairs more, see mix); more packs tighter and mixes later"
    )
    mix: dict[str, float] = Field(
        {},
        description="share of tokens per source; empty: as much as each holds. Of pairs the tokens of the source text "
        "are counted here, in curriculum and in window_packs",
    )
    max_epochs: dict[str, int] = Field(
        {}, description="how often a source is repeated at most, then the others share; 0 or absent: no limit"
    )
    curriculum: list[CurriculumStage] = Field([], description="later mixes, by tokens trained on")
    objectives: list[ObjectiveSettings] = Field(
        [], description="for sources of plain text; empty: causal, or span_corruption where there is a source side"
    )
    sentinels: int = Field(100, ge=1, description="ids for hidden spans, where an objective needs them")
    bidirectional_prefix: bool = Field(
        True, description="one side only: what is read but not predicted sees all of itself (prefix-LM)"
    )
    fixed_target_tokens: int = Field(
        0, ge=0, description="every target cut or padded to this length; 0: targets keep their length (packed)"
    )
    masked_decoder_share: float = Field(
        0.0, ge=0, lt=1, description="of decoder inputs replaced by the mask token: the decoder leans on the source"
    )
    dropped_decoder_share: float = Field(
        0.0, ge=0, lt=1, description="of decoder positions left out, inputs and targets: long targets cost less"
    )
    workers: int = Field(2, ge=1, description="threads per rank that fetch, compare and tokenize ahead of the steps")
    cache_bytes: int = Field(
        0, ge=0, description="with data.remote: shards kept in data.directory, the others are fetched again; 0: all"
    )
    stall_seconds: float = Field(
        480.0, gt=0, description="a run whose next batch takes longer ends with an error; ranks wait 600 s for others"
    )

    @property
    def longest_source(self) -> int:
        return self.source_context_tokens or self.source_pack_tokens

    @model_validator(mode="after")
    def _sides_fit(self) -> "DataSettings":
        if self.source_context_tokens > self.source_pack_tokens:
            raise ValueError(
                f"data.source_context_tokens = {self.source_context_tokens} does not fit data.source_pack_tokens = "
                f"{self.source_pack_tokens}; lower the first or raise the second"
            )
        if self.fixed_target_tokens > self.context_tokens:
            raise ValueError(
                f"data.fixed_target_tokens = {self.fixed_target_tokens} is above data.context_tokens = "
                f"{self.context_tokens}; lower it or raise the context"
            )
        decoder_inputs = ("fixed_target_tokens", "masked_decoder_share", "dropped_decoder_share")
        for name in decoder_inputs:
            if getattr(self, name) and not self.source_pack_tokens:
                raise ValueError(
                    f"data.{name} = {getattr(self, name)} is about the decoder of an encoder-decoder; leave it out, or "
                    "set data.source_pack_tokens"
                )
        if self.dropped_decoder_share and any(objective.ahead > 1 for objective in self.objectives):
            raise ValueError(
                f"data.dropped_decoder_share = {self.dropped_decoder_share}: with ahead above 1 in data.objectives "
                "nobody knows beforehand how many targets are left; set ahead = 1, or leave the share out"
            )
        kinds = {objective.kind for objective in self.objectives}
        if "masked" in kinds and (len(kinds) > 1 or self.source_pack_tokens):
            raise ValueError(
                'data.objectives: kind = "masked" is for an encoder alone; it goes with no other kind and without '
                "data.source_pack_tokens"
            )
        return self

    @model_validator(mode="after")
    def _pack_documents_are_known(self) -> "DataSettings":
        if not self.pack_documents:
            object.__setattr__(self, "pack_documents", max(256, self.pack_tokens // 16))
        return self

    @model_validator(mode="after")
    def _context_fits(self) -> "DataSettings":
        if self.context_tokens > self.pack_tokens:
            raise ValueError(
                f"data.context_tokens = {self.context_tokens} does not fit data.pack_tokens = {self.pack_tokens}; "
                "lower the context or raise the pack"
            )
        mixes = [("data.mix", self.mix), *((f"data.curriculum[{n}].mix", s.mix) for n, s in enumerate(self.curriculum))]
        for name, mix in mixes:
            if any(share <= 0 for share in mix.values()):
                raise ValueError(f"{name} = {mix}: every share must be above 0; leave a source out to drop it")
        if any(epochs < 0 for epochs in self.max_epochs.values()):
            raise ValueError(f"data.max_epochs = {self.max_epochs}: every number must be 0 (no limit) or above")
        starts = [stage.from_tokens for stage in self.curriculum]
        if starts != sorted(set(starts)):
            raise ValueError(f"data.curriculum: from_tokens = {starts} must rise from stage to stage")
        return self


class ModelSettings(Section):
    """A transformer: decoder, encoder-decoder or encoder. The vocabulary comes from the data's manifest.

    Where `encoder_...` is 0, the encoder of an encoder-decoder is like the decoder.
    """

    kind: Literal["decoder", "encoder_decoder", "encoder"] = "decoder"
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=2, description="size of the hidden state")
    heads: int = Field(12, ge=1, description="query heads")
    key_value_heads: int = Field(4, ge=1, description="key and value heads; divides heads (grouped-query attention)")
    head_size: int = Field(0, ge=0, description="channels of a head; 0: width / heads")
    feed_forward_width: int = Field(2048, ge=1, description="size of the gated inner layer")
    encoder_layers: int = Field(0, ge=0)
    encoder_width: int = Field(0, ge=0)
    encoder_heads: int = Field(0, ge=0)
    encoder_key_value_heads: int = Field(0, ge=0)
    encoder_feed_forward_width: int = Field(0, ge=0)
    source_attention: Literal["cross", "mixed"] = Field(
        "cross", description="how a decoder sees the source: a second attention, or in one softmax with its own past"
    )
    separate_embeddings: bool = Field(False, description="the encoder has an embedding matrix of its own")
    positions: Literal["rotary", "relative_bias"] = Field(
        "rotary", description="rotary (Su et al. 2021), or T5's bias by distance, shared by the layers of a side"
    )
    relative_buckets: int = Field(32, ge=4, description="relative_bias: learned distances per head")
    relative_distance: int = Field(128, ge=4, description="relative_bias: farther is all the same")
    attention_scale: float = Field(0.0, ge=0, description="factor of the scores; 0: 1 / sqrt(head size). T5: 1")
    gate: Literal["silu", "gelu"] = Field("silu", description="of the feed-forward: SwiGLU, or T5 v1.1's GEGLU")
    extra_heads: int = Field(0, ge=0, description="multi-token prediction: so many tokens more, each by its own block")
    extra_head_weight: float = Field(0.3, gt=0, description="of the mean of the extra heads' losses in the gradient")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies (Su et al. 2021)")
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys of each head")
    tied_embeddings: bool = Field(False, description="the output head uses the embedding matrix")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what each block adds to the residual stream")
    norm_epsilon: float = Field(1e-5, gt=0)
    logit_softcap: float = Field(
        0.0, ge=0, description="the head's logits become c * tanh(logit / c): none passes c; 0: off"
    )

    @property
    def head_width(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def encoder(self) -> "ModelSettings":
        """The settings of the encoder's blocks."""
        names = ("layers", "width", "heads", "key_value_heads", "feed_forward_width")
        own = {name: getattr(self, f"encoder_{name}") or getattr(self, name) for name in names}
        return self.model_copy(update={**own, "kind": "encoder"})

    @model_validator(mode="after")
    def _sides_make_sense(self) -> "ModelSettings":
        if self.kind != "encoder_decoder":
            for name in ("layers", "width", "heads", "key_value_heads", "feed_forward_width"):
                if getattr(self, f"encoder_{name}"):
                    raise ValueError(
                        f"model.encoder_{name} = {getattr(self, f'encoder_{name}')} needs model.kind = "
                        f'"encoder_decoder", not {self.kind!r}; leave it out or change the kind'
                    )
        else:
            _check_heads(self.encoder)
            if self.encoder.width != self.width and not self.separate_embeddings:
                raise ValueError(
                    f"model.encoder_width = {self.encoder_width} differs from model.width = {self.width}, so the sides "
                    "cannot share an embedding matrix; set model.separate_embeddings = true"
                )
            if self.source_attention == "mixed" and self.positions != "rotary":
                raise ValueError(
                    'model.source_attention = "mixed" has no distance between a target and a source token that a bias '
                    'could be learned for; set model.positions = "rotary"'
                )
        if self.extra_heads and self.kind == "encoder":
            raise ValueError("model.extra_heads predict further tokens, which an encoder does not; leave it out")
        buckets = self.relative_buckets
        if buckets % 4 or buckets // 2 >= self.relative_distance:
            raise ValueError(
                f"model.relative_buckets = {buckets} needs to be a multiple of 4 and below twice "
                f"model.relative_distance = {self.relative_distance}"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelSettings":
        _check_heads(self)
        return self


def _check_heads(model: ModelSettings) -> None:
    if not model.head_size and model.width % model.heads:
        raise ValueError(
            f"model.width = {model.width} is not a multiple of model.heads = {model.heads}; "
            f"width {model.width // model.heads * model.heads or model.heads} is the nearest below that divides"
        )
    if model.head_width % 2 and model.positions == "rotary":
        raise ValueError(
            f"model.width / model.heads = {model.head_width} is odd; rotary positions need an even head width"
        )
    if model.heads % model.key_value_heads:
        raise ValueError(
            f"model.heads = {model.heads} is not a multiple of model.key_value_heads = {model.key_value_heads}; "
            "choose a divisor of the heads"
        )


class ParameterGroupSettings(Section):
    """Parameters that are treated in their own way."""

    parameters: str = Field(description='names, as a pattern: "head.weight", "blocks.*.attention.*"; a later one wins')
    learning_rate_factor: float = Field(1.0, ge=0, description="times the schedule's rate; 0: frozen but for momentum")
    weight_decay: float | None = Field(None, ge=0, description="in place of optimizer.weight_decay and its rule")


class OptimizerSettings(Section):
    """How weights move. Weight decay falls on matrices only, not on norms or embeddings."""

    kind: Literal["adamw", "lion", "muon", "adafactor"] = Field(
        "adamw",
        description="AdamW (Loshchilov & Hutter 2019); Lion (Chen et al. 2023), one moment; Muon (Jordan et al. 2024) "
        "on hidden matrices, AdamW on the rest; Adafactor (Shazeer & Stern 2018), a row and a column for each matrix",
    )
    learning_rate: float = Field(
        3e-4, gt=0, description="the highest the schedule reaches; adafactor: relative to a parameter's scale"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(
        1e-8, gt=0, description="adamw, muon: added to the root of the second moment; adafactor: the least of that root"
    )
    weight_decay: float = Field(0.1, ge=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="muon: of the hidden matrices")
    beta2_decay: float = Field(-0.8, le=0, description="adafactor: beta2 of update t is 1 - t ** beta2_decay")
    update_clipping: float = Field(1.0, ge=1, description="adafactor: largest root mean square of a parameter's update")
    least_scale: float = Field(1e-3, ge=0, description="adafactor: least root mean square that a parameter counts with")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    groups: list[ParameterGroupSettings] = Field([], description="parameters with another rate or decay")


class ScheduleSettings(Section):
    """Learning rate: a linear warm-up, then what `kind` says; wsd is a stable stretch and a linear decay."""

    kind: Literal["cosine", "wsd", "linear", "inverse_square_root", "constant"] = "cosine"
    unit: Literal["steps", "tokens"] = Field("steps", description="tokens: positions, as the plan gives them to steps")
    warmup_steps: int = Field(100, ge=0)
    decay_steps: int = Field(0, ge=0, description="wsd: length of the final decay")
    warmup_tokens: int = Field(0, ge=0, description='with unit = "tokens", in place of warmup_steps')
    decay_tokens: int = Field(0, ge=0, description='with unit = "tokens", in place of decay_steps')
    final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the highest, or the lowest")

    @model_validator(mode="after")
    def _each_is_used(self) -> "ScheduleSettings":
        for name in ("decay_steps", "decay_tokens"):
            if self.kind != "wsd" and getattr(self, name):
                raise ValueError(
                    f'schedule.{name} = {getattr(self, name)} means nothing with schedule.kind = "{self.kind}", '
                    'which has no final decay of its own; leave it out or set kind = "wsd"'
                )
        other = "tokens" if self.unit == "steps" else "steps"
        for name in (f"warmup_{other}", f"decay_{other}"):
            if name in self.model_fields_set and getattr(self, name):
                raise ValueError(
                    f'schedule.{name} = {getattr(self, name)} is not read with schedule.unit = "{self.unit}"; '
                    f'set unit = "{other}" or use {name.replace(other, self.unit)}'
                )
        return self


class TrainingSettings(Section):
    steps: int = Field(1000, ge=1, description="optimizer steps in the whole run")
    packs_per_step: int = Field(8, ge=1, description="packs in one optimizer step, over all ranks")
    batch_ramp: list[tuple[int, int]] = Field(
        [], description="[step, packs] pairs: packs_per_step holds until the first, then each from its step on"
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="of weights in the forward pass; sums and masters stay fp32; fp16 scales the loss"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward pass computes again: nothing; all but products and attention; all"
    )
    sequence_parallel_ranks: int = Field(
        1, ge=1, description="consecutive ranks that share each pack (Ulysses), for very long documents"
    )
    compile: bool = Field(False, description="torch.compile each block")
    collective_timeout_seconds: float = Field(
        600.0, gt=0, description="a collective that takes longer waits for a rank that hangs: the run fails"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="average of the weights over updates, in checkpoints; 0: off")
    z_loss: float = Field(
        0.0, ge=0, description="weight of logsumexp(logits)^2 in the gradient, 1e-4 is usual; 0: off; not in the loss"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target given to all tokens alike; 0: off; validation has none"
    )
    deepspeed: Path | None = Field(
        None, description="your DeepSpeed JSON, relative to the run file; none: ZeRO stage 1"
    )

    @model_validator(mode="after")
    def _ramp_makes_sense(self) -> "TrainingSettings":
        steps = [step for step, _ in self.batch_ramp]
        if any(step < 1 for step in steps) or steps != sorted(set(steps)):
            raise ValueError(f"training.batch_ramp: its steps {steps} must rise from pair to pair and be 1 at least")
        if any(packs < 1 for _, packs in self.batch_ramp):
            raise ValueError(f"training.batch_ramp = {self.batch_ramp}: every step needs at least 1 pack")
        return self


class EvaluationSettings(Section):
    every_steps: int = Field(0, ge=0, description="0: only at the end")
    packs: int = Field(0, ge=0, description="validation packs used while training; 0: all of them. The end uses all")
    at_end: bool = Field(
        True, description="score the whole split after the last step, draw a sample, write the summary"
    )


class CheckpointSettings(Section):
    every_steps: int = Field(100, ge=1)
    hours_between_failures: float = Field(
        0.0, ge=0, description="mean of the whole job; above 0 the interval follows from it and what a save costs"
    )
    asynchronous: bool = Field(True, description="write while training goes on; a copy of the rank's share in memory")
    on_failure: Literal["stop", "continue"] = Field(
        "stop", description="when a save fails (full disk, I/O error); the older ones stay either way"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every_steps: int = Field(0, ge=0, description="those of multiples of this stay for good; 0: none")
    keep_hours: float = Field(0.0, ge=0, description="younger ones stay as well")
    remote: str = Field("", description="URL of a folder in a store: copied there, the newest first and one at a time")


class MetricsSettings(Section):
    port: int = Field(
        0, ge=0, le=65535, description="Prometheus endpoint of each node; 0: any free port, noted in the run directory"
    )
    host: str = Field(
        "127.0.0.1", description="address the endpoint listens on; 0.0.0.0 lets another machine scrape it"
    )
    norms_every_steps: int = Field(100, ge=0, description="steps from one measured weight norm to the next; 0: never")
    writers: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="also write for these, into the run directory; wandb stays offline. Their packages are optional"
    )


class Settings(Section):
    """A whole run file."""

    run: RunSettings = RunSettings()
    prepare: PrepareSettings = PrepareSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _data_suit_the_model(self) -> "Settings":
        kind, sides = self.model.kind, self.data.source_pack_tokens
        if (kind == "encoder_decoder") != (sides > 0):
            raise ValueError(
                f"model.kind = {kind!r} and data.source_pack_tokens = {sides} do not fit: an encoder-decoder needs a "
                "source side in every pack, other models have none"
            )
        masked = any(objective.kind == "masked" for objective in self.data.objectives)
        if (kind == "encoder") != masked:
            raise ValueError(
                f"model.kind = {kind!r} and data.objectives do not fit: an encoder alone is trained by "
                'kind = "masked", and no other model is'
            )
        if self.data.dropped_decoder_share and self.model.extra_heads:
            raise ValueError(
                "data.dropped_decoder_share leaves gaps in the targets, in which model.extra_heads would predict "
                "others than the next ones; leave one of them out"
            )
        if self.data.dropped_decoder_share and self.model.positions == "relative_bias":
            raise ValueError(
                'data.dropped_decoder_share needs positions that know of the gaps; set model.positions = "rotary"'
            )
        return self

    @model_validator(mode="after")
    def _lanes_divide_the_step(self) -> "Settings":
        counts = [("packs_per_step", self.training.packs_per_step)]
        counts += [("batch_ramp: packs", packs) for _, packs in self.training.batch_ramp]
        for name, packs in counts:
            if packs % self.data.lanes:
                raise ValueError(
                    f"training.{name} = {packs} is not a multiple of "
                    f"data.lanes = {self.data.lanes}; a step takes the same number of packs from every lane"
                )
        ramp = self.schedule.warmup_steps + self.schedule.decay_steps
        if self.schedule.unit == "steps" and ramp > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps = {ramp} exceeds "
                f"training.steps = {self.training.steps}; shorten them or train longer"
            )
        return self


def load_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a run file. `overrides` are `section.key=value` texts, values in TOML syntax (bare words are strings).

    Raises `UserError` naming the file, the setting, its value and the remedy.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file; {_files_like(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(table, override)
    return _resolve_deepspeed_path(settings_from_table(table, path), path)


def settings_from_table(table: Mapping[str, Any], origin: Path) -> Settings:
    """Validate plain values read from `origin`. Raises `UserError`, one line per complaint."""
    try:
        return Settings.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings)}") from None


def packs_at(step: int, packs_per_step: int, batch_ramp: Sequence[tuple[int, int]]) -> int:
    """Packs in a data step (counted from 0), over all ranks: those of the last pair of the ramp that has begun."""
    return next((packs for start, packs in reversed(batch_ramp) if start <= step), packs_per_step)


def num_micro_batches(packs_per_step: int, world_size: int, packs_per_micro_batch: int) -> int:
    """Micro-batches in a step, the same on every rank: each takes ceil(packs / ranks), the last ones fewer or none."""
    packs_per_rank = -(-packs_per_step // world_size)
    return -(-packs_per_rank // packs_per_micro_batch)


def to_toml_table(settings: Settings) -> dict[str, Any]:
    """The settings as plain values (paths as strings, unset ones left out), ready to write or to compare."""
    return settings.model_dump(mode="json", exclude_none=True)


def _resolve_deepspeed_path(settings: Settings, run_file: Path) -> Settings:
    given = settings.training.deepspeed
    if given is None or given.is_absolute():
        return settings
    training = settings.training.model_copy(update={"deepspeed": (run_file.parent / given).resolve()})
    return settings.model_copy(update={"training": training})


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {override}: needs the form section.key=value, for example --set training.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {name} is not a section")
    table[names[-1]] = value


def explain(error: ValidationError, root: type[Section]) -> str:
    """What pydantic complains of in a file that should be a `root`, a line each with setting, value and remedy."""
    return "\n".join(_explain(line, root) for line in error.errors())


def _explain(line: Mapping[str, Any], root: type[Section]) -> str:
    where = ".".join(str(part) for part in line["loc"])
    if line["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_suggestion(line['loc'], root)}"
    message = line["msg"].removeprefix("Value error, ")
    if line["type"] == "value_error":
        return message
    return f"{where} = {line['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(location: tuple[Any, ...], root: type[Section]) -> str:
    """The nearest known name in the section where the unknown one stands; else the section that knows it."""
    model: Any = root
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if _is_section(a)), model)
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    homes = [
        f"{name}.{location[-1]}"
        for name, field in root.model_fields.items()
        if _is_section(field.annotation) and location[-1] in getattr(field.annotation, "model_fields", {})
    ]
    return f"; did you mean {homes[0]!r}?" if homes else f"; known here: {', '.join(known)}"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _files_like(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*.toml")) if folder.is_dir() else []
    return f"{folder}/ has {', '.join(found)}" if found else f"there is no .toml file in {folder}/ either"
