"""Scaling laws beside a plan: published optima, over-training, a law of one's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.context import Context
from bigmodel.planning.scaling import CHINCHILLA, Law, Term, read_law, scaling_part

# Llama 2 7B: 6,738,415,616 parameters (its model card), 2e12 tokens.
LLAMA2 = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "intermediate_size": 11_008}
STEPS = {"steps": 500_000, "global_batch_size": 1000}


def context(model: dict[str, Any], **more: Any) -> Context:
    data = {"sequence_length": 4096, "max_document_length": 4096} | more.pop("data", {})
    settings = Settings.model_validate({"model": LLAMA2 | model, "training": STEPS, "data": data} | more)
    return Context(settings, {}, 32_000, Cluster(), 8, None)


def test_the_optimum_is_where_no_division_of_the_compute_is_better() -> None:
    """And near Chinchilla's own 70e9 parameters and 1.4e12 tokens."""
    tokens = CHINCHILLA.optimal_tokens(70e9)
    assert tokens == pytest.approx(1.29e12, rel=0.01)
    assert CHINCHILLA.optimal_parameters(6 * 70e9 * tokens) == pytest.approx(70e9, rel=1e-6)
    least = CHINCHILLA.loss(70e9, tokens)
    assert all(CHINCHILLA.loss(70e9 * factor, tokens / factor) > least for factor in (0.9, 1.1))


def test_of_experts_those_count_that_a_token_passes() -> None:
    """Mixtral 8x7B: 46,702,792,704 parameters, of which each token uses 12.9 B (Jiang et al. 2024)."""
    mixtral = {"num_kv_heads": 8, "intermediate_size": 14_336, "experts": {"count": 8, "per_token": 2}}
    _, rows, numbers = scaling_part(context(mixtral))
    assert numbers["parameters"] == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14_336 == 12_879_925_248
    assert rows[0].note == "that a token passes"


def test_over_training_of_llama_2() -> None:
    _, rows, numbers = scaling_part(context({}))
    assert numbers["parameters"] == 6_738_415_616
    assert numbers["tokens"] == 500_000 * 1000 * 4096
    assert numbers["tokens_per_parameter"] == pytest.approx(304, abs=1)
    assert numbers["overtraining"] == pytest.approx(numbers["tokens"] / CHINCHILLA.optimal_tokens(6_738_415_616))
    assert 14 < numbers["overtraining"] < 20
    assert numbers["optimal_parameters"] * numbers["optimal_tokens_of_compute"] * 6 == pytest.approx(
        numbers["compute_flops"]
    )
    texts = {row.name: row.value for row in rows}
    assert (texts["parameters"], texts["tokens"]) == ("6.74 B", "2.05 T")
    assert "predicted loss" not in texts


@pytest.mark.parametrize(
    ("steps", "words"), [(8_000, "too few tokens"), (29_000, "near the optimum"), (500_000, "cheaper to serve")]
)
def test_the_ratio_is_explained(steps: int, words: str) -> None:
    part = scaling_part(context({}, training=STEPS | {"steps": steps}))
    assert words in {row.name: row.note for row in part.rows}["over-training"]


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        (
            {"kind": "encoder"},
            {"data": {"objectives": [{"kind": "masked"}]}},
            'law is of decoders, and model.kind = "encoder"',
        ),
        ({}, {"lora": {"rank": 4, "targets": ["query"]}}, "of pretraining from initial weights"),
    ],
)
def test_the_law_is_not_asked_about_other_runs(model: dict[str, Any], more: dict[str, Any], words: str) -> None:
    part = scaling_part(context(model, **more))
    assert words in part.rows[-1].note
    assert "optimal_tokens" not in part.numbers


def test_a_loss_is_predicted_by_a_law_of_ones_own(tmp_path: Path) -> None:
    law = Law(1.5, (Term("compute", 1000.0, 0.15),))
    (tmp_path / "sweep.json").write_text(json.dumps({"law": law.as_table()}))
    assert read_law(tmp_path / "sweep.json") == law
    part = scaling_part(context({}), law)
    compute = 6 * 6_738_415_616 * 500_000 * 1000 * 4096
    assert part.numbers["predicted_loss_nats"] == pytest.approx(1.5 + 1000 / compute**0.15)
    assert part.rows[-1].note == "L = 1.500 + 1000 / C^0.150"


def test_a_file_without_a_law_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: No such file or directory; give the sweep.json of"):
        read_law(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[" * 100_000,
        '{"law": {"irreducible": NaN, "terms": [{"of": "compute", "coefficient": 1, "exponent": 0.1}]}}',
        '{"law": {"irreducible": 1.5, "terms": []}}',
        '{"law": {"irreducible": 1.5, "terms": [{"of": "compute", "coefficient": null, "exponent": 0.1}]}}',
        '{"law": {"irreducible": 1.5, "terms": [{"of": "size", "coefficient": 1, "exponent": 0.1}]}}',
        '{"law": {"irreducible": 1.5, "terms": [{"of": "compute", "coefficient": 1, "exponent": 1e9}]}}',
        '{"law": {"irreducible": 1.5, "terms": [{"of": "compute", "coefficient": 1, "exponent": -0.1}]}}',
    ],
)
def test_a_damaged_law_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep.json: has no law; give the sweep.json of a `bigmodel sweep`"):
        read_law(tmp_path / "sweep.json")
