"""Classification in a Hugging Face config.json: the class of a type, its labels, what it cannot hold.

In: a type of `bigmodel.config.huggingface` and the resolved settings of [classification]. Out: keys of config.json. The
classes of decoders read the last token of a text that is not padding, BERT's the first one through its pooler,
ModernBERT's the first one or the mean through its head.
"""

from typing import Any

from bigmodel.config.classification_settings import ClassificationSettings

CLASSES_WITH_LABELS = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "bert": "BertForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
}
ENCODERS = ("bert", "modernbert")


def lacking_for_labels(kind: str, classification: ClassificationSettings) -> list[str]:
    """What the type's class for sequences cannot hold, as "classification.name = value"."""
    if kind not in CLASSES_WITH_LABELS:
        return ["classification.classes, for which the type has no class"]
    head = kind if kind in ENCODERS else "linear"
    poolings = {"bert": ("first",), "modernbert": ("first", "mean")}.get(kind, ("last",))
    return [
        *([] if classification.head == head else [f'classification.head = "{classification.head}"']),
        *([] if classification.pooling in poolings else [f'classification.pooling = "{classification.pooling}"']),
    ]


def config_of_labels(kind: str, classification: ClassificationSettings) -> dict[str, Any]:
    names = dict(enumerate(classification.classes))
    keys: dict[str, Any] = {
        "architectures": [CLASSES_WITH_LABELS[kind]],
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
        "problem_type": "single_label_classification",
    }
    if kind == "modernbert":
        pooling = "mean" if classification.pooling == "mean" else "cls"
        keys |= {"classifier_pooling": pooling, "classifier_bias": False, "classifier_activation": "gelu"}
    return keys
