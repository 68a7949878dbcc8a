"""Weights of Hugging Face models: their names, in a table per architecture, and the conversion to ours.

In: a state dict under `transformers`' names, our settings. Out: our weights, in the given type. Guarantees: each of our
weights has the shape that the settings ask for; each of theirs goes to one of ours, or is the copy of one that does, or
a constant; all others are named in one error, and all that are missing.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bigmodel.config.model_settings import ModelSettings
from bigmodel.config.user_error import UserError
from bigmodel.model.transformer import Transformer

Weights = dict[str, Tensor]
Names = dict[str, tuple[str, ...]]  # of our weight: theirs, which are joined along the rows, in this order

# Llama and Qwen3.
DECODER: Names = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
DECODER_BLOCK: Names = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.query_key_value.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attention.output.weight": ("self_attn.o_proj.weight",),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.down.weight": ("mlp.down_proj.weight",),
}
QK_NORM: Names = {
    "attention.query_norm.weight": ("self_attn.q_norm.weight",),
    "attention.key_norm.weight": ("self_attn.k_norm.weight",),
}

# T5 v1.1 and mT5.
T5: Names = {"embedding.weight": ("shared.weight",), "head.weight": ("lm_head.weight",)}
T5_SIDE: Names = {
    "relative_bias.weight": ("block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    "norm.weight": ("final_layer_norm.weight",),
}
T5_ATTENTION: Names = {
    "attention_norm.weight": ("layer.0.layer_norm.weight",),
    "attention.query_key_value.weight": (
        "layer.0.SelfAttention.q.weight",
        "layer.0.SelfAttention.k.weight",
        "layer.0.SelfAttention.v.weight",
    ),
    "attention.output.weight": ("layer.0.SelfAttention.o.weight",),
}
T5_CROSS_ATTENTION: Names = {
    "cross_attention_norm.weight": ("layer.1.layer_norm.weight",),
    "cross_attention.query.weight": ("layer.1.EncDecAttention.q.weight",),
    "cross_attention.key_value.weight": ("layer.1.EncDecAttention.k.weight", "layer.1.EncDecAttention.v.weight"),
    "cross_attention.output.weight": ("layer.1.EncDecAttention.o.weight",),
}


def _t5_feed_forward(layer: int) -> Names:
    """Behind the attention layers of its block."""
    return {
        "feed_forward_norm.weight": (f"layer.{layer}.layer_norm.weight",),
        "feed_forward.gate_up.weight": (
            f"layer.{layer}.DenseReluDense.wi_0.weight",
            f"layer.{layer}.DenseReluDense.wi_1.weight",
        ),
        "feed_forward.down.weight": (f"layer.{layer}.DenseReluDense.wo.weight",),
    }


T5_BLOCKS = {
    "encoder.": T5_ATTENTION | _t5_feed_forward(1),
    "decoder.": T5_ATTENTION | T5_CROSS_ATTENTION | _t5_feed_forward(2),
}

# Further names of one matrix, in files that were written from a state dict; and what old files have though it is not
# learned: rotary frequencies, and a bias that T5's cross-attention never used.
T5_COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
CONSTANTS = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_names(settings: ModelSettings) -> Names:
    """Every weight of our model, and theirs of a T5 (encoder-decoders) or a Llama or Qwen3."""
    names = _t5_names(settings) if settings.kind == "encoder_decoder" else _decoder_names(settings)
    if settings.tied_embeddings:
        del names["head.weight"]
    return names


def _decoder_names(settings: ModelSettings) -> Names:
    block = DECODER_BLOCK | (QK_NORM if settings.qk_norm else {})
    names = dict(DECODER)
    for layer in range(settings.num_layers):
        names |= _below(f"blocks.{layer}.", f"model.layers.{layer}.", block)
    return names


def _t5_names(settings: ModelSettings) -> Names:
    names = dict(T5)
    for theirs, ours, layers in (
        ("encoder.", "encoder.", settings.encoder.num_layers),
        ("decoder.", "", settings.num_layers),
    ):
        names |= _below(ours, theirs, T5_SIDE)
        for layer in range(layers):
            names |= _below(f"{ours}blocks.{layer}.", f"{theirs}block.{layer}.", T5_BLOCKS[theirs])
    return names


def _below(ours: str, theirs: str, names: Names) -> Names:
    return {ours + name: tuple(theirs + part for part in parts) for name, parts in names.items()}


def convert_weights(settings: ModelSettings, state: Mapping[str, Tensor], vocabulary: int = 0) -> Weights:
    """Our weights; those that are one of theirs share its memory. `vocabulary`: rows of the embedding; 0: as many as
    there are.

    Raises `UserError` with the names that are missing, that nothing takes, that differ from what they should be a copy
    of, and whose type or shape does not fit.
    """
    names = weight_names(settings)
    _require_all([part for parts in names.values() for part in parts], _copies(settings), state)
    _require_shapes(settings, vocabulary or state[names["embedding.weight"][0]].numel() // settings.hidden_size, state)
    return {
        name: state[parts[0]] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        for name, parts in names.items()
    }


def part_rows(settings: ModelSettings, name: str, rows: int, parts: int) -> list[int]:
    """The rows of each of the `parts` in one of our weights, which has `rows`."""
    if name.endswith("query_key_value.weight"):
        size = settings.resolved_head_dim
        return [settings.num_heads * size, settings.num_kv_heads * size, settings.num_kv_heads * size]
    return [rows // parts] * parts


def head_differs(state: Mapping[str, Tensor], embedding: str) -> bool:
    """Whether there is an output matrix that is not the embedding."""
    head = state.get("lm_head.weight")
    return head is not None and embedding in state and not torch.equal(head, state[embedding])


def _copies(settings: ModelSettings) -> dict[str, str]:
    """Name -> the name whose values it repeats."""
    copies = dict(T5_COPIES) if settings.kind == "encoder_decoder" else {}
    if settings.tied_embeddings:
        copies["lm_head.weight"] = weight_names(settings)["embedding.weight"][0]
    return copies


def _require_all(taken: list[str], copies: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in taken if name not in state]
    known = {*taken, *copies}
    unused = [name for name in state if name not in known and not CONSTANTS.fullmatch(name)]
    differing = [
        f"{name} ({of})"
        for name, of in copies.items()
        if name in state and of in state and not torch.equal(state[name], state[of])
    ]
    strange = [f"{name} ({state[name].dtype})" for name in taken if name in state and state[name].dtype not in FLOATS]
    complaints = [
        f"{what}: {listed(found)}"
        for what, found in (
            ("missing", missing),
            ("without a counterpart in our model", unused),
            ("no copies, as config.json says, of the weight in brackets", differing),
            ("of a type that cannot be read", strange),
        )
        if found
    ]
    if complaints:
        raise UserError(f"weights {'; '.join(complaints)}; check that config.json belongs to these weights")


def _require_shapes(settings: ModelSettings, vocabulary: int, state: Mapping[str, Tensor]) -> None:
    names = weight_names(settings)
    with torch.device("meta"):
        ours = {name: parameter.shape for name, parameter in Transformer(settings, vocabulary).named_parameters()}
    assert ours.keys() == names.keys(), f"no table for {ours.keys() ^ names.keys()}"
    expected = {
        part: (rows, *shape[1:])
        for name, shape in ours.items()
        for part, rows in zip(names[name], part_rows(settings, name, shape[0], len(names[name])), strict=True)
    }
    wrong = [
        f"{part} {tuple(state[part].shape)} instead of {shape}"
        for part, shape in expected.items()
        if state[part].shape != shape
    ]
    if wrong:
        raise UserError(
            f"weights of another shape than config.json says: {listed(wrong)}; check that it belongs to them"
        )


def listed(names: Sequence[str], most: int = 20) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
