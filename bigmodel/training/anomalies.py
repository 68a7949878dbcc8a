"""Anomalies: what a step's numbers say about it before it is applied, and what follows.

In: each step's loss and gradient norm, equal on all ranks. Out: whether the step is applied, events, or the end of the
run. Guarantees: all ranks decide alike; a step that is not applied is declared with its documents, on all nodes, in
events.jsonl (`step_skipped`), so that what was trained is the plan without these steps.

    replicas differ                                  Restart, exit code 5 (replicas.py)
    not finite, a device made it                     Restart, exit code 5 (nonfinite.py)
    not finite otherwise                             the step is skipped; ten in a row: UserError
    a spike, by training.spikes.policy               noted, skipped, or Restart, exit code 4 (spikes.py)
    left out by a rewind                             the step is skipped

Costs: the replica check, and two medians per step on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from bigmodel.config.settings import Settings
from bigmodel.data.load.stream import Step
from bigmodel.data.plan.sharing import Place
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World
from bigmodel.metrics.progress import LiveLine
from bigmodel.metrics.recorder import Metrics
from bigmodel.model.transformer import Transformer
from bigmodel.run_directory import EXIT_DEVICE, EXIT_REWIND, Restart, record_event
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import remote as store_of_checkpoints
from bigmodel.training.divergence import refuse_broken_state, refuse_divergence, refuse_smallest_scale
from bigmodel.training.nonfinite import Verdict, Witness, attribute
from bigmodel.training.replicas import Replicas
from bigmodel.training.spikes import Rewind, Spike, Spikes, declare, declared_in, plan_rewind, read_rewinds
from bigmodel.training.zero.engine import Engine


class Anomalies:
    """`judge` each step before its update; `refuse_divergence` after it is recorded. Collective."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        model: Transformer,
        store: ShardStore,
        place: Place,
        world: World,
        line: LiveLine,
        state: dict[str, Any],
    ) -> None:
        """`state`: of the checkpoint that the run resumes; {}: a new run."""
        self._settings, self._engine, self._model, self._store = settings, engine, model, store
        self._place, self._world, self._line = place, world, line
        self._directory = settings.run.directory
        self._witness = Witness(model)
        self._replicas = Replicas(engine, world, settings.training.replica_check_every_steps, self._directory)
        self._spikes = Spikes(settings.training.spikes, state)
        declared = world.on_rank_zero(lambda: read_rewinds(self._directory))
        self._rewinds = list(dict.fromkeys([*declared_in(state), *declared]))
        self._bad_steps, self._verdict = 0, Verdict()

    def judge(self, step: Step, nats: Tensor, loss: float, gradient_norm: float, metrics: Metrics) -> str:
        """Why this step must not be applied: "not_finite", "spike", "left_out"; "" if it may be.

        nats: this rank's loss sums. metrics: count the spikes. Raises `Restart` on every rank, and `UserError` at the
        smallest loss scale of fp16.
        """
        done = step.number + 1
        self._replicas.check(done)
        reason, more = "", ""
        if any(done in rewind.steps for rewind in self._rewinds):
            reason = "left_out"
        elif not math.isfinite(loss + gradient_norm):
            reason, more = "not_finite", self._attribute(step, nats)
        elif spikes := self._spikes.see(loss, gradient_norm):
            reason = self._on_spike(done, spikes, metrics)
        self._bad_steps = self._bad_steps + 1 if reason == "not_finite" and not self._engine.scales_loss else 0
        if reason:
            self._report_skipped(step, reason, more, loss, gradient_norm)
        return reason

    def refuse_divergence(self, done: int, reason: str) -> None:
        """Raise `MachineError` if the state itself is not finite, `UserError` if too many steps in a row were not.

        reason: what `judge` said of this step, which is recorded by now.
        """
        if reason == "not_finite":
            refuse_broken_state(self._engine, done, self._settings, self._world)
        refuse_divergence(self._bad_steps, done, self._settings, self._world, str(self._verdict))

    def agreed(self, done: int, state: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        """The same state for a checkpoint, which raises `Restart` if ranks differ in what would be saved."""

        def compared() -> dict[str, Any]:
            self._replicas.require(done, whole_state=True)
            return state()

        return compared

    def state(self) -> dict[str, Any]:
        """This part of a checkpoint's state. Not collective."""
        left_out = [asdict(rewind) for rewind in self._rewinds]
        return self._spikes.state() | ({"left_out": left_out} if left_out else {})

    def _attribute(self, step: Step, nats: Tensor) -> str:
        """Who made it, in words. Raises `Restart` if a device did."""
        if self._engine.scales_loss:
            if self._engine.is_at_smallest_scale:
                refuse_smallest_scale(self._engine.loss_scale, self._settings, self._world)
            return ""
        saw = self._witness.take() or not bool(nats.isfinite().all())
        training = self._settings.training
        found = attribute(step, saw, self._engine, self._world, training.sharing_ranks)
        self._witness.take()
        if self._model.teacher:
            self._model.teacher.take()
        if training.compile and not found.layer:  # computed again uncompiled: other rounding may be finite
            found = Verdict()
        self._verdict = found
        if found.repeats:
            return f"; {found}"
        done, detail = step.number + 1, f"a loss or gradient that is not finite, {found}"
        if self._world.rank == 0:
            hosts = sorted({*found.hosts}) if len({*found.hosts}) == 1 else []  # else undecided
            named = {"ranks": list(found.ranks), "hosts": hosts, "layer": found.layer}
            record_event(self._directory, "bad_device", fault="nonfinite", step=done, detail=detail, **named)
        raise Restart(
            f"step {done}: {detail}; the same command goes on from the newest checkpoint: leave this host out",
            EXIT_DEVICE,
        )

    def _on_spike(self, done: int, spikes: Sequence[Spike], metrics: Metrics) -> str:
        """What the policy makes of it: "" or "spike". Raises `Restart` for a rewind."""
        policy = self._settings.training.spikes.policy
        rewind = self._world.on_rank_zero(lambda: self._plan_rewind(done)) if policy == "rewind" else None
        words = "; ".join(map(str, spikes))
        metrics.record_spike(done, [spike.signal for spike in spikes])
        if self._world.rank == 0:
            values = {spike.signal: spike.value for spike in spikes}
            record_event(self._directory, "spike", step=done, policy=policy, detail=words, **values)
        if policy == "note":
            self._line.say(f"step {done}: a spike: {words}")
        if rewind is None:
            return "" if policy == "note" else "spike"
        first, to = rewind.first, rewind.to
        detail = f"a spike in step {done} ({words}): back to step {to}, steps {first} to {done} are left out"
        if self._world.rank == 0:
            declare(self._directory, rewind)
            record_event(self._directory, "rewind", step=done, to=to, first=first, last=done, detail=detail)
        raise Restart(f"{detail}; the same command goes on from there", EXIT_REWIND)

    def _plan_rewind(self, done: int) -> Rewind | None:
        """On rank 0. Raises what `plan_rewind` raises."""
        settings, remote = self._settings.training.spikes, self._settings.checkpoint.remote
        here = checkpoint.steps(self._directory / "checkpoints")
        saved = sorted({*here, *(store_of_checkpoints.steps(remote) if remote else ())})
        return plan_rewind(done, saved, settings, self._rewinds)

    def _report_skipped(self, step: Step, reason: str, more: str, loss: float, gradient_norm: float) -> None:
        """Record a step without an update, with its documents on all nodes, and print a line."""
        done, place = step.number + 1, self._place
        parts = self._world.of_nodes(_documents(self._store, step), place.num_nodes, place.rank_in_node == 0)
        if self._world.rank == 0:
            documents = [document for part in parts for document in part]
            made = {"detail": more.removeprefix("; ")} if more else {}
            said = "not finite" if reason == "not_finite" else reason
            record_event(self._directory, "step_skipped", step=done, reason=said, documents=documents, **made)
        why = {"spike": " as a spike", "left_out": " as left out"}.get(reason, "")
        self._line.say(
            f"step {done}: skipped{why}, loss {loss:g}, gradient norm {gradient_norm:g}{more}; its documents: "
            "events.jsonl"
        )


def _documents(store: ShardStore, step: Step) -> list[list[int | str]]:
    """[source, shard, row, first token, number of tokens] of each chunk of a step."""
    return [
        [store.sources[chunk.source], chunk.shard, chunk.row, chunk.start, chunk.length]
        for pack in step.packs
        for chunk in pack
    ]
