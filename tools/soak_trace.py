"""What a run of `tools.soak` has trained, and whether it is what the undisturbed run has trained.

In: a run directory, the batches that its starts recorded. Out: a `Trace`. `compare` raises `Broken` at the first
difference: steps, batches, numbers, weights at the end, skips that are not declared.
"""

import hashlib
from collections.abc import Sequence
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.run_directory import read_json_lines
from tests.support.batches import batches_of

CLOSE = 5e-3  # losses on another number of ranks, amplified by training
LEARNED = ("loss", "gradient_norm")  # equal on the same number of ranks; on another one losses are close
COUNTED = ("targets", "documents", "positions", "learning_rate", "skipped")  # equal on any number


class Broken(Exception):
    """A guarantee that does not hold."""


class Design(NamedTuple):
    """What is trained. spoilt: data steps that are not finite on any rank."""

    stage: int
    world_size: int
    spoilt: tuple[int, ...] = ()


class Trace(NamedTuple):
    """What must not differ: by step, what was learned and the hashes of its batches; hashes of the last checkpoint.
    declared: steps that events.jsonl has as skipped."""

    lines: dict[int, dict[str, Any]]
    batches: dict[int, set[str]]
    weights: dict[str, str]
    declared: set[int]


def trace_of(directory: Path, starts: Sequence[Path], last: Path) -> Trace:
    """starts: where each recorded its batches; a later one computed its steps anew. last: the last checkpoint."""
    batches: dict[int, set[str]] = {}
    for place in starts:
        if place.with_suffix(".batches").is_dir():
            batches |= {step: set(hashes) for step, hashes in batches_of(place.with_suffix("")).items()}
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in last.glob("*.safetensors")}
    events = read_json_lines(directory / "events.jsonl")
    declared = {event["step"] for event in events if event["event"] == "step_skipped" and event["documents"]}
    return Trace(steps_of(directory), batches, files, declared)


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The line of each step. Raises `Broken` if a step is there twice."""
    lines = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    found = {line["step"]: line for line in lines}
    if len(found) < len(lines):
        raise Broken(f"{run}/metrics.jsonl has {len(lines) - len(found)} steps twice")
    return found


def compare(found: Trace, expected: Trace, design: Design, steps: int, exact: bool) -> None:
    """Raises `Broken` at the first difference. exact: all on the same number of ranks."""
    if sorted(found.lines) != list(range(1, steps + 1)):
        raise Broken(f"metrics.jsonl has steps {sorted(found.lines)} of {steps}")
    skipped = {step for step, line in found.lines.items() if line["skipped"]}
    if skipped - found.declared or skipped != set(design.spoilt):
        raise Broken(f"steps {skipped} were skipped and {found.declared} declared; spoilt are {design.spoilt}")
    for step, line in expected.lines.items():
        here = found.lines[step]
        if found.batches.get(step) != expected.batches[step]:
            raise Broken(f"the batches of step {step} are others")
        for name in COUNTED:
            if here[name] != line[name]:
                raise Broken(f"{name} of step {step} is {here[name]} instead of {line[name]}")
        for name in LEARNED if exact else LEARNED[:1]:
            same = repr(here[name]) == repr(line[name])  # also of two that are not finite
            if not same and (exact or not isclose(here[name], line[name], rel_tol=CLOSE)):
                raise Broken(f"{name} of step {step} is {here[name]!r} instead of {line[name]!r}")
    if exact and found.weights != expected.weights:
        raise Broken("the weights at the end are others")
