"""The result of `bigmodel replay` as text, as replay.json, and as a list of documents for data.exclude."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.inspect.replay_step import Measured, Part
from bigmodel.run_directory import write_atomically, write_json

SHOWN, PREVIEW, LONG_PREVIEW = 10, 60, 400  # documents in the table, characters of their texts there and in the file
BOUNDS = {"loss": 1e-6, "gradient_norm": 1e-5}  # relative, per step since the checkpoint, in fp32
SOURCE = ("source", "documents", "labels", "loss", "above_mean", "gradient_norm")
LAYER = ("layer", "gradient_norm", "activation")
ROUGHER = 1000  # times the bounds, in bf16 and fp16


@dataclass(frozen=True)
class Outputs:
    """folder: for replay.json. exclude: file for the list. count: documents of the list."""

    folder: Path | None
    exclude: Path | None
    count: int

    def refuse(self, run: Path) -> None:
        """Raises `UserError` for a list that exists already, and for a folder that is a file."""
        if self.exclude and self.exclude.exists():
            raise UserError(f"--exclude {self.exclude}: exists already; choose another file, or remove it")
        if self.folder and self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: is a file; give a folder")


@dataclass(frozen=True)
class Compared:
    """One number against its record. bound: relative; 0: must be equal to the last bit; None: there is no record."""

    name: str
    now: float
    then: float | None
    bound: float

    @property
    def is_equal(self) -> bool:
        return self.then is not None and (self.now == self.then or (math.isnan(self.now) and math.isnan(self.then)))

    @property
    def difference(self) -> float:
        """Relative."""
        if self.then is None or self.is_equal:
            return 0.0
        return abs(self.now - self.then) / abs(self.then) if self.then else math.inf


@dataclass(frozen=True)
class Replayed:
    directory: Path
    step: int
    checkpoint: int
    world_size: int
    measured: Measured
    compared: tuple[list[Compared], list[str]]  # the numbers, and why they may differ
    store: ShardStore
    is_left_out: bool


def compared(
    measured: Measured, line: dict[str, Any] | None, reasons: list[str], steps: int, precision: str
) -> tuple[list[Compared], list[str]]:
    """steps: computed since the checkpoint. reasons: why the numbers may differ."""
    factor = steps * (1 if precision == "fp32" else ROUGHER) if reasons else 0
    found = [
        Compared(name, getattr(measured, name), line[name] if line else None, bound * factor)
        for name, bound in BOUNDS.items()
    ]
    return found, reasons


def in_words(done: Replayed) -> str:
    measured = done.measured
    origin = f"the checkpoint of step {done.checkpoint}" if done.checkpoint else "the initial weights"
    lines = [f"step {done.step} of {done.directory}, from {origin}, {done.world_size} rank(s)"]
    if done.is_left_out:
        lines.append("the run did not apply this step")
    lines += [_agreement(one) for one in done.compared[0]]
    lines += [f"  may differ: {reason}" for reason in done.compared[1]]
    lines += ["", "documents, most loss above the mean first", *_documents(done)]
    lines += [
        "",
        "sources",
        *_table(("source", "documents", "labels", "loss", "above mean", "gradient"), _sources(done)),
    ]
    lines += ["", "layers", *_table(("layer", "gradient", "largest activation"), _layers(measured))]
    return "\n".join(lines)


def write(done: Replayed, outputs: Outputs) -> None:
    """Write what the user asked for, and say where."""
    if outputs.folder:
        outputs.folder.mkdir(parents=True, exist_ok=True)
        write_json(outputs.folder / "replay.json", as_json(done))
        print(f"\n{outputs.folder / 'replay.json'}: written")
    if outputs.exclude:
        entries = excluded(done.measured.parts[: outputs.count], done.store)
        outputs.exclude.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(outputs.exclude, "".join(json.dumps(entry) + "\n" for entry in entries))
        print(f"\n{outputs.exclude}: {len(entries)} document(s); read it, then set data.exclude and train --new-plan")


def excluded(parts: Sequence[Part], store: ShardStore) -> list[dict[str, Any]]:
    """Documents once each: source, shard (its number), row, and for the reader the file and the text's beginning."""
    found = {}
    for part in parts:
        chunk = part.chunk
        key = store.sources[chunk.source], chunk.shard, chunk.row
        found.setdefault(key, {**_place(part, store), "text": text_of(part, store, PREVIEW)})
    return list(found.values())


def as_json(done: Replayed) -> dict[str, Any]:
    """Numbers that are not finite are strings: JSON has none."""
    measured, store = done.measured, done.store
    return {
        "run": str(done.directory),
        "step": done.step,
        "checkpoint": done.checkpoint,
        "world_size": done.world_size,
        "loss": _number(measured.loss),
        "gradient_norm": _number(measured.gradient_norm),
        "recorded": {
            one.name: {
                "value": _number(one.then), "equal": one.is_equal, "difference": _number(one.difference),
                "bound": one.bound,
            }
            for one in done.compared[0]
        },
        "may_differ": done.compared[1],
        "documents": [
            _place(part, store) | _numbers(part, measured) | {"text": text_of(part, store, LONG_PREVIEW)}
            for part in measured.parts
        ],
        "sources": [_named(SOURCE, row) for row in _sources(done)],
        "layers": [_named(LAYER, row) for row in _layers(measured)],
    }  # fmt: skip


def text_of(part: Part, store: ShardStore, characters: int) -> str:
    """The beginning of the chunk's text on one line; of pairs, of the target."""
    chunk = part.chunk
    document = store.document(store.sources[chunk.source], chunk.shard, chunk.row)
    if isinstance(document, np.ndarray):
        tokens = document[chunk.start : chunk.start + chunk.length]
    else:
        tokens = document.tokens if isinstance(document, Supervised) else document.target
    text = " ".join(Tokenizer.load(store.file("tokenizer.json")).decode(tokens[:characters]).split())
    return "".join(letter for letter in text if letter.isprintable())[:characters]


def _place(part: Part, store: ShardStore) -> dict[str, Any]:
    chunk = part.chunk
    source = store.sources[chunk.source]
    file = f"{store.split}/{source}/shard.{chunk.shard:05}.mds"
    return {"source": source, "shard": chunk.shard, "row": chunk.row, "file": file, "first_token": chunk.start}


def _numbers(part: Part, measured: Measured) -> dict[str, Any]:
    return {
        "labels": part.labels,
        "loss": _number(part.mean),
        "above_mean": _number(part.above(measured.loss)),
        "gradient_norm": _number(part.gradient_norm),
        "activation": _number(part.activation),
        "layer": part.layer,
    }


def _documents(done: Replayed) -> list[str]:
    rows = []
    for part in done.measured.parts[:SHOWN]:
        place = _place(part, done.store)
        rows.append((
            part.mean, part.above(done.measured.loss), part.labels, part.gradient_norm, part.activation,
            f"{place['file']} row {place['row']}", text_of(part, done.store, PREVIEW),
        ))  # fmt: skip
    return _table(("loss", "above mean", "labels", "gradient", "activation", "file", "text"), rows)


def _sources(done: Replayed) -> list[tuple[Any, ...]]:
    """The most loss above the mean first: source, documents, labels, mean loss, nats above the mean, gradient norm."""
    rows = []
    for number, norm in done.measured.sources.items():
        mine = [part for part in done.measured.parts if part.chunk.source == number]
        labels, loss = sum(part.labels for part in mine), math.fsum(part.loss for part in mine)
        above = loss - labels * done.measured.loss
        rows.append((done.store.sources[number], len(mine), labels, loss / max(1, labels), above, norm))
    return sorted(rows, key=lambda row: -row[4] if math.isfinite(row[4]) else -math.inf)


def _layers(measured: Measured) -> list[tuple[Any, ...]]:
    """The largest gradient norm first."""
    names = dict.fromkeys([*measured.layers, *measured.activations])
    rows = [(name, measured.layers.get(name), measured.activations.get(name)) for name in names]
    return sorted(rows, key=lambda row: -(row[1] or 0.0) if math.isfinite(row[1] or 0.0) else -math.inf)


def _agreement(one: Compared) -> str:
    name = one.name.replace("_", " ")
    if one.then is None:
        return f"{name} {one.now:.6g}; the run has no record of this step"
    if one.is_equal:
        return f"{name} {one.now:.6g}, equal to the recorded one to the last bit"
    words = f"{name} {one.now:.6g}, recorded {one.then:.6g}: relative difference {one.difference:.1e}"
    if not one.bound:
        return f"{words}; it should be equal to the last bit: other hardware, threads or a changed program"
    return f"{words}, {'within' if one.difference <= one.bound else 'ABOVE'} the bound {one.bound:.0e}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _named(names: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in zip(names, row, strict=True)}
