"""`bigmodel replay`: a step of a run computed again, and which documents, sources and layers made its numbers.

In: a run directory, which is only read and may be in use; a step. From the newest checkpoint before it, the steps
between are trained again as the run did: same batches, dropout and learning rate, and without the updates that the run
skipped or left out. The step itself is computed and not applied. Out: a table; replay.json; a list of documents for
data.exclude. Every rank runs `replay`; rank 0 prints and writes.

On the run's number of ranks, micro-batches, ZeRO stage and versions, loss and gradient norm are the recorded ones to
the last bit. Elsewhere sums are added in another order: the difference and its bound are printed.
Costs: the steps from the checkpoint on, and the passes of bigmodel/inspect/replay_step.py.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import DataSettings, Settings, UserError
from bigmodel.data.load.stream import Step, Stream
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.segments import order_of_segment
from bigmodel.data.plan.sharing import Place
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.inspect.replay_record import Record, choose, read_record
from bigmodel.inspect.replay_step import Dissection, Measured
from bigmodel.inspect.replay_text import Outputs, Replayed, compared, in_words, write
from bigmodel.model.attention_masks import visible_pairs
from bigmodel.run_directory import package_versions
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.exact_start import write_exactly
from bigmodel.training.learning_rate import betas, learning_rate
from bigmodel.training.pruning import Pruner
from bigmodel.training.start import new_model
from bigmodel.training.teacher import open_teacher, refuse_another
from bigmodel.training.token_vectors import read_vectors
from bigmodel.training.zero.engine import Engine

SHOWN_BEFORE = 10  # a line each so many steps that are trained again


def replay(directory: Path, step: int, given: int | None, gradients: int, outputs: Outputs) -> None:
    """Compute step `step` (from 1) again, print the table and write the outputs. Collective.

    given: step of the checkpoint to begin from, 0: the initial weights; None: the newest before. gradients: number of
    documents whose gradient norm is computed. Raises `UserError` where the step cannot be computed again.
    """
    record = read_record(directory)
    choices = choose(record, step, given)
    outputs.refuse(directory)
    settings = _alone(record.settings(step))
    world = start_world(settings.training.collective_timeout_seconds)
    with ExitStack() as closing:
        closing.callback(end_world)
        begun, found = _choose_whole(record, choices, world)
        effective, settings = resolve_deepspeed(settings, world.size)
        store = ShardStore.of_run(settings.data, "train")
        _refuse_another_tokenizer(record, store, settings)
        data, order = _order_at(record, store, settings, found, step)
        settings = settings.model_copy(update={"data": data})
        place = Place.of_rank(world.rank, world.size, world.ranks_per_node(), 1)
        engine, model = _engine_at(settings, effective, store, world, found)
        packs = effective["train_micro_batch_size_per_gpu"]
        stream = _open(settings, store, order, packs, place, world)
        closing.callback(stream.close)
        _train_again(record, stream, engine, model, settings, begun, step)
        dissection = Dissection(engine, model, next(stream), place, packs)
        measured = _measure(dissection, gradients)
        reasons = _differences(record, step, begun, effective, world)
        if world.rank == 0:
            line = record.lines.get(step)
            checked = compared(measured, line, reasons, step - begun, settings.training.precision)
            done = Replayed(directory, step, begun, world.size, measured, checked, store, record.is_left_out(step))
            print(in_words(done))
            write(done, outputs)


def _measure(dissection: Dissection, gradients: int) -> Measured:
    """Documents by their loss above the step's mean."""
    measured = dissection.whole()
    dissection.documents(measured)
    measured.parts.sort(key=lambda part: part.rank_key(measured.loss))
    dissection.sources(measured)
    dissection.worst(measured, gradients)
    return measured


def _alone(settings: Settings) -> Settings:
    """Without what shares packed sequences among ranks: a replay gives each rank whole ones."""
    return settings.model_copy(update={"training": settings.training.model_copy(update={"sequence_parallel_ranks": 1})})


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
            f"data.directory = {settings.data.directory}: another tokenizer than the run's: the same bytes cannot be "
            "read; restore the folder the run was trained on. `bigmodel report` and events.jsonl need no data"
        )


def _order_at(
    record: Record, store: ShardStore, settings: Settings, found: checkpoint.Checkpoint | None, step: int
) -> tuple[DataSettings, Order]:
    """The plan that goes on after the checkpoint, all lanes. Raises `UserError` where data or plan are others."""
    state = found.state if found else checkpoint.newest_state(record.directory / "checkpoints")
    latest = checkpoint.newest_state(record.directory / "checkpoints") or {"segments": []}
    begun = found.state["step"] if found else 0
    if later := [one["first_step"] for one in latest["segments"] if begun < one["first_step"] < step]:
        raise UserError(
            f"--step {step}: a new plan began after step {later[0]}, later than the checkpoint of step {begun}; steps "
            f"{begun + 1} to {later[0]} can be replayed from it; step {step} needs a checkpoint from step {later[0]} on"
        )
    if state is None:
        return settings.data, Order.of_run(store, settings)
    segments = state["segments"]
    try:
        data, order = order_of_segment(store, settings.data, segments, len(segments) - 1 if found else 0)
        if found:
            order.restore(state["cursor"])
    except UserError as error:
        raise UserError(
            f"data.directory = {settings.data.directory}: the data is not what the run read: {error}; restore the "
            "folder, or its copy in data.remote; `bigmodel report` and events.jsonl need no data"
        ) from None
    return data, order


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
    pruner = Pruner(settings.pruning, engine, begun)
    for number in range(begun + 1, until):
        step: Step = next(stream)
        for at, batch in enumerate(step.micro_batches, 1):
            engine.micro_batch(batch.to(engine.world.device), step.weight, at == len(step.micro_batches))
        if model.teacher:
            model.teacher.take()
        norm = engine.gradient_norm()
        skip = record.is_left_out(number) or not norm < float("inf")
        rate = learning_rate(step.number, settings)
        engine.update(rate, skip=skip, betas=betas(step.number, settings))
        pruner.step(number)
        if engine.world.rank == 0 and number % SHOWN_BEFORE == 0:
            print(f"step {number} trained again", flush=True)


def _differences(record: Record, step: int, begun: int, effective: dict[str, Any], world: World) -> list[str]:
    """Why loss and norm may differ from the recorded ones; empty: they must be equal to the last bit."""
    found = []
    for number in range(begun + 1, step + 1):
        start = record.starts.get(number)
        then = record.deepspeed(number)
        if start and start.world_size != world.size:
            found.append(f"{start.world_size} ranks then, {world.size} now")
        for key, mine, its in (
            ("ZeRO stage", effective["zero_optimization"]["stage"], then.get("zero_optimization", {}).get("stage")),
            *(
                (key, effective[key], then.get(key))
                for key in ("train_micro_batch_size_per_gpu", "sequence_parallel_size")
                if key in effective or key in then
            ),
        ):
            if then and mine != its:
                found.append(f"{key} {its} then, {mine} now")
        versions, now = record.versions(number), package_versions()
        for name, then_version in versions.items():
            if then_version != now.get(name):
                found.append(f"{name} {then_version} then, {now.get(name)} now")
        if number < step and record.settings(number) != record.settings(step):
            found.append(f"step {number} had other settings")
    return list(dict.fromkeys(found))
