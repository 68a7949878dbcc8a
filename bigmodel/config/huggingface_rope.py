"""Rotary positions in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from bigmodel.config.model_settings import ROPE_SCALING_KEYS, ModelSettings, RopeScalingSettings
from bigmodel.config.sections import UserError, explain

Config = Mapping[str, Any]


def read_rope(config: Config) -> dict[str, Any]:
    """Our settings of rotary positions. Raises `UserError` for a scaling that our model lacks, and for two values of
    one key.

    transformers 4 writes `rope_scaling`, with `rope_theta` and others beside it, and `rope_local_base_freq` for Gemma
    3; 5 writes all of them into `rope_parameters`, perhaps once per kind of layer.
    """
    old, new = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    of_full, of_sliding = (new.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    beside = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    theirs: dict[str, Any] = {}
    for table in (beside, old, of_full or new):
        for name, value in table.items():
            if theirs.setdefault(name, value) != value:
                raise UserError(f"{name} = {theirs[name]!r} and {value!r}: config.json gives two values; delete one")
    settings: dict[str, Any] = {
        "rope_theta": float(theirs.get("rope_theta") or config["rope_theta_default"]),
        "rope_scaling": rope_scaling(theirs, config.get("max_position_embeddings", 0)),
        "rotary_fraction": theirs.get("partial_rotary_factor") or config.get("partial_rotary_factor_default") or 1.0,
    }
    sliding_theta = of_sliding.get("rope_theta") or config.get("rope_local_base_freq")
    if sliding_theta and sliding_theta != settings["rope_theta"]:
        settings["sliding_rope_theta"] = float(sliding_theta)
    return settings


def write_rope(settings: ModelSettings) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and others, as transformers 4 writes them; 5 reads them too."""
    theirs: dict[str, Any] = {"rope_theta": settings.rope_theta, "rope_scaling": None}
    if settings.rotary_fraction != 1.0:
        theirs["partial_rotary_factor"] = settings.rotary_fraction
    if scaling := settings.rope_scaling:
        values = {name: getattr(scaling, name) for name in ROPE_SCALING_KEYS[scaling.kind]}
        if not values.get("attention_factor", True):
            del values["attention_factor"]
        theirs["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor, **values}
    return theirs


def rope_scaling(theirs: Config, max_position_embeddings: int = 0) -> RopeScalingSettings | None:
    """From `rope_scaling` or `rope_parameters`; None: positions are not scaled."""
    kind = theirs.get("rope_type") or theirs.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ROPE_SCALING_KEYS:
        raise UserError(f"rope_scaling = {dict(theirs)}: cannot be read; kinds read: {', '.join(ROPE_SCALING_KEYS)}")
    table = {name: theirs.get(name) for name in ("factor", *ROPE_SCALING_KEYS[kind])}
    if kind == "yarn":
        table["original_max_position_embeddings"] = table["original_max_position_embeddings"] or max_position_embeddings
        table["attention_factor"] = table["attention_factor"] or _yarn_attention_factor(theirs)
    try:
        return RopeScalingSettings(kind=kind, **{name: value for name, value in table.items() if value is not None})
    except ValidationError as error:
        raise UserError(f"rope_scaling = {dict(theirs)}: {explain(error, RopeScalingSettings)}") from None


def _yarn_attention_factor(theirs: Config) -> float:
    """From DeepSeek's `mscale` and `mscale_all_dim`; 0 (the default, here and there) unless both are given."""
    scales = theirs.get("mscale"), theirs.get("mscale_all_dim")
    if not all(scales):
        return 0.0
    own, of_all = (0.1 * float(scale or 0) * math.log(theirs["factor"]) + 1.0 for scale in scales)
    return own / of_all
