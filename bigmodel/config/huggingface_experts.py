"""Mixture of experts in a Hugging Face config.json, and back.

In: config.json as a table, with the defaults of its type. Out: [model.experts]. Guarantee: a value without a
counterpart is an error that names the key.

`router_aux_loss_coef` weighs one balance loss of all layers together, `balance_weight` the sum over layers of each
one's: it is the coefficient divided by the number of layers with experts. With 0 there is no balance loss.
"""

from collections.abc import Mapping
from typing import Any

from bigmodel.config.expert_settings import TRAINING_ONLY
from bigmodel.config.model_settings import ModelSettings
from bigmodel.config.sections import UserError

Config = Mapping[str, Any]

# The key that has the number of experts, by type.
COUNT = {
    "mixtral": "num_local_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts", "dots1": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
}  # fmt: skip
OWN_WIDTH = ("qwen3_moe", "dots1", "glm4_moe")  # experts of the others have intermediate_size
DEEPSEEK = ("dots1", "glm4_moe")  # the experts of DeepSeek-V3


def read_experts(config: Config) -> dict[str, Any]:
    """Settings of the model beside those of dense ones; empty for a type without experts. Raises `UserError` for what
    our experts lack."""
    kind = config["model_type"]
    if kind not in COUNT:
        return {}
    _refuse_others(config)
    first = _first_dense_layers(config)
    experts = {
        "count": config[COUNT[kind]],
        "per_token": config["num_experts_per_tok"],
        "width": config["moe_intermediate_size"] if kind in OWN_WIDTH else 0,
        "first_dense_layers": first,
        "normalize_weights": kind == "mixtral" or config["norm_topk_prob"],
    }
    if kind in DEEPSEEK:
        experts |= {
            "scores": "sigmoid",
            "balance": "bias",
            "route_scale": config["routed_scaling_factor"],
            "shared": config["n_shared_experts"] or 1,  # the class has one always
            "groups": config["n_group"],
            "groups_per_token": config["topk_group"],
        }
    elif weight := config["router_aux_loss_coef"] / max(1, config["num_hidden_layers"] - first):
        experts["balance_weight"] = weight
    else:
        experts["balance"] = "none"
    return {"experts": experts}


def write_experts(kind: str, settings: ModelSettings) -> dict[str, Any]:
    """Keys of config.json; empty for a type without experts. What the type lacks is lost: `differences_of_experts`."""
    experts = settings.experts
    if kind not in COUNT or experts is None:
        return {}
    theirs: dict[str, Any] = {COUNT[kind]: experts.count, "num_experts_per_tok": experts.per_token}
    theirs |= {"moe_intermediate_size" if kind in OWN_WIDTH else "intermediate_size": settings.expert_width}
    theirs |= {} if kind == "mixtral" else {"norm_topk_prob": experts.normalize_weights}
    if kind == "qwen3_moe":
        theirs |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(experts.first_dense_layers))}
    if kind in DEEPSEEK:
        return theirs | {
            "first_k_dense_replace": experts.first_dense_layers,
            "n_shared_experts": experts.shared,
            "routed_scaling_factor": experts.route_scale,
            "n_group": experts.groups,
            "topk_group": experts.groups_per_token,
        }
    layers = settings.num_layers - experts.first_dense_layers
    weight = experts.balance_weight * layers if experts.balance == "loss" else 0.0
    return theirs | {"router_aux_loss_coef": float(f"{weight:.12g}")}  # 0.001 / 3 * 3 is 0.001 again


def differences_of_experts(ours: ModelSettings, back: ModelSettings) -> list[str]:
    """The settings of experts that decide what is computed and did not come back, as "model.experts.name = value"."""
    there, again = _compared(ours), _compared(back)
    return [f"model.experts.{name} = {value!r}" for name, value in there.items() if value != again[name]]


def _compared(settings: ModelSettings) -> dict[str, Any]:
    if settings.experts is None:
        return {}
    table = settings.experts.model_dump(exclude={*TRAINING_ONLY})
    return table | {"width": settings.expert_width}


def _refuse_others(config: Config) -> None:
    if config.get("router_jitter_noise"):
        raise UserError(
            f"router_jitter_noise = {config['router_jitter_noise']!r}: our routers have no noise, which is of training "
            "only; set it to 0"
        )
    if config.get("clip_qkv") is not None:
        raise UserError(f"clip_qkv = {config['clip_qkv']!r}: our model does not clip queries, keys and values")


def _first_dense_layers(config: Config) -> int:
    """Layers without experts, which must be the first ones."""
    if config["model_type"] != "qwen3_moe":
        return config.get("first_k_dense_replace", 0)
    step, dense, layers = config["decoder_sparse_step"], config["mlp_only_layers"], int(config["num_hidden_layers"])
    sparse = [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]
    if not sparse or sparse != list(range(sparse[0], layers)) or not config["num_experts"]:
        raise UserError(
            f"decoder_sparse_step = {step!r}, mlp_only_layers = {dense!r}, num_experts = {config['num_experts']!r}: "
            "our layers have experts from one on (model.experts.first_dense_layers), and one at least"
        )
    return sparse[0]
