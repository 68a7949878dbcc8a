"""Settings of expert layers ([model.experts]): mixture of experts, its router, its balance."""

from typing import Any, Literal

from pydantic import Field, model_validator

from bigmodel.config.sections import SET, Section, setting

# They change no weight's shape and no evaluation.
TRAINING_ONLY = ("balance_weight", "bias_rate", "router_z_weight", "capacity_factor", "min_capacity")


class ExpertSettings(Section):
    """Mixture of experts (Shazeer et al. 2017): in place of one feed-forward layer many, of which a router chooses a
    few for each token. No token is dropped, whatever the load, unless `capacity_factor` says so; and then within each
    document, so that none takes the place of another one's token.

    Balance is that of whole steps: the load of an expert is counted over all tokens of a step on all ranks, without
    padding. The balance loss uses the loads of the step before, so that it is a sum over tokens, as the loss is.
    """

    count: int = Field(ge=1, le=32_767, description="experts of a layer")
    per_token: int = Field(2, ge=1, description="experts that a token passes")
    width: int = Field(0, ge=0, description="intermediate size of one expert; 0: model.intermediate_size")
    shared: int = Field(
        0,
        ge=0,
        description="experts that every token passes, without weights: one feed-forward layer of shared * width",
    )
    first_dense_layers: int = Field(0, ge=0, description="first layers, with one feed-forward layer each (DeepSeek-V3)")
    scores: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="scores of the experts from the router's logits, in fp32; sigmoid: DeepSeek-V3"
    )
    normalize_weights: bool = Field(
        True,
        description="the weights of a token's experts add up to 1 (Mixtral, Qwen3); false: they are the scores (OLMoE)",
    )
    groups: int = Field(
        1, ge=1, description="of equal numbers of neighbouring experts; a token passes experts of its best groups only"
    )
    groups_per_token: int = Field(
        1,
        ge=1,
        description="groups of a token: those with the largest sums of their two best scores, with the bias "
        "(DeepSeek-V3: 4 of 8)",
    )
    route_scale: float = Field(1.0, gt=0, description="factor of the weights (DeepSeek-V3: 2.5)")
    capacity_factor: float = Field(
        0.0,
        ge=0,
        description="in training, of the first n tokens of a document an expert takes at most this times per_token * n "
        "/ count, the first that come; the others pass it by, and are counted. 0: no limit",
    )
    min_capacity: int = setting(
        4,
        only_with={"capacity_factor": SET},
        ge=1,
        description="tokens of a document that an expert takes in any case",
    )
    balance: Literal["loss", "bias", "none"] = Field(
        "loss",
        description="loss: count * sum of load * mean score over the experts of a layer (Switch Transformer, with all "
        "chosen experts), in the gradient, not in the reported loss; bias: of the scores, only in the choice of "
        "experts (DeepSeek-V3)",
    )
    balance_weight: float = setting(
        0.01, only_with={"balance": "loss"}, gt=0, description="weight of the balance loss of each layer"
    )
    bias_rate: float = setting(
        0.001,
        only_with={"balance": "bias"},
        gt=0,
        description="after each step the bias of experts with less than the mean load rises by it, that of the others "
        "falls",
    )
    router_z_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the mean of logsumexp(logits)^2 of each layer's router (ST-MoE: 0.001), in the "
        "gradient, not in the reported loss",
    )

    @model_validator(mode="after")
    def _a_token_has_its_experts(self) -> "ExpertSettings":
        if self.per_token > self.count:
            raise ValueError(
                f"model.experts.per_token = {self.per_token} exceeds model.experts.count = {self.count}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _its_groups_have_them(self) -> "ExpertSettings":
        groups = f"model.experts.groups = {self.groups}"
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"model.experts.groups_per_token = {self.groups_per_token} exceeds {groups}; lower it, or set groups"
            )
        if self.groups == 1:
            return self
        if self.count % self.groups or self.count < 2 * self.groups:
            raise ValueError(
                f"{groups} with model.experts.count = {self.count}: groups have equally many experts, two at least; "
                "choose another divisor"
            )
        if self.per_token > (there := self.groups_per_token * self.count // self.groups):
            raise ValueError(
                f"model.experts.groups_per_token = {self.groups_per_token} of {groups} have {there} experts, and "
                f"model.experts.per_token = {self.per_token}; raise groups_per_token"
            )
        return self


def problem_of_experts(model: Any) -> str:
    """Why settings of the model do not fit expert layers; empty if they do. model: `ModelSettings`, which imports
    this."""
    if model.experts is None:
        return ""
    if model.kind == "encoder_decoder":
        return 'model.experts with model.kind = "encoder_decoder": its layers are not routed yet; leave it out'
    if model.experts.first_dense_layers >= model.num_layers:
        return (
            f"model.experts.first_dense_layers = {model.experts.first_dense_layers} leaves no layer with experts of "
            f"model.num_layers = {model.num_layers}; lower it"
        )
    if model.experts.per_token == 1 < model.experts.count and model.experts.normalize_weights:
        return (
            "model.experts.per_token = 1 with normalize_weights = true: the weight of a token's only expert is 1, so "
            "that the loss teaches the router nothing; set model.experts.normalize_weights = false"
        )
    if not model.gated or model.feed_forward_bias:
        name, value = ("feed_forward_bias", "true") if model.gated else ("gated", "false")
        return f"model.{name} = {value} with model.experts: experts are gated, without biases; leave it out"
    return ""


def problem_beside_experts(settings: Any) -> str:
    """Why other sections do not fit expert layers; empty if they do. settings: `Settings`, which imports this."""
    training = settings.training
    shared = f"training.expert_parallel_ranks = {training.expert_parallel_ranks}"
    if settings.model.experts is None:
        return f"{shared} needs model.experts; set it to 1" if training.expert_parallel_ranks > 1 else ""
    if settings.model.experts.count % training.expert_parallel_ranks:
        return f"{shared} does not divide model.experts.count = {settings.model.experts.count}; choose a divisor"
    given = {
        "lora.rank": (settings.lora.rank, 0, "adapters of experts are not made"),
        "classification.classes": (settings.classification.classes, [], "experts would be balanced over few labels"),
        "distillation.teacher": (settings.distillation.teacher, None, "it is not tested with experts"),
        "pruning.kind": (getattr(settings.pruning, "kind", None), "none", "experts are not pruned"),
        "training.scheduled_sampling": (training.scheduled_sampling, None, "its first pass would be routed too"),
        "model.mup_base_width": (settings.model.mup_base_width, 0, "muP has no tested rule for routers"),
        "training.compile": (training.compile, False, "the number of an expert's tokens changes with each batch"),
    }
    for name, (value, default, reason) in given.items():
        if value != default:
            return f"{name} with model.experts: {reason}; leave one of them out"
    if settings.optimizer.kind == "adafactor":
        return (
            'optimizer.kind = "adafactor" with model.experts: it keeps rows and columns of single matrices; use '
            "another optimizer"
        )
    return ""
