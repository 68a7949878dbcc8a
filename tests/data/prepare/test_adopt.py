"""Shards that others wrote with MDSWriter become prepared data; what cannot is refused."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import adopt as adopting
from bigmodel.data.prepare.adopt import Adoption, adopt
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from tests.data.prepare.test_pipeline import content
from tests.data.prepare.test_tokenless import write_tokenizer
from tests.data.store.test_mds import write_shards
from tests.data.store.test_mds_index import LARGE_WINDOW
from tests.data.store.test_remote import run
from tests.support.tiny_corpus import NEWS, prepared, tiny_settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose data/tokenizer.json has 300 tokens."""
    folder = tmp_path_factory.mktemp("adopt")
    prepared(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> Tokenizer:
    return Tokenizer.load(home / "data" / "tokenizer.json")


def take(home: Path, folder: str, into: Path, **options: Any) -> Path:
    return adopt(Adoption(folder, into, home / "data" / "tokenizer.json", **options), quiet())


def stored(directory: Path, split: str) -> list[list[int]]:
    store = ShardStore(directory, split)
    return [
        store.document("adopted", shard, row).tolist()
        for shard in range(store.num_shards("adopted"))
        for row in range(len(store.lengths("adopted", shard)))
    ]


def whole(tokenizer: Tokenizer, texts: Sequence[str] = NEWS) -> list[np.ndarray]:
    return [tokenizer.encode_document(text) for text in texts]


def test_shards_of_whole_documents_are_linked_unchanged(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = whole(tokenizer)
    columns = {"tokens": "ndarray:uint16"}
    train = write_shards(tmp_path / "train", columns, [{"tokens": one} for one in documents[:80]])
    validation = write_shards(tmp_path / "val", columns, [{"tokens": one} for one in documents[80:]])
    directory = take(home, train, tmp_path / "data", validation=validation)
    assert stored(directory, "train") == [one.tolist() for one in documents[:80]]
    assert stored(directory, "validation") == [one.tolist() for one in documents[80:]]
    theirs, ours = (sorted(folder.glob("*.mds")) for folder in (Path(train), directory / "train" / "adopted"))
    assert len(theirs) == len(ours) >= 3
    assert all(one.samefile(other) for one, other in zip(theirs, ours, strict=True))
    assert verify(str(directory), quiet()) == []
    assert (directory / "text" / "validation.txt").read_text() == "".join(NEWS[80:])
    assert Manifest.read(directory).recipe["adopted"]["begins_added"] == 0


@pytest.mark.parametrize(
    ("encoding", "dtype", "options"),
    [
        ("ndarray:int32", "", {}),
        ("ndarray", "", {"compression": "zstd:3"}),
        ("bytes", "int64", {"compression": "snappy"}),
        ("ndarray:uint16", "", {"hashes": ["sha1"], "compression": "gz"}),
    ],
)
def test_other_types_and_missing_ends_are_rewritten(
    encoding: str, dtype: str, options: dict[str, Any], home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Of the documents a third lacks its begin, a third its end, one is empty; another column lies beside."""
    documents = whole(tokenizer)
    kind = np.dtype(dtype or encoding.partition(":")[2] or "int64")
    given = [(one[1:] if n % 3 == 0 else one[:-1] if n % 3 == 1 else one) for n, one in enumerate(documents)]
    given = [one.astype(kind) for one in [*given, documents[0][:1], documents[0][:0]]]
    samples = [{"input_ids": one.tobytes() if dtype else one, "url": "x"} for one in given if len(one) or dtype]
    folder = write_shards(tmp_path / "theirs", {"input_ids": encoding, "url": "str"}, samples, **options)
    directory = take(home, folder, tmp_path / "data", dtype=dtype, validation_share=0.2)
    train, validation = stored(directory, "train"), stored(directory, "validation")
    assert sorted(train + validation) == sorted(one.tolist() for one in documents)
    assert 5 < len(validation) < 40
    assert verify(str(directory), quiet()) == []
    manifest = Manifest.read(directory)
    added = manifest.recipe["adopted"]
    assert (added["begins_added"], added["ends_added"]) == (34, 33)
    assert manifest.rows["adopted"]["kept"] == 100
    assert manifest.rows["adopted"]["empty"] == len(samples) - 100 >= 1
    assert manifest.total("train", "text_bytes") + manifest.total("validation", "text_bytes") == sum(
        len(text.encode()) for text in NEWS
    )


def test_shards_of_text_are_tokenized_as_any_source(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "theirs", {"text": "str", "url": "str"}, [{"text": t, "url": ""} for t in NEWS])
    directory = take(home, folder, tmp_path / "data", validation_share=0.2)
    both = stored(directory, "train") + stored(directory, "validation")
    assert sorted(both) == sorted(one.tolist() for one in whole(tokenizer))
    assert verify(str(directory), quiet()) == []
    packed = write_shards(tmp_path / "packed", {"text": "str"}, [{"text": t} for t in NEWS], compression="bz2")
    source = {"name": "adopted", "files": [f"{packed}/*.mds.bz2"]}
    again = prepared(tmp_path / "again", sources=[source], tokenizer=str(home / "data" / "tokenizer.json"))
    assert stored(again, "train") == stored(directory, "train")


def test_a_text_that_needs_another_setting_is_sent_to_prepare(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "theirs", {"text": "str"}, [{"text": t} for t in NEWS[:9]])
    write_tokenizer(tmp_path / "given.json", dropout=0.1)
    with pytest.raises(
        UserError, match=r"set prepare\.bpe_dropout = .*; `bigmodel adopt` has no such settings for text"
    ):
        adopt(Adoption(folder, tmp_path / "data", tmp_path / "given.json"), quiet())


def test_unknown_ids_of_adopted_shards_stand_in_the_manifest(tmp_path: Path) -> None:
    given = Path(write_tokenizer(tmp_path / "given.json", unknown="<unk>"))
    its = Tokenizer.load(given)
    documents = [np.array([its.bos, its.unknown, 5, its.unknown, its.eos]), np.array([its.bos, 5, its.eos])]
    train, other = (
        write_shards(tmp_path / name, {"tokens": "ndarray:int64"}, [{"tokens": one} for one in of_split])
        for name, of_split in (("train", documents), ("validation", documents[1:]))
    )
    directory = adopt(Adoption(train, tmp_path / "data", given, validation=other), quiet())
    counts = {"unknown_tokens": 2, "dropped_characters": 0}
    assert Manifest.read(directory).without_token == {"adopted": counts}


def test_streaming_reads_what_was_adopted(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = whole(tokenizer)
    columns = {"tokens": "ndarray:uint16"}
    theirs = [{"tokens": one} for one in documents]
    linked = write_shards(tmp_path / "linked", columns, theirs, hashes=["sha1"])
    rewritten = write_shards(tmp_path / "rewritten", columns, theirs[:50], compression="zstd:3")
    directory = take(home, linked, tmp_path / "data", validation=rewritten)
    assert verify(str(directory), quiet()) == []
    assert (directory / "train" / "adopted" / "shard.00001.mds").samefile(Path(linked) / "shard.00001.mds")
    from streaming import StreamingDataset

    for split, expected in (("train", documents), ("validation", documents[:50])):
        dataset = StreamingDataset(local=str(directory / split / "adopted"), batch_size=1, shuffle=False)
        read = [dataset[number]["tokens"] for number in range(len(dataset))]
        assert [one.tolist() for one in read] == [one.tolist() for one in expected]


def test_documents_that_cannot_be_taken_are_named(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = whole(tokenizer, NEWS[:3])
    cases = {
        "packed": (np.concatenate(documents), "document 1: has a begin or end token in its middle"),
        "foreign": (np.array([5, 300, 7], np.uint16), "document 1: holds token 300, the tokenizer has 300"),
        "negative": (np.array([5, -1], np.int32), "document 1: holds token -1"),
        "flat": (np.zeros((2, 2), np.int32), "with 2 axes"),
        "real": (np.zeros(3, np.float32), "arrays of float32"),
    }
    for name, (array, message) in cases.items():
        samples = [{"tokens": np.array([5, 6], array.dtype)}, {"tokens": array}]
        folder = write_shards(tmp_path / name, {"tokens": "ndarray"}, samples)
        with pytest.raises(UserError, match=message):
            take(home, folder, tmp_path / "data")
        assert not (tmp_path / "data").exists()


def test_folders_that_cannot_be_adopted_are_one_message(
    home: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = [{"tokens": one.tobytes(), "url": "x"} for one in whole(tokenizer, NEWS[:30])]
    folder = write_shards(tmp_path / "theirs", {"tokens": "bytes", "url": "str"}, samples)
    given = ("--tokenizer", str(home / "data"), "--into", str(tmp_path / "data"))
    cut = Path(write_shards(tmp_path / "cut", {"tokens": "bytes", "url": "str"}, samples))
    (cut / "shard.00000.mds").write_bytes((cut / "shard.00000.mds").read_bytes()[:-3])
    gone = Path(write_shards(tmp_path / "gone", {"tokens": "bytes", "url": "str"}, samples))
    (gone / "shard.00001.mds").unlink()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "index.json").write_text('{"shards": 3}')
    for arguments, words in [
        ((folder,), ["holds bytes", "--dtype int64"]),
        ((folder, "--dtype", "int65"), ["int65"]),
        ((folder, "--dtype", "float32"), ["--dtype float32: no type of integers"]),
        ((folder, "--dtype", "uint8"), ["the samples of", "also fit uint16", "ids below 300", "set --dtype uint16"]),
        ((folder, "--dtype", "int64"), ["do not fit it, but int16", "ids below 300", "set --dtype int16"]),
        ((folder, "--column", "url", "--dtype", "int32"), ["--dtype int32: column 'url' holds str", "leave it out"]),
        ((folder, "--column", "ids"), ["no column 'ids'; it has 'tokens', 'url'", "--column"]),
        ((folder, "--name", "Web/1"), ["name", "Web/1"]),
        ((str(cut), "--dtype", "uint16"), ["shard.00000.mds", "its samples do not fill it"]),
        ((str(gone), "--dtype", "uint16"), ["shard.00001.mds: missing"]),
        ((str(tmp_path / "odd"),), ["index.json: damaged"]),
        ((str(tmp_path / "nothing"),), ["there is no such folder or file"]),
        (
            (folder, "--column", "url", "--validation", folder),
            ["documents of text shards go to validation by their hash"],
        ),
    ]:
        code, printed = run(monkeypatch, capsys, "adopt", *arguments, *given)
        assert code == 2, (arguments, printed)
        assert "Traceback" not in printed
        for word in words:
            assert word in printed, (arguments, printed)
        assert not (tmp_path / "data").exists()
    code, printed = run(monkeypatch, capsys, "adopt", folder, "--dtype", "uint16", *given, "--validation-share", "0.2")
    assert code == 0, printed
    code, printed = run(monkeypatch, capsys, "adopt", folder, *given)
    assert (code, "exists already" in printed) == (2, True)


def test_a_shard_that_the_index_does_not_list_is_left_out_and_named(
    home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    samples = [{"tokens": one} for one in whole(tokenizer)]
    folder = Path(write_shards(tmp_path / "theirs", {"tokens": "ndarray:uint16"}, samples))
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"].pop()
    (folder / "index.json").write_text(json.dumps(index))
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    with Progress(console=console, disable=True) as progress:
        adopt(Adoption(str(folder), tmp_path / "data", home / "data", validation_share=0.2), progress)
    left = max(folder.glob("*.mds")).name
    assert f"{folder}: left out, because index.json does not list it: {left}\n" in console.export_text()


@pytest.mark.skipif(not shutil.which("zstd"), reason="needs the program zstd")
def test_the_remedy_for_a_shard_of_a_large_window_helps(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The plain file is what its index says; one that is compressed anew would not be."""
    samples = [{"tokens": one} for one in whole(tokenizer)]
    options = {"compression": "zstd", "hashes": ["sha1"], "size_limit": 1 << 20}
    folder = Path(write_shards(tmp_path / "theirs", {"tokens": "ndarray:uint16"}, samples, **options))
    shard, plain = folder / "shard.00000.mds.zstd", tmp_path / "plain"
    subprocess.run(["zstd", "-dqo", plain, shard], check=True)
    with open(plain, "rb") as stream:  # of a stream zstd does not know the size, so it states the whole window
        shard.write_bytes(subprocess.run(["zstd", "-q", "--long=28"], stdin=stream, stdout=-1, check=True).stdout)
    with pytest.raises(UserError, match=r"window is above 128 MiB, .*: zstd -d --rm --long=31 FILE"):
        take(home, str(folder), tmp_path / "data", validation_share=0.2)
    subprocess.run(["zstd", "-dq", "--rm", "--long=31", shard], check=True)
    assert len(Manifest.read(take(home, str(folder), tmp_path / "data", validation_share=0.2)).files) > 0


def test_shards_of_ids_of_different_types_are_not_read_by_one_type(
    home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Ids without begin and end: a token 0 in their middle would not betray the wrong type."""
    bare = [document[1:-1] for document in whole(tokenizer)]
    kinds = ("uint16", "int32")
    narrow, wide = (
        write_shards(tmp_path / kind, {"tokens": "bytes"}, [{"tokens": one.astype(kind).tobytes()} for one in bare])
        for kind in kinds
    )
    typed = write_shards(tmp_path / "typed", {"tokens": "ndarray:uint16"}, [{"tokens": one} for one in bare])
    with pytest.raises(
        UserError, match=r"--dtype uint16: the shards hold ids of different types \(uint16: .*; uint32: "
    ):
        take(home, narrow, tmp_path / "data", validation=wide, dtype="uint16")
    with pytest.raises(UserError, match=r"--dtype uint16: the samples of .* also fit uint32"):
        take(home, typed, tmp_path / "data", validation=wide, dtype="uint16")
    odd = write_shards(tmp_path / "odd", {"tokens": "bytes"}, [{"tokens": bytes([5, 6, 7])}])
    with pytest.raises(
        UserError, match=r"document 0 has 3 bytes, no whole number of ids of --dtype int16; .*set --dtype uint8"
    ):
        take(home, odd, tmp_path / "data", dtype="int16")


@pytest.mark.parametrize(("column", "encoding"), [("tokens", "ndarray:uint16"), ("text", "str")])
def test_shards_that_are_not_what_their_index_says_are_not_taken(
    column: str, encoding: str, home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A flipped bit in one shard, another number of samples in the next: one error names both."""
    samples = [{column: one} for one in (NEWS if column == "text" else whole(tokenizer))]
    folder = Path(write_shards(tmp_path / "ids", {column: encoding}, samples, hashes=["sha1"], compression="snappy"))
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][2]["samples"] = 75
    (folder / "index.json").write_text(json.dumps(index))
    flip(folder / "shard.00001.mds.snappy")
    with pytest.raises(UserError, match=r"index.json and its shards differ in 3 points") as error:
        take(home, str(folder), tmp_path / "data")
    assert "shard.00001.mds.snappy: index.json says sha1" in str(error.value)
    assert "its decompressed content has" in str(error.value)
    assert "shard.00002.mds.snappy: index.json says 75 samples" in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_source_of_shards_is_compared_with_the_index_beside_it(home: Path, tmp_path: Path) -> None:
    folder = Path(
        write_shards(tmp_path / "theirs", {"text": "str"}, [{"text": text} for text in NEWS], hashes=["xxh64"])
    )
    flip(folder / "shard.00001.mds")
    source = {"name": "news", "files": [f"{folder}/*.mds"]}
    with pytest.raises(UserError, match=r"differ in 1 point:\n  \S+shard.00001.mds: index.json says xxh64"):
        prepared(tmp_path, sources=[source], tokenizer=str(home / "data" / "tokenizer.json"))
    assert not (tmp_path / "data").exists()


def test_a_source_of_shards_says_which_of_its_index_are_missing(home: Path, tmp_path: Path) -> None:
    folder = Path(write_shards(tmp_path / "theirs", {"text": "str"}, [{"text": text} for text in NEWS]))
    gone = folder / "shard.00001.mds"
    gone.unlink()
    console = Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    source = {"name": "news", "files": [f"{folder}/*.mds"]}
    settings = tiny_settings(tmp_path, sources=[source], tokenizer=str(home / "data" / "tokenizer.json"))
    with Progress(console=console, disable=True) as progress:
        prepare(settings, progress)
    assert f"not read, because it is missing, though index.json lists it: {gone}\n" in console.export_text()


def flip(file: Path) -> None:
    """The last bit."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_linked_shard_is_the_file_itself_where_theirs_is_a_symbolic_link(
    home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    columns, documents = {"tokens": "ndarray:uint16"}, whole(tokenizer)
    theirs = Path(write_shards(tmp_path / "theirs", columns, [{"tokens": one} for one in documents]))
    (theirs / "real").mkdir()
    shard = theirs / "shard.00000.mds"
    shard.rename(theirs / "real" / "first")
    shard.symlink_to("real/first")
    directory = take(home, str(theirs), tmp_path / "data", validation=str(theirs))
    assert stored(directory, "train") == [one.tolist() for one in documents]
    linked = directory / "train" / "adopted" / "shard.00000.mds"
    assert linked.samefile(shard)
    assert not linked.is_symlink()


def test_mds_files_that_are_no_source_of_text_are_refused(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = write_shards(tmp_path / "ids", {"tokens": "ndarray:uint16"}, [{"tokens": whole(tokenizer)[0]}])
    cut = Path(write_shards(tmp_path / "cut", {"text": "str"}, [{"text": text} for text in NEWS[:9]]))
    cut /= "shard.00000.mds"
    cut.write_bytes(cut.read_bytes()[:-9])
    latin = write_shards(tmp_path / "latin", {"text": "str"}, [{"text": text} for text in [*NEWS[:9], "\x7f\x7f"]])
    damaged = Path(latin) / "shard.00000.mds"
    damaged.write_bytes(damaged.read_bytes().replace(b"\x7f\x7f", b"\xff\xff"))
    (tmp_path / "none.mds").write_bytes(b"nothing of the kind")
    (tmp_path / "far.mds.zstd").write_bytes(LARGE_WINDOW)
    for index in tmp_path.glob("*/index.json"):
        index.unlink()  # the files alone are judged
    for file, column, message in [
        (f"{tokens}/*.mds", "tokens", "holds ndarray:uint16, not text; import shards of tokens with .*adopt"),
        (f"{tokens}/*.mds", "text", "has no column 'text'; it has 'tokens'"),
        (str(tmp_path / "none.mds"), "text", "none.mds: cannot be read: its head is not that of an MDS shard"),
        (str(tmp_path / "far.mds.zstd"), "text", "far.mds.zstd: cannot be read: its zstd window is above 128 MiB"),
        (str(damaged), "text", "shard.00000.mds: sample 10: not UTF-8"),
        (str(cut), "text", "shard.00000.mds: cannot be read: its samples do not fill it"),
    ]:
        source = {"name": "adopted", "files": [file], "column": column}
        with pytest.raises(UserError, match=message):
            prepared(tmp_path / "run", sources=[source], tokenizer=str(home / "data" / "tokenizer.json"))


def test_what_others_put_beside_it_is_kept_and_two_at_once_are_refused(
    home: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "ids", {"tokens": "ndarray:uint16"}, [{"tokens": ids} for ids in whole(tokenizer)])
    into = tmp_path / "data"
    (tmp_path / "data.partial").mkdir()
    thesis = tmp_path / "data.partial" / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(UserError, match=r"data.partial: holds files that no preparation made \(thesis.txt\)"):
        take(home, shards, into)
    assert thesis.read_text() == "years of work"
    thesis.unlink()
    with open(tmp_path / "data.partial.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this data now"):
            take(home, shards, into)
    (tmp_path / "data.partial" / ("a" * 16)).mkdir()  # of an adoption that was killed
    take(home, shards, into)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "ids"]


def test_killed_at_any_shard_it_goes_on_from_those_it_has_taken_and_the_result_is_the_same(
    home: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [{"tokens": ids} for ids in whole(tokenizer)]
    shards = write_shards(tmp_path / "ids", {"tokens": "ndarray:uint16"}, samples)
    undisturbed = content(take(home, shards, tmp_path / "whole", validation_share=0.2))
    into, kept, calls = tmp_path / "data", [], []
    write = adopting.Taken.write

    def killed_at_the_second(self: adopting.Taken, path: Path, text: bytes) -> None:
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, path, text)

    with monkeypatch.context() as patch:
        patch.setattr(adopting.Taken, "write", killed_at_the_second)
        while not into.exists():
            calls.clear()
            with contextlib.suppress(KeyboardInterrupt):
                take(home, shards, into, validation_share=0.2)
            assert len(calls) <= 2  # what was taken is not taken again
            assert len(kept) < 20
            kept.append(len(list((tmp_path / "data.partial").rglob("taken/*.npz"))))
    assert kept[:-1] == list(range(1, len(kept)))
    assert len(kept) > 5
    assert content(into) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "ids", "whole"]
    # A result that was half made is made anew; a damaged record is taken again.
    with monkeypatch.context() as patch:
        patch.setattr(adopting, "describe_files", stop)
        with pytest.raises(KeyboardInterrupt):
            take(home, shards, tmp_path / "again", validation_share=0.2)
    record = next((tmp_path / "again.partial").rglob("taken/00001.npz"))
    record.write_bytes(record.read_bytes()[:-30])
    assert content(take(home, shards, tmp_path / "again", validation_share=0.2)) == undisturbed


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_shards_that_changed_since_are_taken_again_and_while_they_are_taken_refused(
    home: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, samples = {"tokens": "ndarray:uint16"}, [{"tokens": ids} for ids in whole(tokenizer)]
    shards = write_shards(tmp_path / "ids", columns, samples)
    with monkeypatch.context() as patch:
        patch.setattr(adopting, "describe_files", stop)
        with pytest.raises(KeyboardInterrupt):
            take(home, shards, tmp_path / "data", validation_share=0.2)
    shutil.rmtree(shards)
    write_shards(tmp_path / "ids", columns, samples[::-1])
    directory = take(home, shards, tmp_path / "data", validation_share=0.2)
    assert stored(directory, "train")[0] == samples[-1]["tokens"].tolist()
    write_manifest = Manifest.write

    def change(self: Manifest, folder: Path) -> None:
        os.utime(Path(shards) / "shard.00001.mds", ns=(1, 1))
        write_manifest(self, folder)

    monkeypatch.setattr(Manifest, "write", change)
    with pytest.raises(UserError, match=r"ids: its shards or the tokenizer changed while they were adopted"):
        take(home, shards, tmp_path / "other", validation_share=0.2)
    assert not (tmp_path / "other").exists()
