"""Evaluation: the same sum and count at any world size, every document once, training untouched."""

import json
import os
from pathlib import Path

from bigmodel.config.settings import load_settings
from bigmodel.data.store.shards import ShardStore
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run


def evaluate_in_between(run_file: Path, folder: Path, every_steps: int) -> int:
    """On a rank: train, evaluating on the way; write what each evaluation found."""
    from bigmodel.evaluation.evaluate import Validation
    from bigmodel.training import loop

    found = []
    run = Validation.run

    def recorded(self, forward, world, packs=0):
        evaluation = run(self, forward, world, packs)
        found.append([evaluation.nats, evaluation.num_labels, evaluation.text_bytes])
        return evaluation

    Validation.run = recorded
    overrides = [f"evaluation.every_steps={every_steps}", "training.steps=6"]
    code = loop.train(load_settings(run_file, overrides))
    (folder / f"{run_file.stem}-{os.environ['RANK']}.json").write_text(json.dumps(found))
    return code


def score_fresh(run_file: Path, folder: Path) -> int:
    """On a rank: score the initial weights on the whole validation split."""
    from bigmodel.config.deepspeed_config import resolve_deepspeed
    from bigmodel.distributed.world import end_world, start_world
    from bigmodel.evaluation.evaluate import Validation
    from bigmodel.model.init import init_weights
    from bigmodel.model.transformer import Transformer
    from bigmodel.training.zero.engine import Engine

    world = start_world()
    effective, settings = resolve_deepspeed(load_settings(run_file), world.size)
    model = Transformer(settings.model, 300)
    init_weights(model, 1)
    engine = Engine(model, settings, effective, world)
    evaluation = Validation(settings.data, 1).run(engine.forward, world)
    assert engine.training
    result = [evaluation.nats, evaluation.num_labels, evaluation.text_bytes]
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(result))
    end_world()
    return 0


def test_sum_and_count_are_equal_to_the_last_bit_on_1_2_and_3_ranks(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, precision="bf16", stage=3)
    for world_size in (1, 2, 3):
        run_ranks(world_size, score_fresh, run_file, tmp_path)
    found = [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for size in (1, 2, 3) for rank in range(size)]
    assert found == [found[0]] * 6
    store = ShardStore(shards, "validation")
    assert found[0][1] == store.num_labels
    assert found[0][2] == store.text_bytes


def test_training_does_not_notice_an_evaluation(shards: Path, tmp_path: Path) -> None:
    from tests.system.test_guarantee_resume import learned

    with_, without = (write_run(tmp_path, shards, stage=3, name=name) for name in ("with", "without"))
    run_ranks(2, evaluate_in_between, with_, tmp_path, 2)
    run_ranks(2, evaluate_in_between, without, tmp_path, 0)
    assert len(json.loads((tmp_path / "with-0.json").read_text())) == 2
    assert learned(with_) == learned(without)
