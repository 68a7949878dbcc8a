"""A file that begins with a byte order mark is read like any other: settings, hosts, tokenizer, text."""

import codecs
import json
import shutil
from pathlib import Path

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import load_settings
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.tokenizer import BOS, EOS
from bigmodel.launcher.cluster import load_cluster, read_hostfile
from tests.support.tiny_corpus import tiny_settings
from tests.support.tiny_run import write_run


def mark(file: Path) -> Path:
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    return file


def test_a_run_file_and_its_deepspeed_json(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = write_run(tmp_path / "plain", shards)
    marked = Path(shutil.copytree(tmp_path / "plain", tmp_path / "marked")) / "run.toml"
    mark(marked)
    mark(marked.with_name("run-deepspeed.json"))
    (of_plain, _), (of_marked, _) = (resolve_deepspeed(load_settings(file), 2) for file in (plain, marked))
    assert of_plain == of_marked


def test_a_cluster_file_its_fabric_and_a_host_file(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text('NCCL_DEBUG = "WARN"\n')
    (tmp_path / "cluster.toml").write_text('fabric = "ours.toml"\n')
    (tmp_path / "hosts").write_text("worker-1 slots=8\n")
    for name in ("ours.toml", "cluster.toml", "hosts"):
        mark(tmp_path / name)
    assert load_cluster(tmp_path / "cluster.toml").variables() == {"NCCL_DEBUG": "WARN"}
    assert read_hostfile(tmp_path / "hosts") == {"worker-1": 8}


def test_a_tokenizer_and_the_first_lines_of_sources_give_the_same_shards(tmp_path: Path, shards: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(shards / "tokenizer.json", tokenizer)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    made = []
    for marked in (False, True):
        settings = tiny_settings(tmp_path / f"data-{marked}")
        if marked:
            mark(tokenizer / "tokenizer.json")
            mark(tokenizer / "tokenizer_config.json")
            mark(Path(settings.prepare.sources[0].files[0]))
        prepared = settings.prepare.model_copy(update={"tokenizer": tokenizer})
        folder = prepare(settings.model_copy(update={"prepare": prepared}), quiet())
        assert list(verify(str(folder), quiet())) == []
        made.append(Manifest.read(folder))
    assert made[0].files == made[1].files
