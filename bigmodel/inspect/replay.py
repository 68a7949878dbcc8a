"""`bigmodel replay`: a step of a run computed again, and which documents, sources and layers made its numbers.

In: a run directory, which is only read and may be in use; a step. From the newest checkpoint before it, the steps
between are trained again as the run did: same batches, dropout and learning rates, and without the updates that the run
skipped or left out. The step itself is computed and not applied. Out: a table; replay.json and replay.png; a list of
documents for data.exclude. Every rank runs `replay`; rank 0 prints and writes.

On as many ranks as the run had, with the same versions and devices, loss and gradient norm are the recorded ones to the
last bit. Elsewhere sums are added in another order: the difference and its bound are printed. The DeepSpeed JSON is the
recorded one, without what depends on the machines (`effective_now`).
Costs: the steps from the checkpoint on, and those of bigmodel/inspect/replay_step.py.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bigmodel.config.deepspeed_json import device_of
from bigmodel.config.settings import DataSettings, Settings, UserError, num_micro_batches, to_toml_table
from bigmodel.data.load.stream import Stream
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.plan.order import Order, describe_difference
from bigmodel.data.plan.read_before import Segment
from bigmodel.data.plan.segments import order_of_segment, resume_order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.inspect.replay_record import Record, Start, choose, read_record
from bigmodel.inspect.replay_step import Dissection
from bigmodel.inspect.replay_text import Outputs, Replayed, compared, in_words, write
from bigmodel.run_directory import changes, package_versions
from bigmodel.sizes import counted_noun
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.folder import newest_state
from bigmodel.training.exact_start import write_exactly
from bigmodel.training.expert_balance import ExpertBalance
from bigmodel.training.learning_rate import betas, learning_rate
from bigmodel.training.pruning import Pruner
from bigmodel.training.qk_clip import AttentionScores
from bigmodel.training.start import new_model
from bigmodel.training.teacher import open_teacher, refuse_another
from bigmodel.training.token_vectors import read_vectors
from bigmodel.training.zero.engine import Engine

SHOWN_EVERY = 10  # a line each so many steps that are trained again
HARMLESS = ("training.steps", "schedule.", "checkpoint.", "evaluation.", "metrics.", "run.", "restart.", "prepare.")


def replay(directory: Path, step: int, given: int | None, outputs: Outputs) -> None:
    """Compute step `step` (from 1) again, print the table and write the outputs. Collective.

    given: step of the checkpoint to begin from, 0: the initial weights; None: the newest before. Raises `UserError`
    where the step cannot be computed again.
    """
    record = read_record(directory)
    choices = choose(record, step, given)
    start = record.start(step)
    world = start_world(start.settings.training.collective_timeout_seconds)
    with ExitStack() as closing:
        closing.callback(end_world)
        world.on_rank_zero(outputs.begin)
        begun, found = _choose_whole(record, choices, world)
        effective, settings = effective_now(start, world.size)
        with _needs_data(record, step):
            store = ShardStore.of_run(settings.data, "train")
        _refuse_another_tokenizer(record, store, settings)
        data, order = _order_at(record, store, settings, found, step)
        settings = settings.model_copy(update={"data": data})
        engine, model = _engine_at(settings, effective, store, world, found)
        packs = effective["train_micro_batch_size_per_gpu"]
        place = _place(start, world)
        stream = _open(settings, store, order, packs, place, world)
        closing.callback(stream.close)
        with _needs_data(record, step):
            _train_again(record, stream, engine, model, settings, begun, step)
            batches = next(stream)
        measured = Dissection(engine, model, batches, place, packs).measure()
        if world.rank == 0:
            reasons = _differences(record, step, begun, place)
            checked = compared(measured, record.lines.get(step), reasons, step - begun, settings.training.precision)
            left_out = record.is_left_out(step)
            done = Replayed(directory, step, begun, world.size, measured, checked, store, record.lines, left_out)
            try:
                written = write(done, outputs)
            finally:  # a reader that has gone, as head, costs no file; a full disk costs no table
                print(in_words(done), flush=True)
            print(*written, sep="\n", flush=True)


def effective_now(start: Start, world_size: int) -> tuple[dict[str, Any], Settings]:
    """The DeepSpeed JSON and the settings of a start, for `world_size` ranks. Each has whole packed sequences: none are
    shared. State in files goes to memory, and hpZ's second copies go on another number of ranks."""
    effective, training = copy.deepcopy(start.deepspeed), start.settings.training
    zero = effective["zero_optimization"]
    effective.pop("sequence_parallel_size", None)
    if world_size != start.world_size:
        zero.pop("zero_hpz_partition_size", None)
    for name in ("offload_optimizer", "offload_param"):
        if device_of(zero.get(name)) == "nvme":
            zero[name] = {"device": "cpu"}
    size = effective["train_micro_batch_size_per_gpu"]
    rounds = num_micro_batches(training.global_batch_size, world_size, size)
    effective |= {"gradient_accumulation_steps": rounds, "train_batch_size": size * rounds * world_size}
    alone = {"sequence_parallel_ranks": 1, "expert_parallel_ranks": 1, "tensor_parallel_ranks": 1}
    training = training.model_copy(update=alone)
    return effective, start.settings.model_copy(update={"training": training})


def _place(start: Start, world: World) -> Place:
    """This rank's place in the data; on as many ranks as the run had, that of the run, wherever the nodes are now."""
    if world.size == start.world_size and world.size % start.node_size == 0:
        return Place(world.rank, world.size, start.node_size)
    return Place(world.rank, world.size, world.size)


@contextmanager
def _needs_data(record: Record, step: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{error}; a replay needs the texts: put them back. Possible without them: `bigmodel seen` lists the "
            f"documents of step {step} of {record.directory}, from manifest and length files"
        ) from None


def _choose_whole(record: Record, choices: list[int], world: World) -> tuple[int, checkpoint.Checkpoint | None]:
    """The first choice whose bytes are whole; (0, None): the initial weights. Collective."""
    damage = []
    for step in choices:
        if step == 0:
            return 0, None
        path = checkpoint.path_of(record.directory / "checkpoints", step)
        problems = checkpoint.verify(path, world)
        if not problems:
            return step, world.on_rank_zero(partial(checkpoint.open_own, path))
        damage.append(f"{path}: {problems[0]}")
    raise UserError(
        f"{damage[0]}; no checkpoint before this step is whole: restore one from a copy, or give --checkpoint 0"
    )


def _refuse_another_tokenizer(record: Record, store: ShardStore, settings: Settings) -> None:
    if record.tokenizer and record.tokenizer != store.manifest.tokenizer_sha256:
        raise UserError(
            f"data.directory = {settings.data.directory}: another tokenizer than the run's, so the same bytes cannot "
            "be read; restore the folder that the run was trained on. Possible without it: `bigmodel report`, and the "
            "documents of skipped steps in events.jsonl"
        )


def _order_at(
    record: Record, store: ShardStore, settings: Settings, found: checkpoint.Checkpoint | None, step: int
) -> tuple[DataSettings, Order]:
    """The plan that goes on or begins after the checkpoint, all lanes. Raises `UserError` where data or plan are
    others."""
    begun = found.state["step"] if found else 0
    plans = {one.step: one.new_plan for one in record.starts_of(begun + 1, step) if one.new_plan}
    if later := [first for first in plans if first > begun]:
        raise UserError(
            f"--step {step}: a new plan began after step {later[0]}, later than the checkpoint of step {begun}; steps "
            f"{begun + 1} to {later[0]} can be computed again from it; step {step} needs a checkpoint from step "
            f"{later[-1]} on"
        )
    latest = newest_state(record.directory / "checkpoints")
    segments = (latest or {"segments": []})["segments"]
    try:
        if begun in plans:
            return _new_plan(store, settings, found, segments, begun, plans[begun])
        if found:
            segments = found.state["segments"]
        if not segments:
            return settings.data, Order.of_run(store, settings)
        data, order = order_of_segment(store, settings.data, segments, len(segments) - 1 if found else 0)
        if found:
            order.restore(found.state["cursor"])
    except UserError as error:
        raise UserError(
            f"data.directory = {settings.data.directory}: the data is not what the run read: {error}; restore the "
            "folder, or its copy in data.remote. Possible without it: `bigmodel report`, and the documents of skipped "
            "steps in events.jsonl"
        ) from None
    return data, order


def _new_plan(
    store: ShardStore,
    settings: Settings,
    found: checkpoint.Checkpoint | None,
    segments: Sequence[Segment],
    begun: int,
    identity: Any,
) -> tuple[DataSettings, Order]:
    """The plan that began after the checkpoint: as a later checkpoint stores it; without one, as the run made it."""
    for number, segment in enumerate(segments):
        if (segment["first_step"], segment["identity"]) == (begun, identity):
            return order_of_segment(store, settings.data, segments, number)
    order, _ = resume_order(store, settings, found.state if found else None, new_plan=True)
    if order.plan.identity != identity:
        raise UserError(describe_difference(identity, order.plan.identity))
    return settings.data, order


def _engine_at(
    settings: Settings,
    effective: dict[str, Any],
    store: ShardStore,
    world: World,
    found: checkpoint.Checkpoint | None,
) -> tuple[Engine, Any]:
    """Engine and model in the state of the checkpoint, or at the beginning. Collective."""
    num_tokens = store.manifest.vocabulary + num_special_tokens(settings.data)
    begins = found is None
    vectors = read_vectors(settings, store, world) if begins and settings.model.vectors else None
    model = new_model(settings, effective, settings.model.num_rows(num_tokens), begins, vectors)
    model.teacher = open_teacher(settings, num_tokens, world)
    engine = Engine(model, settings, effective, world)
    if begins and settings.model.start_folder and settings.training.precision != "fp32":
        write_exactly(engine, settings)
    if found:
        refuse_another(model.teacher, found.state)
        checkpoint.load(found, engine, settings, world)
    return engine, model


def _open(settings: Settings, store: ShardStore, order: Order, packs: int, place: Place, world: World) -> Stream:
    return Stream(
        store,
        order,
        settings.data,
        packs,
        place,
        settings.run.seed,
        pin=world.device.type == "cuda",
        count_pairs=partial(visible_pairs, settings=settings.model),
        seeds_by_document=settings.model.draws_by_document,
        sampling=settings.training.scheduled_sampling,
    )


def _train_again(
    record: Record, stream: Stream, engine: Engine, model: Any, settings: Settings, begun: int, until: int
) -> None:
    """Train the steps after the checkpoint, up to the one before `until`. Collective."""
    pruner, experts = Pruner(settings.pruning, engine, begun), ExpertBalance(model)
    for number in range(begun + 1, until):
        step, then = next(stream), record.start(number).settings
        scores = AttentionScores(model, then, engine.world)
        scores.begin()
        experts.begin()
        for at, batch in enumerate(step.micro_batches, 1):
            engine.micro_batch(batch.to(engine.world.device), step.weight, at == len(step.micro_batches))
        if model.teacher:
            model.teacher.take()
        norm, clip = engine.gradient_norm(), scores.clip()
        skip = record.is_left_out(number) or not norm < float("inf")
        rate, momenta = learning_rate(step.number, then), betas(step.number, then)
        engine.update(rate, skip=skip, betas=momenta, row_factors=clip.row_factors)
        experts.move(engine.world.sum_(experts.take()), step.weight, skip=skip)
        pruner.step(number)
        if engine.world.rank == 0 and number % SHOWN_EVERY == 0:
            print(f"step {number} trained again", file=sys.stderr, flush=True)


def _differences(record: Record, step: int, begun: int, place: Place) -> list[str]:
    """Why loss and norm may differ from the recorded ones; empty: they must be equal to the last bit."""
    at, now = record.start(step), package_versions()
    found = []
    for start in record.starts_of(begun + 1, step):
        if start.world_size != place.world_size:
            found.append(f"{counted_noun(start.world_size, 'rank')} then, {place.world_size} now")
        elif start.node_size != place.node_size:
            found.append(f"nodes of {start.node_size} ranks then, of {place.node_size} now")
        found += [
            f"{name} {its} then, {now.get(name)} now" for name, its in start.versions.items() if its != now.get(name)
        ]
        changed = changes(_table(start), _table(at))
        found += [f"{name} = {its!r} on the way" for name, its, _ in changed if not name.startswith(HARMLESS)]
    if at.settings.training.sequence_parallel_ranks > 1:
        found.append(f"{at.settings.training.sequence_parallel_ranks} ranks shared a packed sequence then, none now")
    if at.settings.training.expert_parallel_ranks > 1:
        found.append(f"{at.settings.training.expert_parallel_ranks} ranks shared experts then, none now")
    if at.settings.training.tensor_parallel_ranks > 1:
        found.append(f"{at.settings.training.tensor_parallel_ranks} ranks shared matrices then, none now")
    return list(dict.fromkeys(found))


def _table(start: Start) -> dict[str, Any]:
    return {**to_toml_table(start.settings), "deepspeed": start.deepspeed}
