"""The objectives that `kind` in `data.objectives` names: all that the rest of the system needs to know of each.

To add one: a file beside this one with a `Rule` (`bigmodel.data.objectives.example`): its lengths, which must follow
from those of the piece alone, and its example; a row in `OBJECTIVES`; a field in `ObjectiveSettings` for each new
setting (declared with `only_with=READ_BY_OBJECTIVE`, see `bigmodel.config.sections.setting`); and a test that its
examples have the planned lengths (KINDS in tests/data/objectives/test_objectives.py). From the row follow: the plan,
batches, special tokens and the size of the vocabulary, the count of work, metrics by name, which models it trains, and
which settings are refused with which kind. Imports neither numpy nor torch: settings are checked against this table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveKind:
    """What the rest of the system needs to know of an objective."""

    about: str
    rule: str  # "module:NAME" of its `Rule`
    reads: tuple[str, ...] = ()  # settings of the objective that it reads, but for kind and share
    has_source: bool = False  # it has a source, which on one side stands before the targets
    special_tokens: bool = False  # it needs ids above the tokenizer's: special_tokens and sentinels
    trains_encoder: bool = False  # it trains an encoder alone, and goes with no other kind


OBJECTIVES: dict[str, ObjectiveKind] = {
    "causal": ObjectiveKind(
        about="each token from those before it",
        rule="bigmodel.data.objectives.causal:CAUSAL",
        reads=("ahead",),
    ),
    "prefix": ObjectiveKind(
        about="the rest of a document from its first part",
        rule="bigmodel.data.objectives.prefix:PREFIX",
        reads=("prefix_share",),
        has_source=True,
    ),
    "fill_in_the_middle": ObjectiveKind(
        about="the middle from both ends, for decoders",
        rule="bigmodel.data.objectives.fill_in_the_middle:FILL_IN_THE_MIDDLE",
        reads=("spm_share",),
        special_tokens=True,
    ),
    "span_corruption": ObjectiveKind(
        about="hidden spans from the rest",
        rule="bigmodel.data.objectives.span_corruption:SPAN_CORRUPTION",
        reads=("density", "mean_span"),
        has_source=True,
        special_tokens=True,
    ),
    "ul2": ObjectiveKind(
        about="stands for its seven denoisers",
        rule="bigmodel.data.objectives.ul2:UL2",
        has_source=True,
        special_tokens=True,
    ),
    "masked": ObjectiveKind(
        about="hidden tokens in their places, for encoders",
        rule="bigmodel.data.objectives.masked:MASKED",
        reads=("density",),
        special_tokens=True,
        trains_encoder=True,
    ),
}
