"""New plan: what is recorded and said when a segment begins, before its first step."""

from collections.abc import Sequence
from pathlib import Path

from bigmodel.config.settings import Settings
from bigmodel.data.plan.read_before import Segment
from bigmodel.data.plan.segments import repeats
from bigmodel.data.store.shards import ShardStore
from bigmodel.run_directory import record_event

RECORDED = ("first_step", "identity", "lost", "forgotten")


def announce(directory: Path, store: ShardStore, settings: Settings, segments: Sequence[Segment]) -> list[str]:
    """Record the last segment as an event; return what to say of it, a warning for whatever may repeat."""
    told = repeats(store, settings, segments)
    segment = {name: value for name, value in segments[-1].items() if name in RECORDED}
    record_event(directory, "new_plan", segment=len(segments) - 1, **segment, **({"may_repeat": told} if told else {}))
    if told:
        return [f"warning: --new-plan: {text}" for text in told]
    return ["new plan: what is unread of the current epoch of each source comes first; nothing repeats"]
