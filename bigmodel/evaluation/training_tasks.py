"""Tasks of lm_eval during training.

In: `evaluation.tasks`. Out: scores on rank 0. Guarantees: training does not notice: no random state and no weight
changes; scores do not depend on the number of ranks. Tasks are loaded when the run starts, so that a mistake ends it
then. Costs: lm_eval and the datasets in the memory of rank 0; every rank computes its share of the requests.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from bigmodel.config.classification_settings import NO_TEXT
from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.world import World
from bigmodel.evaluation.packed_requests import Forward
from bigmodel.evaluation.shared_requests import SharedRequests

if TYPE_CHECKING:
    from bigmodel.evaluation.tasks import Tasks


@dataclass(frozen=True)
class TaskScores:
    """Task -> metric -> value; empty on ranks other than 0."""

    scores: dict[str, dict[str, float]]
    seconds: float

    def __str__(self) -> str:
        return "; ".join(
            f"{task}: {', '.join(f'{metric} {value:.4g}' for metric, value in of.items())}"
            for task, of in self.scores.items()
        )


class TrainingTasks:
    """The tasks of a run; nothing is loaded if there are none."""

    def __init__(self, settings: Settings, world: World, packs_per_micro_batch: int) -> None:
        """Collective. Raises `UserError` for tasks that cannot be loaded or answered."""
        self._settings, self._world, self._packs = settings, world, packs_per_micro_batch
        self._tasks: Tasks | None = None
        self.given = bool(settings.evaluation.tasks)
        if self.given:
            require_harness(settings.model, f"evaluation.tasks = {settings.evaluation.tasks}")
            world.on_rank_zero(self._load)
            self._tokenizer = Tokenizer.load(ShardStore.of_run(settings.data, "validation").file("tokenizer.json"))

    def is_due(self, done: int) -> bool:
        every_steps = self._settings.evaluation.tasks_every_steps
        return self.given and every_steps > 0 and done % every_steps == 0

    def run(self, forward: Forward) -> TaskScores:
        """Collective."""
        started = time.perf_counter()
        requests = SharedRequests(forward, self._world, self._settings, self._tokenizer, self._packs)
        found = requests.run(lambda: self._score(requests)) or {}
        return TaskScores(found, time.perf_counter() - started)

    def _load(self) -> None:
        from bigmodel.evaluation.tasks import Tasks

        wanted = self._settings.evaluation
        self._tasks = Tasks(wanted.tasks, self._settings, limit=wanted.tasks_limit, draws=False)

    def _score(self, requests: SharedRequests) -> dict[str, dict[str, float]]:
        from bigmodel.evaluation.tasks import scores

        assert self._tasks, "tasks are loaded on rank 0"
        return scores(self._tasks.run(self._settings, self._tokenizer, requests, with_errors=False))


def require_harness(model: ModelSettings, why: str, target_ahead: int = 1) -> None:
    """Raise `UserError` for a model without answers, or without lm_eval. why: what asks for it."""
    if model.classification:
        raise UserError(f"{why}: {NO_TEXT}")
    if model.kind == "encoder":
        raise UserError(f"{why}: model.kind = 'encoder' predicts no text from left to right; leave tasks out")
    if target_ahead > 1:
        raise UserError(
            f"{why}: with data.target_ahead = {target_ahead} no token is predicted from the one before it, as tasks "
            "are scored; choose a run without it"
        )
    if find_spec("lm_eval") is None:
        raise UserError(f"{why}: needs lm_eval, which is not installed; pip install 'bigmodel[tasks]'")
