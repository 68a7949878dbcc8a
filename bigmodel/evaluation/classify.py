"""Validation of a classification: the loss and the class of every document of the split.

In: a forward function, the validation split. Out: an `Evaluation` with `scores`. The loss is the cross-entropy, without
class weights and focal factor. Guarantees: those of
`bigmodel.evaluation.evaluate`: every document is scored once, sums and counts are bitwise equal on any number of ranks.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.batch import IGNORED
from bigmodel.data.load.stream import validation_batches
from bigmodel.data.store.manifest import Labels
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World
from bigmodel.evaluation.class_scores import ClassScores, draw_confusion, in_words, labels_found, show_scores
from bigmodel.evaluation.evaluate import Evaluation, Forward, Validation
from bigmodel.model.class_head import labels_of

SHOWN = 8  # labels in a message


class ClassValidation(Validation):
    """Scores the documents of the validation split by class."""

    def __init__(self, data: DataSettings, packs_per_micro_batch: int) -> None:
        """Raises `UserError` for labels that do not fit the classes."""
        super().__init__(data.with_classes(data.classes, data.ends_classified, {}), packs_per_micro_batch)
        check_labels(self._store, data.classes)

    def run(self, forward: Forward, world: World, packs: int = 0) -> Evaluation:
        """Score the split; collective over all ranks. `forward(batch, "logits")` must not train."""
        started = time.perf_counter()
        groups = validation_batches(self._store, self._data, self._packs_per_micro_batch, packs)
        mine: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}
        for first in range(0, len(groups), world.size):
            # A forward pass is collective under ZeRO-3: a rank without a group repeats the last one, uncounted.
            number = first + world.rank
            batch = groups[min(number, len(groups) - 1)].to(world.device)
            logits_DC = forward(batch, "logits")
            if number < len(groups):
                labels_D = labels_of(batch.labels, batch.cu_seqlens)
                mine[number] = _score(logits_DC, labels_D)
        merged = {number: found for part in world.gather_objects(mine) for number, found in part.items()}
        nats, labels, predicted = zip(*(merged[number] for number in range(len(groups))), strict=True)
        scores = labels_found(self._data.classes, np.concatenate(labels), np.concatenate(predicted))
        seconds = time.perf_counter() - started
        return Evaluation(math.fsum(nats), scores.num_documents, None, seconds, scores=scores)


def make_validation(data: DataSettings, packs_per_micro_batch: int) -> Validation:
    """That of a classification if the run has classes."""
    return (ClassValidation if data.classes else Validation)(data, packs_per_micro_batch)


def show_evaluation(scores: ClassScores, png: Path | None, title: str) -> None:
    """Print the scores by class; with `png` also draw the confusion matrix."""
    show_scores(scores, Console(highlight=False, markup=False, emoji=False))
    if png:
        draw_confusion(scores, png, f"{title}: {in_words(scores)}")


def _score(logits_DC: torch.Tensor, labels_D: torch.Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss summed over the labelled documents, their classes and predicted classes."""
    is_real = labels_D != IGNORED
    logits_DC, labels_D = logits_DC[is_real].double(), labels_D[is_real]
    nats = float(F.cross_entropy(logits_DC, labels_D, reduction="sum"))
    return nats, labels_D.cpu().numpy(), logits_DC.argmax(-1).cpu().numpy()


def check_labels(store: ShardStore, classes: Sequence[str]) -> None:
    """Raise `UserError` for sources without labels, labels that are no class, and fewer than two classes with training
    documents. A source of pairs (`target_column`) says nothing about its labels before they are read."""
    manifest = store.manifest
    unlabelled = [name for name in store.sources if name not in store.pair_sources]
    if unlabelled:
        raise UserError(
            f"classification.classes: {', '.join(unlabelled)} of data.directory = {store.directory} "
            f"{'has' if len(unlabelled) == 1 else 'have'} no labels; prepare with label_column, or leave the source "
            "out of the data"
        )
    unknown = _unknown(manifest.labels, classes)
    if unknown:
        shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in sorted(unknown)[:SHOWN])
        more = f" and {len(unknown) - SHOWN:,} more" if len(unknown) > SHOWN else ""
        where = sorted({split for splits in unknown.values() for split in splits})
        raise UserError(
            f"classification.classes = {list(classes)} lacks labels of data.directory = {store.directory} "
            f"({' and '.join(where)}): {shown}{more}; add them, or drop these documents and prepare again"
        )
    trained = {name for source in manifest.labels.values() for name, count in source["train"].items() if count}
    if manifest.labels and len(trained) < 2:
        raise UserError(
            f"data.directory = {store.directory}: all training documents have the class {next(iter(trained))!r}; one "
            "class alone needs no model; add documents of another class"
        )


def _unknown(labels: Labels, classes: Sequence[str]) -> Mapping[str, set[str]]:
    """Labels that are no class, with the splits that have them."""
    found: dict[str, set[str]] = {}
    for of_source in labels.values():
        for split, counts in of_source.items():
            for name in counts.keys() - set(classes):
                found.setdefault(name, set()).add(split)
    return found
