"""Segments: the plans that a run went through, one after the other.

A checkpoint goes on in the plan that it was made in. Where data or settings have changed since, going on would
repeat and skip documents, so it is refused; `--new-plan` begins a segment instead: a fresh plan from that step on,
with random draws of its own. Exactly once holds within a segment; the checkpoint lists all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel.config.renamed import OLD_NAMES
from bigmodel.config.settings import SAVED, DataSettings, Settings, UserError
from bigmodel.data.plan.order import EXAMPLES, Order, describe_difference
from bigmodel.data.plan.shuffle import Lengths

OPTIONAL = ("max_epochs", "curriculum", *sorted(EXAMPLES))  # what a plan's identity has only where it is not default
Segment = dict[str, Any]  # first_step, and the identity of its plan


def resume_order(
    store: Lengths,
    settings: Settings,
    state: Mapping[str, Any] | None,
    new_plan: bool = False,
    lanes: Iterable[int] | None = None,
) -> tuple[Order, list[Segment]]:
    """The order to go on with and the run's segments, its own last. `state`: of the checkpoint, if there is one.

    Raises `UserError` where the plan differs and none was asked for, and where one was asked for without need. In a
    segment that is under way already, asking for one changes nothing: a job that is restarted keeps its command.
    """
    if state is None:
        if new_plan:
            raise UserError("--new-plan: there is no checkpoint to go on from, so the plan is new anyway; leave it out")
        order = Order.of_run(store, settings, lanes=lanes)
        return order, [_segment(order)]
    segments, cursor = list(state["segments"]), state["cursor"]
    first_step = segments[-1]["first_step"]
    order = Order.of_run(store, settings, lanes=lanes, segment=len(segments) - 1, first_step=first_step)
    if order.fingerprint != cursor["fingerprint"] and new_plan:
        order = Order.of_run(store, settings, lanes=lanes, segment=len(segments), first_step=cursor["step"])
        return order, [*segments, _segment(order)]
    order.restore(cursor)
    if new_plan and len(segments) == 1:  # in a later one, this is the same command once more: a restarted job
        raise UserError(
            "--new-plan: data and settings are those of the checkpoint, and a new plan would repeat documents for "
            "nothing; leave it out to go on"
        )
    return order, segments


def order_of_segment(
    store: Lengths, data: DataSettings, segments: Sequence[Segment], number: int
) -> tuple[DataSettings, Order]:
    """One of a run's segments, its settings and its plan from its first step on, by what the checkpoint says of it:
    settings that were changed since do not matter, data that was does.

    Raises `UserError` saying what differs.
    """
    identity = segments[number]["identity"]
    fields = DataSettings.model_fields
    stored = {name: OLD_NAMES.get(f"data.{name}", f"data.{name}") for name in fields}
    planned = {name: identity[key] for name, key in stored.items() if key in identity}
    absent = {name: fields[name].get_default(call_default_factory=True) for name in OPTIONAL}
    settings = DataSettings.model_validate(data.model_dump() | absent | planned, context=SAVED)
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
