"""Settings of noise on the tokens that a model reads, and of random segmentations of its texts."""

from typing import Annotated

from pydantic import Field

from bigmodel.config.sections import ReadBy, Section, key_of, setting
from bigmodel.data.objectives.noise_table import NOISES

READ_BY_NOISE = {"kind": ReadBy(NOISES)}


class NoiseSettings(Section):
    """How tokens are changed that the model reads (`bigmodel.data.objectives.noise`)."""

    kind: Annotated[str, key_of(NOISES)] = Field(
        description="; ".join(f"{kind}: {row.about}" for kind, row in NOISES.items())
    )
    share: float = setting(
        0.1,
        only_with=READ_BY_NOISE,
        gt=0,
        lt=1,
        description="mask_tokens, drop_tokens, infill: share of the tokens, rounded for each text",
    )
    window: int = setting(
        3, only_with=READ_BY_NOISE, ge=1, description="permute_tokens: most places that a token moves"
    )
    mean_span: float = setting(
        3.0, only_with=READ_BY_NOISE, ge=1, description="infill: mean length of a span; some have length 0"
    )
