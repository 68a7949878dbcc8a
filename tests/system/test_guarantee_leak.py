"""Guarantee 1: in a packed batch, no document influences another one."""

from pathlib import Path

import pytest
import torch

from bigmodel.checks.leak import isolation, packed_equals_single
from bigmodel.config.settings import DataSettings, ModelSettings
from bigmodel.data.load.batch import IGNORED, Batch, build_batch, make_dropout_seeds
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.kernels.mask import causal
from bigmodel.model.experts import mixtures
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer

VOCABULARY = 97
LENGTHS = (9, 30, 1, 17)  # positions of the documents of the first pack; the second pack has one of 20
MODELS = {
    "plain": {},
    "one_key_value_head": {"num_kv_heads": 1},
    "qk_norm_tied": {"qk_norm": True, "tied_embeddings": True},
    "dropout": {"dropout": 0.3},
    "all dropout": {"dropout": 0.1, "attention_dropout": 0.3, "embedding_dropout": 0.1, "stochastic_depth": 0.5},
}


def make_model(**changes: object) -> Transformer:
    settings = ModelSettings(
        **({"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40} | changes)
    )
    model = Transformer(settings, VOCABULARY)
    init_weights(model, seed=5)
    return model


def make_batch() -> Batch:
    data = DataSettings(max_document_length=64, sequence_length=64, max_documents=6)
    packs = [
        tuple(Chunk(0, 0, row, 0, length, 0) for row, length in enumerate(LENGTHS)),
        (Chunk(0, 0, 4, 0, 20, 0),),
    ]
    tokens = torch.randint(2, VOCABULARY, (5, 31), generator=torch.Generator().manual_seed(1)).numpy()
    return build_batch(packs, lambda chunk: tokens[chunk.row], data, make_dropout_seeds(1, 0, [0, 1], 64))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_editing_a_document_changes_nothing_of_another_one_bitwise(changes: dict) -> None:
    findings = isolation(make_model(**changes), make_batch())
    assert [finding.claim for finding in findings if not finding.holds] == []
    assert len(findings) == 4


EXPERTS = {"count": 4, "per_token": 2, "width": 20, "balance_weight": 0.5, "router_z_weight": 0.1}


def test_experts_of_one_document_do_not_depend_on_another_one() -> None:
    """Also with uneven loads of the step before, whose balance loss has a gradient."""
    model = make_model(experts=EXPERTS, dropout=0.3).double()
    for layer in mixtures(model):
        layer.router.load.copy_(torch.tensor([1.2, 0.5, 0.2, 0.1]))
    findings = [*isolation(model, make_batch()), *packed_equals_single(model, make_batch())]
    assert [finding for finding in findings if not finding.holds] == []
    assert len(findings) == 6


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_packed_equals_one_document_at_a_time_in_float64(changes: dict) -> None:
    findings = packed_equals_single(make_model(**changes).double(), make_batch())
    assert [finding.evidence for finding in findings if not finding.holds] == []
    assert len(findings) == 2


def test_padding_has_no_loss_and_no_influence() -> None:
    batch, model = make_batch(), make_model().eval()
    losses = model(batch, "loss_per_position")
    assert losses[batch.labels == IGNORED].abs().max() == 0
    edited = batch.tokens.masked_fill(batch.labels == IGNORED, 7)
    changed = model(Batch(**{**vars(batch), "tokens": edited}), "loss_per_position")
    assert torch.equal(losses, changed)


def test_the_check_sees_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """One document over everything: the claims must break."""
    batch, model = make_batch(), make_model()
    monkeypatch.setattr("bigmodel.model.attention_masks.causal", lambda cu_seqlens, _left: causal(cu_seqlens[[0, -1]]))
    broken = [finding.claim for finding in isolation(model, batch) if not finding.holds]
    assert len(broken) == 3
    assert not any(finding.holds for finding in packed_equals_single(model.double(), batch))


def test_check_leak_runs_on_prepared_data(shards: Path, tmp_path: Path) -> None:
    from bigmodel.checks.leak import check_leak
    from tests.support.tiny_run import write_run

    assert all(finding.holds for finding in check_leak(write_run(tmp_path, shards), []))


def test_check_leak_runs_on_ranks_that_share_experts(shards: Path, tmp_path: Path) -> None:
    """The second rank has a packed sequence without labels, whose edit counts too."""
    from bigmodel.checks.leak import check_leak
    from tests.support.tiny_run import write_run

    run_file = write_run(tmp_path, shards, stage=3, balance="loss")
    findings = check_leak(run_file, ["training.expert_parallel_ranks=2"])
    assert [finding for finding in findings if not finding.holds] == []
    assert [finding.claim for finding in findings if "2 ranks" in finding.claim] == [
        "on 2 ranks, an edit changes the loss of the edited document",
        "on 2 ranks, editing one document leaves loss and gradients of all others equal within rounding",
    ]
