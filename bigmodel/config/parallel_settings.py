"""Ranks that share a model (training.tensor_parallel_ranks, training.expert_parallel_ranks) or packed sequences
(training.sequence_parallel_ranks): what does not fit them."""

from typing import Any

from bigmodel.config.user_error import UserError
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.sizes import counted_noun

GATHERED = 'training.sequence_parallel_method = "all_gather"'
PREFIXED = f"{GATHERED} with data.bidirectional_prefix = true"
LATER = 'a position attends to later ones, which only "ulysses" covers; set it to that'


def problem_of_tensor_parallel(settings: Any) -> str:
    """Why settings do not fit tensor-parallel ranks; empty if they do. settings: `Settings`, which imports this."""
    model, training = settings.model, settings.training
    size = training.tensor_parallel_ranks
    if size == 1:
        return ""
    said = f"training.tensor_parallel_ranks = {size}"
    divided = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
    for name, value in {**divided, "intermediate_size": model.intermediate_size}.items():
        if value % size:
            return f"{said} does not divide model.{name} = {value}; choose a divisor"
    if model.is_recurrent or model.has_source:
        return f'{said} with model.kind = "{model.kind}": only decoders and encoders are shared; set it to 1'
    given: dict[str, tuple[Any, Any, str]] = {
        "model.experts": (model.experts, None, "training.expert_parallel_ranks shares experts"),
        "model.qk_norm_over": (model.qk_norm_over, "head", "each rank has some of the heads"),
        "training.sequence_parallel_ranks": (
            training.sequence_parallel_ranks,
            1,
            "tensor-parallel ranks share the positions already",
        ),
        "training.compile": (training.compile, False, "the exchange between ranks is not compiled"),
        "training.scheduled_sampling": (training.scheduled_sampling, None, "predictions are of other positions"),
        "lora.rank": (settings.lora.rank, 0, "adapters are not divided"),
        "classification.classes": (settings.classification.classes, [], "a head of classes is not divided"),
        "distillation.teacher": (settings.distillation.teacher, None, "the teacher's loss is not divided"),
        "pruning.kind": (getattr(settings.pruning, "kind", "none"), "none", "it is not tested with divided matrices"),
        "optimizer.qk_clip": (settings.optimizer.qk_clip, 0.0, "each rank has some of the heads"),
    }
    for name, (value, default, reason) in given.items():
        if value != default:
            return f"{name} with {said}: {reason}; leave one of them out"
    if settings.optimizer.kind == "adafactor":
        return (
            f'optimizer.kind = "adafactor" with {said}: it keeps rows and columns of whole matrices; use another '
            "optimizer"
        )
    return ""


def degrees_of(training: Any) -> str:
    """How many ranks share matrices, packed sequences and experts: "sequence-parallel 2, expert-parallel 4"; empty if
    none do. training: `TrainingSettings`."""
    sizes = {kind: getattr(training, f"{kind}_parallel_ranks") for kind in ("tensor", "sequence", "expert")}
    return ", ".join(f"{kind}-parallel {size}" for kind, size in sizes.items() if size > 1)


def refuse_across_nodes(settings: Any, ranks_on_node: int) -> None:
    """Raise `UserError` where ranks of several nodes would share experts or matrices and the settings do not allow it.
    settings: `Settings`. ranks_on_node: 1 where nodes have unequal numbers."""
    training = settings.training
    for kind in ("expert", "tensor"):
        size = getattr(training, f"{kind}_parallel_ranks")
        if not getattr(training, f"{kind}_parallel_across_nodes") and ranks_on_node % size:
            raise UserError(
                f"training.{kind}_parallel_ranks = {size} with {counted_noun(ranks_on_node, 'rank')} on a node: each "
                f"layer would wait for the network; choose a divisor, or set training.{kind}_parallel_across_nodes = "
                "true"
            )


def refuse_undivided_rows(size: int, rows: int) -> None:
    """Raise `UserError` where `size` tensor-parallel ranks cannot divide the rows of the embedding."""
    if rows % size:
        raise UserError(
            f"training.tensor_parallel_ranks = {size} does not divide the {rows} rows of the embedding; set "
            f"model.vocabulary_multiple = {size}"
        )


def problem_of_sharing(settings: Any) -> str:
    """Why `training.sequence_parallel_ranks` does not fit other settings; empty if it does. settings: `Settings`, which
    imports this."""
    model, training, data = settings.model, settings.training, settings.data
    size, method = training.sequence_parallel_ranks, training.sequence_parallel_method
    name = f"training.sequence_parallel_ranks = {size}"
    if size == 1 or model.is_recurrent:
        return ""
    if model.has_source or model.position_embedding != "rotary" or model.num_mtp_modules:
        return (
            f"{name}: needs a decoder-only model with rotary positions and without MTP modules "
            "(model.num_mtp_modules = 0); set it to 1"
        )
    if model.experts and model.experts.capacity_factor:
        return (
            f"{name} with model.experts.capacity_factor = {model.experts.capacity_factor}: an expert's capacity "
            "depends on a document's earlier tokens, also on other ranks; set the first to 1, or the other to 0"
        )
    if method == "all_gather" and model.kind == "encoder":
        return f'{GATHERED} with model.kind = "encoder": {LATER}'
    if method == "all_gather" and data.bidirectional_prefix:
        for objective in data.objectives:
            if OBJECTIVES[objective.kind].has_source:
                return f'{PREFIXED} and the objective "{objective.kind}": {LATER}'
    heads = f"model.num_heads = {model.num_heads} and model.num_kv_heads = {model.num_kv_heads}"
    if method == "ulysses" and (model.num_heads % size or (model.num_kv_heads % size and size % model.num_kv_heads)):
        return (
            f"{name} does not fit {heads}: it must divide the heads, and divide the key-value heads or be a multiple "
            'of them; or set training.sequence_parallel_method = "all_gather"'
        )
    if data.sequence_length % size:
        return f"{name} does not divide data.sequence_length = {data.sequence_length}; choose a multiple"
    return ""
