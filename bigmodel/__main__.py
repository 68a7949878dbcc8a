"""The command line: `bigmodel COMMAND`, or `python -m bigmodel COMMAND`. Each command imports only what it needs.

`bigmodel launch` is the launcher's command line (launcher/__main__.py). Help and shell completion take 0.2 s: they
import neither the settings nor the launcher.

Exit codes (bigmodel/run_directory.py): 0 done, 1 a bug or a machine failure, 2 a problem that you can fix (see the
message), 3 stopped by a signal and saved, 4 goes back to an older checkpoint, 5 a device is bad; 3 to 5: start again.
"""

if __name__ == "__main__":  # first, because `python3 -m bigmodel` may be any Python
    from bigmodel.interpreter import require_interpreter

    require_interpreter()

import contextlib
import faulthandler
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
from bigmodel.run_directory import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, Restart, log_name, make_logs
from bigmodel.system_errors import is_lost_peer, is_out_of_memory, line_of, remedy_for

if TYPE_CHECKING:
    from bigmodel.config.settings import Settings


class Launch(TyperGroup):
    """The launcher's commands, imported on first use."""

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
show = typer.Typer(no_args_is_help=True, help="Show the data, a packed batch, a memory plan or all metrics.")
app.add_typer(show, name="show")
launch = typer.Typer(
    cls=Launch, no_args_is_help=True, help="Start the ranks of a run anywhere, watch them, and end them together."
)
app.add_typer(launch, name="launch")

RunFile = Annotated[Path, typer.Argument(help="run file (TOML)", metavar="RUN.toml")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="override a setting: section.key=value", metavar="KEY=VALUE")
]

Best = Annotated[bool, typer.Option("--best", help="the checkpoint with the best evaluation: checkpoint.keep_best")]


def load_settings(run_file: str | Path, overrides: list[str]) -> "Settings":
    """`bigmodel.config.settings.load_settings`, imported on first use. Raises `UserError`."""
    from bigmodel.config.settings import load_settings as load

    return load(run_file, overrides)


@app.callback()
def bigmodel(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1) -> None:
    """Pretrain language models: prepare text, train, check, inspect."""
    # The deepspeed launcher puts --local_rank before the command; it equals LOCAL_RANK in the environment.


@app.command()
def prepare(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006 - typer reads the default
    tokenizer: Annotated[
        str,
        typer.Option(metavar="train|PATH", help="train a tokenizer, or use a tokenizer.json or Hugging Face folder"),
    ] = "",
    scheduler: Annotated[str, typer.Option(metavar="ADDRESS", help="use the workers of this Dask scheduler")] = "",
) -> None:
    """From text to verified shards: corpus, tokenizer, MDS shards, manifest. Resumes after a kill."""
    from bigmodel.data.prepare.pipeline import prepare as run

    given = {"tokenizer": tokenizer, "scheduler": scheduler}
    options = [f"prepare.{name}={json.dumps(value)}" for name, value in given.items() if value]
    with _stopped("finished work items are kept"):
        run(load_settings(run_file, [*override, *options]))


def _begin(what: str) -> None:
    """Say at once what begins, in a terminal: the imports alone take seconds."""
    if sys.stderr.isatty():
        print(f"bigmodel: {what}: loading libraries and data", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopped(kept: str) -> Iterator[None]:
    """End the command at Ctrl-C with a message: what is kept, and that the same command resumes."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"bigmodel: stopped; {kept}, the same command resumes from them", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from None


@app.command()
def verify(
    location: Annotated[str, typer.Argument(help="a prepared folder, its URL in a store, or a run file")],
    override: Overrides = [],  # noqa: B006
    retokenize: Annotated[
        bool, typer.Option("--retokenize", help="also compare the ids of some documents with the tokenizers library")
    ] = False,
    share: Annotated[
        float | None,
        typer.Option(help="with --retokenize: share of the documents; default 0.01", min=0, max=1, show_default=False),
    ] = None,
) -> None:
    """Check every byte and every number of prepared data against its manifest.

    A run file with data.remote: checks that folder in the store, and the files of it that data.directory has.
    """
    from bigmodel.data.prepare.pipeline import live
    from bigmodel.data.prepare.verify import verify as run

    if share is not None and not retokenize:
        raise UserError(f"--share {share}: has no effect without --retokenize; leave it out or give both")
    if share == 0:
        raise UserError("--share 0.0: compares no document; give a share above 0, or leave out --retokenize")
    data = load_settings(location, override).data if location.endswith(".toml") else None
    places = [location] if data is None else [place for place in (data.remote, str(data.directory)) if place]
    partly = data is not None and bool(data.remote)
    asked = (0.01 if share is None else share) if retokenize else 0.0
    with live() as progress:
        problems = [
            problem
            for number, place in enumerate(places)
            for problem in run(place, progress, partly=partly and number == 1, share=asked)
        ]
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(
            f"{' and '.join(places)}: {len(problems)} problem(s); copy damaged or missing files again (with "
            "data.remote set, delete them: they are fetched), delete files not in the manifest, or delete the folder "
            "and prepare again"
        )
    print(f"{' and '.join(places)}: every file agrees with the manifest")


@app.command()
def adopt(
    folder: Annotated[
        str,
        typer.Argument(
            help="shards of mosaicml-streaming: a folder or URL with index.json; or token files of Megatron-LM (.bin "
            "with .idx), nanoGPT, llm.c (.bin) or OLMo-core (.npy): a folder, file, pattern or URL"
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer that made the ids: tokenizer.json or its folder")],
    into: Annotated[Path, typer.Option(help="new prepared folder")],
    column: Annotated[str, typer.Option(help="column of token ids or of text; default: tokens, input_ids, text")] = "",
    dtype: Annotated[str, typer.Option(help="type of the ids where nothing states it, for example int64")] = "",
    name: Annotated[str, typer.Option(help="name of the source")] = "adopted",
    validation: Annotated[str, typer.Option(help="folder of shards, or token files, for the validation split")] = "",
    validation_share: Annotated[
        float, typer.Option(help="without --validation: share of documents, by hash, for validation")
    ] = 0.02,
) -> None:
    """Import MDS shards of others, of token ids or of text, or token files of other systems, as prepared data.

    A sample is one document; docs/data.md says what is one in token files. Missing begin and end tokens are added
    and counted; a document with one of them in its middle is an error. With --validation, shards in our own format
    are linked unchanged; others are rewritten. Ids are never changed. Text is tokenized, as `prepare` does with a
    source of .mds files. What differs from index.json is an error.
    """
    from bigmodel.data.prepare.adopt import Adoption
    from bigmodel.data.prepare.adopt import adopt as run
    from bigmodel.data.prepare.pipeline import live

    with _stopped("imported shards are kept"), live() as progress:
        run(Adoption(folder, into, tokenizer, column, dtype, name, validation, validation_share), progress)
    print(f"{into}: prepared; set data.directory to it")


@app.command()
def convert(
    directory: Annotated[Path, typer.Argument(help="a prepared folder")],
    out: Annotated[Path, typer.Argument(help="new folder for the files")],
    to: Annotated[str, typer.Option(help="megatron (.bin, .idx), nanogpt, llmc (.bin) or olmo (.npy, .csv.gz)")],
) -> None:
    """Write prepared data as token files of Megatron-LM, nanoGPT, llm.c or OLMo-core. Resumes after a kill."""
    from bigmodel.data.prepare.convert import convert as run
    from bigmodel.data.prepare.pipeline import live

    with _stopped("written shards are kept"), live() as progress:
        run(directory, out, to, progress)
    print(f"{out}: written")


@app.command()
def upload(run_file: RunFile, override: Overrides = []) -> None:  # noqa: B006
    """Copy the prepared folder (data.directory) to a store (the URL data.remote). Resumes after a kill."""
    from bigmodel.data.prepare.pipeline import live
    from bigmodel.data.store.remote import upload as run

    data = load_settings(run_file, override).data
    if not data.remote:
        raise UserError(
            f"{run_file}: data.remote is not set; set it to the destination, for example s3://bucket/folder"
        )
    with _stopped("uploaded files are kept"), live() as progress:
        run(data.directory, data.remote, progress)
    print(f"{data.directory}: copied to {data.remote}")


@app.command()
def plan(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    cluster: Annotated[
        Path | None, typer.Option(help="cluster file (TOML): nodes, GPUs and \\[hardware]", metavar="CLUSTER.toml")
    ] = None,
    ranks: Annotated[int, typer.Option(min=0, help="without --cluster: number of GPUs, 8 to a node; 0: 8")] = 0,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="tokens of the tokenizer; 0: of the prepared data or of prepare.tokenizer")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print all numbers as JSON, in SI units")] = False,
    png: Annotated[Path | None, typer.Option(help="also draw the plan to this file")] = None,
    search: Annotated[bool, typer.Option("--search", help="also list the fastest settings that fit")] = False,
    measured: Annotated[
        list[Path], typer.Option(help="run directory to calibrate the times with; repeatable", metavar="RUN")
    ] = [],  # noqa: B006
    law: Annotated[
        Path | None, typer.Option(help="sweep.json of `bigmodel sweep`: its law predicts the loss", metavar="FILE")
    ] = None,
) -> None:
    """Plan memory, time, failures, cost and data of a run. Needs neither data nor a GPU.

    Exit code 0: it fits the GPUs, 1: it does not, 2: a setting, file or option is wrong.
    """
    from bigmodel.planning.context import context_of
    from bigmodel.planning.plan_command import Output, cluster_of
    from bigmodel.planning.plan_command import plan as run

    context = context_of(load_settings(run_file, override), cluster_of(cluster, ranks), vocabulary)
    if not run(context, measured, law, Output(as_json, png, search)):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def train(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    fresh: Annotated[bool, typer.Option(help="move checkpoints aside and start from step 0")] = False,
    new_plan: Annotated[
        bool, typer.Option("--new-plan", help="after a change of the data: continue under a new plan")
    ] = False,
    standby: Annotated[int, typer.Option(hidden=True, help="descriptor of a launcher's orders")] = -1,
) -> None:
    """Train from the newest checkpoint on. Launchers start this command once per rank."""
    faulthandler.enable(2)  # from here on, because the import of torch or of a driver's library can crash, too
    if standby >= 0:
        from bigmodel.training.standby import become_rank

        become_rank(standby)
    settings = load_settings(run_file, override)
    if fresh and new_plan:
        raise UserError("--fresh starts from step 0 and --new-plan continues from a checkpoint; give only one of them")
    rank = os.environ.get("RANK", "")
    log = make_logs(settings.run.directory) / log_name(os.uname().nodename, int(rank) if rank.isdecimal() else 0)
    try:
        keep_log(log)
    except OSError as error:
        raise UserError(f"{log}: cannot be written: {error.strerror}; choose another run.directory") from None
    if not (fresh or new_plan or {"RANK", "WORLD_SIZE"} & os.environ.keys()):
        from bigmodel.finished_run import finished

        line = finished(settings, 1)
        if line:
            print(f"bigmodel: {line}")
            return
    from bigmodel.training.imports import frozen

    with frozen():
        from bigmodel.training.loop import train as run

    try:
        code = run(settings, fresh, new_plan)
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        _explain_memory(error, settings)
        code = EXIT_FAILED
    raise typer.Exit(code)


def _explain_memory(error: BaseException, settings: "Settings") -> None:
    import torch

    from bigmodel.inspect.out_of_memory import explain

    rank, ranks = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    print(f"{_name()}: {explain(error, settings, rank, ranks, device)}", file=sys.stderr, flush=True)


@app.command()
def check(
    run_file: RunFile,
    guarantee: Annotated[
        str, typer.Argument(help="leak, order, loss, resume, accounting, all of these; or exact")
    ] = "all",
    override: Overrides = [],  # noqa: B006
) -> None:
    """Check a guarantee on your own settings and data. exact: your DeepSpeed JSON against plain torch."""
    _begin(f"check {guarantee}")
    from bigmodel.checks.guarantees import CHECKS, GUARANTEES, run_checks

    if guarantee != "all" and guarantee not in CHECKS:
        raise UserError(f"check {guarantee}: no such guarantee; choose one of {', '.join(CHECKS)} or all")
    failed = run_checks(run_file, override, list(GUARANTEES) if guarantee == "all" else [guarantee])
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def generate(
    location: Annotated[
        Path, typer.Argument(help="run file, run directory or Hugging Face folder", metavar="RUN|FOLDER")
    ],
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="file of prompts, one a line (.jsonl: as JSON); -: standard input")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="most tokens to generate")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token")] = 0.8,
    top: Annotated[int, typer.Option(min=0, help="sample among this many most likely tokens; 0: all")] = 40,
    top_p: Annotated[float, typer.Option(help="sample among the likeliest tokens with this share of chances")] = 1.0,
    min_p: Annotated[float, typer.Option(help="least chance of a token, as a share of the likeliest one's")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1: used tokens become less likely")] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    stop: Annotated[list[str], typer.Option(help="text that ends the answer and is cut off; repeatable")] = [],  # noqa: B006
    beams: Annotated[int, typer.Option(min=0, help="beam search of this width, instead of sampling")] = 0,
    length_penalty: Annotated[float, typer.Option(help="beam scores are divided by length ** this")] = 1.0,
    answers: Annotated[int, typer.Option(min=1, help="print this many best answers of the beams, as JSON")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="prompts of a file at once")] = 8,
    context: Annotated[int, typer.Option(min=0, help="most tokens of prompt and answer; 0: the model's")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="print the text while it is generated")] = False,
    best: Best = False,
) -> None:
    """Continue prompts with the newest checkpoint of a run, or with a Hugging Face folder.

    An encoder-decoder reads a prompt as its source.
    """
    from bigmodel.generation.command import Options, print_answer, print_answers
    from bigmodel.generation.sampling import Sampling
    from bigmodel.generation.served import load_served

    if prompt and prompts:
        raise UserError("--prompt and --prompts: give only one of them")
    sampling = Sampling(temperature, top, top_p, min_p, repetition_penalty, seed)
    options = Options(tokens, sampling, tuple(stop), context, batch, beams, length_penalty, answers, stream)
    served = load_served(location, best=best)
    if prompts:
        print_answers(served, prompts, options)
    else:
        print_answer(served, prompt, options)


@app.command()
def evaluate(
    run_directory: Annotated[Path, typer.Argument(help="a run directory with a checkpoint")],
    tasks: Annotated[
        list[str], typer.Option(metavar="FOLDER|NAMES", help="tasks of lm_eval instead: a folder, a file, or names")
    ] = [],  # noqa: B006
    shots: Annotated[
        int | None, typer.Option(min=0, help="tasks: examples in each prompt; default: as the task says")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="tasks: documents of each task; 0: all")] = 0,
    contamination: Annotated[
        bool, typer.Option("--contamination", help="tasks: which of their documents are in the training data")
    ] = False,
    ngram: Annotated[int, typer.Option(min=1, help="--contamination: words in a row that count")] = 13,
    best: Best = False,
    output: Annotated[Path | None, typer.Option(help="also write all numbers to this JSON file")] = None,
    png: Annotated[
        Path | None, typer.Option(help="of a classification: also draw the confusion matrix into this file")
    ] = None,
) -> None:
    """Score the newest checkpoint on the whole validation split, or on tasks of EleutherAI's lm_eval."""
    from bigmodel.evaluation.command import TaskOptions
    from bigmodel.evaluation.command import evaluate as run

    if not tasks and (contamination or limit or shots is not None):
        raise UserError("--shots, --limit and --contamination have an effect only with --tasks; give tasks")
    run(run_directory, TaskOptions(tasks, shots, limit, ngram if contamination else 0), output, best, png)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories or run files", metavar="RUN...")],
    html: Annotated[
        Path | None, typer.Option(metavar="OUT.html", help="write one page with all plots of RUN...")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="serve this page, which renews itself, until Ctrl-C")] = False,
    host: Annotated[str, typer.Option(help="address of --serve; 0.0.0.0: all of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of --serve; 0: a free one")] = 0,
) -> None:
    """Draw the loss of a run and its time by cause, in the terminal and as loss.png and time.png; or a page of runs."""
    from bigmodel.launcher.record import run_directory

    if html and serve:
        raise UserError("--html and --serve: one of them writes the page, the other serves it; give one")
    run_directories = [run_directory(one) if one.suffix == ".toml" else one for one in runs]
    if html:
        from bigmodel.inspect.page.page import write_page

        print(f"page: {write_page(run_directories, html)}")
    elif serve:
        from bigmodel.inspect.page.serve import serve as serve_page

        serve_page(run_directories, host, port)
    else:
        from bigmodel.inspect.report import report as run

        if len(run_directories) > 1:
            raise UserError(f"{len(run_directories)} runs without --html or --serve; give one, or write a page of all")
        run(run_directories[0])


@app.command()
def seen(
    run_directory: Annotated[Path, typer.Argument(help="a run directory", metavar="RUN")],
    text: Annotated[str | None, typer.Option(help="the documents with this text, and the steps with them")] = None,
    document: Annotated[
        str, typer.Option(metavar="SOURCE:ID", help="the steps with a document; ID: FILE:ROW too")
    ] = "",
    step: Annotated[int | None, typer.Option(help="the documents of a step, from 1")] = None,
    export: Annotated[Path | None, typer.Option(help="all of it as Parquet", metavar="OUT.parquet")] = None,
    digest: Annotated[bool, typer.Option("--digest", help="write RUN/order_digests.jsonl, for audits")] = False,
    verify: Annotated[
        Path | None, typer.Option(metavar="DIGESTS", help="compare such a file; exit code 1 if it differs")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="a prepared folder of the run that lies elsewhere now")
    ] = None,
) -> None:
    """What the model was trained on: which documents, at which steps, with which tokens."""
    from bigmodel.provenance import seen as run
    from bigmodel.provenance.trained import Run

    if sum(bool(one) for one in (text is not None, document, step is not None, export, digest, verify)) != 1:
        raise UserError("give one of --text, --document, --step, --export, --digest and --verify")
    opened = Run.open(run_directory, data or [])
    holds = True
    if text is not None:
        holds = run.show_text(opened, text, print)
    elif document:
        run.show_document(opened, document, print)
    elif step is not None:
        run.show_step(opened, step, print)
    elif export:
        run.write(opened, export, print)
    elif verify:
        holds = run.sign_off(opened, verify, print)
    else:
        run.sign(opened, print)
    if not holds:
        raise typer.Exit(EXIT_FAILED)


@app.command()
@app.command("blame", hidden=True)
def replay(
    run_directory: Annotated[Path, typer.Argument(help="a run directory, also one in use")],
    step: Annotated[int, typer.Option(help="the step, as in metrics.jsonl: from 1")],
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="begin from the checkpoint of this step; 0: the initial weights")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for replay.json, all numbers, and replay.png")] = None,
    exclude: Annotated[Path | None, typer.Option(help="write the worst documents here, for data.exclude")] = None,
    count: Annotated[int, typer.Option(min=1, help="documents of --exclude")] = 1,
) -> None:
    """Compute a step again: gradient norm, loss and largest activation by document, source and layer. Also: blame.

    On any number of ranks, under a launcher or alone. The run directory is only read.
    """
    from bigmodel.inspect.replay import replay as run
    from bigmodel.inspect.replay_text import Outputs

    run(run_directory, step, checkpoint, Outputs(out, exclude, count))


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="a run directory")],
    two: Annotated[Path, typer.Argument(help="another one")],
    png: Annotated[Path | None, typer.Option(help="also write a picture to this file")] = None,
) -> None:
    """Print the first step at which two runs differ, and draw both curves. Exit code 1 if they differ."""
    from bigmodel.inspect.compare import compare as run

    if run(one, two, png):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def watch(
    runs: Annotated[list[Path], typer.Argument(help="run directories or run files", metavar="RUN...")],
) -> None:
    """Watch runs in the terminal: loss, rates, time left, goodput, ranks, checkpoints, events. Ends at q.

    The run directories are only read. Of several names, those of something else are left out, so that runs/* may be
    given. Where there is no terminal, it prints one frame.
    """
    from bigmodel.inspect.watch import watch as run
    from bigmodel.inspect.watched_run import without_others
    from bigmodel.launcher.record import run_directory
    from bigmodel.launcher.watch import status

    run([run_directory(one) for one in without_others(runs)], status)


@app.command()
def profile(
    run_directory: Annotated[Path, typer.Argument(help="the directory of a running run")],
    kind: Annotated[str, typer.Argument(help="trace, memory or stacks")],
    ranks: Annotated[str, typer.Option(help="ranks, for example 0,3-5, or all")] = "0",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="recorded steps (trace and memory)")] = 3,
    seconds: Annotated[float, typer.Option(min=0.0, help="longest wait for the files")] = 120.0,
) -> None:
    """Record a profiler trace, the memory or the stacks of ranks of a running run, without stopping it."""
    from bigmodel.inspect.profile_command import profile as run

    run(run_directory, kind, ranks, steps, seconds)


@app.command()
def probe(
    run_file: Annotated[Path | None, typer.Argument(help="run file (TOML)", metavar="[RUN.toml]")] = None,
    override: Overrides = [],  # noqa: B006
    world_size: Annotated[int, typer.Option(help="only check whether the settings fit this number of ranks")] = 0,
    ranks_per_node: Annotated[int, typer.Option(help="with --world-size: ranks on each node; 0: all on one")] = 0,
    line: Annotated[bool, typer.Option("--line", help="on one line, after the word PROBE")] = False,
) -> None:
    """Print devices, memory and versions of this machine as JSON; with a run file also data, disk and speed.

    `bigmodel launch check` runs it on every node and compares the reports.
    """
    settings = load_settings(run_file, override) if run_file else None
    if settings and world_size:
        from bigmodel.config.deepspeed_config import resolve_deepspeed
        from bigmodel.config.parallel_settings import refuse_across_nodes
        from bigmodel.planning.context import manifest_of, vocabulary_of

        resolve_deepspeed(settings, world_size)
        refuse_across_nodes(settings, ranks_per_node or world_size)
        if settings.training.tensor_parallel_ranks > 1 and manifest_of(settings):
            vocabulary_of(settings)
        return
    from bigmodel.inspect.probe import probe as run

    print(f"PROBE {json.dumps(run(settings))}" if line else json.dumps(run(settings), indent=1), flush=True)


@show.command("data")
def show_data(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    png: Annotated[Path | None, typer.Option(help="also write a picture of the lengths to this file")] = None,
) -> None:
    """Show sources, lengths, mix and packing of the prepared data, and suggest better settings."""
    _begin("show data")
    from bigmodel.inspect.show import show_data as run

    run(load_settings(run_file, override), png)


@app.command()
def export(
    run_directory: Annotated[Path, typer.Argument(help="run directory of a training run", metavar="RUN")],
    folder: Annotated[Path, typer.Argument(help="folder to write", metavar="FOLDER")],
    kind: Annotated[
        str, typer.Option("--as", metavar="TYPE", help="model_type, as llama; default: the first that holds the model")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    max_gib: Annotated[
        float | None, typer.Option(min=0, help="largest file of weights, in GiB; default: 5", show_default=False)
    ] = None,
    best: Best = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help=r"only the adapters of \[lora], as peft loads them")
    ] = False,
    quantize: Annotated[
        str, typer.Option(metavar="FORM", help="int8 (compressed-tensors) or q8_0 (GGUF, for llama.cpp): 8-bit weights")
    ] = "",
    evaluate: Annotated[bool, typer.Option(help="--quantize: measure the validation loss before and after")] = True,
) -> None:
    """Write the newest checkpoint as a Hugging Face folder, which transformers loads; adapters are merged."""
    if adapter and quantize:
        raise UserError(f"--adapter with --quantize {quantize}: adapters are not quantized; give only one of them")
    if not (quantize or evaluate):
        raise UserError("--no-evaluate has an effect only with --quantize; leave it out")
    if adapter:
        from bigmodel.exchange.export import export_adapter_of

        print(export_adapter_of(run_directory, folder, dtype, best, kind, max_gib))
        return
    from bigmodel.exchange.export import export as run

    largest = int((5 if max_gib is None else max_gib) * 2**30)
    done = run(run_directory, folder, kind, dtype, largest, best, quantize, evaluate)
    print(f"{done.folder}: {done.class_name} of step {done.step}")
    for remark in done.remarks:
        print(f"  {remark}")


@app.command()
def average(
    runs: Annotated[list[Path], typer.Argument(help="run directories with checkpoints", metavar="RUN...")],
    folder: Annotated[Path, typer.Argument(help="run directory to write", metavar="FOLDER")],
    last: Annotated[
        int, typer.Option(min=0, help="newest checkpoints of each run; 0: all of one run, one of each of several")
    ] = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="only checkpoints that do not raise the validation loss")
    ] = False,
    sequences: Annotated[int, typer.Option(min=0, help="--greedy: packed sequences of an evaluation; 0: all")] = 0,
    updates: Annotated[
        bool, typer.Option("--updates", help="the average over the updates of one run, which training.ema_decay keeps")
    ] = False,
) -> None:
    """Average the weights of checkpoints (model soups) into a run directory for evaluate, generate, export."""
    from bigmodel.evaluation.average import average as run
    from bigmodel.sizes import counted_noun

    if sequences and not greedy:
        raise UserError("--sequences: has an effect only with --greedy; give --greedy")
    names = run(runs, folder, last, greedy, sequences, updates=updates)
    if updates:
        print(f"{folder}: the average over the updates of {names[0]}")
        return
    print(f"{folder}: the mean of {counted_noun(len(names), 'checkpoint')}: {'; '.join(names)}")


@app.command()
def sweep(
    run_file: RunFile,
    widths: Annotated[str, typer.Option(metavar="W,W,...", help="hidden sizes of the small runs")],
    override: Overrides = [],  # noqa: B006
    tokens_per_parameter: Annotated[
        str, typer.Option(metavar="R,...", help="tokens per parameter; default: those of the run file")
    ] = "",
    rates: Annotated[str, typer.Option(metavar="RATE,...", help="learning rates; default: that of the run file")] = "",
    fixed_depth: Annotated[
        bool, typer.Option("--fixed-depth", help="all runs have the layers of the run file; default: in proportion")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of the runs and the result")] = Path("runs/sweep"),
    ranks: Annotated[int, typer.Option(min=1, help="ranks of each run")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the ladder and its compute, run nothing")] = False,
    target: Annotated[
        bool, typer.Option("--target", help="run the run file itself, too, after the prediction")
    ] = False,
) -> None:
    """Train a ladder of small runs, fit a scaling law, and predict the loss of the run file. Resumes after a kill."""
    from bigmodel.sweep.command import Options, numbers_of
    from bigmodel.sweep.command import sweep as run

    sizes = [int(one) for one in numbers_of("--widths", widths, whole=True)]
    ratios, tried = numbers_of("--tokens-per-parameter", tokens_per_parameter), numbers_of("--rates", rates)
    code = run(Options(run_file, override, sizes, ratios, tried, out, ranks, dry_run, target, fixed_depth))
    if code:
        raise typer.Exit(code)


@app.command("import")
def import_folder(
    folder: Annotated[Path, typer.Argument(help="folder of a Hugging Face model", metavar="FOLDER")],
    run_file: Annotated[Path, typer.Argument(help="run file to write", metavar="RUN.toml")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="another tokenizer than the folder's; new tokens get new rows")
    ] = None,
) -> None:
    """Check a Hugging Face folder and write a run file that continues its training."""
    from bigmodel.exchange.run_file import write_run_file

    print(f"{folder}: {write_run_file(folder, run_file, tokenizer)}")
    print(f"{run_file}: written; next: bigmodel prepare {run_file}")


@app.command()
def serve(
    location: Annotated[
        Path, typer.Argument(help="run file, run directory or Hugging Face folder", metavar="RUN|FOLDER")
    ],
    override: Overrides = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="address; another one than this machine's own needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    name: Annotated[str, typer.Option(help="name of the model in requests; default: that of the folder")] = "",
    max_sequences: Annotated[int, typer.Option(min=1, help="sequences that run at once")] = 8,
    max_positions: Annotated[int, typer.Option(min=0, help="tokens of a sequence; 0: the model's context")] = 0,
    max_queue: Annotated[int, typer.Option(min=0, help="sequences that wait; more are answered with 429")] = 64,
    max_tokens: Annotated[int, typer.Option(min=0, help="most tokens to generate for a request; 0: the context")] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="largest body of a request, in bytes")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="longest time of a request, in seconds")] = 600.0,
    grace: Annotated[float, typer.Option(min=0.0, help="seconds to finish requests after SIGTERM or Ctrl-C")] = 30.0,
) -> None:
    """Serve a model over HTTP, in the shapes of OpenAI's completions and chat completions.

    BIGMODEL_SERVE_TOKEN in the environment: the bearer token that requests must have.
    """
    from bigmodel.serving.options import Options, require_packages

    require_packages()
    from bigmodel.serving.server import serve as run

    limits = max_sequences, max_positions, max_queue, max_tokens, max_body
    run(location, override, Options(host, port, name, *limits, timeout, grace))


@show.command("batch")
def show_batch(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    step: Annotated[int, typer.Option(min=0, help="data step")] = 0,
    png: Annotated[Path | None, typer.Option(help="also write a picture to this file")] = None,
) -> None:
    """Draw the first packed sequence of a step, its documents, their texts and attention masks, in the terminal; with
    --png also as a picture."""
    _begin("show batch")
    from bigmodel.inspect.show import show_batch as run

    run(load_settings(run_file, override), step, png)


@show.command("memory")
def show_memory(
    run_file: RunFile,
    override: Overrides = [],  # noqa: B006
    ranks: Annotated[int, typer.Option(min=1, help="number of ranks that share the state")] = 8,
    gib: Annotated[float, typer.Option(min=0, help="memory of a device in GiB; 0: do not compare")] = 0,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="tokens; 0: of the prepared data, else prepare.vocabulary")
    ] = 0,
    png: Annotated[Path | None, typer.Option(help="also write a picture to this file")] = None,
) -> None:
    """Plan the memory of each rank at each ZeRO stage. Needs neither data nor a GPU."""
    from bigmodel.planning.show_memory import show_memory as run

    run(load_settings(run_file, override), ranks, gib, png, vocabulary)


@show.command("metrics")
def show_metrics() -> None:
    """Print the reference of all metrics, as Markdown."""
    from bigmodel.metrics.metric_table import reference

    print(reference(), end="")


def main() -> None:
    """Run a command. A `UserError` becomes a message and its exit code: 2, as Typer's for a wrong option, or 1."""
    try:
        app()
    except (UserError, Restart) as error:
        print(f"{_name()}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if not is_dependency(error.name or ""):
            raise
        end_without(error.name or "")
    except (OSError, MemoryError, RuntimeError) as error:
        failed = is_out_of_memory(error) or is_lost_peer(error)
        if not failed and not remedy_for(error):
            raise
        print(f"{_name()}: {line_of(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED if failed else EXIT_USER)


def _name() -> str:
    """Of this program in its messages."""
    rank = os.environ.get("RANK", "0")
    return "bigmodel" if rank == "0" else f"bigmodel (rank {rank})"


if __name__ == "__main__":
    main()
