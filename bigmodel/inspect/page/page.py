"""`bigmodel report RUN [RUN ...] --html OUT`: one HTML file with everything in it, which needs no network.

In: run directories. Out: the page, under 1.5 MB for runs of any length. Guarantees: numbers are those of metrics.jsonl
(`drawing`); what comes from a run (names, settings, samples) is data in JSON and never HTML, and the page's policy lets
no other script run than its own, by hash. The plots are drawn by uPlot (static/, MIT).
"""

import base64
import hashlib
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmodel import __version__, pictures
from bigmodel.config.settings import UserError
from bigmodel.inspect.page import tables
from bigmodel.inspect.page.drawing import HeatMap, Plot, Range, buckets_for
from bigmodel.inspect.page.history import RunHistory
from bigmodel.inspect.page.plots import Runs, sections
from bigmodel.run_directory import write_atomically

STATIC = Path(__file__).parent / "static"
MOST_RUNS = 12


def write_page(directories: Sequence[Path], out: Path) -> Path:
    """Raises `UserError` if a directory is no run, has no step yet, or `out` cannot be written."""
    runs = [open_run(directory) for directory in directories]
    for run in runs:
        if not run.num_steps:
            raise UserError(
                f"{run.directory}: metrics.jsonl has no step yet; name a run directory whose training has begun"
            )
    try:
        write_atomically(out, page(content(runs)))
    except OSError as error:
        raise UserError(f"--html {out}: cannot be written: {error.strerror}; choose another file") from None
    return out


def open_run(directory: Path, waits: bool = False) -> RunHistory:
    """Read what is there so far. Raises `UserError` if there is no such folder; `waits`: it may come later."""
    if not Path(directory).is_dir() and (not waits or Path(directory).exists()):
        raise UserError(f"{directory}: no such folder; give the run.directory of a training run")
    run = RunHistory(directory)
    run.update()
    return run


def page(data: dict[str, Any], live_seconds: float = 0.0) -> str:
    """`live_seconds`: the page asks for new data this often; 0: never."""
    style = (STATIC / "uplot.css").read_text() + (STATIC / "page.css").read_text() + _colours()
    scripts = [(STATIC / name).read_text() for name in ("uplot.js", "page.js")]
    data = {**data, "live_seconds": live_seconds}
    own = " ".join(f"'{_hash(script)}'" for script in scripts)
    source = "'self'" if live_seconds else "'none'"
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src {own}; connect-src {source}"
    )
    parts = {
        "TITLE": html.escape(data["title"]),
        "POLICY": policy,
        "STYLE": style,
        "DATA": as_json(data),
        "UPLOT": scripts[0],
        "SCRIPT": scripts[1],
    }
    template = (STATIC / "page.html").read_text()
    pieces = template.split("%%")  # text, name, text, name, ..., text: no value is searched for names
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def content(runs: Runs, near: Range | None = None) -> dict[str, Any]:
    """What the page shows, as plain values; lines have more points at the steps of `near`."""
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs on one page; give at most {MOST_RUNS}")
    _distinguish(runs)
    drawn = sections([run for run in runs if run.num_steps])
    plots = [plot for some in drawn.values() for plot in some]
    buckets = buckets_for(sum(len(plot.lines) for plot in plots if isinstance(plot, Plot)))
    names = [(run, f" of {run.name}" if len(runs) > 1 else "") for run in runs]
    more: dict[str, list[Any]] = {
        "Overview": [tables.in_numbers(runs)],
        "Goodput": [tables.causes(run, of) for run, of in names],
        "Worst steps": [tables.worst_steps(run, of) for run, of in names],
        "Samples": [text for run, of in names if (text := tables.sample(run, of))],
        "Configuration": [*(tables.changes_between_starts(run, of) for run, of in names), tables.settings(runs)],
        "Events": [tables.events(run, of) for run, of in names],
    }
    titles = ["Overview", *drawn, "Worst steps", "Samples", "Configuration", "Events"]
    blocks = {title: [*_encoded(drawn.get(title, []), buckets, near), *more.get(title, [])] for title in titles}
    return {
        "title": "bigmodel: " + ", ".join(run.name for run in runs),
        "runs": [run.name for run in runs],
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "version": __version__,
        "dark": pictures.DARK,
        "heat": pictures.HEAT,
        "sections": [{"title": title, "blocks": found} for title, found in blocks.items() if found],
    }


def as_json(data: dict[str, Any]) -> str:
    """JSON that can lie in a script element: no character of it begins a tag or ends a line of a script."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _encoded(plots: Sequence[Plot | HeatMap], buckets: int, near: Range | None) -> list[dict[str, Any]]:
    return [plot.encoded(buckets, near) for plot in plots]


def _distinguish(runs: Runs) -> None:
    """Runs of one name get their place among the runs behind it."""
    names = [run.directory.resolve().name for run in runs]
    for number, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        run.name = f"{name} ({number})" if names.count(name) > 1 else name


def _colours() -> str:
    return f":root {{ --curve: {pictures.BLUE}; }}\n"


def _hash(text: str) -> str:
    """As a content security policy has it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
