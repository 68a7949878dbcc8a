"""The kind of a layer's attention: to the whole document, or inside a sliding window. Imports no torch.

Layers k, 2k, 3k ... of a stack, counted from 1, are full, with k = `model.full_attention_every`; multi-token prediction
(MTP) modules are numbered after the last layer.
"""

from typing import Literal

from bigmodel.config.settings import ModelSettings

LayerKind = Literal["full", "sliding"]


def layer_kind(settings: ModelSettings, layer: int) -> LayerKind:
    """The kind of a stack's layer, counted from 0."""
    every, first = settings.full_attention_every, settings.first_full_attention
    is_full = not settings.sliding_window or (every > 0 and (layer + 1 - first) % every == 0)
    return "full" if is_full else "sliding"


def kinds_of(settings: ModelSettings) -> list[LayerKind]:
    """The kinds of layers of a stack, MTP modules included, each once."""
    layers = range(settings.num_layers + settings.num_mtp_modules)
    return list(dict.fromkeys(layer_kind(settings, layer) for layer in layers))
