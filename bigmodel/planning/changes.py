"""Settings that decide memory and speed, changed: for what does not fit, the nearest that do; for `--search` all.

In: a `Context` and a `Choice`. Out: the context of the same run with these settings, or None where they cannot go
together. Pure; imports no torch.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from bigmodel.config.deepspeed_config import packs_per_micro_batch
from bigmodel.config.parallel_settings import problem_of_sharing
from bigmodel.config.settings import Settings, num_micro_batches
from bigmodel.planning.context import Context
from bigmodel.planning.memory import at_stage, memory_of
from bigmodel.planning.state_memory import is_offloaded
from bigmodel.training.optimizers.table import OPTIMIZERS

Checkpointing = Literal["none", "selective", "full"]
KINDS: tuple[Checkpointing, ...] = ("none", "selective", "full")


class Choice(NamedTuple):
    """`micro_batch`: packed sequences at once on a GPU. `sharing`: `training.sequence_parallel_ranks`."""

    stage: int
    checkpointing: Checkpointing
    micro_batch: int
    sharing: int
    offloads: bool

    def differences(self, other: "Choice") -> int:
        return sum(one != two for one, two in zip(self, other, strict=True))

    def words(self, own: "Choice") -> str:
        """What differs from the run's own choice.

        >>> own = Choice(1, "none", 4, 1, False)
        >>> own._replace(stage=2, micro_batch=1).words(own)
        'ZeRO 2, micro-batch 1'
        """
        said = (
            f"ZeRO {self.stage}",
            f"activation checkpointing {self.checkpointing}",
            f"micro-batch {self.micro_batch}",
            f"sequence parallel {self.sharing}",
            "optimizer offloaded" if self.offloads else "nothing offloaded",
        )
        return ", ".join(word for word, mine, its in zip(said, self, own, strict=True) if mine != its)


def choice_of(context: Context) -> Choice:
    training, zero = context.settings.training, context.effective["zero_optimization"]
    return Choice(
        zero["stage"],
        training.activation_checkpointing,
        packs_per_micro_batch(context.effective),
        training.sequence_parallel_ranks,
        is_offloaded(zero, "offload_optimizer"),
    )


def with_choice(context: Context, choice: Choice) -> Context | None:
    """None: these do not go together, or not with this run."""
    own = choice_of(context)
    if choice == own:
        return context
    packs = context.settings.training.global_batch_size
    places = context.ranks // choice.sharing // context.settings.training.tensor_parallel_ranks
    if _clashes(context, choice) or choice.micro_batch > max(own.micro_batch, -(-packs // max(places, 1))):
        return None
    if (choice.stage, choice.offloads) != (own.stage, own.offloads):
        context = at_stage(context, choice.stage, choice.offloads)
    else:
        context = context._replace(effective=copy.deepcopy(context.effective))
    micro_batches = num_micro_batches(packs, places, choice.micro_batch)
    context.effective.update(
        train_micro_batch_size_per_gpu=choice.micro_batch,
        gradient_accumulation_steps=micro_batches,
        train_batch_size=choice.micro_batch * micro_batches * context.ranks,
    )
    changed = {"activation_checkpointing": choice.checkpointing, "sequence_parallel_ranks": choice.sharing}
    training = context.settings.training.model_copy(update=changed)
    return context._replace(settings=context.settings.model_copy(update={"training": training}))


def nearest(context: Context, limit: int, most: int = 4) -> list[tuple[Choice, int]]:
    """Choices with the fewest changes that need at most `limit` bytes, with their bytes: of each setting, or pair of
    settings, the smallest step that fits, in the order of `Choice`. Empty: none."""
    own = choice_of(context)
    for count in (1, 2, 3):
        found: dict[tuple[bool, ...], tuple[Choice, int]] = {}
        for choice in _lighter(context, own):
            changes = tuple(one != two for one, two in zip(choice, own, strict=True))
            if choice.differences(own) != count or changes in found:
                continue
            changed = with_choice(context, choice)
            if changed and (needed := bytes_of_gpu(changed)) <= limit:
                found[changes] = (choice, needed)
        if found:
            return [found[changes] for changes in sorted(found, reverse=True)][:most]
    return []


class Timed(Protocol):
    @property
    def seconds(self) -> float: ...


T = TypeVar("T", bound=Timed)


def search(context: Context, limit: int, time: Callable[[Context], T]) -> list[tuple[Choice, int, T]]:
    """All choices that fit, with bytes and what `time` says of a step, the fastest first; of equally fast ones the
    nearest. With offload only where nothing fits without."""
    own = choice_of(context)
    values = ((0, 1, 2, 3), KINDS, _micro_batches(context), _sharings(context))
    for offloads in (False, True):
        found = []
        for stage, kind, micro_batch, sharing in product(*values):
            choice = Choice(stage, kind, micro_batch, sharing, offloads)
            changed = with_choice(context, choice)
            if changed and (needed := bytes_of_gpu(changed)) <= limit:
                found.append((choice, needed, time(changed)))
        if found:
            return sorted(found, key=lambda one: (one[2].seconds, one[0].differences(own), one[1]))
    return []


def bytes_of_gpu(context: Context) -> int:
    return sum(memory_of(context).device.values())


def _clashes(context: Context, choice: Choice) -> bool:
    settings, row = context.settings, OPTIMIZERS[context.settings.optimizer.kind]
    needs_fp32 = choice.stage == 0 and (settings.training.precision != "fp32" or choice.offloads)
    if choice.stage not in row.stages or (choice.offloads and "cpu" not in row.offloads) or needs_fp32:
        return True
    if choice.stage == 3 and settings.training.compile:
        return True
    return choice.sharing > 1 and not _can_share(settings, choice.sharing, context.cluster.ranks_on_node)


def _can_share(settings: Settings, size: int, ranks_on_node: int) -> bool:
    """What `Settings` asks for; only inside a node, whose links are fast."""
    model, training = settings.model, settings.training.model_copy(update={"sequence_parallel_ranks": size})
    if model.is_recurrent or training.compile or training.scheduled_sampling:
        return False
    if training.tensor_parallel_ranks > 1 or settings.distillation.teacher or model.classification:
        return False
    return not problem_of_sharing(settings.model_copy(update={"training": training})) and ranks_on_node % size == 0


def _lighter(context: Context, own: Choice) -> Iterator[Choice]:
    """Choices that need less of the device, the smallest steps first."""
    values: tuple[list[Any], ...] = (
        [own.stage, *range(own.stage + 1, 4)],
        list(KINDS[KINDS.index(own.checkpointing) :]),
        [own.micro_batch, *(one for one in reversed(_micro_batches(context)) if one < own.micro_batch)],
        [own.sharing, *(one for one in _sharings(context) if one > own.sharing)],
        [own.offloads, *([True] if not own.offloads else [])],
    )
    for steps in sorted(product(*(range(len(one)) for one in values)), key=sum):
        yield Choice(*(value[step] for value, step in zip(values, steps, strict=True)))


def _micro_batches(context: Context) -> list[int]:
    """Powers of two up to the packed sequences of a rank in a step, and the run's own, ascending."""
    training = context.settings.training
    places = max(1, context.ranks // training.ranks_per_sequence)
    most = -(-training.global_batch_size // places)
    own = packs_per_micro_batch(context.effective)
    return sorted({own, *(2**power for power in range(8) if 2**power <= max(most, own))})


def _sharings(context: Context) -> list[int]:
    own = context.settings.training.sequence_parallel_ranks
    return sorted({1, own, *(size for size in (2, 4, 8) if context.ranks % size == 0)})
