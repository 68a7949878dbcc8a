"""One rank of the tests of engine and checkpoints: runs a list of jobs in one process group.

`launch(jobs, world_size, folder)` starts the ranks, waits and returns one result per job. A job trains a small real
Transformer with dropout for some steps, on documents that depend on the step alone, and reports its results.
Process starts are expensive, so tests put all jobs of a world size into one launch.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bigmodel.checks.plain_torch import LOW, PlainTraining, distance
from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import DataSettings, ScheduledSamplingSettings, Settings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.load.own_inputs import with_own_inputs
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.model.init import generator_of, init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import saver as saving
from bigmodel.training.expert_balance import ExpertBalance
from bigmodel.training.learning_rate import betas, learning_rate
from bigmodel.training.optimizers.table import OPTIMIZERS
from bigmodel.training.start import empty_model
from bigmodel.training.trained import choose_trained
from bigmodel.training.zero.engine import Engine, forget_groups
from tests.support.ranks import run_ranks

VOCABULARY = 67
PACKS = 6  # per step; with 2 ranks and micro-batches of 2, one micro-batch of each step is half empty
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.05, "stochastic_depth": 0.1}
DATA = {"max_document_length": 24, "sequence_length": 24, "max_documents": 4}


def settings_table(
    folder: Path, stage: int, precision: str, packs_per_micro_batch: int, **other: Any
) -> dict[str, Any]:
    """The table of a run file; also writes the DeepSpeed JSON that it names."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": other.pop("persistence", 0)} | other.pop("zero", {})
    text = json.dumps(
        {
            "train_micro_batch_size_per_gpu": packs_per_micro_batch,
            "zero_optimization": zero,
            "fp16": FP16 | other.pop("fp16", {}),
        }
    )
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    (folder / name).write_text(text)
    model: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 40,
        "qk_norm": True,
    }
    asked = other.pop("model", None)
    draws = other.pop("draws", True)
    model = asked | {"dropout": 0.1} if asked else model | (DROPOUT if draws else {}) | other.pop("norms", {})
    model = model | {"tied_embeddings": other.pop("tied", False)}
    if rows := other.pop("vocabulary_multiple", 0):
        model["vocabulary_multiple"] = rows
    if experts := other.pop("experts", None):
        model["experts"] = experts
    training = {"steps": 20, "global_batch_size": PACKS, "precision": precision, "deepspeed": str(folder / name)}
    training |= other.pop("training", {})
    # A large epsilon keeps the update smooth in the gradient: another order of sums differs by rounding only.
    optimizer = {"learning_rate": 3e-3, "gradient_clipping": other.pop("clipping", 1.0)}
    optimizer |= other.pop("optimizer", {})
    if "epsilon" in OPTIMIZERS[optimizer.get("kind", "adamw")].reads:
        optimizer = {"epsilon": 1e-4} | optimizer
    schedule = other.pop("schedule", {"warmup_steps": 2})
    lora = other.pop("lora", {})
    assert not other, f"unused: {other}"
    return {
        "lora": lora,
        "model": model,
        "training": training,
        "optimizer": optimizer,
        "schedule": schedule,
        "data": DATA,
    }


def documents_of(step: int, pack: int) -> list[list[int]]:
    """Stored tokens of the documents of one pack, a function of step and pack alone. Packs differ in padding."""
    generator = torch.Generator().manual_seed(1000 * step + pack)
    lengths = [[9, 12, 4], [25], [3, 3], [16, 8], [5], [7, 2, 11]][pack]
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def batch_of(step: int, packs: range, end: int = PACKS, sampling: ScheduledSamplingSettings | None = None) -> Batch:
    """The micro-batch of these packs; packs from number `end` on are empty."""
    documents = [documents_of(step, pack) if pack < end else [] for pack in packs]
    flat = [document for pack in documents for document in pack]
    rows = iter(range(len(flat)))
    plan = [tuple(Chunk(0, 0, next(rows), 0, len(document) - 1, 0) for document in pack) for pack in documents]
    keys = make_dropout_seeds(1, step, packs, DATA["sequence_length"])
    batch = build_batch(plan, lambda chunk: torch.tensor(flat[chunk.row]).numpy(), DataSettings(**DATA), keys)
    if sampling is None:
        return batch
    named = [
        tuple(chunk._replace(row=pack, shard=n) for n, chunk in enumerate(one))
        for pack, one in zip(packs, plan, strict=True)
    ]
    return with_own_inputs(batch, named, 1, sampling.share_at(step), drawn=sampling.choice == "drawn")


def micro_batches_of(
    step: int, rank: int, size: int, packs_per_micro_batch: int, sampling: ScheduledSamplingSettings | None = None
) -> list[Batch]:
    share = -(-PACKS // size)
    mine = range(rank * share, (rank + 1) * share)
    return [
        batch_of(step, range(first, first + packs_per_micro_batch), min(mine.stop, PACKS), sampling)
        for first in range(mine.start, mine.stop, packs_per_micro_batch)
    ]


def num_targets_of(step: int) -> int:
    return sum(len(document) - 1 for pack in range(PACKS) for document in documents_of(step, pack))


def new_model(settings: Settings, effective: dict[str, Any] | None = None) -> Transformer:
    """With an effective DeepSpeed configuration partitioned or cut from the start, as the settings say."""
    if not effective:
        alone = settings.training.model_copy(update={"expert_parallel_ranks": 1, "tensor_parallel_ranks": 1})
        settings = settings.model_copy(update={"training": alone})
    stage_0 = {"zero_optimization": {"stage": 0}}
    model, whole = empty_model(settings, effective or stage_0, settings.model.num_rows(VOCABULARY))
    init_weights(model, 5, whole)
    for name, parameter in model.named_parameters():
        if ".lora." in name and name.endswith(".b.weight"):
            with torch.no_grad(), whole(parameter):  # the zeros of a start would hide the gradient of the other matrix
                parameter.copy_(torch.randn(parameter.shape, generator=generator_of(6, name)) * 0.1)
    choose_trained(model, settings)
    return model


FP16 = {"initial_scale_power": 10, "hysteresis": 1}
KEPT_STEPS = 2  # steps whose gradients the oracle keeps


def oracle(
    settings: Settings, steps: int, path: Path, packs_at_once: int = PACKS, wide: bool = False
) -> list[dict[str, float]]:
    """Train with plain torch in one process; return losses and norms; write gradients, weights and states to `path`.

    In bf16 and fp16, gradients of micro-batches of `packs_at_once` packs are summed in fp32, and masters are fp32.
    wide: all in float64, from the initial weights of the precision.
    """
    training = PlainTraining(new_model(settings), settings, wide)
    sampling = settings.training.scheduled_sampling
    tensors: dict[str, torch.Tensor] = {}
    seen: list[dict[str, float]] = []
    for step in range(steps):
        batches = [
            batch_of(step, range(first, first + packs_at_once), sampling=sampling)
            for first in range(0, PACKS, packs_at_once)
        ]
        loss = training.accumulate(batches, num_targets_of(step))
        if step < KEPT_STEPS:
            tensors |= {f"{step}.{name}": gradient for name, gradient in training.gradients().items()}
        seen.append({"loss": loss, "norm": training.update(step)})
    tensors |= {f"weight.{name}": weight for name, weight in training.weights().items()}
    tensors |= {f"ema.{name}": average for name, average in training.averages().items()}
    save_file(tensors | training.moments(), path)
    return seen


def plain_evaluation(settings: Settings) -> float:
    """The loss sum of step 0 by plain torch with the initial weights, without dropout."""
    with torch.no_grad():
        return float(new_model(settings).eval()(batch_of(0, range(PACKS))))


def state_digest(engine: Engine) -> str:
    digest = hashlib.sha256(str(engine.updates).encode())
    for name in engine.names():
        for key in engine.keys(name):
            digest.update(f"{key}.{name}".encode() + engine.whole(name, key).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def frozen_changed(engine: Engine, settings: Settings) -> list[str]:
    """Frozen parameters that are not those of the start, in the precision of the run, to the last bit."""
    first = dict(new_model(settings).to(LOW.get(settings.training.precision, torch.float32)).named_parameters())
    frozen = [name for name in engine.names() if name not in engine.trained() and name not in engine.buffers]
    return [name for name in frozen if not torch.equal(engine.whole(name, "weight"), first[name].float())]


def keeps_signed_zeros(engine: Engine) -> bool:
    """Whether every tensor of the state keeps -0.0. Destroys the state: call it last."""
    engine.write(lambda name, key, start, numel: torch.full((numel,), -0.0), 0, {})
    states = [engine.whole(name, key) for name in engine.names() for key in engine.keys(name)]
    return all(bool(torch.signbit(tensor).all()) for tensor in states)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def state_outside_files(tensors: list[torch.Tensor]) -> int:
    """Number of tensors that are not in a file of the state."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/bigmodel-state-" in line]
    ranges = [tuple(int(edge, 16) for edge in line[0].split("-")) for line in lines]
    return sum(not any(low <= tensor.data_ptr() < high for low, high in ranges) for tensor in tensors)


def run_job(job: dict[str, Any], world: World) -> dict[str, Any]:
    """Run a job. Result: per step loss, norm and gradient error; at the end digest and weight error."""
    forget_groups()
    effective, settings = resolve_deepspeed(Settings.model_validate(job["settings"]), world.size)
    packs_per_micro_batch = effective["train_micro_batch_size_per_gpu"]
    model = new_model(settings, effective)
    engine, experts = Engine(model, settings, effective, world), ExpertBalance(model)
    result: dict[str, Any] = {"losses": [], "norms": [], "gradient_errors": [], "gradient_distances": [], "first": 0}
    expected = load_file(job["oracle"]) if "oracle" in job else {}
    checkpoints = Path(job.get("checkpoints", "."))
    if job.get("resume"):
        found = checkpoint.newest(checkpoints, world)
        assert found is not None, f"no checkpoint in {checkpoints}"
        used: dict[str, list[float]] = {
            key: [] for key in ("losses", "norms")
        }  # stage 3 keeps small weights whole after the first update
        run_step(0, {}, engine, experts, settings, packs_per_micro_batch, {}, used)
        checkpoint.load(found, engine, settings, world)
        result |= {"first": found.state["step"], "loaded": state_digest(engine), "loaded_state": found.state}
    for step in range(result["first"], job["steps"]):
        for bad_rank in job["bad_ranks"] if "bad_ranks" in job and step in job["skip_at"] else [None]:
            if step not in job.get("leave_out", []):
                run_step(step, job, engine, experts, settings, packs_per_micro_batch, expected, result, bad_rank)
        if job.get("save_at") == step + 1:
            result["saved"] = state_digest(engine)
            saving.save(checkpoints, engine, {"step": step + 1, "cursor": {"at": step + 1}}, settings, world)
    result |= {"digest": state_digest(engine), "updates": engine.updates, "loss_scale": engine.loss_scale}
    result["is_at_smallest_scale"] = engine.is_at_smallest_scale
    result["frozen_changed"] = frozen_changed(engine, settings)
    tensors = engine.state_tensors()
    result |= {"state_tensors": len(tensors), "state_outside_files": state_outside_files(tensors)}
    result["micro_batches"] = effective["gradient_accumulation_steps"]
    for key in ("weight", "exp_avg", "ema") if expected else ():
        state = {name: engine.whole(name, key) for name in engine.trained() if key in engine.keys(name)}
        wanted = {name: expected[f"{key}.{name}"].view(tensor.shape) for name, tensor in state.items()}
        if state:
            result[f"{key}_error"] = max(relative_error(state[name], wanted[name]) for name in state)
            result[f"{key}_distance"] = distance(state, wanted)
    if expected:
        result["keeps_signed_zeros"] = keeps_signed_zeros(engine)
    return result


def run_step(
    step: int,
    job: dict[str, Any],
    engine: Engine,
    experts: ExpertBalance,
    settings: Settings,
    packs_per_micro_batch: int,
    expected: dict[str, torch.Tensor],
    result: dict[str, Any],
    bad_rank: int | None = None,
) -> None:
    """One step as in the loop. A step in `skip_at` gets an infinite gradient, on `bad_rank` or all, and is skipped."""
    world, targets, skip = engine.world, num_targets_of(step), step in job.get("skip_at", [])
    sharing = settings.training.ranks_per_sequence
    place = world.rank // sharing, world.size // sharing, packs_per_micro_batch
    batches = micro_batches_of(step, *place, settings.training.scheduled_sampling)
    if step in job.get("evaluate_at", []):
        outputs = [engine.forward(batches[0], kind) for kind in ("loss_sum", "loss_per_position", "logits")]
        result["shapes"] = [list(output.shape) for output in outputs]
        result["evaluated"] = [float(outputs[0]), float(outputs[1].sum())]
        result["training"] = engine.training
    divisor: Any = 1e-300 if skip and bad_rank in (None, world.rank) else targets
    experts.begin()
    nats = sum((float(engine.micro_batch(batch, divisor, batch is batches[-1])) for batch in batches), 0.0)
    norm = engine.gradient_norm()
    if skip:
        result.setdefault("taken_for_finite", []).append(any(world.gather_objects(math.isfinite(norm))))
    if not math.isfinite(norm):
        result.setdefault("skipped", []).append(step)
        skip = True
    if expected and step < KEPT_STEPS:
        gradients = {name: engine.gradient(name) for name in engine.trained()}
        wanted = {name: expected[f"{step}.{name}"] for name in gradients}
        result["gradient_errors"].append(max(relative_error(gradients[name], wanted[name]) for name in gradients))
        result["gradient_distances"].append(distance(gradients, wanted))
    engine.update(learning_rate(step, settings), skip=skip, betas=betas(step, settings))
    experts.move(world.sum_(experts.take()), targets, skip)
    if skip:
        result["skipped_norm"] = norm
    else:
        result["losses"].append(world.sum_([nats])[0] / targets)
        result["norms"].append(norm)


def launch(
    jobs: list[dict[str, Any]], world_size: int, folder: Path, timeout_seconds: float = 400.0
) -> list[dict[str, Any]]:
    """Run the jobs on `world_size` gloo ranks in new processes; one result per job. A failed rank fails the test."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(world_size, run_jobs, folder, timeout_seconds=timeout_seconds)
    return json.loads((folder / "results.json").read_text())


def run_jobs(folder: Path) -> None:
    """One rank. DeepSpeed refuses fp16 on CPUs without fp16 instructions; torch computes fp16 on all CPUs, slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    world = start_world(timeout_seconds=60)
    results = [run_job(job, world) for job in json.loads((folder / "jobs.json").read_text())]
    agreed = world.gather_objects([(result["losses"], result["norms"], result["digest"]) for result in results])
    assert all(other == agreed[0] for other in agreed), "ranks disagree on loss, norm or state"
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    end_world()
