"""One rank of `bigmodel check RUN.toml leak`, where ranks share packed sequences, matrices or experts.

In: a folder with job.json. Out: report.json, by rank 0: the findings. The ranks that share the first packed sequence
get one of the user's data; all others, as with shared experts, get the same without labels. An edit changes a document
of the first and everything of the others; the loss and gradients of the remaining documents must not change. Masks,
exchanges and sums are those of a training step. Costs eight micro-batches.
Usage: python -m bigmodel.checks.leak_rank FOLDER
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel.checks.audit import Finding
from bigmodel.checks.exact_steps import LEAST, new_start
from bigmodel.checks.leak import documents, edited, first_batch
from bigmodel.checks.plain_torch import lengths, ratio_of, worst
from bigmodel.config.deepspeed_config import agree
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.load.alone import Place
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.distributed.world import end_world, start_world
from bigmodel.run_directory import write_json
from bigmodel.training.expert_balance import ExpertBalance
from bigmodel.training.zero.engine import Engine


def run(folder: Path) -> None:
    """Collective."""
    run_file, overrides, effective = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    settings = agree(load_settings(run_file, overrides))
    world = start_world(settings.training.collective_timeout_seconds)
    model, _ = new_start(settings, effective, world)
    engine = Engine(model, settings, effective, world)
    ExpertBalance(model).begin()
    found = isolation_on_ranks(engine, settings, first_batch(settings))
    if world.rank == 0:
        write_json(folder / "report.json", found)
    end_world()


def isolation_on_ranks(engine: Engine, settings: Settings, batch: Batch) -> list[Finding]:
    """Edit the first of two documents and everything on ranks that do not share the sequence: loss and gradients of all
    other documents must not change. Then edit the second. Equal to the last bit, or with experts within the bound of
    `check exact`: their products and sums have other rows. Collective; no update.
    """
    world, training = engine.world, settings.training
    batch, has_labels = batch.to(world.device), world.rank < training.ranks_per_sequence
    vocabulary = engine.shape("embedding.weight")[0]
    moved, loss, gradient, num_gradients = math.inf, 0.0, (0.0, ""), 0
    for place in documents(batch)[:2]:
        whole = Place(0, slice(None), slice(None))
        changed = edited(vocabulary, batch, place if has_labels else whole)
        own, own_changed, others, others_changed = (
            _step(engine, one, _chosen(batch, place, inside) if has_labels else torch.full_like(batch.labels, IGNORED))
            for inside in (True, False)
            for one in (batch, changed)
        )
        moved = min(moved, abs(own_changed.loss - own.loss))
        loss = max(loss, ratio_of(abs(others_changed.loss - others.loss), abs(others.loss)))
        sizes = [lengths(name, one, others.gradients[name]) for name, one in others_changed.gradients.items()]
        gradient, num_gradients = max(gradient, worst(sizes)), sum(one.wanted > 0 for one in sizes)
    bounds, same = ((0.0, 0.0), "bitwise equal")
    if settings.model.experts:
        bounds, same = LEAST[training.precision][:2], "equal within rounding"
    return [
        Finding(
            f"on {world.size} ranks, an edit changes the loss of the edited document",
            moved > 0,
            f"by {moved:.3g} nats",
        ),
        Finding(
            f"on {world.size} ranks, editing one document leaves loss and gradients of all others {same}",
            loss <= bounds[0] and gradient[0] <= bounds[1] and num_gradients > 0,
            f"relative differences {loss:.1e} and {gradient[0]:.1e}, {num_gradients} gradients",
        ),
    ]


class _Result(NamedTuple):
    loss: float  # nats, over all ranks
    gradients: dict[str, Tensor]


def _chosen(batch: Batch, place: Place, inside: bool) -> Tensor:
    """(T,) labels of the document, or of all others."""
    chosen_T = torch.zeros_like(batch.labels, dtype=torch.bool)
    chosen_T[place.targets] = True
    return batch.labels.where(chosen_T if inside else ~chosen_T, IGNORED)


def _step(engine: Engine, batch: Batch, labels: Tensor) -> _Result:
    """Loss and gradients of a step of one micro-batch, without its update. In fp16 the loss scale is lowered first."""
    batch, is_too_large = replace(batch, labels=labels), True
    while is_too_large:
        nats = float(engine.micro_batch(batch, batch.num_labels, last=True).sum())
        is_too_large = not math.isfinite(engine.gradient_norm()) and engine.scales_loss
        gradients = {name: engine.gradient(name).cpu().clone() for name in engine.trained()}
        engine.update(0.0, skip=True)
    return _Result(engine.world.sum_([nats])[0], gradients)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"{error}")
