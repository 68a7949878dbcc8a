"""Cases that compare the engine with plain torch, and their error bounds.

A case is one value for every factor below. `pairwise` gives few cases that contain every valid pair of values (CI);
`everything` gives all cases (`make exactness`). The oracle is one process of plain torch. For bf16 and fp16 it
computes in float64, and the engine's error may be twice that of one process of that precision.
"""

import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from bigmodel.checks.plain_torch import distance
from bigmodel.config.settings import Settings
from bigmodel.training.optimizers.table import OPTIMIZERS
from tests.support.engine_worker import PACKS, oracle, settings_table

STEPS = 20
FEW_STEPS = 8  # in the test suite: moments, averages and bias corrections have an effect, at two fifths of the cost
FACTORS: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16", "fp16"),
    "optimizer": tuple(OPTIMIZERS),
    "activation_checkpointing": ("none", "selective", "full"),
    "offload": ("none", "optimizer to cpu", "optimizer and weights to cpu", "optimizer to nvme"),
    "packs_at_once": (1, 2, 3),
    "persistence": (0, 100),  # stage 3: parameters of fewer elements stay whole
    "ema": (0.0, 0.9),
    "groups": (False, True),
    "tied": (False, True),
    "experts": ("none", "balanced by loss", "balanced by bias"),
}
EXPERTS = {"count": 4, "per_token": 2, "width": 20, "shared": 1, "first_dense_layers": 1, "router_z_weight": 0.01}
BALANCED: dict[str, Any] = {
    "balanced by loss": EXPERTS | {"balance_weight": 0.1},
    "balanced by bias": EXPERTS | {"balance": "bias", "bias_rate": 0.01, "scores": "sigmoid", "route_scale": 1.5},
    "with a capacity": EXPERTS | {"balance": "none", "capacity_factor": 0.8, "min_capacity": 1},  # not in the matrix
}
Case = dict[str, Any]
GROUPS = [{"parameters": "blocks.0.*", "learning_rate_factor": 0.5}, {"parameters": "norm.*", "weight_decay": 0.2}]
GROUPS += [{"parameters": "blocks.1.*", "l1_penalty": 1.0}]


def valid(case: Case) -> bool:
    """Whether the configuration accepts it (bigmodel/config/deepspeed_config.py refuses the rest with a reason)."""
    low, offload, stage = case["precision"] != "fp32", case["offload"], case["stage"]
    row, device = OPTIMIZERS[case["optimizer"]], offload.rpartition(" ")[2]
    return (
        stage in row.stages
        and device in ("none", *row.offloads)
        and not (low and stage == 0)
        and not (offload != "none" and stage == 0)
        and not (offload == "optimizer and weights to cpu" and stage < 3)
        and not (case["persistence"] and stage < 3)
        and not (case["experts"] != "none" and case["optimizer"] == "adafactor")
    )


def can_share_matrices(case: Case) -> bool:
    """Whether tensor-parallel ranks may train it (bigmodel/config/parallel_settings.py)."""
    return case["experts"] == "none" and case["optimizer"] != "adafactor"


@cache
def everything() -> list[Case]:
    cases = (dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values()))
    return [case for case in cases if valid(case)]


@cache
def pairwise(seed: int = 1) -> list[Case]:
    """Few cases that together contain every valid pair of values: greedy, from random candidates."""
    cases, draw = everything(), random.Random(seed)
    missing = set().union(*(_pairs(case) for case in cases))
    chosen = []
    while missing:
        candidates = draw.sample(cases, 300)
        pair = min(missing, key=str)
        candidates.append(next(case for case in cases if pair in _pairs(case)))
        best = max(candidates, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: Case) -> frozenset[Any]:
    return frozenset(itertools.combinations(sorted(case.items()), 2))


def name_of(case: Case) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def table_of(case: Case, folder: Path, **zero: Any) -> dict[str, Any]:
    """The run file of a case, as a table."""
    if case["offload"] != "none":
        files = {"device": "nvme", "nvme_path": str(folder)}
        zero["offload_optimizer"] = files if case["offload"] == "optimizer to nvme" else {"device": "cpu"}
    if case["offload"] == "optimizer and weights to cpu":
        zero["offload_param"] = {"device": "cpu"}
    optimizer = {"kind": case["optimizer"], "groups": GROUPS if case["groups"] else []}
    training = {"activation_checkpointing": case["activation_checkpointing"], "ema_decay": case["ema"]}
    return settings_table(
        folder,
        case["stage"],
        case["precision"],
        case["packs_at_once"],
        persistence=case["persistence"],
        tied=case["tied"],
        optimizer=optimizer,
        training=training,
        experts=BALANCED.get(case.get("experts", "none")),
        vocabulary_multiple=case.get("tensors", 0),
        zero=zero,
    )


@cache
def _oracle(
    folder: Path,
    precision: str,
    optimizer: str,
    ema: float,
    groups: bool,
    tied: bool,
    experts: str,
    tensors: int,
    packs: int,
    steps: int,
) -> Any:
    """Path of the oracle's tensors, its losses and norms, and the errors of one process of that precision."""
    case = {"stage": 1, "precision": precision, "optimizer": optimizer, "activation_checkpointing": "none"}
    case |= {"offload": "none", "packs_at_once": 1, "persistence": 0, "ema": ema, "groups": groups, "tied": tied}
    case |= {"experts": experts, "tensors": tensors}
    settings = Settings.model_validate(table_of(case, folder))
    stem = f"oracle-{precision}-{optimizer}-{ema}-{groups}-{tied}-{experts}-{tensors}-{packs}-{steps}"
    path = folder / f"{stem}.safetensors"
    low = precision != "fp32"
    seen = oracle(settings, steps, path, wide=low)
    if not low:
        return path, seen, {}
    one = folder / f"{stem}-one.safetensors"
    seen_by_one = oracle(settings, steps, one, packs_at_once=packs)
    found, wanted = load_file(one), load_file(path)
    allowed = {
        part: distance(*({k: v for k, v in x.items() if k.startswith(f"{part}.")} for x in (found, wanted)))
        for part in ("0", "weight")
    }
    allowed["loss"] = abs(seen_by_one[0]["loss"] / seen[0]["loss"] - 1)
    allowed["norm"] = abs(seen_by_one[0]["norm"] / seen[0]["norm"] - 1)
    return path, seen, allowed


def job_of(case: Case, folder: Path, steps: int = STEPS, **zero: Any) -> dict[str, Any]:
    """The job for `tests.support.engine_worker.launch`."""
    facts = [*(case[key] for key in ("precision", "optimizer", "ema", "groups", "tied")), case.get("experts", "none")]
    facts.append(case.get("tensors", 0))
    packs = case["packs_at_once"] if case["precision"] != "fp32" else PACKS
    path, seen, allowed = _oracle(folder, *facts, packs, steps)
    table = table_of(case, folder, **zero)
    if "tensors" in case:
        table["training"]["tensor_parallel_ranks"] = case["tensors"]
    return {"settings": table, "steps": steps, "oracle": str(path), "seen": seen, "allowed": allowed}


def with_sequence(job: dict[str, Any], ranks: int, method: str = "ulysses") -> dict[str, Any]:
    """The job with packs shared by `ranks` ranks."""
    settings, shared = job["settings"], {"sequence_parallel_ranks": ranks, "sequence_parallel_method": method}
    return job | {"settings": settings | {"training": settings["training"] | shared}}


def with_shared_experts(job: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The job with the experts of each layer shared by `ranks` ranks."""
    settings = job["settings"]
    return job | {"settings": settings | {"training": settings["training"] | {"expert_parallel_ranks": ranks}}}


def differences(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Compared quantity -> (difference from the oracle, its bound)."""
    first, seen, allowed = 0, result["seen"], result["allowed"]
    is_dense = "experts" not in result["settings"]["model"]  # else rounding may move a token to another expert
    loss = abs(result["losses"][first] / seen[first]["loss"] - 1)
    norm = abs(result["norms"][first] / seen[first]["norm"] - 1)
    if not allowed:
        return {
            "loss": (loss, 1e-6),
            "gradient": (max(result["gradient_errors"]), 1e-5),
            "norm": (norm, 1e-6),
            "weights": (result["weight_distance"], 1e-3),
            "average": (result.get("ema_distance", 0.0), 1e-3),
        }
    return {
        "gradient": (result["gradient_distances"][0], 2 * allowed["0"]),
        "norm": (norm, max(2 * allowed["norm"], allowed["0"])),  # one process's norm may be right by chance
        "loss": (loss, max(2 * allowed["loss"], 1e-3)),
        "weights": (result["weight_distance"], (2 if is_dense else 4) * allowed["weight"]),
    }


def failures(result: dict[str, Any]) -> list[str]:
    found = [f"{what}: {far:.2e} > {may:.2e}" for what, (far, may) in differences(result).items() if not far <= may]
    found += [] if result["updates"] == result["steps"] else [f"{result['updates']} updates in {result['steps']} steps"]
    nvme = "nvme" in Path(result["settings"]["training"]["deepspeed"]).read_text()
    outside = 0 if nvme else result["state_tensors"]
    found += [] if result["state_outside_files"] == outside else ["the state is not where the offload places it"]
    found += [] if result["keeps_signed_zeros"] else ["the state is not restored to the last bit"]
    return found
