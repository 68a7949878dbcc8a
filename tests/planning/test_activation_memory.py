"""The planned activations are within 5% of the tensors that the code makes, counted on the meta device."""

import itertools
from typing import Any

import pytest

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.inspect.memory import activation_bytes
from bigmodel.planning.activation_memory import activation_plan
from tests.planning.test_parameters import EXPERTS, MODELS, RECURRENT

MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 1024}
LONG = {"max_positions": 2048}
PRECISIONS, KINDS = ("bf16", "fp32"), ("none", "selective", "full")
MANY = {"count": 64, "per_token": 6, "width": 128, "shared": 2, "first_dense_layers": 1}
OF_ENCODER = {"encoder_hidden_size": 512, "encoder_num_heads": 8}


def table_of(model: dict[str, Any], precision: str, kind: str) -> dict[str, Any]:
    data: dict[str, Any] = {"max_document_length": 2048, "sequence_length": 2048, "max_documents": 16}
    if "encoder_decoder" in model.get("kind", ""):
        data["source_sequence_length"] = 4096
    if model.get("kind") == "encoder":
        data["objectives"] = [{"kind": "masked"}]
    training = {"activation_checkpointing": kind, "precision": precision, "global_batch_size": 8}
    return {"model": model, "data": data, "training": training}


def model_of(name: str) -> dict[str, Any]:
    if name in RECURRENT:
        return {"kind": name, "num_layers": 4, "hidden_size": 256} | RECURRENT[name]
    own = MODELS[name]
    if "encoder_hidden_size" in own:
        own = own | OF_ENCODER
    return MODEL | own | (LONG if "max_positions" in own else {})


CASES = [(name, "bf16", kind) for name, kind in itertools.product(MODELS, KINDS)]
CASES += [(name, "fp32", "none") for name in MODELS]
CASES += [(name, "bf16", "none") for name in RECURRENT if name != "lstm"]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_peak_is_that_of_the_code(case: tuple[str, str, str]) -> None:
    name, precision, kind = case
    assert_close(table_of(model_of(name), precision, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind: str) -> None:
    for name, precision in (("mixtral", "bf16"), ("deepseek", "fp32")):
        assert_close(table_of(MODEL | EXPERTS[name] | {"num_mtp_modules": 0}, precision, kind))
    assert_close(table_of(MODEL | {"experts": MANY}, "bf16", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_dense_layers_that_are_wider_than_the_experts(kind: str) -> None:
    """With checkpointing the peak is in the backward of the last of them, when the layers with experts are done."""
    experts = {"count": 8, "per_token": 2, "width": 64, "first_dense_layers": 3}
    assert_close(table_of(MODEL | {"experts": experts, "intermediate_size": 8192}, "bf16", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(kind: str) -> None:
    for targets in (["all-linear"], ["q_proj", "v_proj"]):
        assert_close(table_of(model_of("llama"), "bf16", kind) | {"lora": {"rank": 16, "targets": targets}})


def assert_close(table: dict[str, Any], vocabulary: int = 4096) -> None:
    settings = Settings.model_validate(table)
    effective, settings = resolve_deepspeed(settings, 1)
    counted = activation_bytes(settings, effective, vocabulary)
    planned = activation_plan(settings, vocabulary, 1)
    print(f"planned {planned:,}, counted {counted:,}: {planned / counted:.3f}")
    assert planned == pytest.approx(counted, rel=0.05)


def test_layers_tokens_and_vocabulary_grow_as_in_the_code() -> None:
    """Without checkpointing a layer of the plan has the same bytes as one of the code."""
    few, many = (Settings.model_validate(table_of(MODEL | {"num_layers": layers}, "bf16", "none")) for layers in (4, 8))
    effective = resolve_deepspeed(few, 1)[0]
    planned = activation_plan(many, 4096, 1) - activation_plan(few, 4096, 1)
    assert planned == activation_bytes(many, effective, 4096) - activation_bytes(few, effective, 4096)
