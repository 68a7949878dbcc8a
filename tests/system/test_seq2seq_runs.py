"""Encoder-decoder runs on real ranks: leak, loss and resume with pairs, span corruption and dropout on."""

import json
import random
import time
from pathlib import Path

import pytest

from bigmodel.checks.leak import check_leak
from bigmodel.checks.order import check_order
from bigmodel.config.settings import Settings
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from tests.support.ranks import kill, run_ranks, start_ranks
from tests.support.tiny_corpus import text
from tests.support.tiny_run import write_run as write_tiny_run
from tests.system.test_guarantee_resume import final_state, learned, started_at, steps, train

RUN = """
[run]
directory = "{directory}"
seed = 3

[data]
directory = "{shards}"
max_document_length = 24
sequence_length = 64
source_sequence_length = 128
max_source_length = 48
max_documents = 8
lanes = 2
packing_buffer = 20
objectives = [{{ kind = "span_corruption" }}, {{ kind = "prefix" }}]

[model]
kind = "encoder_decoder"
num_layers = 2
encoder_num_layers = 1
hidden_size = 32
num_heads = 4
num_kv_heads = 2
intermediate_size = 48
dropout = 0.1
{model}

[optimizer]
learning_rate = 0.01

[schedule]
warmup_steps = 2

[training]
steps = 10
global_batch_size = 4
precision = "{precision}"
deepspeed = "{deepspeed}"

[evaluation]
at_end = {at_end}

[checkpoint]
every_steps = 4
"""


@pytest.fixture(scope="module")
def pair_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 120 pairs and one of 60 texts."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"question": text(number), "answer": " ".join(text(number).split()[:5])} for number in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "news.jsonl").write_text("".join(json.dumps({"text": text(number)}) + "\n" for number in range(200, 260)))
    pairs = {"name": "pairs", "files": [str(folder / "pairs.jsonl")], "column": "question", "target_column": "answer"}
    news = {"name": "news", "files": [str(folder / "news.jsonl")]}
    section = {"vocabulary": 300, "validation_share": 0.2, "shard_tokens": 1500, "workers": 1, "sources": [pairs, news]}
    return prepare(Settings.model_validate({"prepare": section, "data": {"directory": folder / "data"}}), quiet())


def write_run(folder: Path, shards: Path, name: str, stage: int = 1, precision: str = "fp32", **more: str) -> Path:
    deepspeed = folder / f"{name}-deepspeed.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    deepspeed.write_text(json.dumps({"zero_optimization": zero}))
    values = {"directory": folder / name, "shards": shards, "precision": precision, "deepspeed": deepspeed.name}
    (folder / f"{name}.toml").write_text(RUN.format(**values, **({"model": "", "at_end": "false"} | more)))
    return folder / f"{name}.toml"


@pytest.mark.parametrize("model", ["", 'source_attention = "mixed"', 'position_embedding = "relative_bias"'])
def test_check_leak_and_order_hold_on_pairs(pair_shards: Path, tmp_path: Path, model: str) -> None:
    run_file = write_run(tmp_path, pair_shards, "run", model=model)
    findings = [*check_leak(run_file, []), *(check_order(run_file, []) if not model else [])]
    assert [finding.claim for finding in findings if not finding.holds] == []
    assert len(findings) >= 5


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.objectives=[{kind='prefix'}, {kind='fill_in_the_middle'}, {kind='causal'}]", "model.num_mtp_modules=1"],
        ["data.objectives=[{kind='masked'}]", "model.kind=encoder"],
    ],
    ids=["decoder", "encoder"],
)
def test_check_leak_and_order_hold_under_other_objectives(shards: Path, tmp_path: Path, overrides: list[str]) -> None:
    run_file = write_tiny_run(tmp_path, shards)
    findings = [*check_leak(run_file, overrides), *check_order(run_file, overrides)]
    assert [finding.claim for finding in findings if not finding.holds] == []


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "bf16")])
def test_a_killed_run_retraces_the_uninterrupted_one_also_on_another_number_of_ranks(
    pair_shards: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    whole, broken = (write_run(tmp_path, pair_shards, name, stage, precision) for name in ("whole", "broken"))
    run_ranks(2, train, whole)
    ranks = start_ranks(2, train, broken)
    last = random.randint(5, 8)
    while not (done := steps(broken)) or done[-1]["step"] < last:
        assert all(rank.is_alive() for rank in ranks), "the run ended before it could be killed"
        time.sleep(0.001)
    time.sleep(random.uniform(0, done[-1]["step_seconds"]))
    kill(ranks)
    published = max([0, *checkpoint.steps(broken.with_suffix("") / "checkpoints")])  # saves are asynchronous
    run_ranks(2, train, broken)
    assert started_at(broken) == [0, published]
    assert learned(broken) == learned(whole)
    assert [step["parts"] for step in steps(broken)] == [step["parts"] for step in steps(whole)]
    assert final_state(broken) == final_state(whole) != {}

    alone = write_run(tmp_path, pair_shards, "alone", stage, precision, at_end="true")
    run_ranks(1, train, alone)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for one, other in zip(steps(whole), steps(alone), strict=True):
        assert [one[name] for name in ("targets", "positions", "documents")] == [
            other[name] for name in ("targets", "positions", "documents")
        ]
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance)

    # What is said of the parts of the loss, and at the end.
    assert {(part["objective"], part["source"]) for step in steps(alone) for part in step["parts"]} == {
        ("pairs", "pairs"),
        ("span_corruption", "news"),
        ("prefix", "news"),
    }
    for step in steps(alone):
        assert sum(part["targets"] for part in step["parts"]) == step["targets"]
        nats = sum(part["nats"] for part in step["parts"])
        assert nats / step["targets"] == pytest.approx(step["loss"], rel=1e-6)
    summary = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert summary["nats_per_token_with_wrong_sources"] != summary["nats_per_token"]
    assert (tmp_path / "alone" / "sample.txt").read_text().count("[model]") == 3
    evaluations = [
        line for line in read_json_lines(tmp_path / "alone" / "metrics.jsonl") if line["kind"] == "evaluation"
    ]
    assert len(evaluations) == 1
