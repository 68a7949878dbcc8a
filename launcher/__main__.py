"""The launcher's command line: `python -m launcher local RUN.toml --ranks 2`.

Takes a run file, gives the exit code of the run. The run file is read here first, so that a mistake in it costs
milliseconds, not the start of every rank. Imports no torch.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bigmodel.config import Settings, UserError, load_settings
from bigmodel.rundir import EXIT_USER
from launcher import local
from launcher.topology import Topology, count_devices

application = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@application.callback()
def launcher() -> None:
    """Start the ranks of a training run and end them together."""


@application.command("local")
def local_command(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file")],
    ranks: Annotated[int, typer.Option(help="processes; 0: one per GPU, or one where there is none")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting; may be repeated")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="set checkpoints aside and start from step 0")] = False,
    new_plan: Annotated[bool, typer.Option("--new-plan", help="data changed: go on in a fresh order of it")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print each rank's environment and command")] = False,
) -> None:
    """Train on this machine. Ctrl-C saves and stops; the same command goes on from there."""
    try:
        options = [name for name, given in (("--fresh", fresh), ("--new-plan", new_plan)) if given]
        code = start_locally(run_file, ranks, overrides or [], dry_run, options)
    except UserError as error:
        print(error, file=sys.stderr)
        code = EXIT_USER
    raise typer.Exit(code)


def start_locally(run_file: Path, ranks: int, overrides: list[str], dry_run: bool, options: Sequence[str] = ()) -> int:
    """Read the run file, then run or (dry run) print one trainer per rank. Returns the exit code.

    `options` are the trainer's, passed on.

    Raises `UserError` for a run file or a number of ranks that cannot be used.
    """
    settings = load_settings(run_file, overrides)
    topology = Topology(1, _num_ranks(ranks), "127.0.0.1", local.free_port())
    command = [*trainer_command(run_file, overrides), *options]
    if dry_run:
        print("\n".join(describe(command, topology)))
        return 0
    return local.run(command, topology, _make_logs(settings))


def trainer_command(run_file: Path, overrides: list[str]) -> list[str]:
    """What every rank runs: the same interpreter as the launcher's."""
    settings = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "bigmodel", "train", str(run_file), *settings]


def describe(command: list[str], topology: Topology) -> list[str]:
    """One line per rank that a shell could run: the variables, then the command."""
    lines = []
    for rank in range(topology.world_size):
        variables = local.launch_environment(topology, rank)
        words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        lines.append(" ".join([*words, shlex.join(command)]))
    return lines


def _num_ranks(asked: int) -> int:
    if asked < 0:
        raise UserError(f"--ranks {asked}: at least 1 rank is needed; 0 means one per GPU")
    return asked or max(1, count_devices(os.listdir("/dev"), os.environ.get("CUDA_VISIBLE_DEVICES")))


def _make_logs(settings: Settings) -> Path:
    logs = settings.run.directory / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.directory = {settings.run.directory}: cannot make {logs}: {error.strerror}; "
            "name a folder you may write to, for example --set run.directory=/tmp/run"
        ) from None
    return logs


if __name__ == "__main__":
    application()
