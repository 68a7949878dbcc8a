"""Recurrent kinds of models: which settings they read, and what the others are refused with."""

import json
from typing import Any

CELLS = {"rnn": "rnn", "lstm": "lstm", "gru": "gru", "lstm_encoder_decoder": "lstm"}  # by model.kind
GATES = {"rnn": 1, "lstm": 4, "gru": 3}  # rows of a weight matrix, in units of hidden_size, by cell
RECURRENT = tuple(CELLS)
PEEPHOLE_KINDS = tuple(kind for kind, cell in CELLS.items() if cell == "lstm")
WITH_SOURCE = ("encoder_decoder", "lstm_encoder_decoder")
# All that these models read; every other setting of [model] is refused, also those that come later.
READ = {
    "from", "kind", "num_layers", "hidden_size", "peepholes", "backpropagation_tokens", "separate_embeddings",
    "norm", "norm_bias", "zero_centered_norm", "norm_epsilon", "tied_embeddings", "dropout", "embedding_dropout",
    "logit_softcap", "logit_scale", "min_vocabulary", "vocabulary_multiple", "vectors", "vectors_absent",
}  # fmt: skip
REASONS = {
    "embedding_norm": "embedded tokens are always normalised before the first layer",
    "embedding_scale": "embedded tokens are normalised before the first layer",
    "norm_placement": "one norm follows the embedding, one the last layer",
    "stochastic_depth": "layers have no residual stream around them",
    "mup_base_width": "muP is defined for the matrices of a transformer",
    "activation": "the gates decide: sigmoid and tanh",
}
NO_PLACE = "a recurrent layer has neither attention heads, positions nor a feed-forward part"


def problem_of_recurrent(model: Any) -> str:
    """Why settings of a recurrent model make no sense; empty if they do. model: `ModelSettings`, which imports this."""
    follows = {"num_kv_heads": model.num_heads}  # a default
    for name, field in type(model).model_fields.items():
        value, default = getattr(model, name), field.get_default(call_default_factory=True)
        if name not in READ and value not in (default, follows.get(name, default)):
            return (
                f"model.{name} = {_toml(value)} has no effect with model.kind = {_toml(model.kind)} "
                f"({REASONS.get(name, NO_PLACE)}); leave it out"
            )
    return ""


def problem_beside_recurrent(settings: Any) -> str:
    """Why other sections do not fit a recurrent model; empty if they do. settings: `Settings`, which imports this."""
    lora, training, data = settings.lora, settings.training, settings.data
    given = {
        "lora.rank": (lora.rank, 0, "adapters belong to the matrices of a transformer's blocks"),
        "training.compile": (training.compile, False, "a layer is one kernel for all time steps already"),
        "training.sequence_parallel_ranks": (
            training.sequence_parallel_ranks,
            1,
            "each state needs the one before it, so ranks cannot share a document",
        ),
        "data.dropped_decoder_share": (
            data.dropped_decoder_share,
            0,
            "without positions the model cannot tell how many tokens are missing",
        ),
    }
    for name, (value, default, reason) in given.items():
        if value != default:
            return f"{name} = {_toml(value)} with model.kind = {_toml(settings.model.kind)}: {reason}; leave it out"
    return ""


def _toml(value: Any) -> str:
    return json.dumps(value, default=str)
