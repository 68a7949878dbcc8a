"""A run of a classification, with real ranks: scores are equal on any number of them, a run that is resumed on another
number of ranks with another ZeRO stage goes on with the same documents, wrong labels are said before the first step."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bigmodel.__main__ import app
from bigmodel.config.classification_settings import NO_TEXT
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.segments import order_of_segment, resume_order
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.shards import ShardStore
from bigmodel.evaluation.classify import check_labels
from bigmodel.run_directory import read_json, read_json_lines
from tests.support.ranks import run_ranks
from tests.support.tiny_corpus import WORDS
from tests.support.tiny_run import write_run

CLASSES = ("even", "odd")


def document(number: int) -> dict[str, str]:
    """An even document begins with one word, an odd one with another; both are easy to tell."""
    label = CLASSES[number % 2]
    words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(3 + number % 40)]
    return {"text": f"{'time' if label == 'even' else 'state'} {number} " + " ".join(words), "label": label}


def prepare_labelled(folder: Path, documents: list[dict[str, str]], content: str = "tokens") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    source = {"name": "mail", "files": [str(folder / "a.jsonl")], "label_column": "label"}
    section = {"sources": [source], "vocabulary": 290, "workers": 1, "validation_share": 0.2, "shard_tokens": 1000}
    table = {"prepare": section | {"content": content}, "data": {"directory": str(folder / "data")}}
    return prepare(Settings.model_validate(table), quiet())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_labelled(tmp_path_factory.mktemp("labelled"), [document(number) for number in range(240)])


def train(run_file: Path, steps: int, *more: str) -> int:
    """On a rank."""
    from bigmodel.training import loop

    return loop.train(load_settings(run_file, [f"training.steps={steps}", "schedule.kind=constant", *more]))


def write_classification(folder: Path, shards: Path, stage: int, name: str, more: str = "") -> Path:
    run_file = write_run(folder, shards, stage=stage, name=name)
    classes = f"\n[classification]\nclasses = {list(CLASSES)}\n{more}"
    run_file.write_text(run_file.read_text().replace("at_end = false", "every_steps = 4") + classes)
    return run_file


def of_kind(run_file: Path, kind: str, *names: str) -> list[list[Any]]:
    lines = read_json_lines(run_file.with_suffix("") / "metrics.jsonl")
    return [[line[name] for name in names] for line in lines if line["kind"] == kind]


def test_a_run_resumed_on_other_ranks_and_stages_reads_the_same_documents_and_scores_alike(
    labelled: Path, tmp_path: Path
) -> None:
    whole, parts = (write_classification(tmp_path, labelled, stage, f"stage{stage}") for stage in (1, 3))
    run_ranks(1, train, whole, 10, "checkpoint.keep_best=macro_f1")
    run_ranks(2, train, parts, 4, "evaluation.at_end=false")
    run_ranks(1, train, parts, 10)
    plans = [of_kind(run, "step", "step", "targets", "positions", "documents") for run in (whole, parts)]
    assert plans[0] == plans[1]
    assert all(targets == documents for _, targets, _, documents in plans[0])
    losses = [[loss for (loss,) in of_kind(run, "step", "loss")] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    scores = of_kind(whole, "evaluation", "scores")
    assert len(scores) == 3
    summary = read_json(whole.with_suffix("") / "summary.json")
    assert summary["accuracy"] == scores[-1][0]["accuracy"]
    assert summary["validation_documents"] == ShardStore(labelled, "validation").num_documents
    assert sum(map(sum, summary["confusion"])) == summary["validation_documents"]
    assert summary["majority_accuracy"] == pytest.approx(0.5, abs=0.2)
    assert (whole.with_suffix("") / "confusion.png").exists()

    evaluated = CliRunner().invoke(app, ["evaluate", str(whole.with_suffix("")), "--png", str(tmp_path / "c.png")])
    assert f"accuracy {summary['accuracy']:.3f}, macro F1 {summary['macro_f1']:.3f} over" in evaluated.output
    assert (tmp_path / "c.png").exists()
    best = max(scores[:2], key=lambda one: float(one[0]["macro_f1"]))
    evaluated = CliRunner().invoke(app, ["evaluate", str(whole.with_suffix("")), "--best"])
    assert evaluated.output.startswith(f"step {4 * scores.index(best) + 4}: ")
    assert f"macro F1 {best[0]['macro_f1']:.3f} over" in evaluated.output
    for command in (["generate"], ["evaluate", "--tasks", "arc_easy"]):
        refused = CliRunner().invoke(app, [command[0], str(whole.with_suffix("")), *command[1:]])
        assert NO_TEXT in str(refused.exception)


def score(run_file: Path, folder: Path) -> int:
    """On a rank: score the initial weights."""
    import os

    from bigmodel.config.deepspeed_config import resolve_deepspeed
    from bigmodel.distributed.world import end_world, start_world
    from bigmodel.evaluation.classify import make_validation
    from bigmodel.model.init import init_weights
    from bigmodel.model.transformer import Transformer
    from bigmodel.training.zero.engine import Engine

    world = start_world()
    effective, settings = resolve_deepspeed(load_settings(run_file), world.size)
    model = Transformer(settings.model, 290)
    init_weights(model, 1)
    found = make_validation(settings.data, 1).run(Engine(model, settings, effective, world).forward, world)
    assert found.scores
    (folder / f"{world.size}-{os.environ['RANK']}.json").write_text(
        json.dumps([found.nats, found.num_labels, found.scores.counts.tolist()])
    )
    end_world()
    return 0


def test_loss_and_counts_of_an_evaluation_are_equal_to_the_last_bit_on_1_and_3_ranks(
    labelled: Path, tmp_path: Path
) -> None:
    run_file = write_classification(tmp_path, labelled, 3, "scored", 'pooling = "mean"')
    for world_size in (1, 3):
        run_ranks(world_size, score, run_file, tmp_path)
    found = [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for size in (1, 3) for rank in range(size)]
    assert found == [found[0]] * 4
    assert found[0][1] == ShardStore(labelled, "validation").num_documents


def test_labels_that_do_not_fit_the_classes_are_named_before_the_first_step(labelled: Path, tmp_path: Path) -> None:
    store = ShardStore(labelled, "validation")
    check_labels(store, CLASSES)
    check_labels(store, (*CLASSES, "never seen"))
    with pytest.raises(UserError, match=r'lacks labels of data.directory = .* \(train and validation\): "odd"; add'):
        check_labels(store, ("even", "strange"))
    one = prepare_labelled(tmp_path / "one", [document(2 * number) for number in range(60)])
    with pytest.raises(UserError, match=r"all training documents have the class 'even'; one class alone needs no"):
        check_labels(ShardStore(one, "validation"), CLASSES)


def test_data_without_labels_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"letters, news of data.directory = .* have no labels; prepare with label_col"):
        check_labels(ShardStore(shards, "validation"), CLASSES)


def test_the_order_belongs_to_the_classes_and_is_found_again(labelled: Path) -> None:
    data = {"max_document_length": 24, "sequence_length": 48, "directory": str(labelled)}
    table = {"classification": {"classes": list(CLASSES)}, "data": data, "training": {"global_batch_size": 2}}
    settings = Settings.model_validate(table)
    store = ShardStore(labelled, "train")
    order, segments = resume_order(store, settings, None)
    steps = [order.next_step() for _ in range(3)]
    again, replayed = order_of_segment(store, settings.data, segments, 0)
    assert [replayed.next_step() for _ in range(3)] == steps
    assert again.classes == CLASSES
    other = Settings.model_validate(table | {"classification": {"classes": ["odd", "even"]}})
    with pytest.raises(UserError, match=r"classification.classes: \['even', 'odd'\] when saved, \['odd', 'even'\] now"):
        Order.of_run(store, other).restore(order.state())
