"""Exclusion: documents that a plan leaves out (data.exclude).

In: a file of JSON lines, {"source": "web", "shard": 3, "row": 17}; further keys are ignored. Out: a view of the lengths
in which these documents have no tokens, so that no plan gives them. `bigmodel show batch` and replays name documents
by these numbers.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.plan.shuffle import Lengths

Rows = dict[str, dict[int, list[int]]]  # by source and shard, sorted


@dataclass(frozen=True)
class Excluded:
    """Documents by source, shard and row. Falsy without any."""

    rows: Rows = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "Excluded":
        """Raises `UserError` with the line for a file or line that cannot be read."""
        if path is None:
            return cls()
        found: dict[str, dict[int, set[int]]] = {}
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # texts of documents may hold other line ends
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.exclude = {path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                source, shard, row = _document(line, f"data.exclude = {path}, line {number}")
                found.setdefault(source, {}).setdefault(shard, set()).add(row)
        return cls({name: {shard: sorted(of[shard]) for shard in sorted(of)} for name, of in sorted(found.items())})

    @classmethod
    def unpack(cls, text: str) -> "Excluded":
        """Inverse of `pack`."""
        table = json.loads(zlib.decompress(base64.b64decode(text))) if text else {}
        return cls({name: {int(shard): rows for shard, rows in of.items()} for name, of in table.items()})

    def pack(self) -> str:
        """For a checkpoint: base64 of compressed JSON."""
        return base64.b64encode(zlib.compress(json.dumps(self.rows).encode())).decode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()

    def check(self, store: Lengths) -> None:
        """Raises `UserError` for a document that the store lacks."""
        for source, shards in self.rows.items():
            if source not in store.sources:
                raise UserError(f"data.exclude: source {source!r}: the prepared data has {', '.join(store.sources)}")
            sizes = store.shard_sizes(source)
            for shard, of_shard in shards.items():
                documents = int(sizes[shard][0]) if 0 <= shard < len(sizes) else 0
                if of_shard[-1] >= documents:
                    raise UserError(
                        f"data.exclude: source {source!r}, shard {shard}, row {of_shard[-1]}: no such document; the "
                        "list belongs to other prepared data"
                    )

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __len__(self) -> int:
        return sum(len(rows) for of in self.rows.values() for rows in of.values())


class Included:
    """A `Lengths`: a store's, with 0 for excluded documents."""

    def __init__(self, store: Any, rows: Mapping[str, Mapping[int, list[int]]]) -> None:
        self._store, self._rows = store, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def shard_sizes(self, source: str) -> np.ndarray:
        sizes = np.array(self._store.shard_sizes(source))
        for shard, rows in self._rows.get(source, {}).items():
            sizes[shard, 1] -= int(num_tokens(self._store.lengths(source, shard)[rows]).sum())
        return sizes

    def lengths(self, source: str, shard: int) -> np.ndarray:
        return self._without(self._store.lengths(source, shard), source, shard)

    def lengths_of_pass(self, source: str, shard: int, number: int, side: str = "") -> np.ndarray:
        return self._without(self._store.lengths_of_pass(source, shard, number, side), source, shard)

    def _without(self, lengths: np.ndarray, source: str, shard: int) -> np.ndarray:
        rows = self._rows.get(source, {}).get(shard)
        if rows is None:
            return lengths
        lengths = np.array(lengths)
        lengths[rows] = 0
        return lengths


def without(store: Lengths, excluded: Excluded) -> Lengths:
    """The store without these documents."""
    return Included(store, excluded.rows) if excluded else store


def _document(line: str, place: str) -> tuple[str, int, int]:
    try:
        entry = json.loads(line)
        source, shard, row = entry["source"], entry["shard"], entry["row"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{place}: is not {{"source": ..., "shard": ..., "row": ...}}') from None
    is_number = all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in (shard, row))
    if not isinstance(source, str) or not is_number:
        raise UserError(f"{place}: source must be a name, shard and row whole numbers from 0 on")
    return source, shard, row
