"""The first steps of a run, as plain torch and the engine both see them; and how far their results may be apart.

In: a run's settings. Out: a `Trace` of each training, and a row for every compared quantity. The reference is plain
torch in float64. The same in the run's precision shows what rounding costs; it may cost the engine twice that, or as
much as `LEAST`.
"""

from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from bigmodel.checks.plain_torch import lengths, ratio_of, together, worst
from bigmodel.config.deepspeed_config import packs_per_micro_batch
from bigmodel.config.settings import Settings
from bigmodel.data.load.stream import Step, Stream
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World
from bigmodel.model.huggingface.start import takes
from bigmodel.model.transformer import Transformer
from bigmodel.training.start import new_model, open_weights
from bigmodel.training.token_vectors import read_vectors

# Least bounds, relative: of a step's loss and norm, of a parameter's gradient, of the movement of all weights.
LEAST = {"fp32": (1e-6, 1e-5, 1e-4), "bf16": (1e-3, 1e-2, 1e-2), "fp16": (1e-3, 1e-2, 1e-2)}
LATER = 10  # times as much for losses and norms of later steps


class Trace(NamedTuple):
    """Losses and gradient norms of the steps; how far the rest is from the reference."""

    losses: list[float]
    norms: list[float]
    gradient: tuple[float, str] = (0.0, "")  # of step 1: of the parameter that is farthest off, and its name
    weights: float = 0.0  # of the movement of all weights over the steps
    averages: float | None = None  # the same of their averages


class Row(NamedTuple):
    """One compared quantity. wanted and found: of numbers only."""

    what: str
    wanted: float | None
    found: float | None
    difference: float
    bound: float
    where: str = ""

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound


def new_start(settings: Settings, effective: dict[str, Any], world: World) -> tuple[Transformer, list[str]]:
    """The model at step 0, and the parameters whose masters are not rounded to the precision. Collective."""
    store = ShardStore.of_run(settings.data, "train")
    vocabulary = settings.model.num_rows(store.manifest.vocabulary + num_special_tokens(settings.data))
    vectors = read_vectors(settings, store, world) if settings.model.vectors else None
    model = new_model(settings, effective, vocabulary, True, vectors)
    folder, names = settings.model.start_folder, [name for name, _ in model.named_parameters()]
    if not folder:
        return model, []
    with ExitStack() as closing:
        weights = open_weights(folder, settings.model, closing)
        return model, [name for name in names if takes(settings.model, weights, name)]


def first_steps(settings: Settings, effective: dict[str, Any], place: Place, steps: int) -> Generator[Step, None, None]:
    """The data steps of a rank, as in training."""
    store = ShardStore.of_run(settings.data, "train")
    stream = Stream(
        store,
        Order.of_run(store, settings),
        settings.data,
        packs_per_micro_batch(effective),
        place,
        settings.run.seed,
        seeds_by_document=settings.model.draws_by_document,
        sampling=settings.training.scheduled_sampling,
    )
    try:
        for _ in range(steps):
            yield next(stream)
    finally:
        stream.close()


class Reference:
    """What plain torch in float64 gave. Tensors are read from the file one at a time."""

    def __init__(self, path: Path, trace: Trace) -> None:
        self.trace = trace
        self._file = safe_open(path, "pt")

    def gradient(self, names: Collection[str], found: Callable[[str], Tensor]) -> tuple[float, str]:
        """For `Trace.gradient`."""
        return worst([lengths(name, found(name), self._file.get_tensor(f"gradient.{name}")) for name in names])

    def moved(self, key: str, names: Collection[str], found: Callable[[str], Tensor]) -> float:
        """The relative difference of the movement since step 0; key: weight or average."""
        return together([self._moved(key, name, found(name)) for name in names])

    def _moved(self, key: str, name: str, found: Tensor) -> Any:
        start, wanted = (self._file.get_tensor(f"{one}.{name}") for one in ("start", key))
        return lengths(name, found.cpu().double() - start.double(), wanted)

    def rows(self, found: Trace, rounding: Trace, precision: str) -> list[Row]:
        """A row for each compared quantity. rounding: of plain torch in the run's precision."""
        number, gradient, movement = LEAST[precision]
        later = max(LATER * number, rounding.weights)  # what the weights differ by, losses and norms may
        least = (number, number, later, later, gradient, movement, movement)
        rows = zip(self._unbounded(found), self._unbounded(rounding), least, strict=False)
        return [row._replace(bound=max(bound, 2 * usual.difference)) for row, usual, bound in rows]

    def _unbounded(self, found: Trace) -> list[Row]:
        losses = _by_step("loss", self.trace.losses, found.losses)
        norms = _by_step("gradient norm", self.trace.norms, found.norms)
        gradient, where = found.gradient
        rows = [losses[0], norms[0], max(losses, key=_size), max(norms, key=_size)]
        rows.append(Row("gradients", None, None, gradient, 0.0, f"step 1, {where}"))
        rows.append(Row("movement of weights", None, None, found.weights, 0.0, f"{len(losses)} steps"))
        if found.averages is not None:
            rows.append(Row("movement of averages", None, None, found.averages, 0.0, f"{len(losses)} steps"))
        return rows


def number_row(what: str, wanted: float, found: float, bound: float, where: str) -> Row:
    """A row of a number."""
    return Row(what, wanted, found, ratio_of(abs(found - wanted), abs(wanted)), bound, where)


def _by_step(what: str, wanted: list[float], found: list[float]) -> list[Row]:
    pairs = enumerate(zip(wanted, found, strict=False), start=1)
    return [number_row(what, one, other, 0.0, f"step {number}") for number, (one, other) in pairs]


def _size(row: Row) -> float:
    return row.difference
