"""Writes what configs/models/ says in numbers: `python -m tools.write_arithmetic`.

In: each run file, and the cluster file that its comments name after `--cluster`. Out: the comment that begins with
"Arithmetic", before the file's first section; the table of docs/run-files.md; that of configs/deepspeed/README.md, what
each JSON costs. Tests compare the files with the output.

    parameters         all of them, and the rows of the embedding
    tokens in a step   padding included; of an encoder-decoder both sides; after the batch ramp
    tokens             in all steps; per parameter
    FLOPs              of the matrices, forward and backward; those of attention depend on the documents' lengths
    memory of a GPU    as `bigmodel plan` says it; of the memory of the cluster's GPU
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bigmodel.config.settings import load_settings, num_micro_batches, packs_at, positions_before
from bigmodel.data.plan.attention_work import Work
from bigmodel.launcher.cluster import load_cluster
from bigmodel.metrics.flops import flops
from bigmodel.planning.communication import collectives
from bigmodel.planning.context import Context, context_of
from bigmodel.planning.data_needs import count
from bigmodel.planning.hardware import hardware_of
from bigmodel.planning.memory import GIB, memory_of
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.state_memory import state_plan

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "models"
HEAD = "# Arithmetic (python -m tools.write_arithmetic; a test repeats it):"
BEGIN, END = "<!-- Made by `python -m tools.write_arithmetic`; a test keeps it current. -->", "<!-- end -->"
JSONS = (
    "zero1", "zero2", "zero3", "zero3-hpz", "zero2-offload", "zero3-offload-optimizer", "zero3-offload", "zero3-nvme",
    "zero0-fp32",
)  # fmt: skip


def run_files() -> list[Path]:
    return sorted(FOLDER.glob("*.toml"))


def cluster_of(text: str) -> Path:
    """The cluster file that a run file's comments name."""
    return ROOT / text.partition("--cluster ")[2].split()[0]


def context_of_file(path: Path, overrides: Sequence[str] = ()) -> Context:
    settings = load_settings(path, overrides)
    elsewhere = settings.data.model_copy(update={"directory": Path("no such folder")})  # not what lies here by chance
    settings = settings.model_copy(update={"data": elsewhere})
    return context_of(settings, load_cluster(cluster_of(path.read_text(encoding="utf-8"))))


class Size(NamedTuple):
    """Of a run: parameters, positions of all packed sequences on both sides, GiB on each GPU."""

    parameters: int
    tokens: int
    memory: float
    activations: float  # of it
    rest: float  # of it: framework and fragmentation
    limit: float


def size_of(context: Context) -> Size:
    settings, data = context.settings, context.settings.data
    parameters = parameters_of(settings, context.vocabulary)
    packs = positions_before(settings.training.steps, settings) // data.sequence_length
    tokens = packs * (data.sequence_length + data.source_sequence_length)
    parts, cluster = memory_of(context).device, context.cluster
    limit = hardware_of(cluster.hardware, cluster.nodes, cluster.gpus_per_node).memory_gib
    activations, rest = parts["activations"] + parts["loss buffers"], parts["framework"] + parts["fragmentation"]
    numel = sum(one.numel for one in parameters)
    return Size(numel, tokens, sum(parts.values()) / GIB, activations / GIB, rest / GIB, limit)


def arithmetic(context: Context) -> list[str]:
    """Lines of the comment."""
    settings, data, training = context.settings, context.settings.data, context.settings.training
    size, sides = size_of(context), [one for one in (data.sequence_length, data.source_sequence_length) if one]
    last = packs_at(training.steps - 1, training.global_batch_size, training.batch_ramp)
    shape = " + ".join(f"{side:,}" for side in sides)
    micro_batch = context.effective["train_micro_batch_size_per_gpu"]
    micro_batches = num_micro_batches(last, context.ranks, micro_batch)
    packs = size.tokens // sum(sides)
    work = Work(packs * data.sequence_length, packs * data.source_sequence_length)
    operations = flops(settings.model, context.vocabulary, work, (0, 0)).causal
    state = size.memory - size.activations - size.rest
    memory = f"of {size.limit:.1f}; ZeRO {context.effective['zero_optimization']['stage']}: {state:.1f} of state, "
    memory += f"{size.activations:.1f} of activations"
    rows = [
        ("parameters", f"{size.parameters:,}", f"{context.vocabulary:,} rows of the vocabulary"),
        ("tokens in a step", f"{last * sum(sides):,}", f"{last:,} x {shape}"),
        ("micro-batches", f"{micro_batches:,}", f"of {micro_batch} x {shape} tokens on each of {context.ranks} GPUs"),
        ("steps", f"{training.steps:,}", ""),
        ("tokens", f"{size.tokens:,}", f"{size.tokens / size.parameters:,.1f} per parameter"),
        ("FLOPs", f"{operations:.3g}", "of the matrices, forward and backward"),
        ("memory of a GPU", f"{size.memory:.1f} GiB", memory),
    ]
    return [HEAD] + [f"#   {name:<16} {value:>22}   {note}".rstrip() for name, value, note in rows]


def models_table() -> list[str]:
    """A row for each run file, smallest first of each kind."""
    kinds = {"decoder": 0, "encoder_decoder": 1, "encoder": 2}
    contexts = {path: context_of_file(path) for path in run_files()}
    found = []
    for path, context in contexts.items():
        model, size = context.settings.model, size_of(context)
        shape = f"{model.num_layers} x {model.hidden_size:,}"
        if model.kind == "encoder_decoder":
            shape = f"{model.encoder.num_layers} + {shape}"
        memory = f"{size.memory:.0f} of {size.limit:.0f} GiB"
        cells = [f"`{path.name}`", count(size.parameters), shape, count(size.tokens)]
        cells += [f"{size.tokens / size.parameters:,.0f}", f"`{cluster_of(path.read_text()).name}`", memory]
        found.append((kinds[model.kind], size.parameters, f"| {' | '.join(cells)} |"))
    head = "| file | parameters | layers x width | tokens | per parameter | cluster | memory of a GPU |"
    return [head, "|---|---|---|---|---|---|---|", *(row for _, _, row in sorted(found))]


def costs_table() -> list[str]:
    """A row for each JSON of configs/deepspeed/, with the settings of configs/models/8b.toml."""
    rows = ["| file | state, GiB | host, GiB | sent, GB |", "|---|---|---|---|"]
    for name in JSONS:
        overrides = [f"training.deepspeed={ROOT}/configs/deepspeed/{name}.json"]
        context = context_of_file(FOLDER / "8b.toml", overrides)
        parameters = parameters_of(context.settings, context.vocabulary)
        plan = state_plan(parameters, context.settings, context.effective, context.ranks)
        packs = context.settings.training.batch_ramp[-1][1]
        micro_batches = num_micro_batches(packs, context.ranks, 1)
        exchanged = collectives(parameters, context.settings, context.effective, context.ranks, micro_batches)
        numbers = sum(plan.device.values()) / GIB, sum(plan.host.values()) / GIB
        sent = sum(one.sent(context.ranks) for one in exchanged) / 1e9
        rows.append(f"| `{name}.json` | {numbers[0]:.1f} | {f'{numbers[1]:.1f}' if numbers[1] else ''} | {sent:,.0f} |")
    return rows


def with_arithmetic(text: str, lines: list[str]) -> str:
    """The run file's text with these lines as the last of the comments at its top."""
    all_lines = text.splitlines()
    end = next(number for number, line in enumerate(all_lines) if not line.startswith("#"))
    head = next((number for number, line in enumerate(all_lines[:end]) if line.startswith("# Arithmetic")), end)
    return "\n".join([*all_lines[:head], *lines, *all_lines[end:]]) + "\n"


def with_table(text: str, rows: list[str]) -> str:
    """A page's text with these rows between the two comments."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"a page needs {BEGIN} and {END}"
    return "\n".join([before + begin, "", *rows, "", end + after])


def pages() -> dict[Path, str]:
    """The pages with their tables."""
    tables = {ROOT / "docs/run-files.md": models_table, ROOT / "configs/deepspeed/README.md": costs_table}
    return {path: with_table(path.read_text(encoding="utf-8"), table()) for path, table in tables.items()}


def main() -> None:
    for path in run_files():
        text = path.read_text(encoding="utf-8")
        path.write_text(with_arithmetic(text, arithmetic(context_of_file(path))), encoding="utf-8")
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
