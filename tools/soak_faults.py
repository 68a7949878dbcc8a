"""The faults of `tools.soak`: how each is drawn, by what the run names it, and within which time.

In: a random generator and the place of a start; what can be seen of a start. Out: a `Plan` for the start; the ranks
that the run itself names, or None as long as it names none. Pure but for reading the run's files.

    kind                bound, seconds + steps       named by
    killed              2                            the rank that ends first, by SIGKILL
    stopped             2 + 20                       event rank_hangs, with its reason
    stalled             4 + 8                        the same, or the message of data.stall_seconds if it is sooner
    raised              2                            the rank that ends first, with its exception
    slow                15                           slow_rank in metrics.jsonl and `launch status`
    no room for saves   5 + 12                       event checkpoint_failed
    no room for metrics 5 + 12                       the line of metrics.jsonl in the terminal
    not finite, bit     5 + 8                        event bad_device
    bad data            5 + 40                       exit code 2 of all ranks, with the way back
    other ranks         10 + 8                       exit code 3 of all ranks
    truncated, flipped, deleted   20 + 20            the next start's line of the damaged file

Steps are usual ones of the run: batches read ahead, a save or a comparison come first; ten steps of bad data are
computed three times each. A stopped rank is named after the longer of a second and ten steps, twice that is the bound.
Those of a damaged file hold the whole next start.
"""

import random
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.launcher.record import last_metrics
from bigmodel.launcher.watch import status
from bigmodel.run_directory import EXIT_DEVICE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER
from bigmodel.training.checkpoint.folder import path_of
from tests.support.faulty import BROKEN, FLIPPED, KILLED, NO_ROOM, RAISED, RUINED, STALLED, STOPPED, Fault

SLOW = "slow"  # SIGSTOP and SIGCONT in turn, by the soak itself
OTHER_RANKS = "other ranks"  # SIGTERM to all ranks, by the soak itself
BAD_DATA = "bad data"
OF_ALL = (OTHER_RANKS, BAD_DATA)  # all ranks are named
KNOWN_STEPS = 6  # of a start, before a fault: a usual step is known, and a fault late in a start is as likely
SLOW_STEPS = 30  # before a slow rank: the first steps of a start tell nothing
OFFSETS = 10  # drawn on top
DAMAGED_FROM = 12  # steps of a start, if no two checkpoints are there before
AT_ANY_TIME, BY_THE_SOAK = 16, 24  # steps that must follow: in ANY_SECONDS, or until this program has looked
ANY_SECONDS = 0.1  # about a save
HANG_SECONDS, STALL_SECONDS = 1.0, 2.0  # of the run


@dataclass(frozen=True)
class Seen:
    """What a start has shown so far. dead: rank and exit code of the first rank that ended; codes: of all, when all
    have; events: since its launch; printed: the output of each rank."""

    run: Path
    dead: tuple[int, int] | None
    codes: Sequence[int]
    events: Sequence[dict[str, Any]]
    printed: Sequence[str]


class Kind(NamedTuple):
    """A kind of fault. bound_seconds, and bound_steps on top: it is named within. named: the ranks that the run names,
    or None. code: with which the named rank ends, None: the run goes on. cause: of the end in `launch status`."""

    bound_seconds: float
    bound_steps: int
    named: Callable[[Seen], list[int] | None]
    fault: Callable[[random.Random], dict[str, Any]]
    code: int | None = None
    cause: str = "failed"
    damage: str = ""  # to the newest checkpoint after the end
    steps: int = KNOWN_STEPS  # of a start, before the fault
    after: int = 3  # steps that must follow it before the end of the run
    rank: int | None = None  # always this one


class Plan(NamedTuple):
    """What a start is to meet, and when; kind "" is nothing. world_size: of the start after it."""

    kind: str
    fault: Fault
    world_size: int


def first_dead(seen: Seen) -> list[int] | None:
    return [seen.dead[0]] if seen.dead and seen.dead[1] else None


def raised(seen: Seen) -> list[int] | None:
    ranks = first_dead(seen)
    return ranks if ranks and "a planted exception" in seen.printed[ranks[0]] else None


def hanging(words: str) -> Callable[[Seen], list[int] | None]:
    return lambda seen: of_event(seen, "rank_hangs", lambda event: [event["rank"]] if words in event["how"] else None)


def stalled(seen: Seen) -> list[int] | None:
    ranks = first_dead(seen)
    told = ranks if ranks and "data.stall_seconds" in seen.printed[ranks[0]] else None
    return hanging("waits for data")(seen) or told


def of_event(seen: Seen, kind: str, ranks: Callable[[dict[str, Any]], list[int] | None]) -> list[int] | None:
    for event in seen.events:
        if event["event"] == kind and (found := ranks(event)):
            return found
    return None


def bad_device(fault: str) -> Callable[[Seen], list[int] | None]:
    return lambda seen: of_event(seen, "bad_device", lambda event: event["ranks"] if event["fault"] == fault else None)


def slow(seen: Seen) -> list[int] | None:
    found = last_metrics(seen.run).get("slow_rank")
    told = status(seen.run)["slow_rank"] if found else None
    return [told["rank"]] if told else None


def save_failed(seen: Seen) -> list[int] | None:
    def rank(event: dict[str, Any]) -> list[int] | None:
        found = re.search(r"rank (\d+) could not write", event["error"])
        return [int(found[1])] if found and event["reason"] == "disk_full" else None

    return of_event(seen, "checkpoint_failed", rank)


def metrics_wait(seen: Seen) -> list[int] | None:
    return [0] if "metrics.jsonl cannot be written" in seen.printed[0] else None


def all_stopped(seen: Seen) -> list[int] | None:
    return list(range(len(seen.codes))) if seen.codes and set(seen.codes) == {EXIT_STOPPED} else None


def diverged(seen: Seen) -> list[int] | None:
    if seen.codes and set(seen.codes) == {EXIT_USER} and "the next start resumes from the newest" in seen.printed[0]:
        return list(range(len(seen.codes)))
    return None


def nothing(chance: random.Random) -> dict[str, Any]:
    return {}


def at_any_time(kind: str) -> Callable[[random.Random], dict[str, Any]]:
    return lambda chance: {"kind": kind, "delay": chance.uniform(0.0, ANY_SECONDS)}


def of_kind(kind: str) -> Callable[[random.Random], dict[str, Any]]:
    return lambda chance: {"kind": kind}


def flipped(chance: random.Random) -> dict[str, Any]:
    return {"kind": FLIPPED, "module": "blocks.1.attention.output"}


def not_finite(chance: random.Random) -> dict[str, Any]:
    return {"kind": BROKEN, "times": chance.choice((1, 1000)), "backward": chance.random() < 0.5}


def no_room(chance: random.Random) -> dict[str, Any]:
    return {"kind": NO_ROOM, "steps": 12}


def no_room_for_metrics(chance: random.Random) -> dict[str, Any]:
    return no_room(chance) | {"room_bytes": 0}  # with `limit_of`: no more than metrics.jsonl has


KILL = Kind(2.0, 0, first_dead, at_any_time(KILLED), -signal.SIGKILL, after=AT_ANY_TIME)
KINDS = {
    "killed": KILL,
    "stopped": Kind(
        2 * HANG_SECONDS, 20, hanging("SIGSTOP"), at_any_time(STOPPED), -signal.SIGKILL, "hang", after=AT_ANY_TIME
    ),
    SLOW: Kind(15.0, 0, slow, nothing, steps=SLOW_STEPS, after=40),
    "raised": Kind(2.0, 0, raised, of_kind(RAISED), EXIT_FAILED),
    "stalled": Kind(STALL_SECONDS + 2.0, 8, stalled, of_kind(STALLED), EXIT_FAILED),
    "no room for saves": Kind(5.0, 12, save_failed, no_room, after=AT_ANY_TIME),
    "no room for metrics": Kind(5.0, 12, metrics_wait, no_room_for_metrics, after=AT_ANY_TIME, rank=0),
    "not finite": Kind(5.0, 8, bad_device("nonfinite"), not_finite, EXIT_DEVICE, "bad_device"),
    "flipped bit": Kind(5.0, 8, bad_device("replica"), flipped, EXIT_DEVICE, "bad_device"),
    BAD_DATA: Kind(5.0, 40, diverged, of_kind(RUINED), EXIT_USER, "user_error", steps=DAMAGED_FROM, after=12),
    OTHER_RANKS: Kind(10.0, 8, all_stopped, nothing, EXIT_STOPPED, "stopped", after=BY_THE_SOAK),
    "truncated": KILL._replace(damage="truncated"),
    "flipped file": KILL._replace(damage="flipped"),
    "deleted": KILL._replace(damage="deleted"),
}
DAMAGE_SECONDS, DAMAGE_STEPS = 20.0, 20


def deck(chance: random.Random, kinds: Sequence[str], number: int) -> list[str]:
    """The kinds in the order in which run `number` tries them: another one is first in each run, the rest is drawn."""
    first = kinds[number % len(kinds)]
    rest = [kind for kind in kinds if kind != first]
    return [first, *chance.sample(rest, len(rest))]


def draw(chance: random.Random, waiting: list[str], first_step: int, steps: int, world_size: int, saved: int) -> Plan:
    """The fault of a start at `first_step` of a run of `steps`, from the kinds that wait; it is taken from them. A kind
    that does not fit before the end of the run waits on. saved: number of whole checkpoints."""
    offset, rank = chance.randrange(OFFSETS), chance.randrange(world_size)
    for name in waiting:
        kind = KINDS[name]
        step = first_step + kind.steps + offset
        if step + kind.after > steps or (kind.damage and step < first_step + DAMAGED_FROM and saved < 2):
            continue
        waiting.remove(name)
        fault = Fault(**{"step": step, "rank": rank if kind.rank is None else kind.rank} | kind.fault(chance))
        return Plan(name, fault, 5 - world_size if name == OTHER_RANKS else world_size)  # 2 becomes 3, and 3 becomes 2
    return Plan("", Fault(), world_size)


def with_journal(plan: Plan, journal: Path, run: Path, spoilt: tuple[int, ...]) -> Fault:
    limit_of = run / "metrics.jsonl" if plan.kind == "no room for metrics" else None
    return replace(plan.fault, journal=journal, limit_of=limit_of, spoilt=spoilt)


def damage(how: str, checkpoints: Path, step: int, chance: random.Random) -> Path:
    """Damage a file of the checkpoint of this step; returns it."""
    file = chance.choice(sorted(path_of(checkpoints, step).glob("rank-*.safetensors")))
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return file
