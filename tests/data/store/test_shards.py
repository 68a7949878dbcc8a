"""Shards give back what was written, and a damaged folder is an error, never other data."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore, length_statistics
from tests.support.tiny_corpus import prepared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def read_all(directory: Path, split: str = "train") -> list[np.ndarray]:
    store = ShardStore(directory, split)
    return [
        store.document(source, shard, row)
        for source in store.sources
        for shard in range(store.num_shards(source))
        for row in range(len(store.lengths(source, shard)))
    ]


def test_documents_come_back_by_shard_and_row_with_their_lengths(whole: Path) -> None:
    store = ShardStore(whole, "train")
    assert store.sources == ["letters", "news"]
    num_documents = num_tokens = 0
    for source in store.sources:
        assert store.num_shards(source) >= 2
        for shard in range(store.num_shards(source)):
            lengths = store.lengths(source, shard)
            assert store.shard_sizes(source)[shard].tolist() == [len(lengths), int(lengths.sum()) - len(lengths), 0]
            assert lengths.dtype == np.uint32
            assert isinstance(lengths, np.memmap)
            for row in range(len(lengths)):
                document = store.document(source, shard, row)
                assert document.dtype == np.uint16
                assert len(document) == lengths[row]
                assert (document[0], document[-1]) == (store.manifest.bos, store.manifest.eos)
            num_documents += len(lengths)
            num_tokens += int(lengths.sum())
    assert (store.num_documents, store.num_labels) == (num_documents, num_tokens - num_documents)
    assert num_documents > 90


def test_streaming_itself_reads_the_shards(whole: Path) -> None:
    program = """
import json, sys
from tools.torchvision_operators import define_missing_torchvision_operators
define_missing_torchvision_operators()
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
dataset = StreamingDataset(local=sys.argv[1], batch_size=1, shuffle=False)
print(json.dumps([dataset[i]["tokens"].tolist() for i in range(len(dataset))]))
"""
    directory = str(whole / "train" / "news")
    done = subprocess.run([sys.executable, "-c", program, directory], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    store = ShardStore(whole, "train")
    ours = [
        store.document("news", shard, row).tolist()
        for shard in range(store.num_shards("news"))
        for row in range(len(store.lengths("news", shard)))
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == ours


def test_reading_imports_no_more_of_streaming_than_its_reader(whole: Path) -> None:
    program = """
import sys
from pathlib import Path
from bigmodel.data.store.shards import ShardStore
print(len(ShardStore(Path(sys.argv[1]), "train").document("news", 0, 0)))
print([name for name in sys.modules if name.partition(".")[0] in ("streaming", "torchvision", "transformers", "boto3")])
"""
    done = subprocess.run([sys.executable, "-c", program, str(whole)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    length, imported = done.stdout.splitlines()
    assert int(length) == len(ShardStore(whole, "train").document("news", 0, 0))
    assert imported == "[]"


def test_the_fingerprint_is_of_the_splits_files_and_the_tokenizer(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    fixing = {name: record for name, record in manifest["files"].items() if name.startswith("train/")}
    content = json.dumps([manifest["tokenizer_sha256"], fixing], sort_keys=True)
    assert ShardStore(whole, "train").fingerprint == hashlib.sha256(content.encode()).hexdigest()


def test_the_fingerprint_of_texts_is_also_of_how_they_begin_and_end(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {}
    for content, end in product(("text", "tokens"), ("<|end|>", "<|over|>")):
        config = json.dumps({"eos_token": end}).encode()
        (folder / "tokenizer_config.json").write_bytes(config)
        manifest["recipe"]["content"] = content
        record = {"bytes": len(config), "sha256": hashlib.sha256(config).hexdigest()}
        manifest["files"]["tokenizer_config.json"] = record
        (folder / "manifest.json").write_text(json.dumps(manifest))
        found[content, end] = ShardStore(folder, "train").fingerprint
    assert found["text", "<|end|>"] != found["text", "<|over|>"]
    assert found["tokens", "<|end|>"] == found["tokens", "<|over|>"]  # these are stored with both


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard.00001.mds", "lengths.00001.npy", "index.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "the manifest says"), (flip_a_bit, "differs from the manifest"), (Path.unlink, "missing")],
)
def test_a_damaged_file_is_named_at_first_use(folder: Path, name: str, damage: Callable, message: str) -> None:
    assert len(read_all(folder)) > 90  # whole before
    damage(folder / "train" / "news" / name)
    with pytest.raises(UserError) as error:
        read_all(folder)
    assert f"news/{name}" in str(error.value)
    assert message in str(error.value)
    assert "bigmodel prepare RUN.toml" in str(error.value)
    assert len(read_all(folder, "validation")) > 10  # the other split is untouched


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard.00001.mds", Path.unlink, "missing"),
        ("shard.00001.mds", lambda path: path.write_bytes(path.read_bytes()[:9]), "has 9 bytes, the manifest says"),
        ("shard.00001.mds", lambda path: path.write_bytes(bytes(path.stat().st_size)), "differs from the manifest"),
        ("lengths.00001.npy", Path.unlink, "missing"),
    ],
)
def test_a_file_that_is_lost_after_its_first_use_is_named(
    folder: Path, name: str, damage: Callable, message: str
) -> None:
    store = ShardStore(folder, "train")
    store.document("news", 1, 0)
    store.lengths("news", 1)
    damage(folder / "train" / "news" / name)
    with pytest.raises(UserError, match=rf"news/{name}: .*{message}.*bigmodel prepare RUN.toml"):
        (store.document("news", 1, 1), store.lengths("news", 1))


def test_shards_of_another_tokenizer_are_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"tokenizer.json: is not the tokenizer that made these shards"):
        ShardStore(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: missing"):
        ShardStore(folder, "train")


def test_a_folder_that_is_not_prepared_is_refused_with_the_command_that_prepares_it(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; run `bigmodel prepare RUN.toml`"):
        ShardStore(folder / "nowhere", "train")
    with pytest.raises(UserError, match="no split 'test'"):
        ShardStore(folder, "test")
    manifest = folder / "manifest.json"
    table = json.loads(manifest.read_text())
    for content, message in [
        (manifest.read_text()[:-30], "manifest.json: damaged"),
        ("[]", "schema version None"),
        (json.dumps(table | {"schema_version": 99}), "schema version 99, this program reads 3"),
        (json.dumps({name: value for name, value in table.items() if name != "bos"}), "damaged: bos"),
    ]:
        manifest.write_text(content)
        with pytest.raises(UserError, match=message):
            ShardStore(folder, "train")
    manifest.unlink()
    with pytest.raises(UserError, match=r"has no manifest.json.*prepare RUN.toml"):
        ShardStore(folder, "train")


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(whole: Path, folder: Path, tmp_path: Path) -> None:
    train = ShardStore(whole, "train").fingerprint
    assert ShardStore(folder, "train").fingerprint == train
    assert ShardStore(folder, "validation").fingerprint != train
    other = prepared(tmp_path / "other", shard_tokens=2900)
    assert ShardStore(other, "train").fingerprint != train


def test_the_manifest_is_read_as_it_was_written(whole: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(whole)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (tmp_path / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_length_statistics_of_known_lengths() -> None:
    lengths = [np.array([2, 3, 4, 5], np.uint32), np.array([1000], np.uint32)]
    statistics = length_statistics(lengths, text_bytes=2008)
    assert statistics["mean_tokens"] == 202.8
    assert statistics["median_tokens"] == 4.0
    assert statistics["max_tokens"] == 1000
    assert statistics["bytes_per_token"] == 2.0  # 1014 stored tokens, 10 of which begin or end
    assert statistics["histogram"] == {"2": 1, "4": 2, "8": 1, "1024": 1}


def test_two_threads_may_open_the_first_shard_at_the_same_time(tmp_path: Path) -> None:
    """The data thread and the evaluation of a finished run do; in a new process, for the import is what they share."""
    folder = prepared(tmp_path)
    program = (
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\n"
        "import time\n"
        "from bigmodel.data.store import shards\n"
        "from bigmodel.data.store.shards import ShardStore\n"
        "make = shards.ModuleType\n"
        "shards.ModuleType = lambda name: (time.sleep(0.1), make(name))[1]  # time for the other thread\n"
        "stores = [ShardStore(Path(sys.argv[1]), split) for split in ('train', 'validation')] * 2\n"
        "start = threading.Barrier(len(stores))\n"
        "def first(store):\n"
        "    start.wait()\n"
        "    return len(store.document('news', 0, 0))\n"
        "with ThreadPoolExecutor(len(stores)) as pool:\n"
        "    print(list(pool.map(first, stores)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
