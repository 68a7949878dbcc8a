"""`bigmodel sweep`: runs a ladder, fits a law, predicts the run file's loss.

In: a run file, widths, an output folder. Out:

    OUT/runs/RUNG/             run directories          OUT/runs/RUNG.log    output of `bigmodel launch local`
    OUT/runs/RUNG.json         a finished rung          OUT/sweep.json       rungs, law, prediction; after each rung
    OUT/sweep.png              losses over compute

Guarantees: a finished rung is not repeated, a stopped one resumes from its checkpoint, one that outlives a killed sweep
is waited for; rungs of other settings are refused; the prediction is written before the target is run. One sweep at a
time works on a folder. Imports no torch: the runs are processes of their own.
"""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bigmodel.config.secret_text import without_secrets_inside
from bigmodel.config.settings import Settings, UserError, load_settings, to_toml_table
from bigmodel.launcher.record import is_taken
from bigmodel.planning.context import vocabulary_of
from bigmodel.planning.scaling import law_of
from bigmodel.run_directory import EXIT_STOPPED, changes, lock, read_json, read_json_lines, write_json
from bigmodel.sizes import counted_noun, short_number
from bigmodel.sweep.interval import extrapolation
from bigmodel.sweep.ladder import Rung, ladder, target_of
from bigmodel.sweep.law import Fit, Run, fit, form_of
from bigmodel.sweep.picture import draw
from bigmodel.system_errors import remedy_for

SHARE = 0.9  # of the interval
NUMBERS = ("width", "num_layers", "steps", "rate", "parameters", "tokens")  # of a finished rung's file, beside its loss


@dataclass(frozen=True)
class Options:
    run_file: Path
    override: Sequence[str]
    widths: Sequence[int]
    ratios: Sequence[float]
    rates: Sequence[float]
    out: Path
    ranks: int
    only_print: bool
    with_target: bool
    fixed_depth: bool = False


def numbers_of(option: str, text: str, whole: bool = False) -> list[float]:
    """The numbers of an option; empty: none. Raises `UserError`."""
    numbers = []
    for one in text.split(",") if text else []:
        try:
            number = float(int(one) if whole else float(one))
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf or number in numbers:
            what = "whole numbers" if whole else "numbers"
            raise UserError(f"{option} {text}: must be different {what} above 0, separated by commas")
        numbers.append(number)
    return numbers


def sweep(options: Options) -> int:
    """The exit code: 0, or 3 after Ctrl-C or SIGTERM. Raises `UserError`."""
    settings = load_settings(options.run_file, list(options.override))
    found = next((one for one in (options.out, *options.out.parents) if one.exists()), Path())
    if not found.is_dir():  # of a dry run too: the next one will write
        raise UserError(f"--out {options.out}: {found} is a file; choose another folder")
    vocabulary = vocabulary_of(settings)
    target = target_of(settings, vocabulary)
    rungs = ladder(settings, vocabulary, options.widths, options.ratios, options.rates, options.fixed_depth)
    for rung in rungs:  # all settings are checked before anything runs
        load_settings(options.run_file, [*options.override, *rung.overrides])
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for remark in remarks(settings, rungs):
        console.print(remark)
    if options.only_print:
        show(console, rungs, target, {})
        return 0
    try:
        (options.out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if remedy_for(error):
            raise
        raise UserError(f"--out {options.out}: cannot be made: {error.strerror}; choose another folder") from None
    with open(options.out / "sweep.lock", "a") as held:
        lock(held, str(options.out), "another sweep works on it; wait, or choose another --out")
        table = climbed(options, rungs, target, console)
    if table is None:
        console.print("stopped; the same command goes on")
        return EXIT_STOPPED
    draw(table, options.out / "sweep.png")
    console.print(f"{options.out}: sweep.json, sweep.png")
    return 0


def climbed(options: Options, rungs: Sequence[Rung], target: Rung, console: Console) -> dict[str, Any] | None:
    """All runs that are asked for; the table of sweep.json. None: stopped."""
    results: dict[str, dict[str, Any]] = {}
    for number, rung in enumerate(rungs, 1):
        console.print(f"rung {number} of {len(rungs)}: {in_words(rung)}")
        found = finished(options, rung, rung.name)
        if found is None:
            return None
        if found["loss"] is None:
            console.print(f"{rung.name}: its validation loss is not finite; the law is without it")
        results[rung.name] = found
        table = written(options, rungs, target, results)
    show(console, rungs, target, table)
    if options.with_target:
        console.print(f"target: {in_words(target)}")
        found = finished(options, target, "target")
        if found is None:
            return None
        table = written(options, rungs, target, results | {"target": found})
        console.print(outcome(table))
    return table


def remarks(settings: Settings, rungs: Sequence[Rung]) -> list[str]:
    said = []
    if not settings.model.mup_base_width and len({rung.rate for rung in rungs}) == 1:
        said.append(
            "model.mup_base_width = 0: all widths have one learning rate, whose optimum falls with width; set it to "
            "the width at which the rate was found, or give --rates"
        )
    layers = settings.model.num_layers
    if layers > 1 and any(rung.num_layers == 1 for rung in rungs):
        said.append(
            f"rungs of 1 layer, target of {layers}: one layer cannot continue a repetition (Olsson et al. 2022), so "
            "that their losses lie on another curve; use --fixed-depth, or wider rungs"
        )
    if len(rungs) < 3:
        said.append(f"{counted_noun(len(rungs), 'rung')}: a law needs 3, and 4 to give an interval")
    return said


def in_words(rung: Rung) -> str:
    return (
        f"{rung.num_layers} layers of width {rung.width}, {short_number(rung.parameters)} parameters, "
        f"{short_number(rung.tokens)} tokens in {counted_noun(rung.steps, 'step')}, {rung.compute:.2e} FLOPs"
    )


# ---- one run


def finished(options: Options, rung: Rung, name: str) -> dict[str, Any] | None:
    """The result of a rung; trains it if it is not there. None: stopped. Raises `UserError`."""
    file, directory = options.out / "runs" / f"{name}.json", options.out / "runs" / name
    given = [*options.override, *rung.overrides, f"run.directory={json.dumps(str(directory))}"]
    settings = without_secrets_inside(to_toml_table(load_settings(options.run_file, given)))
    if file.exists():
        return recorded(file, directory, settings)
    began = time.monotonic()
    words = [sys.executable, "-m", "bigmodel", "launch", "local", str(options.run_file), "--ranks", str(options.ranks)]
    words += [word for override in given for word in ("--set", override)]
    log = options.out / "runs" / f"{name}.log"
    code = launched(words, log) if wait_for_rest(directory) else EXIT_STOPPED
    if code in (EXIT_STOPPED, -signal.SIGTERM):
        return None
    if code:
        raise UserError(f"{name}: `bigmodel launch local` ended with {code}: {last_line(log)} ({log})")
    result = asdict(rung) | result_of(directory) | {"seconds": round(time.monotonic() - began, 1)}
    write_json(file, result | {"settings": settings})
    return result


def recorded(file: Path, directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The result in a finished rung's file. Raises `UserError` where it is of other settings, or cannot be read."""
    done: Any = None
    with suppress(UserError):  # not JSON
        done = read_json(file)
    is_whole = isinstance(done, dict) and isinstance(done.get("settings"), dict)
    if not (
        is_whole and all(is_number(done.get(name)) for name in NUMBERS) and is_number(done.get("loss"), or_none=True)
    ):
        raise UserError(
            f"{file}: not a finished rung of this version's `bigmodel sweep`; delete it: the run in {directory} "
            "is not trained again"
        )
    for name, then, now in changes(done.pop("settings"), settings):
        if then is not None and now is not None:  # one of them is None where versions have other settings
            raise UserError(
                f"{file}: this rung was trained with {name} = {json.dumps(then)}, and now it is {json.dumps(now)}; "
                f"choose another --out, or delete the file and {directory}"
            )
    return dict(done)


def is_number(value: object, or_none: bool = False) -> bool:
    if value is None:
        return or_none
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def wait_for_rest(directory: Path) -> bool:
    """Wait for a run that outlived the sweep which began it. False: stopped by Ctrl-C or SIGTERM; the run goes on."""
    if not is_taken(directory):
        return True
    print(f"{directory}: a killed sweep has left this run alive; waiting for its end", flush=True)
    try:
        with interruptible():
            while is_taken(directory):
                time.sleep(1)
    except KeyboardInterrupt:
        print(f"{directory}: this run goes on; to stop it: bigmodel launch stop {directory}", flush=True)
        return False
    return True


def launched(words: Sequence[str], log: Path) -> int:
    """The exit code of a command with its output in `log`. Ctrl-C and SIGTERM reach it as one SIGTERM."""
    with open(log, "ab") as file, interruptible():
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return EXIT_STOPPED


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    for one in before:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("bigmodel: ")]
    return (ours or lines or ["no output"])[-1].removeprefix("bigmodel: ")


def result_of(directory: Path) -> dict[str, Any]:
    """loss: None if it is not finite. Raises `UserError` without a validation loss."""
    lines = list(read_json_lines(directory / "metrics.jsonl"))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if not evaluations:
        raise UserError(f"{directory}/metrics.jsonl: has no evaluation; a validation split is needed")
    loss = evaluations[-1]["nats_per_token"]
    return {"loss": loss if is_number(loss) else None}


# ---- the law


def written(
    options: Options, rungs: Sequence[Rung], target: Rung, results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Write sweep.json and give its table."""
    table: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["bigmodel", *sys.argv[1:]]),
        "rungs": [results[rung.name] for rung in rungs if rung.name in results],
        "target": asdict(target) | {"compute": target.compute},
    }
    runs = best_runs(table["rungs"])
    if form_of(runs):
        fitted = fit(runs)
        table |= fit_table(fitted, runs, target)
    if "target" in results:
        table["target"]["loss"] = results["target"]["loss"]
    write_json(options.out / "sweep.json", table)
    return table


def best_runs(rungs: Sequence[dict[str, Any]]) -> list[Run]:
    """Of rungs that differ in the learning rate only, the best."""
    best: dict[tuple[int, int], Run] = {}
    for rung in rungs:
        key = rung["width"], rung["steps"]
        if rung["loss"] is not None and (key not in best or rung["loss"] < best[key].loss):
            best[key] = Run(rung["parameters"], rung["tokens"], rung["loss"])
    return list(best.values())


def fit_table(fitted: Fit, runs: Sequence[Run], target: Rung) -> dict[str, Any]:
    found = extrapolation(runs, fitted, target.parameters, target.tokens, SHARE)
    return {
        "law": fitted.law.as_table(),
        "residual_deviation": None if math.isnan(fitted.deviation) else fitted.deviation,
        "degrees_of_freedom": fitted.degrees,
        "prediction": {
            "loss": fitted.law.loss(target.parameters, target.tokens),
            "interval": found and found.interval,
            "share": SHARE,
            "median": found and found.median,
            "forms": found.forms if found else {},
            "times_largest_compute": target.compute / max(6 * run.parameters * run.tokens for run in runs),
        },
    }


def show(console: Console, rungs: Sequence[Rung], target: Rung, table: dict[str, Any]) -> None:
    """The ladder, with losses as far as there are any, and the law in words."""
    losses = {(one["width"], one["steps"], one["rate"]): one["loss"] for one in table.get("rungs", [])}
    rows = Table(box=SIMPLE)
    for name in ("layers", "width", "parameters", "tokens", "steps", "rate", "FLOPs", "validation loss"):
        rows.add_column(name, justify="right")
    for rung in [*rungs, target]:
        loss = losses.get((rung.width, rung.steps, rung.rate))
        last = "target" if rung is target else "" if loss is None else f"{loss:.4f}"
        sizes = (short_number(rung.parameters), short_number(rung.tokens), f"{rung.steps:,}", f"{rung.rate:g}")
        rows.add_row(str(rung.num_layers), str(rung.width), *sizes, f"{rung.compute:.2e}", last)
    console.print(rows)
    total = sum(rung.compute for rung in rungs)
    console.print(f"the rungs take {total:.2e} FLOPs, {total / target.compute:.1%} of the target's")
    if "law" in table:
        console.print(prediction(table))
    elif table:
        console.print("no law: it needs 3 finished sizes, with several numbers of tokens per parameter 5")


def prediction(table: dict[str, Any]) -> str:
    found = table["prediction"]
    times = f"{found['times_largest_compute']:.3g} times the compute of the largest rung"
    said = f"{law_of(table['law']).in_words()}\ntarget, {times}: {found['loss']:.4f} nats per label"
    if found["interval"]:
        low, high = found["interval"]
        forms = "; ".join(f"{name} {loss:.4f} +- {error:.4f}" for name, (_, loss, error) in found["forms"].items())
        return (
            f"{said}, {found['share']:.0%} between {low:.4f} and {high:.4f}\n"
            f"by form, with its error where small rungs predict larger ones: {forms}"
        )
    return f"{said}; no interval: the law has as many numbers as there are runs"


def outcome(table: dict[str, Any]) -> str:
    """The measured loss of the target beside its prediction."""
    loss, found = table["target"]["loss"], table.get("prediction")
    if found is None:
        return f"target: {loss:.4f} nats per label"
    said = f"target: {loss:.4f} nats per label, predicted {found['loss']:.4f} ({loss - found['loss']:+.4f})"
    if found["interval"]:
        low, high = found["interval"]
        said += f", {'inside' if low <= loss <= high else 'outside'} {low:.4f} to {high:.4f}"
    return said
