"""One rank of the tests of pruning: small models in the engine; the same in plain torch with masks of NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigmodel.checks.plain_torch import plain_optimizer
from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import saver as saving
from bigmodel.training.learning_rate import learning_rate
from bigmodel.training.pruning import Pruner
from bigmodel.training.zero.engine import Engine
from tests.support.engine_worker import (
    PACKS,
    batch_of,
    micro_batches_of,
    new_model,
    num_targets_of,
    state_digest,
)


def sparsity_of(step: int, pruning: dict[str, Any]) -> float:
    """Zhu & Gupta 2017, equation 1, held between the steps that prune."""
    begin, end = pruning["begin_step"], pruning["end_step"]
    final, initial = (0.5 if pruning["kind"] == "2:4" else pruning["sparsity"]), pruning.get("initial_sparsity", 0.0)
    jumps = [step for step in range(begin, end) if (step - begin) % pruning["every_steps"] == 0] + [end]
    t = max((jump for jump in jumps if jump <= step), default=None)
    if t is None:
        return 0.0
    return final if end == begin else final + (initial - final) * (1.0 - (t - begin) / (end - begin)) ** 3


def kept_of(weight: np.ndarray, sparsity: float, kind: str) -> np.ndarray:
    """Where weights stay, by NumPy: of all, or of the two smallest of each 4, the smallest go."""
    sizes, wanted = np.abs(weight).ravel(), round(sparsity * weight.size)
    if kind == "2:4":
        ranks = np.argsort(np.argsort(sizes.reshape(-1, 4), axis=1, kind="stable"), axis=1).ravel()
        sizes = np.where(ranks < 2, sizes, np.inf)
    kept = np.ones(weight.size, dtype=bool)
    kept[np.argsort(sizes, kind="stable")[:wanted]] = False
    return kept.reshape(weight.shape)


def is_pruned(name: str) -> bool:
    return name.endswith(("query_key_value.weight", "output.weight", "gate_up.weight", "down.weight"))


def plain(table: dict[str, Any], steps: int) -> dict[str, Any]:
    """Losses, norms, zeros and weights of fp32 training in plain torch, with masked gradients and weights."""
    pruning, settings = table["pruning"], Settings.model_validate(table)
    model = new_model(settings)
    optimizer = plain_optimizer(model, settings.optimizer)
    pruned = {name: parameter for name, parameter in model.named_parameters() if is_pruned(name)}
    kept = {name: torch.ones_like(parameter) for name, parameter in pruned.items()}
    found: dict[str, Any] = {"losses": [], "norms": [], "shares": []}
    for step in range(steps):
        loss = model(batch_of(step, range(PACKS))) / num_targets_of(step)
        loss.backward()
        for name, parameter in pruned.items():
            parameter.grad *= kept[name]
        limit = settings.optimizer.gradient_clipping or float("inf")
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        found["losses"].append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings) * group["rate_factor"]
        optimizer.step()
        optimizer.zero_grad()
        sparsity = sparsity_of(step + 1, pruning)
        for name, parameter in pruned.items():
            with torch.no_grad():
                parameter *= kept[name]
                kept[name] = torch.from_numpy(kept_of(parameter.numpy(), sparsity, pruning["kind"])).float()
                parameter *= kept[name]
        found["shares"].append(sparsity)
    found["weights"] = {name: parameter.tolist() for name, parameter in pruned.items()}
    return found


def rank(folder: Path) -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    world = start_world(timeout_seconds=60)
    results = [run(job, world) for job in json.loads((folder / "jobs.json").read_text())]
    assert all(other == results for other in world.gather_objects(results)), "ranks disagree"
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    end_world()


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    effective, settings = resolve_deepspeed(Settings.model_validate(job["settings"]), world.size)
    model = new_model(settings, effective)
    engine, first = Engine(model, settings, effective, world), 0
    if job.get("resume"):
        found = checkpoint.newest(Path(job["checkpoints"]), world)
        assert found is not None
        checkpoint.load(found, engine, settings, world)
        first = found.state["step"]
    pruner = Pruner(settings.pruning, engine, first)
    result: dict[str, Any] = {"begun": state_digest(engine), "losses": [], "norms": [], "shares": [], "problems": []}
    for step in range(first, job["steps"]):
        batches = micro_batches_of(step, world.rank, world.size, effective["train_micro_batch_size_per_gpu"])
        targets = num_targets_of(step)
        nats = sum(float(engine.micro_batch(batch, targets, batch is batches[-1])) for batch in batches)
        result["norms"].append(engine.gradient_norm())
        engine.update(learning_rate(step, settings), skip=step in job.get("skip_at", []))
        pruner.step(step + 1)
        result["losses"].append(world.sum_([nats])[0] / targets)
        result["shares"].append(pruner.share)
        result["problems"] += problems(model, engine, step)
        if job.get("save_at") == step + 1:
            result["saved"] = state_digest(engine)
            saving.save(Path(job["checkpoints"]), engine, {"step": step + 1}, settings, world)
    result["digest"] = state_digest(engine)
    keys = {name: engine.keys(name) for name in engine.names() if is_pruned(name)}
    result["weights"] = {name: engine.whole(name, "weight").tolist() for name in keys}
    result["averages"] = {name: engine.whole(name, "ema").tolist() for name in keys if "ema" in keys[name]}
    return result


def problems(model: torch.nn.Module, engine: Engine, step: int) -> list[str]:
    """Pruned matrices whose weights of the forward pass are not the masters, rounded, on any rank."""
    found = []
    for name, parameter in model.named_parameters():
        if is_pruned(name):
            master = engine.whole(name, "weight").flatten()
            whole = getattr(parameter, "ds_tensor", None)
            here = parameter.detach().flatten() if whole is None else whole.detach().flatten()
            begin = 0 if whole is None else here.numel() * engine.world.rank
            wanted = master[begin : begin + here.numel()].to(here.dtype)
            if not torch.equal(here[: wanted.numel()], wanted):
                found.append(f"step {step}: {name}")
    return sorted({one for part in engine.world.gather_objects(found) for one in part})
