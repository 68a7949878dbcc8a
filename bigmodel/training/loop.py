"""The training loop: shards in, checkpoints out, one straight line.

In: settings. Out: an exit code (run_directory.EXIT_*), checkpoints, metrics. Every rank runs `train`; only rank 0
prints and writes the run directory.

A step: forward and backward of each micro-batch -> one sum over the ranks -> gradient norm -> update -> metrics ->
evaluation, checkpoint. All of it stands between `for step` and the end of that block.

Guarantees:
- Data, dropout and learning rate of a step depend only on the seed, the step number and the settings. A run that is
  killed and resumed repeats the uninterrupted run.
- All ranks skip a step together, before the update (`bigmodel.training.anomalies`). The step is recorded.

Cost of the loop itself: one all-reduce of a few numbers per step; it waits for the device.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.deepspeed_json import without_effect
from bigmodel.config.parallel_settings import degrees_of, refuse_across_nodes
from bigmodel.config.settings import Settings, UserError, to_toml_table
from bigmodel.data.advice.lane_advice import lane_warning, padding_warning
from bigmodel.data.load.stream import Step, Stream
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.plan.order import Order, merge_cursors, total_progress
from bigmodel.data.plan.segments import Segment, resume_order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.consistency import check_consistency
from bigmodel.distributed.rendezvous import name_rank
from bigmodel.distributed.signals import StopFlag, show_stacks_of_crashes
from bigmodel.distributed.world import NodeSums, World, end_world, limit_collectives, start_world
from bigmodel.evaluation.classify import make_validation
from bigmodel.evaluation.evaluate import Validation
from bigmodel.evaluation.training_tasks import TrainingTasks
from bigmodel.generation.far_labels import predicts_next_token
from bigmodel.generation.samples import examples, sample
from bigmodel.metrics.energy import Energy, Joules
from bigmodel.metrics.flops import device_peak_flops, step_flops
from bigmodel.metrics.hang_watch import Limits
from bigmodel.metrics.phases import CompileTime, Phases, lags, slowest
from bigmodel.metrics.profiling import Profiler
from bigmodel.metrics.progress import LiveLine
from bigmodel.metrics.recorder import Flops, LossGroup, Metrics, Seat, StepRecord, new_start
from bigmodel.metrics.slow_rank import SlowRank
from bigmodel.model.teacher import Teacher
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
from bigmodel.sizes import counted_noun
from bigmodel.training.anomalies import Anomalies
from bigmodel.training.attention_kernel import resolve_attention_kernel, use_attention_kernel
from bigmodel.training.best import Judge
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.identity import settle
from bigmodel.training.checkpoint.remote import steps as remote_steps
from bigmodel.training.checkpoint.rescue import Rescue
from bigmodel.training.checkpoint.saver import Saved, Saver, Waiting
from bigmodel.training.class_summary import summarize_classes
from bigmodel.training.divergence import Course
from bigmodel.training.exact_start import write_exactly
from bigmodel.training.expert_balance import ExpertBalance
from bigmodel.training.imports import import_engine
from bigmodel.training.learning_rate import betas, learning_rate
from bigmodel.training.new_plan import announce
from bigmodel.training.pruning import Pruner
from bigmodel.training.qk_clip import AttentionScores
from bigmodel.training.spikes import forget, is_trained_on, read_rewinds, remove_trained_on
from bigmodel.training.start import new_model
from bigmodel.training.summary import show_summary, summarize
from bigmodel.training.teacher import in_words, open_teacher, refuse_another, state_of
from bigmodel.training.token_vectors import read_vectors
from bigmodel.training.trained import active_of, passes, size_of
from bigmodel.training.zero.engine import Engine
from bigmodel.training.zero.norms import Norms

SAMPLE_TOKENS = 200  # length of the text generated at the end of the run
NUM_EXAMPLES = 3  # examples shown at the end of an encoder-decoder's run


@dataclass(frozen=True)
class _Start:
    """Where this start begins: number of steps done, the order of the coming data, the plans so far."""

    step: int
    order: Order
    segments: list[Segment]
    state: dict[str, Any]  # of the checkpoint; {}: none
    run: str  # the run's id


@dataclass(frozen=True)
class _Sums:
    """Sums of a step over all ranks."""

    nats_by_group: list[float]  # loss by objective and source
    z_loss: float
    divergence: float  # from the teacher
    plain_nats: float  # without class weights and focal factor; 0: there are none
    joules: Joules  # of all devices, of all hosts
    stop_votes: float  # number of ranks that got a signal to stop
    written_votes: float  # number of ranks that have written their file of the checkpoint being saved
    of_experts: list[float]  # `ExpertBalance.take`
    busy_seconds: list[float]  # by rank, in the previous step


def train(settings: Settings, fresh: bool = False, new_plan: bool = False) -> int:
    """Train to `training.steps`, from the newest good checkpoint in the run directory or from step 0.

    `fresh` sets checkpoints aside. `new_plan` continues with a new data order: see `bigmodel.data.plan.segments`.

    Raises `UserError` for what a user can fix: contradicting settings, damaged data or checkpoints, a full disk.
    """
    with ExitStack() as closing:  # however the run ends, no thread, hidden terminal cursor or metrics address remains
        return _train(settings, fresh, new_plan, closing)


def _train(settings: Settings, fresh: bool, new_plan: bool, closing: ExitStack) -> int:
    show_stacks_of_crashes()
    world = start_world(settings.training.collective_timeout_seconds)
    stop = StopFlag()  # before, a signal ends this process at once: it waits for others and has nothing to save
    _refuse_wide_heads(settings, world)
    directory = settings.run.directory
    world.on_rank_zero(lambda: claim(directory))
    restart_generation = world.on_rank_zero(lambda: take_over(directory))
    check_consistency(world, settings)

    # The data and the model.
    effective, settings = resolve_deepspeed(settings, world.size)
    settings, fastest = resolve_attention_kernel(settings, effective["train_micro_batch_size_per_gpu"], world)
    store = ShardStore.of_run(settings.data, "train")
    place, seat = _seats(world, settings.training.ranks_per_sequence)
    refuse_across_nodes(settings, seat.local_size)
    validation = make_validation(settings.data, effective["train_micro_batch_size_per_gpu"])
    tasks = TrainingTasks(settings, world, effective["train_micro_batch_size_per_gpu"])
    num_tokens = store.manifest.vocabulary + num_special_tokens(settings.data)
    vocabulary = settings.model.num_rows(num_tokens)
    begins = fresh or not _has_checkpoint(settings, world)
    vectors = read_vectors(settings, store, world) if begins and settings.model.vectors else None
    model = new_model(settings, effective, vocabulary, begins, vectors)
    use_attention_kernel(model, settings, world.device)
    model.teacher = open_teacher(settings, num_tokens, world)
    phases, compile_time = Phases(world.device), CompileTime()
    import_engine()
    engine = Engine(model, settings, effective, world, phases)
    if begins and settings.model.start_folder and settings.training.precision != "fp32":
        write_exactly(engine, settings)
    limit_collectives(settings.training.collective_timeout_seconds)

    # The place to start from, and the reports.
    start = _find_start(settings, store, place, engine, world, fresh, new_plan)
    refuse_another(model.teacher, start.state)
    pruner = Pruner(settings.pruning, engine, start.step)
    scores, experts = AttentionScores(model, settings, world), ExpertBalance(model, settings.metrics.norms_every_steps)
    metrics = _open_metrics(settings, start.step, seat, fresh, engine, world)
    closing.callback(metrics.close)
    phases.entered = metrics.enter
    energy = Energy(metrics.gpu, seat.local_rank == 0)
    profiler = Profiler(metrics.folder, world.rank)
    closing.callback(profiler.close)
    line = LiveLine(start.step, settings.training.steps, enabled=world.rank == 0)
    closing.callback(line.close)
    if world.rank == 0:
        _report_start(settings, effective, model, world, start, metrics, line)
        if fastest:
            line.say(fastest)
            record_event(directory, "attention_kernel", chosen=settings.training.attention_kernel, detail=fastest)
        if model.teacher:
            line.say(in_words(model.teacher, settings))
        if vectors:
            vectors.report(directory, line.say)
        if warning := lane_warning(store, settings):
            line.say(warning)
    vectors = None  # the model has a copy
    stream = _open_stream(settings, effective, store, start.order, place, world)
    closing.callback(stream.close)
    norms = Norms(engine, world, settings.metrics.norms_every_steps, settings.optimizer.has_penalty)
    saver = Saver(directory / "checkpoints", settings, world, restart_generation, phases, start.run)
    closing.callback(saver.close)
    rescue = Rescue(engine, settings, world, place.num_nodes, restart_generation, start.run)
    closing.push(rescue.on_exit)
    judge = Judge(settings, start.state)
    evaluate = partial(_evaluate, settings, validation, engine, world, metrics, phases, line, judge)
    unscored = start.state.get("unscored", False)  # a signal ended the run at this step, before its evaluation
    if start.step and _is_evaluated(start.step, settings) and (unscored or judge.lacks(start.step)):
        evaluate(start.step)
    if unscored and tasks.is_due(start.step):
        _score_tasks(tasks, start.step, engine, metrics, phases, line)

    anomalies = Anomalies(settings, engine, model, store, place, world, line, start.state)
    course = Course.resumed(directory, start.step) if metrics.writes else Course()
    done, passes_per_weight, slow_rank = start.step, passes(model), SlowRank()
    sampling = settings.training.scheduled_sampling
    for step in stream if start.step < settings.training.steps and not judge.stops else ():
        profiler.step()
        phases.add("data", stream.wait_seconds)
        done = step.number + 1

        # Forward and backward: each micro-batch adds its share of the step's mean loss and gradient.
        nats = torch.zeros(len(stream.loss_groups), device=world.device)  # by objective and source
        model.z_sum = model.plain_sum = 0.0
        scores.begin()
        experts.begin()
        for number, batch in enumerate(step.micro_batches, start=1):
            nats += engine.micro_batch(batch.to(world.device), step.weight, number == len(step.micro_batches))
        with phases("communication"):
            taught = model.teacher.take() if model.teacher else 0.0
            extra = [float(model.z_sum), taught, float(model.plain_sum), *energy.take()]
            votes = stop.requested, saver.written
            sums = _add_up(world, nats, extra, votes, experts.take(), phases.busy_row(seat))
        loss = math.fsum(sums.nats_by_group) / step.weight
        with phases("optimizer"):
            gradient_norm = engine.gradient_norm()

        clip = scores.clip()

        # Update, unless the step is bad. Loss and norm are equal on all ranks, so all ranks decide alike.
        reason = anomalies.judge(step, nats, loss, gradient_norm, metrics)
        bad = bool(reason)
        rate = learning_rate(step.number, settings)
        norms.before_update(done)
        rescue.update_begins()
        with phases("optimizer"):
            engine.update(rate, skip=bad, betas=betas(step.number, settings), row_factors=clip.row_factors)
            expert_loads = experts.move(sums.of_experts, step.weight, skip=bad)
            pruner.step(done)

        # Report.
        record = _step_record(
            step,
            sums,
            stream,
            store,
            step_flops(
                settings, vocabulary, step, passes_per_weight, model.teacher.model.settings if model.teacher else None
            ),
            loss=loss,
            unweighted_loss=sums.plain_nats / step.num_labels if settings.classification.reweights else None,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            skipped=bad,
            skip_reason=reason or "not_finite",
            step_seconds=metrics.lap(),
            compile_seconds=compile_time.take(),
            loss_scale=engine.loss_scale if settings.training.precision == "fp16" else None,
            distillation_loss=sums.divergence / step.weight if model.teacher else None,
            norms=norms.after_update(),
            pruned_share=pruner.share,
            largest_attention_score=clip.largest_score,
            clipped_heads=0 if bad and clip.num_heads else clip.num_heads,
            expert_loads=expert_loads,
            loads_by_expert=experts.by_expert(done),
            sampled_share=sampling.share_at(step.number) if sampling else None,
            slow_rank=slow_rank.see(sums.busy_seconds),
        )
        metrics.record_step(record, phases.take())
        slow = slow_rank.words(name_rank(slow_rank.now.rank)) if slow_rank.now else ""
        due = {"save": saver.next_step(done), "evaluation": _next_evaluation(done, settings)}
        line.update(done, loss, step.num_tokens / record.step_seconds, slow, metrics.utilization, due)
        anomalies.refuse_divergence(done, reason)

        # Evaluate and save.
        last = done == settings.training.steps
        ending = sums.stop_votes > 0 or last
        if _is_evaluated(done, settings) and (not ending or (last and judge.is_on)):
            evaluate(done)
            ending = ending or judge.stops
        if tasks.is_due(done) and not ending:
            _score_tasks(tasks, done, engine, metrics, phases, line)
        unscored = sums.stop_votes > 0 and not last and (_is_evaluated(done, settings) or tasks.is_due(done))
        if ending:
            stop.save_begins()
        state = partial(_state, step, start.segments, place, world, judge, unscored, model.teacher, anomalies)
        for news in saver.step(
            engine,
            done,
            sums.written_votes,
            ending,
            anomalies.agreed(done, state),
            asked=judge.is_best(done),
            left_course=course.see(done, loss, bad),
        ):
            _report_save(news, directory, metrics, line)
        metrics.spent("checkpoint")
        rescue.step_ends(done, state)
        if ending:
            break
    stop.save_begins()
    line.close()
    engine.report_collectives()
    is_finished = done >= settings.training.steps or judge.stops
    if judge.stops and done < settings.training.steps:
        _report_early_end(done, judge, directory, world, line)
    if settings.evaluation.at_end and is_finished:
        if tasks.given:
            _score_tasks(tasks, done, engine, metrics, phases, line)
        with phases("evaluation"):  # it has no usual length: bigmodel/metrics/hang_watch.py
            evaluate_at_end(_ended_at(done, settings), validation, engine, world, metrics, start.segments)
    return _end(done, is_finished, directory, metrics, world)


def _refuse_wide_heads(settings: Settings, world: World) -> None:
    is_wide = settings.model.resolved_head_dim > 256 and not settings.model.is_recurrent
    if world.device.type == "cuda" and is_wide:
        raise UserError(
            f"model.hidden_size / model.num_heads = {settings.model.resolved_head_dim}: the GPU kernels take "
            "heads of at most 256 channels; raise model.num_heads"
        )


def _seats(world: World, sharing: int) -> tuple[Place, Seat]:
    """This rank's place in the data and on the machines. Collective.

    sharing: number of ranks that share each packed sequence.
    """
    ranks_per_node = world.ranks_per_node()
    node, local_rank = divmod(world.rank, ranks_per_node)
    place = Place.of_rank(world.rank, world.size, ranks_per_node, sharing)
    return place, Seat(world.rank, world.size, node, local_rank, ranks_per_node)


def _has_checkpoint(settings: Settings, world: World) -> bool:
    """Whether the run has one to resume from, here or in its store."""
    local, remote = settings.run.directory / "checkpoints", settings.checkpoint.remote
    return world.on_rank_zero(lambda: bool(checkpoint.steps(local) or (remote and remote_steps(remote))))


def _find_start(
    settings: Settings, store: ShardStore, place: Place, engine: Engine, world: World, fresh: bool, new_plan: bool
) -> _Start:
    """Load the newest good checkpoint, if any, into the engine. Collective. Raises what `train` raises."""
    directory, remote = settings.run.directory, settings.checkpoint.remote
    checkpoints = directory / "checkpoints"
    if fresh:
        world.on_rank_zero(lambda: checkpoint.set_aside(checkpoints, remote))
        world.on_rank_zero(lambda: forget(directory))
        world.on_rank_zero(lambda: record_event(directory, "fresh", step=0))
    rewinds = world.on_rank_zero(lambda: read_rewinds(directory))
    world.on_rank_zero(lambda: remove_trained_on(checkpoints, rewinds))
    resumed = checkpoint.newest(checkpoints, world, remote=remote, refused=lambda step: is_trained_on(step, rewinds))
    if not resumed and not fresh:
        world.on_rank_zero(lambda: refuse_to_start_over(directory))
    lanes = place.lanes(settings.data.lanes)
    order, segments = resume_order(store, settings, resumed.state if resumed else None, new_plan, lanes)
    order.require(settings.training.steps)
    if resumed:
        checkpoint.load(resumed, engine, settings, world)
    run = world.on_rank_zero(lambda: settle(directory, resumed.description if resumed else None, fresh))
    state = resumed.state if resumed else {}
    return _Start(state.get("step", 0), order, segments, state, run)


def _open_metrics(
    settings: Settings, first_step: int, seat: Seat, fresh: bool, engine: Engine, world: World
) -> Metrics:
    """Collective: all ranks of a start share one random token."""
    directory = settings.run.directory
    start = world.on_rank_zero(lambda: new_start(directory))
    limits = Limits(settings.training.hang_seconds, settings.training.collective_timeout_seconds)
    return Metrics(directory, settings.metrics, first_step, seat, start, fresh, _facts(settings, engine, world), limits)


def _report_start(
    settings: Settings,
    effective: dict[str, Any],
    model: Transformer,
    world: World,
    start: _Start,
    metrics: Metrics,
    line: LiveLine,
) -> None:
    """Write the files and events of a start and print its lines; on rank 0."""
    directory, segments = settings.run.directory, start.segments
    changed = record_start(directory, to_toml_table(settings), effective, settings.data.directory)
    record_event(directory, "start", step=start.step, world_size=world.size)
    if len(segments) > 1 and segments[-1]["first_step"] == start.step:
        for text in announce(directory, ShardStore.of_run(settings.data, "train"), settings, segments):
            line.say(text)
    packs = start.order.packs_at(start.step)
    line.say(_opening(settings, model, world.size, start.step, packs, metrics.endpoint))
    places = world.size // settings.training.ranks_per_sequence
    if warning := padding_warning(packs, places, effective["train_micro_batch_size_per_gpu"]):
        line.say(warning)
    if effective["zero_optimization"].get("overlap_comm"):
        line.say("warning: zero_optimization.overlap_comm = true: DeepSpeed's issue 5545, a data race, is open")
    if ignored := list(without_effect(effective)):
        line.say(f"no effect here, {settings.training.deepspeed}: " + "; ".join(ignored))
    if start.step and changed:
        line.say("changed since the last start: " + ", ".join(f"{name} {a!r} -> {b!r}" for name, a, b in changed))


def _open_stream(
    settings: Settings, effective: dict[str, Any], store: ShardStore, order: Order, place: Place, world: World
) -> Stream:
    """The steps of this rank; reading ahead begins here. Collective if the lanes are planned by several nodes."""
    nodes = None
    if place.num_nodes > 1 and settings.data.lanes > 1:
        speaks = place.rank_in_node == 0 and world.rank % settings.training.ranks_per_sequence == 0
        nodes = NodeSums(world, place.node, place.num_nodes, speaks)
    packs_per_micro_batch = effective["train_micro_batch_size_per_gpu"]
    pin = world.device.type == "cuda"
    count_pairs = partial(visible_pairs, settings=settings.model)
    return Stream(
        store,
        order,
        settings.data,
        packs_per_micro_batch,
        place,
        settings.run.seed,
        nodes,
        pin=pin,
        count_pairs=count_pairs,
        seeds_by_document=settings.model.draws_by_document,
        sampling=settings.training.scheduled_sampling,
    )


def _add_up(
    world: World,
    nats: Tensor,
    extra: Sequence[float],
    votes: tuple[bool, bool],
    of_experts: Sequence[float],
    busy_row: Sequence[float],
) -> _Sums:
    """All sums of a step over the ranks, in one all-reduce. Waits for the device. Collective.

    extra: this rank's z-loss, divergence, plain loss, joules of its device and of its host. votes: whether it is asked
    to stop, and has written its file."""
    told = world.sum_([*nats.tolist(), *extra, *map(float, votes), *of_experts, *busy_row])
    z_loss, divergence, plain_nats, device, host, stop_votes, written_votes, *rest = told[len(nats) :]
    sums = told[: len(nats)], z_loss, divergence, plain_nats, Joules(device, host), stop_votes, written_votes
    return _Sums(*sums, rest[: len(of_experts)], rest[len(of_experts) :])


def _step_record(
    step: Step,
    sums: _Sums,
    stream: Stream,
    store: ShardStore,
    flops: Flops,
    **measured: Any,
) -> StepRecord:
    """measured: the fields that do not follow from the step's data and sums."""
    slowest_rank, lag = slowest(sums.busy_seconds)
    lag_ms, lag_ranks = lags(sums.busy_seconds)
    return StepRecord(
        step=step.number + 1,
        targets=step.num_labels,
        positions=step.num_tokens,
        padding=step.num_padding,
        documents=step.num_documents,
        data_wait_seconds=stream.wait_seconds,
        packs_document_limited=step.num_document_limited,
        fetched_bytes=store.remote.num_bytes if store.remote else 0,
        fetch_failures=store.remote.num_failures if store.remote else 0,
        imbalance=step.imbalance,
        imbalance_undealt=step.imbalance_undealt,
        flops=flops,
        parts=tuple(
            LossGroup(*names, nats=part, targets=targets, weight=None if weight == targets else weight)
            for names, part, targets, weight in zip(
                stream.loss_groups, sums.nats_by_group, step.labels_by_group, step.weights_by_group, strict=True
            )
            if targets
        ),
        z_loss=sums.z_loss / step.weight,
        weight=None if step.weight == step.num_labels else step.weight,
        device_joules=None if math.isnan(sums.joules.device) else sums.joules.device,
        host_joules=None if math.isnan(sums.joules.host) else sums.joules.host,
        slowest_rank=slowest_rank,
        slowest_rank_lag_seconds=lag,
        lag_ms=lag_ms,
        lag_ranks=lag_ranks,
        **measured,
    )


def _is_evaluated(done: int, settings: Settings) -> bool:
    every_steps = settings.evaluation.every_steps
    return every_steps > 0 and done % every_steps == 0


def _next_evaluation(done: int, settings: Settings) -> int:
    """The first step after `done` with an evaluation; 0: there is none."""
    every, last = settings.evaluation.every_steps, settings.training.steps
    due = (done // every + 1) * every if every else last
    if due >= last:
        return last if settings.evaluation.at_end and done < last else 0
    return due


def _score_tasks(
    tasks: TrainingTasks, done: int, engine: Engine, metrics: Metrics, phases: Phases, line: LiveLine
) -> None:
    """Score lm_eval's tasks after `done` steps, record and print the scores. Collective."""
    metrics.begins("evaluation", done)
    with phases("evaluation"):
        found = tasks.run(engine.forward)
    metrics.record_tasks(done, found.scores, found.seconds)
    line.say(f"step {done}: tasks: {found}")


def _evaluate(
    settings: Settings,
    validation: Validation,
    engine: Engine,
    world: World,
    metrics: Metrics,
    phases: Phases,
    line: LiveLine,
    judge: Judge,
    done: int,
) -> None:
    """Evaluate during training, after `done` steps. Collective."""
    metrics.begins("evaluation", done)
    with phases("evaluation"):
        evaluation = validation.run(engine.forward, world, packs=settings.evaluation.sequences)
    metrics.record_evaluation(done, **evaluation.recorded())
    judge.see(done, evaluation)
    line.say(f"step {done}: validation {evaluation}{', the best so far' if judge.is_best(done) else ''}")


def _report_early_end(done: int, judge: Judge, directory: Path, world: World, line: LiveLine) -> None:
    line.say(f"step {done}: the run ends early: {judge.reason}")
    if world.rank == 0:
        record_event(directory, "stopped_early", step=done, reason=judge.reason)


def _ended_at(done: int, settings: Settings) -> Settings:
    """The settings of a run of `done` steps."""
    return settings.model_copy(update={"training": settings.training.model_copy(update={"steps": done})})


def _report_save(news: Saved | Waiting, directory: Path, metrics: Metrics, line: LiveLine) -> None:
    if isinstance(news, Waiting):
        metrics.begins("checkpoint", news.step)
    elif not news.error:
        metrics.record_checkpoint(news.step, news.bytes, news.seconds)
    else:
        if not news.ends_run:
            line.say(f"step {news.step}: {news.error}; training continues")
        if metrics.writes:
            record_event(directory, "checkpoint_failed", step=news.step, error=news.error, reason=news.reason)
        metrics.record_failed_checkpoint(news.step, news.reason)


def evaluate_at_end(
    settings: Settings,
    validation: Validation,
    engine: Engine,
    world: World,
    metrics: Metrics,
    segments: Sequence[Segment],
) -> None:
    """Evaluate the whole validation split, generate a sample, write and print the summary. Collective."""
    metrics.begins("evaluation", settings.training.steps)
    evaluation = validation.run(engine.forward, world)
    if evaluation.scores:
        metrics.record_evaluation(settings.training.steps, **evaluation.recorded())
        if world.rank == 0:
            summarize_classes(settings, evaluation)
        return
    tokenizer = Tokenizer.load(settings.data.directory / "tokenizer.json")
    shown, wrong_sources = "", None
    if settings.model.has_source:
        wrong_sources = validation.run_with_wrong_sources(engine.forward, world)
        asked = validation.first_batch(), NUM_EXAMPLES, world.device, settings.data.target_ahead
        shown = examples(engine.forward, tokenizer, *asked)
    elif settings.model.kind != "encoder" and predicts_next_token(settings):
        shown = sample(engine.forward, tokenizer, SAMPLE_TOKENS, world.device)
    metrics.record_evaluation(settings.training.steps, **evaluation.recorded())
    if world.rank == 0:
        show_summary(settings, summarize(settings, evaluation, shown, segments, wrong_sources))


def _end(done: int, is_finished: bool, directory: Path, metrics: Metrics, world: World) -> int:
    """Record the end of the run after `done` steps; returns the exit code. Collective."""
    stopped = not is_finished
    metrics.close("stopped" if stopped else "finished")
    if world.rank == 0:
        record_event(directory, "stopped" if stopped else "finished", step=done)
    if world.rank == 0 and stopped:
        checkpoints = directory / "checkpoints"
        print(f"bigmodel: stopped at step {done}, saved in {checkpoints}; run the same command to go on")
    end_world()
    return EXIT_STOPPED if stopped else EXIT_DONE


def _facts(settings: Settings, engine: Engine, world: World) -> dict[str, Any]:
    """Run-level gauges for the metrics endpoint; computed on rank 0, empty on other ranks."""
    if world.rank > 0:
        return {}
    parameters = sum(math.prod(engine.shape(name)) for name in engine.names() if name not in engine.buffers)
    return {
        "planned_steps": settings.training.steps,
        "parameters": parameters,
        "device_peak_flops": device_peak_flops(world.device),
        "peak_is_measured": world.device.type != "cuda",
    }


def _state(
    step: Step,
    segments: Sequence[Segment],
    place: Place,
    world: World,
    judge: Judge,
    unscored: bool,
    teacher: Teacher | None,
    anomalies: Anomalies,
) -> dict[str, Any]:
    """State for a checkpoint: cursors of all lanes, progress through the sources, the best evaluation, the teacher, the
    windows of spikes. Collective on several nodes.

    unscored: what is to be scored after this step waits for the next start.
    """
    position = step.position
    mine = (position.cursor(), position.lane_progress())
    told = world.of_nodes(mine, place.num_nodes, place.rank_in_node == 0)
    lanes = {number: lane for _, part in told for number, lane in part.items()}
    progress = {name: asdict(source) for name, source in total_progress(position.plan, lanes).items()}
    cursor = merge_cursors(cursor for cursor, _ in told)
    state = {"step": step.number + 1, "segments": segments, "cursor": cursor, "progress": progress, **judge.state()}
    return state | anomalies.state() | state_of(teacher) | ({"unscored": True} if unscored else {})


def _opening(
    settings: Settings, model: Transformer, world_size: int, first_step: int, packs: int, endpoint: str
) -> str:
    """The first line of a start: model, ranks, step, and where to look."""
    size = sum(map(size_of, model.parameters()))
    trained = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    parts = [f"{active_of(model):,} active"] if settings.model.experts else []
    parts += [f"{trained:,} trained"] if trained < size else []
    of_them = f" ({', '.join(parts)})" if parts else ""
    degrees = degrees_of(settings.training)
    shared = f" ({degrees})" if degrees else ""
    start = f"resuming at step {first_step}" if first_step else "starting"
    return (
        f"{start}: {size:,} parameters{of_them}, {counted_noun(world_size, 'rank')}{shared}, "
        f"{counted_noun(packs, 'packed sequence')} of {settings.data.sequence_length} tokens a step, "
        f"run directory {settings.run.directory}, metrics on http://{endpoint}/metrics"
    )
