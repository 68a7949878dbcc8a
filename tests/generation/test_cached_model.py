"""A step with the cache gives the logits of a whole forward pass, for every architecture."""

from typing import Any

import pytest
import torch

from bigmodel.generation.cached_model import CachedModel, Prompt
from bigmodel.generation.prompts import pack
from bigmodel.generation.recurrent_cache import make_cache
from bigmodel.model.transformer import Transformer
from tests.model.test_huggingface import MODELS, model_of, ours_of, randomize
from tests.model.test_recurrent import ALL, recurrent_model
from tests.support.example_batches import model_of as small_model

SIDES = {"kind": "encoder_decoder", "encoder_num_layers": 1}
BIAS = {"position_embedding": "relative_bias", "relative_buckets": 8, "relative_distance": 10}
OURS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "learned": {"position_embedding": "learned", "max_positions": 40},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "cross, sinusoidal": {**SIDES, "position_embedding": "sinusoidal"},
    "bias, cap and windows": {**BIAS, "attention_softcap": 2.0, "sliding_window": 4},
    "post": {"norm_placement": "post", "embedding_norm": True, "num_token_types": 2, "num_mtp_modules": 2},
    "all heads": {"qk_norm": True, "qk_norm_over": "all_heads", "attention_bias": "all", "rotary_fraction": 0.5},
    "layer norm": {"norm": "layer", "gated": False, "feed_forward_bias": True, "logit_softcap": 3.0},
    "cross": {**SIDES, "qk_norm": True, "attention_softcap": 3.0, "separate_embeddings": True},
    "cross, bias": {**SIDES, **BIAS, "norm_placement": "sandwich"},
    "mixed": {**SIDES, "source_attention": "mixed"},
    "experts": {"experts": {"count": 4, "width": 20, "shared": 1, "first_dense_layers": 1, "balance": "bias"}},
    "mixed, windows": {**SIDES, "source_attention": "mixed", "sliding_window": 5, "encoder_hidden_size": 48,
                       "separate_embeddings": True},
}  # fmt: skip


def check(model: Transformer) -> None:
    """Three prompts, one of them with an empty source; one more comes later, and the first one leaves."""
    draw = torch.Generator().manual_seed(1)
    has_source, is_decoder = model.settings.has_source, model.settings.kind == "decoder"

    def ids(length: int) -> list[int]:
        return torch.randint(3, 60, (length,), generator=draw).tolist()

    prompts = [
        Prompt(ids(own), ids(other) if has_source else None, prefix if is_decoder else 0)
        for own, other, prefix in ((7, 4, 0), (1, 9, 0), (13, 0, 5), (6, 1, 3))
    ]
    texts = [list(prompt.ids) for prompt in prompts]
    cache = make_cache(model, 4, 40)
    logits = cache.prefill(prompts[:3])
    running = [0, 1, 2]
    for step in range(8):
        if step == 3:
            logits = torch.cat([logits, cache.prefill(prompts[3:])])
            running = [0, 1, 2, 3]
        if step == 5:
            cache.drop(0)
            logits, running = logits[[3, 1, 2]], [3, 1, 2]
        batch = pack(
            [texts[number] for number in running],
            [prompts[number].source or [] for number in running] if has_source else None,
            [prompts[number].prefix for number in running],
        )
        with torch.no_grad():
            expected = model(batch, "logits")[batch.cu_seqlens[1:].long() - 1]
        assert float((logits - expected).abs().max()) < 1e-5 * float(expected.abs().max())
        tokens = ids(len(running))
        for number, token in zip(running, tokens, strict=True):
            texts[number].append(token)
        logits = cache.step(tokens)


@pytest.mark.parametrize("name", [name for name in MODELS if "bert" not in name])
def test_a_published_architecture_has_the_same_logits_with_the_cache(name: str) -> None:
    check(ours_of(model_of(name)))


@pytest.mark.parametrize("name", OURS)
def test_our_own_options_have_the_same_logits_with_the_cache(name: str) -> None:
    torch.manual_seed(0)
    check(randomize(small_model(vocabulary=64, **OURS[name])))


@pytest.mark.parametrize("name", ALL)
def test_a_recurrent_model_has_the_same_logits_with_its_states(name: str) -> None:
    check(recurrent_model(**ALL[name]).eval())


def test_one_slot_and_bf16_have_the_same_logits_within_their_rounding() -> None:
    model = small_model(vocabulary=64).eval()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        model = model.to(dtype)
        cache = CachedModel(model, 1, 20)
        cache.prefill([Prompt([1, 5, 9])])
        with torch.no_grad():
            expected = model(pack([[1, 5, 9, 7]]), "logits")[-1]
        assert float((cache.step([7])[0] - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_a_model_for_steps_leaves_the_model_as_it_is() -> None:
    model = small_model(vocabulary=64).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    CachedModel(model, 2, 20).prefill([Prompt([1, 5, 9])])
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
