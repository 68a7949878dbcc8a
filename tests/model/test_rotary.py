"""Rotary frequencies are those of transformers, scaled in every way; part of a head turns as in GPT-NeoX and Phi."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from bigmodel.config.huggingface_rope import rope_scaling
from bigmodel.config.settings import ModelSettings
from bigmodel.model.rotary import rotary_frequencies, rotary_table, rotate
from tools.torchvision_operators import define_missing_torchvision_operators

define_missing_torchvision_operators()
pytest.importorskip("transformers")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3, other limits": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, not truncated": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn, other limits": {"rope_type": "yarn", **YARN, "beta_fast": 20.0, "beta_slow": 3.0},
    "yarn, its own factor": {"rope_type": "yarn", **YARN, "attention_factor": 0.7},
    "yarn, as DeepSeek writes it": {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.5},
    "yarn of a short model": {"rope_type": "yarn", "factor": 16.0},  # its length is max_position_embeddings
}


@pytest.mark.parametrize("channels", [64, 128, 20])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("theirs", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers(theirs: dict[str, Any], theta: float, channels: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        rope_theta=theta, head_dim=channels, hidden_size=channels, num_attention_heads=1, max_position_embeddings=128,
        rope_scaling=theirs,
    )  # fmt: skip
    expected, attention_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    settings = ModelSettings(head_dim=channels, rope_theta=theta, rope_scaling=rope_scaling(theirs, 128))
    found, factor = rotary_frequencies(settings)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(attention_factor, rel=1e-12)
    assert (theirs["rope_type"] == "default") == torch.equal(
        found, rotary_frequencies(ModelSettings(head_dim=channels, rope_theta=theta))[0]
    )


def test_yarns_factor_is_in_the_table_of_cos_and_sin() -> None:
    settings = ModelSettings(head_dim=8, rope_scaling=rope_scaling({"rope_type": "yarn", **YARN}))
    cos, sin = rotary_table(torch.arange(5), settings)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, rotary_frequencies(settings)[1] ** 2))
    assert cos[0, 0, 0] == pytest.approx(1.1386294)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_part_of_a_head_turns_as_in_phi(fraction: float) -> None:
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding, apply_rotary_pos_emb

    config = PhiConfig(hidden_size=64, num_attention_heads=2, partial_rotary_factor=fraction, rope_theta=1000.0)
    x, positions = torch.randn(9, 2, 32), torch.arange(9) * 3
    cos, sin = PhiRotaryEmbedding(config)(x, positions[None])
    turning = int(32 * fraction)
    theirs = x.transpose(0, 1)[None, ..., :turning]  # PhiAttention turns these and lays the rest behind
    turned = apply_rotary_pos_emb(theirs, theirs, cos, sin)[0][0].transpose(0, 1)
    settings = ModelSettings(head_dim=32, rope_theta=1000.0, rotary_fraction=fraction)
    ours = rotate(x, rotary_table(positions, settings))
    torch.testing.assert_close(ours, torch.cat((turned, x[..., turning:]), -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[..., turning:], x[..., turning:])


def test_sliding_layers_have_their_own_base_and_are_not_scaled() -> None:
    settings = ModelSettings(
        head_dim=8, sliding_window=4, full_attention_every=2, rope_theta=1e6, sliding_rope_theta=1e4,
        rope_scaling=rope_scaling({"rope_type": "linear", "factor": 8.0}),
    )  # fmt: skip
    for kind, theta, factor in (("sliding", 1e4, 1.0), ("full", 1e6, 8.0)):
        plain, _ = rotary_frequencies(ModelSettings(head_dim=8, rope_theta=theta))
        assert torch.equal(rotary_frequencies(settings, kind)[0], plain / factor)  # type: ignore[arg-type]


def test_gemma3_has_the_same_two_tables() -> None:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, Gemma3TextModel

    config = Gemma3TextConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, rope_theta=1e6, rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    model = Gemma3TextModel(config)
    settings = ModelSettings(
        layers=6, head_dim=16, sliding_window=4, full_attention_every=6, rope_theta=1e6, sliding_rope_theta=1e4,
        rope_scaling=rope_scaling({"rope_type": "linear", "factor": 8.0}),
    )  # fmt: skip
    assert isinstance(model.rotary_emb, Gemma3RotaryEmbedding)
    torch.testing.assert_close(model.rotary_emb.inv_freq, rotary_frequencies(settings, "full")[0], rtol=1e-6, atol=0)
    local = rotary_frequencies(settings, "sliding")[0]
    torch.testing.assert_close(model.rotary_emb_local.inv_freq, local, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (
            {"kind": "linear", "factor": 2.0, "beta_fast": 3.0},
            'beta_fast = 3.0 has no effect with kind = "linear"',
        ),
        ({"kind": "llama3", "factor": 2.0}, "original_max_position_embeddings is missing: kind = 'llama3' needs"),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 9, "beta_slow": 40.0},
            "beta_slow = 40.0 must be below",
        ),
        ({"kind": "longrope", "factor": 2.0}, "'linear', 'llama3' or 'yarn'"),
        ({"kind": "linear", "factor": 0.5}, "greater than or equal to 1"),
    ],
)
def test_scaling_that_makes_no_sense_is_refused(table: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ModelSettings(rope_scaling=table)
