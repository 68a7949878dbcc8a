"""Names of weights: each of ours is one or several of theirs, one below the other.

In: a type of `configs` and our settings. Out: for each of our parameters the names of theirs with their rows. Both
directions follow from it: theirs are concatenated, ours are split. Example, Llama with 4 query and 2 key/value heads
of 16 channels:

    blocks.0.attention.query_key_value.weight: q_proj 64 rows, k_proj 32 rows, v_proj 32 rows

Matrices of experts, (experts, rows, columns) here, stand one below the other, too: gate_up of experts of 16 channels is
gate_proj 16 rows, up_proj 16 rows of the first one, then those of the second one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bigmodel.config.huggingface import Config, read_config
from bigmodel.config.model_settings import ModelSettings
from bigmodel.config.settings import UserError
from bigmodel.model.experts import has_experts
from bigmodel.model.huggingface.class_head import with_class_head
from bigmodel.model.transformer import Transformer

Part = tuple[str, int]  # their name, and its rows; 0: all rows of ours
Names = dict[str, list[Part]]
Weights = dict[str, Tensor]
SHOWN_NAMES = 20

DECODER_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
    "output": {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_output_norm": "post_feedforward_layernorm",
    },
}
# What old files have though it is not learned: rotary frequencies, position numbers, and a bias that T5's
# cross-attention never used.
CONSTANTS = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|embeddings\.position_ids"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
T5_COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"}
HEADS = ("pooler.", "cls.", "head.", "decoder.", "classifier.")  # of encoders
MTP = "eh_proj.weight"  # of GLM's modules
CLASS_HEAD = "score.weight"  # of decoders
NO_COPIES = "no copies, as config.json says, of the weight in brackets"
OF_EXPERTS = (".experts.gate_up", ".experts.down")
JOINED = ".experts.gate_up_proj"  # one matrix for all experts of a layer
EXPERTS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}  # their layer, gate, up and down
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def from_transformers(config: Config, state: Mapping[str, Tensor]) -> tuple[ModelSettings, Weights]:
    """Settings and weights of ours. `config`: as `model.config.to_dict()` or config.json; `state`: as
    `model.state_dict()`. Raises `UserError` for what our model lacks, and for weights that do not fit."""
    settings, kind = read_config(config), config["model_type"]
    short = without_prefix(kind, state)
    theirs = {short[name]: state[name] for name in short}
    settings = as_stored(kind, settings, theirs)
    names = names_of(kind, settings)
    check(names, settings, theirs, config.get("vocab_size") or 0)
    joined = {ours: _joined([theirs[name] for name, _ in parts]) for ours, parts in names.items()}
    return settings, {name: by_expert(name, rows, settings) for name, rows in joined.items()}


def by_expert(name: str, rows: Tensor, settings: ModelSettings) -> Tensor:
    """A weight of ours from its rows: matrices of experts get their dimension."""
    if settings.experts is None or not name.endswith(OF_EXPERTS):
        return rows
    return rows.view(settings.experts.count, -1, rows.shape[-1])


def shape_of_rows(shape: Sequence[int]) -> list[int]:
    """Of a weight of ours whose experts' matrices stand one below the other."""
    return [shape[0] * shape[1], shape[2]] if len(shape) == 3 else list(shape)


def as_stored(kind: str, settings: ModelSettings, theirs: Mapping[str, Tensor]) -> ModelSettings:
    """The settings, with an output matrix of its own where a T5 has one: transformers 5 writes `tie_word_embeddings =
    true` into every config.json of a T5, and never ties unequal matrices."""
    if kind not in ("t5", "mt5") or not settings.tied_embeddings:
        return settings
    head, shared = theirs.get("lm_head.weight"), theirs.get("shared.weight")
    differs = head is not None and shared is not None and not torch.equal(head, shared)
    return settings.model_copy(update={"tied_embeddings": False}) if differs else settings


def names_of(kind: str, settings: ModelSettings) -> Names:
    """Their names for each of our parameters."""
    if settings.classification:
        return with_class_head(kind, names_of(kind, settings.with_classes_of(None)), settings)
    if kind in ("t5", "mt5"):
        return _t5(settings)
    if kind in ("bert", "modernbert"):
        return (_bert if kind == "bert" else _modernbert)(settings)
    return _decoder(kind, settings)


def check(names: Names, settings: ModelSettings, theirs: Mapping[str, Tensor], vocabulary: int = 0) -> None:
    """Raise `UserError` with all weights that are missing, that nothing takes, that differ from what they should be a
    copy of, and whose type or shape does not fit. `vocabulary`: rows of the embedding; 0: as many as there are."""
    wanted = [name for parts in names.values() for name, _ in parts]
    if joined := [name for name in theirs if name.endswith(JOINED)]:
        raise UserError(
            f"{joined[0]}: the experts of a layer are joined, as transformers 5 writes them with "
            "save_original_format=False; load the folder there and save it with save_original_format=True"
        )
    copies = dict(T5_COPIES) if settings.kind == "encoder_decoder" else {}
    if settings.tied_embeddings:
        copies["lm_head.weight"] = names["embedding.weight"][0][0]
    known = {*wanted, *copies}
    there = [name for name in wanted if name in theirs]
    found = {
        "missing": [name for name in wanted if name not in theirs],
        "without a counterpart in our model": [
            name for name in theirs if name not in known and not CONSTANTS.fullmatch(name)
        ],
        NO_COPIES: [
            f"{name} ({of})"
            for name, of in copies.items()
            if name in theirs and of in theirs and not torch.equal(theirs[name], theirs[of])
        ],
        "of a type that cannot be read": [
            f"{name} ({theirs[name].dtype})" for name in there if theirs[name].dtype not in FLOATS
        ],
    }
    if len(there) == len(wanted):
        found["of another shape than config.json says"] = _misshapen(names, settings, theirs, vocabulary)
    complaints = [f"{what}: {_listed(which)}" for what, which in found.items() if which]
    if complaints:
        untied = settings.kind == "encoder_decoder" and any(name.startswith("lm_head") for name in found[NO_COPIES])
        remedy = ", or set model.tied_embeddings = false" if untied else ""
        if found["missing"] == ["lm_head.weight"]:
            remedy = "; a classification model has no output matrix (lm_head) and cannot be continued"
        raise UserError(f"weights {'; '.join(complaints)}; check that config.json belongs to these weights{remedy}")


def _misshapen(names: Names, settings: ModelSettings, theirs: Mapping[str, Tensor], vocabulary: int) -> list[str]:
    embedding = theirs[names["embedding.weight"][0][0]]
    rows_of_embedding = vocabulary or embedding.numel() // settings.hidden_size
    with torch.device("meta"):
        model = Transformer(settings.model_copy(update={"num_mtp_modules": 0}), rows_of_embedding)
    state = [*model.named_parameters(), *(one for one in model.named_buffers() if one[0] in names)]
    ours = {name: shape_of_rows(weight.shape) for name, weight in state}
    assert ours.keys() == names.keys(), f"no names for {ours.keys() ^ names.keys()}"
    wrong = []
    for name, parts in names.items():
        for part, rows in parts:
            expected = (rows or ours[name][0], *ours[name][1:])
            if tuple(theirs[part].shape) != expected:
                wrong.append(f"{part} {tuple(theirs[part].shape)} instead of {expected}")
    return wrong


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def to_theirs(names: Names, ours: Mapping[str, Tensor]) -> Weights:
    """Their weights: views of ours."""
    theirs: Weights = {}
    for name, parts in names.items():
        weight = ours[name].view(shape_of_rows(ours[name].shape))
        rows = [number for _, number in parts] if len(parts) > 1 else [len(weight)]
        theirs |= dict(zip((part for part, _ in parts), weight.split(rows), strict=True))
    return theirs


def without_prefix(kind: str, theirs: Iterable[str]) -> dict[str, str]:
    """Names in a file -> names of the class without a head, for encoders: BertForMaskedLM calls its weights bert.*,
    ModernBertForMaskedLM model.*. Heads are left out, and GLM's modules for multi-token prediction, which its class
    does not read: they are numbered as layers behind the last one."""
    prefix = {"bert": "bert.", "modernbert": "model."}.get(kind, "")
    if not prefix:
        names = [*theirs]
        beside = tuple(name.removesuffix(MTP) for name in names if kind == "glm4_moe" and name.endswith(MTP))
        return {name: name for name in names if name != CLASS_HEAD and not name.startswith(beside)}
    bare = {name: name.removeprefix(prefix) for name in theirs}
    return {name: short for name, short in bare.items() if not short.startswith(HEADS)}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decoder(kind: str, settings: ModelSettings) -> Names:
    queries, keys = (heads * settings.resolved_head_dim for heads in (settings.num_heads, settings.num_kv_heads))
    names: Names = {"embedding.weight": [("model.embed_tokens.weight", 0)], "norm.weight": [("model.norm.weight", 0)]}
    if not settings.tied_embeddings:
        names["head.weight"] = [("lm_head.weight", 0)]
    for layer in range(settings.num_layers + settings.num_mtp_modules):
        block = f"blocks.{layer}." if layer < settings.num_layers else f"extra_blocks.{layer - settings.num_layers}."
        theirs = f"model.layers.{layer}."
        for ours, norm in DECODER_NORMS[settings.norm_placement].items():
            names[f"{block}{ours}.weight"] = [(f"{theirs}{norm}.weight", 0)]
        if settings.qk_norm:
            for side in ("query", "key"):
                names[f"{block}attention.{side}_norm.weight"] = [(f"{theirs}self_attn.{side[0]}_norm.weight", 0)]
        fused, inner = kind == "phi3", settings.intermediate_size
        projections = [("qkv_proj", 0)] if fused else [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
        gates = [("gate_up_proj", 0)] if fused else [("gate_proj", inner), ("up_proj", inner)]
        for what, attention, mlp in (
            ("weight", True, True),
            ("bias", settings.attention_bias, settings.feed_forward_bias),
        ):
            if attention and attention != "none":
                names[f"{block}attention.query_key_value.{what}"] = [
                    (f"{theirs}self_attn.{name}.{what}", rows) for name, rows in projections
                ]
            if attention in (True, "all"):
                names[f"{block}attention.output.{what}"] = [(f"{theirs}self_attn.o_proj.{what}", 0)]
            if mlp and not has_experts(settings, layer):
                names[f"{block}feed_forward.gate_up.{what}"] = [
                    (f"{theirs}mlp.{name}.{what}", rows) for name, rows in gates
                ]
                names[f"{block}feed_forward.down.{what}"] = [(f"{theirs}mlp.down_proj.{what}", 0)]
        if has_experts(settings, layer):
            names |= _experts(kind, settings, theirs, f"{block}feed_forward.")
    return names


def _experts(kind: str, settings: ModelSettings, theirs: str, ours: str) -> Names:
    layer, gate, up, down = EXPERTS.get(kind, ("mlp", "gate_proj", "up_proj", "down_proj"))
    experts, width, theirs = settings.experts, settings.expert_width, f"{theirs}{layer}."
    assert experts is not None
    matrices = [f"{theirs}experts.{number}." for number in range(experts.count)]
    names: Names = {
        f"{ours}router.weight": [(f"{theirs}gate.weight", 0)],
        f"{ours}experts.gate_up": [(f"{one}{name}.weight", width) for one in matrices for name in (gate, up)],
        f"{ours}experts.down": [(f"{one}{down}.weight", settings.hidden_size) for one in matrices],
    }
    if experts.balance == "bias":
        names[f"{ours}router.bias"] = [(f"{theirs}gate.e_score_correction_bias", 0)]
    if experts.shared:
        shared = f"{theirs}shared_experts."
        gates = [(f"{shared}{name}.weight", experts.shared * width) for name in (gate, up)]
        names |= {f"{ours}shared.gate_up.weight": gates, f"{ours}shared.down.weight": [(f"{shared}{down}.weight", 0)]}
    return names


def _t5(settings: ModelSettings) -> Names:
    names: Names = {"embedding.weight": [("shared.weight", 0)]}
    if not settings.tied_embeddings:
        names["head.weight"] = [("lm_head.weight", 0)]
    for side, ours, stack in (("encoder.", "encoder.", settings.encoder), ("decoder.", "", settings)):
        bias = f"{side}block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names |= {
            f"{ours}relative_bias.weight": [(bias, 0)],
            f"{ours}norm.weight": [(f"{side}final_layer_norm.weight", 0)],
        }
        for layer in range(stack.num_layers):
            names |= _t5_block(stack, f"{side}block.{layer}.layer.", f"{ours}blocks.{layer}.", side == "decoder.")
    return names


def _t5_block(settings: ModelSettings, theirs: str, ours: str, crosses: bool) -> Names:
    rows, last = settings.num_heads * settings.resolved_head_dim, 2 if crosses else 1
    attention, cross, feed_forward = (
        f"{theirs}0.SelfAttention.",
        f"{theirs}1.EncDecAttention.",
        f"{theirs}{last}.DenseReluDense.",
    )
    names: Names = {
        f"{ours}attention_norm.weight": [(f"{theirs}0.layer_norm.weight", 0)],
        f"{ours}attention.query_key_value.weight": [(f"{attention}{name}.weight", rows) for name in "qkv"],
        f"{ours}attention.output.weight": [(f"{attention}o.weight", 0)],
        f"{ours}feed_forward_norm.weight": [(f"{theirs}{last}.layer_norm.weight", 0)],
        f"{ours}feed_forward.down.weight": [(f"{feed_forward}wo.weight", 0)],
    }
    if settings.gated:
        gates = [(f"{feed_forward}wi_{number}.weight", settings.intermediate_size) for number in (0, 1)]
        names[f"{ours}feed_forward.gate_up.weight"] = gates
    else:
        names[f"{ours}feed_forward.up.weight"] = [(f"{feed_forward}wi.weight", 0)]
    if crosses:
        names |= {
            f"{ours}cross_attention_norm.weight": [(f"{theirs}1.layer_norm.weight", 0)],
            f"{ours}cross_attention.query.weight": [(f"{cross}q.weight", 0)],
            f"{ours}cross_attention.key_value.weight": [(f"{cross}{name}.weight", rows) for name in "kv"],
            f"{ours}cross_attention.output.weight": [(f"{cross}o.weight", 0)],
        }
    return names


def _bert(settings: ModelSettings) -> Names:
    names: Names = {
        "embedding.weight": [("embeddings.word_embeddings.weight", 0)],
        "input.positions.weight": [("embeddings.position_embeddings.weight", 0)],
        "input.token_types.weight": [("embeddings.token_type_embeddings.weight", 0)],
    }
    rows = settings.num_heads * settings.resolved_head_dim
    for what in ("weight", "bias"):
        names[f"input.norm.{what}"] = [(f"embeddings.LayerNorm.{what}", 0)]
        for layer in range(settings.num_layers):
            ours, theirs = f"blocks.{layer}.", f"encoder.layer.{layer}."
            names |= {
                f"{ours}attention_norm.{what}": [(f"{theirs}attention.output.LayerNorm.{what}", 0)],
                f"{ours}attention.query_key_value.{what}": [
                    (f"{theirs}attention.self.{name}.{what}", rows) for name in ("query", "key", "value")
                ],
                f"{ours}attention.output.{what}": [(f"{theirs}attention.output.dense.{what}", 0)],
                f"{ours}feed_forward_norm.{what}": [(f"{theirs}output.LayerNorm.{what}", 0)],
                f"{ours}feed_forward.up.{what}": [(f"{theirs}intermediate.dense.{what}", 0)],
                f"{ours}feed_forward.down.{what}": [(f"{theirs}output.dense.{what}", 0)],
            }
    return names


def _modernbert(settings: ModelSettings) -> Names:
    names: Names = {"embedding.weight": [("embeddings.tok_embeddings.weight", 0)]}
    for what in ("weight", "bias"):
        norm = what == "weight" or settings.norm_bias
        attention = what == "weight" or settings.attention_bias == "all"
        feed_forward = what == "weight" or settings.feed_forward_bias
        if norm:
            names |= {
                f"input.norm.{what}": [(f"embeddings.norm.{what}", 0)],
                f"norm.{what}": [(f"final_norm.{what}", 0)],
            }
        for layer in range(settings.num_layers):
            ours, theirs = f"blocks.{layer}.", f"layers.{layer}."
            if norm and layer:  # the first attention reads the normalised embedding
                names[f"{ours}attention_norm.{what}"] = [(f"{theirs}attn_norm.{what}", 0)]
            if norm:
                names[f"{ours}feed_forward_norm.{what}"] = [(f"{theirs}mlp_norm.{what}", 0)]
            if attention:
                names[f"{ours}attention.query_key_value.{what}"] = [(f"{theirs}attn.Wqkv.{what}", 0)]
                names[f"{ours}attention.output.{what}"] = [(f"{theirs}attn.Wo.{what}", 0)]
            if feed_forward:
                names[f"{ours}feed_forward.gate_up.{what}"] = [(f"{theirs}mlp.Wi.{what}", 0)]
                names[f"{ours}feed_forward.down.{what}"] = [(f"{theirs}mlp.Wo.{what}", 0)]
    return names
