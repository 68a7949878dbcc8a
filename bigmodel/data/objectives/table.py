"""The table of objectives: the values of `kind` in `data.objectives`, and their properties.

To add an objective:
- a file in this folder with a `Rule` (`bigmodel.data.objectives.example`): its lengths, which must depend on those of
  the chunk only, and its example;
- a row in `OBJECTIVES`;
- a field in `ObjectiveSettings` for each new setting, declared with `only_with=READ_BY_OBJECTIVE` (see
  `bigmodel.config.sections.setting`);
- a test that its examples have the planned lengths (KINDS in tests/data/objectives/test_objectives.py).

The row decides the plan, batches, special tokens, vocabulary size, attention work, metric names, the models it trains,
and the settings that each kind refuses. Imports neither numpy nor torch: settings are checked against this table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveKind:
    """Properties of an objective."""

    about: str
    rule: str  # "module:NAME" of its `Rule`
    reads: tuple[str, ...] = ()  # its settings, besides kind and share
    has_source: bool = False  # it has a source; with one side it comes before the target
    special_tokens: bool = False  # it needs ids above the tokenizer's: special tokens and sentinels
    has_noisy_inputs: bool = False  # data.augmentation may mask its inputs: labels lie beside them
    trains_encoder: bool = False  # it trains an encoder alone; cannot be combined with other kinds


OBJECTIVES: dict[str, ObjectiveKind] = {
    "causal": ObjectiveKind(
        about="the next token",
        rule="bigmodel.data.objectives.causal:CAUSAL",
        reads=("ahead",),
        has_noisy_inputs=True,
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
    "denoising": ObjectiveKind(
        about="the whole text from the text with noise, as BART",
        rule="bigmodel.data.objectives.denoising:DENOISING",
        reads=("noise",),
        has_source=True,
        special_tokens=True,
    ),
    "ul2": ObjectiveKind(
        about="UL2's seven denoisers, with equal shares",
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
