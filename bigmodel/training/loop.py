"""The training loop: shards in, checkpoints out, one straight line.

Takes settings, gives an exit code (run_directory.EXIT_*). Every rank runs this same function; rank 0 alone prints,
exports metrics and writes the run directory. Guarantees: what happens at step N stands between `for step` and
the end of that block; data, dropout and learning rate of a step depend on the seed and its number alone, so a
run that was killed and resumed retraces the uninterrupted one. A step without a finite loss and gradient is
skipped by all ranks together, before the update, and recorded.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings, UserError, to_toml_table
from bigmodel.data.load.stream import Step, Stream
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.plan.order import Position, merge_cursors, total_progress
from bigmodel.data.plan.segments import resume_order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.consistency import check_consistency
from bigmodel.distributed.signals import StopFlag
from bigmodel.distributed.world import NodeSums, World, end_world, limit_collectives, start_world
from bigmodel.evaluation.evaluate import Validation
from bigmodel.evaluation.generate import examples, generate
from bigmodel.metrics.flops import device_peak_flops, step_flops
from bigmodel.metrics.phases import CompileTime, Phases, slowest
from bigmodel.metrics.profiling import Profiler
from bigmodel.metrics.progress import LiveLine
from bigmodel.metrics.recorder import LossGroup, Metrics, Seat, StepRecord, new_start
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.run_directory import (
    EXIT_DONE,
    EXIT_STOPPED,
    claim,
    record_event,
    record_start,
    refuse_to_start_over,
    take_over,
)
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.saver import Saved, SaveError, Saver
from bigmodel.training.learning_rate import learning_rate
from bigmodel.training.summary import show_summary, summarize
from bigmodel.training.zero.engine import Engine, creation
from bigmodel.training.zero.norms import Norms

SAMPLE_TOKENS = 200  # of generated text at the end
NUM_EXAMPLES = 3  # shown at the end of an encoder-decoder's training
MAX_BAD_STEPS = 10  # so many in a row without a finite gradient: diverged; fp16 first lowers its scale to the end

Value = TypeVar("Value")


def train(settings: Settings, fresh: bool = False, new_plan: bool = False) -> int:
    """Train to `training.steps`, going on from the newest good checkpoint in the run directory.

    `fresh` sets checkpoints aside. `new_plan` goes on in a fresh order of the data: see `bigmodel.data.plan.segments`.

    Raises `UserError` for what a user can mend: contradicting settings, damaged data or checkpoints, a full disk.
    """
    with ExitStack() as closing:  # however the run ends: no thread, no hidden cursor, no metrics address stays behind
        return _train(settings, fresh, new_plan, closing)


def _train(settings: Settings, fresh: bool, new_plan: bool, closing: ExitStack) -> int:
    stop = StopFlag()
    world = start_world(settings.training.collective_timeout_seconds)
    if world.device.type == "cuda" and settings.model.resolved_head_dim > 256:
        raise UserError(
            f"model.hidden_size / model.num_heads = {settings.model.resolved_head_dim}: the GPU kernels take "
            "heads of at most 256 "
            "channels; raise model.num_heads"
        )
    directory = settings.run.directory
    checkpoints = directory / "checkpoints"
    world.on_rank_zero(lambda: claim(directory))
    restart_generation = world.on_rank_zero(lambda: take_over(directory))
    check_consistency(world, settings)

    # What to train on and what to train.
    effective, settings = resolve_deepspeed(settings, world.size)
    packs_per_micro_batch = effective["train_micro_batch_size_per_gpu"]
    store = ShardStore.of_run(settings.data, "train")
    sharing = settings.training.sequence_parallel_ranks  # of each pack
    ranks_per_node = world.ranks_per_node()
    place = Place.of_rank(world.rank, world.size, ranks_per_node, sharing)
    validation = Validation(settings.data, packs_per_micro_batch)
    vocabulary = store.manifest.vocabulary + num_special_tokens(settings.data)
    with creation(effective) as whole:
        model = Transformer(settings.model, vocabulary, settings.training.z_loss, settings.training.label_smoothing)
    init_weights(model, settings.run.seed, whole)
    phases, compile_time = Phases(world.device), CompileTime()
    engine = Engine(model, settings, effective, world, phases)
    limit_collectives(settings.training.collective_timeout_seconds)

    # Where to go on.
    remote = settings.checkpoint.remote
    if fresh:
        world.on_rank_zero(lambda: checkpoint.set_aside(checkpoints, remote))
    resumed = checkpoint.newest(checkpoints, world, remote=remote)
    if not resumed and not fresh:
        world.on_rank_zero(lambda: refuse_to_start_over(directory))
    first_step = resumed.state["step"] if resumed else 0
    lanes = place.lanes(settings.data.lanes)
    order, segments = resume_order(store, settings, resumed.state if resumed else None, new_plan, lanes)
    order.require(settings.training.steps)
    if resumed:
        checkpoint.load(resumed, engine, settings, world)
    node, local_rank = divmod(world.rank, ranks_per_node)
    seat = Seat(world.rank, world.size, node, local_rank, ranks_per_node)
    start = world.on_rank_zero(lambda: new_start(directory))
    metrics = Metrics(directory, settings.metrics, first_step, seat, start, fresh, _facts(engine, world))
    closing.callback(metrics.close)
    profiler = Profiler(metrics.folder, world.rank)
    closing.callback(profiler.close)
    line = LiveLine(first_step, settings.training.steps, enabled=world.rank == 0)
    closing.callback(line.close)
    if world.rank == 0:
        changed = record_start(directory, to_toml_table(settings), effective, settings.data.directory)
        record_event(directory, "start", step=first_step, world_size=world.size)
        if len(segments) > 1 and segments[-1]["first_step"] == first_step:
            record_event(directory, "new_plan", segment=len(segments) - 1, **segments[-1])
        line.say(_opening(settings, model, world.size, first_step, order.packs_at(first_step), metrics.endpoint))
        if resumed and changed:
            line.say("changed since the last start: " + ", ".join(f"{name} {a!r} -> {b!r}" for name, a, b in changed))

    bad_steps = 0
    stopping = False
    spread = place.num_nodes > 1 and settings.data.lanes > 1  # no node plans all lanes
    speaks = place.rank_in_node == 0 and world.rank % sharing == 0
    nodes = NodeSums(world, place.node, place.num_nodes, speaks) if spread else None
    pin = world.device.type == "cuda"
    stream = Stream(store, order, settings.data, packs_per_micro_batch, place, settings.run.seed, nodes, pin=pin)
    closing.callback(stream.close)
    norms = Norms(engine, world, settings.metrics.norms_every_steps)
    saver = Saver(checkpoints, settings, world, restart_generation)
    closing.callback(saver.close)
    for step in stream if first_step < settings.training.steps else ():
        profiler.step()
        phases.add("data", stream.wait_seconds)

        # Forward and backward: every micro-batch adds its part of the step's one mean loss and gradient.
        nats = torch.zeros(len(stream.loss_groups), device=world.device)  # by objective and source
        model.z_sum = 0.0
        for number, batch in enumerate(step.micro_batches):
            last = number == len(step.micro_batches) - 1
            nats += engine.micro_batch(batch.to(world.device), step.num_labels, last)
        with phases("communication"):
            votes = [float(stop.requested), float(saver.written)]
            told = world.sum_([*nats.tolist(), float(model.z_sum), *votes, *phases.busy_row(seat)])
        nats_by_group, (z_sum, stop_votes, written, *busy) = told[: len(nats)], told[len(nats) :]
        loss = math.fsum(nats_by_group) / step.num_labels
        with phases("optimizer"):
            gradient_norm = engine.gradient_norm()

        # Update, unless the step is bad; loss and norm are equal on all ranks, so all decide alike.
        bad = not math.isfinite(loss + gradient_norm)
        rate = learning_rate(step.number, settings)
        done = step.number + 1
        norms.before_update(done)
        with phases("optimizer"):
            engine.update(rate, skip=bad)
        bad_steps = bad_steps + 1 if bad and not engine.scales_loss else 0

        # Tell.
        if bad:
            parts = _of_all_nodes(_documents(store, step), place, world)
            if world.rank == 0:
                documents = [document for part in parts for document in part]
                record_event(directory, "step_skipped", step=done, reason="not finite", documents=documents)
            line.say(
                f"step {done}: skipped, loss {loss:g}, gradient norm {gradient_norm:g}; its documents: events.jsonl"
            )
        slowest_rank, lag = slowest(busy)
        seconds = metrics.lap()
        metrics.record_step(
            StepRecord(
                step=done,
                loss=loss,
                gradient_norm=gradient_norm,
                learning_rate=rate,
                targets=step.num_labels,
                positions=step.num_tokens,
                padding=step.num_padding,
                documents=step.num_documents,
                step_seconds=seconds,
                data_wait_seconds=stream.wait_seconds,
                compile_seconds=compile_time.take(),
                packs_document_limited=step.num_document_limited,
                fetched_bytes=store.remote.num_bytes if store.remote else 0,
                fetch_failures=store.remote.num_failures if store.remote else 0,
                imbalance=step.imbalance,
                imbalance_undealt=step.imbalance_undealt,
                flops=step_flops(settings, vocabulary, step),
                skipped=bad,
                parts=tuple(
                    LossGroup(*names, nats=part, targets=targets)
                    for names, part, targets in zip(
                        stream.loss_groups, nats_by_group, step.labels_by_group, strict=True
                    )
                    if targets
                ),
                z_loss=z_sum / step.num_labels,
                loss_scale=engine.loss_scale if settings.training.precision == "fp16" else None,
                norms=norms.after_update(),
                slowest_rank=slowest_rank,
                slowest_rank_lag_seconds=lag,
            ),
            phases.take(),
        )
        line.update(done, loss, step.num_tokens / seconds)
        if bad_steps == MAX_BAD_STEPS:
            raise UserError(
                f"{MAX_BAD_STEPS} steps in a row up to step {done} had no finite loss or gradient: the run diverged; "
                f"lower optimizer.learning_rate = {settings.optimizer.learning_rate} and resume from {checkpoints}"
            )

        # Evaluate and save.
        finished = done == settings.training.steps
        stopping = stop_votes > 0 and not finished
        if (
            settings.evaluation.every_steps
            and done % settings.evaluation.every_steps == 0
            and not (finished or stopping)
        ):
            metrics.begins("evaluation", done)
            with phases("evaluation"):
                evaluation = validation.run(engine.forward, world, packs=settings.evaluation.sequences)
            metrics.record_evaluation(done, evaluation.nats_per_token, evaluation.bits_per_byte, evaluation.seconds)
            line.say(f"step {done}: validation {evaluation}")
        ending, due = finished or stopping, saver.due(done)
        if ending or due or written == world.size:  # one save at a time: what is in flight is published first
            if ending:
                stop.save_begins()
            with phases("checkpoint"), _failure_told(directory, metrics):
                _tell_saved(saver.finish(must=False), directory, metrics, line)
        waits = ending or not settings.checkpoint.asynchronous
        if waits and (ending or due):
            metrics.begins("checkpoint", done)
        if ending or due:
            with phases("checkpoint"), _failure_told(directory, metrics):
                saver.begin(engine, {"step": done, "segments": segments, **_where(step.position, place, world)})
        if waits:
            with phases("checkpoint"), _failure_told(directory, metrics):
                _tell_saved(saver.finish(must=ending), directory, metrics, line)
        metrics.spent("checkpoint")
        if ending:
            break
    stop.save_begins()
    line.close()

    if stopping:
        metrics.close("stopped")
        if world.rank == 0:
            record_event(directory, "stopped", step=done)
            print(f"bigmodel: stopped at step {done}, saved in {checkpoints}; run the same command to go on")
        end_world()
        return EXIT_STOPPED

    # The end: the whole validation split, a sample of text, and where everything is.
    if settings.evaluation.at_end:
        metrics.begins("evaluation", settings.training.steps)
        evaluation = validation.run(engine.forward, world)
        tokenizer = Tokenizer.load(settings.data.directory / "tokenizer.json")
        sample, wrong_sources = "", None
        if settings.model.kind == "encoder_decoder":
            wrong_sources = validation.run_with_wrong_sources(engine.forward, world)
            sample = examples(engine.forward, tokenizer, validation.first_batch(), NUM_EXAMPLES, world.device)
        elif settings.model.kind == "decoder":
            sample = generate(engine.forward, tokenizer, tokens=SAMPLE_TOKENS, device=world.device)
        metrics.record_evaluation(
            settings.training.steps, evaluation.nats_per_token, evaluation.bits_per_byte, evaluation.seconds
        )
        if world.rank == 0:
            show_summary(settings, summarize(settings, evaluation, sample, segments, wrong_sources))
    metrics.close("finished")
    if world.rank == 0:
        record_event(directory, "finished", step=settings.training.steps)
    end_world()
    return EXIT_DONE


def _facts(engine: Engine, world: World) -> dict[str, Any]:
    """What the page says of the run as a whole; measured on rank 0, which tells it."""
    if world.rank > 0:
        return {}
    parameters = sum(math.prod(engine.shape(name)) for name in engine.names())
    return {"parameters": parameters, "device_peak_flops": device_peak_flops(world.device)}


def _tell_saved(saved: Saved | None, directory: Path, metrics: Metrics, line: LiveLine) -> None:
    if saved and saved.error:
        line.say(f"step {saved.step}: {saved.error}; training goes on, as checkpoint.on_failure says")
        _tell_failed(saved.step, saved.error, saved.reason, directory, metrics)
    elif saved:
        metrics.record_checkpoint(saved.step, saved.bytes, saved.seconds)


def _tell_failed(step: int, error: str, reason: str, directory: Path, metrics: Metrics) -> None:
    if metrics.writes:
        record_event(directory, "checkpoint_failed", step=step, error=error, reason=reason)
    metrics.record_failed_checkpoint(step, reason)


@contextmanager
def _failure_told(directory: Path, metrics: Metrics) -> Iterator[None]:
    """A failed save is told also where it ends the run."""
    try:
        yield
    except SaveError as error:
        _tell_failed(error.step, str(error), error.reason, directory, metrics)
        raise


def _where(position: Position, place: Place, world: World) -> dict[str, Any]:
    """Where the order of all lanes stands, and how far it is through the sources. Collective."""
    told = _of_all_nodes((position.cursor(), position.lane_progress()), place, world)
    lanes = {number: lane for _, part in told for number, lane in part.items()}
    progress = {name: asdict(source) for name, source in total_progress(position.plan, lanes).items()}
    return {"cursor": merge_cursors(cursor for cursor, _ in told), "progress": progress}


def _of_all_nodes(value: Value, place: Place, world: World) -> list[Value]:
    """Each node's value, on every rank. Collective."""
    if place.num_nodes == 1:
        return [value]
    told: list[Any] = world.gather_objects(value if place.rank_in_node == 0 else None)
    return told[:: world.size // place.num_nodes]


def _documents(store: ShardStore, step: Step) -> list[list[int | str]]:
    """[source, shard, row, first position, positions] of every chunk in a step: what a skipped step left out."""
    return [
        [store.sources[chunk.source], chunk.shard, chunk.row, chunk.start, chunk.length]
        for pack in step.packs
        for chunk in pack
    ]


def _opening(
    settings: Settings, model: Transformer, world_size: int, first_step: int, packs: int, endpoint: str
) -> str:
    size = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters())
    start = f"resuming at step {first_step}" if first_step else "starting"
    return (
        f"{start}: {size / 1e6:.1f} M parameters, {world_size} rank(s), {packs} packs of "
        f"{settings.data.sequence_length} tokens a step, run directory {settings.run.directory}, metrics on http://{endpoint}/metrics"
    )
