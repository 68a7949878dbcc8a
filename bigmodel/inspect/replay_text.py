"""The result of `bigmodel replay` as text, as replay.json, and as a list of documents for data.exclude."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.load.stream import place_of
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store import mds
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.replay_picture import draw
from bigmodel.inspect.replay_step import Measured, Part, largest, order
from bigmodel.run_directory import write_atomically, write_json
from bigmodel.sizes import counted_noun

SHOWN, PREVIEW, LONG_PREVIEW = 10, 60, 400  # documents in the table, characters of their texts there and in the file
BOUNDS = {"loss": 1e-6, "gradient_norm": 1e-5}  # relative, per step since the checkpoint, in fp32
ROUGHER = 1000  # times the bounds, in bf16 and fp16
SOURCE = ("gradient", "loss", "above_mean", "labels", "activation", "source", "documents")
ARROW = " -> "
LAYER = ("gradient", "activation", "layer")


@dataclass(frozen=True)
class Outputs:
    """folder: for replay.json and replay.png. exclude: file for the list. count: documents of the list."""

    folder: Path | None
    exclude: Path | None
    count: int

    def begin(self) -> None:
        """Make the folders. Raises `UserError` for a list that exists already, and for what cannot be written."""
        if self.count > 1 and not self.exclude:
            raise UserError(f"--count {self.count}: has an effect only with --exclude; give --exclude FILE")
        if self.exclude and self.exclude.exists():
            raise UserError(f"--exclude {self.exclude}: exists already; choose another file, or remove it")
        if self.folder and self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: is a file; give a folder")
        for option, path, folder in (
            ("--out", self.folder, self.folder),
            ("--exclude", self.exclude, self.exclude and self.exclude.parent),
        ):
            try:
                if folder:
                    folder.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=folder):
                        pass
            except OSError as error:
                raise UserError(f"{option} {path}: cannot be written: {error.strerror}; choose another place") from None


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
    lines: dict[int, dict[str, Any]]  # of metrics.jsonl, by step
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
    origin = f"the checkpoint of step {done.checkpoint}" if done.checkpoint else "the initial weights"
    lines = [f"step {done.step} of {done.directory}, from {origin}, {counted_noun(done.world_size, 'rank')}"]
    if done.is_left_out:
        lines.append("the run did not apply this step")
    lines += [_agreement(one) for one in done.compared[0]]
    lines += [f"  may differ: {reason}" for reason in done.compared[1]]
    count = counted_noun(len(done.measured.parts), "document")
    lines += ["", f"{count}, the largest gradient first", *_documents(done)]
    lines += ["", "sources", *_table(SOURCE, _sources(done))]
    lines += ["", "layers", *_table(LAYER, _layers(done.measured))]
    return "\n".join(lines)


def write(done: Replayed, outputs: Outputs) -> list[str]:
    """Write what the user asked for; returns what to say of it."""
    store, parts, said = done.store, done.measured.parts, []
    if folder := outputs.folder:
        write_json(folder / "replay.json", as_json(done))
        names = [f"{_row_of(part, store)}: {text_of(part, store, PREVIEW)}" for part in parts[:SHOWN]]
        norms = [part.gradient_norm for part in parts[:SHOWN]]
        picture = draw(done.lines, done.step, list(zip(norms, names, strict=True)), folder / "replay.png")
        said.append(f"\nwritten: {folder / 'replay.json'}, {picture}")
    if outputs.exclude:
        entries = excluded(parts[: outputs.count], store)
        write_atomically(outputs.exclude, "".join(json.dumps(entry) + "\n" for entry in entries))
        count = counted_noun(len(entries), "document")
        said.append(
            f"\n{outputs.exclude}: {count}; read it, then train --new-plan --set data.exclude={outputs.exclude}"
        )
    return said


def excluded(parts: Sequence[Part], store: ShardStore) -> list[dict[str, Any]]:
    """Documents once each: source, shard (its number), row, and for the reader the file and the text's beginning."""
    found: dict[Any, dict[str, Any]] = {}
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


def mean_loss(parts: Sequence[Part]) -> float:
    """Nats per label, weighted as in the step's loss."""
    weight = math.fsum(part.weight for part in parts)
    return math.fsum(part.loss for part in parts) / weight if weight else 0.0


def above_mean(parts: Sequence[Part], measured: Measured) -> float:
    """Nats above those that labels of these weights have on average in the step. Over all parts the sum is 0."""
    return math.fsum(part.loss - part.weight * measured.loss for part in parts)


def text_of(part: Part, store: ShardStore, characters: int) -> str:
    """The beginning of the chunk's text on one line; of a pair, of its source and -> its target or its class."""
    chunk = part.chunk
    document = store.document(*place_of(store, chunk))

    def begins(tokens: np.ndarray, length: int) -> str:
        text = " ".join(store.tokenizer.decode(tokens[:length]).split())
        return "".join(letter for letter in text if letter.isprintable())[:length]

    if isinstance(document, Pair):
        target = begins(document.target, characters // 2)
        return f"{begins(document.source, characters - len(ARROW) - len(target))}{ARROW}{target}"
    tokens = document.tokens if isinstance(document, Supervised) else document[chunk.start :][: chunk.length]
    return begins(tokens, characters)


def _place(part: Part, store: ShardStore) -> dict[str, Any]:
    chunk = part.chunk
    source = store.sources[chunk.source]
    file = f"{store.split}/{source}/shard.{chunk.shard:05}.mds"
    return {"source": source, "shard": chunk.shard, "row": chunk.row, "file": file, "first_token": chunk.start}


def _row_of(part: Part, store: ShardStore) -> str:
    place = _place(part, store)
    return f"{place['file']} row {place['row']}"


def _name_of(part: Part, store: ShardStore) -> str:
    """As `bigmodel seen --document` takes it."""
    chunk = part.chunk
    return f"{store.sources[chunk.source]}:{mds.shard_name(chunk.shard)}:{chunk.row}"


def _numbers(part: Part, measured: Measured) -> dict[str, Any]:
    return {
        "gradient": _number(part.gradient_norm),
        "loss": _number(mean_loss([part])),
        "above_mean": _number(above_mean([part], measured)),
        "labels": part.labels,
        "activation": _number(part.activation),
        "layer": part.layer,
    }


def _documents(done: Replayed) -> list[str]:
    rows = []
    for part in done.measured.parts[:SHOWN]:
        numbers = part.gradient_norm, mean_loss([part]), part.labels, part.activation
        rows.append((*numbers, _name_of(part, done.store), part.chunk.start, text_of(part, done.store, PREVIEW)))
    return _table(("gradient", "loss", "labels", "activation", "document", "from token", "text"), rows)


def _sources(done: Replayed) -> list[tuple[Any, ...]]:
    """Rows of `SOURCE`, the largest gradient first."""
    rows = []
    for number, norm in done.measured.sources.items():
        mine = [part for part in done.measured.parts if part.chunk.source == number]
        labels, above = sum(part.labels for part in mine), above_mean(mine, done.measured)
        activation = largest([part.activation for part in mine])
        rows.append((norm, mean_loss(mine), above, labels, activation, done.store.sources[number], len(mine)))
    return sorted(rows, key=lambda row: -order(row[0]))


def _layers(measured: Measured) -> list[tuple[Any, ...]]:
    """Rows of `LAYER`, the largest gradient first."""
    names = dict.fromkeys([*measured.layers, *measured.activations])
    rows = [(measured.layers.get(name), measured.activations.get(name), name) for name in names]
    return sorted(rows, key=lambda row: -order(row[0] or 0.0))


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
    cells = [[name.replace("_", " ") for name in head], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _named(names: Sequence[str], row: Sequence[Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in zip(names, row, strict=True)}
