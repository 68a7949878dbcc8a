"""A frame of `bigmodel watch`: lines of text for a terminal of given width and height.

In: `WatchedRun`s. Out: rich's Text, a line each, none wider than the terminal. Text of a run's files comes from others:
control characters become U+FFFD, and nothing is read as markup.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from bigmodel.inspect.braille import braille, smooth
from bigmodel.inspect.watched_run import NEVER, WatchedRun
from bigmodel.metrics.run_accounting import of_experts
from bigmodel.printed import one_line
from bigmodel.sizes import byte_size, counted_noun, duration, short_number

GOOD, BAD, FAINT, LINE = "green", "bold red", "dim", "blue"
STATES = {"running": GOOD, "finished": GOOD, "starting": "yellow", "ending": "yellow", "restarting": "yellow"}
CALM = ("stopped", NEVER, "unknown")
LEAST_CURVE, MOST_CURVE = 4, 14  # lines
MOST_EVENTS = 5
LONG_STEP_SECONDS = 10.0  # the age of the last step is shown from here on
KEYS = "q quit"
EVENT_DETAILS = ("cause", "action", "fault", "detail", "reason", "error", "how")


def frame(runs: Sequence[WatchedRun], chosen: int, width: int, height: int, keys: bool) -> list[Text]:
    """At most `height` lines: with several runs a table, then the chosen run; keys: with a line of keys."""
    rows = _table(runs, chosen, width, max(3, height // 3)) if len(runs) > 1 else []
    foot = [Text(f"{KEYS}, arrows choose a run" if len(runs) > 1 else KEYS, style=FAINT)] if keys else []
    room = height - len(rows) - len(foot)
    lines = [*rows, *_run(runs[chosen], width, room)[:room]]
    lines += [Text("")] * (height - len(foot) - len(lines) if keys else 0)
    for line in (lines := [*lines, *foot]):
        line.truncate(width, overflow="ellipsis")
    return lines


def _table(runs: Sequence[WatchedRun], chosen: int, width: int, room: int) -> list[Text]:
    """A line per run, those around the chosen one if there are more than `room` - 2."""
    name_width = max(8, min(max(len(one_line(run.directory)) for run in runs), width - 66))
    heads = (
        f"  {'run':<{name_width}} {'state':<11} {'step':>15} {'loss':>7} {'tokens/s':>8} {'left':>10} {'goodput':>7}"
    )
    first = max(0, min(chosen - (room - 2) // 2, len(runs) - (room - 2)))
    lines = [Text(heads, style=FAINT)]
    for number, run in list(enumerate(runs))[first : first + room - 2]:
        name, state = one_line(run.directory), _state(run)
        name = _shortened(name, name_width)
        left = duration(run.seconds_left) if run.seconds_left and state == "running" else ""
        productive = _productive(run)
        line = Text(
            f"{'>' if number == chosen else ' '} {name:<{name_width}} ", style="bold" if number == chosen else ""
        )
        line.append(f"{state[:11]:<11} ", style=_style(state))
        line.append(f"{_steps(run):>15} {_loss(run):>7} {_rate(run):>8} ")
        line.append(f"{left:>10} {'' if productive is None else f'{productive:.1%}':>7}")
        lines.append(line)
    return [*lines, Text("")]


def _run(run: WatchedRun, width: int, room: int) -> list[Text]:
    """The lines of one run, the curve as high as `room` lines leave it."""
    head = [_title(run, width), *_troubles(run)]
    if run.step:
        head += [_progress(run, width), _rates(run)]
    tail = [*_goodput(run, width), *_ranks(run), *_experts(run), *_checkpoints(run)]
    events = [Text(line, style="" if number else FAINT) for number, line in enumerate(_events(run))]
    spare = room - len(head) - len(tail) - len(events)
    if spare < LEAST_CURVE + 3:
        events = events[:1] + events[-2:] if len(events) > 3 else events
        spare = room - len(head) - len(tail) - len(events)
    curve = _curve(run, width, min(MOST_CURVE, spare - 3)) if spare >= LEAST_CURVE + 3 else []
    return [*head, *curve, *tail, *events]


def _state(run: WatchedRun) -> str:
    return one_line(run.status.get("state", "unknown"))


def _style(state: str) -> str:
    if state.startswith("queued") or state in CALM:
        return "yellow"
    return STATES.get(state, BAD)


def _shortened(path: str, width: int) -> str:
    """The end of a path that is too long."""
    return path if len(path) <= width else "…" + path[1 - width :]


def _title(run: WatchedRun, width: int) -> Text:
    state = _state(run)
    title = Text().append(_shortened(one_line(run.directory), width // 2), style="bold")
    title.append("  ").append(state, style=_style(state))
    hosts = [one_line(host) for host in run.status.get("hosts", ())]
    if hosts:
        more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
        ranks = counted_noun(run.status.get("ranks", 0), "rank")
        title.append(f"  {ranks} on {', '.join(hosts[:3])}{more}")
    if restarts := run.status.get("restarts"):
        title.append(f"  {counted_noun(len(restarts), 'restart')}")
    return title


def _troubles(run: WatchedRun) -> Iterator[Text]:
    """Why the run has ended, and ranks that hang."""
    end = run.status.get("last_end") or {}
    if end.get("detail") and end.get("cause") == run.status.get("state"):
        yield Text(one_line(end["detail"]), style=BAD)
    for one in run.status.get("hanging_ranks", ()):
        where = f"{one_line(one['phase'])} of step {one['step']}" if one.get("phase") else f"step {one.get('step')}"
        host, how = one_line(one.get("host", "")), one_line(one.get("how", "hangs"))
        yield Text(f"rank {one.get('rank')} on {host} {how} in {where}, {_ago(one.get('time', 0.0))}", style=BAD)


def _steps(run: WatchedRun) -> str:
    step = run.step.get("step")
    return "" if step is None else f"{step}/{run.num_steps}" if run.num_steps else str(step)


def _loss(run: WatchedRun) -> str:
    return f"{run.step['loss']:.3f}" if run.step else ""


def _rate(run: WatchedRun) -> str:
    """Tokens per second; "": no step of this start yet."""
    rate = run.numbers.tokens_per_second
    return short_number(rate) if rate else ""


def _progress(run: WatchedRun, width: int) -> Text:
    """A bar, and the time left while the run trains."""
    step, last = run.step["step"], run.num_steps
    text = f"step {step:,}"
    if not last:
        return Text(text)
    text += f" of {last:,}  {step / last:.1%}"
    left = run.seconds_left
    if left is not None and _state(run) == "running" and step < last:
        ends = time.strftime("%a %H:%M", time.localtime(time.time() + left))
        text += f"  {duration(left)} left, until {ends}"
    room = width - len(text) - 2
    done = min(room, round(step / last * room))
    return Text(f"{text}  ").append("━" * done, style=GOOD).append("━" * (room - done), style=FAINT)


def _rates(run: WatchedRun) -> Text:
    numbers = run.numbers
    parts = [f"loss {_loss(run)}"]
    if evaluation := numbers.newest.get("evaluation"):
        best = numbers.best_evaluation
        told = f", best {best:.3f}" if best < evaluation["nats_per_token"] else ""
        parts.append(f"validation {evaluation['nats_per_token']:.3f} at step {evaluation['step']}{told}")
    if rate := _rate(run):
        parts.append(f"{rate} tokens/s")
    share = numbers.utilization(run.step)
    if share is not None:
        parts.append(f"MFU {share:.1%}")
    if _state(run) == "running" and time.time() - run.step["time"] >= LONG_STEP_SECONDS:
        parts.append(f"last step {_ago(run.step['time'])}")
    return Text("  ".join(parts))


def _curve(run: WatchedRun, width: int, height: int) -> list[Text]:
    points = run.numbers.curve.points
    if len(points) < 2:
        return []
    steps = run.numbers.curve.first_step, points[-1][0]
    losses = smooth([loss for _, loss in points])
    low, high = min(losses), max(losses)
    shown = [(step, loss) for (step, _), loss in zip(points, losses, strict=True)]
    gutter = max(len(f"{value:.3f}") for value in (low, high)) + 1
    columns = max(8, width - gutter - 2)
    scale = {0: f"{high:.3f}", height - 1: f"{low:.3f}"}
    lines = [Text("training loss, nats per label (smoothed)", style=FAINT)]
    for number, row in enumerate(braille(shown, steps, (low, high), columns, height)):
        lines.append(Text(f"{scale.get(number, ''):>{gutter}} ┤").append(row, style=LINE))
    lines.append(Text(" " * (gutter + 1) + "└" + "─" * columns))
    ends = f"{steps[0]:,}", f"step {steps[1]:,}"
    return [*lines, Text(" " * (gutter + 2) + ends[0] + ends[1].rjust(columns - len(ends[0])))]


def _productive(run: WatchedRun) -> float | None:
    """The share of the run's seconds that made steps; None: no time yet."""
    seconds = run.numbers.accounting.seconds
    total = math.fsum(seconds.values())
    return seconds["productive"] / total if total > 0 else None


def _goodput(run: WatchedRun, width: int) -> Iterator[Text]:
    """Productive time, and as many causes of lost time as fit, the largest first."""
    productive, seconds = _productive(run), run.numbers.accounting.seconds
    if productive is None:
        return
    total = math.fsum(seconds.values())
    lost = sorted(((value, cause) for cause, value in seconds.items() if cause != "productive"), reverse=True)
    text, joint = f"goodput {productive:.1%} of {duration(total)}", "; lost: "
    for value, cause in lost:
        more = f"{joint}{cause} {value / total:.1%}"
        if value < total / 2000 or len(text) + len(more) > width:
            break
        text, joint = text + more, ", "
    yield Text(text)


def _ranks(run: WatchedRun) -> Iterator[Text]:
    if slow := run.status.get("slow_rank"):
        host = f" on {one_line(slow['host'])}" if slow.get("host") else ""
        yield Text(f"slow: rank {slow['rank']}{host} works {slow['excess']:.0%} longer than the others", style=BAD)
    rank, lag = run.step.get("slowest_rank"), run.step.get("slowest_rank_lag_seconds")
    if rank is not None and lag is not None and run.numbers.newest.get("start", {}).get("world_size", 0) > 1:
        share = f", {lag / run.step['step_seconds']:.1%} of the step" if run.step.get("step_seconds") else ""
        yield Text(f"slowest rank of the last step: {rank}, {1000 * lag:.1f} ms behind{share}")


def _experts(run: WatchedRun) -> Iterator[Text]:
    """The layer whose experts have the most uneven loads, by its number in the model."""
    if run.step.get("expert_loads"):
        found = of_experts(run.step)
        most, layer = found["expert_load_ratio"], found["expert_load_layer"]
        dropped = found.get("expert_dropped_ratio")
        said = "" if dropped is None else f"; {dropped:.1%} of choices dropped"
        yield Text(f"experts: the largest load is {most:.2f} times the mean, in layer {layer}{said}")


def _checkpoints(run: WatchedRun) -> Iterator[Text]:
    is_running = _state(run) == "running"
    if (under_way := run.numbers.under_way) and is_running:
        what = {"checkpoint": "saving", "evaluation": "evaluating"}.get(under_way.get("cause", ""), "busy")
        yield Text(f"{what} after step {under_way.get('step')}, begun {_ago(under_way['time'])}", style="yellow")
    if not run.step:
        return
    if saved := run.numbers.newest.get("checkpoint"):
        size = f"{byte_size(saved['bytes'])} in {saved['seconds']:.1f} s"
        text = f"checkpoint of step {saved['step']:,}, {_ago(saved['time'])}, {size}"
    else:
        text = "no checkpoint yet"
    yield Text(f"{text}{_due(run, 'checkpoint', 'next') if is_running else ''}")
    if is_running and (due := _due(run, "evaluation", "next evaluation")):
        yield Text(due.removeprefix("; "))


def _due(run: WatchedRun, section: str, what: str) -> str:
    due, pace = run.next_due(section), run.numbers.seconds_per_step(run.step)
    if due is None:
        return ""
    soon = f", in {duration(pace * (due - run.step['step']))}" if pace is not None else ""
    return f"; {what} at step {due:,}{soon}"


def _events(run: WatchedRun) -> list[str]:
    """A heading and the last events, the newest last."""
    newest = list(run.events)[-MOST_EVENTS:]
    return ["last events", *(_event(event) for event in newest)] if newest else []


def _event(event: Mapping[str, Any]) -> str:
    moment = event.get("time")
    when = time.strftime("%d %b %H:%M:%S", time.localtime(moment)) if isinstance(moment, (int, float)) else ""
    words = [f"  {when}  {one_line(event['event']).replace('_', ' ')}"]
    if "rank" in event:
        words.append(f"rank {one_line(event['rank'])}")
    if event.get("step"):
        words.append(f"at step {one_line(event['step'])}")
    details = [one_line(event[name]) for name in EVENT_DETAILS if event.get(name)]
    return " ".join(words) + (": " + ", ".join(details) if details else "")


def _ago(moment: float) -> str:
    return f"{duration(max(0.0, time.time() - moment))} ago"
