"""The planned exchanges are those that DeepSpeed hands to torch.distributed, counted over gloo."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.planning.communication import collectives
from bigmodel.planning.parameters import parameters_of
from tests.support.engine_worker import PACKS, VOCABULARY, micro_batches_of, new_model, num_targets_of, settings_table
from tests.support.ranks import run_ranks

MODEL = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256}
NOTHING_LIVES = {"stage3_max_live_parameters": 1000, "stage3_prefetch_bucket_size": 0}
CASES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0, "precision": "fp32"},
    "1": {"stage": 1, "precision": "bf16"},
    "2": {"stage": 2, "precision": "bf16"},
    "2 fp32": {"stage": 2, "precision": "fp32"},
    "3": {"stage": 3, "precision": "bf16"},
    "3 persistent": {"stage": 3, "precision": "bf16", "zero": {"stage3_param_persistence_threshold": 5000}},
    "3 reused": {"stage": 3, "precision": "bf16", "zero": NOTHING_LIVES},
    "3 let go": {"stage": 3, "precision": "bf16", "zero": NOTHING_LIVES | {"stage3_max_reuse_distance": 0}},
}
CASES["3 again"] = CASES["3 let go"] | {"kind": "full"}
CASES["3 hpz"] = CASES["3 again"] | {"zero": CASES["3 again"]["zero"] | {"zero_hpz_partition_size": 2}}
CALLS = {"all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def table_of(
    folder: Path, stage: int, precision: str, zero: dict[str, Any] | None = None, kind: str = "none"
) -> dict[str, Any]:
    training = {"activation_checkpointing": kind}
    table = settings_table(folder, stage, precision, 1, zero=dict(zero or {}), training=training)
    return table | {"model": MODEL, "data": table["data"] | {"directory": str(folder / "data")}}


def counted(call: Any, name: str, into: Counter[str], *arguments: Any, **named: Any) -> Any:
    """The bytes of the larger tensor, by name and number of ranks; numbers and norms, of a few elements, are left
    out."""
    size = max(one.nbytes for one in tree_leaves((arguments, named)) if isinstance(one, torch.Tensor))
    ranks = torch.distributed.get_world_size(named.get("group"))
    into[f"{name} {ranks}"] += size if size > 64 else 0
    return call(*arguments, **named)


def measure(tables: list[dict[str, Any]], folder: Path) -> None:
    """On a rank: payload by collective and ranks of the second step of each case."""
    into: Counter[str] = Counter()
    for call, name in CALLS.items():  # before DeepSpeed is imported
        setattr(torch.distributed, call, partial(counted, getattr(torch.distributed, call), name, into))
    from bigmodel.distributed.world import end_world, start_world
    from bigmodel.training.zero.engine import Engine, forget_groups

    world, found = start_world(timeout_seconds=60), []
    for table in tables:
        forget_groups()
        effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
        engine = Engine(new_model(settings, effective), settings, effective, world)
        for step in range(2):
            into.clear()
            batches = micro_batches_of(step, world.rank, world.size, 1)
            for batch in batches:
                engine.micro_batch(batch, num_targets_of(step), batch is batches[-1])
            engine.gradient_norm()
            engine.update(1e-3)
        found.append(dict(into))
    if world.rank == 0:
        (folder / "measured.json").write_text(json.dumps(found))
    end_world()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def exchanged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("communication")
    run_ranks(
        request.param, measure, [table_of(folder, **case) for case in CASES.values()], folder, timeout_seconds=240
    )
    found = json.loads((folder / "measured.json").read_text())
    planned = {}
    for name, case in CASES.items():
        effective, settings = resolve_deepspeed(Settings.model_validate(table_of(folder, **case)), request.param)
        parameters = parameters_of(settings, settings.model.num_rows(VOCABULARY))
        micro_batches = -(-PACKS // request.param)
        planned[name] = collectives(parameters, settings, effective, request.param, micro_batches)
    return request.param, {name: (planned[name], one) for name, one in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_payloads_are_those_of_the_engine(exchanged: tuple[int, dict[str, Any]], case: str) -> None:
    planned, found = exchanged[1][case]
    sizes: Counter[str] = Counter()
    for one in planned:
        sizes[f"{one.name} {one.among or exchanged[0]}"] += one.payload
    print(f"planned {sizes}, found {found}")
    assert {name for name, size in found.items() if size} == set(sizes)
    for name, size in sizes.items():
        assert found[name] == pytest.approx(size, rel=0.01)


def test_a_ring_sends_less_than_the_payload(exchanged: tuple[int, dict[str, Any]]) -> None:
    ranks, cases = exchanged
    (summed,), _ = cases["0"]
    assert summed.sent(ranks) == 2 * summed.payload * (ranks - 1) // ranks
