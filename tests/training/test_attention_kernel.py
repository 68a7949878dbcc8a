"""training.attention_kernel: refused where it would have no effect."""

from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.kernels.attention_libraries import missing
from bigmodel.model import transformer
from bigmodel.training.attention_kernel import use_attention_kernel
from tests.model.test_encoder_decoder import ONE_SIDE, TEXTS
from tests.support.example_batches import DataSettings, batch_of, model_of

WIDE = {"hidden_size": 128, "num_heads": 2}
FLASH = Settings.model_validate({"training": {"attention_kernel": "flash-attn"}})


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs a GPU, and this rank computes on a cpu; set it to .triton."):
        use_attention_kernel(model_of(), FLASH, torch.device("cpu"))


def test_another_gpu_than_hopper_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"training": {"attention_kernel": "hopper"}, "model": WIDE})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    with pytest.raises(UserError, match=r"hopper.*: needs Hopper \(sm_90\), and this GPU is sm_86, or set it to"):
        use_attention_kernel(model_of(), settings, torch.device("cuda"))


def test_hopper_needs_heads_of_64_or_128_channels() -> None:
    table = {"training": {"attention_kernel": "hopper"}, "model": WIDE | {"num_heads": 4}}
    with pytest.raises(UserError, match="does not cover heads of 32 channels, not 64 or 128"):
        settings_from_table(table, Path("run.toml"))


@pytest.mark.skipif(not missing("flash-attn"), reason="flash-attn is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"the package flash-attn is not installed; install .*, or set it to .triton."):
        use_attention_kernel(model_of(), FLASH, torch.device("cuda"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": {"attention_softcap": 30.0}}, "model.attention_softcap"),
        ({"model": {"attention_dropout": 0.1}}, "model.attention_dropout"),
        ({"model": {"position_embedding": "relative_bias"}}, "relative_bias"),
        ({"optimizer": {"qk_clip": 100}}, "optimizer.qk_clip"),
        ({"metrics": {"attention_scores": True}}, "metrics.attention_scores"),
        ({"training": {"precision": "fp32"}}, "fp32"),
        ({"training": {"sequence_parallel_ranks": 2, "sequence_parallel_method": "all_gather"}}, "all_gather"),
        ({"model": {"hidden_size": 48, "num_heads": 4}}, "heads of 12 channels"),
    ],
)
def test_settings_that_it_does_not_cover_are_refused(table: dict, message: str) -> None:
    table = table | {"training": table.get("training", {}) | {"attention_kernel": "torch-varlen"}}
    with pytest.raises(UserError, match=f"does not cover .*{message}"):
        settings_from_table(table, Path("run.toml"))


def test_the_model_passes_the_name_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2.12 on torch has varlen_attn; without a GPU the reference computes."""
    settings, names = Settings.model_validate({"training": {"attention_kernel": "torch-varlen"}}), set()
    attention = transformer.attention

    def noted(*arguments, kernel: str, **named):
        names.add(kernel)
        return attention(*arguments, kernel=kernel, **named)

    monkeypatch.setattr(transformer, "attention", noted)
    model, batch = model_of(), batch_of(TEXTS, DataSettings(**ONE_SIDE))
    before = model(batch)
    use_attention_kernel(model, settings, torch.device("cuda"))
    assert torch.equal(model(batch), before)
    assert names == {"triton", "torch-varlen"}
