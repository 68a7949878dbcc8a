"""The tables of the page: the run in numbers, its worst steps, its settings and events.

In: histories, and the small files of the run directory; `bigmodel.run_directory` has masked their secrets. Out: plain
values for JSON, as text that the page never reads as HTML.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.inspect.braille import smooth
from bigmodel.inspect.page.drawing import Floats
from bigmodel.inspect.page.history import RunHistory
from bigmodel.inspect.page.planned_documents import planned_documents
from bigmodel.inspect.page.plots import Runs
from bigmodel.inspect.report import replay_command
from bigmodel.pictures import CAUSES
from bigmodel.printed import shell_word
from bigmodel.run_directory import AGAIN, flat, read_json, read_json_lines, recorded_changes
from bigmodel.sizes import byte_size, counted_noun

MOST_WORST, MOST_DOCUMENTS, MOST_EVENTS = 20, 8, 200
HIGHEST_NORMS = 5
MOST_TEXT = 20_000  # characters of a sample
MOST_VALUE = 300  # characters of a setting

Table = dict[str, Any]


def table(name: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], **more: Any) -> Table:
    return {"kind": "table", "name": name, "title": title, "columns": columns, "rows": list(rows), **more}


def in_numbers(runs: Runs) -> Table:
    """A row per number, a column per run."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    rows = [[name, *(of_run.get(name, "") for of_run in facts)] for name in names]
    return table("numbers", "In numbers", ["", *(run.name for run in runs)], rows, head=True)


def _facts(run: RunHistory) -> dict[str, str]:
    step, loss, seconds = run.column("step"), run.column("loss"), run.column("step_seconds")
    total, wall = float(np.nansum(seconds)), sum(run.seconds.values())
    start = run.starts()[-1] if run.starts() else {}
    evaluations = run.others.get("evaluation", [])
    facts = {
        "steps": f"{int(step[-1]):,}" if run.num_steps else "none yet",
        "training loss": f"{_last(np.array(smooth(loss.tolist()))):.4f} nats per label (smoothed)",
        "validation loss": f"{evaluations[-1]['nats_per_token']:.4f} nats per label" if evaluations else "",
        "labels trained": f"{np.nansum(run.column('targets')):,.0f}",
        "tokens per second": f"{np.nansum(run.column('positions')) / total:,.0f}" if total else "",
        "energy": _energy(run),
        "parameters": f"{start['parameters']:,}" if start.get("parameters") else "",
        "ranks": f"{start['world_size']:,}" if start else "",
        "wall time": _duration(wall),
        "goodput": f"{run.seconds['productive'] / wall:.1%}" if wall else "",
        "restarts": str(max(0, len(run.starts()) - 1)),
        "checkpoints": f"{len(run.others.get('checkpoint', []))}{_size_of_last(run)}",
        "last line": _moment(_last_moment(run)),
        "ended": _ending(run),
        "folder": str(run.directory),
    }
    return {name: value for name, value in facts.items() if value}


def _energy(run: RunHistory) -> str:
    """Of the parts that are known of every step."""
    parts = {"GPUs": run.column("device_joules"), "processors": run.column("host_joules")}
    joules = {part: float(values.sum()) for part, values in parts.items() if np.isfinite(values).all()}
    tokens = np.nansum(run.column("positions"))
    if not joules or not tokens:
        return ""
    total = sum(joules.values())
    return f"{total / tokens:.3g} joules per token, {total / 3.6e6:,.3g} kWh of {' and '.join(joules)}"


def causes(run: RunHistory, of: str) -> Table:
    """Seconds of the run by cause, the most first behind "productive"; with shares for bars."""
    spent = {cause: seconds for cause, seconds in run.seconds.items() if seconds > 0}
    whole = sum(spent.values()) or 1.0
    order = sorted(spent, key=lambda cause: (cause != "productive", -spent[cause]))
    rows = [[cause, _duration(spent[cause]), f"{spent[cause] / whole:.1%}"] for cause in order]
    bars = [{"label": cause, "colour": CAUSES[cause], "share": spent[cause] / whole} for cause in order]
    return table(f"causes{of}", f"All seconds by cause{of}", ["cause", "time", "share"], rows, bars=bars)


def worst_steps(run: RunHistory, of: str) -> Table:
    """Skipped and spiking steps by events.jsonl, steps that are not finite, and those of the largest gradient norms.

    The documents are those of the events, else planned again, where that is cheap; else there is the command that lists
    them, which may take minutes in a long run. `bigmodel replay` weighs them."""
    reasons: dict[int, list[str]] = {}
    documents: dict[int, list[Any]] = {}
    events = list(read_json_lines(run.directory / "events.jsonl"))
    for event in events:
        if event.get("event") in ("spike", "step_skipped") and isinstance(event.get("step"), int):
            words = event.get("detail") or event.get("reason", "")
            reasons.setdefault(event["step"], []).append(f"{event['event'].replace('_', ' ')}: {words}")
            documents.setdefault(event["step"], []).extend(event.get("documents") or ())
    numbers = {name: run.column(name) for name in ("step", "loss", "gradient_norm")}
    places = {int(step): place for place, step in enumerate(numbers["step"])}
    finite = np.isfinite(numbers["loss"] + numbers["gradient_norm"])
    for place in np.flatnonzero(~finite)[-MOST_WORST:]:
        reasons.setdefault(int(numbers["step"][place]), []).append("not finite")
    norms = np.where(finite, numbers["gradient_norm"], -np.inf)
    for place in np.argsort(-norms, kind="stable")[:HIGHEST_NORMS]:
        reasons.setdefault(int(numbers["step"][place]), ["one of the largest gradient norms"])

    def norm_of(step: int) -> float:
        norm = numbers["gradient_norm"][places[step]] if step in places else math.nan
        return float(norm) if math.isfinite(norm) else math.inf

    chosen = sorted(reasons, key=lambda step: -norm_of(step))[:MOST_WORST]
    told = {step: found for step, found in documents.items() if found}
    documents = planned_documents(run, [step for step in chosen if step not in told]) | told
    rows = [
        [
            f"{step:,}",
            *(_at(numbers[name], places.get(step)) for name in ("loss", "gradient_norm")),
            "; ".join(dict.fromkeys(reasons[step])),
            _documents(documents.get(step, []), f"bigmodel seen {shell_word(run.directory)} --step {step}"),
            replay_command(run.directory, step, events),
        ]
        for step in chosen
    ]
    columns = ["step", "loss", "gradient norm", "why", "documents", "explained by"]
    return table(f"worst{of}", f"Worst steps{of}", columns, rows, code=[5])


def _documents(found: Sequence[Any], command: str) -> str:
    """Chunks as SOURCE SHARD:ROW and their tokens, the last of which is a label only. command: lists all of them."""
    shown = [
        f"{source} {shard}:{row}, tokens {first} to {first + length}"
        for source, shard, row, first, length in found[:MOST_DOCUMENTS]
    ]
    more = len(found) - len(shown)
    return "; ".join([*shown, *([f"and {more} more: {command}"] if more else [])]) or command


def changes_between_starts(run: RunHistory, of: str) -> Table:
    rows = []
    for number, (moment, changed) in enumerate(recorded_changes(run.directory), 1):
        rows += [[f"{number}", _moment(moment), name, _value(old), _value(new)] for name, old, new in changed]
        if not changed:
            rows.append([f"{number}", _moment(moment), "none" if number > 1 else "the first start", "", ""])
    columns = ["start", "time", "changed", "from", "to"]
    return table(f"changes{of}", f"Changes between starts{of}", columns, rows)


def settings(runs: Runs) -> Table:
    """Settings and DeepSpeed JSON now in force, a column per run; those that differ come first."""
    values = [dict(_in_force(run.directory)) for run in runs]
    names = sorted({name for of_run in values for name in of_run})
    rows = [[name, *(_value(of_run[name]) if name in of_run else "" for of_run in values)] for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return table("settings", "Settings in force", ["setting", *(run.name for run in runs)], rows, folded=True)


def _in_force(directory: Path) -> Iterable[tuple[str, Any]]:
    for name, prefix in (("settings.json", ""), ("deepspeed.json", "deepspeed.")):
        try:
            found = read_json(directory / name)
        except (UserError, OSError):
            continue
        yield from flat(found, prefix)


def events(run: RunHistory, of: str) -> Table:
    found = list(read_json_lines(run.directory / "events.jsonl"))
    rows = []
    for event in found[-MOST_EVENTS:]:
        hidden = ("time", "event", "step", "documents")
        more = ", ".join(f"{name} {_value(value)}" for name, value in event.items() if name not in hidden)
        step = event.get("step")
        rows.append([_moment(event.get("time")), "" if step is None else str(step), str(event.get("event")), more])
    title = f"Events{of}" if len(found) <= MOST_EVENTS else f"Last {MOST_EVENTS} events{of} of {len(found):,}"
    return table(f"events{of}", title, ["time", "step", "event", "details"], reversed(rows), folded=True)


def sample(run: RunHistory, of: str) -> dict[str, Any] | None:
    """The text that the model wrote at the end of the run."""
    try:
        text = (run.directory / "sample.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return {"kind": "text", "name": f"sample{of}", "title": f"Written by the model{of}", "text": text[:MOST_TEXT]}


def _ending(run: RunHistory) -> str:
    """Of the last start: "finished", ...; "" while it goes on or was killed."""
    ends, starts = run.others.get("end", []), run.starts()
    again = Counter(
        event["event"].replace("_", " ")
        for event in read_json_lines(run.directory / "events.jsonl")
        if event.get("event") in AGAIN.values()
    )
    before = "".join(f"; before: {counted_noun(count, name)}" for name, count in again.items())
    return str(ends[-1]["ending"]) + before if ends and len(ends) and ends[-1]["time"] >= starts[-1]["time"] else ""


def _last_moment(run: RunHistory) -> float:
    """Unix time of the newest step, or of the end of the last start; NaN: none yet."""
    moments = [_last(run.column("time")), *(line["time"] for line in run.others.get("end", ())[-1:])]
    return max((moment for moment in moments if math.isfinite(moment)), default=math.nan)


def _size_of_last(run: RunHistory) -> str:
    saved = run.others.get("checkpoint", [])
    return f", the last {byte_size(saved[-1]['bytes'])} at step {saved[-1]['step']:,}" if saved else ""


def _last(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _at(values: Floats, place: int | None) -> str:
    return "" if place is None else f"{values[place]:.5g}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= MOST_VALUE else f"{text[:MOST_VALUE]} …"


def _moment(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) + " UTC"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"
