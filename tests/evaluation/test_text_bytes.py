"""Bits per byte: bytes of the text that labels stand for, recounted with the tokenizers library; or no number."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from bigmodel.config.settings import DataSettings
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import BOS, EOS, Tokenizer
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.evaluate import Evaluation, Validation
from bigmodel.evaluation.text_bytes import bytes_by_token
from tests.support.tiny_corpus import LETTERS, NEWS, prepared

CAUSAL, PREFIX = {"kind": "causal"}, {"kind": "prefix"}
TWO_SIDES = {"source_sequence_length": 128, "max_source_length": 64}


def settings_of(directory: Path, objectives: list[dict], **changes: Any) -> DataSettings:
    if any(one["kind"] not in ("causal", "prefix") for one in objectives):
        changes |= {"sentinels": 64}
    packs = {"max_document_length": 64, "sequence_length": 128, "max_documents": 8}
    return DataSettings(directory=directory, objectives=objectives, **packs, **changes)


def score(data: DataSettings, packs: int = 0) -> tuple[Evaluation, list[int]]:
    """An evaluation by a model that loses one nat per label, and all labels."""
    labels: list[int] = []

    def forward(batch: Batch, _output: str) -> torch.Tensor:
        asked = batch.labels != IGNORED
        labels.extend(batch.labels[asked].tolist())
        return asked.float().expand(3, -1)  # losses, surprise, likeliest token

    return Validation(data, 2).run(forward, ALONE, packs), labels


@pytest.mark.parametrize(
    ("objectives", "changes", "share"),
    [
        ([CAUSAL], {}, (1.0, 1.0)),
        ([{"kind": "causal", "ahead": 3}], {}, (0.97, 0.999)),
        ([PREFIX], {}, (0.45, 0.6)),
        ([{"kind": "fill_in_the_middle"}], {}, (1.0, 1.0)),
        ([{"kind": "span_corruption"}], {}, (0.1, 0.2)),
        ([{"kind": "span_corruption"}], TWO_SIDES, (0.1, 0.2)),
        ([{"kind": "ul2"}], {}, (0.2, 0.5)),
        ([{"kind": "masked"}], {}, (0.1, 0.2)),
        ([CAUSAL, {"kind": "fill_in_the_middle"}], {}, (1.0, 1.0)),
        ([PREFIX], TWO_SIDES | {"fixed_target_tokens": 48}, (0.2, 0.6)),
    ],
)
def test_bits_per_byte_counts_the_bytes_of_the_predicted_text_and_none_for_marks(
    shards: Path, objectives: list[dict], changes: dict, share: tuple[float, float]
) -> None:
    evaluation, labels = score(settings_of(shards, objectives, **changes))
    tokenizer = Tokenizer.load(shards / "tokenizer.json")
    # A letter of this corpus has at most two bytes, so each byte of a torn letter is decoded as one U+FFFD.
    texts = [tokenizer.decode([label]).replace("\ufffd", "?") for label in labels if label < tokenizer.vocabulary]
    assert evaluation.text_bytes == sum(len(text.encode()) for text in texts)
    assert evaluation.bits_per_byte == pytest.approx(len(labels) / 0.693147180559945 / evaluation.text_bytes)
    in_all = ShardStore(shards, "validation").text_bytes
    assert share[0] * in_all <= evaluation.text_bytes <= share[1] * in_all


def test_a_part_of_the_split_counts_its_own_bytes(shards: Path) -> None:
    data = settings_of(shards, [CAUSAL])
    evaluation, labels = score(data, packs=4)
    table_V = bytes_by_token(ShardStore(shards, "validation"))
    assert 0 < evaluation.text_bytes == sum(table_V[label] for label in labels) < score(data)[0].text_bytes


def write_tokenizer(path: Path, model: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> str:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([BOS, EOS])
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.save(str(path))
    return str(path)


def sentencepiece_like(path: Path) -> str:
    """Spaces become ▁, letters outside the vocabulary become bytes: nothing is lost, and no tokenizer says so."""
    from tokenizers import models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁", "\n", "▁t"]
    model = models.BPE({piece: number for number, piece in enumerate(pieces)}, [("▁", "t")], byte_fallback=True)
    return write_tokenizer(path, model, normalizers.Replace(" ", "▁"))


def words_only(path: Path, words: Iterable[str]) -> str:
    """Drops the spaces between words."""
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["[UNK]", *words])}
    return write_tokenizer(path, models.WordLevel(vocabulary, "[UNK]"), None, pre_tokenizers.Whitespace())


def test_a_tokenizer_that_keeps_the_text_is_found_by_comparison_with_the_text(tmp_path: Path) -> None:
    directory = prepared(tmp_path, tokenizer=sentencepiece_like(tmp_path / "given.json"))
    store = ShardStore(directory, "validation")
    assert score(settings_of(directory, [{"kind": "fill_in_the_middle"}]))[0].text_bytes == store.text_bytes
    table_V = bytes_by_token(store)
    known = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert [table_V[known[piece]] for piece in ("▁t", "▁", "a", "<0xC3>")] == [2, 1, 1, 1]
    assert 0 < score(settings_of(directory, [PREFIX]))[0].text_bytes < store.text_bytes


def test_bits_per_byte_is_withheld_where_tokens_do_not_tell_bytes(tmp_path: Path) -> None:
    cut = pre_tokenizers.Whitespace()
    words = sorted({word for text in (*NEWS, *LETTERS) for word, _ in cut.pre_tokenize_str(text)})
    directory = prepared(tmp_path, tokenizer=words_only(tmp_path / "given.json", words))
    store = ShardStore(directory, "validation")
    assert bytes_by_token(store) is None
    whole, _ = score(settings_of(directory, [CAUSAL]))
    assert whole.text_bytes == store.text_bytes, "all of the text is predicted, whatever its tokens"
    part, _ = score(settings_of(directory, [CAUSAL]), packs=2)
    prefix, _ = score(settings_of(directory, [PREFIX]))
    for evaluation in (part, prefix):
        assert evaluation.bits_per_byte is None
        assert "bits per byte not counted: the tokens of this tokenizer" in str(evaluation)


def test_bits_per_byte_is_withheld_where_tokens_are_unknown(tmp_path: Path) -> None:
    """The unknown token is cheaper to predict than the many words that it stands for."""
    directory = prepared(tmp_path, tokenizer=words_only(tmp_path / "given.json", ["Document", "time", "year"]))
    assert ShardStore(directory, "validation").manifest.unknown_share > 0.5
    whole, _ = score(settings_of(directory, [CAUSAL]))
    assert whole.bits_per_byte is None
