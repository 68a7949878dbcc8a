"""Contamination: which documents of tasks share words in a row with the training data, and the scores without them.

In: tasks, the training split of a run, a number of words n. Out: for each task its documents, how many of them share n
words in a row with the training data, and the scores of both parts. Words are compared as by `prepare.decontaminate`:
without case, punctuation and variant forms. The text of a task's document is its question and its right answer, or what
the task names for this purpose (`doc_to_decontamination_query`); documents of fewer than n words have no n words in a
row and are counted apart.

Guarantees: no miss; a false hit needs equal 64-bit hashes. Costs: one pass over the training data, which is decoded
from its tokens, about 1 MB/s; 9 bytes a run of words of the tasks.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.progress import Progress

from bigmodel.data.objectives.examples import Document, Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.prepare.cleaning import run_hashes
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer


@dataclass(frozen=True)
class Contamination:
    """Of one task: documents with a hit, without, and too short for one; metric -> value of each part."""

    num_documents: int
    hits: list[int]  # doc_id, ascending
    too_short: int
    clean_scores: dict[str, float]
    hit_scores: dict[str, float]

    @property
    def share(self) -> float:
        return len(self.hits) / self.num_documents


def find_contamination(
    tasks: Mapping[str, Any],
    results: Mapping[str, Any],
    store: ShardStore,
    tokenizer: Tokenizer,
    length: int,
    progress: Progress,
) -> dict[str, Contamination]:
    """tasks: lm_eval's, by name. results: theirs, with samples. length: words in a row."""
    samples = {name: {one["doc_id"]: one["doc"] for one in results["samples"][name]} for name in tasks}
    hashes = {
        name: {number: np.unique(run_hashes(_text(tasks[name], doc), length)) for number, doc in docs.items()}
        for name, docs in samples.items()
    }
    wanted = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *(one for of in hashes.values() for one in of.values())])
    )
    seen = _seen(wanted, _texts(store, tokenizer, progress), length)
    return {name: _judge(tasks[name], results["samples"][name], hashes[name], seen) for name in tasks}


def to_lines(found: Mapping[str, Contamination], length: int) -> Iterator[str]:
    """At most 80 columns."""
    yield f"documents that share {length} words in a row with the training data:"
    for name, one in found.items():
        short = f", {one.too_short} too short to tell" if one.too_short else ""
        yield f"{name}: {len(one.hits)} of {one.num_documents} ({one.share:.1%}){short}"
        for metric, value in one.clean_scores.items() if one.hits else ():
            of_hits = one.hit_scores.get(metric, float("nan"))
            yield f"  {metric}: {value:.4f} without them, {of_hits:.4f} on them"


def _text(task: Any, document: dict[str, Any]) -> str:
    """The words of a task's document that training data should not hold."""
    if task.should_decontaminate():
        return str(task.doc_to_decontamination_query(document))
    question, answer = task.doc_to_text(document), task.doc_to_target(document)
    if isinstance(question, int) or isinstance(answer, int):
        choices = task.doc_to_choice(document)
        question = choices[question] if isinstance(question, int) else question
        answer = choices[answer] if isinstance(answer, int) else answer
    return f"{question} {' '.join(map(str, answer)) if isinstance(answer, list) else answer}"


def _texts(store: ShardStore, tokenizer: Tokenizer, progress: Progress) -> Iterator[str]:
    """Every text of the training split; of a pair, both."""
    task = progress.add_task("training documents", total=store.num_documents)
    for source in store.sources:
        for shard in range(store.num_shards(source)):
            for row in range(len(store.lengths(source, shard))):
                document = store.document(source, shard, row)
                for tokens in _sides(document):
                    yield tokenizer.decode(tokens)
                progress.advance(task)


def _sides(document: Document) -> tuple[np.ndarray, ...]:
    if isinstance(document, Pair):
        return document.source, document.target
    return (document.tokens if isinstance(document, Supervised) else document,)


def _seen(wanted: np.ndarray, texts: Iterable[str], length: int) -> np.ndarray:
    """The sorted hashes of `wanted` that a run of words of the texts has."""
    found = np.zeros(len(wanted), bool)
    for text in texts if len(wanted) else ():
        runs = run_hashes(text, length)
        places = np.searchsorted(wanted, runs)
        inside = places < len(wanted)
        found[places[inside][wanted[places[inside]] == runs[inside]]] = True
    return wanted[found]


def _judge(
    task: Any, samples: list[dict[str, Any]], hashes: Mapping[int, np.ndarray], seen: np.ndarray
) -> Contamination:
    hits = sorted(number for number, runs in hashes.items() if np.isin(runs, seen).any())
    are_hits = set(hits)
    parts = [[one for one in samples if (one["doc_id"] in are_hits) is is_hit] for is_hit in (False, True)]
    too_short = sum(not len(runs) for runs in hashes.values())
    return Contamination(len(hashes), hits, too_short, *(_scores(task, part) for part in parts))


def _scores(task: Any, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric over some documents, as lm_eval adds it up; metrics that give no number are left out."""
    values: defaultdict[str, list[Any]] = defaultdict(list)
    for one in samples:
        for metric in one["metrics"]:
            key = metric if one["filter"] == "none" else f"{metric} {one['filter']}"
            values[key].append(one[metric])
    sums = {key: task.aggregation()[key.split(" ")[0]](found) for key, found in values.items()}
    return {key: float(value) for key, value in sums.items() if isinstance(value, int | float)}
