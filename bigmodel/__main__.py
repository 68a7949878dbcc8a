"""The command line: `bigmodel COMMAND`, or `python -m bigmodel COMMAND`. Each command imports only what it needs.

`bigmodel launch` is the launcher's own command line (launcher/__main__.py). Help and shell completion take 0.2 s: they
import neither the settings nor the launcher.

Exit codes (bigmodel/run_directory.py): 0 done, 1 a bug or the machine, 2 something you can mend (the message says
what), 3 stopped by a signal and saved.
"""

if __name__ == "__main__":  # before all else: `python3 -m bigmodel` may be any Python
    from bigmodel.interpreter import require_interpreter

    require_interpreter()

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bigmodel.config.user_error import UserError
from bigmodel.interpreter import end_without, is_dependency
from bigmodel.rank_log import keep_log
from bigmodel.run_directory import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, log_name, make_logs

if TYPE_CHECKING:
    from bigmodel.config.settings import Settings

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Launch(TyperGroup):
    """The launcher's commands, imported when one of them is wanted."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_launch_commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _launch_commands().get(cmd_name)


@cache
def _launch_commands() -> dict[str, Any]:
    from bigmodel.launcher.__main__ import application

    group = typer.main.get_command(application)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
show = typer.Typer(no_args_is_help=True, help="Draw things: data, a packed batch, a memory plan.")
app.add_typer(show, name="show")
launch = typer.Typer(
    cls=Launch, no_args_is_help=True, help="Start the ranks of a run anywhere, look after them, and end them together."
)
app.add_typer(launch, name="launch")

RunFile = Annotated[Path, typer.Argument(help="run file (TOML)", metavar="RUN.toml")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="override a setting: section.key=value", metavar="KEY=VALUE")
]


def load_settings(run_file: str | Path, overrides: list[str]) -> "Settings":
    """A run file and `--set` options; see `bigmodel.config.settings`. Raises `UserError`."""
    from bigmodel.config.settings import load_settings as load

    return load(run_file, overrides)


@app.callback()
def bigmodel(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1) -> None:
    """Pretrain language models: prepare text, train, check, look."""
    # The deepspeed launcher puts --local_rank before the command; LOCAL_RANK in the environment says the same.


@app.command()
def prepare(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006 - typer reads the default
    tokenizer: Annotated[
        str, typer.Option(metavar="train|PATH", help="train one, or a tokenizer.json or Hugging Face folder")
    ] = "",
    scheduler: Annotated[str, typer.Option(metavar="ADDRESS", help="a Dask scheduler whose workers do it")] = "",
) -> None:
    """Raw text to verified shards: corpus, tokenizer, MDS shards, manifest. Killed, it goes on where it stopped."""
    from bigmodel.data.prepare.pipeline import prepare as run

    given = {"tokenizer": tokenizer, "scheduler": scheduler}
    options = [f"prepare.{name}={json.dumps(value)}" for name, value in given.items() if value]
    with _stopped("finished units are kept"):
        run(load_settings(run_file, [*override, *options]))


@contextlib.contextmanager
def _stopped(kept: str) -> Iterator[None]:
    """Ctrl-C ends the command with one message: what is kept, and that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"bigmodel: stopped; {kept}, the same command goes on from them", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from None


@app.command()
def verify(
    location: Annotated[str, typer.Argument(help="prepared shards: a folder, its URL in a store, or a run file")],
    override: Overrides = [],  # noqa: B006
) -> None:
    """Check every byte and every number of prepared data against its manifest.

    With a run file that has data.remote, that folder in the store is checked, and those of its files that
    data.directory has.
    """
    from bigmodel.data.prepare.pipeline import live
    from bigmodel.data.prepare.verify import verify as run

    data = load_settings(location, override).data if location.endswith(".toml") else None
    places = [location] if data is None else [place for place in (data.remote, str(data.directory)) if place]
    partly = data is not None and bool(data.remote)
    with live() as progress:
        problems = [
            problem
            for number, place in enumerate(places)
            for problem in run(place, progress, partly=partly and number == 1)
        ]
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(
            f"{' and '.join(places)}: {len(problems)} problem(s); copy damaged or missing files anew (with "
            "data.remote set, delete them: they are fetched), delete those not in the manifest, or prepare again"
        )
    print(f"{' and '.join(places)}: every file is as its manifest says")


@app.command()
def adopt(
    folder: Annotated[str, typer.Argument(help="shards of mosaicml-streaming: a folder or URL with index.json")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer that made them: tokenizer.json or its folder")],
    into: Annotated[Path, typer.Option(help="prepared folder to make")],
    column: Annotated[str, typer.Option(help="column of token ids or of text; default: tokens, input_ids, text")] = "",
    dtype: Annotated[str, typer.Option(help="type of the ids where the column holds bytes, as int64")] = "",
    name: Annotated[str, typer.Option(help="name of the source")] = "adopted",
    validation: Annotated[str, typer.Option(help="folder of shards that are the validation split")] = "",
    validation_share: Annotated[float, typer.Option(help="else: share of documents, by hash, that are")] = 0.02,
) -> None:
    """Take in MDS shards that others wrote, of token ids or of text, as prepared data.

    A sample is one document. A begin or end token that a document lacks is added, and how often is said; a document
    with one of them in its middle is refused. Shards that are stored as ours are, are linked unchanged if --validation
    is given; others are written anew. Ids are never changed. Text is tokenized, as `prepare` does with a source of
    .mds files.
    """
    from bigmodel.data.prepare.adopt import Adoption
    from bigmodel.data.prepare.adopt import adopt as run
    from bigmodel.data.prepare.pipeline import live

    with _stopped("taken shards are kept"), live() as progress:
        run(Adoption(folder, into, tokenizer, column, dtype, name, validation, validation_share), progress)
    print(f"{into}: is prepared data; set data.directory to it")


@app.command()
def upload(run_file: RunFile, override: Overrides = []) -> None:  # noqa: B006
    """Copy the prepared folder, data.directory, into a store: to the URL data.remote. Killed, it goes on."""
    from bigmodel.data.prepare.pipeline import live
    from bigmodel.data.store.remote import upload as run

    data = load_settings(run_file, override).data
    if not data.remote:
        raise UserError(f"{run_file}: data.remote is not set; name where to, for example s3://bucket/folder")
    with _stopped("uploaded files are kept"), live() as progress:
        run(data.directory, data.remote, progress)
    print(f"{data.directory}: is at {data.remote}")


@app.command()
def train(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    fresh: Annotated[bool, typer.Option(help="set checkpoints aside and start from step 0")] = False,
    new_plan: Annotated[bool, typer.Option("--new-plan", help="data changed: go on in a fresh order of it")] = False,
) -> None:
    """Train, going on from the newest checkpoint. Also the program that launchers start once per rank."""
    settings = load_settings(run_file, override)
    if fresh and new_plan:
        raise UserError("--fresh starts from step 0 and --new-plan goes on from a checkpoint; give one of them")
    rank = os.environ.get("RANK", "")
    log = make_logs(settings.run.directory) / log_name(os.uname().nodename, int(rank) if rank.isdecimal() else 0)
    try:
        keep_log(log)
    except OSError as error:
        raise UserError(f"{log}: cannot be written: {error.strerror}; choose another run.directory") from None
    from bigmodel.training.loop import train as run

    raise typer.Exit(run(settings, fresh, new_plan))


@app.command()
def check(
    run_file: RunFile,
    guarantee: Annotated[str, typer.Argument(help="leak, order, loss, resume, accounting or all")] = "all",
    override: Overrides = [],  # noqa: B006
) -> None:
    """Prove a guarantee on your own settings and data."""
    from bigmodel.checks.guarantees import GUARANTEES, run_checks

    if guarantee != "all" and guarantee not in GUARANTEES:
        raise UserError(f"check {guarantee}: no such guarantee; choose one of {', '.join(GUARANTEES)} or all")
    failed = run_checks(run_file, override, list(GUARANTEES) if guarantee == "all" else [guarantee])
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def generate(
    run_directory: Annotated[Path, typer.Argument(help="a run directory with a checkpoint")],
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="longest continuation")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.8,
    top: Annotated[int, typer.Option(min=1, help="draw among the likeliest so many")] = 40,
    seed: Annotated[int, typer.Option(help="another seed, another text")] = 0,
) -> None:
    """Continue a text with the newest checkpoint of a run; an encoder-decoder answers it."""
    from bigmodel.evaluation.generate import answer, readable
    from bigmodel.evaluation.generate import generate as run
    from bigmodel.training.load_model import load_trained

    trained = load_trained(run_directory)
    kind = trained.settings.model.kind
    if kind == "encoder":
        raise UserError(f"{run_directory}: model.kind = {kind!r} fills gaps and does not write texts")
    if kind == "encoder_decoder":
        source = trained.tokenizer.encode(prompt).tolist()
        said = answer(trained.forward, trained.tokenizer, source, tokens, temperature, top, seed)
        print(readable(trained.tokenizer, said))
        return
    print(prompt + run(trained.forward, trained.tokenizer, prompt, tokens, temperature, top, seed))


@app.command()
def evaluate(run_directory: Annotated[Path, typer.Argument(help="a run directory with a checkpoint")]) -> None:
    """Score the newest checkpoint on the whole validation split."""
    from bigmodel.distributed.world import ALONE
    from bigmodel.evaluation.evaluate import Validation
    from bigmodel.training.load_model import load_trained

    trained = load_trained(run_directory)
    result = Validation(trained.settings.data, packs_per_micro_batch=1).run(trained.forward, ALONE)
    print(f"step {trained.step}: {result} over {result.num_labels} tokens")


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(help="a run directory")]) -> None:
    """Draw the loss of a run and where its time went, in the terminal and as loss.png and time.png."""
    from bigmodel.inspect.report import report as run

    run(run_directory)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="a run directory")],
    two: Annotated[Path, typer.Argument(help="another one")],
    png: Annotated[Path | None, typer.Option(help="also draw a picture, into this file")] = None,
) -> None:
    """Tell the first step at which two runs differ, and draw both curves. Exit code 1 where they differ."""
    from bigmodel.inspect.compare import compare as run

    if run(one, two, png):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def profile(
    run_directory: Annotated[Path, typer.Argument(help="the directory of a run that goes on")],
    kind: Annotated[str, typer.Argument(help="trace, memory or stacks")],
    ranks: Annotated[str, typer.Option(help="ranks, as 0,3-5; all")] = "0",
    steps: Annotated[int, typer.Option(min=1, help="recorded steps (trace and memory)")] = 3,
    seconds: Annotated[float, typer.Option(min=0.0, help="how long to wait for the files")] = 120.0,
) -> None:
    """Make ranks of a live run record profiler steps, their memory or their stacks, while it goes on."""
    from bigmodel.inspect.profile_command import profile as run

    run(run_directory, kind, ranks, steps, seconds)


@app.command()
def probe(
    run_file: Annotated[Path | None, typer.Argument(help="run file (TOML)", metavar="[RUN.toml]")] = None,
    override: Overrides = [],  # noqa: B006
    world_size: Annotated[int, typer.Option(help="only see whether the settings fit so many ranks")] = 0,
    line: Annotated[bool, typer.Option("--line", help="on one line, after the word PROBE")] = False,
) -> None:
    """Print what this machine offers, as JSON: devices, memory, versions; with a run file also data, disk and speed.

    `bigmodel launch check` runs it on every node and judges.
    """
    settings = load_settings(run_file, override) if run_file else None
    if settings and world_size:
        from bigmodel.config.deepspeed_config import resolve_deepspeed

        resolve_deepspeed(settings, world_size)
        return
    from bigmodel.inspect.probe import probe as run

    print(f"PROBE {json.dumps(run(settings))}" if line else json.dumps(run(settings), indent=1), flush=True)


@show.command("data")
def show_data(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    png: Annotated[Path | None, typer.Option(help="also draw the lengths as a picture, into this file")] = None,
) -> None:
    """Sources, lengths, mix and packing of the prepared data, and settings that would suit it better."""
    from bigmodel.inspect.show import show_data as run

    run(load_settings(run_file, override), png)


@show.command("batch")
def show_batch(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    step: Annotated[int, typer.Option(min=0, help="data step")] = 0,
    png: Annotated[Path | None, typer.Option(help="also draw a picture, into this file")] = None,
) -> None:
    """Draw the first pack of a step, its documents and attention masks, in the terminal; with --png also as a
    picture."""
    from bigmodel.inspect.show import show_batch as run

    run(load_settings(run_file, override), step, png)


@show.command("memory")
def show_memory(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    ranks: Annotated[int, typer.Option(min=1, help="how many ranks share the state")] = 8,
    gib: Annotated[float, typer.Option(min=0, help="memory of a device in GiB; 0: do not compare")] = 0,
    vocabulary: Annotated[int, typer.Option(min=0, help="tokens; 0: the prepared data's, or prepare.vocabulary")] = 0,
    png: Annotated[Path | None, typer.Option(help="also draw a picture, into this file")] = None,
) -> None:
    """Plan the memory of each rank at each ZeRO stage: needs neither data nor a GPU."""
    from bigmodel.inspect.memory import show_memory as run

    run(load_settings(run_file, override), ranks, gib, png, vocabulary)


@show.command("metrics")
def show_metrics() -> None:
    """Print the reference of all metrics, as Markdown."""
    from bigmodel.metrics.metric_table import reference

    print(reference(), end="")


def main() -> None:
    """Run a command; a `UserError` becomes one message and exit code 2. Typer does the same for a wrong option."""
    try:
        app()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        name = "bigmodel" if rank == "0" else f"bigmodel (rank {rank})"
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)
    except ModuleNotFoundError as error:
        if not is_dependency(error.name or ""):
            raise
        end_without(error.name or "")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = error.filename or "a file"
        print(f"bigmodel: {where}: {error.strerror}; free some space and run the same command", file=sys.stderr)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
