"""Fine-tuning beside a simple method: `make finetune`, or `python -m tools.finetune`.

Trains configs/finetune-base.toml, fine-tunes configs/finetune-verbs.toml from it, and scores the same held-out
documents with the most frequent class and with scikit-learn's TF-IDF and logistic regression, whose settings
cross-validation on the training documents chooses. `--initial` also trains configs/finetune-initial.toml, the same
model from initial weights. What is finished is not repeated. Out: a table, and comparison.json in the run directory.

Guarantees: all methods learn from the training documents of the shards and are scored on all validation documents. No
run of 13 words of a validation document occurs in a training document, which is counted.
"""

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.prepare.cleaning import run_hashes
from bigmodel.data.prepare.embedded_verbs import RUN_WORDS
from bigmodel.data.store.shards import ShardStore
from bigmodel.run_directory import read_json, write_json

ROOT = Path(__file__).parents[1]
BASE, VERBS, INITIAL = (ROOT / "configs" / f"finetune-{name}.toml" for name in ("base", "verbs", "initial"))
MEASURES = ("accuracy", "macro_f1")
Text = tuple[str, str]  # a document and its class
FOLDS = 3  # of the cross-validation


def main(
    ranks: Annotated[int, typer.Option(min=1, help="ranks of each run")] = 2,
    initial: Annotated[bool, typer.Option("--initial", help="also train from initial weights")] = False,
) -> None:
    """Train, fine-tune, compare."""
    began = time.perf_counter()
    runs = {"fine-tuned from the base": VERBS} | ({"from initial weights": INITIAL} if initial else {})
    for run in (BASE, *runs.values()):
        bigmodel("prepare", str(run))
        bigmodel("launch", "local", str(run), "--ranks", str(ranks))
    settings = load_settings(VERBS)
    print("cross-validation of TF-IDF and logistic regression", flush=True)
    train, held_out = (list(documents(ShardStore.of_run(settings.data, split))) for split in ("train", "validation"))
    ours = {name: read_json(load_settings(run).run.directory / "summary.json") for name, run in runs.items()}
    classical = tf_idf_with_regression(train, held_out)
    seconds, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "training documents": len(train),
        "held-out documents": len(held_out),
        "shared runs of words": shared_runs(train, held_out),
        "scores": {
            "most frequent class": {name: ours["fine-tuned from the base"][f"majority_{name}"] for name in MEASURES},
            "TF-IDF, logistic regression": classical,
            **{run: {name: summary[name] for name in MEASURES} for run, summary in ours.items()},
        },
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime + own.ru_utime + own.ru_stime,
    }
    write_json(settings.run.directory / "comparison.json", found | origin())
    show(found)


def bigmodel(*arguments: str) -> None:
    """A command of ours; its failure ends this program with its exit code."""
    done = subprocess.run([sys.executable, "-m", "bigmodel", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def documents(store: ShardStore) -> Iterator[Text]:
    """Every document of a split with its class."""
    for source in store.sources:
        for shard in range(store.num_shards(source)):
            for row in range(len(store.lengths(source, shard))):
                document = store.document(source, shard, row)
                assert isinstance(document, Pair), f"{source} has no labels"
                yield store.decode(document.source), store.decode(document.target)


def tf_idf_with_regression(train: list[Text], held_out: list[Text]) -> dict[str, Any]:
    """Accuracy and macro F1 of scikit-learn on words and signs that occur twice. Cross-validation on the training
    documents chooses C, and whether pairs of words count."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import Pipeline
    except ModuleNotFoundError:
        raise UserError("scikit-learn is not installed; run `pip install 'bigmodel[finetune]'`") from None
    features = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", min_df=2, sublinear_tf=True)
    regression = LogisticRegression(max_iter=200, tol=1e-3)
    grid = {"features__ngram_range": [(1, 1), (1, 2)], "regression__C": [1, 10, 100]}
    search = GridSearchCV(Pipeline([("features", features), ("regression", regression)]), grid, cv=FOLDS)
    texts, classes = zip(*train, strict=True)
    search.fit(texts, classes)
    texts, expected = zip(*held_out, strict=True)
    predicted = search.predict(texts)
    macro = f1_score(expected, predicted, average="macro", labels=sorted(set(classes)), zero_division=0)
    return {
        "accuracy": float(np.mean(np.array(expected) == predicted)),
        "macro_f1": float(macro),
        "C": search.best_params_["regression__C"],
        "words": search.best_params_["features__ngram_range"][1],
    }


def shared_runs(train: list[Text], held_out: list[Text]) -> int:
    """The number of runs of words that both have."""
    sides = [np.unique(np.concatenate([run_hashes(text, RUN_WORDS) for text, _ in side])) for side in (train, held_out)]
    return len(np.intersect1d(*sides))


def show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    title = (
        f"{found['held-out documents']:,} held-out documents, {found['training documents']:,} for training, "
        f"{found['shared runs of words']} runs of {RUN_WORDS} words in both"
    )
    table = Table("method", title=title, title_justify="left")
    for name in ("accuracy", "macro F1"):
        table.add_column(name, justify="right")
    for method, scores in found["scores"].items():
        table.add_row(method, f"{scores['accuracy']:.3f}", f"{scores['macro_f1']:.3f}")
    console.print(table)
    console.print(f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU seconds")


def origin() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "command": "make finetune",
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "python": json.dumps(platform.python_version()).strip('"'),
    }


if __name__ == "__main__":
    typer.run(main)
