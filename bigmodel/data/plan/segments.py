"""Segments: the successive plans of a run.

A run continues from a checkpoint in that checkpoint's plan. After a change of data or settings this would repeat and
skip documents, so it is refused. `--new-plan` begins a segment: a fresh plan from that step on, with its own random
draws. "Each token once" holds within a segment; the checkpoint lists all segments.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel.config.renamed import OLD_NAMES
from bigmodel.config.settings import SAVED, DataSettings, Settings, UserError
from bigmodel.data.plan.order import EXAMPLES, RESAMPLING, Order, describe_difference
from bigmodel.data.plan.shuffle import Lengths

OPTIONAL = ("max_epochs", "curriculum", *sorted(EXAMPLES | RESAMPLING))  # in a plan's identity only where not default
Segment = dict[str, Any]  # first_step, and the identity of its plan


def resume_order(
    store: Lengths,
    settings: Settings,
    state: Mapping[str, Any] | None,
    new_plan: bool = False,
    lanes: Iterable[int] | None = None,
) -> tuple[Order, list[Segment]]:
    """The order to continue and the run's segments, its own last. `state`: of the checkpoint; None: a new run.

    Raises `UserError` where the plan differs and `new_plan` is not set, and where `new_plan` is set without need. In a
    later segment whose plan fits, `new_plan` changes nothing, because a restarted job keeps its command.
    """
    if state is None:
        if new_plan:
            raise UserError("--new-plan: no checkpoint to continue from, so the plan is new anyway; leave it out")
        order = Order.of_run(store, settings, lanes=lanes)
        return order, [_segment(order)]
    segments, cursor = list(state["segments"]), state["cursor"]
    first_step = segments[-1]["first_step"]
    order = Order.of_run(store, settings, lanes=lanes, segment=len(segments) - 1, first_step=first_step)
    if order.fingerprint != cursor["fingerprint"] and new_plan:
        order = Order.of_run(store, settings, lanes=lanes, segment=len(segments), first_step=cursor["step"])
        return order, [*segments, _segment(order)]
    order.restore(cursor)
    if new_plan and len(segments) == 1:  # in a later segment: a restarted job with the same command
        raise UserError(
            "--new-plan: data and settings are those of the checkpoint, and a new plan would repeat documents for "
            "nothing; leave it out to continue"
        )
    return order, segments


def order_of_segment(
    store: Lengths, data: DataSettings, segments: Sequence[Segment], number: int
) -> tuple[DataSettings, Order]:
    """The settings and the order of one segment, from its first step on, as the checkpoint stores them.

    Later changes of settings do not matter. Raises `UserError` with the differences where the data has changed.
    """
    identity = segments[number]["identity"]
    fields = DataSettings.model_fields
    stored = {name: OLD_NAMES.get(f"data.{name}", f"data.{name}") for name in fields}
    planned = {name: identity[key] for name, key in stored.items() if key in identity}
    absent = {name: fields[name].get_default(call_default_factory=True) for name in OPTIONAL}
    settings = DataSettings.model_validate(data.model_dump() | absent | planned, context=SAVED)
    classes = identity.get("classification.classes", ())
    settings = settings.with_classes(classes, data.ends_classified, data.class_weights)
    order = Order(
        store,
        settings,
        identity[OLD_NAMES["training.global_batch_size"]],
        identity["run.seed"],
        identity.get("training.batch_ramp", ()),
        segment=number,
        first_step=segments[number]["first_step"],
    )
    if order.plan.identity != identity:
        raise UserError(f"segment {number}: {describe_difference(identity, order.plan.identity)}")
    return settings, order


def _segment(order: Order) -> Segment:
    return {"first_step": order.first_step, "identity": order.plan.identity}
