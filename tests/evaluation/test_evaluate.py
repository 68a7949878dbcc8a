"""Evaluation: the same sum and count at any world size, every document once."""

import json
from pathlib import Path

import pytest

from bigmodel.config.settings import load_settings
from bigmodel.data.store.shards import ShardStore
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run


def score_fresh(run_file: Path, folder: Path) -> int:
    """On a rank: score the initial weights on the whole validation split."""
    from bigmodel.config.deepspeed_config import resolve_deepspeed
    from bigmodel.distributed.world import end_world, start_world
    from bigmodel.evaluation.evaluate import Validation
    from bigmodel.evaluation.evaluation_text import to_values
    from bigmodel.evaluation.packed_requests import Continuation, score
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
    result = [evaluation.nats, evaluation.num_labels, evaluation.text_bytes, to_values(evaluation)]
    requests = [Continuation([1, *range(3, 3 + length)], [5], None) for length in range(1, 40)]
    result.append(score(engine.forward, world, requests, settings.data))
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(result))
    end_world()
    return 0


def test_all_sums_and_scores_are_equal_to_the_last_bit_on_1_2_and_3_ranks(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, precision="bf16", stage=3)
    for world_size in (1, 2, 3):
        run_ranks(world_size, score_fresh, run_file, tmp_path)
    found = [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for size in (1, 2, 3) for rank in range(size)]
    assert found == [found[0]] * 6
    store = ShardStore(shards, "validation")
    assert found[0][1] == store.num_labels
    assert found[0][2] == store.text_bytes
    parts = found[0][3]["parts"]
    assert [part["source"] for part in parts] == ["letters", "news"]
    assert sum(part["num_labels"] for part in parts) == store.num_labels
    assert sum(part["text_bytes"] for part in parts) == store.text_bytes
    assert sum(part["nats"] for part in parts) == pytest.approx(found[0][0], rel=1e-12)
