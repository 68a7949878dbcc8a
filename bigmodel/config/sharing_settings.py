"""Ranks that share packed sequences: which settings they fit."""

from typing import Any

from bigmodel.data.objectives.table import OBJECTIVES

GATHERED = 'training.sequence_parallel_method = "all_gather"'
PREFIXED = f"{GATHERED} with data.bidirectional_prefix = true"
LATER = 'a position attends to later ones, which only "ulysses" covers; set it to that'


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
