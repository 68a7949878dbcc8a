"""Averages of checkpoints against NumPy and the paper's recipe; commands take the result as any run."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from bigmodel.__main__ import app
from bigmodel.config.settings import UserError
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.average import average, greedy_soup
from bigmodel.evaluation.classify import make_validation
from bigmodel.training.checkpoint import checksum
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.folder import manifest_of, plain
from bigmodel.training.load_model import load_trained
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run

STEPS = (2, 4, 6, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of 2 ranks with 4 checkpoints, at a rate that makes their losses differ."""
    folder = tmp_path_factory.mktemp("average")
    changes = ["training.steps=8", "checkpoint.every_steps=2", "checkpoint.keep=4", "optimizer.learning_rate=0.03"]
    arguments = [word for change in changes for word in ("--set", change)]
    run_ranks(2, command, ["train", str(write_run(folder, shards)), *arguments], folder / "printed")
    return folder / "run"


def weights_in(run: Path, step: int, kind: str = "weight") -> dict[str, np.ndarray]:
    """By numpy: name -> flat weight, or flat average of kind "ema", from the files of all ranks."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        for tensor, values in load_file(file).items():
            name, _, start = tensor.rpartition("@")
            if name.startswith(f"{kind}."):
                parts.setdefault(name.removeprefix(f"{kind}."), []).append((int(start), values))
    return {name: np.concatenate([values for _, values in sorted(found, key=first)]) for name, found in parts.items()}


def first(pair: tuple[int, np.ndarray]) -> int:
    return pair[0]


def loss_of(run: Path) -> float:
    trained = load_trained(run)
    return make_validation(trained.settings.data, 1).run(trained.forward, ALONE).nats_per_token


def alone(run: Path, step: int, folder: Path) -> Path:
    """A copy of the run with one checkpoint."""
    shutil.copytree(run / "checkpoints" / f"step-{step:08d}", folder / "checkpoints" / f"step-{step:08d}")
    shutil.copy(run / "settings.json", folder)
    return folder


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy with the last checkpoint, whose description and settings are changed."""
    part = alone(run, STEPS[-1], folder) / "checkpoints" / f"step-{STEPS[-1]:08d}"
    state, settings = (json.loads(file.read_text()) for file in (part / "state.json", folder / "settings.json"))
    change(state, settings)
    (folder / "settings.json").write_text(json.dumps(settings))
    (part / "state.json").write_bytes(plain(state))
    files = json.loads((part / "manifest.json").read_text())["files"]
    files["state.json"] = checksum.of_file(part / "state.json")
    (part / "manifest.json").write_bytes(manifest_of(files, 2))
    return folder


@pytest.mark.parametrize(("last", "steps"), [(0, STEPS), (3, STEPS[1:])])
def test_the_mean_is_that_of_numpy(run: Path, tmp_path: Path, last: int, steps: Sequence[int]) -> None:
    named = average([run], tmp_path / "mean", last=last)
    assert named == [f"{run}, step {step}" for step in steps]
    found, given = weights_in(tmp_path / "mean", 8), [weights_in(run, step) for step in steps]
    assert found.keys() == given[0].keys()
    for name, mean in found.items():
        exact = np.mean([one[name].astype(np.float64) for one in given], axis=0)
        assert np.array_equal(mean, exact.astype(np.float32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean"]


def test_a_greedy_soup_is_never_worse_than_the_best_checkpoint_and_follows_the_paper(run: Path, tmp_path: Path) -> None:
    losses = {step: loss_of(alone(run, step, tmp_path / str(step))) for step in STEPS}
    best, *others = sorted(losses, key=lambda step: losses[step])
    kept, lowest = [best], losses[best]
    for step in others:
        trial = tmp_path / f"trial-{step}"
        average([tmp_path / str(one) for one in [*kept, step]], trial)
        if (loss := loss_of(trial)) <= lowest:
            kept, lowest = [*kept, step], loss
    done = CliRunner().invoke(app, ["average", str(run), str(tmp_path / "soup"), "--greedy"])
    assert done.exit_code == 0, done.output
    assert loss_of(tmp_path / "soup") == lowest <= losses[best]
    made_of = checkpoint.of_run(tmp_path / "soup").description["average"]
    assert [one["step"] for one in made_of] == kept
    assert len(set(losses.values())) == 4


def test_a_soup_takes_runs_of_experts_with_another_strength_of_their_balance(shards: Path, tmp_path: Path) -> None:
    changes = ["training.steps=8", "checkpoint.every_steps=4", "model.experts.bias_rate=0.5"]
    arguments = [word for change in changes for word in ("--set", change)]
    run_ranks(1, command, ["train", str(write_run(tmp_path, shards, balance="bias")), *arguments], tmp_path / "printed")

    def change(state: dict[str, Any], _: dict[str, Any]) -> None:
        state["model"]["experts"]["bias_rate"] = 0.25

    others = [alone(tmp_path / "run", 4, tmp_path / "one"), changed(tmp_path / "run", tmp_path / "other", change)]
    assert len(average(others, tmp_path / "mean")) == 2


def test_the_greedy_recipe_tries_the_best_first_and_keeps_what_does_not_raise_the_loss() -> None:
    """The losses of means are a table; equal losses are kept, as in the paper; nan is tried last and left out."""
    table = {"A": 2.40, "B": 2.50, "C": 2.45, "D": float("nan"), "AC": 2.38, "ACB": 2.39, "ACD": float("nan")}
    table |= {"E": 2.6, "ACE": 2.38}
    tried: list[str] = []

    def loss_of_mean(names: Sequence[str]) -> float:
        tried.append("".join(names))
        return table[tried[-1]]

    said: list[str] = []
    table["ACED"] = float("nan")
    assert greedy_soup(["D", "B", "A", "E", "C"], loss_of_mean, str, said.append) == ["A", "C", "E"]
    assert tried == ["D", "B", "A", "E", "C", "AC", "ACB", "ACE", "ACED"]
    assert said[:2] == ["A: 2.4000 nats, the best", "C: 2.4500 nats, with those before 2.3800: kept"]
    with pytest.raises(UserError, match="no checkpoint has a finite validation loss; x has nan"):
        greedy_soup(["x", "y"], lambda names: float("nan"), str, said.append)


def test_commands_take_an_average_as_any_run(run: Path, shards: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"
    done = CliRunner().invoke(app, ["average", str(run), str(mean), "--last", "2"])
    assert done.output == f"{mean}: the mean of 2 checkpoints: {run}, step 6; {run}, step 8\n"
    for words in (["evaluate", str(mean)], ["generate", str(mean), "--prompt", "a", "--tokens", "3"],
                  ["export", str(mean), str(tmp_path / "exported")]):  # fmt: skip
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "exported" / "model.safetensors").exists()
    run_file = write_run(tmp_path, shards, name="next")
    begins = ["train", str(run_file), "--set", f"model.from={mean}", "--set", "training.steps=3"]
    run_ranks(1, command, begins, tmp_path / "printed")
    resumes = ["train", str(run_file), "--set", f"run.directory={mean}"]
    with pytest.raises(AssertionError):
        run_ranks(1, command, resumes, tmp_path / "printed")
    printed = (tmp_path / "printed.0").read_text()
    assert "an average of checkpoints has no state of the optimizer" in printed
    assert f'begin another run with model.from = "{mean}"' in printed


def test_the_average_over_the_updates_is_that_of_the_recurrence_from_the_weights_of_each_step(
    shards: Path, tmp_path: Path
) -> None:
    changes = ["training.steps=4", "checkpoint.every_steps=1", "checkpoint.keep=4", "training.ema_decay=0.75"]
    arguments = [word for change in changes for word in ("--set", change)]
    run_ranks(2, command, ["train", str(write_run(tmp_path, shards)), *arguments], tmp_path / "printed")
    run, folder = tmp_path / "run", tmp_path / "average"
    done = CliRunner().invoke(app, ["average", str(run), str(folder), "--updates"])
    assert done.output == f"{folder}: the average over the updates of {run}, step 4\n"
    expected = {name: values.astype(np.float64) for name, values in weights_in(run, 1, "ema").items()}
    for step in (2, 3, 4):
        for name, weight in weights_in(run, step).items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight
    found = weights_in(folder, 4)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-8)
    assert loss_of(folder) != loss_of(run)


def test_an_average_over_updates_is_of_one_run_that_kept_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 8: holds no average over updates; train with training\.ema_decay"):
        average([run], tmp_path / "never", updates=True)
    with pytest.raises(UserError, match=r"--updates: takes the newest checkpoint of one run; leave out --last"):
        average([run], tmp_path / "never", last=2, updates=True)
    shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="begun: there is no checkpoint; train first"):
        average([tmp_path / "begun"], tmp_path / "never", updates=True)
    assert not (tmp_path / "never").exists()


def _other_width(state: dict[str, Any], settings: dict[str, Any]) -> None:
    state["model"]["hidden_size"] = 64


def _other_rows(state: dict[str, Any], settings: dict[str, Any]) -> None:
    state["shapes"]["embedding.weight"][0] += 8


def _other_classes(state: dict[str, Any], settings: dict[str, Any]) -> None:
    settings["classification"]["classes"] = ["b", "a"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_width, "model.hidden_size = 64, and .* has 32: only checkpoints of one model can be averaged"),
        (_other_rows, r"embedding\.weight is \[\d+, 32\], and \[\d+, 32\] in .*: only checkpoints of one model"),
        (_other_classes, r"classification\.classes = \['b', 'a'\], and .* has \[\]: only checkpoints of one model"),
    ],
)
def test_checkpoints_of_other_models_are_refused(run: Path, tmp_path: Path, change: Any, words: str) -> None:
    other = changed(run, tmp_path / "other", change)
    with pytest.raises(UserError, match=words):
        average([run, other], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_run_from_another_one_with_other_settings_of_training_is_averaged_with_it(run: Path, tmp_path: Path) -> None:
    def tuned(state: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["model"] |= {"from": str(run)}
        state["model"] |= {"from": str(run), "min_vocabulary": 300, "dropout": 0.4, "mtp_loss_weight": 0.7}

    def of_an_older_version(state: dict[str, Any], settings: dict[str, Any]) -> None:
        del state["model"]["zero_centered_norm"]

    changed(run, tmp_path / "tuned", tuned)
    changed(run, tmp_path / "older", of_an_older_version)
    said: list[str] = []
    average([run, tmp_path / "tuned"], tmp_path / "mean", say=said.append)
    average([run, tmp_path / "older"], tmp_path / "mean-of-versions", say=said.append)
    assert said == []


def with_swapped_tokens(shards: Path, folder: Path) -> Path:
    """A copy of the data whose tokenizer gives two tokens each other's numbers."""
    shutil.copytree(shards, folder)
    tokenizer, manifest = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "manifest.json"))
    numbers = tokenizer["model"]["vocab"]
    one, other = list(numbers)[-2:]
    numbers[one], numbers[other] = numbers[other], numbers[one]
    content = json.dumps(tokenizer).encode()
    (folder / "tokenizer.json").write_bytes(content)
    manifest["tokenizer_sha256"] = hashlib.sha256(content).hexdigest()
    manifest["files"]["tokenizer.json"] = {"bytes": len(content), "sha256": manifest["tokenizer_sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_another_tokenizer_is_refused_and_another_beginning_is_said(run: Path, shards: Path, tmp_path: Path) -> None:
    data = {"same": shutil.copytree(shards, tmp_path / "same-data")}
    data["swapped"] = with_swapped_tokens(shards, tmp_path / "swapped-data")
    for name in data:

        def moved(state: dict[str, Any], settings: dict[str, Any], name: str = name) -> None:
            settings["run"]["seed"], settings["data"]["directory"] = 7, str(data[name])

        changed(run, tmp_path / name, moved)
    said: list[str] = []
    average([run, tmp_path / "same"], tmp_path / "mean", say=said.append)
    assert len(said) == 1
    assert "began with other weights (run.seed, model.from)" in said[0]
    with pytest.raises(
        UserError, match=r"the tokenizer of its data \(.*swapped-data\) is not that of .*: the same row"
    ):
        average([run, tmp_path / "swapped"], tmp_path / "never")


def test_the_tokenizer_of_a_run_is_that_of_its_last_start_also_where_its_data_were_prepared_again(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    swapped = with_swapped_tokens(shards, tmp_path / "data")
    for name, data in (("then", shards), ("now", swapped)):

        def moved(state: dict[str, Any], settings: dict[str, Any]) -> None:
            settings["data"]["directory"] = str(swapped)

        changed(run, tmp_path / name, moved)
        shutil.copy(data / "manifest.json", tmp_path / name / "data_manifest.json")
    with pytest.raises(UserError, match=r"now, step 8: the tokenizer of its data .* is not that of .*then, step 8"):
        average([tmp_path / "then", tmp_path / "now"], tmp_path / "never")
    average([run], tmp_path / "mean")
    assert (tmp_path / "mean" / "data_manifest.json").read_bytes() == (run / "data_manifest.json").read_bytes()


@pytest.mark.parametrize("places", [(0, 0), (0, 1)])
def test_a_mean_that_is_less_pruned_than_its_checkpoints_is_said(
    run: Path, tmp_path: Path, places: tuple[int, int]
) -> None:
    """Of each pair of weights one is 0: the first or the second."""

    def pruned(state: dict[str, Any], settings: dict[str, Any]) -> None:
        settings["pruning"] = {"kind": "magnitude", "sparsity": 0.5, "end_step": 4}

    zeros = 0
    for name, place in zip("ab", places, strict=True):
        part = changed(run, tmp_path / name, pruned) / "checkpoints" / f"step-{STEPS[-1]:08d}"
        file = part / "rank-00000.safetensors"
        tensors = load_file(file)
        key = max((key for key in tensors if key.startswith("weight.")), key=lambda key: tensors[key].size)
        tensors[key] = tensors[key].copy()
        tensors[key][place::2] = 0
        zeros = int((tensors[key] == 0).sum())
        save_file(tensors, file)
        files = json.loads((part / "manifest.json").read_text())["files"]
        files[file.name] = checksum.of_file(file)
        (part / "manifest.json").write_bytes(manifest_of(files, 2))
    said: list[str] = []
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean", say=said.append)
    warnings = [f"a, step 8 has {zeros:,} weights that are 0, and the mean 0: checkpoints are pruned in other places"]
    assert len(said) == (places == (0, 1))
    assert all(warning in line for warning, line in zip(warnings, said, strict=False))


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["empty"], "not a run directory"),
        (["one"], r"an average needs at least 2 checkpoints, and .*one has one; keep more with checkpoint.keep"),
        (["one", "one"], "this checkpoint is named twice"),
        (["one", "damaged"], "this checkpoint is damaged: .*checksum differs"),
    ],
)
def test_what_cannot_be_averaged_is_named(run: Path, tmp_path: Path, runs: list[str], words: str) -> None:
    for name in ("one", "damaged"):
        alone(run, 8, tmp_path / name)
    file = tmp_path / "damaged" / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=words):
        average([tmp_path / name for name in runs], tmp_path / "mean")
    with pytest.raises(UserError, match="exists already"):
        average([run], tmp_path / "one")
