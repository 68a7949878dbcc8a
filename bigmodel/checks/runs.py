"""Loss, resume and accounting checks: real training processes are compared, killed, resumed and audited.

In: the user's run file, shortened to a few steps in a directory of its own. Costs minutes for a large model.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bigmodel.checks.audit import Finding, audit, torch_agrees
from bigmodel.checks.scratch import scratch_folder, undisturbed
from bigmodel.config.deepspeed_config import agree
from bigmodel.config.schedule_settings import COUNTED, WITH_LENGTH
from bigmodel.config.settings import Settings, TrainingSettings, UserError, load_settings
from bigmodel.rank_log import ARRANGED
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint

PROCESS_SECONDS = 600  # limit of a training process
SHARING = ("sequence_parallel_ranks", "expert_parallel_ranks", "tensor_parallel_ranks")
ALONE = tuple(f"training.{name}=1" for name in SHARING)  # overrides for one rank


def check_loss(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Train two steps on one rank and on several, which share packed sequences, experts and matrices as those of the
    run do. Several ranks add in another order."""
    settings = agree(load_settings(run_file, overrides))
    training = settings.training
    several = max(2, training.sharing_ranks)
    slack = slack_of_loss(training)
    on_cpu = torch.cuda.device_count() < several  # each rank needs a GPU; a GPU is not compared with a CPU
    with scratch_folder() as scratch:
        traces = {}
        for world_size in (1, several):
            directory = scratch / f"ranks-{world_size}"
            command = [*overrides, *short_run(settings, directory, 2, 2), *(ALONE if world_size == 1 else ())]
            _train(run_file, command, world_size, directory, on_cpu)
            traces[world_size] = _trace(directory)
    findings = []
    for name, bound in (("loss", 1e-6), ("gradient_norm", 1e-5)):
        one, two = traces[1][0][name], traces[several][0][name]
        difference = abs(one - two) / abs(one)
        findings.append(
            Finding(
                f"the first step's {name} agrees on 1 and {several} ranks",
                difference < bound * slack,
                f"{difference:.1e} relative",
            )
        )
    return findings


def slack_of_loss(training: TrainingSettings) -> int:
    """Factor of the bounds of `check loss`: 1, or 1000 where ranks share in bf16 or fp16.

    Their products then have fewer rows, or are sums of parts, and each is rounded: on two tensor-parallel ranks a loss
    differed by 2e-6 and a gradient norm by 2e-4, in fp32 by 1e-8.
    """
    return 1 if training.sharing_ranks == 1 or training.precision == "fp32" else 1000


def check_resume(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Ten undisturbed steps against ten steps killed by SIGKILL at a random time after the first save, and resumed."""
    settings = agree(load_settings(run_file, overrides))
    world_size = num_ranks(settings)
    with scratch_folder() as scratch:
        whole, broken = scratch / "whole", scratch / "broken"
        _train(run_file, [*overrides, *short_run(settings, whole, 10, 4)], world_size, whole)
        command = [*overrides, *short_run(settings, broken, 10, 4)]
        at = _train_until_killed(run_file, command, world_size, broken, random.randint(5, 8))
        _train(run_file, command, world_size, broken)
        expected, found = _trace(whole), _trace(broken)
        differing = [a["step"] for a, b in zip(expected, found, strict=False) if _learned(a) != _learned(b)]
        same_weights = _file_hashes(whole) == _file_hashes(broken)
        starts = [event["step"] for event in read_json_lines(broken / "events.jsonl") if event["event"] == "start"]
    return [
        Finding(
            "loss and gradient norm of every step equal the uninterrupted run's, to the last bit",
            len(expected) == len(found) == 10 and not differing and starts[-1] > 0,
            f"10 steps on {world_size} ranks, killed in step {at + 1}, resumed at step {starts[-1]}",
        ),
        Finding("weights and optimizer state at the end are the same bytes", same_weights, "sha256 of every file"),
    ]


def check_accounting(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Audit the run directory, if it has a run, and a short run that is killed and resumed."""
    settings = agree(load_settings(run_file, overrides))
    findings = audit(settings.run.directory) if (settings.run.directory / "metrics.jsonl").exists() else []
    world_size = num_ranks(settings)
    with scratch_folder() as scratch:
        directory = scratch / "run"
        command = [*overrides, *short_run(settings, directory, 20, 4)]
        began = time.time()
        _train_until_killed(run_file, command, world_size, directory, random.randint(9, 12))
        _train(run_file, command, world_size, directory)
        findings += audit(directory, (began, (directory / "metrics.jsonl").stat().st_mtime))
    return [*findings, torch_agrees(settings)]


def num_ranks(settings: Settings) -> int:
    """Two if there is work and a device for both, or the number that shares packed sequences, experts or matrices."""
    sharing = settings.training.sharing_ranks
    return sharing if sharing > 1 else min(2, torch.cuda.device_count() or 2, settings.training.global_batch_size)


def short_run(settings: Settings, directory: Path, steps: int, every: int) -> list[str]:
    """Overrides for a short run of a run file in a directory of its own, without the run's remote store.

    settings: of the run file and its DeepSpeed JSON together.
    """
    return [
        *_short_schedule(settings),
        f"run.directory={directory}",
        f"training.steps={steps}",
        f"checkpoint.every_steps={every}",
        "checkpoint.remote=",
        "checkpoint.hours_between_failures=0",
        # Not 0 where settings need evaluations; none comes before the end.
        f"evaluation.every_steps={steps + 1 if settings.evaluation.every_steps else 0}",
        "evaluation.at_end=false",
        "metrics.port=0",
        "metrics.writers=[]",
    ]


def _short_schedule(settings: Settings) -> list[str]:
    """Overrides with which a short run needs no shorter schedule."""
    schedule = settings.schedule
    if schedule.kind in COUNTED:
        return ["schedule.warmup_steps=0", "schedule.decay_steps=0"]
    if schedule.kind in WITH_LENGTH:
        whole = schedule.total_steps or settings.training.steps
        return [f"schedule.kind={schedule.kind}", f"schedule.total_steps={whole}"]
    return []


def _train(run_file: Path, overrides: Sequence[str], world_size: int, directory: Path, on_cpu: bool = False) -> None:
    """Train to the end."""
    with started(_training(run_file, overrides), world_size, directory, on_cpu) as ranks:
        finish(ranks, directory)


def _train_until_killed(run_file: Path, overrides: Sequence[str], world_size: int, directory: Path, step: int) -> int:
    """SIGKILL all ranks at a random time after `step` steps and a checkpoint; return the last recorded step."""
    deadline = time.monotonic() + PROCESS_SECONDS
    with started(_training(run_file, overrides), world_size, directory) as ranks:
        while not (trace := _trace(directory)) or trace[-1]["step"] < step or not _has_saved(directory):
            if any(rank.poll() is not None for rank in ranks) or time.monotonic() > deadline:
                finish(ranks, directory)
                raise UserError(f"a check's training run ended before step {step}")
            time.sleep(0.002)
        time.sleep(random.uniform(0, trace[-1]["step_seconds"]))
    return _trace(directory)[-1]["step"]


def _training(run_file: Path, overrides: Sequence[str]) -> list[str]:
    """What Python runs on a rank."""
    return ["-m", "bigmodel", "train", str(run_file), *(word for one in overrides for word in ("--set", one))]


@contextmanager
def started(
    arguments: Sequence[str], world_size: int, directory: Path, on_cpu: bool = False
) -> Iterator[list[subprocess.Popen]]:
    """One process of Python per rank, in one process group; output goes into `directory`. Those left at the end are
    killed."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *arguments]
    port = _free_port()
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(world_size):
            output = open(directory / f"rank-{rank}.txt", "ab")  # noqa: SIM115 - the child owns it
            variables, group = _variables(rank, world_size, port, on_cpu), ranks[0].pid if ranks else 0
            with undisturbed():
                ranks.append(
                    subprocess.Popen(
                        command, env=variables, stdout=output, stderr=subprocess.STDOUT, process_group=group
                    )
                )
        yield ranks
    finally:
        _kill(ranks)


def _variables(rank: int, world_size: int, port: int, on_cpu: bool) -> dict[str, str]:
    """The environment of a rank."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **ARRANGED,
    }
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def finish(ranks: Sequence[subprocess.Popen], directory: Path) -> None:
    """Wait for all ranks. Raises `UserError` with the last output of a failed rank: of the first, if it has ended."""
    for number, rank in sorted(enumerate(ranks), key=lambda one: not one[1].poll()):
        if rank.wait(timeout=PROCESS_SECONDS):
            words = (directory / f"rank-{number}.txt").read_text(errors="replace").splitlines()[-15:]
            raise UserError(
                f"rank {number} of a check's training run failed with code {rank.returncode}:\n" + "\n".join(words)
            )


def _kill(ranks: Sequence[subprocess.Popen]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGKILL)
        rank.wait()


def _trace(directory: Path) -> list[dict]:
    return [line for line in read_json_lines(directory / "metrics.jsonl") if line["kind"] == "step"]


def _has_saved(directory: Path) -> bool:
    return any(line["kind"] == "checkpoint" for line in read_json_lines(directory / "metrics.jsonl"))


def _learned(line: dict) -> tuple[float, ...]:
    """Values that must not differ; seconds may."""
    return tuple(line[name] for name in ("step", "loss", "gradient_norm", "learning_rate", "targets", "positions"))


def _file_hashes(directory: Path) -> dict[str, str]:
    newest = checkpoint.newest(directory / "checkpoints")
    assert newest, f"{directory} has no checkpoint"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.path.glob("*.safetensors")}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
