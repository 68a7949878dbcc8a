"""Guarantee 2: every token of an epoch once, and the same batches at any world size, on real ranks."""

import json
import os
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from bigmodel.checks import order as check
from bigmodel.config.settings import load_settings, num_micro_batches, packs_at
from bigmodel.data.load import stream
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place, deal_evenly
from bigmodel.data.store import shards as shards_module
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.show import show_batch
from bigmodel.training.checkpoint import format as checkpoint
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run

STEPS = 20  # more than an epoch: asserted
RAMP = [(3, 16), (13, 4)]
RAMP_SETTING = f"training.batch_ramp={[list(pair) for pair in RAMP]}"


def train_and_record(run_file: Path, overrides: list[str], folder: Path) -> int:
    """On a rank: train, writing a fingerprint of every batch that entered the model, in order."""
    from bigmodel.model.transformer import Transformer
    from bigmodel.training.loop import train

    seen: list[str | None] = []
    forward = Transformer.forward

    def recorded(self, batch, output="loss_sum"):
        seen.append(batch.fingerprint() if batch.num_tokens else None)
        return forward(self, batch, output)

    Transformer.forward = recorded
    code = train(load_settings(run_file, overrides))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return code


def entered(folder: Path, world_size: int, steps: int) -> list[list[str]]:
    """Per step, the fingerprints of all ranks' packs, sorted, empty ones left out."""
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    counts = [num_micro_batches(packs_at(step, 4, RAMP), world_size, 1) for step in range(steps)]
    assert [len(rank) for rank in ranks] == [sum(counts)] * world_size
    ends = list(accumulate(counts))
    return [
        sorted(print_ for rank in ranks for print_ in rank[end - count : end] if print_)
        for end, count in zip(ends, counts, strict=True)
    ]


def test_what_enters_the_model_is_the_same_on_1_2_3_and_4_real_ranks_over_an_epochs_edge(
    shards: Path, tmp_path: Path
) -> None:
    recorded = {}
    for world_size, ranks_per_node in ((1, 1), (2, 1), (3, 3), (4, 2)):
        run_file = write_run(tmp_path, shards, name=f"ranks-{world_size}")
        folder = tmp_path / f"seen-{world_size}"
        folder.mkdir()
        steps = [f"training.steps={STEPS}", RAMP_SETTING]
        run_ranks(world_size, train_and_record, run_file, steps, folder, ranks_per_node=ranks_per_node)
        recorded[world_size] = entered(folder, world_size, STEPS)
    assert [len(step) for step in recorded[1]] == [4] * 3 + [16] * 10 + [4] * 7
    assert len({print_ for step in recorded[1] for print_ in step}) == 200
    for world_size in (2, 3, 4):
        assert recorded[world_size] == recorded[1], f"{world_size} ranks differ from one"
    states = [newest_state(tmp_path / f"ranks-{world_size}") for world_size in (1, 2, 3, 4)]
    assert states[1:] == [states[0]] * 3  # gathered from nodes that planned one lane each
    assert len(states[0]["cursor"]["lanes"]) == 2
    assert states[0]["progress"]["news"]["epochs_complete"] >= 1


def newest_state(run_directory: Path) -> dict[str, Any]:
    newest = checkpoint.newest(run_directory / "checkpoints")
    assert newest, f"{run_directory} has no checkpoint"
    losses_and_norms = "spikes"  # equal to rounding only
    return {name: value for name, value in newest.state.items() if name != losses_and_norms}


def test_these_steps_cross_an_epoch_with_two_sources_and_unequal_lanes(shards: Path, tmp_path: Path) -> None:
    settings = load_settings(write_run(tmp_path, shards), [RAMP_SETTING])
    store = ShardStore(shards, "train")
    order = Order.of_run(store, settings)
    tokens = Counter()
    for _ in range(STEPS):
        packs = order.next_step()
        for place, pack in enumerate(packs):
            for chunk in pack:
                tokens[2 * place // len(packs), store.sources[chunk.source], chunk.epoch] += chunk.length
    assert all(source.epochs_complete >= 1 for source in order.progress().values())
    assert tokens[0, "news", 0] != tokens[1, "news", 0] > 0
    assert tokens[0, "letters", 0] != tokens[1, "letters", 0] > 0


def test_a_node_opens_the_files_of_its_own_lanes_only(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """Counted where a file is compared with the manifest, as every file is before its first use."""
    settings = load_settings(write_run(tmp_path, shards))
    opened: list[set[str]] = []

    def counted(directory: Path, name: str, recorded: dict[str, Any] | None) -> str:
        opened[-1].add(name)
        return ""

    monkeypatch.setattr(shards_module, "find_damage", counted)
    for node in (0, 1):
        opened.append(set())
        store, place = ShardStore(shards, "train"), Place(node, 2)
        order = Order.of_run(store, settings, lanes=place.lanes(2))
        assert opened[-1] == set()
        for _ in range(STEPS):
            for pack in stream.take_share(order, 2, place, 1).packs:
                for chunk in pack:
                    stream.reader(store)(chunk)
    indexes = {name for name in opened[0] if name.endswith("index.json")}
    assert opened[0] & opened[1] == indexes
    assert len(indexes) == 2
    everything = {name for name in ShardStore(shards, "train").manifest.files if name.startswith("train/")}
    assert opened[0] | opened[1] == everything


def test_check_order_holds_on_prepared_data(shards: Path, tmp_path: Path) -> None:
    findings = check.check_order(write_run(tmp_path, shards), ["training.steps=30"])
    assert [finding.claim for finding in findings if not finding.holds] == []
    assert any("exactly once" in finding.claim for finding in findings)


def test_the_check_sees_a_share_that_is_off_by_one(shards: Path, tmp_path: Path, monkeypatch) -> None:
    """The last rank of a node computes the pack before its own."""

    def shifted(work: list[int], *shape: int) -> list[list[list[int]]]:
        slots = deal_evenly(work, *shape)
        slots[-1][0] = [max(0, pack - 1) for pack in slots[-1][0]]
        return slots

    monkeypatch.setattr(stream, "deal_evenly", shifted)
    assert broken_claims(write_run(tmp_path, shards))


def test_the_check_sees_random_words_that_depend_on_the_call(shards: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = stream.make_dropout_seeds, iter(range(10**9))
    monkeypatch.setattr(stream, "make_dropout_seeds", lambda seed, *rest: real(seed + next(calls), *rest))
    assert broken_claims(write_run(tmp_path, shards))


def broken_claims(run_file: Path) -> list[str]:
    return [finding.claim for finding in check.check_order(run_file, ["training.steps=3"]) if not finding.holds]


def test_show_and_check_follow_a_batch_size_that_only_the_deepspeed_json_gives(
    shards: Path, tmp_path: Path, capsys
) -> None:
    run_file = write_run(tmp_path, shards)
    run_file.write_text(run_file.read_text().replace("global_batch_size = 4\n", ""))
    given = {"train_batch_size": 6, "gradient_accumulation_steps": 3}  # of two ranks: show and check have one
    (tmp_path / "run-deepspeed.json").write_text(json.dumps(given))
    findings = check.check_order(run_file, ["training.steps=2", "schedule.warmup_steps=0"])
    assert all(finding.holds for finding in findings)
    assert findings[0].evidence == "12 packed sequences"
    settings = load_settings(run_file)
    show_batch(settings, 1, tmp_path / "batch.png")
    shown = capsys.readouterr().out
    order = Order(ShardStore(shards, "train"), settings.data, 6, settings.run.seed)
    pack = [order.next_step(), order.next_step()][1][0]
    assert f"{len(pack)} documents, {sum(chunk.length for chunk in pack)} positions" in shown
