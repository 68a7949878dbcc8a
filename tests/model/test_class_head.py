"""The classification head: documents do not mix, poolings are what they say, and transformers computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bigmodel.checks.leak import documents, isolation, packed_equals_single
from bigmodel.config.huggingface import differences, write_config
from bigmodel.config.huggingface import read_config as settings_of
from bigmodel.config.settings import Settings
from bigmodel.data.load.batch import Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.model.class_head import at_last_positions, labels_of, pool
from bigmodel.model.huggingface.weights import names_of, to_theirs
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from tests.model.test_huggingface import model_of as theirs_of
from tests.model.test_huggingface import randomize
from tests.support.example_batches import BOS, EOS, batch_of, text

transformers = pytest.importorskip("transformers")

CLASSES = ["sport", "politics", "science"]
SIZE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40}
DATA = {"max_document_length": 24, "sequence_length": 48, "max_documents": 4}
SIDES = {"source_sequence_length": 48, "max_source_length": 24}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "decoder, last": ({}, {}, {}),
    "decoder, mean": ({"dropout": 0.2}, {"pooling": "mean"}, {}),
    "decoder, bert": ({}, {"head": "bert"}, {}),
    "encoder, first": ({"kind": "encoder"}, {}, {}),
    "encoder, mean": ({"kind": "encoder"}, {"pooling": "mean"}, {}),
    "encoder, post": ({"kind": "encoder", "norm_placement": "post"}, {}, {}),
    "encoder-decoder": ({"kind": "encoder_decoder"}, {}, SIDES),
}


def run_of(name: str) -> Settings:
    model, classification, data = MODELS[name]
    table = {"model": SIZE | model, "classification": {"classes": CLASSES} | classification, "data": DATA | data}
    return Settings.model_validate(table)


def labelled(length: int, number: int) -> Pair:
    return Pair(text(length), np.array([BOS, number, EOS]))


def batch_for(settings: Settings) -> Batch:
    """Two packs; the document of 40 tokens is cut."""
    packs = [[labelled(3, 0), labelled(9, 2), labelled(40, 1)], [labelled(7, 1)]]
    return batch_of(packs, settings.data)


def model_for(settings: Settings) -> Transformer:
    model = Transformer(settings.model, 64)
    init_weights(model, 4)
    randomize(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_documents_are_classified_packed_as_alone_and_do_not_influence_each_other(name: str) -> None:
    settings = run_of(name)
    batch = batch_for(settings)
    assert batch.num_labels == batch.num_documents == 4
    findings = [*isolation(model_for(settings), batch), *packed_equals_single(model_for(settings).double(), batch)]
    assert [finding.claim for finding in findings if not finding.holds] == []


def test_the_loss_is_the_cross_entropy_of_the_logits_of_each_document() -> None:
    settings = run_of("decoder, last")
    model, batch = model_for(settings), batch_for(settings)
    logits_DC, labels_D = model(batch, "logits"), labels_of(batch.labels, batch.cu_seqlens)
    is_real = labels_D >= 0
    assert labels_D[is_real].tolist() == [0, 2, 1, 1]
    expected = torch.nn.functional.cross_entropy(logits_DC[is_real], labels_D[is_real], reduction="none")
    losses_T = model(batch, "loss_per_position")
    last = [place.targets.stop - 1 for place in documents(batch)]
    assert torch.equal(losses_T[last], expected)
    assert float(losses_T.detach().sum()) == pytest.approx(float(expected.detach().sum()))
    assert float(model(batch).detach()) == pytest.approx(float(expected.detach().sum()))
    grouped = batch_of(
        [[labelled(3, 0), labelled(9, 2)]], settings.data, loss_group_of=lambda chunk: chunk.row, num_loss_groups=2
    )
    assert torch.allclose(model(grouped), model(grouped, "loss_per_position")[[3, 13]])


def test_the_last_token_of_a_decoder_is_the_texts_and_an_encoder_keeps_its_end() -> None:
    decoder, encoder, both = (
        batch_for(run_of(name)) for name in ("decoder, last", "encoder, first", "encoder-decoder")
    )
    ends = decoder.tokens[[place.targets.stop - 1 for place in documents(decoder)]]
    assert EOS not in ends.tolist()
    assert [place.targets.stop - place.targets.start for place in documents(decoder)] == [4, 10, 24, 8]
    assert encoder.tokens[[place.targets.stop - 1 for place in documents(encoder)]].tolist() == [EOS] * 4
    assert [place.targets.stop - place.targets.start for place in documents(encoder)] == [5, 11, 24, 9]
    assert decoder.prefixes is None
    assert both.tokens[[place.targets.start for place in documents(both)]].tolist() == [BOS] * 4
    assert [place.source.stop - place.source.start for place in documents(both)] == [4, 10, 24, 8]


def test_empty_documents_have_no_label_and_do_not_break_a_mean() -> None:
    x_TH, cu_seqlens = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 2, 3, 3], dtype=torch.int32)
    assert pool(x_TH, cu_seqlens, "mean")[:, 0].tolist() == [2.0, 8.0, 0.0]
    assert labels_of(torch.tensor([-100, 4, -100]), cu_seqlens).tolist() == [4, -100, -100]
    assert at_last_positions(torch.tensor([5.0, 6.0, 7.0]), cu_seqlens, 3).tolist() == [0.0, 5.0, 6.0]


# Of each type: changes of [classification].
TYPES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma2": {}, "gemma3": {}, "phi3": {}, "bert": {},
    "modernbert": {}, "modernbert, mean": {"pooling": "mean"},
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_transformers_loads_the_model_for_sequences_and_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs = theirs_of(name.partition(",")[0])
    body = settings_of(theirs.config.to_dict())
    kind, table = theirs.config.model_type, {"classes": CLASSES} | TYPES[name]
    settings = Settings.model_validate({"model": body.model_dump(), "classification": table, "data": DATA})
    assert differences(kind, settings.model) == []
    model, batch = model_for(settings), batch_for(settings)
    weights = to_theirs(names_of(kind, settings.model), dict(model.named_parameters()))
    config = write_config(kind, settings.model, 64, 64) | {"pad_token_id": EOS}
    loaded = load(tmp_path, config, weights)
    assert type(loaded).__name__ == config["architectures"][0]
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    logits_DC = model(batch, "logits")[labels_of(batch.labels, batch.cu_seqlens) >= 0]
    for place, expected in zip(documents(batch), logits_DC, strict=True):
        found = loaded(input_ids=batch.tokens[None, place.targets]).logits[0]
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def load(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Through files, with no weight missing and none left over."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: w.detach().contiguous().clone() for name, w in weights.items()}, folder / "model.safetensors")
    loaded, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize(
    ("kind", "classification", "lacking"),
    [
        ("olmo2", {}, "classification.classes, for which the type has no class"),
        ("llama", {"pooling": "mean"}, 'classification.pooling = "mean"'),
        ("llama", {"head": "bert"}, 'classification.head = "bert"'),
        ("bert", {"pooling": "mean"}, 'classification.pooling = "mean"'),
    ],
)
def test_what_a_type_cannot_hold_is_named(kind: str, classification: dict[str, Any], lacking: str) -> None:
    body = settings_of(theirs_of(kind).config.to_dict())
    table = {"classes": CLASSES} | classification
    settings = Settings.model_validate({"model": body.model_dump(), "classification": table, "data": DATA})
    assert lacking in differences(kind, settings.model)
