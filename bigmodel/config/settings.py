"""Settings: every table and key of a TOML run file, with its default, its meaning and what it must agree with.

Takes a path and `--set a.b=1` overrides, gives `Settings`, frozen and typed. Imports neither torch nor deepspeed, so
the launcher and a login node can read a run file in milliseconds. Wrong values raise `UserError`
(`bigmodel.config.sections`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from bigmodel.config.data_settings import CurriculumStage as CurriculumStage
from bigmodel.config.data_settings import DataSettings as DataSettings
from bigmodel.config.data_settings import DecontaminationSettings as DecontaminationSettings
from bigmodel.config.data_settings import ObjectiveSettings as ObjectiveSettings
from bigmodel.config.data_settings import PrepareSettings as PrepareSettings
from bigmodel.config.data_settings import SourceSettings as SourceSettings
from bigmodel.config.sections import SAVED as SAVED
from bigmodel.config.sections import SET, ReadBy, key_of, read_table, setting
from bigmodel.config.sections import Section as Section
from bigmodel.config.sections import UserError as UserError
from bigmodel.config.sections import explain as explain
from bigmodel.config.sections import without_secrets as without_secrets
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.training.optimizers.table import OPTIMIZERS

READ_BY_OPTIMIZER = {"kind": ReadBy(OPTIMIZERS)}
TWO_SIDES = {"kind": "encoder_decoder"}
LLAMA3, YARN = {"kind": "llama3"}, {"kind": "yarn"}


class RunSettings(Section):
    directory: Path = Field(
        Path("runs/run"), description="where everything this run writes goes; from the current folder"
    )
    seed: int = Field(1, ge=0, lt=2**63, description="keys every random draw: order, dropout, initial weights")


class RopeScalingSettings(Section):
    """Lower rotary frequencies, for documents longer than a model was trained on. Keys as in Hugging Face's
    `rope_scaling`: linear (Chen et al. 2023), llama3 (Llama 3.1), yarn (Peng et al. 2023)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1, description="the lowest frequencies are divided by it; linear: all of them")
    original_max_position_embeddings: int = setting(
        0,
        only_with={"kind": ("llama3", "yarn")},
        ge=0,
        description="longest document, in tokens, of the training before",
    )
    low_freq_factor: float = setting(
        1.0, only_with=LLAMA3, gt=0, description="fewer turns in the original length: divided whole"
    )
    high_freq_factor: float = setting(
        4.0, only_with=LLAMA3, gt=0, description="more turns in the original length: left as it is"
    )
    beta_fast: float = setting(
        32.0, only_with=YARN, gt=0, description="more turns in the original length: left as it is"
    )
    beta_slow: float = setting(
        1.0, only_with=YARN, gt=0, description="fewer turns in the original length: divided whole"
    )
    truncate: bool = setting(True, only_with=YARN, description="the two limits are rounded outwards to whole channels")
    attention_factor: float = setting(
        0.0, only_with=YARN, ge=0, description="of queries and keys after rotation; 0: 0.1 * ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _limits_make_sense(self) -> "RopeScalingSettings":
        if self.kind != "linear" and not self.original_max_position_embeddings:
            raise ValueError(
                f"model.rope_scaling.original_max_position_embeddings is missing: kind = {self.kind!r} needs the "
                "longest document, in tokens, that the model was trained on before"
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


class ModelSettings(Section):
    """A transformer: decoder, encoder-decoder or encoder. The vocabulary comes from the data's manifest.

    Where `encoder_...` is 0, the encoder of an encoder-decoder is like the decoder.
    """

    section = "model"

    kind: Literal["decoder", "encoder_decoder", "encoder"] = "decoder"
    num_layers: int = Field(12, ge=1)
    hidden_size: int = Field(768, ge=2, description="size of the hidden state")
    num_heads: int = Field(12, ge=1, description="query heads")
    num_kv_heads: int = Field(
        12, ge=1, description="key and value heads; divides heads (grouped-query attention); absent: as many as heads"
    )
    head_dim: int = Field(0, ge=0, description="channels of a head; 0: hidden_size / num_heads")
    intermediate_size: int = Field(2048, ge=1, description="size of the gated inner layer")
    encoder_num_layers: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_hidden_size: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_num_heads: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_num_kv_heads: int = setting(0, only_with=TWO_SIDES, ge=0)
    encoder_intermediate_size: int = setting(0, only_with=TWO_SIDES, ge=0)
    source_attention: Literal["cross", "mixed"] = setting(
        "cross",
        only_with=TWO_SIDES,
        description="how a decoder sees the source: a second attention, or in one softmax with its own past",
    )
    separate_embeddings: bool = setting(
        False, only_with=TWO_SIDES, description="the encoder has an embedding matrix of its own"
    )
    position_embedding: Literal["rotary", "relative_bias"] = Field(
        "rotary", description="rotary (Su et al. 2021), or T5's bias by distance, shared by the layers of a side"
    )
    relative_buckets: int = setting(
        32, only_with={"position_embedding": "relative_bias"}, ge=4, description="learned distances per head"
    )
    relative_distance: int = setting(
        128, only_with={"position_embedding": "relative_bias"}, ge=4, description="farther is all the same"
    )
    sliding_window: int = Field(
        0,
        ge=0,
        description="tokens that a query of a sliding layer sees: itself and window - 1 before it (Hugging Face's "
        "sliding_window); in an encoder itself and window // 2 on either side; cross-attention always sees the whole "
        "source; 0: all layers see the whole document",
    )
    full_attention_every: int = setting(
        0,
        only_with={"sliding_window": SET},
        ge=0,
        description="layers k, 2k, 3k ... of a stack, counted from 1, see the whole document: "
        "Gemma 2 has k = 2, Gemma 3 6, OLMo 3 4; 0: no layer does (Mistral)",
    )
    sliding_rope_theta: float = setting(
        0.0,
        only_with={"position_embedding": "rotary", "sliding_window": SET},
        ge=0,
        description="rope_theta of the sliding layers (Gemma 3's rope_local_base_freq); 0: the same",
    )
    attention_softcap: float = Field(
        0.0, ge=0, description="scores of attention become c * tanh(score / c): none passes c (Gemma 2: 50); 0: off"
    )
    attention_scale: float = Field(0.0, ge=0, description="factor of the scores; 0: 1 / sqrt(head size). T5: 1")
    activation: Literal["silu", "gelu"] = Field("silu", description="of the feed-forward: SwiGLU, or T5 v1.1's GEGLU")
    num_mtp_modules: int = setting(
        0,
        only_with={"kind": ("decoder", "encoder_decoder")},
        why="an encoder predicts no further tokens",
        ge=0,
        description="multi-token prediction: so many tokens more, each by its own block",
    )
    mtp_loss_weight: float = setting(
        0.3,
        only_with={"num_mtp_modules": SET},
        gt=0,
        description="of the mean of the extra heads' losses in the gradient",
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
        description="share of a head's channels that turn, the first ones (GPT-NeoX, Phi); 1: all",
    )
    rope_scaling: RopeScalingSettings | None = setting(
        None,
        only_with={"position_embedding": "rotary"},
        description="lower rotary frequencies, in the layers that see the whole document",
    )
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys of each head")
    tied_embeddings: bool = Field(False, description="the output head uses the embedding matrix")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what each block adds to the residual stream")
    norm_epsilon: float = Field(1e-5, gt=0)
    logit_softcap: float = Field(
        0.0, ge=0, description="the head's logits become c * tanh(logit / c): none passes c; 0: off"
    )

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that turn."""
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
                    f"{self.hidden_size}, so the sides cannot share an embedding matrix; set "
                    "model.separate_embeddings = true"
                )
            if self.source_attention == "mixed" and self.position_embedding != "rotary":
                raise ValueError(
                    'model.source_attention = "mixed" has no distance between a target and a source token that a bias '
                    'could be learned for; set model.position_embedding = "rotary"'
                )
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

    @model_validator(mode="after")
    def _windows_and_rotation_make_sense(self) -> "ModelSettings":
        _check_window(self)
        _check_rotation(self)
        return self


def _check_heads(model: ModelSettings) -> None:
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise ValueError(
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_heads = {model.num_heads}; "
            f"{max(1, model.hidden_size // model.num_heads) * model.num_heads} is the nearest that divides"
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


def _check_window(model: ModelSettings) -> None:
    every = model.full_attention_every
    if every == 1:
        raise ValueError(
            f"model.full_attention_every = 1 leaves no layer to model.sliding_window = {model.sliding_window}; leave "
            "both out, or set 2 or more"
        )
    for stack in (model, model.encoder) if model.kind == "encoder_decoder" else (model,):
        if every > stack.num_layers:
            raise ValueError(
                f"model.full_attention_every = {every} is more than the {stack.num_layers} layers of the "
                f"{'encoder' if stack is not model else model.kind}: none would see its whole document; set it to 0 "
                "where that is meant"
            )
    for name in ("sliding_rope_theta", "rope_scaling") if model.sliding_window and not every else ():
        if getattr(model, name):
            raise ValueError(
                f"model.{name} needs layers of both kinds, and with model.full_attention_every = 0 all are sliding; "
                + ("set model.rope_theta itself" if name == "sliding_rope_theta" else "leave it out")
            )


def _check_rotation(model: ModelSettings) -> None:
    if model.position_embedding != "rotary":
        return
    for stack in (model, model.encoder) if model.kind == "encoder_decoder" else (model,):
        if stack.rotary_channels < 2 or stack.rotary_channels % 2:
            raise ValueError(
                f"model.rotary_fraction = {model.rotary_fraction} of a head of {stack.resolved_head_dim} channels is "
                f"{stack.rotary_channels}; rotary positions turn pairs: choose a fraction that gives an even number"
            )


class ParameterGroupSettings(Section):
    """Parameters that are treated in their own way."""

    parameters: str = Field(description='names, as a pattern: "head.weight", "blocks.*.attention.*"; a later one wins')
    learning_rate_factor: float = Field(1.0, ge=0, description="times the schedule's rate; 0: frozen but for momentum")
    weight_decay: float | None = Field(None, ge=0, description="in place of optimizer.weight_decay and its rule")


class OptimizerSettings(Section):
    """How weights move. Weight decay falls on matrices only, not on norms or embeddings."""

    kind: Annotated[str, key_of(OPTIMIZERS)] = Field(
        "adamw", description="; ".join(f"{kind}: {row.about}" for kind, row in OPTIMIZERS.items())
    )
    learning_rate: float = Field(
        3e-4, gt=0, description="the highest the schedule reaches; adafactor: relative to a parameter's scale"
    )
    beta1: float = setting(0.9, only_with=READ_BY_OPTIMIZER, ge=0, lt=1, description="decay of the first moment")
    beta2: float = setting(0.95, only_with=READ_BY_OPTIMIZER, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = setting(
        1e-8,
        only_with=READ_BY_OPTIMIZER,
        gt=0,
        description="added to the root of the second moment; adafactor: the least of that root",
    )
    weight_decay: float = Field(0.1, ge=0)
    momentum: float = setting(0.95, only_with=READ_BY_OPTIMIZER, ge=0, lt=1, description="muon: of the hidden matrices")
    beta2_decay: float = setting(
        -0.8, only_with=READ_BY_OPTIMIZER, le=0, description="adafactor: beta2 of update t is 1 - t ** beta2_decay"
    )
    update_clipping: float = setting(
        1.0,
        only_with=READ_BY_OPTIMIZER,
        ge=1,
        description="adafactor: largest root mean square of a parameter's update",
    )
    least_scale: float = setting(
        1e-3,
        only_with=READ_BY_OPTIMIZER,
        ge=0,
        description="adafactor: least root mean square that a parameter counts with",
    )
    alpha: float = setting(
        5.0, only_with=READ_BY_OPTIMIZER, ge=0, description="ademamix: weight of the slow moment in the update"
    )
    beta3: float = setting(
        0.9999, only_with=READ_BY_OPTIMIZER, gt=0, lt=1, description="ademamix: decay of the slow moment"
    )
    ema_warmup_steps: int = setting(
        0,
        only_with=READ_BY_OPTIMIZER,
        ge=0,
        description="ademamix: updates in which alpha rises from 0 and beta3 from beta1; 0: none; the paper: all",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    groups: list[ParameterGroupSettings] = Field([], description="parameters with another rate or decay")


class ScheduleSettings(Section):
    """Learning rate: a linear warm-up, then what `kind` says; wsd is a stable stretch and a linear decay."""

    kind: Literal["cosine", "wsd", "linear", "inverse_square_root", "constant"] = "cosine"
    unit: Literal["steps", "tokens"] = Field("steps", description="tokens: positions, as the plan gives them to steps")
    warmup_steps: int = setting(100, only_with={"unit": "steps"}, ge=0)
    decay_steps: int = setting(
        0, only_with={"kind": "wsd", "unit": "steps"}, ge=0, description="length of the final decay"
    )
    warmup_tokens: int = setting(0, only_with={"unit": "tokens"}, ge=0, description="in place of warmup_steps")
    decay_tokens: int = setting(
        0, only_with={"kind": "wsd", "unit": "tokens"}, ge=0, description="in place of decay_steps"
    )
    final_ratio: float = setting(
        0.1,
        only_with={"kind": ("cosine", "wsd", "linear", "inverse_square_root")},
        ge=0,
        le=1,
        description="last learning rate over the highest, or the lowest",
    )


class TrainingSettings(Section):
    section = "training"

    steps: int = Field(1000, ge=1, description="optimizer steps in the whole run")
    global_batch_size: int = Field(8, ge=1, description="packs in one optimizer step, over all ranks")
    batch_ramp: list[tuple[int, int]] = Field(
        [], description="[step, packs] pairs: global_batch_size holds until the first, then each from its step on"
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
        600.0,
        gt=0,
        description="a collective that takes longer waits for a rank that hangs: the run fails; also how long "
        "ranks wait for each other at the start",
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
    section = "evaluation"

    every_steps: int = Field(0, ge=0, description="0: only at the end")
    sequences: int = setting(
        0,
        only_with={"every_steps": SET},
        why="the end uses all",
        ge=0,
        description="validation sequences used while training; 0: all of them. The end uses all",
    )
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
        0,
        ge=0,
        le=65535,
        description="Prometheus endpoint of each node; 0: one that follows from the run directory, else any free one",
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
        kind, sides = self.model.kind, self.data.source_sequence_length
        if (kind == "encoder_decoder") != (sides > 0):
            raise ValueError(
                f"model.kind = {kind!r} and data.source_sequence_length = {sides} do not fit: an encoder-decoder needs "
                "a source side in every pack, other models have none"
            )
        if (kind == "encoder") != self.data.trains_encoder:
            masked = " or ".join(f'kind = "{name}"' for name, row in OBJECTIVES.items() if row.trains_encoder)
            raise ValueError(
                f"model.kind = {kind!r} and data.objectives do not fit: an encoder alone is trained by {masked}, and "
                "no other model is"
            )
        if self.data.dropped_decoder_share and self.model.num_mtp_modules:
            raise ValueError(
                "data.dropped_decoder_share leaves gaps in the targets, in which model.num_mtp_modules would predict "
                "others than the next ones; leave one of them out"
            )
        if self.data.dropped_decoder_share and self.model.position_embedding == "relative_bias":
            raise ValueError(
                "data.dropped_decoder_share needs positions that know of the gaps; set "
                'model.position_embedding = "rotary"'
            )
        return self

    @model_validator(mode="after")
    def _lanes_divide_the_step(self) -> "Settings":
        counts = [("global_batch_size", self.training.global_batch_size)]
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
        tokens = positions_before(self.training.steps, self)
        ramp = self.schedule.warmup_tokens + self.schedule.decay_tokens
        if self.schedule.unit == "tokens" and ramp > tokens:
            raise ValueError(
                f"schedule.warmup_tokens + schedule.decay_tokens = {ramp:,} exceeds the {tokens:,} positions of "
                f"training.steps = {self.training.steps}; shorten them or train longer"
            )
        return self


def load_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a run file. `overrides` are `section.key=value` texts, values in TOML syntax (bare words are strings).

    Raises `UserError` naming the file, the setting, its value and the remedy.
    """
    path = Path(path)
    table = read_table(path, overrides)
    return _resolve_deepspeed_path(settings_from_table(table, path), path)


def settings_from_table(table: Mapping[str, Any], origin: Path, saved: bool = False) -> Settings:
    """Validate plain values read from `origin`. Raises `UserError`, one line per complaint.

    saved: by a run, perhaps of an earlier version; a setting without effect is no error then.
    """
    try:
        return Settings.model_validate(table, context=SAVED if saved else None)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings)}") from None


def packs_at(step: int, global_batch_size: int, batch_ramp: Sequence[tuple[int, int]]) -> int:
    """Packs in a data step (counted from 0), over all ranks: those of the last pair of the ramp that has begun."""
    return next((packs for start, packs in reversed(batch_ramp) if start <= step), global_batch_size)


def positions_before(step: int, settings: Settings) -> int:
    """Positions in the steps before `step`, padding included."""
    training, steps, packs = settings.training, 0, 0
    for start, _ in [*training.batch_ramp, (step, 0)]:
        end = min(start, step)
        packs += (end - steps) * packs_at(steps, training.global_batch_size, training.batch_ramp)
        steps = end
    return packs * settings.data.sequence_length


def num_micro_batches(global_batch_size: int, world_size: int, packs_per_micro_batch: int) -> int:
    """Micro-batches in a step, the same on every rank: each takes ceil(packs / ranks), the last ones fewer or none."""
    packs_per_rank = -(-global_batch_size // world_size)
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
