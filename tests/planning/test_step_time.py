"""Seconds of a step: its FLOPs and bytes by hand, what they are divided by, the run with its ramp, saves and cost."""

import json
import math
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import Settings
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.data.store.manifest import Manifest
from bigmodel.inspect.memory import model_without_memory
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.context import Context, context_of
from bigmodel.planning.cost import cost_part
from bigmodel.planning.pack_work import pack_work, work_of_documents
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.reliability import reliability_part
from bigmodel.planning.step_demand import passes_per_weight, ramp_of, step_demand
from bigmodel.planning.step_time import Rates, not_counted, step_time, time_part
from bigmodel.training.trained import passes

MODEL = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "tied_embeddings": True}
DATA = {"sequence_length": 256, "max_document_length": 256}
VOCABULARY = 1000
BLOCK = 4 * 64 * 64 + 3 * 64 * 128  # weights of a block's matrices


def context(
    nodes: int = 2, gpus: int = 4, hardware: dict[str, Any] | None = None, stage: int = 1, **sections: Any
) -> Context:
    training = {"steps": 100, "global_batch_size": 16} | sections.pop("training", {})
    table = {"model": MODEL, "data": DATA, "training": training} | sections
    cluster = Cluster.model_validate(
        {"nodes": nodes, "gpus_per_node": gpus, "hardware": {"gpu": "H100 SXM"} | (hardware or {})}
    )
    found = context_of(Settings.model_validate(table), cluster, VOCABULARY)._replace(
        vocabulary=VOCABULARY, manifest=None
    )
    found.effective["zero_optimization"]["stage"] = stage
    return found


def with_settings(given: Context, **training: Any) -> Context:
    changed = given.settings.training.model_copy(update=training)
    return given._replace(settings=given.settings.model_copy(update={"training": changed}))


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_flops_of_a_rank_are_those_by_hand() -> None:
    """16 packed sequences of one document of 256 tokens on 8 ranks."""
    given = context()
    one = work_of_documents(given.settings, np.array([256.0]))
    demand = step_demand(given, of_pack=one)
    tokens = 16 * 256 // 8
    assert (demand.tokens, demand.micro_batches, demand.blocks) == (16 * 256, 2, 2)
    assert demand.matrix_flops == 6 * tokens * (2 * BLOCK + VOCABULARY * 64)
    pairs = 16 * 2 * 256 * 257 // 2  # both layers, of the whole step
    assert demand.attention_flops == 3.5 * 4 * 64 * pairs / 8
    assert demand.recomputed_matrix_flops == demand.sequence_bytes == 0


def test_full_checkpointing_adds_a_forward_of_the_blocks_without_their_last_product() -> None:
    given = with_settings(context(), activation_checkpointing="full")
    demand = step_demand(given, of_pack=work_of_documents(given.settings, np.array([256.0])))
    tokens = 16 * 256 // 8
    assert demand.recomputed_matrix_flops == 2 * tokens * 2 * (BLOCK - 128 * 64)
    assert demand.recomputed_attention_flops == pytest.approx(demand.attention_flops / 3.5)
    plain = step_demand(context(), of_pack=demand.pack_work)
    assert demand.element_bytes > plain.element_bytes  # norms are computed again


def test_the_second_copy_of_hpz_keeps_gathers_inside_the_node() -> None:
    """2 micro-batches: the weights are gathered once over 8 ranks, and once among the 4 of a node."""
    given = context(stage=3)
    given.effective["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 4}
    found = step_time(given)
    numel = sum(one.numel for one in parameters_of(given.settings, VOCABULARY))
    width = 4 if given.settings.training.precision == "fp32" else 2
    link, node = 0.8 * 4 * 50e9, 0.8 * 450e9  # bytes a second: four adapters; NVLink
    assert found.phases["all_gather weights"] == pytest.approx(width * numel * 7 / 8 / link)
    assert found.phases["all_gather weights again"] == pytest.approx(width * numel * 3 / 4 / node)


def test_experts_move_their_rows() -> None:
    experts = {"count": 8, "per_token": 2, "width": 64}
    moved = [
        step_demand(context(model=MODEL | more)).element_bytes
        for more in ({"experts": experts}, {"experts": experts, "intermediate_size": 512}, {})
    ]
    assert moved[0] == moved[1] > moved[2], "no layer has the dense width"


def test_short_documents_have_less_attention() -> None:
    given = context()
    whole, short = (work_of_documents(given.settings, np.array([length])) for length in (256.0, 64.0))
    assert short.work.pairs == 2 * 4 * 64 * 65 // 2
    assert whole.work.pairs == 2 * 256 * 257 // 2
    assert short.mean_document == 64


def test_longer_documents_are_split() -> None:
    given = context()
    found = work_of_documents(given.settings, np.array([600.0]))  # 256, 256 and 88
    pairs = 2 * (2 * 256 * 257 + 88 * 89) // 2
    assert found.work.pairs == round(pairs * 256 / 600)
    assert found.mean_document == 200


def test_the_manifest_gives_nearly_the_pairs_of_the_lengths_themselves() -> None:
    """Lengths of a corpus; the manifest counts them by powers of two."""
    lengths = np.maximum(4, np.random.default_rng(3).lognormal(6.5, 1.3, 20_000)).astype(np.int64)
    bins = np.bincount(np.ceil(np.log2(lengths)).astype(np.int64))
    histogram = {str(2**power): int(count) for power, count in enumerate(bins) if count}
    statistics = {"histogram": histogram, "mean_tokens": float(lengths.mean())}
    manifest = Manifest("", 0, 0, 0, "", {}, {}, {}, {}, statistics, {}, {}, "", "", "")
    for longest in (512, 1000, 2048):
        table = {"model": MODEL, "data": {"sequence_length": 8192, "max_document_length": longest}}
        settings = Settings.model_validate(table)
        exact = work_of_documents(settings, lengths.astype(np.float64))
        found = pack_work(settings, manifest)
        assert found.is_measured
        assert found.work.pairs == pytest.approx(exact.work.pairs, rel=0.007), longest
    assert not pack_work(settings, None).is_measured


def test_both_sides_of_an_encoder_decoder_are_counted() -> None:
    model = MODEL | {"kind": "encoder_decoder", "encoder_num_layers": 3}
    data = {"sequence_length": 64, "source_sequence_length": 192, "max_document_length": 64}
    settings = Settings.model_validate({"model": model, "data": data})
    found = work_of_documents(settings, np.array([64.0])).work  # four documents of 16 and 48
    assert (found.positions, found.source_positions) == (64, 192)
    pairs = visible_pairs(np.full(4, 16), np.full(4, 48), np.zeros(4, np.int64), settings.model)
    assert (found.pairs, found.source_pairs, found.cross_pairs) == tuple(pairs)


FREEZES = {"training": {"freeze": ["blocks.1"]}}


@pytest.mark.parametrize(
    ("sections", "experts"), [({}, None), (FREEZES, None), ({"lora": {"rank": 4}}, None), (FREEZES, {"count": 4})]
)
@pytest.mark.parametrize("tied", [True, False])
def test_passes_per_weight_are_those_that_training_counts(sections: dict[str, Any], experts: Any, tied: bool) -> None:
    settings = Settings.model_validate({"model": MODEL | {"tied_embeddings": tied, "experts": experts}, **sections})
    found = passes_per_weight(parameters_of(settings, VOCABULARY), settings.model)
    assert found == pytest.approx(passes(model_without_memory(settings, VOCABULARY)))
    assert (found == 3) == (not sections)


def test_an_offloaded_update_is_the_host_s() -> None:
    given = context()
    given.effective["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    near, far = step_demand(context()), step_demand(given)
    trained = sum(one.numel for one in parameters_of(given.settings, VOCABULARY))
    assert far.pcie_bytes == 6 * trained / 8
    assert far.host_bytes == pytest.approx(30 * trained / 8, rel=1e-3)
    assert near.optimizer_bytes == far.optimizer_bytes + far.host_bytes
    assert near.pcie_bytes == near.host_bytes == 0


# ---- seconds --------------------------------------------------------------------------------------------------------


def test_phases_are_counts_over_rates_and_add_up() -> None:
    given, rates = context(stage=1), Rates(products=0.5, attention=0.25, memory=0.5, link=0.5)
    found = step_time(given, rates)
    demand, sent = found.demand, found.demand.collectives[0]
    assert found.phases["products"] == pytest.approx(demand.matrix_flops / (989e12 * 0.803 * 0.5))
    assert found.phases["attention"] == pytest.approx(demand.attention_flops / (989e12 * 0.25))
    assert found.phases["elements"] == pytest.approx(demand.element_bytes / (3350e9 * 0.5))
    assert sent.name == "all_reduce"
    # 2 nodes of 4: four adapters of 50 GB/s, narrower than NVLink; a ring of 8 sends 7/8 twice.
    trained = sum(one.numel for one in parameters_of(given.settings, VOCABULARY))
    assert found.phases["all_reduce gradients"] == pytest.approx(2 * 7 / 8 * 4 * trained / (200e9 * 0.5), rel=1e-6)
    assert sum(found.phases.values()) == pytest.approx(found.seconds)
    assert found.tokens_per_second == pytest.approx(found.tokens / found.seconds)
    assert found.mfu_causal == pytest.approx(demand.model_flops[0] / (8 * 989e12 * found.seconds))
    assert found.mfu_causal < found.mfu_full


def test_stage_2_sums_gradients_in_every_micro_batch_and_stage_3_gathers() -> None:
    one, two, three = (step_time(context(stage=stage)).phases for stage in (1, 2, 3))
    assert two["all_reduce gradients"] == pytest.approx(2 * one["all_reduce gradients"])
    assert "all_gather weights" in three
    assert "all_reduce gradients" not in three


def test_a_narrow_network_shows_in_the_sums_alone() -> None:
    near, far = (step_time(context(hardware={"network": name})).phases for name in ("InfiniBand NDR", "Ethernet 100"))
    assert far["all_reduce gradients"] == pytest.approx(32 * near["all_reduce gradients"])
    assert far["products"] == near["products"]


def test_the_fixed_seconds_are_of_micro_batches_and_steps() -> None:
    found = step_time(context(), Rates(seconds_per_block=0.5, seconds_per_step=3.0))
    assert found.phases["fixed"] == 3 + 0.5 * 2 * 2


def test_ulysses_exchanges_heads() -> None:
    """4 ranks share a sequence: a rank sends 3/4 of queries, keys, values and outputs, forward and backward."""
    given = context(training={"sequence_parallel_ranks": 4})
    demand = step_demand(given)
    tokens = 16 * 256 / 8
    assert demand.sequence_bytes == 2 * 2 * (4 * 64) * tokens * 2 * 3 / 4
    assert "all_to_all sequence parallel" in step_time(given).phases


def test_tensor_parallel_ranks_gather_states_and_add_them_up() -> None:
    """4 of 8 ranks: twice a gather and a sum in each of 2 blocks and passes, 2 gathers again in each; once each way in
    embedding and head."""
    given = context(training={"tensor_parallel_ranks": 4})
    demand, states = step_demand(given), 2 * 64 * 16 * 256
    assert demand.tensor_bytes == states * 3 * ((8 + 2) * 2 + 4) / 8
    assert demand.micro_batches == 4 * step_demand(context()).micro_batches
    again = step_demand(with_settings(given, activation_checkpointing="full"))
    assert again.tensor_bytes == states * 3 * ((8 + 4) * 2 + 4) / 8
    matrices = 2 * BLOCK + 64 * VOCABULARY
    exchanged = {f"{one.name} {one.purpose}": one for one in demand.collectives}
    held = exchanged["all_reduce gradients of matrices"]
    assert (held.payload, held.among) == (4 * matrices // 4, 2)
    found = step_time(given)
    assert found.phases["all_to_all tensor parallel"] > 0
    assert found.sent_bytes["all_to_all tensor parallel"] == demand.tensor_bytes


def test_gathered_keys_are_sent_to_all_others_and_their_gradients_back_in_fp32() -> None:
    """2 of 4 heads' keys and values, to 3 other ranks: bf16 forward, once more in a recomputation, fp32 backward."""
    model = MODEL | {"num_kv_heads": 2}
    training = {"sequence_parallel_ranks": 4, "sequence_parallel_method": "all_gather"}
    given = context(model=model, training=training)
    numbers = 2 * 2 * 16 * (16 * 256 / 8) * 2 * 3
    assert step_demand(given).sequence_bytes == numbers * (2 + 4)
    for kind in ("selective", "full"):
        assert step_demand(with_settings(given, activation_checkpointing=kind)).sequence_bytes == numbers * (2 * 2 + 4)
    assert "all_gather sequence parallel" in step_time(given).phases


def test_shared_experts_exchange_rows_and_are_summed_where_they_are_held() -> None:
    """4 of 8 ranks share 8 experts: a rank sends 3/4 of its rows, there and back, in both passes; experts are summed
    in a ring of 2."""
    model = MODEL | {"experts": {"count": 8, "per_token": 2, "width": 32}}
    given = context(model=model, training={"expert_parallel_ranks": 4})
    demand, tokens, experts = step_demand(given), 16 * 256 / 8, 2 * 8 * 3 * 64 * 32
    assert demand.expert_rows_bytes == 2 * 2 * 2 * 64 * 2 * tokens * 2 * 3 / 4
    again = step_demand(with_settings(given, activation_checkpointing="full"))
    assert again.expert_rows_bytes == 1.5 * demand.expert_rows_bytes
    exchanged = {f"{one.name} {one.purpose}": one for one in demand.collectives}
    held = exchanged["all_reduce gradients of experts"]
    assert (held.payload, held.sent(8)) == (4 * experts // 4, 4 * experts // 4)
    whole = step_demand(context(model=model)).collectives
    assert exchanged["all_reduce gradients"].payload == whole[0].payload - 4 * experts
    assert exchanged["all_gather new weights of experts"].payload == 2 * experts // 4
    found = step_time(given)
    assert found.phases["all_to_all expert parallel"] > 0
    assert found.sent_bytes["all_to_all expert parallel"] == demand.expert_rows_bytes
    alone = step_demand(context(nodes=1, model=model, training={"expert_parallel_ranks": 4})).collectives
    assert [one.purpose for one in alone] == ["gradients", "new weights"], "no other rank holds them"
    given.effective["zero_optimization"]["stage"] = 3
    exchanged = {one.purpose: one for one in step_demand(given).collectives}
    assert (exchanged["weights of experts"].payload, exchanged["weights of experts"].among) == (2 * experts // 4, 2)
    assert exchanged["gradients of experts"].payload == 4 * experts // 4 * step_demand(given).micro_batches


def test_the_run_has_its_ramp() -> None:
    ramped = with_settings(context(), batch_ramp=[(50, 32)])  # steps are counted from 0
    assert ramp_of(ramped.settings.training) == [(50, 16), (50, 32)]
    assert ramp_of(with_settings(ramped, steps=30).settings.training) == [(30, 16)]
    assert ramp_of(context().settings.training) == [(100, 16)]
    found = step_time(ramped)
    assert found.tokens == 32 * 256
    assert found.run_tokens == (50 * 16 + 50 * 32) * 256
    assert 50 * found.seconds < found.run_seconds < 100 * found.seconds


def test_the_part_says_its_assumptions_and_its_numbers_are_json() -> None:
    given = context()
    part = time_part(given, step_time(given))
    rows = {row.name: row for row in part.rows}
    assert rows["mean document"].note.endswith("assumed, lognormal: the data are not prepared")
    assert rows["matrix products"].value == "754 TFLOP/s"
    assert rows["hidden behind computation"].value == "nothing"
    assert json.loads(json.dumps(part.numbers))["micro_batches"] == 2
    assert any("H100" in line for line in part.numbers["assumptions"])


def test_values_are_short_so_that_names_and_notes_keep_their_columns() -> None:
    """The table never breaks a value."""
    recurrent = context(model={"kind": "lstm", "num_layers": 2, "hidden_size": 64})
    rows = time_part(recurrent, step_time(recurrent, Rates(slowdown=75.3, measured=("one", "two")))).rows
    assert {"beside these", "not counted"} <= {row.name for row in rows}
    assert [row for row in rows if len(row.value) > 30] == []


def test_what_the_model_leaves_out_is_a_row() -> None:
    plain, recurrent = context(), context(model={"kind": "lstm", "num_layers": 2, "hidden_size": 64})
    assert not_counted(plain) == []
    rows = {row.name: row.note for row in time_part(recurrent, step_time(recurrent)).rows}
    assert rows["not counted"] == "recurrent layers go token by token"
    plain.effective["zero_optimization"] |= {
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "cpu"},
    }
    assert not_counted(plain) == ["state in files", "gathers of offloaded weights"]


# ---- saves, failures, cost -------------------------------------------------------------------------------------------


def test_a_checkpoint_has_weights_and_two_moments_in_fp32() -> None:
    given = context()
    found = reliability_part(given, step_time(given))
    numel = sum(one.numel for one in parameters_of(given.settings, VOCABULARY))
    assert found.numbers["checkpoint_bytes"] == 12 * numel
    averaged = with_settings(given, ema_decay=0.99)
    assert reliability_part(averaged, step_time(averaged)).numbers["checkpoint_bytes"] == 16 * numel


def test_goodput_and_days_of_a_large_run() -> None:
    """8B on 16,384 GPUs: a failure each 3.1 hours."""
    shape = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336}
    training = {"steps": 100_000, "global_batch_size": 16384}
    given = context(
        2048, 8, {"price_per_gpu_hour": 2}, model=shape, training=training, checkpoint={"every_steps": 1000}
    )
    given = given._replace(vocabulary=128_256)
    found = step_time(given)
    part = reliability_part(given, found)
    numbers = part.numbers
    assert numbers["seconds_between_failures"] / 3600 == pytest.approx(3.09, abs=0.01)
    assert numbers["checkpoint_bytes"] == pytest.approx(96.4e9, rel=0.01)
    assert 0.7 < numbers["goodput_ratio"] < numbers["best_goodput_ratio"] < 1
    assert numbers["best_interval_seconds"] < numbers["interval_seconds"]
    cost = cost_part(given, found, part).numbers
    assert cost["seconds"] == pytest.approx(found.run_seconds / numbers["goodput_ratio"])
    assert cost["money"] == pytest.approx(2 * 16384 * cost["seconds"] / 3600)
    assert cost["gpu_joules"] == pytest.approx(700 * 16384 * cost["seconds"])


def test_a_save_that_stops_training_costs_more() -> None:
    given = context(checkpoint={"asynchronous": False})
    slow, fast = (reliability_part(one, step_time(one)).numbers for one in (given, context()))
    assert slow["pause_seconds"] == pytest.approx(fast["pause_seconds"] + fast["write_seconds"])


def test_no_end_is_said_where_failures_come_faster_than_saves() -> None:
    given = context(hardware={"hours_between_failures_per_gpu": 1e-6}, checkpoint={"every_steps": 10_000})
    found = step_time(given)
    part = reliability_part(given, found)
    assert part.numbers["goodput_ratio"] == 0
    cost = cost_part(given, found, part)
    assert cost.numbers["seconds"] is None
    assert "save more often" in cost.rows[1].note


def test_without_a_price_there_is_no_money() -> None:
    given = context()
    found = step_time(given)
    cost = cost_part(given, found, reliability_part(given, found))
    assert cost.numbers["money"] is None
    assert math.isfinite(cost.numbers["gpu_hours"])
