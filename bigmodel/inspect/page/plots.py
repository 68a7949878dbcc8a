"""The plots of the page, section by section, from the histories of one or several runs.

With one run a colour is a meaning (`bigmodel.pictures`). With several a colour is a run, a dash pattern a quantity, and
stacks and heat maps have a plot per run. A plot without numbers is left out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from bigmodel.inspect.braille import smooth
from bigmodel.inspect.page.drawing import MEANS, Floats, HeatMap, Line, Plot, bucket_ends, sums
from bigmodel.inspect.page.history import RunHistory
from bigmodel.metrics.run_accounting import CAUSES as LOST
from bigmodel.pictures import CAUSES, CURVES, PHASES, SERIES

Runs = Sequence[RunHistory]
Drawn = Plot | HeatMap
Points = tuple[Floats, Floats]


@dataclass(frozen=True)
class Quantity:
    """What a plot shows of every run: `points` gives x and y."""

    label: str
    points: Callable[[RunHistory], Points]
    colour: str = ""  # "": the next one of SERIES
    shown: bool = True
    thin: bool = False
    dots: bool = False


def sections(runs: Runs) -> dict[str, list[Drawn]]:
    """Title of each section -> its plots, those without numbers left out."""
    made: dict[str, Iterable[Drawn]] = {
        "Loss": loss(runs),
        "Validation": validation(runs),
        "Speed": speed(runs),
        "Ranks": (_lag(run, _of(run, runs)) for run in runs),
        "Goodput": (_causes(run, _of(run, runs)) for run in runs),
        "Memory": memory(runs),
        "Learning": learning(runs),
        "Experts": experts(runs),
        "Data": data(runs),
    }
    return {title: [plot for plot in plots if _has_numbers(plot)] for title, plots in made.items()}


def loss(runs: Runs) -> list[Drawn]:
    parts = _names(runs, "nats/")
    every = [
        Quantity("each step", _column("loss"), CURVES["each step"], shown=len(runs) == 1, thin=True),
        Quantity("smoothed", _smoothed("loss"), CURVES["training"]),
        Quantity("validation", _evaluated("nats_per_token"), CURVES["validation"], dots=True),
        Quantity("without class weights", _column("unweighted_loss"), shown=False),
    ]
    colours = part_colours(runs)
    by_part = [Quantity(_part_name(name, parts), _smoothed(name), colours[name[5:]]) for name in parts]
    of_part = [
        Quantity(f"{_part_name(name, parts)}, each step", _column(name), colours[name[5:]], shown=False, thin=True)
        for name in parts
    ]
    one = "nats per label"
    return [
        _lines(runs, "loss", "Training loss", one, every),
        _lines(runs, "loss-parts", "Loss by objective and source", one, [*by_part, *of_part], note="smoothed"),
        _lines(runs, "z-loss", "Mean of logsumexp(logits)²", "per label", [Quantity("z-loss", _column("z_loss"))]),
        _lines(runs, "distillation", "Divergence from the teacher", one, [Quantity("", _column("distillation_loss"))]),
    ]


def validation(runs: Runs) -> list[Drawn]:
    def of_part(name: str) -> Callable[[RunHistory], Points]:
        return lambda run: _of_lines(run, "evaluation", lambda line: _validation_parts(line).get(name))

    parts = _validated(runs)
    colours = part_colours(runs)
    tasks = sorted(
        {
            (task, metric)
            for run in runs
            for line in run.others.get("tasks", ())
            for task, of in line["scores"].items()
            for metric in of
        }
    )

    def score(task: str, metric: str) -> Callable[[RunHistory], Points]:
        return lambda run: _of_lines(run, "tasks", lambda line: line["scores"].get(task, {}).get(metric))

    by_part = [Quantity(_part_name(name, parts), of_part(name), colours[name[5:]], dots=True) for name in parts]
    scores = [Quantity(f"{task}, {metric}", score(task, metric), dots=True) for task, metric in tasks]
    whole = [Quantity("all", _evaluated("nats_per_token"), CURVES["all"], dots=True)]
    named = {"accuracy": "accuracy", "calibration error": "calibration_error"}
    shares = [Quantity(label, _evaluated(name), dots=True) for label, name in named.items()]
    bits = [Quantity("bits per byte", _evaluated("bits_per_byte"), CURVES["validation"], dots=True)]
    return [
        _lines(runs, "validation-loss", "Validation loss", "nats per label", [*whole, *by_part]),
        _lines(runs, "bits-per-byte", "Validation", "bits per byte of text", bits),
        _lines(runs, "accuracy", "Accuracy and calibration error", "share of labels", shares, scale="share"),
        _lines(runs, "tasks", "Tasks", "score", scores),
    ]


def speed(runs: Runs) -> list[Drawn]:
    utilization = [
        Quantity("model, as if without a mask", _utilization("full"), SERIES[1], shown=False),
        Quantity("hardware, operations computed", _utilization("hardware"), SERIES[2], thin=True),
        Quantity("model, causal", _utilization("causal"), SERIES[0]),
    ]
    seconds = [
        Quantity("step", _column("step_seconds"), CURVES["training"]),
        Quantity("waiting for data", _column("data_wait_seconds"), PHASES["data"]),
        Quantity("compiling", _column("compile_seconds"), PHASES["compile"], shown=False),
    ]
    rate = [Quantity("tokens", _rate, CURVES["training"])]
    energy = [Quantity("GPUs", _per_token("device_joules")), Quantity("processors", _per_token("host_joules"))]
    return [
        _lines(runs, "throughput", "Throughput", "tokens per second, all ranks", rate, from_zero=True),
        _lines(runs, "mfu", "Share of the devices' peak (MFU)", "FLOP/s over peak", utilization, "share", True),
        _lines(runs, "step-time", "Time of a step", "seconds", seconds, "seconds", True),
        *(_phases(run, _of(run, runs)) for run in runs),
        _lines(runs, "energy", "Energy of a token", "joules", energy, from_zero=True),
    ]


def memory(runs: Runs) -> list[Drawn]:
    names = {
        "memory/resident_bytes": "process, in main memory",
        "memory/device_peak_bytes": "device, most in use",
        "memory/device_allocated_bytes": "device, in use",
        "memory/device_reserved_bytes": "device, held by the allocator",
    }
    quantities = [Quantity(label, _column(name)) for name, label in names.items()]
    return [_lines(runs, "memory", "Memory of rank 0", "bytes", quantities, "bytes", True)]


def learning(runs: Runs) -> list[Drawn]:
    norms = _names(runs, "norm/")
    rate = [Quantity("learning rate", _column("learning_rate"), CURVES["training"])]
    gradient = [Quantity("gradient norm", _column("gradient_norm"), CURVES["training"])]
    others = {"loss_scale": "loss scale", "pruned_share": "pruned", "sampled_share": "sampled decoder inputs"}
    made = [
        _lines(runs, "gradient-norm", "Gradient norm", "before clipping", gradient),
        _lines(runs, "learning-rate", "Learning rate", "per step", rate, from_zero=True),
    ]
    score = [Quantity("", _column("largest_attention_score"), CURVES["training"])]
    made.append(_lines(runs, "attention-score", "Largest attention score", "before bias and cap", score))
    kinds = {"weight_norm": "Weight norm", "update_norm": "Norm of an update", "l1_norm": "L1 norm of weights"}
    for kind, title in {**kinds, "zero_ratio": "Share of zeros"}.items():
        of_kind = [Quantity(name.split("/")[1], _column(name)) for name in norms if name.endswith(f"/{kind}")]
        made.append(_lines(runs, kind, title, "by layers", of_kind, dots=True))
    made += [_lines(runs, name, title, "", [Quantity(title, _column(name))]) for name, title in others.items()]
    return list(made)


def experts(runs: Runs) -> list[Drawn]:
    """Of runs with [model.experts]; a column per layer with experts."""

    def over_layers(join: Callable[[list[Floats]], Floats]) -> Callable[[RunHistory], Points]:
        def points(run: RunHistory) -> Points:
            layers = [*_loads_by_layer(run).values()]
            return run.column("step"), join(layers) if layers else np.zeros(0)

        return points

    most = [
        Quantity("most uneven layer", over_layers(lambda layers: reduce(np.fmax, layers)), CURVES["training"]),
        Quantity("mean of the layers", over_layers(lambda layers: reduce(np.add, layers) / len(layers))),
    ]
    entropy = [Quantity("most uneven layer", _column("experts/entropy"), CURVES["training"])]
    z = [Quantity("router z", _column("experts/router_z"), CURVES["training"])]
    dropped = [Quantity("all layers", _column("experts/dropped_share"), CURVES["training"])]
    of_even = "entropy of the loads over that of even loads"
    return [
        _lines(runs, "expert-load", "Largest load of an expert", "times the mean load of its layer", most),
        _lines(runs, "expert-entropy", "Evenness of the experts' loads", of_even, entropy),
        _lines(runs, "router-z", "Routers' mean of logsumexp(logits)²", "per label and layer", z),
        *(
            [_lines(runs, "expert-dropped", "Choices of experts that are dropped", "share of all choices", dropped)]
            if any(np.isfinite(run.column("experts/dropped_share")).any() for run in runs)
            else []
        ),
        *(_uneven_layers(run, _of(run, runs)) for run in runs),
        *(_loads_of_layer(run, _of(run, runs)) for run in runs if run.loads_by_expert),
    ]


def data(runs: Runs) -> list[Drawn]:
    def ratio(part: str, other: str) -> Callable[[RunHistory], Points]:
        def points(run: RunHistory) -> Points:
            one, two = run.column(part), run.column(other)
            return run.column("step"), _divided(one, one + two)

        return points

    padding = [Quantity("padding", ratio("padding", "positions"), CURVES["training"])]
    counts = [Quantity("documents", _column("documents"), CURVES["training"])]
    counts += [Quantity("sequences at the limit of documents", _column("packs_document_limited"), shown=False)]
    balance = [Quantity("as dealt to the ranks", _column("imbalance"))]
    balance += [Quantity("in canonical order", _column("imbalance_undealt"), shown=False)]
    fetched = [Quantity("fetched", _positive("fetched_bytes"))]
    return [
        *(_mix(run, _of(run, runs)) for run in runs),
        _lines(runs, "packing", "Padding", "share of a step's places", padding, "share", True),
        _lines(runs, "documents", "Documents in a step", "documents, or chunks of long ones", counts),
        _lines(runs, "balance", "Attention work: most of a rank over the mean", "ratio, rank 0's node", balance),
        _lines(runs, "fetched", "Fetched from the store since the start", "bytes, rank 0", fetched, "bytes", True),
    ]


def restarts(run: RunHistory) -> list[float]:
    """The steps from which the run went on after each start but the first."""
    return [float(line["step"]) for line in run.starts()[1:]]


def part_colours(runs: Runs) -> dict[str, str]:
    """OBJECTIVE/SOURCE -> its colour in all plots."""
    names = dict.fromkeys(name.split("/", 1)[1] for name in (*_names(runs, "labels/"), *_validated(runs)))
    return {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}


def _lines(
    runs: Runs,
    name: str,
    title: str,
    unit: str,
    quantities: Sequence[Quantity],
    scale: str = "",
    from_zero: bool = False,
    note: str = "",
    dots: bool = False,
) -> Plot:
    lines = []
    # The first quantity in view is the solid line.
    shown_first = sorted(range(len(quantities)), key=lambda place: not quantities[place].shown)
    for number, run in enumerate(runs):
        for place in shown_first:  # the key has those out of view last
            one = quantities[place]
            x, y = one.points(run)
            if not np.isfinite(y).any():
                continue
            if len(runs) == 1:
                colour, dash = one.colour or SERIES[place % len(SERIES)], 0 if one.colour else place // len(SERIES)
                label = one.label or title
            else:
                colour, dash = SERIES[number % len(SERIES)], shown_first.index(place)
                label = f"{run.name}: {one.label}" if len(quantities) > 1 and one.label else run.name
            points = dots or one.dots
            lines.append(Line(label, colour, x, y, dash, one.shown, one.thin, points and len(y) < 400))
    marks = sorted({step for run in runs for step in restarts(run)})
    return Plot(name, title, unit, lines, scale=scale, from_zero=from_zero, note=note, marks=marks)


def _of(run: RunHistory, runs: Runs) -> str:
    """What tells the plots of several runs apart, in their titles and names."""
    return f" of {run.name}" if len(runs) > 1 else ""


def _stack(name: str, title: str, unit: str, lines: list[Line], **more: object) -> Plot:
    shown = [line for line in lines if np.any(line.y > 0)]
    return Plot(name, title, unit, shown, kind="stack", from_zero=True, **more)  # type: ignore[arg-type]


def _phases(run: RunHistory, of: str) -> Plot:
    ends = bucket_ends(run.num_steps)
    counts = np.diff(ends, prepend=0)
    step = run.column("step")
    names = [name for name in PHASES if name not in ("compile", "rest")]
    seconds = {name: np.nan_to_num(run.column(f"phase/{name}")) for name in names}
    compiling = np.nan_to_num(run.column("compile_seconds"))
    seconds["forward"] = seconds["forward"] - np.minimum(seconds["forward"], compiling)  # the first forward compiles
    seconds["compile"] = compiling
    rest = run.column("step_seconds") - sum(seconds.values(), np.zeros(run.num_steps))
    seconds["rest"] = np.maximum(0.0, rest)
    lines = [Line(name, PHASES[name], step[ends - 1], sums(values, ends) / counts) for name, values in seconds.items()]
    means = f"mean of each of {len(ends)} stretches; " if len(ends) < run.num_steps else ""
    note = f"{means}rest: outside all phases"
    title = f"Phases of a step{of}, rank 0"
    return _stack(f"phases{of}", title, "seconds", lines, scale="seconds", note=note, marks=restarts(run))


def _lag(run: RunHistory, of: str) -> HeatMap:
    world = max((int(line["world_size"]) for line in run.starts()), default=1)
    step, lag = run.column("step"), run.column("slowest_rank_lag_seconds")
    note = "longest work above that of the middle rank; of more than 64 ranks, of the 16 slowest of each step"
    title = f"Lag by rank{of}"
    cells = [(run.column("slowest_rank"), lag)]  # runs of earlier versions have no others
    for name in run.names("lag_ms/"):
        place = name.removeprefix("lag_ms/")
        ranks = run.column(f"lag_ranks/{place}")
        cells.append((np.where(np.isfinite(ranks), ranks, float(place)), run.column(name) / 1000))
    rows = max([world, *(1 + int(rank[np.isfinite(rank)].max(initial=-1)) for rank, _ in cells)])
    return HeatMap(f"lag{of}", title, "seconds", rows, step, cells, note=note, marks=restarts(run))


def _loads_by_layer(run: RunHistory) -> dict[int, Floats]:
    """Layer with experts -> (steps,) the largest load over the mean."""
    names = [name.removeprefix("experts/") for name in run.names("experts/")]
    return {int(name): run.column(f"experts/{name}") for name in names if name.isdigit()}


def _uneven_layers(run: RunHistory, of: str) -> HeatMap:
    layers = _loads_by_layer(run)
    step = run.column("step")
    cells = [(np.full(len(step), float(layer)), load - 1.0) for layer, load in layers.items()]
    title, unit = f"Largest load of an expert, by layer{of}", "share above the mean load of the layer"
    note = "layers of the model, as in blocks.N; empty: without experts"
    marks, rows = restarts(run), 1 + max(layers, default=-1)
    return HeatMap(f"experts{of}", title, unit, rows, step, cells, "layer", "share", note, marks)


def _loads_of_layer(run: RunHistory, of: str) -> HeatMap:
    """Expert by step, of the layer whose loads were the most uneven when last measured."""
    last = run.loads_by_expert[-1][1]
    layer = max(last, key=lambda one: last[one].max())
    measured = [(step, loads[layer]) for step, loads in run.loads_by_expert if layer in loads]
    step, loads_SE = np.array([at for at, _ in measured]), np.array([loads for _, loads in measured]) / 100
    cells = [(np.full(len(step), float(expert)), loads_S) for expert, loads_S in enumerate(loads_SE.T)]
    title, unit = f"Load of each expert, layer {layer}{of}", "times the mean load of the layer"
    note = "the layer with the largest load when last measured; measured every metrics.norms_every_steps steps"
    marks = restarts(run)
    return HeatMap(f"expert-loads{of}", title, unit, len(cells), step, cells, "expert", "", note, marks)


def _causes(run: RunHistory, of: str) -> Plot:
    """Shares of the wall time by cause, in stretches of equal time from the first process to the last line."""
    moments, seconds = run.seconds_over_time()
    if not len(moments):
        return Plot(f"goodput{of}", "", "")
    edges = np.linspace(run.began, moments[-1], 1 + MEANS)
    lines = []
    for number, cause in enumerate(("productive", *LOST)):
        known = np.interp(edges, np.concatenate([[run.began], moments]), np.concatenate([[0.0], seconds[:, number]]))
        shares = np.clip(_divided(np.diff(known), np.diff(edges)), 0.0, 1.0)
        lines.append(Line(cause, CAUSES[cause], edges[1:] - run.began, shares))
    marks = [line["time"] - run.began for line in run.starts()[1:]]
    note = "dashed: restarts"
    return _stack(
        f"goodput{of}", f"Wall time by cause{of}", "share", lines, scale="share", x="time", note=note, marks=marks
    )


def _mix(run: RunHistory, of: str) -> Plot:
    names = run.names("labels/")
    ends = bucket_ends(run.num_steps)
    counts = {name: sums(run.column(name), ends) for name in names}
    whole = sum(counts.values(), np.zeros(len(ends)))
    step = run.column("step")[ends - 1]
    colours = part_colours([run])
    lines = [
        Line(_part_name(name, names), colours[name.split("/", 1)[1]], step, _divided(counts[name], whole))
        for name in names
    ]
    title = f"Data mix{of}"
    note = f"mean of each of {len(ends)} stretches" if len(ends) < run.num_steps else ""
    return _stack(f"mix{of}", title, "share of labels", lines, scale="share", note=note, marks=restarts(run))


def _column(name: str) -> Callable[[RunHistory], Points]:
    return lambda run: (run.column("step"), run.column(name))


def _positive(name: str) -> Callable[[RunHistory], Points]:
    """Nothing at all if all numbers are 0."""
    return lambda run: (run.column("step"), run.column(name) if np.any(run.column(name) > 0) else np.zeros(0))


def _smoothed(name: str) -> Callable[[RunHistory], Points]:
    def points(run: RunHistory) -> Points:
        values = run.column(name)
        known = np.isfinite(values)
        return run.column("step")[known], np.array(smooth(values[known].tolist()))

    return points


def _evaluated(name: str) -> Callable[[RunHistory], Points]:
    return lambda run: _of_lines(run, "evaluation", lambda line: line.get(name))


def _of_lines(run: RunHistory, kind: str, value: Callable[[dict], float | None]) -> Points:
    found = [(line["step"], value(line)) for line in run.others.get(kind, ())]
    known = np.array([(step, one) for step, one in found if one is not None], dtype=np.float64).reshape(-1, 2)
    return known[:, 0], known[:, 1]


def _validated(runs: Runs) -> list[str]:
    """nats/OBJECTIVE/SOURCE of all evaluations."""
    return sorted(
        {name for run in runs for line in run.others.get("evaluation", ()) for name in _validation_parts(line)}
    )


def _validation_parts(line: dict) -> dict[str, float]:
    return {
        f"nats/{part['objective']}/{part['source']}": part["nats"] / (part.get("weight") or part["targets"])
        for part in line.get("parts") or ()
        if part["targets"]
    }


def _rate(run: RunHistory) -> Points:
    return run.column("step"), _divided(run.column("positions"), run.column("step_seconds"))


def _per_token(name: str) -> Callable[[RunHistory], Points]:
    return lambda run: (run.column("step"), _divided(run.column(name), run.column("positions")))


def _utilization(name: str) -> Callable[[RunHistory], Points]:
    """FLOPs of a step over what the devices of its start can do in its time; NaN where no peak is known."""

    def points(run: RunHistory) -> Points:
        step = run.column("step")
        starts = run.starts()
        if not starts:
            return step, np.full(len(step), np.nan)
        # One peak for all starts that measured it, else the curve jumps at a restart.
        most = max((line["device_peak_flops"] for line in starts if line.get("peak_is_measured")), default=None)
        found = [most if line.get("peak_is_measured") else line.get("device_peak_flops") for line in starts]
        peaks = [(peak or np.nan) * line["world_size"] for peak, line in zip(found, starts, strict=True)]
        place = np.searchsorted([line["step"] for line in starts], step, side="left") - 1
        possible = np.array(peaks)[np.maximum(place, 0)] * run.column("step_seconds")
        return step, _divided(run.column(f"flops/{name}"), possible)

    return points


def _divided(one: Floats, two: Floats) -> Floats:
    """NaN where the divisor is 0."""
    return np.divide(one, two, out=np.full(len(one), np.nan), where=two != 0)


def _names(runs: Runs, prefix: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.names(prefix)))


def _part_name(name: str, names: Sequence[str]) -> str:
    """nats/causal/code: "code" if all have one objective, else "code, causal"."""
    _, objective, source = name.split("/", 2)
    one = len({other.split("/", 2)[1] for other in names}) == 1
    return source if one else f"{source}, {objective}"


def _has_numbers(plot: Drawn) -> bool:
    if isinstance(plot, HeatMap):
        return any(np.isfinite(value).any() for _, value in plot.cells)
    return bool(plot.lines)
