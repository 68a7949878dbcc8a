"""The promises, proved on a user's own settings and data: `python -m bigmodel check RUN.toml [PROMISE]`.

Each promise is a function from settings to findings: a claim, whether it holds, and the number behind it. The
tests run the same functions, with the guarded code broken, to see them fail.

    leak    a document cannot influence another one in its pack: outputs, loss, gradients
    order   the batches of each step are the same bytes at any world size; each position of an epoch occurs once
    loss    loss and gradient norm of the same steps agree over ranks, also where these share packs
    resume  killed and resumed, a run retraces the uninterrupted one, to the last bit
    accounting  every token, second and FLOP of a run that was killed and resumed is accounted for
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from bigmodel.audit import Finding, audit, torch_agrees
from bigmodel.config import Settings, UserError, load_settings
from bigmodel.data.batch import IGNORED, Batch, real_documents, tensors_of
from bigmodel.data.examples import num_marks
from bigmodel.data.objectives import num_positions
from bigmodel.data.order import Order
from bigmodel.data.shards import ShardStore
from bigmodel.data.sharing import Place
from bigmodel.data.shuffle import Fragment, Pack, neighbour_distance
from bigmodel.data.stream import Builder, take_share
from bigmodel.deepspeed_config import agree
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.rundir import read_json_lines
from bigmodel.training import checkpoint

WORLDS = ((2, 1), (3, 1), (4, 2), (8, 8), (8, 2), (64, 8))  # ranks, ranks per node: simulated by `order`
ORDER_STEPS = 20  # compared byte for byte
EPOCH_POSITIONS = 200_000_000  # `order` walks a whole epoch up to this size, a part of it above
SHUFFLED = 0.01  # of the distance by chance, below which `order` calls data not shuffled
PROCESS_SECONDS = 600  # bound on a training process started by a check


def run_checks(run_file: Path, overrides: Sequence[str], promises: Sequence[str]) -> int:
    """Run the named promises, print each finding, give the number of broken claims."""
    console = Console(highlight=False)
    broken = 0
    for promise in promises:
        for finding in PROMISES[promise](run_file, overrides):
            mark = "[green]holds [/]" if finding.holds else "[red]BROKEN[/]"
            console.print(f"{mark} {promise}: {finding.claim} ({finding.evidence})")
            broken += not finding.holds
    return broken


# ---- leak -----------------------------------------------------------------------------------------------------


def check_leak(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Take a pack of the user's data with at least two documents and edit one of them."""
    settings = agree(load_settings(run_file, overrides))
    store = ShardStore.of_run(settings.data, "train")
    pack = _pack_of_several(settings, store)
    model = Transformer(settings.model, store.manifest.vocabulary + num_marks(settings.data))
    init_weights(model, settings.run.seed)
    batch = Builder(store, settings.data, settings.run.seed).build([pack], 0, [0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        *isolation(model.to(device, precision), batch.to(device)),
        packed_equals_single(model.cpu().double(), batch),
    ]


def _pack_of_several(settings: Settings, store: ShardStore) -> Pack:
    order = Order.of_run(store, settings)
    for _ in range(10):
        for pack in order.next_step():
            if len(pack) > 1:
                return pack
    raise UserError(
        f"no pack of the first 10 steps holds two documents: data.pack_tokens = {settings.data.pack_tokens} is about "
        "the length of one; nothing can leak, and nothing can be checked"
    )


def isolation(model: Transformer, batch: Batch) -> list[Finding]:
    """Edit the first document; look at the second one's losses and gradients, and for a gradient at the first.

    With a source side, the source is edited too.
    """
    first, second = _documents(batch)[:2]
    before, after = (_losses_and_gradients(model, one, second) for one in (batch, _edited(model, batch, first)))
    same_gradients = all(torch.equal(a, b) for a, b in zip(before.parameters, after.parameters, strict=True))
    others = torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
    others[first.targets] = False
    sides = list(zip(before.inputs, first, second, strict=False))
    reached = max(float(gradient[edited].abs().sum()) for gradient, edited, _ in sides)
    looked_at = all(bool(gradient[own].any()) for gradient, _, own in sides if own.start < own.stop)  # or no source
    moved = float((before.losses[first.targets] - after.losses[first.targets]).abs().max())
    return [
        Finding("the edit changes the edited document's own losses", moved > 0, f"by up to {moved:.3g} nats"),
        Finding(
            "editing one document leaves every other document's losses bitwise equal",
            torch.equal(before.losses[others], after.losses[others]),
            f"{int(others.sum())} positions",
        ),
        Finding(
            "editing one document leaves all parameter gradients of another one's loss bitwise equal",
            same_gradients and any(bool(gradient.any()) for gradient in before.parameters),
            f"{len(before.parameters)} tensors",
        ),
        Finding(
            "the gradient of one document's loss at another document's embeddings is zero",
            reached == 0.0 and looked_at,
            f"summed {reached:.3g}",
        ),
    ]


class _Place(NamedTuple):
    """Where a document lies on both sides."""

    targets: slice
    source: slice


def _edited(model: Transformer, batch: Batch, place: _Place) -> Batch:
    """The batch with every token of a document changed; targets stay."""
    tokens = batch.tokens.clone()
    tokens[place.targets] = (tokens[place.targets] + 1) % model.embedding.num_embeddings
    if batch.source is None:
        return replace(batch, tokens=tokens)
    source = batch.source.tokens.clone()
    source[place.source] = (source[place.source] + 1) % model.embedding.num_embeddings
    return replace(batch, tokens=tokens, source=replace(batch.source, tokens=source))


@dataclass(frozen=True)
class _Traced:
    losses: Tensor  # (T,)
    inputs: list[Tensor]  # (T, H), and (S, E) with a source side: gradients at the embedded tokens
    parameters: list[Tensor]


def _losses_and_gradients(model: Transformer, batch: Batch, place: _Place) -> _Traced:
    """Losses of all positions; gradients of the loss of one document only."""
    model.train()
    model.zero_grad(set_to_none=True)
    targets = torch.full_like(batch.targets, IGNORED)
    targets[place.targets] = batch.targets[place.targets]
    embedded = [one for one in model.embed(batch) if one is not None]
    for one in embedded:
        one.retain_grad()
    x_TH, x_SE = [*embedded, None][:2]
    with torch.no_grad():
        losses_T = model.read_out(x_TH, x_SE, batch, "loss_per_position")
    model.read_out(x_TH, x_SE, replace(batch, targets=targets), "loss_sum").sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return _Traced(losses_T, [one.grad for one in embedded], gradients)


def packed_equals_single(model: Transformer, batch: Batch) -> Finding:
    """In float64 and without dropout, a pack gives the losses and gradients of its documents run one at a time."""
    model.eval()
    packed = _total_gradient(model, [batch])
    documents = _documents(batch)
    assert 0 < len(documents) <= batch.num_documents, f"{len(documents)} documents found, {batch.num_documents} packed"
    single = _total_gradient(model, [_alone(batch, place) for place in documents])
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(packed, single, strict=True)
    )
    return Finding(
        "packed equals one document at a time, in float64: loss and every gradient",
        difference < 1e-9,
        f"largest relative difference {difference:.1e} over {batch.num_documents} documents",
    )


def _total_gradient(model: Transformer, batches: Sequence[Batch]) -> list[Tensor]:
    """[loss sum, then every parameter's gradient], summed over the batches."""
    model.zero_grad(set_to_none=True)
    total = sum(_backward(model(batch).sum()) for batch in batches)
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return [torch.tensor(total), *gradients]


def _backward(loss: Tensor) -> float:
    loss.backward()
    return loss.item()


def _documents(batch: Batch) -> list[_Place]:
    """Where the documents are; padding, which lies in documents of its own, is left out."""
    edges = batch.offsets.tolist()
    source_edges = batch.source.offsets.tolist() if batch.source else [0] * len(edges)
    places = [_Place(slice(*a), slice(*b)) for a, b in zip(pairwise(edges), pairwise(source_edges), strict=True)]
    return [place for place, is_real in zip(places, real_documents(batch), strict=True) if is_real]


def _alone(batch: Batch, place: _Place) -> Batch:
    """One document of a batch as a batch of its own."""
    target, source = place
    edges = batch.offsets.tolist()[:-1]
    number = max(number for number, edge in enumerate(edges) if edge == target.start)
    moved = {name: tensor[target] for name, tensor in tensors_of(batch).items() if name not in ("offsets", "prefixes")}
    side = batch.source and replace(
        batch.source,
        **{name: tensor[source] for name, tensor in tensors_of(batch.source).items() if name != "offsets"},
        offsets=torch.tensor([0, source.stop - source.start], dtype=torch.int32),
    )
    return replace(
        batch,
        **moved,
        offsets=torch.tensor([0, target.stop - target.start], dtype=torch.int32),
        prefixes=None if batch.prefixes is None else batch.prefixes[number : number + 1],
        source=side,
    )


# ---- order ----------------------------------------------------------------------------------------------------


def check_order(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Walk the plan of the user's data at several world sizes, from a saved cursor, and over an epoch."""
    settings = agree(load_settings(run_file, overrides))
    store = ShardStore.of_run(settings.data, "train")
    steps = min(ORDER_STEPS, settings.training.steps)
    reference = _step_fingerprints(settings, store, steps, 1, 1)
    findings = [
        Finding(
            f"{steps} steps are the same bytes, each pack once, on {size} ranks in nodes of {node_size} as on one",
            _step_fingerprints(settings, store, steps, size, node_size) == reference,
            f"{sum(map(len, reference))} packs",
        )
        for size, node_size in WORLDS
    ]
    return [*findings, _cursor_continues(settings, store, steps), *_each_position_once(settings, store)]


def _order(settings: Settings, store: ShardStore) -> Order:
    return Order.of_run(store, settings)


def _step_fingerprints(
    settings: Settings, store: ShardStore, steps: int, world_size: int, node_size: int
) -> list[list[tuple[int, str]]]:
    """Per step, (number, fingerprint) of its packs as the ranks would build them, sorted.

    Each node has an order of its own lanes, as in training.
    """
    merged: list[list[tuple[int, str]]] = [[] for _ in range(steps)]
    builder = Builder(store, settings.data, settings.run.seed)
    for first_rank in range(0, world_size, node_size):
        place = Place(first_rank, world_size, node_size)
        order = Order.of_run(store, settings, lanes=place.lanes(settings.data.lanes))
        for number in range(steps):
            node = take_share(order, settings.data.lanes, place, 1)
            for at in (at for rank in node.slots for slot in rank for at in slot):
                batch = builder.build([node.packs[at]], number, [node.numbers[at]])
                merged[number].append((node.numbers[at], batch.fingerprint()))
    return [sorted(step) for step in merged]


def _cursor_continues(settings: Settings, store: ShardStore, steps: int) -> Finding:
    order, differing = _order(settings, store), 0
    for _ in range(steps):
        state = json.loads(json.dumps(order.state()))
        again = _order(settings, store)
        again.restore(state)
        differing += again.next_step() != order.next_step()
    return Finding("a saved cursor continues with the same packs, at every step", differing == 0, f"{steps} cursors")


def _each_position_once(settings: Settings, store: ShardStore) -> list[Finding]:
    """Count how often each (source, document, position, epoch) occurs until an epoch of every source is complete.

    Also says how well that stretch is shuffled.
    """
    order = _order(settings, store)
    seen: Counter[tuple[int, int, int, int, int]] = Counter()
    lengths: Counter[tuple[int, int]] = Counter()
    given: list[Fragment] = []
    positions = 0
    while positions < EPOCH_POSITIONS and not _epoch_complete(order):
        try:
            packs = order.next_step()
        except UserError:  # data.max_epochs leaves no more
            break
        for piece in (piece for pack in packs for piece in pack):
            seen[piece.source, piece.shard, piece.row, piece.start, piece.epoch] += 1
            positions += piece.length
            given.append(piece)
            if piece.epoch == 0:
                lengths[piece.source, piece.shard] += piece.length
    whole = [
        lengths[source, shard] == int(num_positions(store.lengths(name, shard)).sum())
        for source, name in enumerate(store.sources)
        if name in order.plan.source_positions
        for shard in range(store.num_shards(name))
    ]
    finished = _epoch_complete(order)
    return [
        Finding(
            "each position of each document occurs exactly once in an epoch"
            if finished
            else f"no position occurs twice in the first {positions:,} (an epoch is longer than this check walks)",
            max(seen.values()) == 1 and (all(whole) or not finished),
            f"{positions:,} positions, {len(seen):,} pieces of documents",
        ),
        Finding(
            "documents that lie side by side in a shard land far apart",
            (distance := neighbour_distance(given)) > SHUFFLED,
            f"{distance:.2f} of the distance that chance would give",
        ),
    ]


def _epoch_complete(order: Order) -> bool:
    return all(source.epochs_complete >= 1 for source in order.progress().values())


# ---- loss and resume: real training processes -----------------------------------------------------------------


def check_loss(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Train two steps on one rank and on several, which share packs if the run's do; these add in another order."""
    training = agree(load_settings(run_file, overrides)).training
    sharing = training.sequence_parallel_ranks
    several = max(2, sharing)
    # Ranks that share a pack multiply fewer rows at once; the products may be rounded otherwise where they are rounded.
    slack = 1 if sharing == 1 or training.precision == "fp32" else 1000
    on_cpu = torch.cuda.device_count() < several  # each needs a GPU, and one must not be compared with a CPU
    with tempfile.TemporaryDirectory() as scratch:
        traces = {}
        for world_size in (1, several):
            directory = Path(scratch) / f"ranks-{world_size}"
            shared = f"training.sequence_parallel_ranks={1 if world_size == 1 else sharing}"
            command = [*overrides, *_short(directory, 2, 2), shared]
            _finish(_start(run_file, command, world_size, directory, on_cpu), directory)
            traces[world_size] = _trace(directory)
    findings = []
    for name, bound in (("loss", 1e-6), ("gradient_norm", 1e-5)):
        one, two = traces[1][0][name], traces[several][0][name]
        difference = abs(one - two) / abs(one)
        findings.append(
            Finding(
                f"the first step's {name} agrees on 1 and {several} ranks",
                difference < bound * slack,
                f"{difference:.1e} relative",
            )
        )
    return findings


def check_resume(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Ten steps undisturbed; ten steps killed with SIGKILL at a random instant after the first save, and resumed."""
    world_size = _num_ranks(agree(load_settings(run_file, overrides)))
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        _finish(_start(run_file, [*overrides, *_short(whole, 10, 4)], world_size, whole), whole)
        command = [*overrides, *_short(broken, 10, 4)]
        at = _kill_within(_start(run_file, command, world_size, broken), broken, random.randint(5, 8))
        _finish(_start(run_file, command, world_size, broken), broken)
        expected, found = _trace(whole), _trace(broken)
        differing = [a["step"] for a, b in zip(expected, found, strict=False) if _learned(a) != _learned(b)]
        same_weights = _file_hashes(whole) == _file_hashes(broken)
        starts = [event["step"] for event in read_json_lines(broken / "events.jsonl") if event["event"] == "start"]
    return [
        Finding(
            "loss and gradient norm of every step equal the uninterrupted run's, to the last bit",
            len(expected) == len(found) == 10 and not differing and starts[-1] > 0,
            f"10 steps on {world_size} ranks, killed in step {at + 1}, resumed at step {starts[-1]}",
        ),
        Finding("weights and optimizer state at the end are the same bytes", same_weights, "sha256 of every file"),
    ]


def check_accounting(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """The books of the run directory, if a run is there, and those of a short run that is killed and resumed."""
    settings = load_settings(run_file, overrides)
    findings = audit(settings.run.directory) if (settings.run.directory / "metrics.jsonl").exists() else []
    world_size = _num_ranks(settings)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"
        command = [*overrides, *_short(directory, 20, 4)]
        began = time.time()
        _kill_within(_start(run_file, command, world_size, directory), directory, random.randint(9, 12))
        _finish(_start(run_file, command, world_size, directory), directory)
        findings += audit(directory, (began, (directory / "metrics.jsonl").stat().st_mtime))
    return [*findings, torch_agrees(settings)]


def _num_ranks(settings: Settings) -> int:
    """Two where they have work and devices, or as many as share a pack."""
    sharing = settings.training.sequence_parallel_ranks
    return sharing if sharing > 1 else min(2, torch.cuda.device_count() or 2, settings.training.packs_per_step)


def _short(directory: Path, steps: int, every: int) -> list[str]:
    """Overrides that make a short run of a run file, in a directory of its own. It keeps away from the run's store."""
    return [
        f"run.directory={directory}",
        f"training.steps={steps}",
        f"checkpoint.every_steps={every}",
        "checkpoint.remote=",
        "checkpoint.hours_between_failures=0",
        "schedule.warmup_steps=0",
        "schedule.decay_steps=0",
        "evaluation.every_steps=0",
        "evaluation.at_end=false",
        "metrics.port=0",
        "metrics.writers=[]",
    ]


def _start(
    run_file: Path, overrides: Sequence[str], world_size: int, directory: Path, on_cpu: bool = False
) -> list[subprocess.Popen]:
    """One process per rank, in one process group, printing into the run directory."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bigmodel", "train", str(run_file)]
    for override in overrides:
        command += ["--set", override]
    port = _free_port()
    ranks: list[subprocess.Popen] = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        if on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        output = open(directory / f"rank-{rank}.txt", "ab")  # noqa: SIM115 - the child's own
        group = ranks[0].pid if ranks else 0
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=group)
        )
    return ranks


def _finish(ranks: Sequence[subprocess.Popen], directory: Path) -> None:
    """Wait for all ranks. Raises `UserError` with the failing rank's last words."""
    try:
        for number, rank in enumerate(ranks):
            if rank.wait(timeout=PROCESS_SECONDS):
                words = (directory / f"rank-{number}.txt").read_text(errors="replace").splitlines()[-15:]
                raise UserError(
                    f"rank {number} of a check's training run failed with code {rank.returncode}:\n" + "\n".join(words)
                )
    finally:
        _kill(ranks)


def _kill_within(ranks: Sequence[subprocess.Popen], directory: Path, step: int) -> int:
    """SIGKILL all ranks at a random instant after `step` steps and a checkpoint; gives the last step recorded."""
    deadline = time.monotonic() + PROCESS_SECONDS
    try:
        while not (trace := _trace(directory)) or trace[-1]["step"] < step or not _has_saved(directory):
            if any(rank.poll() is not None for rank in ranks) or time.monotonic() > deadline:
                _finish(ranks, directory)
                raise UserError(f"a check's training run ended before step {step}")
            time.sleep(0.002)
        time.sleep(random.uniform(0, trace[-1]["step_seconds"]))
    finally:
        _kill(ranks)
    return _trace(directory)[-1]["step"]


def _kill(ranks: Sequence[subprocess.Popen]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGKILL)
        rank.wait()


def _trace(directory: Path) -> list[dict]:
    return [line for line in read_json_lines(directory / "metrics.jsonl") if line["kind"] == "step"]


def _has_saved(directory: Path) -> bool:
    return any(line["kind"] == "checkpoint" for line in read_json_lines(directory / "metrics.jsonl"))


def _learned(line: dict) -> tuple[float, ...]:
    """What must not differ: not the seconds."""
    return tuple(line[name] for name in ("step", "loss", "gradient_norm", "learning_rate", "targets", "positions"))


def _file_hashes(directory: Path) -> dict[str, str]:
    newest = checkpoint.newest(directory / "checkpoints")
    assert newest, f"{directory} has no checkpoint"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.path.glob("*.safetensors")}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PROMISES: dict[str, Callable[[Path, Sequence[str]], list[Finding]]] = {
    "leak": check_leak,
    "order": check_order,
    "loss": check_loss,
    "resume": check_resume,
    "accounting": check_accounting,
}
