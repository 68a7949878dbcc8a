"""The memory plan is what an engine holds at each ZeRO stage, and what the code makes of a micro-batch."""

import gc
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.inspect.memory import activation_bytes, model_without_memory, state_bytes
from tests.support.engine_worker import VOCABULARY, micro_batches_of, new_model, num_targets_of, settings_table
from tests.support.ranks import run_ranks

MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 1024}
BUCKET = 1000  # elements: the state is what is compared
CASES = [
    (stage, precision, offload)
    for stage, precision, offload in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("", "cpu"))
    if stage or (precision, offload) == ("fp32", "")
]
CASES += [(0, "fp32", "adapters"), *((stage, "bf16", "adapters") for stage in (1, 2, 3))]
EXPERTS = {"count": 8, "per_token": 2, "width": 96, "shared": 1, "first_dense_layers": 1}
OTHERS: dict[str, dict[str, Any]] = {  # sections of the run file
    "muon": {"optimizer": {"kind": "muon"}},
    "ademamix": {"optimizer": {"kind": "ademamix"}},
    "adafactor": {"optimizer": {"kind": "adafactor"}},
    "two modules of MTP": {"model": MODEL | {"num_mtp_modules": 2}},
    "shared sequences": {"training": {"sequence_parallel_ranks": 2}},
    "experts": {"model": MODEL | {"experts": EXPERTS}},
    "shared experts": {"model": MODEL | {"experts": EXPERTS}, "training": {"expert_parallel_ranks": 2}},
    "shared matrices": {"model": MODEL | {"vocabulary_multiple": 2}, "training": {"tensor_parallel_ranks": 2}},
}
CASES += [(stage, "bf16", name) for name in OTHERS for stage in (1, 3) if (stage, name) != (3, "shared experts")]
CASES += [(stage, precision, "shared experts") for stage, precision in ((0, "fp32"), (2, "bf16"))]


def table_of(folder: Path, stage: int, precision: str, kind: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
    zero |= {"stage3_prefetch_bucket_size": BUCKET, "sub_group_size": 10**6}
    if kind == "cpu":
        zero["offload_optimizer"] = {"device": kind}
    other = OTHERS.get(kind, {})
    training = {"ema_decay": 0.9} | other.get("training", {})
    optimizer = other.get("optimizer", {})
    table = settings_table(folder, stage, precision, 1, zero=zero, training=training, optimizer=optimizer)
    data = table["data"] | {"directory": str(folder / "data")}  # none is prepared
    lora = {"rank": 16, "targets": ["q_proj", "v_proj"]} if kind == "adapters" else {}
    return table | {"model": other.get("model", MODEL), "data": data, "lora": lora}


def storages() -> dict[int, torch.UntypedStorage]:
    """The memories of all tensors of this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    return {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}


def measure(tables: list[dict[str, Any]], folder: Path) -> None:
    """On a rank: the most that an engine of each case holds after any micro-batch, in its second or third step: in one
    of them DeepSpeed may not have freed something yet."""
    from bigmodel.distributed.world import end_world, start_world
    from bigmodel.training.zero.engine import Engine

    world = start_world(timeout_seconds=60)
    found = []
    for table in tables:
        before = storages()  # of earlier engines: kept, so that no new memory has the address of an old one
        effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
        engine = Engine(new_model(settings, effective), settings, effective, world)
        held: list[list[int]] = []
        for step in range(3):
            held.append([])
            shards = settings.training.sharing_ranks
            batches = micro_batches_of(step, world.rank // shards, world.size // shards, 1)
            for batch in batches:
                engine.micro_batch(batch, num_targets_of(step), batch is batches[-1])
                held[-1].append(sum(one.nbytes() for place, one in storages().items() if place not in before))
            engine.gradient_norm()
            engine.update(1e-3)
        found.append(min(map(max, held[1:])))
    if world.rank == 0:
        (folder / "measured.json").write_text(json.dumps(found))
    end_world()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[int, int]]:
    folder = tmp_path_factory.mktemp("memory")
    tables = [table_of(folder, *case) for case in CASES]
    run_ranks(2, measure, tables, folder, timeout_seconds=600)
    result = {}
    for case, table, found in zip(CASES, tables, json.loads((folder / "measured.json").read_text()), strict=True):
        effective, settings = resolve_deepspeed(Settings.model_validate(table), 2)
        plan = state_bytes(settings, effective, VOCABULARY, 2)
        result[case] = (sum(plan.device.values()) + sum(plan.host.values()), found)
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_is_what_an_engine_holds(measured: dict[Any, tuple[int, int]], case: Any) -> None:
    planned, found = measured[case]
    print(f"planned {planned:,}, found {found:,}: {found / planned:.3f}")
    assert planned == pytest.approx(found, rel=0.01)


def settings_of(checkpointing: str = "none", layers: int = 4, precision: str = "bf16") -> Settings:
    training = {"activation_checkpointing": checkpointing, "precision": precision, "global_batch_size": 8}
    data = {"max_document_length": 1024, "sequence_length": 2048, "max_documents": 16}
    return Settings.model_validate({"model": MODEL | {"num_layers": layers}, "data": data, "training": training})


def of_one_layer(checkpointing: str, precision: str = "bf16") -> int:
    more, fewer = (settings_of(checkpointing, layers, precision) for layers in (6, 4))
    sizes = [activation_bytes(one, resolve_deepspeed(one, 1)[0], VOCABULARY) for one in (more, fewer)]
    assert (sizes[0] - sizes[1]) % 2 == 0
    return (sizes[0] - sizes[1]) // 2


def test_a_layer_keeps_what_its_checkpointing_says() -> None:
    """full: its input. selective: also the results of products (query, key and value; output; gate and up; down), of
    attention, and in fp32 the logarithm of its sums. none: more than that."""
    positions, width, heads, head_width, forward_width = 2048, 256, 4, 64, 1024
    layer_input = 2 * positions * width
    products = 2 * positions * ((4 + 2 + 2) * head_width + width + 2 * forward_width + width)
    attention = 2 * positions * heads * head_width + 4 * positions * heads
    assert of_one_layer("full") == layer_input
    assert of_one_layer("full", "fp32") == 2 * layer_input
    assert of_one_layer("selective") == layer_input + products + attention
    assert of_one_layer("none") > of_one_layer("selective") + 2 * positions * forward_width


def test_what_the_loss_makes_is_counted() -> None:
    """A chunk of logits and its gradient, and until the backward pass the weight's gradient in fp32."""
    settings = settings_of("full", layers=1)
    effective = resolve_deepspeed(settings, 1)[0]
    small, large = (activation_bytes(settings, effective, vocabulary) for vocabulary in (2**15, 2**17))
    grown, more = large - small, 2**17 - 2**15
    chunk = (4 + 2) * 2048  # bytes for each token of the vocabulary, below the limit of a chunk at 2**15
    assert grown >= 4 * more * 256
    assert grown <= (4 + 2) * more * 256 + chunk * more


def test_a_billion_parameters_are_planned_without_their_memory(tmp_path: Path) -> None:
    model = {"num_layers": 16, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8, "intermediate_size": 8192}
    settings = Settings.model_validate({"model": model, "training": {"precision": "bf16", "global_batch_size": 64}})
    effective, settings = resolve_deepspeed(settings, 64)
    plan = state_bytes(settings, effective, 128_256, 64)
    layer = 2048 * (16 + 8 + 8) * 128 + 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048
    numel = 2 * 128_256 * 2048 + 16 * layer + 2048
    assert sum(p.numel() for p in model_without_memory(settings, 128_256).parameters()) == numel
    assert plan.device["weights"] == 2 * numel
    assert plan.device["masters"] == pytest.approx(4 * numel / 64, rel=1e-6)
    assert plan.device["moments"] == pytest.approx(8 * numel / 64, rel=1e-4)
