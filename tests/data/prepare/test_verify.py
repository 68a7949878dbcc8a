"""Verify finds every damage, of bytes and of sense, and nothing in a whole folder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.data.prepare import verify as verifying
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import Manifest, describe_files
from tests.data.store.test_remote import run
from tests.support.tiny_corpus import prepared

NEWS = "train/news"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def flip_a_bit(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def sign_again(folder: Path, **changes: Any) -> None:
    """A manifest that speaks of the files as they are now: what a faulty writer would leave."""
    replace(Manifest.read(folder), files=describe_files(folder), **changes).write(folder)


def test_a_whole_folder_has_no_damage_in_this_process_and_in_others(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify(str(whole), quiet()) == []
    monkeypatch.setattr(verifying, "INLINE_BYTES", 0)
    assert verify(str(whole), quiet()) == []


def test_every_flipped_bit_is_found_in_every_file(folder: Path) -> None:
    names = [name for name in Manifest.read(folder).files if (folder / name).stat().st_size]
    assert len(names) > 15
    for name in names:
        flip_a_bit(folder / name)
    problems = verify(str(folder), quiet())
    assert [problem.partition(": ")[0] for problem in problems] == sorted(str(folder / name) for name in names)
    assert all("its content differs from the manifest" in problem for problem in problems)


@pytest.mark.parametrize("name", ["shard.00001.mds", "lengths.00001.npy"])
def test_one_flipped_bit_in_an_otherwise_whole_folder_is_found(folder: Path, name: str) -> None:
    flip_a_bit(folder / NEWS / name, -9)
    assert verify(str(folder), quiet()) == [
        f"{folder / NEWS / name}: its content differs from the manifest (same size, other SHA-256)"
    ]


def test_missing_cut_and_extra_files_are_named_and_the_picture_is_no_data(folder: Path) -> None:
    shard = folder / NEWS / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / NEWS / "shard.00009.mds").write_bytes((folder / NEWS / "shard.00001.mds").read_bytes())
    (folder / "text" / "validation.txt").unlink()
    (folder / "validation" / "news" / "index.json").unlink()
    (folder / "lengths.png").write_bytes(b"of an older version")
    problems = verify(str(folder), quiet())
    assert len(problems) == 4
    assert f"{shard}: has " in problems[1]
    assert problems[2] == f"{folder / NEWS}/shard.00009.mds: not in the manifest"
    assert problems[0] == f"{folder}/text/validation.txt: missing"
    assert problems[3] == f"{folder}/validation/news/index.json: missing"
    assert [one for one in verify(str(folder), quiet(), partly=True) if one.endswith(": missing")] == []


def rewrite_shard(folder: Path, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
    """The first shard of the news with other documents; its lengths and index stay."""
    path = folder / NEWS / "shard.00000.mds"
    parsed = mds.ShardContent.parse(path.read_bytes())
    documents = [mds.decode_array(value, np.dtype(np.uint16)).copy() for value in parsed.values("tokens")]
    path.write_bytes(mds.encode_shard({"tokens": change(documents)}))


def with_token(place: int, token: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    def change(documents: list[np.ndarray]) -> list[np.ndarray]:
        documents[3][place] = token
        return documents

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_token(5, 300), "shard.00000.mds: holds token 300, the vocabulary has 300"),
        (with_token(-1, 7), "document 3 does not begin with token 0 and end with token 1"),
        (with_token(0, 1), "document 3 does not begin with token 0 and end with token 1"),
        (lambda documents: [*documents[1:], documents[0]], "lengths are not those of lengths.00000.npy"),
        (lambda documents: documents[:-1], "documents in"),
        (lambda documents: [one.astype(np.uint32) for one in documents], "stored as ndarray:uint32"),
    ],
)
def test_what_a_faulty_writer_would_put_into_a_shard_is_found(
    folder: Path, change: Callable[[list[np.ndarray]], list[np.ndarray]], message: str
) -> None:
    rewrite_shard(folder, change)
    sign_again(folder)
    problems = verify(str(folder), quiet())
    assert any(message in problem and f"{NEWS}/shard.00000.mds" in problem for problem in problems), problems


def test_the_largest_token_of_the_vocabulary_is_no_damage(folder: Path) -> None:
    rewrite_shard(folder, with_token(5, 299))
    sign_again(folder)
    assert verify(str(folder), quiet()) == []


def test_a_shard_that_is_none_is_named(folder: Path) -> None:
    (folder / NEWS / "shard.00001.mds").write_bytes(b"no shard")
    sign_again(folder)
    problems = verify(str(folder), quiet())
    assert any("shard.00001.mds: its head is not that of an MDS shard" in problem for problem in problems)


def test_the_last_shard_left_out_of_index_and_files_is_missed_by_the_counts(folder: Path) -> None:
    index = json.loads((folder / NEWS / "index.json").read_text())
    last = len(index["shards"]) - 1
    (folder / NEWS / "index.json").write_text(json.dumps(index | {"shards": index["shards"][:-1]}))
    for name in (f"shard.{last:05}.mds", f"lengths.{last:05}.npy"):
        (folder / NEWS / name).unlink()
    sign_again(folder)
    problems = verify(str(folder), quiet())
    assert any("train/news: 85 documents by the manifest" in problem for problem in problems), problems


def test_numbers_of_the_manifest_that_do_not_add_up_are_found(folder: Path) -> None:
    manifest = Manifest.read(folder)
    counts = json.loads(json.dumps(manifest.counts))
    counts["letters"]["train"]["tokens"] += 1
    rows = json.loads(json.dumps(manifest.rows))
    rows["news"]["duplicate"] += 1
    row_bytes = json.loads(json.dumps(manifest.row_bytes))
    row_bytes["letters"]["kept"] -= 1
    row_bytes["letters"]["cleaned"] += 1
    shards = json.loads(json.dumps(manifest.shards))
    shards["letters"]["train"][1][1] += 1
    statistics = manifest.statistics | {"max_tokens": 7}
    changes = {
        "counts": counts,
        "shards": shards,
        "rows": rows,
        "row_bytes": row_bytes,
        "statistics": statistics,
        "vocabulary": 301,
    }
    sign_again(folder, **changes)
    problems = verify(str(folder), quiet())
    for words in (
        "train/letters: 3682 tokens by the manifest, 3681 in the shards",
        "train/letters: the sizes of shards by the manifest are not those of their lengths",
        "news: read 103 documents, kept and dropped 104",
        "letters: kept",
        "the statistics are not those of the documents' lengths",
        "vocabulary = 301, tokenizer.json has 300",
    ):
        assert any(words in problem for problem in problems), (words, problems)
    assert len(problems) == 6
    restored = {"counts": manifest.counts, "shards": manifest.shards, "rows": manifest.rows}
    sign_again(folder, **restored, row_bytes=manifest.row_bytes, vocabulary=300)
    (folder / "text" / "validation.txt").write_text("other text")
    sign_again(folder, statistics=manifest.statistics)
    assert "validation text of" in verify(str(folder), quiet())[0]


def test_the_command_names_each_damage_and_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = run(monkeypatch, capsys, "verify", str(folder))
    assert code == 0
    assert "every file agrees with the manifest" in printed
    flip_a_bit(folder / NEWS / "shard.00001.mds", 900)
    (folder / "stray").touch()
    code, printed = run(monkeypatch, capsys, "verify", str(folder))
    assert code == 2
    assert f"{folder / NEWS}/shard.00001.mds: its content differs" in printed
    assert f"{folder}/stray: not in the manifest" in printed
    assert "2 problem(s); copy damaged or missing files again" in printed
    assert "Traceback" not in printed
