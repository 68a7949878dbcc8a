"""The table of noises: the values of `kind` in `data.augmentation` and in `noise` of the objective denoising.

To add a noise: a row here, and its length and its tokens in `noise.py`. Imports neither numpy nor torch: settings are
checked against this table.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoiseKind:
    """Properties of a noise."""

    about: str
    reads: tuple[str, ...] = ()  # its settings, besides kind
    in_place: bool = False  # each token stays in its place, so that inputs of labels can have it
    special_tokens: bool = False  # it needs the mask token


NOISES: dict[str, NoiseKind] = {
    "mask_tokens": NoiseKind(
        about="a share of the tokens becomes the mask token (word dropout)",
        reads=("share",),
        in_place=True,
        special_tokens=True,
    ),
    "drop_tokens": NoiseKind(about="a share of the tokens is left out (token deletion)", reads=("share",)),
    "permute_tokens": NoiseKind(about="tokens change places, each at most `window` places away", reads=("window",)),
    "permute_sentences": NoiseKind(about="the sentences in random order"),
    "infill": NoiseKind(
        about="spans of Poisson length become one mask token each (text infilling)",
        reads=("share", "mean_span"),
        special_tokens=True,
    ),
}
