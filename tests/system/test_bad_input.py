"""Bad input: one message with name, value, need and remedy; exit code 2, no traceback, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import command, finish, start_ranks
from tests.support.tiny_corpus import tiny_settings
from tests.support.tiny_run import write_run


def run(tmp_path: Path, *arguments: str, world_size: int = 1) -> tuple[list[int], str]:
    """Exit codes and what was printed."""
    output = tmp_path / "printed"
    codes = finish(start_ranks(world_size, command, [str(one) for one in arguments], output), 60)
    return codes, "".join(Path(f"{output}.{rank}").read_text() for rank in range(world_size))


def assert_explained(result: tuple[list[int], str], *words: str) -> None:
    codes, printed = result
    assert codes == [2] * len(codes), (codes, printed)
    assert "Traceback" not in printed, printed
    for word in words:
        assert word in printed, f"{word!r} is missing in:\n{printed}"


def test_the_real_command_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bigmodel", "train", str(tmp_path / "none.toml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "none.toml: no such run file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[model\n", ["not valid TOML", "line 1"]),
        ("[modle]\nnum_layers = 2\n", ["modle: unknown setting", "did you mean 'model'?"]),
        ("[model]\nlayer = 2\n", ["model.layer: unknown setting", "did you mean 'num_layers'?"]),
        ("[training]\nlearning_rate = 1\n", ["did you mean 'optimizer.learning_rate'?"]),
        ("[model]\nnum_heads = 5\n", ["model.hidden_size = 768", "model.num_heads = 5"]),
        ("[model]\nnum_kv_heads = 5\n", ["model.num_heads = 12", "model.num_kv_heads = 5", "divisor"]),
        ("[training]\nsteps = 'many'\n", ["training.steps = 'many'", "integer"]),
        ("[training]\nglobal_batch_size = 3\n[data]\nlanes = 2\n", ["global_batch_size = 3", "data.lanes = 2"]),
        (
            "[training]\nbatch_ramp = [[5, 3]]\n[data]\nlanes = 2\n",
            ["batch_ramp: packed sequences = 3", "data.lanes = 2"],
        ),
        ("[training]\nbatch_ramp = [[5, 8], [5, 16]]\n", ["training.batch_ramp", "[5, 5] must rise"]),
        ("[training]\nbatch_ramp = [[5, 0]]\n", ["training.batch_ramp", "at least 1 pack"]),
        ("[data]\nmax_epochs = { web = -1 }\n", ["data.max_epochs", "-1", "0 (no limit)"]),
        ("[[data.curriculum]]\nfrom_tokens = 5\nmix = { a = 0.0 }\n", ["data.curriculum[0].mix", "above 0"]),
        (
            "[data]\ncurriculum = [{ from_tokens = 9, mix = { a = 1.0 } }, { from_tokens = 5, mix = { a = 1.0 } }]\n",
            ["data.curriculum: from_tokens = [9, 5] must rise"],
        ),
        (
            "[data]\nmax_document_length = 99\nsequence_length = 9\n",
            ["max_document_length = 99", "sequence_length = 9"],
        ),
    ],
)
def test_a_wrong_run_file(tmp_path: Path, content: str, words: list[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(content)
    assert_explained(run(tmp_path, "train", run_file), "run.toml", *words)


@pytest.mark.parametrize("override", ["training.steps", "=3", "model.heads.x=3"])
def test_a_wrong_override(tmp_path: Path, shards: Path, override: str) -> None:
    assert_explained(run(tmp_path, "train", write_run(tmp_path, shards), "--set", override), override)


def test_a_corpus_path_that_does_not_exist_or_is_empty(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    source = '[data]\ndirectory = "{0}/data"\n[[prepare.sources]]\nname = "web"\nfiles = ["{0}/{1}"]\n'
    run_file.write_text(source.format(tmp_path, "none/*.txt"))
    assert_explained(run(tmp_path, "prepare", run_file), "web", "none/*.txt", "matches nothing")
    (tmp_path / "empty.txt").write_text("")
    run_file.write_text(source.format(tmp_path, "empty.txt"))
    result = run(tmp_path, "prepare", run_file)
    assert_explained(result, "web", "1 empty", "name files that hold text, or leave the source out")
    assert "the same command" not in result[1]  # it would fail again
    assert not (tmp_path / "data").exists()


def test_training_without_prepared_data(tmp_path: Path) -> None:
    result = run(tmp_path, "train", write_run(tmp_path, tmp_path / "nothing"), world_size=2)
    assert_explained(result, "nothing", "bigmodel prepare")


def test_a_shard_folder_made_by_another_tokenizer(tmp_path: Path, shards: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    other = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(other | {"padding": None}, indent=1))
    assert_explained(run(tmp_path, "train", write_run(tmp_path, copy)), "tokenizer.json", str(copy))


def test_a_flipped_bit_in_a_shard_is_named_and_not_trained_on(tmp_path: Path, shards: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    for shard in copy.glob("train/*/shard.*.mds"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert_explained(run(tmp_path, "train", write_run(tmp_path, copy)), "shard.0", "SHA-256")
    codes, printed = run(tmp_path, "verify", copy)
    assert codes == [2]
    assert printed.count(".mds") >= 4


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "0.5", "1.0"]),
        ({"train_batch_size": 7}, ["train_batch_size", "7", "global_batch_size", "4"]),
        ({"bf16": {"enabled": True}}, ["bf16", "fp32", "precision"]),
        ({"zero_optimisation": {"stage": 1}}, ["zero_optimisation", "zero_optimization"]),
    ],
)
def test_a_deepspeed_json_that_contradicts_the_run_file(
    tmp_path: Path, shards: Path, deepspeed: dict, words: list[str]
) -> None:
    run_file = write_run(tmp_path, shards)
    (tmp_path / "run-deepspeed.json").write_text(json.dumps(deepspeed))
    run_file.write_text(
        run_file.read_text().replace("learning_rate = 0.01", "learning_rate = 0.01\ngradient_clipping = 1.0")
    )
    assert_explained(run(tmp_path, "train", run_file), "run-deepspeed.json", *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def limited(arguments: list[str], output: Path, limit_bytes: int) -> int:
    """On a rank: the command, unable to write files above a size: the kernel's own error, on rank 1 only."""
    import resource
    import signal

    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    return command(arguments, output)


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path: Path, shards: Path) -> None:
    run_file, output = write_run(tmp_path, shards), tmp_path / "printed"
    steps = ["train", str(run_file), "--set", "training.steps=4"]
    assert finish(start_ranks(2, command, steps, output), 60) == [0, 0]
    codes = finish(start_ranks(2, limited, ["train", str(run_file)], output, 60_000), 60)
    assert_explained(
        (codes, Path(f"{output}.0").read_text()), "rank 1 could not write", "older checkpoints are untouched"
    )
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert finish(start_ranks(2, command, ["train", str(run_file)], output), 60) == [0, 0]
    assert "resuming at step 4" in Path(f"{output}.0").read_text()


def test_two_runs_in_one_directory(tmp_path: Path, shards: Path) -> None:
    from bigmodel.run_directory import claim

    claim(tmp_path / "run")
    assert_explained(run(tmp_path, "train", write_run(tmp_path, shards)), "run.directory", "another run is using it")


def test_a_checkpoint_of_another_model_or_other_data(tmp_path: Path, shards: Path) -> None:
    run_file, short = write_run(tmp_path, shards), ["--set", "training.steps=4"]
    codes, printed = run(tmp_path, "train", run_file, *short)
    assert codes == [0], printed
    wider = run(tmp_path, "train", run_file, *short, "--set", "model.num_layers=3")
    assert_explained(wider, "model.num_layers", "2", "3")
    other = run(tmp_path, "train", run_file, "--set", "data.packing_buffer=21")
    assert_explained(other, "packing_buffer", "20", "21")


def test_small_settings_cannot_be_prepared_into_a_used_folder(tmp_path: Path, shards: Path) -> None:
    settings = tiny_settings(tmp_path)
    (settings.data.directory).mkdir()
    (settings.data.directory / "mine.txt").write_text("mine")
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[data]\ndirectory = "{settings.data.directory}"\n[prepare]\nvocabulary = 300\n'
        f'[[prepare.sources]]\nname = "letters"\nfiles = ["{tmp_path}/text/letters.parquet"]\n'
    )
    assert_explained(run(tmp_path, "prepare", run_file), str(settings.data.directory))
    assert (settings.data.directory / "mine.txt").read_text() == "mine"
