"""The contenders of the benchmark of a step: the same model, packs and rule, in real processes."""

import json
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import ModelSettings
from bigmodel.model.recurrent.model import build_model
from tools.bench_step import OURS, row_of
from tools.bench_step import main as bench_step
from tools.step_contenders import CASES, Plain, batches, joined, plain_inputs


def test_bigmodel_and_the_dense_mask_have_the_same_loss() -> None:
    case = CASES["quick"]
    ours, plain = build_model(ModelSettings(**case.model), case.vocabulary), Plain(case)
    names = {"embedding": "embedding", "norm": "norm", "blocks.0.norms.0": "blocks.0.attention_norm"}
    names |= {"blocks.0.norms.1": "blocks.0.feed_forward_norm", "blocks.0.output": "blocks.0.attention.output"}
    names |= {"blocks.0.query_key_value": "blocks.0.attention.query_key_value"}
    names |= {f"blocks.0.{name}": f"blocks.0.feed_forward.{name}" for name in ("gate_up", "down")}
    theirs = plain.state_dict()
    ours.load_state_dict({f"{name}.weight": theirs[f"{of}.weight"] for of, name in names.items()}, strict=False)
    packs = batches(case)[0]
    num_labels = sum(pack.num_labels for pack in packs)
    torch.testing.assert_close(ours(joined(packs)) / num_labels, plain(*plain_inputs(case, packs, masked=True)))


def test_a_row_is_the_median_of_ratios_of_the_same_round() -> None:
    ours = [{"cpu": cpu, "outside": 0.1} for cpu in (1.0, 2.0, 4.0)]
    row = row_of([{"cpu": 2.0}, {"cpu": 2.0}, {"cpu": 2.0}], ours, tokens=[100])
    assert (row["ours_is_faster"], row["smallest"], row["largest"]) == (1.0, 0.5, 2.0)
    assert row["tokens_per_cpu_second"] == 50
    assert row_of(ours, ours, [100])["outside_percent"] == 5.0


@pytest.mark.long
def test_it_runs_and_writes_a_row_for_each_contender(tmp_path: Path) -> None:
    bench_step(case=["quick"], contender=["two ranks"], rounds=1, out=tmp_path)
    rows = json.loads((tmp_path / "bench_step.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [OURS, "two ranks"]
    assert all(row["tokens_per_cpu_second"] > 0 for row in rows)
