"""UL2 (Tay et al. 2023, table 1): seven denoisers with equal shares; S predicts the last quarter."""

from typing import Never

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.example import Denoiser, Rule

CORRUPTIONS = (  # mode, density, mean span
    *(("R", 0.15, span) for span in (3.0, 8.0)),
    *(("X", density, span) for density, span in ((0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0))),
)
PREFIX_SHARE = 0.75


def _denoisers(settings: ObjectiveSettings) -> list[Denoiser]:
    found = []
    for mode, density, span in CORRUPTIONS:
        corruption = ObjectiveSettings(kind="span_corruption", density=density, mean_span=span)
        found.append(Denoiser(f"ul2_{mode.lower()}", corruption, mode))
    return [*found, Denoiser("ul2_s", ObjectiveSettings(kind="prefix", prefix_share=PREFIX_SHARE), "S")]


def _none(*arguments: object) -> Never:
    raise AssertionError("ul2 has no examples of its own; its denoisers make them")


UL2 = Rule(_none, _none, denoisers=_denoisers)
