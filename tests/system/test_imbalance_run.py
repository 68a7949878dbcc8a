"""A run with resampled classes, class weights and focal loss, with real ranks: the same step on one and two ranks, a
resumed run goes on with the same documents, and the checks prove that each class is read pass by pass."""

import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from bigmodel.checks.class_order import ClassWalk
from bigmodel.checks.order import check_order
from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.advice.packing_advice import Packed
from bigmodel.data.plan.order import Order
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.show_classes import classes_table
from tests.support.ranks import run_ranks
from tests.system.test_classification_run import (
    CLASSES,
    document,
    of_kind,
    prepare_labelled,
    train,
    write_classification,
)

MIX = "data.class_mix={ even = 1.0, odd = 3.0 }"


def imbalanced(folder: Path, content: str = "tokens") -> Path:
    """200 even documents and 20 odd ones among them."""
    numbers = [number for number in range(400) if number % 2 == 0 or number % 20 == 1]
    return prepare_labelled(folder, [document(number) for number in numbers], content)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imbalanced(tmp_path_factory.mktemp("imbalanced"))


def test_a_weighted_resampled_step_is_the_same_on_one_and_two_ranks_and_after_a_restart(
    labelled: Path, tmp_path: Path
) -> None:
    more = 'weights = { odd = 0.5 }\nfocal_gamma = 2.0\n[training.early_stop]\nmetric = "balanced_accuracy"\n'
    whole, parts = (write_classification(tmp_path, labelled, 2, name, more) for name in ("whole", "parts"))
    run_ranks(1, train, whole, 5, MIX, "model.dropout=0.0")
    run_ranks(2, train, parts, 3, MIX, "model.dropout=0.0", "evaluation.at_end=false")
    run_ranks(1, train, parts, 5, MIX, "model.dropout=0.0", "evaluation.at_end=false")
    names = ("step", "targets", "positions", "documents", "weight")
    one, two = (of_kind(run, "step", *names) for run in (whole, parts))
    assert one == two
    assert len(one) == 5
    for name in ("loss", "unweighted_loss", "gradient_norm"):
        values = [[value for (value,) in of_kind(run, "step", name)] for run in (whole, parts)]
        assert values[0] == pytest.approx(values[1], rel=2e-5), name
    settings = load_settings(whole, [MIX])
    store = ShardStore.of_run(settings.data, "train")
    order = Order.of_run(store, settings)
    for _, targets, _, _, weight in one:
        given = [
            store.decode(store.document("mail", chunk.shard, chunk.row).target)
            for pack in order.next_step()
            for chunk in pack
        ]
        counts = Counter(given)
        assert (targets, weight) == (len(given), counts["even"] + 0.5 * counts["odd"])
    losses = of_kind(whole, "step", "loss", "unweighted_loss")
    assert all(loss < 0.5 * plain for loss, plain in losses)  # (1 - p)^2 with p near 1/2
    (scores,) = of_kind(whole, "evaluation", "scores")[-1]
    assert {"balanced_accuracy", "macro_recall"} < scores.keys()


def test_the_order_check_proves_the_passes_of_each_class_and_sees_a_document_given_too_often(
    labelled: Path, tmp_path: Path
) -> None:
    run_file = write_classification(tmp_path, labelled, 1, "checked")
    findings = check_order(run_file, [MIX, "training.steps=2"])
    assert [one.claim for one in findings if not one.holds] == []
    claims = {one.claim: one.evidence for one in findings}
    assert "each token of each document occurs exactly once in an epoch of its class" in claims
    once = "each document of a class occurs once in every pass of its class, and not again before all of them have"
    assert claims[once].startswith('passes: "odd" ')
    settings = load_settings(run_file, [MIX])
    store = ShardStore.of_run(settings.data, "train")
    order, walk = Order.of_run(store, settings), ClassWalk(store, settings.data)
    packs = order.next_step()
    for _ in range(2):
        walk.add(packs)
    (finding,) = walk.findings(order)
    assert not finding.holds
    counts = store.label_counts("mail")
    documents = {name: 3.0 * count for name, count in {"even": 50.0, "odd": 150.0}.items()}  # of 3 packs
    packed = Packed(9, 1.0, 600.0 / 3, 0.0, 0.0, {"mail": 9.9}, {"mail": sum(documents.values()) / 3})
    console = Console(record=True, width=100)
    console.print(classes_table(load_settings(run_file, [MIX, "training.steps=3"]), store, "mail", packed))
    rows = {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines() if line.split()}
    for name, share in (("even", "25.0%"), ("odd", "75.0%")):
        passes = 4 * documents[name] / counts[name]  # 3 steps of 4 packs
        assert rows[name] == [str(counts[name]), f"{counts[name] / sum(counts.values()):.1%}", share, f"{passes:,.2f}"]


@pytest.mark.parametrize("content", ["tokens", "text"])
def test_labels_are_read_as_prepare_counted_them(content: str, labelled: Path, tmp_path: Path) -> None:
    store = ShardStore(labelled if content == "tokens" else imbalanced(tmp_path, content), "train")
    counts: Counter[str] = Counter()
    for shard in range(store.num_shards("mail")):
        numbers, found = store.labels("mail", shard)
        for row, number in enumerate(numbers.tolist()):
            assert found[number].tolist() == store.document("mail", shard, row).target.tolist()
            counts[store.decode(found[number])] += 1
    assert counts == store.label_counts("mail") == store.manifest.labels["mail"]["train"]


def test_a_class_without_documents_is_refused_before_the_first_step(labelled: Path, tmp_path: Path) -> None:
    run_file = write_classification(tmp_path, labelled, 1, "refused")
    names = json.dumps([*CLASSES, "never"])
    for more, message in (
        ("classification.weights=balanced", r'weights = "balanced": class \'never\' has no training document'),
        ("data.class_mix={ even = 1.0, odd = 1.0, never = 1.0 }", r"data.class_mix.never = 1.0: source 'mail' has no"),
        ("data.class_mix={ even = 1.0 }", r"data.class_mix = {'even': 1.0}: lacks class 'odd', of which source 'mail'"),
    ):
        with pytest.raises(UserError, match=message):
            check_order(run_file, [f"classification.classes={names}", more])
