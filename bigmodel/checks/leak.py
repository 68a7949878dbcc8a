"""Leak check: a document cannot influence the outputs, loss or gradients of another one in its packed sequence.

In: a packed sequence of the user's data. Costs a few model steps on it, and each of its documents alone, in float64
on the CPU; where ranks share packed sequences, matrices or experts, also a start of these ranks
(`bigmodel/checks/leak_rank.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel.checks.audit import Finding
from bigmodel.checks.exact import resolve
from bigmodel.checks.runs import finish, started
from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.deepspeed_config import agree
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.load.alone import Place, alone
from bigmodel.data.load.batch import IGNORED, Batch, real_documents
from bigmodel.data.load.stream import Builder
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.shuffle import Pack
from bigmodel.data.store.shards import ShardStore
from bigmodel.model.init import init_weights
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.transformer import Transformer
from bigmodel.planning.context import vocabulary_of
from bigmodel.run_directory import write_json

SAME = 1e-9  # relative, in float64: the order of sums differs


def check_leak(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Edit each document of a packed sequence with at least two documents of the user's data."""
    settings = agree(load_settings(run_file, overrides))
    batch = first_batch(settings)
    model = build_model(settings.model, vocabulary_of(settings))
    init_weights(model, settings.run.seed)
    on_ranks = _on_ranks(run_file, overrides, settings) if settings.training.sharing_ranks > 1 else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    if settings.model.experts:
        return [*isolation(model.double(), batch), *packed_equals_single(model, batch), *on_ranks]
    return [
        *isolation(model.to(device, precision), batch.to(device)),
        *packed_equals_single(model.cpu().double(), batch),
        *on_ranks,
    ]


def _on_ranks(run_file: Path, overrides: Sequence[str], settings: Settings) -> list[Finding]:
    """Findings of ranks that share packed sequences, matrices or experts."""
    ranks = settings.training.sharing_ranks
    on_cpu = torch.cuda.device_count() < ranks
    with scratch_folder() as folder:
        write_json(folder / "job.json", [str(run_file), list(overrides), resolve(settings, ranks, folder)])
        with started(["-m", "bigmodel.checks.leak_rank", str(folder)], ranks, folder, on_cpu) as processes:
            finish(processes, folder)
        return [Finding(*one) for one in json.loads((folder / "report.json").read_text(encoding="utf-8"))]


def first_batch(settings: Settings) -> Batch:
    """The first packed sequence of the run in which two documents have labels. The same on every rank."""
    store = ShardStore.of_run(settings.data, "train")
    by_document = settings.model.draws_by_document
    builder = Builder(store, settings.data, settings.run.seed, seeds_by_document=by_document)
    return builder.build([_pack_of_several(settings, store)], 0, [0])


def _pack_of_several(settings: Settings, store: ShardStore) -> Pack:
    """A packed sequence in which two documents have labels."""
    order = Order.of_run(store, settings)
    for _ in range(10):
        for pack in order.next_step():
            if sum(chunk.num_labels > 0 for chunk in pack) > 1:
                return pack
    raise UserError(
        f"no packed sequence of the first 10 steps holds two documents: data.sequence_length = "
        f"{settings.data.sequence_length} is about "
        "the length of one; a leak check needs two"
    )


def documents(batch: Batch) -> list[Place]:
    """Places of all documents with labels. Padding lies in documents of its own and is left out."""
    edges = batch.cu_seqlens.tolist()
    source_edges = batch.source.cu_seqlens.tolist() if batch.source else [0] * len(edges)
    sides = zip(pairwise(edges), pairwise(source_edges), real_documents(batch), strict=True)
    return [Place(number, slice(*a), slice(*b)) for number, (a, b, is_real) in enumerate(sides) if is_real]


# ---- edited documents -----------------------------------------------------------------------------------------


def isolation(model: Transformer, batch: Batch) -> list[Finding]:
    """Edit the first of two documents: losses and gradients of the second must not change, and its loss must have no
    gradient at the first. Then with the roles exchanged. The source side, if any, is edited too.

    With experts in float64, within rounding: another number of rows moves the rows of an expert's product, and so the
    order of its sums.
    """
    same = "equal in float64" if model.settings.experts else "bitwise equal"
    first, second = documents(batch)[:2]
    ways = [_edit(model, batch, *way) for way in ((first, second), (second, first))]
    moved = min(way.moved for way in ways)
    reached = sum(way.reached for way in ways)
    return [
        Finding("an edit changes the losses of the edited document", moved > 0, f"by up to {moved:.3g} nats"),
        Finding(
            f"editing one document leaves every other document's losses {same}",
            all(way.same_losses for way in ways),
            f"{sum(way.num_others for way in ways)} tokens",
        ),
        Finding(
            f"editing one document leaves all parameter gradients of another one's loss {same}",
            all(way.same_gradients for way in ways),
            f"{sum(1 for _ in model.parameters())} tensors",
        ),
        Finding(
            "the gradient of one document's loss at another document's embeddings is zero",
            reached == 0.0 and all(way.reached_itself for way in ways),
            f"summed {reached:.3g}",
        ),
    ]


class _Edit(NamedTuple):
    """Effect of an edit on another document and on the edited one."""

    moved: float  # nats, of a loss of the edited document
    num_others: int  # tokens outside the edited document
    same_losses: bool  # of these
    same_gradients: bool  # of the parameters, from the other document's loss
    reached: float  # gradient of the other document's loss at the edited one's embeddings, summed
    reached_itself: bool  # gradient of the other document's loss at its own embeddings


def _edit(model: Transformer, batch: Batch, place: Place, other: Place) -> _Edit:
    changed = edited(model.embedding.num_embeddings, batch, place)
    before, after = (_losses_and_gradients(model, one, other) for one in (batch, changed))
    others_T = torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
    others_T[place.targets] = False
    same = _same_within_rounding if model.settings.experts else _same_bits
    sides = list(zip(before.inputs, place[1:], other[1:], strict=False))
    own = [gradient[its] for gradient, _, its in sides if its.start < its.stop]  # empty without a source
    return _Edit(
        moved=float((before.losses[place.targets] - after.losses[place.targets]).abs().max()),
        num_others=int(others_T.sum()),
        same_losses=same([before.losses[others_T]], [after.losses[others_T]]),
        same_gradients=same(before.parameters, after.parameters) and any(bool(one.any()) for one in before.parameters),
        reached=sum(float(gradient[its].abs().sum()) for gradient, its, _ in sides),
        reached_itself=all(bool(gradient.any()) for gradient in own),
    )


def _same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _same_within_rounding(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return _difference(found, expected) < SAME


def edited(vocabulary: int, batch: Batch, place: Place) -> Batch:
    """The batch with every token of a document changed; labels stay. vocabulary: rows of the embedding."""
    tokens = batch.tokens.clone()
    tokens[place.targets] = (tokens[place.targets] + 1) % vocabulary
    if batch.source is None:
        return replace(batch, tokens=tokens)
    source = batch.source.tokens.clone()
    source[place.source] = (source[place.source] + 1) % vocabulary
    return replace(batch, tokens=tokens, source=replace(batch.source, tokens=source))


@dataclass(frozen=True)
class _Traced:
    losses: Tensor  # (T,)
    inputs: list[Tensor]  # (T, H), and (S, E) with a source side: gradients at the embedded tokens
    parameters: list[Tensor]


def _losses_and_gradients(model: Transformer, batch: Batch, place: Place) -> _Traced:
    """Losses of all tokens; gradients of the loss of one document."""
    model.train()
    model.zero_grad(set_to_none=True)
    targets = torch.full_like(batch.labels, IGNORED)
    targets[place.targets] = batch.labels[place.targets]
    embedded = [one for one in model.embed(batch) if one is not None]
    for one in embedded:
        one.retain_grad()
    x_TH, x_SE = [*embedded, None][:2]
    with torch.no_grad():
        losses_T = model.read_out(x_TH, x_SE, batch, "loss_per_position")
    model.read_out(x_TH, x_SE, replace(batch, labels=targets), "loss_sum").sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return _Traced(losses_T, [one.grad for one in embedded], gradients)


# ---- one document at a time -----------------------------------------------------------------------------------


def packed_equals_single(model: Transformer, batch: Batch) -> list[Finding]:
    """In float64, a packed sequence has the outputs, loss and gradients of its documents computed one at a time.

    As in training: MTP modules have their losses, and dropout is drawn by position, so it is the same alone.
    """
    model.train()
    places = documents(batch)
    assert 0 < len(places) <= batch.num_documents, f"{len(places)} documents found, {batch.num_documents} packed"
    single = [alone(batch, place) for place in places]
    packed_outputs = _outputs(model, batch)
    outputs = _difference(
        [rows[place[1 + side]] for place in places for side, rows in packed_outputs],
        [rows for one in single for _, rows in _outputs(model, one)],
    )
    gradients = _difference(_total_gradient(model, [batch]), _total_gradient(model, single))
    return [
        Finding(
            f"packed equals one document at a time, in float64: {what}",
            difference < SAME,
            f"relative difference {difference:.1e} over {len(places)} documents",
        )
        for what, difference in (("outputs of every head", outputs), ("loss and every gradient", gradients))
    ]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of the tensors; NaN stays NaN.

    Each is relative to its expected tensor, or to a millionth of the largest one if that is more: a gradient that is
    zero (queries with one visible key) holds rounding errors only.
    """
    sizes = torch.stack([tensor.norm() for tensor in expected])
    differences = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)])
    return float((differences / sizes.clamp_min(1e-6 * float(sizes.max()))).max())


@torch.no_grad()
def _outputs(model: Transformer, batch: Batch) -> list[tuple[int, Tensor]]:
    """(side, output) pairs, side 0 is the target, 1 the source: losses (T,), states before the logits of each head
    (T, H), states of the encoder (S, E). Logits would be too large.
    """
    x_TH, x_SE = model.embed(batch)
    states_TH, views, source = model.trunk(x_TH, x_SE, batch)
    heads = [
        states_TH,
        *(block(states_TH, views[block.kind], batch.dropout_seeds, source) for block in model.extra_blocks),
    ]
    losses_T = model.read_out(x_TH, x_SE, batch, "loss_per_position")
    outputs = [(0, losses_T), *((0, model.last_states(one)) for one in heads)]
    return [*outputs, (1, source.states_SE)] if source else outputs


def _total_gradient(model: Transformer, batches: Sequence[Batch]) -> list[Tensor]:
    """[loss sum, then every parameter's gradient], summed over the batches."""
    model.zero_grad(set_to_none=True)
    total = sum(_backward(model(batch).sum()) for batch in batches)
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return [torch.tensor(total, dtype=torch.float64), *gradients]


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()
