"""One rank of the tests of QK-clip: small models in the engine; the same in plain torch with dense scores."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.checks.plain_torch import plain_optimizer
from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.kernels.attention import attention
from bigmodel.kernels.mask import AttentionMask
from bigmodel.model import transformer
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import saver as saving
from bigmodel.training.learning_rate import learning_rate
from bigmodel.training.qk_clip import AttentionScores
from bigmodel.training.zero.engine import Engine, forget_groups
from tests.support.dense_attention import dense_largest_products
from tests.support.engine_worker import PACKS, batch_of, micro_batches_of, new_model, num_targets_of, state_digest

HEADS, KEY_HEADS, CHANNELS = 4, 2, 8  # of settings_table's model
JOINED = "attention.query_key_value"


def plain(table: dict[str, Any], steps: int) -> dict[str, Any]:
    """Losses, largest scores of each layer and head, and weights of fp32 training in plain torch."""
    settings = Settings.model_validate(table)
    model = new_model(settings)
    optimizer, limit = plain_optimizer(model, settings.optimizer), settings.optimizer.qk_clip
    found: dict[str, Any] = {"losses": [], "largest": [], "averages": {}}
    averages = {name: one.detach().clone() for name, one in model.named_parameters()}
    for step in range(steps):
        seen: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *rest: Any, seen=seen, **named: Any) -> Tensor:
            seen.append(dense_largest_products(q.detach(), k.detach(), mask))
            return attention(q, k, v, mask, *rest, **named)

        transformer.attention = attend
        try:
            loss = model(batch_of(step, range(PACKS))) / num_targets_of(step)
        finally:
            transformer.attention = attention
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings) * group["rate_factor"]
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        found["largest"].append([layer_H.tolist() for layer_H in seen])
        for layer, layer_H in enumerate(seen):
            scale_by_hand(model.blocks[layer].attention.query_key_value, layer_H.tolist(), limit)
        for name, one in model.named_parameters():
            averages[name].lerp_(one.detach(), 1 - settings.training.ema_decay)
    found["weights"] = {name: one.tolist() for name, one in model.named_parameters() if JOINED in name}
    found["averages"] = {name: one.tolist() for name, one in averages.items() if JOINED in name}
    return found


@torch.no_grad()
def scale_by_hand(joined: torch.nn.Linear, largest: list[float], limit: float) -> None:
    """Row by row: a key head takes the root of the mildest factor of its query heads, a query head what is left."""
    gammas = [min(1.0, limit / one) if one > 0 else 1.0 for one in largest]
    for key_head in range(KEY_HEADS):
        group = range(key_head * HEADS // KEY_HEADS, (key_head + 1) * HEADS // KEY_HEADS)
        kappa = max(gammas[head] for head in group) ** 0.5
        for channel in range(CHANNELS):
            rows = [(head * CHANNELS + channel, gammas[head] / kappa) for head in group]
            for row, factor in [*rows, ((HEADS + key_head) * CHANNELS + channel, kappa)]:
                joined.weight[row] *= factor
                joined.bias[row] *= factor


def rank(folder: Path) -> None:
    world = start_world(timeout_seconds=60)
    results = [run(job, world) for job in json.loads((folder / "jobs.json").read_text())]
    assert all(other == results for other in world.gather_objects(results)), "ranks disagree"
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    end_world()


def run(job: dict[str, Any], world: World) -> dict[str, Any]:
    forget_groups()
    effective, settings = resolve_deepspeed(Settings.model_validate(job["settings"]), world.size)
    model = new_model(settings, effective)
    engine, first = Engine(model, settings, effective, world), 0
    if job.get("resume"):
        found = checkpoint.newest(Path(job["checkpoints"]), world)
        assert found is not None
        checkpoint.load(found, engine, settings, world)
        first = found.state["step"]
    scores = AttentionScores(model, settings, world)
    keys = ("losses", "largest", "score", "heads", "problems")
    result: dict[str, Any] = {"begun": state_digest(engine)} | {key: [] for key in keys}
    sharing = settings.training.sequence_parallel_ranks
    for step in range(first, job["steps"]):
        place = world.rank // sharing, world.size // sharing, effective["train_micro_batch_size_per_gpu"]
        batches, targets = micro_batches_of(step, *place), num_targets_of(step)
        scores.begin()
        nats = sum(float(engine.micro_batch(batch, targets, batch is batches[-1])) for batch in batches)
        layers = [block.attention.largest_Q for block in model.blocks]
        result["largest"].append(world.largest(torch.stack(layers)).tolist())
        clip = scores.clip()
        engine.gradient_norm()
        skip = step in job.get("skip_at", [])
        before = state_digest(engine) if skip else ""
        engine.update(learning_rate(step, settings), skip=skip, row_factors=clip.row_factors)
        if skip:
            result["skipped"] = [before, state_digest(engine)]
        result["losses"].append(world.sum_([nats])[0] / targets)
        result["score"].append(clip.largest_score)
        result["heads"].append(clip.num_heads)
        result["problems"] += problems(model, engine, step)
        if job.get("save_at") == step + 1:
            result["saved"] = state_digest(engine)
            saving.save(Path(job["checkpoints"]), engine, {"step": step + 1}, settings, world)
    result["digest"] = state_digest(engine)
    names = [name for name in engine.names() if JOINED in name]
    result["weights"] = {name: engine.whole(name, "weight").tolist() for name in names}
    result["averages"] = {name: engine.whole(name, "ema").tolist() for name in names if "ema" in engine.keys(name)}
    return result


def problems(model: torch.nn.Module, engine: Engine, step: int) -> list[str]:
    """Weights of queries and keys in the forward pass that are not the masters, rounded, on any rank."""
    found = []
    for name, parameter in model.named_parameters():
        if JOINED in name:
            master = engine.whole(name, "weight").flatten()
            whole = getattr(parameter, "ds_tensor", None)
            here = parameter.detach().flatten() if whole is None else whole.detach().flatten()
            begin = 0 if whole is None else here.numel() * engine.world.rank
            wanted = master[begin : begin + here.numel()].to(here.dtype)
            if not torch.equal(here[: wanted.numel()], wanted):
                found.append(f"step {step}: {name}")
    return sorted({one for part in engine.world.gather_objects(found) for one in part})
