"""Ranks that share matrices: what is refused before ranks start."""

from typing import Any

import pytest

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.parallel_settings import refuse_across_nodes
from bigmodel.config.settings import Settings, UserError

MODEL = {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 96}


def settings_of(**sections: Any) -> Settings:
    training = {"tensor_parallel_ranks": 4} | sections.pop("training", {})
    return Settings.model_validate({"model": MODEL | sections.pop("model", {}), "training": training} | sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"tensor_parallel_ranks": 3}}, "= 3 does not divide model.num_heads = 8"),
        ({"training": {"tensor_parallel_ranks": 8}}, "= 8 does not divide model.num_kv_heads = 4"),
        ({"model": {"intermediate_size": 90}}, "= 4 does not divide model.intermediate_size = 90"),
        ({"model": {"experts": {"count": 4}}}, "model.experts with training.tensor_parallel_ranks = 4"),
        ({"model": {"qk_norm": True, "qk_norm_over": "all_heads"}}, "each rank has some of the heads"),
        ({"training": {"sequence_parallel_ranks": 2}}, "share the positions already"),
        ({"training": {"compile": True}}, "training.compile with training.tensor_parallel_ranks = 4"),
        ({"lora": {"rank": 4}}, "adapters are not divided"),
        ({"optimizer": {"qk_clip": 100.0}}, "optimizer.qk_clip with training.tensor_parallel_ranks = 4"),
        ({"optimizer": {"kind": "adafactor"}}, "use another optimizer"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings_of(**sections)


def test_a_recurrent_model_has_no_tensor_parallel_ranks() -> None:
    with pytest.raises(ValueError, match="only decoders and encoders are shared; set it to 1"):
        Settings.model_validate(
            {"model": {"kind": "lstm", "hidden_size": 64}, "training": {"tensor_parallel_ranks": 2}}
        )


def test_ranks_of_several_nodes_share_matrices_only_where_that_is_asked_for() -> None:
    with pytest.raises(UserError, match="tensor_parallel_ranks = 4 with 2 ranks on a node: each layer would wait"):
        refuse_across_nodes(settings_of(), 2)
    refuse_across_nodes(settings_of(), 8)
    refuse_across_nodes(settings_of(training={"tensor_parallel_across_nodes": True}), 2)


def test_sharing_ranks_get_the_same_packed_sequences() -> None:
    training = settings_of().training
    assert (training.ranks_per_sequence, training.sharing_ranks) == (4, 4)
    assert training.shares_parameters
    assert not Settings().training.shares_parameters


def test_the_ranks_of_a_run_are_whole_groups() -> None:
    with pytest.raises(UserError, match=r"tensor_parallel_ranks = 4 does not divide the 6 ranks; choose a divisor"):
        resolve_deepspeed(settings_of(), 6)
    effective, _ = resolve_deepspeed(settings_of(training={"global_batch_size": 8}), 8)
    assert effective["gradient_accumulation_steps"] == 4, "8 packed sequences over 2 groups"


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        (
            {"stage": 3, "zero_hpz_partition_size": 2},
            "zero_optimization.zero_hpz_partition_size = 2 with training.tensor_parallel_ranks = 4",
        ),
        ({"reduce_scatter": False}, "zero_optimization.reduce_scatter = false with training.tensor_parallel_ranks = 4"),
    ],
)
def test_a_deepspeed_json_that_does_not_fit_is_refused(tmp_path: Any, zero: dict[str, Any], said: str) -> None:
    import json

    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1} | zero}))
    with pytest.raises(UserError, match=said):
        resolve_deepspeed(settings_of(training={"deepspeed": str(path)}), 4)
