"""Against models nobody here wrote: transformers Llama, Qwen3 and T5 v1.1 with the same weights: logits, gradients."""

from typing import Any

import pytest
import torch

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.model.huggingface import from_transformers
from bigmodel.model.transformer import Transformer
from tests.support.example_batches import batch_of, text
from tools.torchvision_operators import define_missing_torchvision_operators

define_missing_torchvision_operators()
transformers = pytest.importorskip("transformers")

SIZE = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
DATA = {"max_document_length": 64, "sequence_length": 128, "max_documents": 4}
TOLERANCE = 1e-4


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "head_dim": 16}


def decoder(kind: str, **changes: Any) -> torch.nn.Module:
    config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[kind]
    model = {"llama": transformers.LlamaForCausalLM, "qwen3": transformers.Qwen3ForCausalLM}[kind]
    torch.manual_seed(3)
    settings = SIZE | {"num_key_value_heads": 2, "attn_implementation": "eager", "rope_theta": 5000.0} | changes
    return randomize(model(config(**settings)))


def t5() -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=48, d_kv=16, d_ff=80, num_layers=3, num_decoder_layers=2, num_heads=4,
        relative_attention_max_distance=20, relative_attention_num_buckets=16, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, dropout_rate=0.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(4)
    return randomize(transformers.T5ForConditionalGeneration(config))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Norms too: their initial ones would hide a mix-up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model.eval()


def ours_of(theirs: torch.nn.Module) -> Transformer:
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    model = Transformer(settings, len(weights["embedding.weight"]))
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        assert set(parameters) == set(weights)
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def documents_of(batch: Batch) -> list[tuple[slice, slice]]:
    from bigmodel.checks.leak import documents

    return [(place.targets, place.source) for place in documents(batch)]


def compare(theirs: torch.nn.Module, batch: Batch) -> None:
    """A pack through ours, its documents one by one through theirs: logits, and gradients of the summed loss."""
    ours = ours_of(theirs)
    logits = ours(batch, "logits")
    ours(batch).backward()
    for target, source in documents_of(batch):
        tokens, targets = batch.tokens[None, target], batch.labels[target]
        if batch.source is None:
            found = theirs(input_ids=tokens).logits[0]
        else:
            found = theirs(input_ids=batch.source.tokens[None, source], decoder_input_ids=tokens).logits[0]
        assert float((found - logits[target]).abs().max()) < TOLERANCE * float(found.abs().max())
        torch.nn.functional.cross_entropy(found, targets, reduction="sum", ignore_index=IGNORED).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    _, expected = from_transformers(theirs.config.to_dict(), gradients)
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert float(difference) < TOLERANCE, name
        assert bool(expected[name].any()), name


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
        ("llama", {"rope_scaling": LLAMA3}),
        ("llama", {"rope_scaling": YARN}),
        ("qwen3", {"head_dim": 20}),
        ("qwen3", WINDOW | {"max_window_layers": 0}),
        ("qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen3", WINDOW | {"max_window_layers": 2}),
    ],
    ids=[
        "llama",
        "llama_tied",
        "llama_linear",
        "llama3",
        "llama_yarn",
        "qwen3",
        "qwen3_sliding",
        "qwen3_every_second",
        "qwen3_no_layer_sliding",
    ],
)
def test_a_decoder_is_transformers_own(kind: str, changes: dict[str, Any]) -> None:
    compare(decoder(kind, **changes), batch_of([[text(20), text(1), text(40)], [text(33)]], DataSettings(**DATA)))


def test_an_encoder_decoder_is_transformers_t5() -> None:
    pairs = [[Pair(text(40), text(9)), Pair(text(1), text(30))], [Pair(text(25), text(1))]]
    compare(t5(), batch_of(pairs, DataSettings(**DATA, source_sequence_length=80)))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': cannot be read"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "t5", "feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'"),
        (
            {"model_type": "t5", "feed_forward_proj": "gated-gelu"},
            "tie_word_embeddings = True",
        ),  # the default is left out
        ({"model_type": "mt5", "tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"model_type": "qwen3", "rope_scaling": {"type": "linear"}}, "rope_scaling = .*linear.*: factor"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling = .*llama3.*original_max_position_embeddings is missing",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
            "rope_scaling = .*longrope.*: cannot be read; kinds read: linear, llama3, yarn",
        ),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window = True"),
        (
            {"model_type": "qwen3", **WINDOW, "num_hidden_layers": 3, "max_window_layers": 1},
            r"layer_types = \['full_attention', 'sliding_attention', 'sliding_attention'\]: our model has full",
        ),
        (
            {"model_type": "qwen3", **WINDOW, "num_hidden_layers": 3, "max_window_layers": 0, "rope_scaling": YARN},
            "rope_scaling = .* with sliding_window = 5: our sliding layers do not scale rotary positions",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        from_transformers(config, {})


def test_the_base_of_the_rotary_frequencies_is_found_where_newer_versions_write_it() -> None:
    model = decoder("llama")
    config, state = model.config.to_dict(), model.state_dict()
    newer = {name: value for name, value in config.items() if not name.startswith("rope_")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert from_transformers(newer, state)[0] == from_transformers(config, state)[0]
    assert from_transformers(config, state)[0].rope_theta == 5000.0


def test_a_part_of_a_head_that_turns_is_read_in_old_and_new_spelling() -> None:
    model = decoder("llama")
    config, state = model.config.to_dict(), model.state_dict()
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
    for changes in ({"partial_rotary_factor": 0.5}, newer):
        assert from_transformers(config | changes, state)[0].rotary_fraction == 0.5
    assert from_transformers(config, state)[0].rotary_fraction == 1.0
