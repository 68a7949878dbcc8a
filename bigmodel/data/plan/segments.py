"""Segments: the successive plans of a run.

A run continues from a checkpoint in that checkpoint's plan. After a change of data or settings this would repeat and
skip documents, so it is refused. `--new-plan` begins a segment: a plan from that step on, with its own random draws,
that gives first what is unread of each source's current epoch. "Each token once per epoch" holds across segments; the
checkpoint lists all of them, each earlier one with the cursor at its end. Segments of earlier versions begin all
sources anew: their identity lacks `READ_BEFORE`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel.config.renamed import OLD_NAMES
from bigmodel.config.settings import SAVED, DataSettings, Settings, UserError
from bigmodel.data.plan.exclusion import Excluded
from bigmodel.data.plan.order import EXAMPLES, READ_BEFORE, RESAMPLING, Order, Plan, describe_difference
from bigmodel.data.plan.read_before import History, Identified, Segment, pack_shards, settle
from bigmodel.data.plan.shuffle import Lengths

OPTIONAL = ("max_epochs", "curriculum", *sorted(EXAMPLES | RESAMPLING))  # in a plan's identity only where not default
# Segment: first_step, identity of its plan, sources of the store, shards (sizes and digests of the mixed ones),
# excluded documents, lost and forgotten (`bigmodel.data.plan.read_before`), end: the lanes of the cursor at its end


def resume_order(
    store: Identified,
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
        return order, [_segment(store, order)]
    segments, cursor = [dict(segment) for segment in state["segments"]], state["cursor"]
    if "shards" not in segments[-1]:  # of an earlier version
        sources = cursor["lanes"][0]["sources"]
        segments[-1]["identity"] = identity = _complete(segments[-1], settings.data, sources)
        cursor = {**cursor, "identity": identity, "fingerprint": Plan(identity, 0, {}).fingerprint}
        if identity["prepared data"] == store.fingerprint:
            segments[-1] |= {"sources": list(store.sources), "shards": pack_shards(store, sources)}
    order = order_now(store, settings, segments, lanes)
    if order.fingerprint != cursor["fingerprint"] and new_plan:
        return _begin(store, settings, segments, cursor, lanes)
    order.restore(cursor)
    if new_plan and len(segments) == 1:  # in a later segment: a restarted job with the same command
        raise UserError(
            "--new-plan: data and settings are those of the checkpoint, so the plan goes on anyway; leave it out"
        )
    return order, segments


def order_now(
    store: Identified, settings: Settings, segments: Sequence[Segment], lanes: Iterable[int] | None = None
) -> Order:
    """The order of the last segment under these settings, at its beginning: the run's, if its identity is that of the
    segment."""
    place = {"segment": len(segments) - 1, "first_step": segments[-1]["first_step"]}
    return Order.of_run(store, settings, lanes=lanes, read=_read_before(store, settings.data, segments), **place)


def repeats(store: Identified, settings: Settings, segments: Sequence[Segment]) -> list[str]:
    """What may repeat in the last segment, a line for each cause; for the user, before it starts."""
    if len(segments) < 2 or READ_BEFORE not in segments[-1]["identity"]:
        return []
    return settle(store, segments[:-1], settings.data.resamples_classes)[1]


def _begin(
    store: Identified,
    settings: Settings,
    segments: list[Segment],
    cursor: Mapping[str, Any],
    lanes: Iterable[int] | None,
) -> tuple[Order, list[Segment]]:
    segments[-1] |= {"end": {"lanes": cursor["lanes"]}}
    place, _ = settle(store, segments, settings.data.resamples_classes)
    read = _history(store, settings.data, segments, place)
    number, first_step = len(segments), cursor["step"]
    order = Order.of_run(store, settings, lanes=lanes, segment=number, first_step=first_step, read=read)
    return order, [*segments, _segment(store, order) | place]


def _read_before(store: Any, data: DataSettings, segments: Sequence[Segment]) -> History | None:
    """For the plan of the last of the segments."""
    if READ_BEFORE not in segments[-1]["identity"]:
        return None
    return _history(store, data, segments[:-1], segments[-1])


def _history(store: Any, data: DataSettings, segments: Sequence[Segment], place: Mapping[str, Any]) -> History:
    return History(store, segments, place, lambda earlier, number: _planned(earlier, data, segments, number)[1])


def order_of_segment(
    store: Lengths, data: DataSettings, segments: Sequence[Segment], number: int
) -> tuple[DataSettings, Order]:
    """The settings and the order of one segment, from its first step on, as the checkpoint stores them.

    Later changes of settings do not matter. Raises `UserError` with the differences where the data has changed.
    """
    settings, order = _planned(store, data, segments, number)
    identity = _complete(segments[number], data)
    if order.plan.identity != identity:
        raise UserError(f"segment {number}: {describe_difference(identity, order.plan.identity)}")
    return settings, order


def _planned(
    store: Lengths, data: DataSettings, segments: Sequence[Segment], number: int
) -> tuple[DataSettings, Order]:
    """`order_of_segment` without its check."""
    identity = _complete(segments[number], data)
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
        read=_read_before(store, data, segments[: number + 1]),
        excluded=Excluded.unpack(segments[number].get("excluded", "")),
    )
    return settings, order


def _complete(segment: Segment, data: DataSettings, sources: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The identity of a segment. Earlier versions left a 0 or false out of it, which is then that of the run's
    settings; not of classes where the cursor's `sources` have none."""
    has_classes = sources is None or any("classes" in cursor for cursor in sources.values())
    chosen = data.model_dump(include=EXAMPLES | RESAMPLING, exclude_defaults=True) if "shards" not in segment else {}
    left_out = {
        name: value for name, value in chosen.items() if not value and (name != "class_exponent" or has_classes)
    }
    return {OLD_NAMES.get(f"data.{name}", f"data.{name}"): value for name, value in left_out.items()} | dict(
        segment["identity"]
    )


def _segment(store: Identified, order: Order) -> Segment:
    return {
        "first_step": order.first_step,
        "identity": order.plan.identity,
        "sources": list(store.sources),
        "shards": pack_shards(store, order.plan.source_positions),
        **({"excluded": order.excluded.pack()} if order.excluded else {}),
    }
