"""Documents stay apart on ranks that share packed sequences or matrices, wherever documents and ranks begin."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bigmodel.checks.leak import documents
from bigmodel.checks.leak_rank import isolation_on_ranks
from bigmodel.checks.plain_torch import distance
from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import DataSettings, Settings
from bigmodel.data.load.alone import alone
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.kernels.mask import AttentionMask, causal, last_first
from bigmodel.training.zero.context_parallel import GatheredSequence
from bigmodel.training.zero.engine import Engine, forget_groups
from tests.support.engine_worker import VOCABULARY, new_model, settings_table
from tests.support.ranks import run_ranks

RANKS, POSITIONS = 4, 24  # with 4 ranks that share, each computes 6 positions of a packed sequence
WINDOW = {"sliding_window": 5, "full_attention_every": 2}
SHARED: dict[str, dict[str, Any]] = {
    "all_gather, 4": {"sequence_parallel_ranks": 4, "sequence_parallel_method": "all_gather"},
    "ulysses, 4": {"sequence_parallel_ranks": 4},
    "tensors, 2": {"tensor_parallel_ranks": 2},
}
# Lengths of the documents of each packed sequence; the rest is padding.
LAYOUTS: dict[str, list[list[int]]] = {
    "documents end where ranks do": [[6, 6, 6, 6]],
    "documents end beside where ranks do": [[5, 7, 7, 5]],
    "a document longer than a rank's part": [[1, 20, 3]],
    "a document over all ranks": [[24]],
    "ranks with padding only": [[3, 2]],
    "documents of one token": [[1] * 24],
    "two packed sequences, one token and padding": [[1, 1, 9], [24]],
}
# Here ranks have parts of several documents.
EDITED = ("documents end beside where ranks do", "a document longer than a rank's part", "documents of one token")


def batch_of(packs: list[list[int]]) -> Batch:
    rows = iter(range(24))
    plan = [tuple(Chunk(0, 0, next(rows), 0, length, 0) for length in pack) for pack in packs]
    tokens = torch.randint(3, VOCABULARY, (24, POSITIONS + 1), generator=torch.Generator().manual_seed(1)).numpy()
    data = DataSettings(max_document_length=POSITIONS, sequence_length=POSITIONS, max_documents=24)
    seeds = make_dropout_seeds(1, 0, list(range(len(packs))), POSITIONS)
    return build_batch(plan, lambda chunk: tokens[chunk.row, : chunk.length + 1], data, seeds)


def one_at_a_time(settings: Settings, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the documents in plain torch, in float64."""
    model = new_model(settings).double().train()
    loss = torch.stack([model(alone(batch, place)).sum() for place in documents(batch)]).sum()
    loss.backward()
    return loss.item(), {name: parameter.grad / batch.num_labels for name, parameter in model.named_parameters()}


def on_ranks(engine: Engine, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = engine.world.sum_([float(engine.micro_batch(batch, batch.num_labels, last=True))])[0]
    engine.gradient_norm()
    gradients = {name: engine.gradient(name).clone() for name in engine.trained()}
    engine.update(0.0, skip=True)
    return loss, gradients


@contextmanager
def without_documents() -> Iterator[None]:
    """Every attention mask is that of one document from the first position to the last."""

    def all_of(mask: AttentionMask, queries: range, first_key: int) -> AttentionMask:
        return last_first(replace(mask, cu_seqlens_q=mask.cu_seqlens_q[[0, -1]]), queries, first_key)

    masks = mock.patch("bigmodel.model.attention_masks.causal", lambda edges, left: causal(edges[[0, -1]], left))
    gathered = mock.patch("bigmodel.training.zero.context_parallel.last_first", all_of)
    keys = mock.patch.object(GatheredSequence, "_first_key", return_value=0)
    with masks, gathered, keys:
        yield


def compare(folder: Path) -> None:
    """On each rank. Writes, by method and layout: the differences from plain torch, the findings, and those with masks
    that know no documents."""
    world = start_world(timeout_seconds=60)
    results = {method: compare_layouts(folder, world, training) for method, training in SHARED.items()}
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    end_world()


def compare_layouts(folder: Path, world: World, training: dict[str, Any]) -> dict[str, Any]:
    forget_groups()
    own = folder / f"rank-{world.rank}"
    own.mkdir(exist_ok=True)
    table = settings_table(own, 1, "fp32", 1, norms=WINDOW, training=training, vocabulary_multiple=2)
    effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
    engine = Engine(new_model(settings, effective), settings, effective, world)
    found: dict[str, Any] = {}
    for layout, packs in LAYOUTS.items():
        batch = batch_of(packs)
        loss, gradients = on_ranks(engine, batch)
        wanted_loss, wanted = one_at_a_time(settings, batch)
        copies = world.size // settings.training.ranks_per_sequence  # each group of ranks computes the batch
        found[layout] = {
            "loss": abs(loss / (copies * wanted_loss) - 1),
            "gradient": distance({name: one / copies for name, one in gradients.items()}, wanted),
        }
        if layout in EDITED:
            found[layout]["findings"] = isolation_on_ranks(engine, settings, batch)
    with without_documents():
        found[EDITED[0]]["broken"] = isolation_on_ranks(engine, settings, batch_of(LAYOUTS[EDITED[0]]))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("isolation")
    run_ranks(RANKS, compare, folder, timeout_seconds=300)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("method", SHARED)
def test_a_packed_sequence_on_ranks_is_its_documents_one_at_a_time(results: dict[str, Any], method: str) -> None:
    assert set(results[method]) == set(LAYOUTS)
    assert {layout: one for layout, one in results[method].items() if one["loss"] > 1e-6} == {}
    assert {layout: one for layout, one in results[method].items() if one["gradient"] > 1e-5} == {}


@pytest.mark.parametrize("method", SHARED)
def test_editing_a_document_changes_no_bit_of_others(results: dict[str, Any], method: str) -> None:
    findings = [finding for layout in EDITED for finding in results[method][layout]["findings"]]
    assert len(findings) == 2 * len(EDITED)
    assert [(claim, evidence) for claim, holds, evidence in findings if not holds] == []


@pytest.mark.parametrize("method", SHARED)
def test_the_check_sees_masks_without_documents(results: dict[str, Any], method: str) -> None:
    (_, changes, _), (claim, holds, evidence) = results[method][EDITED[0]]["broken"]
    assert changes
    assert not holds, (claim, evidence)
