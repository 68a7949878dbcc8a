"""`show data` prints a text beside what the model reads of it, and its segmentations."""

import json
from pathlib import Path

import pytest

from bigmodel.config.settings import Settings
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.show_augmentation import augmentation_text
from tests.support.tiny_corpus import NEWS, prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain texts of their own segmentations; beside it pairs."""
    home = tmp_path_factory.mktemp("shown")
    rows = [{"text": text, "target": "an answer"} for text in NEWS[:60]]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "pairs", "files": [str(home / "pairs.jsonl")], "target_column": "target"}
    prepared(home / "pairs", sources=[source])
    return prepared(home, content="text", segmentation={"kind": "bpe_dropout", "dropout": 0.5}).parent


def shown(folder: Path, model: str = "decoder", **data: object) -> list[str]:
    lengths = {"max_document_length": 64, "sequence_length": 128}
    sides = {"source_sequence_length": 256} if model == "encoder_decoder" else {}
    table = {"data": {"directory": str(folder), **lengths, **sides, **data}, "model": {"kind": model}}
    settings = Settings.model_validate(table)
    return augmentation_text(settings, ShardStore.of_run(settings.data, "train")).splitlines()


def pieces(line: str) -> str:
    return line.partition(": ")[2].removesuffix(" ...")


def test_an_augmented_pair_is_shown_beside_its_text(folder: Path) -> None:
    dropped = [{"kind": "drop_tokens", "share": 0.2}]
    title, text, read = shown(folder / "pairs" / "data", "encoder_decoder", augmentation=dropped)
    assert title.startswith("noise, on document ")
    assert title.endswith(" of pairs:")
    assert any(line.replace("\n", "\\n").startswith(pieces(text)) for line in NEWS)
    assert not any(line.replace("\n", "\\n").startswith(pieces(read)) for line in NEWS)


def test_segmentations_are_shown_with_their_numbers_of_tokens_and_the_same_text(folder: Path) -> None:
    title, *lines = shown(folder / "data")
    assert title.startswith("segmentations of document ")
    names, texts = zip(*(line.split(": ", 1) for line in lines), strict=True)
    assert [name.split(":")[0].strip() for name in names] == ["tokenizer", "pass 1", "pass 2"]
    assert all(" tokens" in line and "|" in line for line in lines)
    bare = [pieces(text).replace("|", "") for text in texts]
    shortest = min(map(len, bare))
    assert len({text[:shortest] for text in bare}) == 1
    assert len(set(lines)) == 3


def test_masks_of_causal_text_and_denoising_are_shown(folder: Path) -> None:
    masks = [{"kind": "mask_tokens", "share": 0.3}]
    assert any("[0]" in line for line in shown(folder / "data", augmentation=masks) if line.startswith("  read"))
    denoising = [{"kind": "denoising"}]
    lines = shown(folder / "data", "encoder_decoder", objectives=denoising)
    assert "[0]" in next(line for line in lines if line.startswith("  read"))
    assert "[0]" not in next(line for line in lines if line.startswith("  text"))


def test_nothing_is_shown_without_augmentation(folder: Path) -> None:
    assert shown(folder / "pairs" / "data", "encoder_decoder") == []
