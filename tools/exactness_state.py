"""State of an exactness run: one JSON line per finished case, separate from the published results.

    runs/exactness/COMMIT.jsonl                  {"about": {"date": ..., "commit": ..., "hardware": ...}}
    runs/exactness/COMMIT-changed-HASH.jsonl     {"world_size": 1, "case": {...}, "differences": {...}, "failures": []}

One file per state of the sources: the commit and a hash of uncommitted changes. Results of other sources are never
used. Lines are appended whole; a line cut off by a kill is ignored, and its case runs again.
"""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigmodel.config.settings import UserError
from bigmodel.run_directory import append_json_line, read_json_lines, write_atomically

SOURCES = ("bigmodel", "kernels", "launcher", "tests", "tools", "configs", "pyproject.toml")  # can change a result
Row = dict[str, Any]
Run = tuple[dict[str, Any], list[Row]]  # date, commit, hardware, and perhaps the number of missing cases; its rows


@dataclass(frozen=True)
class Sources:
    """commit: seven or more hexadecimal digits. changes: a hash of uncommitted changes; empty without any."""

    commit: str
    changes: str = ""

    def __str__(self) -> str:
        return f"{self.commit}-changed-{self.changes}" if self.changes else self.commit


def read_sources(root: Path) -> Sources:
    """The sources in the checkout at `root` now. Raises `UserError` if it is not a git checkout."""
    commit = _git(root, "rev-parse", "--short", "HEAD").decode().strip()
    there = [name for name in SOURCES if (root / name).exists()]
    changed = _git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", *there)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *there).split(b"\0")[:-1]
    if not changed and not untracked:
        return Sources(commit)
    digest = hashlib.sha256(changed)
    for name in sorted(untracked):
        digest.update(b"\0" + name + b"\0" + hashlib.sha256((root / os.fsdecode(name)).read_bytes()).digest())
    return Sources(commit, digest.hexdigest()[:12])


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    if done.returncode:
        raise UserError(f"{root}: git {arguments[0]} failed: {done.stderr.decode().strip()}; use a git checkout")
    return done.stdout


def key_of(world_size: int, case: dict[str, Any]) -> str:
    """Key of a case: two rows with the same key are the same case."""
    return json.dumps([world_size, case], sort_keys=True)


class State:
    """The rows of one state of the sources, in the order of their runs."""

    def __init__(self, folder: Path, sources: Sources) -> None:
        self.path, self.sources = folder / f"{sources}.jsonl", sources
        self.about, rows = next(iter(read_runs(self.path)), ({}, []))
        self._rows = {key_of(row["world_size"], row["case"]): row for row in rows}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def has(self, world_size: int, case: dict[str, Any]) -> bool:
        return key_of(world_size, case) in self._rows

    def begin(self, hardware: str) -> None:
        """Create the file, or repair its end after a kill."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            with open(self.path, "ab") as file:
                file.write(b"\n")
        if not self.about:
            date = datetime.now(UTC).strftime("%Y-%m-%d")
            self.about = {"date": date, "commit": str(self.sources), "hardware": hardware}
            append_json_line(self.path, {"about": self.about})

    def add(self, row: Row) -> None:
        append_json_line(self.path, row)
        self._rows[key_of(row["world_size"], row["case"])] = row


def read_runs(path: Path) -> list[Run]:
    """The runs of a file; none if there is no file."""
    runs: list[Run] = []
    for line in read_json_lines(path):
        if "about" in line:
            runs.append((line["about"], []))
        elif runs:
            runs[-1][1].append(line)
    return runs


def write_runs(path: Path, runs: list[Run]) -> None:
    """Write the whole file at once, in compact JSON."""
    lines = [line for about, rows in runs for line in ({"about": about}, *rows)]
    write_atomically(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
