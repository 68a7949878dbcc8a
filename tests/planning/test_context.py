"""The plan starts from the vocabulary and the ranks that the run will have."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.context import context_of, vocabulary_of


def settings_of(folder: Path, **sections: Any) -> Settings:
    data = {"directory": str(folder / "data"), "max_document_length": 64, "sequence_length": 64}
    return Settings.model_validate({"data": data | sections.pop("data", {})} | sections)


@pytest.mark.parametrize(
    ("vocabulary", "added", "tokens"),
    [
        ({"a": 0, "b": 1, "ab": 2}, [], 3),
        ({"a": 0, "b": 7}, [{"id": 3, "content": "x"}], 8),
        ([["a", -1.0], ["b", -2.0]], [{"id": 9, "content": "x"}], 10),
    ],
)
def test_the_tokens_are_those_of_the_given_tokenizer(
    tmp_path: Path, vocabulary: Any, added: list[dict[str, Any]], tokens: int
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert vocabulary_of(settings_of(tmp_path, prepare={"tokenizer": str(place)})) == tokens


def test_what_is_given_comes_first_and_rows_are_those_of_the_model(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        prepare={"vocabulary": 1000},
        model={"kind": "encoder", "vocabulary_multiple": 64},
        data={"objectives": [{"kind": "masked"}], "sentinels": 10},
    )
    assert vocabulary_of(settings) == 1024, "1,000 tokens, 7 marks and 10 sentinels, in multiples of 64"
    assert vocabulary_of(settings, 2000) == 2048


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_a_tokenizer_that_cannot_be_read_names_the_option(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_text(text)
    settings = settings_of(tmp_path, prepare={"tokenizer": str(path)})
    with pytest.raises(UserError, match=r"prepare\.tokenizer = .*--vocabulary N"):
        vocabulary_of(settings)
    assert vocabulary_of(settings, 300) == 300


def test_a_plan_of_tensor_parallel_ranks_needs_rows_that_they_divide(tmp_path: Path) -> None:
    training = {"tensor_parallel_ranks": 2}
    with pytest.raises(UserError, match=r"= 2 does not divide the 301 rows .* set model.vocabulary_multiple = 2"):
        vocabulary_of(settings_of(tmp_path, training=training), 301)
    assert vocabulary_of(settings_of(tmp_path, training=training, model={"vocabulary_multiple": 2}), 301) == 302


def test_the_ranks_are_those_of_the_cluster(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, training={"precision": "bf16", "global_batch_size": 32})
    context = context_of(settings, Cluster(nodes=2, gpus_per_node=8), 300)
    assert (context.ranks, context.vocabulary, context.manifest) == (16, 300, None)
    assert context.effective["gradient_accumulation_steps"] == 2
