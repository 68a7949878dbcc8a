"""Names of a classification head's weights in Hugging Face's classes, and of the model below it."""

from bigmodel.config.model_settings import ModelSettings

Names = dict[str, list[tuple[str, int]]]

HEAD_NAMES = {
    "bert": {
        "head.dense.weight": "bert.pooler.dense.weight",
        "head.dense.bias": "bert.pooler.dense.bias",
        "head.weight": "classifier.weight",
        "head.bias": "classifier.bias",
    },
    "modernbert": {
        "head.dense.weight": "head.dense.weight",
        "head.norm.weight": "head.norm.weight",
        "head.norm.bias": "head.norm.bias",
        "head.weight": "classifier.weight",
        "head.bias": "classifier.bias",
    },
}
PREFIXES = {"bert": "bert.", "modernbert": "model."}


def with_class_head(kind: str, names: Names, settings: ModelSettings) -> Names:
    """The names of a model, those of its head replaced by a classification head's."""
    head = HEAD_NAMES.get(kind, {"head.weight": "score.weight"})
    if kind == "modernbert" and not settings.norm_bias:
        head = {ours: theirs for ours, theirs in head.items() if ours != "head.norm.bias"}
    prefix = PREFIXES.get(kind, "")
    body = {
        ours: [(prefix + theirs, rows) for theirs, rows in parts]
        for ours, parts in names.items()
        if not ours.startswith("head.")
    }
    return body | {ours: [(theirs, 0)] for ours, theirs in head.items()}
