"""Audit of the run accounting: `bigmodel check RUN.toml accounting`.

In: a run directory. Out: findings. Tokens and documents are counted again from the data, seconds are compared with
the wall clock, FLOPs with torch's count while it computes a batch of the run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from bigmodel.config.settings import ModelSettings, Settings, UserError, settings_from_table
from bigmodel.data.load.batch import Batch
from bigmodel.data.load.stream import Builder
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.plan.attention_work import Work, count_work
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.shuffle import Pack
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.data.store.shards import ShardStore
from bigmodel.metrics.flops import flops
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.transformer import Transformer
from bigmodel.run_directory import read_json, read_json_lines
from bigmodel.training.spikes import Rewind, read_rewinds

CLOSES_WITHIN = 0.01  # of the wall time
MAX_STEPS = 20_000  # planned again for the comparison


class Finding(NamedTuple):
    """A claim, whether it holds, and the evidence."""

    claim: str
    holds: bool
    evidence: str


def audit(run_directory: Path, observed: tuple[float, float] | None = None) -> list[Finding]:
    """Audit a running or ended run. Raises `UserError` if it has no step.

    observed: Unix times of start and end by another clock; by default those in metrics.jsonl.
    """
    run_directory = Path(run_directory)
    lines = list(read_json_lines(run_directory / "metrics.jsonl"))
    if not any(line["kind"] == "step" for line in lines):
        raise UserError(f"{run_directory}: metrics.jsonl has no step yet; there is nothing to account for")
    file = run_directory / "settings.json"
    settings = settings_from_table(read_json(file), file, saved=True)
    ledger = RunAccounting()
    for line in lines:
        ledger.add(line)
    events = list(read_json_lines(run_directory / "events.jsonl"))
    findings = [_seconds(ledger, observed), _once(lines), _declared(lines, events, read_rewinds(run_directory))]
    if not any(event["event"] == "new_plan" for event in events):
        findings.append(_counts(lines, settings))  # else the settings do not describe the data of earlier steps
    return findings


def _seconds(ledger: RunAccounting, observed: tuple[float, float] | None) -> Finding:
    accounted = sum(ledger.seconds.values())
    wall = observed[1] - observed[0] if observed else ledger.wall_seconds
    most = sorted(ledger.seconds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{cause} {seconds / wall:.1%}" for cause, seconds in most if seconds >= 0.0005 * wall)
    return Finding(
        "productive and lost seconds add up to the wall time from the first start, within 1%",
        abs(accounted - wall) <= CLOSES_WITHIN * wall,
        f"{accounted:.2f} of {wall:.2f} s: {shares}",
    )


def _once(lines: list[dict[str, Any]]) -> Finding:
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    return Finding("metrics.jsonl has every step once", steps == list(range(1, steps[-1] + 1)), f"{len(steps)} steps")


def _declared(lines: list[dict[str, Any]], events: list[dict[str, Any]], rewinds: Sequence[Rewind]) -> Finding:
    """What was trained is the plan without the declared steps: a skipped one has an event with all of its documents,
    and a step that a rewind leaves out is a skipped one."""
    steps = [line for line in lines if line["kind"] == "step"]
    told: dict[int, set[int]] = {}  # step -> tokens of its declared documents
    for event in events:
        if event.get("event") == "step_skipped":
            told.setdefault(event["step"], set()).add(sum(document[4] for document in event["documents"]))
    marks = [event["event"] for event in events if event.get("event") in ("start", "rewind")]
    heeded = rewinds[:-1] if marks[-1:] == ["rewind"] else rewinds  # the last one waits for the next start
    left_out = {step for rewind in heeded for step in rewind.steps}
    skipped = [line for line in steps if line["skipped"]]
    wrong = [line["step"] for line in skipped if line["positions"] not in told.get(line["step"], ())]
    wrong += [line["step"] for line in steps if line["step"] in left_out and not line["skipped"]]
    reasons = Counter(line["skip_reason"] for line in skipped)
    counted = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(reasons.items()))
    return Finding(
        "each step without an update is declared with its documents, and those that rewinds leave out have none",
        not wrong,
        (counted or "no such step") + (f"; step {wrong[0]} is not as declared" if wrong else ""),
    )


def _counts(lines: list[dict[str, Any]], settings: Settings) -> Finding:
    """Tokens, documents and FLOPs of every step, computed from the plan alone."""
    store = ShardStore.of_run(settings.data, "train")
    vocabulary = store.manifest.vocabulary + num_special_tokens(settings.data)
    order = Order.of_run(store, settings)
    steps = [line for line in lines if line["kind"] == "step"][:MAX_STEPS]
    differing = []
    for line in steps:
        told = (line["positions"], line["targets"], line["documents"], line["flops"]["causal"])
        if told != count(order.next_step(), settings, vocabulary):
            differing.append(line["step"])
    return Finding(
        "tokens, documents and model FLOPs of each step are those of the data",
        not differing,
        f"{len(steps)} steps" + (f", from step {differing[0]} on {len(differing)} differ" if differing else ""),
    )


def count(packs: list[Pack], settings: Settings, vocabulary: int) -> tuple[int, int, int, float]:
    """(tokens, labels, documents, model FLOPs) of packed sequences, from their plan."""
    chunks = [chunk for pack in packs for chunk in pack]
    work = count_work(PackTable.of_packs(packs), settings.data, partial(visible_pairs, settings=settings.model))
    sizes = (settings.data.sequence_length, settings.data.source_sequence_length)
    return (
        sum(chunk.num_tokens + chunk.source_positions for chunk in chunks),
        sum(chunk.num_labels for chunk in chunks),
        len(chunks),
        flops(settings.model, vocabulary, work, sizes).causal,
    )


def torch_agrees(settings: Settings) -> Finding:
    """Compute a packed sequence under torch's FLOP counter, which counts attention over all pairs of a document."""
    store = ShardStore.of_run(settings.data, "train")
    vocabulary = store.manifest.vocabulary + num_special_tokens(settings.data)
    pack = Order.of_run(store, settings).next_step()[0]
    batch = Builder(store, settings.data, settings.run.seed).build([pack], 0, [0])
    model = build_model(settings.model.without_draws().model_copy(update={"num_mtp_modules": 0}), vocabulary)
    counted, expected = count_by_torch(model, batch)
    return Finding(
        "the formula's FLOPs equal torch's count for a packed sequence",
        counted == expected,
        f"{counted:,} counted, {expected:,.0f} by formula; torch takes attention over whole documents",
    )


def count_by_torch(model: Transformer, batch: Batch) -> tuple[int, float]:
    """FLOPs of a batch, forward and backward: torch's count, and the formula over the pairs that torch counts."""
    vocabulary, settings = model.embedding.num_embeddings, model.settings
    batch = replace(batch, padding=None)  # every position passes its experts, as it passes all other layers
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if settings.classification:  # the formula leaves its head out
            model.hidden(*_embedded(model, batch)).sum().backward()
        else:
            F.cross_entropy(model(batch, "logits"), batch.labels).backward()
    return counter.get_total_flops(), flops(settings, vocabulary, work_of(batch, settings), (0, 0)).causal


def _of_pairs(q_THK: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """Of two products, scores and values, over all pairs of a document."""
    return 4 * q_THK.shape[1] * q_THK.shape[2] * int((cu_seqlens_q.diff() * cu_seqlens_k.diff()).sum())


@register_flop_formula(torch.ops.bigmodel.cpu_attention, get_raw=True)
def _forward(
    q_THK: Tensor, _k: Tensor, _v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **__: Any
) -> int:
    return _of_pairs(q_THK, cu_seqlens_q, cu_seqlens_k)


@register_flop_formula(torch.ops.bigmodel.cpu_attention_backward, get_raw=True)
def _backward(
    d_out_THK: Tensor, _out: Tensor, _lse: Tensor, _q: Tensor, _k: Tensor, _v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Four products; that of the scores, done again, is not the model's work."""
    return 2 * _of_pairs(d_out_THK, cu_seqlens_q, cu_seqlens_k)


@register_flop_formula(torch.ops.bigmodel.grouped_matmul, get_raw=True)
def _grouped(_x: Tensor, weight_ENK: Tensor, offsets_E1: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(offsets_E1[-1]) * weight_ENK[0].numel()


@register_flop_formula(torch.ops.bigmodel.grouped_matmul_backward, get_raw=True)
def _grouped_backward(
    _d_out: Tensor, _x: Tensor, weight_ENK: Tensor, offsets_E1: Tensor, need_x: bool, need_weight: bool, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    return (need_x + need_weight) * 2 * int(offsets_E1[-1]) * weight_ENK[0].numel()


def _embedded(model: Transformer, batch: Batch) -> tuple[Tensor, Batch, Tensor | None]:
    x_TH, x_SE = model.embed(batch)
    return x_TH, batch, x_SE


def work_of(batch: Batch, settings: ModelSettings) -> Work:
    """The work that torch counts: every document attends to all of itself, and padding is a document."""
    lengths = batch.cu_seqlens.diff().tolist()
    if settings.is_recurrent:
        pairs = batch.cu_seqlens.diff() * batch.source.cu_seqlens.diff() if batch.source else torch.zeros(1)
        return Work(sum(lengths), len(batch.source.tokens) if batch.source else 0, cross_pairs=int(pairs.sum()))
    sources = batch.source.cu_seqlens.diff().tolist() if batch.source else [0] * len(lengths)
    layers, encoder = settings.num_layers + settings.num_mtp_modules, settings.encoder
    squares, crossing = sum(n * n for n in lengths), sum(n * s for n, s in zip(lengths, sources, strict=True))
    of_sources = encoder.num_layers * sum(s * s for s in sources)
    return Work(sum(lengths), sum(sources), layers * squares, of_sources, layers * crossing)
