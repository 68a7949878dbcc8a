"""`bigmodel replay`: a step computed again, from the run directory and the data alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, load_settings
from bigmodel.data.plan.order import Order
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.shards import ShardStore
from tests.support.ranks import command, finish, start_ranks
from tests.support.tiny_corpus import text
from tests.support.tiny_run import write_run

GARBAGE = " ".join(["qzxj"] * 60)


def on_ranks(world_size: int, folder: Path, *words: str) -> tuple[list[int], str]:
    """Exit codes, and what rank 0 printed."""
    codes = finish(start_ranks(world_size, command, list(words), folder / "printed"))
    return codes, (folder / "printed.0").read_text()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of 10 steps on 2 ranks, begun again after step 6, and the last step that trains on the garbage."""
    folder = tmp_path_factory.mktemp("planted")
    texts = {"web": [text(number) for number in range(20)], "crawl": [GARBAGE, *map(text, range(20, 30))]}
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    sources = [{"name": name, "files": [str(folder / f"{name}.jsonl")]} for name in texts]
    section = {"validation_share": 0.2, "vocabulary": 300, "workers": 1, "shard_tokens": 400, "sources": sources}
    shards = prepare(
        Settings.model_validate({"prepare": section, "data": {"directory": str(folder / "data")}}), quiet()
    )
    run_file = write_run(folder, shards)
    for steps in ("6", "10"):
        words = ["train", str(run_file), "--set", f"training.steps={steps}", "--set", "checkpoint.every_steps=2"]
        assert on_ranks(2, folder, *words)[0] == [0, 0]
    store, settings = ShardStore(shards, "train"), load_settings(run_file)
    order = Order.of_run(store, settings)
    steps = [number for number in range(1, 11) if any(is_garbage(store, one) for one in order.next_step())]
    return folder / "run", steps[-1]


def is_garbage(store: ShardStore, pack: Any) -> bool:
    documents = [store.document(store.sources[chunk.source], chunk.shard, chunk.row) for chunk in pack]
    return any(len(set(one.tolist())) < 12 and len(one) > 60 for one in documents)


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_step_after_a_restart_is_repeated_to_the_last_bit_and_the_planted_garbage_comes_first(
    planted: tuple[Path, int], tmp_path: Path
) -> None:
    run, step = planted
    before = files_of(run)
    given = ["--checkpoint", "0"] if step < 3 else []
    asked = [str(run), "--step", str(step), *given, "--out", str(tmp_path), "--exclude", str(tmp_path / "bad.jsonl")]
    codes, printed = on_ranks(2, tmp_path, "replay", *asked)
    assert codes == [0, 0], printed
    assert printed.count("equal to the recorded one to the last bit") == 2, printed
    found = json.loads((tmp_path / "replay.json").read_text())
    assert found["documents"][0]["text"].startswith("qzxj qzxj"), printed
    assert found["documents"][0]["source"] == found["sources"][0]["source"] == "crawl"
    (bad,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {name: bad[name] for name in ("source", "shard", "row")} == {
        name: found["documents"][0][name] for name in ("source", "shard", "row")
    }
    labels, nats = zip(*((one["labels"], one["labels"] * one["loss"]) for one in found["documents"]), strict=True)
    assert sum(nats) / sum(labels) == pytest.approx(found["loss"], rel=1e-5)
    norms = [one["gradient_norm"] for one in found["layers"] if one["gradient_norm"] is not None]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(found["gradient_norm"], rel=1e-5)
    assert files_of(run) == before


def test_on_another_number_of_ranks_the_difference_is_within_its_bound(
    planted: tuple[Path, int], tmp_path: Path
) -> None:
    codes, printed = on_ranks(1, tmp_path, "blame", str(planted[0]), "--step", "8", "--out", str(tmp_path))
    assert codes == [0], printed
    assert "may differ: 2 ranks then, 1 now" in printed
    found = json.loads((tmp_path / "replay.json").read_text())["recorded"]
    assert all(one["difference"] <= one["bound"] for one in found.values()), found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "11"], "the run has steps 1 to 10"),
        (["--step", "1"], "no checkpoint before it"),
        (["--step", "8", "--checkpoint", "5"], "there is no usable one of that step"),
    ],
)
def test_a_step_that_cannot_be_repeated_is_refused_with_those_that_can(
    planted: tuple[Path, int], tmp_path: Path, words: list[str], said: str
) -> None:
    codes, printed = on_ranks(1, tmp_path, "replay", str(planted[0]), *words)
    assert codes == [2], printed
    assert said in printed
    assert "Traceback" not in printed
