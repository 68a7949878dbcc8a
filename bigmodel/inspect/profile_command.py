"""`bigmodel profile RUN_DIR KIND`: request profiles from a live run, wait for them, print their paths.

Raises `UserError` if the run is not live, a kind or rank is unknown, or a rank does not answer in time.
"""

from pathlib import Path

from bigmodel.config.settings import UserError
from bigmodel.metrics.profiling import KINDS, group_stacks, request, wait
from bigmodel.run_directory import read_json_lines


def profile(run_directory: Path, kind: str, ranks: str, steps: int, seconds: float) -> None:
    if kind not in KINDS:
        raise UserError(f"profile {kind}: no such kind; choose one of {', '.join(KINDS)}")
    if not (run_directory / "metrics_endpoint").exists():
        raise UserError(f"{run_directory}: no live run (no metrics_endpoint); name the directory of a live run")
    chosen = parse_ranks(ranks, _world_size(run_directory))
    folder = request(run_directory, kind, chosen, steps)
    found = wait(folder, chosen, seconds)
    if kind == "stacks":
        for group, stack in group_stacks({rank: path.read_text() for rank, path in found.items()}):
            print(f"rank{'s' * (len(group) > 1)} {', '.join(map(str, group))}:\n{stack}\n")
    for path in found.values():
        print(path)
    silent = [rank for rank in chosen if rank not in found]
    if silent:
        noun = "rank" if len(silent) == 1 else "ranks"
        raise UserError(
            f"{noun} {', '.join(map(str, silent))} gave no {kind} within {seconds:.0f} s; a rank that finishes no "
            "step gives stacks only: bigmodel profile RUN_DIR stacks --ranks all"
        )


def parse_ranks(text: str, world_size: int) -> list[int]:
    """ "all", or numbers and ranges: "0,3-5". Raises `UserError` for a rank that the run does not have."""
    if text == "all":
        return list(range(world_size))
    chosen: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--ranks {text}: {word!r} is not a rank; write numbers and ranges as 0,3-5, or all")
        chosen |= set(range(int(first), int(last or first) + 1))
    outside = [rank for rank in chosen if rank >= world_size]
    if outside or not chosen:
        raise UserError(f"--ranks {text}: this run has the ranks 0 to {world_size - 1}")
    return sorted(chosen)


def _world_size(run_directory: Path) -> int:
    starts = [line for line in read_json_lines(run_directory / "metrics.jsonl") if line["kind"] == "start"]
    if not starts:
        raise UserError(f"{run_directory}: metrics.jsonl has no start yet; wait for the run's first line")
    return starts[-1]["world_size"]
