"""What the survivors of a dead rank save: the state after their last whole step, if one of them holds all of it.

In: the end of a step, the beginning of its update, the exception with which a run ends. Out: a published checkpoint of
the last step, or the reason why there is none. It is whole under these conditions, each of which is known without a
collective, since none works any more:

- ZeRO 0: each rank holds all weights and moments; no collective writes into them, only into gradients. Under ZeRO 1 to
  3 the dead rank held a part of the moments alone.
- No update has begun: from the end of a step, with its evaluation and save, to the next update the state is that of
  the step, whatever becomes of the gradients. Survivors may be one step apart, if one had its gradients and another did
  not; each saves its own step.
- One node: the cursors of all lanes are here.

The checkpoint is one as any: fp32, hashed, fenced by the restart generation. The first survivor at a step writes, and
if it fails the next one; they have the 15 s that the launcher leaves to ranks whose peer died. Cost in a step: none.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE, World
from bigmodel.run_directory import record_event
from bigmodel.training.checkpoint.folder import path_of
from bigmodel.training.checkpoint.format import States
from bigmodel.training.checkpoint.saver import Saver
from bigmodel.training.slices import Place


class WholeStates(States, Protocol):
    @property
    def holds_all(self) -> bool: ...
    def held(self, name: str) -> Mapping[str, tuple[int | Place, Tensor]]: ...


class Rescue:
    """Make one on every rank, and give `on_exit` to the ExitStack of the run. Nothing here is collective."""

    def __init__(
        self, engine: WholeStates, settings: Settings, world: World, num_nodes: int, restart_generation: str, run: str
    ) -> None:
        self._engine, self._settings, self._world, self._num_nodes = engine, settings, world, num_nodes
        self._restart_generation, self._run = restart_generation, run
        self._step = 0
        self._state: Callable[[], dict[str, Any]] = dict
        self._updating = False

    def update_begins(self) -> None:
        self._updating = True

    def step_ends(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """state: for a checkpoint of this step; not collective on one node."""
        self._step, self._state, self._updating = step, state, False

    def on_exit(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Save, if the run ends because a collective failed: torch raises RuntimeErrors for that, also at a peer's
        death."""
        if not isinstance(error, RuntimeError) or self._world.size == 1 or not self._step:
            return
        told = self._lost() or self._save()
        if told:
            print(f"bigmodel (rank {self._world.rank}): step {self._step}: {told}", file=sys.stderr, flush=True)

    def _lost(self) -> str:
        """Why the state is not whole; "": it is."""
        if not self._engine.holds_all:
            return (
                "not saved by the survivors: each rank holds a part of the state alone (ZeRO 1 to 3, shared parameters)"
            )
        if self._updating:
            return "not saved by the survivors: the step after it was between its update and its end"
        if self._num_nodes > 1:
            return "not saved by the survivors: the cursors of other nodes' lanes are not known here"
        return ""

    def _save(self) -> str:
        directory = self._settings.run.directory
        place = path_of(directory / "checkpoints", self._step)
        claim = place.with_name(f"{place.name}.partial-rescue")  # removed at the next start
        try:
            place.parent.mkdir(exist_ok=True)
            claim.mkdir()
        except FileExistsError:
            return ""  # another survivor writes
        except OSError as error:
            return f"not saved by the survivors: {error.strerror}"
        try:
            saver = Saver(place.parent, self._settings, ALONE, self._restart_generation, run=self._run)
            saved = saver.save(_Whole(self._engine), self._state())
            record_event(directory, "rescued", step=self._step, rank=self._world.rank, bytes=saved.bytes)
        except (UserError, OSError, RuntimeError) as error:  # the first error is the one that ends the run
            with contextlib.suppress(OSError):
                claim.rmdir()  # for a survivor that can: this rank may be the one whose device failed
            return f"not saved by the survivors: {error}"
        return f"saved by a survivor in {saved.path}; the next start resumes there"


class _Whole:
    """An engine that holds all state, as the only rank."""

    def __init__(self, engine: WholeStates) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def owned(self, name: str) -> Mapping[str, tuple[int | Place, Tensor]]:
        return self._engine.held(name)
