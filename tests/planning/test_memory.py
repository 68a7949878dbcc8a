"""The memory of each GPU: every part is counted, at every stage; `show memory` prints it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from bigmodel.config.settings import Settings, load_settings, positions_before
from bigmodel.inspect.memory import activation_bytes, state_bytes
from bigmodel.pictures import MEMORY
from bigmodel.planning.context import Context, cluster_of_ranks, context_of
from bigmodel.planning.memory import GIB, PARTS, headlines, memory_of, memory_part, stages_of, tensors_of
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.show_memory import show_memory
from tests.planning.test_activation_memory import MODEL, model_of, table_of

REPOSITORY = Path(__file__).parents[2]
TOKENS = 4096


def context(table: dict[str, Any], ranks: int = 8, micro_batch: int = 1, stage: int = 1, **zero: Any) -> Context:
    """Of a run file without a DeepSpeed JSON of its own."""
    found = context_of(Settings.model_validate(table), cluster_of_ranks(ranks), TOKENS)
    found.effective["train_micro_batch_size_per_gpu"] = micro_batch
    found.effective["zero_optimization"] |= {"stage": stage} | zero
    return found


OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
CASES: dict[str, dict[str, Any]] = {
    "llama, micro-batch 3": {"micro_batch": 3},
    "gpt2, ZeRO 2": {"stage": 2},
    "t5, ZeRO 3": {"stage": 3},
    "bert, micro-batch 2": {"micro_batch": 2, "stage": 2},
    "gemma2, ZeRO 3": {"stage": 3, "stage3_max_live_parameters": 1e5},
    "mixed, offload": {"stage": 3} | OFFLOAD,
    "two widths, hpz": {"stage": 3, "zero_hpz_partition_size": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_that_are_counted(case: str) -> None:
    """Within 5%: the state as the engines of another test hold it, one micro-batch on the meta device."""
    run = context(table_of(model_of(case.partition(",")[0]), "bf16", "selective"), **CASES[case])
    plan = memory_of(run)
    settings, effective = run.settings, run.effective
    counted = sum(state_bytes(settings, effective, run.vocabulary, run.ranks).device.values())
    counted += activation_bytes(settings, effective, run.vocabulary)
    assert tensors_of(plan) / 1.05 == pytest.approx(counted, rel=0.05), "5% of fragmentation are added"


@pytest.mark.parametrize("kind", ["none", "full"])
def test_a_teacher_is_counted_with_its_forward(tmp_path: Path, kind: str) -> None:
    """Four times as wide as the student, so that its forward is the peak with full checkpointing."""
    wide = model_of("llama") | {"hidden_size": 1024, "num_heads": 16, "num_kv_heads": 16, "intermediate_size": 4096}
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "settings.json").write_text(json.dumps({"data": {"directory": "data"}}))
    state = {"model": wide, "shapes": {"embedding.weight": [TOKENS, 1024]}}
    (tmp_path / "checkpoints" / "step-1" / "state.json").write_text(json.dumps(state))
    alone = context(table_of(model_of("llama"), "bf16", kind))
    taught = context(table_of(model_of("llama"), "bf16", kind) | {"distillation": {"teacher": str(tmp_path)}})
    plan = memory_of(taught).device
    settings, effective = taught.settings, taught.effective
    assert plan["teacher"] == state_bytes(settings, effective, TOKENS, 8).device["teacher"]
    counted = activation_bytes(settings, effective, TOKENS)
    assert plan["activations"] + plan["loss buffers"] == pytest.approx(counted, rel=0.05)
    assert counted > 1.05 * activation_bytes(alone.settings, alone.effective, TOKENS)


def test_ranks_that_share_a_sequence_divide_what_its_tokens_make() -> None:
    """The gradient of the output matrix is whole on each; the exchange of heads needs a second communicator."""
    table = table_of(model_of("llama"), "bf16", "none")
    shared = context(table | {"training": table["training"] | {"sequence_parallel_ranks": 4}})
    one, four = memory_of(context(table)).device, memory_of(shared).device
    counted = activation_bytes(shared.settings, shared.effective, shared.vocabulary)
    assert four["activations"] + four["loss buffers"] == pytest.approx(counted, rel=0.05)
    assert four["activations"] < one["activations"] / 3
    assert four["loss buffers"] > (4 + 2) * TOKENS * MODEL["hidden_size"], "fp32, and bf16 in the backward"
    assert four["weights"] == one["weights"]
    assert four["framework"] > one["framework"]


def test_gathered_keys_and_values_of_all_ranks_are_kept_by_each() -> None:
    """In every block, beside what the exchange of heads keeps; with recomputation those of one block."""
    for kind, blocks in (("none", MODEL["num_layers"]), ("full", 1)):
        table = table_of(model_of("llama"), "bf16", kind)
        held = []
        for method in ("ulysses", "all_gather"):
            more = {"sequence_parallel_ranks": 4, "sequence_parallel_method": method}
            held.append(memory_of(context(table | {"training": table["training"] | more})).device["activations"])
        model = context(table).settings.model
        keys = 2 * 2 * 2048 * model.num_kv_heads * model.resolved_head_dim
        assert blocks * keys <= held[1] - held[0] <= (blocks + 4) * keys, "at most the gradients in fp32, twice"


def test_ranks_that_share_experts_hold_a_part_of_them() -> None:
    """Masters and moments are partitioned over all ranks in any case; weights and gradients are not."""
    table = table_of(model_of("llama") | {"experts": {"count": 8, "width": 64}}, "bf16", "none")
    shared = context(table | {"training": table["training"] | {"expert_parallel_ranks": 4}})
    alone = context(table)
    of_experts = sum(one.numel for one in parameters_of(alone.settings, TOKENS) if one.is_of_experts)
    one, four = memory_of(alone).device, memory_of(shared).device
    assert one["weights"] - four["weights"] == 2 * of_experts * 3 // 4
    assert one["gradients"] - four["gradients"] == (4 + 2) * of_experts * 3 // 4
    assert (four["masters"], four["moments"]) == (one["masters"], one["moments"])
    parts = [memory_of(stages_of(one)["ZeRO 3"]).device for one in (alone, shared)]
    assert parts[1]["weights"] == parts[0]["weights"], "of all ranks together every expert once"
    assert parts[0]["gathered weights"] - parts[1]["gathered weights"] == 2 * of_experts * 3 // 4
    assert four["framework"] > one["framework"]
    total = sum(one.numel for one in parameters_of(alone.settings, TOKENS))
    model, trained = headlines(alone)
    assert model.startswith(f"{total:,} parameters ({total - of_experts * 6 // 8:,} active), "), (
        "2 of 8 experts a token"
    )
    assert headlines(shared) == [model, trained, "expert-parallel 4"]


def test_tensor_parallel_ranks_hold_a_part_of_the_matrices() -> None:
    table = table_of(model_of("llama"), "bf16", "none")
    shared = context(table | {"training": table["training"] | {"tensor_parallel_ranks": 2}})
    alone = context(table)
    matrices = sum(one.numel for one in parameters_of(alone.settings, alone.vocabulary) if one.is_of_tensors)
    one, two = memory_of(alone).device, memory_of(shared).device
    assert one["weights"] - two["weights"] == 2 * matrices // 2
    assert (two["masters"], two["moments"]) == (one["masters"], one["moments"])
    of_one, of_two = (device["activations"] + device["loss buffers"] for device in (one, two))
    states = 2 * shared.settings.data.sequence_length // 2 * MODEL["hidden_size"]  # of the other rank, in bf16
    assert of_two == of_one / 2 + 4 * states, "in two products of a block, and in the head with the gradient"


def test_one_gpu_needs_no_communicator_and_every_part_has_a_colour_and_a_note() -> None:
    table = table_of(model_of("llama"), "bf16", "none")
    one, eight = (memory_of(context(table, ranks)).device["framework"] for ranks in (1, 8))
    assert one < eight
    assert list(PARTS) == sorted(PARTS, key=list(PARTS).index)
    assert set(PARTS) == set(MEMORY)


def test_the_part_has_the_sum_of_its_rows_and_all_stages() -> None:
    run = context(table_of(model_of("llama"), "bf16", "none"), stage=2)
    part, plan = memory_part(run), memory_of(run)
    assert part.numbers["device_bytes"] == sum(plan.device.values()) == sum(part.numbers["device"].values())
    assert list(part.numbers["by_stage"]) == [
        "ZeRO 1", "ZeRO 2 (yours)", "ZeRO 3", "ZeRO 2, offload", "ZeRO 3, offload",
    ]  # fmt: skip
    by_stage = {name: one["device_bytes"] for name, one in part.numbers["by_stage"].items()}
    assert by_stage["ZeRO 1"] > by_stage["ZeRO 2 (yours)"] == part.numbers["device_bytes"]
    assert part.numbers["by_stage"]["ZeRO 3, offload"]["host_bytes"] > 0
    fp32 = stages_of(context(table_of(model_of("llama"), "fp32", "none")))
    assert next(iter(fp32)) == "ZeRO 0", "fp32 can be replicated"


def offloading(folder: Path) -> Settings:
    """A small run with the optimizer's state in the memory of the node."""
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero}))
    table = table_of(model_of("llama"), "bf16", "none")
    table["training"]["deepspeed"] = str(folder / "deepspeed.json")
    table["data"]["directory"] = str(folder / "data")  # none is prepared
    return Settings.model_validate(table)


def test_the_table_and_the_picture_compare_the_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = offloading(tmp_path)
    show_memory(settings, 8, 4, tmp_path / "memory.png", 0)
    printed = capsys.readouterr().out
    assert f"vocabulary {settings.prepare.vocabulary:,}\n" in printed
    for words in ("(yours)", "off the device", "activations", "fits: ", "framework", "8 ranks"):
        assert words in printed, words
    picture = (255 * imread(tmp_path / "memory.png")[..., :3]).astype(int)
    assert (picture[:50, :700].max(-1) < 80).sum() > 500, "no title"
    for colour in MEMORY["weights"], MEMORY["moments"], MEMORY["activations"]:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(picture - wanted).max(-1) < 3).sum() > 500


def test_a_small_device_keeps_its_digits_and_no_picture_is_drawn_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = offloading(tmp_path)
    before = sorted(tmp_path.iterdir())
    show_memory(settings, 8, 0.1, None, 0)
    printed = capsys.readouterr().out
    assert "of 102.4" in printed, "MiB"
    assert " 0.00 " not in printed, "what there is has digits"
    assert "picture" not in printed
    assert sorted(tmp_path.iterdir()) == before


def test_the_run_file_to_copy_is_sound_and_fits_the_gpus_that_it_names() -> None:
    run = context_of(load_settings(REPOSITORY / "configs/models/8b.toml"), cluster_of_ranks(64), 128_256)
    sizes = {name: sum(memory_of(one).device.values()) / GIB for name, one in stages_of(run).items()}
    assert sizes["ZeRO 1"] > 80 > 60 > sizes["ZeRO 2 (yours)"]
    assert positions_before(run.settings.training.steps, run.settings) == pytest.approx(964e9, rel=1e-3)
