"""One rank of `bigmodel check RUN.toml exact`: trains under DeepSpeed and compares with plain torch.

In: a folder with job.json and the reference. Out: report.json, by rank 0: the rows of the run's own DeepSpeed JSON; if
one is out of bounds, the keys of the JSON that matter; gradient norms by ZeRO stage.
Usage: python -m bigmodel.checks.exact_rank FOLDER
"""

import copy
import gc
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.checks.exact_steps import Reference, Row, Trace, first_steps, new_start, number_row
from bigmodel.config.deepspeed_config import DEFAULTS, agree
from bigmodel.config.deepspeed_json import passed, value_at
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.load.stream import Step
from bigmodel.data.plan.sharing import Place
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.run_directory import append_json_line, write_json
from bigmodel.training.exact_start import write_exactly
from bigmodel.training.expert_balance import ExpertBalance
from bigmodel.training.learning_rate import betas, learning_rate
from bigmodel.training.zero.engine import Engine, forget_groups

Effective = dict[str, Any]
# Keys that make no difference to compare, or without which DeepSpeed does not start.
KEPT_KEYS = (
    "zero_optimization.stage",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "fp16.enabled",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


class Job(NamedTuple):
    """The content of job.json."""

    run_file: str
    overrides: list[str]
    steps: int
    effective: Effective  # the run's configuration
    by_stage: dict[str, Effective]  # the same under each ZeRO stage that is possible
    wanted: list[Any]  # the trace of plain torch in float64
    rounding: list[Any]  # that of plain torch in the run's precision


def run(folder: Path) -> None:
    """Collective."""
    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    settings = agree(load_settings(job.run_file, job.overrides))
    world = start_world(settings.training.collective_timeout_seconds)
    report = _Comparison(job, settings, world, folder).report()
    if world.rank == 0:
        write_json(folder / "report.json", report)
    end_world()


class _Comparison:
    """All methods are collective, and give the same on every rank."""

    def __init__(self, job: Job, settings: Settings, world: World, folder: Path) -> None:
        self._job, self._settings, self._world, self._folder = job, settings, world, folder
        self._reference = Reference(folder / "reference.safetensors", Trace(*job.wanted))

    def report(self) -> dict[str, Any]:
        rows = self._rows(self._job.effective)
        keys = [] if all(row.holds for row in rows) else self._guilty()
        bound = rows[1].bound  # of the gradient norm of step 1
        stages = self._job.by_stage.items()
        return {"rows": rows, "keys": keys, "norms": [row for one in stages for row in self._norms(*one, bound)]}

    def _guilty(self) -> list[str]:
        """The keys of the JSON without which all rows hold: each of them alone, or else all together."""
        keys = changed_keys(self._job.effective, self._settings)
        if not keys or not self._holds_without(keys):
            return []
        if len(keys) == 1:
            return keys
        return [key for key in keys if self._holds_without([key])] or keys

    def _holds_without(self, keys: Sequence[str]) -> bool:
        try:
            return all(row.holds for row in self._rows(without(self._job.effective, keys, self._settings)))
        except UserError:  # DeepSpeed refuses the other keys without these
            return False

    def _rows(self, effective: Effective) -> list[Row]:
        trace = self._train(effective)
        return self._reference.rows(trace, Trace(*self._job.rounding), self._settings.training.precision)

    def _train(self, effective: Effective) -> Trace:
        engine, reference = self._start(effective), self._reference
        names, losses, norms, gradient = engine.trained(), [], [], (0.0, "")
        for step, loss, norm in self._steps(engine, effective, self._job.steps):
            losses.append(loss)
            norms.append(norm)
            if step.number == 0:
                gradient = reference.gradient(names, engine.gradient)
        weights = reference.moved("weight", names, lambda name: engine.whole(name, "weight"))
        averages = None
        if self._settings.training.ema_decay:
            averages = reference.moved("average", names, lambda name: engine.whole(name, "ema"))
        return Trace(losses, norms, gradient, weights, averages)

    def _norms(self, stage: str, effective: Effective, bound: float) -> list[Row]:
        """The gradient norm of step 1 under a ZeRO stage: ours, and the one by which DeepSpeed clips."""
        engine, wanted = self._start(effective), self._reference.trace.norms[0]
        found = [("gradient norm", norm) for _, _, norm in self._steps(engine, effective, 1)]
        if (own := engine.deepspeed_norm) is not None:
            found.append(("DeepSpeed's own norm", own))
        return [number_row(what, wanted, norm, bound, f"ZeRO {stage}") for what, norm in found]

    def _start(self, effective: Effective) -> Engine:
        gc.collect()  # the engine before
        forget_groups()
        model, exact = new_start(self._settings, effective, self._world)
        engine, self._experts = Engine(model, self._settings, effective, self._world), ExpertBalance(model)
        if exact and self._settings.training.precision != "fp32":
            write_exactly(engine, self._settings)
        return engine

    def _steps(self, engine: Engine, effective: Effective, steps: int) -> Iterator[tuple[Step, float, float]]:
        """Each step with its loss and gradient norm, before its update. Ends at a norm that is not finite."""
        sharing = self._settings.training.ranks_per_sequence
        place = Place.of_rank(self._world.rank, self._world.size, self._world.ranks_per_node(), sharing)
        with closing(first_steps(self._settings, effective, place, steps)) as stream:
            for step in stream:
                rate, momenta = learning_rate(step.number, self._settings), betas(step.number, self._settings)
                loss, norm = self._gradient(engine, step)
                while not math.isfinite(norm) and engine.scales_loss and not engine.is_at_smallest_scale:
                    engine.update(rate, skip=True)
                    loss, norm = self._gradient(engine, step)
                yield step, loss, norm
                if not math.isfinite(norm):
                    return
                engine.update(rate, betas=momenta)
                self._experts.move(self._world.sum_(self._experts.take()), step.weight, skip=False)
                if self._world.rank == 0:
                    append_json_line(self._folder / "progress.jsonl", {"step": step.number + 1})

    def _gradient(self, engine: Engine, step: Step) -> tuple[float, float]:
        """Loss and gradient norm."""
        nats, last = 0.0, len(step.micro_batches)
        self._experts.begin()
        for number, batch in enumerate(step.micro_batches, start=1):
            nats += float(engine.micro_batch(batch.to(self._world.device), step.weight, number == last).sum())
        return self._world.sum_([nats])[0] / step.weight, engine.gradient_norm()


def changed_keys(effective: Effective, settings: Settings) -> list[str]:
    """The keys with another value than the default, that can be left out."""
    defaults = {path: default(settings) for path, default, _ in DEFAULTS}
    given = passed(effective)
    paths = [name for name, value in given.items() if not isinstance(value, dict)]
    paths += [f"{name}.{key}" for name, value in given.items() if isinstance(value, dict) for key in value]
    return [path for path in paths if path not in KEPT_KEYS and value_at(given, path) != defaults.get(path)]


def without(effective: Effective, keys: Sequence[str], settings: Settings) -> Effective:
    """The configuration with the defaults of these keys."""
    changed = copy.deepcopy(effective)
    defaults = {path: default(settings) for path, default, _ in DEFAULTS}
    for path in keys:
        *sections, name = path.split(".")
        section = value_at(changed, sections[0]) if sections else changed
        section.pop(name)
        if path in defaults:
            section[name] = defaults[path]
    return changed


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"{error}")
