"""Settings: every section and key of a TOML run file, with default, meaning and checks.

In: a path and `--set a.b=1` overrides. Out: `Settings`, frozen and typed. Guarantees: a wrong value, an unknown key and
a setting without effect raise `UserError` (`bigmodel.config.sections`). Imports neither torch nor deepspeed, so that
the launcher and a login node read a run file in milliseconds.

    load_settings("configs/tiny.toml", ["training.steps=10"]).training.steps    # 10
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from bigmodel.config.adapter_folder import with_adapter
from bigmodel.config.class_balance import problem_without_classes
from bigmodel.config.classification_settings import ClassificationSettings as ClassificationSettings
from bigmodel.config.classification_settings import problem_of_classification
from bigmodel.config.data_settings import CurriculumStage as CurriculumStage
from bigmodel.config.data_settings import DataSettings as DataSettings
from bigmodel.config.data_settings import DecontaminationSettings as DecontaminationSettings
from bigmodel.config.data_settings import ObjectiveSettings as ObjectiveSettings
from bigmodel.config.data_settings import PrepareSettings as PrepareSettings
from bigmodel.config.data_settings import SourceSettings as SourceSettings
from bigmodel.config.distillation_settings import DistillationSettings as DistillationSettings
from bigmodel.config.distillation_settings import problem_of_distillation
from bigmodel.config.expert_settings import ExpertSettings as ExpertSettings
from bigmodel.config.expert_settings import problem_beside_experts
from bigmodel.config.lora_settings import LoraSettings as LoraSettings
from bigmodel.config.measures import MEASURES
from bigmodel.config.model_settings import ModelSettings as ModelSettings
from bigmodel.config.model_settings import RopeScalingSettings as RopeScalingSettings
from bigmodel.config.parallel_settings import problem_of_sharing, problem_of_tensor_parallel
from bigmodel.config.pruning_settings import PruningSettings as PruningSettings
from bigmodel.config.pruning_settings import problem_of_pruning, with_end_of_pruning
from bigmodel.config.recurrent_settings import problem_beside_recurrent
from bigmodel.config.sampling_settings import ScheduledSamplingSettings as ScheduledSamplingSettings
from bigmodel.config.sampling_settings import problem_of_sampling
from bigmodel.config.schedule_settings import COUNTED, with_default_warmup
from bigmodel.config.schedule_settings import ScheduleSettings as ScheduleSettings
from bigmodel.config.sections import SAVED as SAVED
from bigmodel.config.sections import SET, ReadBy, key_of, read_table, setting
from bigmodel.config.sections import Section as Section
from bigmodel.config.sections import UserError as UserError
from bigmodel.config.sections import explain as explain
from bigmodel.config.sections import without_secrets as without_secrets
from bigmodel.config.spike_settings import SpikeSettings as SpikeSettings
from bigmodel.config.start_folder import completed
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.training.optimizers.table import OPTIMIZERS

READ_BY_OPTIMIZER = {"kind": ReadBy(OPTIMIZERS)}


class RunSettings(Section):
    directory: Path = Field(
        Path("runs/run"), description="folder of all files of the run; relative to the current folder"
    )
    seed: int = Field(1, ge=0, lt=2**63, description="seed of all random draws: order, dropout, initial weights")


class ParameterGroupSettings(Section):
    """Parameters with their own learning rate, weight decay or L1 penalty."""

    parameters: str = Field(
        description='pattern of parameter names: "head.weight", "blocks.*.attention.*"; the last matching group applies'
    )
    learning_rate_factor: float = Field(
        1.0, ge=0, description="factor of the schedule's learning rate; 0: weights are frozen, moments still change"
    )
    weight_decay: float | None = Field(None, ge=0, description="replaces optimizer.weight_decay and its rule")
    l1_penalty: float | None = Field(None, ge=0, description="replaces optimizer.l1_penalty and its rule")


class OptimizerSettings(Section):
    """The optimizer. Weight decay and the L1 penalty apply to matrices only, not to norms or embeddings."""

    kind: Annotated[str, key_of(OPTIMIZERS)] = Field(
        "adamw", description="; ".join(f"{kind}: {row.about}" for kind, row in OPTIMIZERS.items())
    )
    learning_rate: float = Field(
        3e-4,
        gt=0,
        description="highest (range_test: first) learning rate; adafactor: relative to a parameter's scale",
    )
    beta1: float = setting(0.9, only_with=READ_BY_OPTIMIZER, ge=0, lt=1, description="decay of the first moment")
    beta2: float = setting(0.95, only_with=READ_BY_OPTIMIZER, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = setting(
        1e-8,
        only_with=READ_BY_OPTIMIZER,
        gt=0,
        description="added to the root of the second moment; adafactor: smallest value of that root",
    )
    weight_decay: float = Field(0.1, ge=0)
    l1_penalty: float = Field(
        0.0,
        ge=0,
        description="L1 penalty: after an update, weights move towards 0 by learning rate * l1_penalty and stop there "
        "(decoupled, as weight decay is); with weight_decay the elastic net; 0: off",
    )
    momentum: float = setting(
        0.95, only_with=READ_BY_OPTIMIZER, ge=0, lt=1, description="muon: momentum of the hidden matrices"
    )
    matrix_scale: Literal["match_rms_adamw", "original"] = setting(
        "match_rms_adamw",
        only_with=READ_BY_OPTIMIZER,
        description="muon: factor of an orthogonal update. match_rms_adamw: 0.2 * sqrt(max(rows, columns)), the size "
        "of AdamW's updates; original: sqrt(max(1, rows / columns)), as in DeepSpeed",
    )
    joined_matrices: Literal["whole", "parts"] = setting(
        "whole",
        only_with=READ_BY_OPTIMIZER,
        description="muon: orthogonalises matrices that are stored as one, query, key and value or gate and up, as a "
        "whole, as DeepSpeed does, or each by itself, as Megatron does",
    )
    adamw_rate_factor: float = setting(
        1.0,
        only_with=READ_BY_OPTIMIZER,
        ge=0,
        description="muon: factor of the learning rate for what AdamW updates",
    )
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
        description="adafactor: smallest root mean square used as a parameter's scale",
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
        description="ademamix: updates over which alpha rises from 0 and beta3 from beta1; 0: none; the paper: all",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    qk_clip: float = Field(
        0.0,
        ge=0,
        description="largest attention score (MuonClip of Kimi K2; there 100): where a head exceeds it in a step, its "
        "query and key weights are scaled down after the update; 0: off",
    )
    groups: list[ParameterGroupSettings] = Field(
        [], description="parameters with another learning rate, weight decay or L1 penalty"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from layer to layer, downwards: 1 for the head, d for the last block, "
        "d^n for the first of n, d^(n+1) for embeddings (ULMFiT, ELECTRA); 1: off",
    )

    @property
    def has_penalty(self) -> bool:
        """Whether any parameters have an L1 penalty."""
        return bool(self.l1_penalty or any(group.l1_penalty for group in self.groups))


class EarlyStopSettings(Section):
    """End of the run when evaluations (evaluation.every_steps) get no better."""

    metric: Annotated[str, key_of(MEASURES)] = Field("loss", description=f"of evaluations: {', '.join(MEASURES)}")
    patience: int = Field(3, ge=1, description="the run ends after this many evaluations in a row without a better one")
    min_delta: float = Field(0.0, ge=0, description="an evaluation is better only by more than this")


class TrainingSettings(Section):
    section = "training"

    steps: int = Field(1000, ge=1, description="optimizer steps in the whole run")
    global_batch_size: int = Field(8, ge=1, description="packed sequences per optimizer step, over all ranks")
    batch_ramp: list[tuple[int, int]] = Field(
        [], description="pairs [step, packed sequences]: the batch size from that step on, instead of global_batch_size"
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="of weights in the forward pass; sums and master weights are fp32; fp16 scales the loss"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="recomputed in the backward pass: nothing; all except matrix products and attention; everything",
    )
    sequence_parallel_ranks: int = Field(
        1, ge=1, description="consecutive ranks that share each packed sequence, for very long documents"
    )
    sequence_parallel_method: Literal["ulysses", "all_gather"] = Field(
        "ulysses",
        description="how they attend: ulysses exchanges positions for heads and needs as many of them; all_gather: "
        "each with its queries to the gathered keys of all; positions are dealt by attention work",
    )
    expert_parallel_ranks: int = Field(
        1, ge=1, description="consecutive ranks that share the experts of each layer, each with an equal part of them"
    )
    expert_parallel_across_nodes: bool = Field(
        False, description="whether ranks of several nodes may share experts: each layer then waits for the network"
    )
    tensor_parallel_ranks: int = Field(
        1, ge=1, description="consecutive ranks that share the matrices of each layer and the positions between layers"
    )
    tensor_parallel_across_nodes: bool = Field(
        False, description="whether ranks of several nodes may share matrices: each layer then waits for the network"
    )
    compile: bool = Field(False, description="torch.compile each block")
    attention_kernel: Literal["triton", "hopper", "flash-attn", "torch-varlen", "fastest"] = Field(
        "triton",
        description="of self-attention on a GPU: triton is ours; hopper: its forward with TMA loads and specialized "
        "warps, sm_90, heads of 64 or 128 channels; flash-attn: FlashAttention-2 of that package; "
        "torch-varlen: of torch; fastest: the fastest exact one that python -m tools.tune_attention measured, triton "
        "without a measurement. None has run yet: test first, BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu",
    )
    collective_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="longest collective: after it a rank counts as hanging and the run fails; also the longest wait "
        "of ranks for each other at the start",
    )
    hang_seconds: float = Field(
        10.0,
        ge=0,
        description="longest time without progress, or ten usual steps if that is longer: then a hanging rank is named "
        "with its stack, and the run ends, at once if the rank was stopped, else after three times as long; 0: only "
        "collective_timeout_seconds",
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay, per update, of the average of the weights in checkpoints; 0: no average"
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="weight of logsumexp(logits)^2 in the gradient, usually 1e-4; not in the reported loss; 0: off",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label spread evenly over all tokens; not in validation; 0: off"
    )
    replica_check_every_steps: int = Field(
        10,
        ge=0,
        description="steps between comparisons of what ranks hold alike, by a hash of its bits; before each save, too; "
        "0: neither. ZeRO 1 and 2 gather weights anew in each step: only 1 sees each copy",
    )
    spikes: SpikeSettings = Field(
        SpikeSettings(), description="what follows a loss or gradient norm far above the usual: { policy, sigmas, ... }"
    )
    early_stop: EarlyStopSettings | None = Field(
        None, description="ends the run early, exit code 0: { metric, patience, min_delta }; absent: never"
    )
    scheduled_sampling: ScheduledSamplingSettings | None = Field(
        None,
        description="replaces decoder inputs by the model's own predictions: { schedule, share, steps, choice }; "
        "absent: never",
    )
    freeze: list[str] = Field(
        [],
        description='patterns of parameters that are not trained: "embedding", "blocks.[0-3].*"; a name means all '
        "below it",
    )
    deepspeed: Path | None = Field(
        None, description="your DeepSpeed JSON, relative to the run file; absent: ZeRO stage 1"
    )

    @property
    def ranks_per_sequence(self) -> int:
        """Consecutive ranks that get the same packed sequences."""
        return self.sequence_parallel_ranks * self.tensor_parallel_ranks

    @property
    def shares_parameters(self) -> bool:
        """Whether ranks hold different experts, or parts of matrices."""
        return self.expert_parallel_ranks > 1 or self.tensor_parallel_ranks > 1

    @property
    def sharing_ranks(self) -> int:
        """Consecutive ranks that share packed sequences, experts or matrices: the fewest of a run and its groups."""
        return math.lcm(self.ranks_per_sequence, self.expert_parallel_ranks)

    @model_validator(mode="after")
    def _ramp_makes_sense(self) -> "TrainingSettings":
        steps = [step for step, _ in self.batch_ramp]
        if any(step < 1 for step in steps) or steps != sorted(set(steps)):
            raise ValueError(f"training.batch_ramp: its steps {steps} must rise from pair to pair and be at least 1")
        if any(packs < 1 for _, packs in self.batch_ramp):
            raise ValueError(f"training.batch_ramp = {self.batch_ramp}: every step needs at least 1 packed sequence")
        return self


class EvaluationSettings(Section):
    section = "evaluation"

    every_steps: int = Field(0, ge=0, description="0: only at the end")
    sequences: int = setting(
        0,
        only_with={"every_steps": SET},
        why="the end uses all",
        ge=0,
        description="validation sequences used during training; 0: all. The validation at the end uses all",
    )
    at_end: bool = Field(
        True,
        description="after the last step: score the whole split and the tasks, generate a sample, write the summary",
    )
    tasks: list[str] = Field(
        [],
        description="tasks of EleutherAI's lm_eval to score too: names, task files or folders of them, relative to the "
        "working folder",
    )
    tasks_every_steps: int = setting(0, only_with={"tasks": SET}, ge=0, description="0: only at the end")
    tasks_limit: int = setting(0, only_with={"tasks": SET}, ge=0, description="documents of each task; 0: all")

    @model_validator(mode="after")
    def _tasks_are_scored(self) -> "EvaluationSettings":
        if self.tasks and not self.tasks_every_steps and not self.at_end:
            raise ValueError(
                "evaluation.tasks has no effect with tasks_every_steps = 0 and at_end = false; set one of them"
            )
        return self


class CheckpointSettings(Section):
    every_steps: int = Field(100, ge=1)
    hours_between_failures: float = Field(
        0.0,
        ge=0,
        description="mean time between failures of the whole job; above 0: the interval is computed from it and the "
        "cost of a save",
    )
    asynchronous: bool = Field(
        True, description="write while training continues; costs memory for a copy of the rank's shard"
    )
    on_failure: Literal["stop", "continue"] = Field(
        "stop",
        description="what follows a failed save (full disk, I/O error); older checkpoints are kept in both cases",
    )
    keep: int = Field(2, ge=1, description="number of newest checkpoints kept")
    keep_every_steps: int = Field(
        0, ge=0, description="checkpoints at multiples of this step are never deleted; 0: none"
    )
    keep_hours: float = Field(0.0, ge=0, description="checkpoints younger than this are kept, too")
    keep_best: Annotated[str, key_of({"": None} | MEASURES)] = Field(
        "",
        description=f"the checkpoint with the best evaluation by this metric ({', '.join(MEASURES)}) is saved and "
        "never deleted; for evaluate, generate and export --best; empty: none",
    )
    remote: str = Field(
        "", description="URL of a folder in a store; checkpoints are copied there, one at a time, the newest first"
    )


NO_PROJECT = "only the writers wandb, comet and mlflow have projects"
NO_GROUP = "only the writer wandb has groups"


class MetricsSettings(Section):
    port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port of each node's Prometheus endpoint; 0: derived from the run directory, else any free port",
    )
    host: str = Field("127.0.0.1", description="address of the metrics endpoint; 0.0.0.0: other machines can scrape it")
    attention_scores: bool = Field(
        False, description="the largest attention score of each step; on a CPU it costs a third product of attention"
    )
    norms_every_steps: int = Field(
        100,
        ge=0,
        description="steps between measurements of weight norms, and of the load of each expert; 0: never",
    )
    writers: list[Literal["tensorboard", "wandb", "csv", "comet", "mlflow"]] = Field(
        [],
        description="further formats, in the run directory or, by the clients' own variables, on a server; install the "
        "packages of all but csv; one that fails does not end the run",
    )
    project: str = setting(
        "bigmodel", only_with={"has_project": (True,)}, why=NO_PROJECT, min_length=1, description="project of the run"
    )
    group: str = setting(
        "", only_with={"has_group": (True,)}, why=NO_GROUP, description="wandb: group of runs; empty: none"
    )
    team: str = setting(
        "",
        only_with={"has_project": (True,)},
        why=NO_PROJECT,
        description="wandb: entity, comet: workspace of the run; empty: the default of who uploads",
    )

    @property
    def has_project(self) -> bool:
        return bool({"wandb", "comet", "mlflow"} & {*self.writers})

    @property
    def has_group(self) -> bool:
        return "wandb" in self.writers


class Settings(Section):
    """A run file."""

    run: RunSettings = RunSettings()
    prepare: PrepareSettings = PrepareSettings()
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    classification: ClassificationSettings = ClassificationSettings()
    distillation: DistillationSettings = DistillationSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    training: TrainingSettings = TrainingSettings()
    pruning: PruningSettings = PruningSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _data_and_model_know_the_classes(self) -> "Settings":
        if self.classification.classes:
            classes = self.classification
            data = self.data.with_classes(classes.classes, self.model.kind == "encoder", classes.weights)
            object.__setattr__(self, "data", data)
            object.__setattr__(self, "model", self.model.with_classes_of(self.classification))
        problem = problem_of_classification(self) if self.classification.classes else problem_without_classes(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _data_suit_the_model(self) -> "Settings":
        kind, sides = self.model.kind, self.data.source_sequence_length
        if self.model.has_source != (sides > 0):
            raise ValueError(
                f"model.kind = {kind!r} and data.source_sequence_length = {sides} do not fit: an encoder-decoder needs "
                "a source side, other models have none"
            )
        if (kind == "encoder") != self.data.trains_encoder and not self.classification.classes:
            masked = " or ".join(f'kind = "{name}"' for name, row in OBJECTIVES.items() if row.trains_encoder)
            raise ValueError(
                f"model.kind = {kind!r} and data.objectives do not fit: an encoder alone is trained by {masked}, and "
                "no other model is"
            )
        if self.data.dropped_decoder_share and self.model.num_mtp_modules:
            raise ValueError(
                "data.dropped_decoder_share leaves gaps between labels, so that model.num_mtp_modules would not "
                "predict the next tokens; remove one of them"
            )
        longest = max(self.data.max_document_length, self.data.max_source_length)
        if self.model.position_embedding == "learned" and longest > self.model.max_positions:
            raise ValueError(
                f"model.max_positions = {self.model.max_positions} is below the longest document, {longest} tokens "
                "(data.max_document_length, data.max_source_length); raise it or shorten documents"
            )
        if self.data.dropped_decoder_share and self.model.position_embedding == "relative_bias":
            raise ValueError(
                "data.dropped_decoder_share needs positions that count the dropped tokens; set "
                'model.position_embedding = "rotary"'
            )
        return self

    @model_validator(mode="after")
    def _sections_suit_recurrent_layers(self) -> "Settings":
        if self.model.is_recurrent and (problem := problem_beside_recurrent(self)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _sections_suit_experts(self) -> "Settings":
        if problem := problem_beside_experts(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _settings_suit_tensor_parallel_ranks(self) -> "Settings":
        if problem := problem_of_tensor_parallel(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _sequences_can_be_shared(self) -> "Settings":
        if problem := problem_of_sharing(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _evaluations_exist(self) -> "Settings":
        asked = {"checkpoint.keep_best": self.checkpoint.keep_best, "training.early_stop": self.training.early_stop}
        for name, value in asked.items():
            if value and not self.evaluation.every_steps:
                raise ValueError(
                    f"{name} needs evaluations during training: set evaluation.every_steps, or leave it out"
                )
        stop = self.training.early_stop
        metrics = {
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "training.early_stop.metric": stop and stop.metric,
        }
        for name, metric in metrics.items():
            if metric and MEASURES[metric].of_classes and not self.classification.classes:
                raise ValueError(
                    f'{name} = "{metric}" is a measure of classes: set classification.classes, or choose another of '
                    + ", ".join(one for one, measure in MEASURES.items() if not measure.of_classes)
                )
        return self

    @model_validator(mode="after")
    def _a_teacher_fits(self) -> "Settings":
        if problem := problem_of_distillation(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _inputs_can_be_sampled(self) -> "Settings":
        if problem := problem_of_sampling(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _tasks_are_of_the_next_token(self) -> "Settings":
        if self.evaluation.tasks and self.data.target_ahead > 1:
            raise ValueError(
                f"evaluation.tasks with data.target_ahead = {self.data.target_ahead}: tasks are scored token by token "
                "from the one before; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _default_warmup_fits(self) -> "Settings":
        object.__setattr__(self, "schedule", with_default_warmup(self.schedule, self.training.steps))
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> "Settings":
        object.__setattr__(self, "pruning", with_end_of_pruning(self.pruning, self.training.steps))
        if problem := problem_of_pruning(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _another_kernel_covers_the_model(self) -> "Settings":
        name = self.training.attention_kernel
        if name not in ("triton", "fastest") and (found := not_covered(self, name)):
            raise ValueError(f'training.attention_kernel = "{name}" does not cover {found}; leave one of them out')
        return self

    @model_validator(mode="after")
    def _scores_can_be_clipped(self) -> "Settings":
        if self.optimizer.qk_clip and self.model.qk_norm:
            raise ValueError(
                f"optimizer.qk_clip = {self.optimizer.qk_clip:g} with model.qk_norm = true: the norm undoes what is "
                "scaled, and bounds scores itself; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _width_transfer_is_defined(self) -> "Settings":
        width, kind = self.model.mup_base_width, self.optimizer.kind
        if width and OPTIMIZERS[kind].mup_power is None:
            known = ", ".join(name for name, row in OPTIMIZERS.items() if row.mup_power is not None)
            raise ValueError(
                f"model.mup_base_width = {width} with optimizer.kind = {kind!r}: muP has no rule for it; use one of "
                f"{known}, or leave mup_base_width out"
            )
        if width and self.optimizer.has_penalty:
            raise ValueError(
                f"model.mup_base_width = {width} with optimizer.l1_penalty: muP has no rule for the size of the "
                "penalty; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _rates_fit(self) -> "Settings":
        if problem := problem_of_rates(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _lanes_divide_the_step(self) -> "Settings":
        counts = [("global_batch_size", self.training.global_batch_size)]
        counts += [("batch_ramp: packed sequences", packs) for _, packs in self.training.batch_ramp]
        for name, packs in counts:
            if packs % self.data.lanes:
                raise ValueError(
                    f"training.{name} = {packs} is not a multiple of "
                    f"data.lanes = {self.data.lanes}; a step takes the same number of packed sequences from every lane"
                )
        ramp = self.schedule.warmup_steps + self.schedule.decay_steps
        if self.schedule.kind in COUNTED and self.schedule.unit == "steps" and ramp > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps = {self.schedule.warmup_steps} + "
                f"{self.schedule.decay_steps} exceeds "
                f"training.steps = {self.training.steps}; shorten them or train longer"
            )
        tokens = positions_before(self.training.steps, self)
        ramp = self.schedule.warmup_tokens + self.schedule.decay_tokens
        if self.schedule.unit == "tokens" and ramp > tokens:
            raise ValueError(
                f"schedule.warmup_tokens + schedule.decay_tokens = {ramp:,} exceeds the {tokens:,} tokens of "
                f"training.steps = {self.training.steps}; shorten them or train longer"
            )
        return self


def load_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a run file. `overrides`: `section.key=value`, values in TOML syntax (bare words are strings).

    Raises `UserError` with file, setting, value and remedy.
    """
    path = Path(path)
    table = read_table(path, overrides)
    return _resolve_deepspeed_path(settings_from_table(table, path), path)


def settings_from_table(table: Mapping[str, Any], origin: Path, saved: bool = False) -> Settings:
    """Validate plain values read from `origin`. Raises `UserError`, one line per problem.

    saved: the values were saved by a run, perhaps of an earlier version; settings without effect are accepted.
    """
    table = table if saved else with_adapter(completed(table, origin), origin)
    try:
        return Settings.model_validate(table, context=SAVED if saved else None)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Settings)}") from None


def problem_of_rates(settings: Settings) -> str:
    """Why schedule and optimizer do not fit; empty if they do."""
    schedule, optimizer = settings.schedule, settings.optimizer
    if schedule.lowest_rate > optimizer.learning_rate:
        return (
            f"schedule.lowest_rate = {schedule.lowest_rate} exceeds optimizer.learning_rate = "
            f"{optimizer.learning_rate}, the highest learning rate; lower it"
        )
    if schedule.beta1_range and not OPTIMIZERS[optimizer.kind].cycles_beta1:
        able = " or ".join(f'"{kind}"' for kind, row in OPTIMIZERS.items() if row.cycles_beta1)
        return (
            f'schedule.beta1_range = {list(schedule.beta1_range)} with optimizer.kind = "{optimizer.kind}": only '
            f"{able} can change beta1 during the run; leave it out"
        )
    return ""


def not_covered(settings: Settings, attention_kernel: str) -> str:
    """The first setting that an implementation of attention other than "triton" does not cover; empty if none."""
    model, channels = settings.model, settings.model.resolved_head_dim
    refused = {
        "model.attention_softcap": model.attention_softcap > 0,
        "model.attention_dropout": model.attention_dropout > 0,
        'model.position_embedding = "relative_bias"': model.position_embedding == "relative_bias",
        "optimizer.qk_clip": settings.optimizer.qk_clip > 0,
        "metrics.attention_scores": settings.metrics.attention_scores,
        'training.precision = "fp32"': settings.training.precision == "fp32",
        'training.sequence_parallel_method = "all_gather"': attention_kernel != "hopper"
        and settings.training.sequence_parallel_ranks > 1
        and settings.training.sequence_parallel_method == "all_gather",
        f"heads of {channels} channels, not a multiple of 8": channels % 8 > 0,
        f"heads of {channels} channels, not 64 or 128": attention_kernel == "hopper" and channels not in (64, 128),
    }
    return next((what for what, is_so in refused.items() if is_so), "")


def packs_at(step: int, global_batch_size: int, batch_ramp: Sequence[tuple[int, int]]) -> int:
    """Packs in a data step (counted from 0), over all ranks, according to the ramp."""
    return next((packs for start, packs in reversed(batch_ramp) if start <= step), global_batch_size)


def positions_before(step: int, settings: Settings) -> int:
    """Tokens in the steps before `step`, padding included."""
    training, steps, packs = settings.training, 0, 0
    for start, _ in [*training.batch_ramp, (step, 0)]:
        end = min(start, step)
        packs += (end - steps) * packs_at(steps, training.global_batch_size, training.batch_ramp)
        steps = end
    return packs * settings.data.sequence_length


def num_micro_batches(global_batch_size: int, world_size: int, packs_per_micro_batch: int) -> int:
    """Micro-batches per step, the same on every rank: a rank gets ceil(packs / ranks) packs, the last fewer or none."""
    packs_per_rank = -(-global_batch_size // world_size)
    return -(-packs_per_rank // packs_per_micro_batch)


def to_toml_table(settings: Settings) -> dict[str, Any]:
    """The settings as plain values to write or compare: paths are strings, None is left out."""
    return settings.model_dump(mode="json", exclude_none=True)


def _resolve_deepspeed_path(settings: Settings, run_file: Path) -> Settings:
    given = settings.training.deepspeed
    if given is None or given.is_absolute():
        return settings
    training = settings.training.model_copy(update={"deepspeed": (run_file.parent / given).resolve()})
    return settings.model_copy(update={"training": training})
