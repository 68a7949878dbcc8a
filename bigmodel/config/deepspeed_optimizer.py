"""The `optimizer` block of a DeepSpeed JSON, as settings.

In: the user's JSON and `Settings`. Out: settings with the optimizer of the JSON. "auto", and a parameter that is
absent, take the run file's value. A parameter that would change the update in a way that is not offered is refused.
DeepSpeed itself gets no optimizer: the optimizers are torch's and ours. Written against DeepSpeed 0.19.8.

    {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}
    -> optimizer.kind = "adamw", learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.99
"""

import json
from typing import Any

from bigmodel.config.deepspeed_json import Source
from bigmodel.config.deepspeed_row import AUTO
from bigmodel.config.deepspeed_schedule import peak_of
from bigmodel.config.deepspeed_values import below_one, number, rate, shown, unquoted
from bigmodel.config.sections import without_effect
from bigmodel.config.settings import Settings
from bigmodel.training.optimizers.table import OPTIMIZERS

RATES = ("lr", "muon_lr", "adam_lr")  # the latter two: of Muon's matrices, and of what AdamW updates there
NUMBERS = {
    "eps": ("epsilon", rate()),
    "weight_decay": ("weight_decay", number()),
    "momentum": ("momentum", below_one()),
}

# Parameters that choose an implementation, or a variant of which one is ours: the values that change no result.
FLAGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "torch_adam": ((True, False), "the implementation does not matter"),
    "fused": ((True, False, None), "the implementation does not matter"),
    "foreach": ((True, False, None), "the implementation does not matter"),
    "set_grad_none": ((True, False), "gradients are ours"),
    "adam_w_mode": ((True, False), "see _refuse_l2"),
    "bias_correction": ((True,), "moments are always corrected, as in the paper"),
    "amsgrad": ((False,), "AMSGrad is not offered"),
    "maximize": ((False,), "the loss is minimized"),
    "capturable": ((False,), "CUDA graphs are not offered"),
    "differentiable": ((False,), "it is not offered"),
    "fp32_optimizer_states": ((True,), "moments are fp32"),
    "per_head_muon": ((False,), "whole matrices are orthogonalised"),
    "ns_method": (("gram", "standard"), "both are the same polynomial"),
}

# Why a type is not supported; all names in lower case.
UNSUPPORTED = {
    "lamb": "it scales updates by layer norms, for batches of tens of thousands of samples",
    "adagrad": "its rate only falls",
    "muadam": "muP is not offered",
    "muadamw": "muP is not offered",
    "musgd": "muP is not offered",
    "onebitadam": "DeepSpeed 0.19.8 no longer has it",
    "zerooneadam": "DeepSpeed 0.19.8 no longer has it",
    "onebitlamb": "DeepSpeed 0.19.8 no longer has it",
    "fusedadam": 'write "AdamW"; the implementation is chosen here',
    "deepspeedcpuadam": 'write "AdamW"; the implementation is chosen here',
    "cpuadam": 'write "AdamW"; the implementation is chosen here',
}


def settle_optimizer(config: dict[str, Any], settings: Settings, source: Source) -> Settings:
    """Settings with the optimizer of the JSON. Problems go to `source`."""
    section = config.get("optimizer", {})
    settings = _settle_type(section.get("type", AUTO), settings, source)
    parameters = {} if section.get("params") is None else section["params"]
    if not _is_offered(section.get("type", AUTO)):
        return settings
    if parameters != AUTO and not isinstance(parameters, dict):
        source.problem(f"optimizer.params = {json.dumps(parameters)} must be an object {{...}}")
    elif parameters != AUTO:
        _refuse_flags(section, parameters, source)
        settings = _settle_rates(config, parameters, settings, source)
        settings = _settle_numbers(parameters, settings, source)
        settings = _settle_betas(parameters.get("betas"), settings, source)
    for problem in without_effect(settings.optimizer).values():
        source.problem(f"optimizer, with the settings of the run file: {problem}")
    return settings


def fill_optimizer(config: dict[str, Any], settings: Settings) -> None:
    """Replace "auto" in the optimizer block by the settings' values."""
    section = config.get("optimizer")
    if not section:
        return
    optimizer = settings.optimizer
    row = OPTIMIZERS[optimizer.kind]
    values = {"lr": optimizer.learning_rate, "betas": [optimizer.beta1, optimizer.beta2], "eps": optimizer.epsilon}
    values |= {"weight_decay": optimizer.weight_decay, "momentum": optimizer.momentum}
    values |= {"muon_lr": values["lr"], "adam_lr": optimizer.learning_rate * optimizer.adamw_rate_factor}
    if section.get("type") == AUTO:
        section["type"] = next(iter(row.json_types), optimizer.kind)
    if section.get("params") == AUTO:
        read = {"lr", "weight_decay"} | ({"betas"} if "beta1" in row.reads else set())
        read |= {key for key, (setting, _) in NUMBERS.items() if setting in row.reads}
        section["params"] = {key: value for key, value in values.items() if key in read}
    for key, value in values.items():
        if (section.get("params") or {}).get(key) == AUTO:
            section["params"][key] = value


def _settle_type(kind: Any, settings: Settings, source: Source) -> Settings:
    if kind == AUTO:
        return settings
    if _is_offered(kind):
        settings = source.agree(settings, "optimizer.kind", _types()[str(kind).lower()], "optimizer.type", kind)
        if settings.optimizer.kind == "muon":  # the one of DeepSpeed
            settings = source.agree(settings, "optimizer.matrix_scale", "original", "optimizer.type", kind)
        return settings
    offered = ", ".join(row.json_types[0] for row in OPTIMIZERS.values() if row.json_types)
    reason = UNSUPPORTED.get(str(kind).lower(), "")
    source.problem(
        f"optimizer.type = {json.dumps(kind)} is not supported{': ' + reason if reason else ''}; "
        f"choose one of {offered}"
    )
    return settings


def _types() -> dict[str, str]:
    """Names of optimizers in a JSON, in lower case, as DeepSpeed compares them -> optimizer.kind."""
    return {name.lower(): kind for kind, row in OPTIMIZERS.items() for name in row.json_types}


def _is_offered(kind: Any) -> bool:
    return kind == AUTO or str(kind).lower() in _types()


def _refuse_flags(section: dict[str, Any], parameters: dict[str, Any], source: Source) -> None:
    """Refuse unknown parameters, and variants that are not offered."""
    known = {"betas", "max_grad_norm", *NUMBERS, *RATES, *FLAGS}
    source.refuse_unknown(parameters, known, "optimizer.params.")
    if "max_grad_norm" in parameters:
        source.problem("optimizer.params.max_grad_norm: write gradient_clipping at the top of the JSON instead")
    for name, (harmless, reason) in FLAGS.items():
        value = parameters.get(name, harmless[0])
        if value != AUTO and not any(value is one or (value == one and isinstance(one, str)) for one in harmless):
            allowed = " or ".join(map(json.dumps, harmless))
            source.problem(f"optimizer.params.{name} = {json.dumps(value)} must be {allowed}: {reason}")
    decays = parameters.get("weight_decay") not in (0, 0.0)
    if parameters.get("adam_w_mode") is False and str(section.get("type")).lower() != "adamw" and decays:
        source.problem(
            "optimizer.params.adam_w_mode = false: only decoupled weight decay is supported, not L2; remove the key, "
            "or write weight_decay = 0, with which both are the same"
        )


def _settle_numbers(parameters: dict[str, Any], settings: Settings, source: Source) -> Settings:
    for key, (setting, _) in NUMBERS.items():
        value = _number(parameters, key, source)
        if value is not None:
            path = f"optimizer.params.{key}"
            settings = source.agree(settings, f"optimizer.{setting}", value, path, parameters[key])
    return settings


def _settle_rates(config: dict[str, Any], parameters: dict[str, Any], settings: Settings, source: Source) -> Settings:
    """The highest rate of the schedule, and Muon's rate for what AdamW updates as a factor of it."""
    rate, of_matrices, of_others = (_number(parameters, key, source) for key in RATES)
    peak, of_muon = peak_of(config), [key for key in RATES[1:] if key in parameters]
    if of_muon and settings.optimizer.kind != "muon":
        source.problem(f'optimizer.params.{of_muon[0]} has no effect without optimizer.type = "Muon"; remove it')
    elif of_muon and peak:
        source.problem(
            f"optimizer.params.{of_muon[0]}: in DeepSpeed, {peak} replaces the rate of every parameter; "
            "remove one of them"
        )
    elif not peak:
        key, highest = ("lr", rate) if of_matrices is None else ("muon_lr", of_matrices)
        if highest:
            path = f"optimizer.params.{key}"
            settings = source.agree(settings, "optimizer.learning_rate", highest, path, highest)
        of_others = of_others or (rate if of_matrices else None)
        if of_others:
            factor = of_others / settings.optimizer.learning_rate
            path = "optimizer.params.adam_lr"
            settings = source.agree(settings, "optimizer.adamw_rate_factor", factor, path, of_others)
    return settings


def _number(parameters: dict[str, Any], key: str, source: Source) -> float | None:
    """A checked number; None if it is absent, "auto" or wrong."""
    value = parameters.get(key, AUTO)
    if value == AUTO:
        return None
    wanted = NUMBERS.get(key, ("", rate()))[1]
    try:
        return float(wanted.read(value))
    except ValueError:
        source.problem(f'optimizer.params.{key} = {shown(value)} must be {wanted.words} (or "auto"){unquoted(value)}')
    return None


def _settle_betas(betas: Any, settings: Settings, source: Source) -> Settings:
    if betas is None or betas == AUTO:
        return settings
    numbers = isinstance(betas, list) and len(betas) == 2 and all(type(beta) in (int, float) for beta in betas)
    if not numbers or not all(0 <= beta < 1 for beta in betas):
        source.problem(f"optimizer.params.betas = {json.dumps(betas)} must be two numbers from 0 to below 1")
        return settings
    for index, beta in enumerate(betas):
        path = f"optimizer.params.betas[{index}]"
        settings = source.agree(settings, f"optimizer.beta{index + 1}", float(beta), path, beta)
    return settings
