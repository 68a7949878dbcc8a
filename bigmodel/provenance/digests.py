"""Digests of the data order, a leaf per 1,000 training steps, chained: RUN_DIR/order_digests.jsonl.

In: the trained steps of a run. Out: lines of JSON: the run's segments, then per block its SHA-256 (`leaf`), that of the
chain up to it (`chain`), and its steps without an update. The last block may be shorter.

    leaf   SHA-256 of the block's parts: for each segment in it a line of JSON with the hash of its plan and the names
           of its sources, then a row per chunk: step, pack, source, shard, row, first and last token, each 8 bytes,
           little endian; at the end a line of JSON with the steps without an update
    chain  SHA-256 of the chain before it and the leaf, both as 32 bytes; before the first: 32 zeros

The hash of a plan covers the hashes of all files of the data, so two parties agree on the texts with manifests and
length files alone. Written afterwards, not while training: the plan of a run is a function of its records, and a rank
plans only the lanes of its node. `verify` also compares each step's counts with those that training recorded.
Costs: 0.1 microseconds a chunk beside the walk.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.plan.order import describe_difference
from bigmodel.data.plan.shuffle import PLAIN, WIDE
from bigmodel.provenance.trained import DIGESTS, Run, TrainedSteps
from bigmodel.run_directory import read_json_lines, write_atomically
from bigmodel.system_errors import remedy_for

BLOCK_STEPS, FORMAT = 1000, 1
Told = Callable[[int], None]


@dataclass(frozen=True)
class Block:
    first: int
    last: int
    leaf: str
    chain: str
    without_update: Mapping[str, str]  # step -> reason


def quiet(step: int) -> None:
    """No progress."""


def write_digests(run: Run, told: Told = quiet) -> list[Block]:
    """Write the run's digests into its directory. Raises `UserError` if it cannot be written."""
    blocks = list(digest(run, told))
    head = {"format": FORMAT, "segments": run.segments}
    lines = [json.dumps(line, sort_keys=True) for line in [head, *map(vars, blocks)]]
    try:
        write_atomically(run.directory / DIGESTS, "\n".join(lines) + "\n")
    except OSError as error:
        remedy = remedy_for(error) or "digest a copy of the run directory"
        raise UserError(f"{run.directory / DIGESTS}: cannot be written: {error.strerror}; {remedy}") from None
    return blocks


def digest(run: Run, told: Told = quiet) -> Iterator[Block]:
    """The blocks of a run up to its newest checkpoint."""
    chain, last, leaf = bytes(32), min(BLOCK_STEPS, run.reached), hashlib.sha256()
    segment = -1
    for trained in run.walk():
        while len(trained.steps):
            end = int(np.searchsorted(trained.steps, last, side="right"))
            if trained.segment != segment:
                leaf.update(_head(trained, run))
                segment = trained.segment
            leaf.update(_rows(trained.where(slice(end))))
            ended = int(trained.steps[end - 1]) == last
            trained = trained.where(slice(end, None))
            if ended:
                first = (last - 1) // BLOCK_STEPS * BLOCK_STEPS + 1
                skipped = {str(step): run.without_update[step] for step in sorted(run.without_update)}
                mine = {step: reason for step, reason in skipped.items() if first <= int(step) <= last}
                leaf.update(_line(mine))
                chain = hashlib.sha256(chain + leaf.digest()).digest()
                yield Block(first, last, leaf.hexdigest(), chain.hex(), mine)
                told(last)
                last, leaf, segment = min(last + BLOCK_STEPS, run.reached), hashlib.sha256(), -1


def _head(trained: TrainedSteps, run: Run) -> bytes:
    plan = hashlib.sha256(_line(run.segments[trained.segment]["identity"])).hexdigest()
    return _line({"plan": plan, "sources": trained.store.sources})


def _rows(trained: TrainedSteps) -> bytes:
    columns = [trained.steps, trained.packs, *trained.chunks[:, :4].T, trained.last_tokens]
    return np.stack(columns, axis=1).astype("<i8").tobytes()


def _line(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True) + "\n").encode()


def read_digests(file: Path) -> tuple[list[dict[str, Any]], list[Block]]:
    """Segments and blocks of a file of digests. Raises `UserError` if it is none, or has a damaged line."""
    if not file.is_file():
        raise UserError(f"--verify {file}: there is no such file; `bigmodel seen RUN --digest` writes RUN/{DIGESTS}")
    with suppress(ValueError, TypeError, LookupError, AttributeError):
        head, *lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())  # a cut line is damage here
        blocks = [Block(**line) for line in lines]
        are_plans = all(isinstance(one["identity"], dict) for one in head["segments"])
        if head["format"] == FORMAT and are_plans and isinstance(blocks[-1].last, int) and blocks[-1].last > 0:
            return head["segments"], blocks
    raise UserError(f"--verify {file}: no digests of this version; `bigmodel seen RUN --digest` writes RUN/{DIGESTS}")


def verify(run: Run, file: Path, told: Told = quiet) -> list[str]:
    """Compute the blocks of a file again, from manifest, length files and settings; returns what differs, the first
    block first, as lines; empty: the run was trained on exactly this order.

    A run that has gone on is compared up to the end of the file.
    """
    segments, blocks = read_digests(file)
    problems = []
    for number, (ours, theirs) in enumerate(zip(run.segments, segments, strict=False)):
        if ours["identity"] != theirs["identity"]:  # covers all that decides the order, but not where it has ended
            what = describe_difference(theirs["identity"], ours["identity"]).splitlines()[1:-1]
            problems.append(f"segment {number} has another plan:\n" + "\n".join(what))
        elif ours["first_step"] != theirs["first_step"]:
            begins = f"after step {ours['first_step']}, that of the digests after step {theirs['first_step']}"
            problems.append(f"segment {number} begins {begins}")
    if is_behind := run.reached < blocks[-1].last:
        problems.append(f"the run has reached step {run.reached}, the digests step {blocks[-1].last}")
    until = replace(run, reached=min(run.reached, blocks[-1].last))
    again = digest(until, told)
    for block in blocks:
        mine = next(again, None)
        if mine and is_behind and mine.last == run.reached:  # its rest is still to come
            break
        if mine and mine.without_update != block.without_update:
            problems.append(f"steps {block.first} to {block.last}: other steps have no update")
        if mine != block:
            problems.append(f"steps {block.first} to {block.last} differ: the first block with another order")
            break
    return problems + _against_metrics(until)


def _against_metrics(run: Run) -> list[str]:
    """Whether training counted other documents or tokens in a step than the plan has."""
    told = {
        line["step"]: (line["documents"], line["positions"])
        for line in read_json_lines(run.directory / "metrics.jsonl")
        if line["kind"] == "step" and line["step"] <= run.reached
    }
    for trained in run.walk() if told else ():
        tokens = _tokens(trained.chunks)
        numbers, starts, documents = np.unique(trained.steps, return_index=True, return_counts=True)
        sums = np.add.reduceat(tokens, starts)
        for step, *counts in zip(numbers.tolist(), documents.tolist(), sums.tolist(), strict=True):
            if step in told and told[step] != tuple(counts):
                then, planned = (f"{one[0]:,} documents and {one[1]:,} tokens" for one in (told[step], counts))
                return [f"step {step}: training counted {then}, the plan has {planned}"]
    return []


def _tokens(chunks: np.ndarray) -> np.ndarray:
    if chunks.shape[1] < WIDE:
        return chunks[:, 4]
    return np.where(chunks[:, 6] == PLAIN, chunks[:, 4], chunks[:, 7]) + chunks[:, 9]
