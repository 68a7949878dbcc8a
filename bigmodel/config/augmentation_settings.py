"""Settings of noise on the tokens that a model reads, and of random segmentations of its texts."""

from typing import Annotated, Literal

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


class SegmentationSettings(Section):
    """Random segmentations of the training texts (`bigmodel.data.store.segmentation`)."""

    kind: Literal["bpe_dropout", "unigram_sampling"] = Field(
        description="bpe_dropout: merges of a BPE are left out at random; unigram_sampling: segmentations of a Unigram "
        "model are drawn by their probability"
    )
    dropout: float = setting(
        0.1, only_with={"kind": "bpe_dropout"}, gt=0, le=1, description="bpe_dropout: probability to leave out a merge"
    )
    alpha: float = setting(
        0.2,
        only_with={"kind": "unigram_sampling"},
        gt=0,
        description="unigram_sampling: power of a segmentation's probability; 0 would be uniform, a large one the best",
    )
    passes: int = Field(
        4, ge=1, le=1000, description="passes with their own segmentations; later ones repeat them in this order"
    )
    seed: int = Field(1, ge=0, lt=2**63, description="seed of the draws; the plan is known before training starts")
