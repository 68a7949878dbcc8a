"""Lines of steps to columns of numbers, in C: pyarrow's reader of JSON.

In: lines of metrics.jsonl that are steps. Out: columns by name, and float64 arrays of them, NaN where a line has no
number. Guarantees: the numbers are those of Python's json; lines that Arrow does not take as one table (damaged, of
other types) are refused as a whole. Costs: benchmarks/README.md, "The page of a long run".
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow
import pyarrow.json
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NAMED, COUNTED = ("objective", "source"), ("nats", "targets", "weight")
PART = [*((name, pyarrow.string()) for name in NAMED), *((name, pyarrow.float64()) for name in COUNTED)]
Columns = dict[str, pyarrow.Array]


def read_steps(lines: Sequence[bytes], numbers: Sequence[str]) -> Columns | None:
    """(lines,) `numbers` and "parts", and whatever else the lines have. None: not all of them are such lines."""
    fields = [*((name, pyarrow.float64()) for name in numbers), ("parts", pyarrow.list_(pyarrow.struct(PART)))]
    text = b"\n".join(lines)
    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(text),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
            pyarrow.json.ParseOptions(explicit_schema=pyarrow.schema(fields)),
        )
    except pyarrow.ArrowInvalid:
        return None
    if len(table) != len(lines):  # two values on a line, or none
        return None
    return {name: column.combine_chunks() for name, column in zip(table.column_names, table.columns, strict=True)}


def floats(values: pyarrow.Array) -> Floats:
    """(lines,) NaN for null."""
    return np.asarray(values.cast(pyarrow.float64()).to_numpy(zero_copy_only=False))


def leaves(values: pyarrow.Array | None) -> Iterator[tuple[str, Floats]]:
    """The numbers of a table that each line has, by name, those of tables in it as TABLE/NAME; (lines,) each."""
    if values is None or not pyarrow.types.is_struct(values.type):
        return
    for name, column in zip(values.type.names, values.flatten(), strict=True):
        if pyarrow.types.is_struct(column.type):
            yield from ((f"{name}/{below}", numbers) for below, numbers in leaves(column))
        elif not pyarrow.types.is_null(column.type):
            yield name, floats(column)


def of_experts(loads: pyarrow.Array | None) -> Iterator[tuple[str, Floats]]:
    """Of the lines' `expert_loads`, by name, (lines,) each: LAYER of the model, the largest load over the mean;
    "entropy" of the layer where it is lowest; "router_z"; with a capacity "dropped_share"."""
    if loads is None or not pyarrow.types.is_struct(loads.type):
        return
    told = dict(zip(loads.type.names, loads.flatten(), strict=True))
    largest, entropy = (by_place(told[name]) for name in ("largest", "entropy"))
    firsts = (
        floats(told["first_layer"]) if "first_layer" in told else np.zeros(0)
    )  # absent in lines of earlier versions
    first = int(np.nanmax(firsts)) if np.isfinite(firsts).any() else 0
    yield from ((str(layer), values) for layer, values in enumerate(largest, start=first))
    yield "entropy", np.fmin.reduce(entropy)
    yield "router_z", floats(told["router_z"])
    if "dropped_share" in told and told["dropped_share"].null_count < len(told["dropped_share"]):
        yield "dropped_share", floats(told["dropped_share"])


def by_expert(loads: pyarrow.Array | None) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """Of the lines' `loads_by_expert`, those that are there: place of the line, and layer -> load of each expert."""
    if loads is None or not pyarrow.types.is_struct(loads.type):
        return
    for place in np.flatnonzero(loads.is_valid().to_numpy(zero_copy_only=False)).tolist():
        yield place, {layer: found for layer, found in loads[place].as_py().items() if found}


def by_place(values: pyarrow.Array | None) -> Floats:
    """Lists of numbers as (places, lines), NaN behind the end of a list. Lines without lists: (0, 0)."""
    if values is None or not pyarrow.types.is_list(values.type):
        return np.zeros((0, 0))
    lengths = np.nan_to_num(floats(values.value_lengths())).astype(np.int64)
    found = np.full((len(values), lengths.max(initial=0)), np.nan)
    found[np.arange(found.shape[1]) < lengths[:, None]] = floats(values.flatten())
    return found.T


def of_parts(parts: pyarrow.ListArray) -> Iterator[tuple[str, Floats, Floats]]:
    """OBJECTIVE/SOURCE, labels and nats per label (lines,) each, in order of their first line."""
    rows = np.repeat(np.arange(len(parts)), np.nan_to_num(floats(parts.value_lengths())).astype(np.int64))
    flat = parts.flatten()
    told = dict(zip(flat.type.names, flat.flatten(), strict=True))
    targets, weights = floats(told["targets"]), np.nan_to_num(floats(told["weight"]))
    divisors = np.where(weights != 0, weights, targets)
    means = np.divide(floats(told["nats"]), divisors, out=np.full(len(rows), np.nan), where=divisors != 0)
    objectives, sources = (told[name].dictionary_encode() for name in NAMED)
    codes = objectives.indices.to_numpy() * len(sources.dictionary) + sources.indices.to_numpy()
    for code in dict.fromkeys(codes.tolist()):
        chosen = codes == code
        objective, source = divmod(code, len(sources.dictionary))
        name = f"{objectives.dictionary[objective]}/{sources.dictionary[source]}"
        labels, nats = np.full((2, len(parts)), np.nan)
        labels[rows[chosen]], nats[rows[chosen]] = targets[chosen], means[chosen]
        yield name, labels, nats
