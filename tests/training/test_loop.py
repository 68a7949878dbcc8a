"""The whole path as a user runs it: prepare, launch, evaluate, stop, resume, look; and under other launchers."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bigmodel.config.settings import load_settings
from bigmodel.data.advice.lane_advice import padding_warning
from bigmodel.launcher.network import free_port
from bigmodel.run_directory import read_json_lines
from bigmodel.training.loop import train
from tests.support.ranks import command, finish, kill, run_ranks, start_ranks
from tests.support.tiny_corpus import write_sources
from tests.support.tiny_run import write_run

WHOLE = """
[run]
directory = "{0}/run"
[prepare]
vocabulary = 300
validation_share = 0.2
shard_tokens = 1500
{1}
[data]
directory = "{0}/data"
max_document_length = 48
sequence_length = 96
max_documents = 8
lanes = 2
packing_buffer = 20
[model]
num_layers = 1
hidden_size = 32
num_heads = 2
num_kv_heads = 1
intermediate_size = 48
[optimizer]
learning_rate = 0.01
[schedule]
warmup_steps = 2
[training]
steps = 30
global_batch_size = 2
[evaluation]
every_steps = 10
sequences = 4
[checkpoint]
every_steps = 10
"""


def call(*arguments: str, code: int = 0, timeout: float = 120) -> str:
    """Run a program of this environment; gives what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def on_ranks(world_size: int, folder: Path, *arguments: str) -> str:
    """`python -m bigmodel ARGUMENTS` on ranks that start at once; gives what rank 0 printed."""
    run_ranks(world_size, command, list(arguments), folder / "printed")
    return (folder / "printed.0").read_text()


def test_from_text_to_a_trained_model_by_the_launcher(tmp_path: Path) -> None:
    sources = "".join(
        "[[prepare.sources]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in source.items())
        for source in write_sources(tmp_path / "text")
    )
    run_file, run = tmp_path / "run.toml", tmp_path / "run"
    run_file.write_text(WHOLE.format(tmp_path, sources))
    call("-m", "bigmodel", "prepare", str(run_file))
    printed = call("-m", "launcher", "local", str(run_file), "--ranks", "2")
    for words in ("starting", "step 30/30", "tokens/s", "validation", "this model", "bigram, same tokens", "xz -9"):
        assert words in printed, f"{words!r} is missing in:\n{printed}"
    for name in ("settings.json", "deepspeed.json", "environment.json", "loss.png", "sample.txt", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["bits_per_byte"] < 8
    lines = list(read_json_lines(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 31))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [10, 20, 30]
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    first = next(line for line in lines if line["kind"] == "step")
    assert last["nats_per_token"] == summary["nats_per_token"] < first["loss"] - 1
    again = on_ranks(2, tmp_path, "train", str(run_file), "--set", "optimizer.learning_rate=0.02")
    assert "resuming at step 30" in again
    assert "changed since the last start: optimizer.learning_rate 0.01 -> 0.02\n" in again
    assert json.loads((run / "summary.json").read_text())["bits_per_byte"] == summary["bits_per_byte"]
    scored = on_ranks(1, tmp_path, "evaluate", str(run))
    assert f"step 30: {summary['nats_per_token']:.1f}" in scored  # fp32 here, bf16 there
    said = on_ranks(1, tmp_path, "generate", str(run), "--prompt", "Document 1", "--tokens", "5", "--temperature", "0")
    assert said.startswith("Document 1")
    assert len(said) > len("Document 1")
    assert "Document 1Document 1" not in said


def test_a_save_is_published_while_training_goes_on(tmp_path: Path, shards: Path) -> None:
    """Once both ranks have told that their shares are written: long before the next save."""
    changes = ["--set", "training.steps=24", "--set", "checkpoint.every_steps=12"]
    run_ranks(2, command, ["train", str(write_run(tmp_path, shards)), *changes], tmp_path / "printed")
    lines = [(line["kind"], line["step"]) for line in read_json_lines(tmp_path / "run/metrics.jsonl") if "step" in line]
    assert lines.index(("step", 12)) < lines.index(("checkpoint", 12)) < lines.index(("step", 23))
    assert lines[-1] == ("checkpoint", 24)


BROUGHT = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8, "reduce_bucket_size": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": True,
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
    "comms_logger": {"enabled": True, "verbose": True},
    "log_level": "info",
    "csv_monitor": {"enabled": True, "output_path": "logs_of_deepspeed", "job_name": "mine"},
}


def test_a_deepspeed_file_does_what_it_says_and_writes_into_the_run_directory(tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    (tmp_path / "run-deepspeed.json").write_text(json.dumps(BROUGHT))
    printed = on_ranks(2, tmp_path, "train", str(run_file), "--set", "training.steps=3", "--fresh")
    rows = (run / "csv" / "training_loss.csv").read_text().splitlines()
    losses = [line["loss"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    assert rows == ["step,training/loss", *(f"{step},{loss!r}" for step, loss in enumerate(losses, start=1))]
    assert "steps_per_print (each step is in metrics.jsonl and on the terminal); csv_monitor.output_path (" in printed
    assert "fwd_microstep" in printed, "wall_clock_breakdown"
    assert "comm op: all_reduce | time (ms)" in printed, "verbose, with log_level"
    table = printed[printed.index("Comm. Op") :]
    assert all(name in table for name in ("all_reduce", "Message Size", "Total Latency"))
    assert not Path("logs_of_deepspeed").exists()
    quantized = BROUGHT | {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    (tmp_path / "run-deepspeed.json").write_text(json.dumps(quantized))
    [code] = finish(start_ranks(1, command, ["train", str(run_file), "--fresh"], tmp_path / "refused"))
    refused = (tmp_path / "refused.0").read_text()
    assert code == 2
    assert "zero_optimization.zero_quantized_weights = true: this machine cannot build or load" in refused
    assert "Traceback" not in refused


def test_what_deepspeed_logs_reaches_the_terminal_of_a_program_that_first_imports_it(
    tmp_path: Path, shards: Path
) -> None:
    run_file = write_run(tmp_path, shards)
    (tmp_path / "run-deepspeed.json").write_text('{"log_level": "info"}')
    short = ["--set", "training.steps=3", "--set", "evaluation.at_end=false"]
    words = [sys.executable, "-m", "bigmodel", "train", str(run_file), *short]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    assert "DeepSpeed Final Optimizer" in done.stderr, "tests import it before, outside of what keeps starts quiet"


def trained_step(run: Path) -> int:
    steps = [line["step"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    return steps[-1] if steps else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, shards: Path, number: signal.Signals) -> None:
    run_file, output = write_run(tmp_path, shards), tmp_path / "printed"
    arguments = ["train", str(run_file), "--set", "training.steps=100000", "--set", "checkpoint.every_steps=100000"]
    ranks = start_ranks(2, command, arguments, output)
    while trained_step(tmp_path / "run") < 3:
        assert all(rank.is_alive() for rank in ranks), Path(f"{output}.0").read_text()
        time.sleep(0.01)
    os.kill(ranks[1].pid, number)  # one rank is told; all stop at the same step
    assert finish(ranks, 60) == [3, 3]
    printed = Path(f"{output}.0").read_text()
    assert "run the same command to go on" in printed
    assert not (tmp_path / "run" / "metrics_endpoint").exists()
    stopped = trained_step(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]


def train_with_infinite_gradient(run_file: Path, bad_steps: list[int]) -> int:
    """On a rank: train; the sum of the gradients overflows in the given steps, and no micro-batch."""
    from bigmodel.training import loop

    class Engine(loop.Engine):
        count = 0

        def gradient_norm(self):
            self.count += 1
            return super().gradient_norm() + (float("inf") if self.count in bad_steps else 0.0)

    loop.Engine = Engine
    printed = run_file.with_suffix(f".printed.{os.environ['RANK']}")
    with open(printed, "w") as output, contextlib.redirect_stdout(output):
        return loop.train(load_settings(run_file))


def test_a_bad_step_is_skipped_by_all_ranks_and_recorded_by_document(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    clipped = run_file.read_text().replace("qk_norm = true", "").replace("[optimizer]", "[optimizer]\nqk_clip = 1e-6")
    run_file.write_text(clipped)
    run_ranks(2, train_with_infinite_gradient, run_file, [3], ranks_per_node=1)  # each knows half of the documents
    events = [line for line in read_json_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "step_skipped"]
    assert [event["step"] for event in events] == [3]
    assert {document[0] for document in events[0]["documents"]} == {"news", "letters"}
    steps = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps if line["skipped"]] == [3]
    assert sum(document[4] for document in events[0]["documents"]) == steps[2]["positions"]
    assert [line["step"] for line in steps if not line["clipped_heads"]] == [3]
    assert len(steps) == 10
    said = "gradient norm inf; no rank shows it when it computes its part again; its documents"
    assert said in run_file.with_suffix(".printed.0").read_text()
    assert run_file.with_suffix(".printed.1").read_text() == ""


@pytest.mark.parametrize(
    "starter",
    [
        ["-m", "bigmodel"],
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bigmodel"],
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}", "--module", "bigmodel"],
    ],
    ids=["alone", "torchrun", "deepspeed"],
)
def test_the_same_program_runs_under_other_launchers(tmp_path: Path, shards: Path, starter: list[str]) -> None:
    port = str(free_port())
    words = [port if word == "{port}" else word for word in starter]
    printed = call(*words, "train", str(write_run(tmp_path, shards)), "--set", "training.steps=3")
    assert f"{'1 rank' if starter == ['-m', 'bigmodel'] else '2 ranks'}, " in printed
    assert trained_step(tmp_path / "run") == 3
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    ranks = range(1 if starter == ["-m", "bigmodel"] else 2)
    logs = [tmp_path / "run" / "logs" / f"{os.uname().nodename}-rank-{rank}.log" for rank in ranks]
    assert sorted((tmp_path / "run" / "logs").iterdir()) == logs
    for line in ("starting", "step 3/3"):
        assert line in logs[0].read_text()
        assert line in printed


def test_a_batch_that_leaves_micro_batches_empty_is_warned_of() -> None:
    assert padding_warning(8, 4, 2) == padding_warning(8, 8, 1) == padding_warning(2, 1, 1) == ""
    warning = padding_warning(2, 8, 1)
    assert "75% of the computed packed sequences are empty: 8 ranks" in warning
    assert "set training.global_batch_size = 8" in warning
    assert "1 rank with micro-batches of 4 compute 4 per step" in padding_warning(3, 1, 4)


def test_a_later_start_adds_to_the_log_of_its_rank_and_errors_are_in_it(tmp_path: Path, shards: Path) -> None:
    start = ("-m", "bigmodel", "train", str(write_run(tmp_path, shards)), "--set", "training.steps=3")
    printed = call(*start) + call(*start, "--set", "data.directory=nowhere", code=2)
    (log,) = (tmp_path / "run" / "logs").iterdir()
    assert log.read_text() == printed
    assert "step 3/3" in printed
    assert printed.splitlines()[-1].startswith("bigmodel: ")


def test_ranks_are_not_started_for_a_wrong_run_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[model]\nnum_heads = 5\n")
    assert "model.num_heads = 5" in call("-m", "launcher", "local", str(tmp_path / "run.toml"), "--ranks", "2", code=2)


def test_the_fresh_option_sets_checkpoints_aside(tmp_path: Path, shards: Path) -> None:
    run_file, output = write_run(tmp_path, shards), tmp_path / "printed"
    arguments = ["train", str(run_file), "--set", "training.steps=2"]
    for more in ([], ["--fresh"]):
        assert finish(start_ranks(1, command, arguments + more, output), 60) == [0]
    assert "starting" in Path(f"{output}.0").read_text()
    assert (tmp_path / "run" / "checkpoints-set-aside-1" / "step-00000002").is_dir()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert finish(start_ranks(1, command, arguments, output), 60) == [2], "lost checkpoints are not a new run"
    assert "saved a checkpoint at step 2, but there is none now" in Path(f"{output}.0").read_text()
    assert [path.name for path in sorted((tmp_path / "run" / "starts").iterdir())] == ["0001.json", "0002.json"]


def wait_in_a_collective(folder: Path) -> int:
    """On a rank: rank 0 waits for rank 1, which never comes to the sum."""
    from bigmodel.distributed.signals import StopFlag
    from bigmodel.distributed.world import start_world

    StopFlag(grace_seconds=1.0)
    world = start_world()
    (folder / f"ready-{world.rank}").touch()
    if world.rank == 1:
        time.sleep(600)
    world.sum_([1.0])
    return 0


def train_without_rank_1(run_file: Path) -> int:
    """On a rank: rank 1 dies before the rendezvous, and rank 0 waits for it."""
    if os.environ["RANK"] == "1":
        return 9
    return train(load_settings(run_file))


def save_without_end(folder: Path) -> int:
    """On a rank: the step ends, and the disk hangs."""
    from bigmodel.distributed.signals import StopFlag

    stop = StopFlag(grace_seconds=0.5, save_seconds=0.5)
    (folder / "ready").touch()
    while not stop.requested:
        time.sleep(0.01)
    stop.save_begins()
    time.sleep(60)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_save_that_never_ends_does_not_keep_a_rank_that_was_told_to_stop(tmp_path: Path, number: int) -> None:
    ranks = start_ranks(1, save_without_end, tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    os.kill(ranks[0].pid, number)
    ranks[0].join(20)
    assert ranks[0].exitcode == 1


def test_a_signal_ends_a_rank_that_still_waits_for_the_others_at_once(tmp_path: Path, shards: Path) -> None:
    ranks = start_ranks(2, train_without_rank_1, write_run(tmp_path, shards))
    while not psutil.Process(ranks[0].pid).net_connections():  # it waits at its port
        assert ranks[0].is_alive()
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(ranks[0].pid, signal.SIGTERM)
    ranks[0].join(60)
    assert ranks[0].exitcode == -signal.SIGTERM
    kill(ranks)


def test_a_signal_ends_a_rank_that_is_stuck_in_a_collective(tmp_path: Path) -> None:
    ranks = start_ranks(2, wait_in_a_collective, tmp_path)
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(ranks[0].pid, signal.SIGTERM)
    ranks[0].join(60)
    assert ranks[0].exitcode == 1
    kill(ranks)


def test_events_that_a_full_disk_refuses_are_told_and_training_goes_on(tmp_path: Path, shards: Path) -> None:
    """/dev/full refuses every byte as a full disk does."""
    run_file, output = write_run(tmp_path, shards), tmp_path / "printed"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").symlink_to("/dev/full")
    assert finish(start_ranks(1, command, ["train", str(run_file)], output), 60) == [0]
    printed = Path(f"{output}.0").read_text()
    assert "Traceback" not in printed
    assert "events.jsonl: No space left on device; not recorded: start; " in printed
    assert "events.jsonl: No space left on device; not recorded: finished; " in printed
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))
