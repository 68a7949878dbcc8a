"""Weight and update norms by kind of layer are those of the weights that checkpoints hold, on every ZeRO stage."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from bigmodel.run_directory import read_json_lines
from bigmodel.training.zero.norms import KINDS, kind_of
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.weight", "embedding"),
        ("encoder.embedding.weight", "embedding"),
        ("blocks.0.attention.output.weight", "attention"),
        ("blocks.3.cross_attention.key_value.weight", "attention"),
        ("blocks.0.attention.query_norm.weight", "norm"),
        ("blocks.0.feed_forward_norm.weight", "norm"),
        ("blocks.0.feed_forward.gate_up.weight", "feed_forward"),
        ("norm.weight", "norm"),
        ("head.weight", "head"),
        ("relative_bias.weight", "other"),
    ],
)
def test_a_parameter_belongs_to_the_kind_that_its_name_says(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert kind in (*KINDS, "other")


def squares(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    for name, tensor in tensors.items():
        found[kind_of(name)] += float(tensor.double().square().sum())
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_norms_are_those_of_the_checkpoints(tmp_path: Path, shards: Path, stage: int) -> None:
    from bigmodel.training.checkpoint import format as checkpoint

    run_file = write_run(tmp_path, shards, stage=stage)
    overrides = ["training.steps=4", "checkpoint.every_steps=1", "checkpoint.keep=4", "metrics.norms_every_steps=2"]
    overrides += ["schedule.warmup_steps=2", "optimizer.learning_rate=0.001", "optimizer.l1_penalty=10"]
    arguments = [word for override in overrides for word in ("--set", override)]
    run_ranks(2, command, ["train", str(run_file), *arguments], tmp_path / "printed")
    weights = {
        step: checkpoint.read_weights(
            checkpoint.open_checkpoint(checkpoint.path_of(tmp_path / "run" / "checkpoints", step))
        )
        for step in (1, 2, 3, 4)
    }
    steps = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["norms"] is not None for line in steps] == [False, True, False, True]
    for step in (2, 4):
        norms = steps[step - 1]["norms"]
        assert set(norms) == {"embedding", "attention", "feed_forward", "norm", "head"}
        moved = {name: weights[step][name] - weights[step - 1][name] for name in weights[step]}
        for kind, value in squares(weights[step]).items():
            assert norms[kind]["weight_norm"] == pytest.approx(math.sqrt(value), rel=1e-6)
        for kind in norms:
            of_kind = torch.cat([tensor.flatten() for name, tensor in weights[step].items() if kind_of(name) == kind])
            assert norms[kind]["l1_norm"] == pytest.approx(float(of_kind.double().abs().sum()), rel=1e-6)
            assert norms[kind]["zero_ratio"] == pytest.approx(float((of_kind == 0).double().mean()), rel=1e-9)
            assert (norms[kind]["zero_ratio"] > 0.05) == (kind in ("attention", "feed_forward", "head"))
        for kind, value in squares(moved).items():
            assert norms[kind]["update_norm"] == pytest.approx(math.sqrt(value), rel=1e-5)
            assert value > 0
