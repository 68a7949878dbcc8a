"""Promise 2: every token of an epoch once, and the same batches at any world size, on real ranks."""

import json
import os
from collections import Counter
from pathlib import Path

from bigmodel import check
from bigmodel.config import load_settings
from bigmodel.data.order import Order
from bigmodel.data.shards import ShardStore
from bigmodel.data.sharing import Place
from tests.ranks import run_ranks
from tests.tiny_run import write_run

STEPS = 44  # more than an epoch: asserted


def train_and_record(run_file: Path, overrides: list[str], folder: Path) -> int:
    """On a rank: train, writing a fingerprint of every batch that entered the model, in order."""
    from bigmodel.model.transformer import Transformer
    from bigmodel.training.loop import train

    seen: list[str | None] = []
    forward = Transformer.forward

    def recorded(self, batch, output="loss_sum"):
        seen.append(batch.fingerprint() if batch.num_positions else None)
        return forward(self, batch, output)

    Transformer.forward = recorded
    code = train(load_settings(run_file, overrides))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return code


def entered(folder: Path, world_size: int, steps: int) -> list[list[str]]:
    """Per step, the fingerprints of all ranks' packs, sorted, empty ones left out."""
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    each = len(ranks[0]) // steps
    return [
        sorted(print_ for rank in ranks for print_ in rank[step * each : (step + 1) * each] if print_)
        for step in range(steps)
    ]


def test_what_enters_the_model_is_the_same_on_1_2_3_and_4_real_ranks_over_an_epochs_edge(
    shards: Path, tmp_path: Path
) -> None:
    recorded = {}
    for world_size in (1, 2, 3, 4):
        run_file = write_run(tmp_path, shards, name=f"ranks-{world_size}")
        folder = tmp_path / f"seen-{world_size}"
        folder.mkdir()
        run_ranks(world_size, train_and_record, run_file, [f"training.steps={STEPS}"], folder)
        recorded[world_size] = entered(folder, world_size, STEPS)
    assert [len(step) for step in recorded[1]] == [4] * STEPS
    assert len({print_ for step in recorded[1] for print_ in step}) == 4 * STEPS
    for world_size in (2, 3, 4):
        assert recorded[world_size] == recorded[1], f"{world_size} ranks differ from one"


def test_these_steps_cross_an_epoch_with_two_sources_and_unequal_lanes(shards: Path, tmp_path: Path) -> None:
    settings = load_settings(write_run(tmp_path, shards))
    store = ShardStore(shards, "train")
    order = Order.of_run(store, settings)
    tokens = Counter()
    for _ in range(STEPS):
        for place, pack in enumerate(order.next_step()):
            for piece in pack:
                tokens[place // 2, store.sources[piece.source], piece.epoch] += piece.length
    assert all(source.epochs_complete >= 1 for source in order.progress().values())
    assert tokens[0, "news", 0] != tokens[1, "news", 0] > 0
    assert tokens[0, "letters", 0] != tokens[1, "letters", 0] > 0


def test_check_order_holds_on_prepared_data(shards: Path, tmp_path: Path) -> None:
    findings = check.check_order(write_run(tmp_path, shards), ["training.steps=30"])
    assert [finding.claim for finding in findings if not finding.holds] == []
    assert any("exactly once" in finding.claim for finding in findings)


def test_the_check_sees_a_share_that_is_off_by_one(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """Node 1 takes what node 0 took last, and never its own last pack."""
    real = Place.share
    monkeypatch.setattr(
        Place,
        "share",
        lambda place, packs: range(real(place, packs).start - place.node, real(place, packs).stop - place.node),
    )
    assert broken_claims(write_run(tmp_path, shards))


def test_the_check_sees_random_words_that_depend_on_the_call(shards: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = check.make_keys, iter(range(10**9))
    monkeypatch.setattr(check, "make_keys", lambda seed, *rest: real(seed + next(calls), *rest))
    assert broken_claims(write_run(tmp_path, shards))


def broken_claims(run_file: Path) -> list[str]:
    return [finding.claim for finding in check.check_order(run_file, ["training.steps=3"]) if not finding.holds]
