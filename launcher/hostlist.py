"""SLURM's compact lists: `n[1-3,08-10],login` is seven hosts, `2(x3),1` is 2, 2, 2, 1.

Parsed here and not by `scontrol show hostnames`, because containers have no scontrol. Pure functions.
"""

import itertools
import math
import re
from collections.abc import Iterator

from bigmodel.config.settings import UserError

MAX_HOSTS = 100_000
RANGE = re.compile(r"(\d+)(?:-(\d+))?")
COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> list[str]:
    """The hosts of a node list in order, with repetitions; numbers keep their leading zeros.

    Raises `UserError` if the text is no node list.
    """
    return [host for word in _split(text) for host in _expand_word(word, text)]


def expand_counts(text: str) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]: the format of SLURM_TASKS_PER_NODE. Raises `UserError` for anything else."""
    counts: list[int] = []
    for word in text.split(","):
        match = COUNT.fullmatch(word)
        if not match:
            raise UserError(f"tasks per node {text!r}: {word!r} is not of the form 4 or 4(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(text: str) -> Iterator[str]:
    """The words between commas outside of brackets."""
    depth, word = 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            raise UserError(f"node list {text!r}: brackets do not match")
        if character == "," and not depth:
            yield _not_empty(word, text)
            word = ""
        else:
            word += character
    if depth:
        raise UserError(f"node list {text!r}: a bracket is not closed")
    yield _not_empty(word, text)


def _not_empty(word: str, text: str) -> str:
    if not word or word.startswith("-") or any(character.isspace() for character in word):  # -x is ssh's option
        raise UserError(f"node list {text!r}: {word!r} is no host name")
    return word


def _expand_word(word: str, text: str) -> Iterator[str]:
    parts = re.split(r"\[(.*?)\]", word)  # outside, inside, outside, inside, ..., outside
    choices = [[part] if number % 2 == 0 else list(_expand_ranges(part, text)) for number, part in enumerate(parts)]
    if math.prod(len(chosen) for chosen in choices) > MAX_HOSTS:
        raise UserError(f"node list {text!r}: {word!r} has more than {MAX_HOSTS} hosts")
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _expand_ranges(ranges: str, text: str) -> Iterator[str]:
    for part in ranges.split(","):
        match = RANGE.fullmatch(part)
        if not match:
            raise UserError(f"node list {text!r}: {part!r} in brackets is neither a number nor a range such as 1-4")
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < MAX_HOSTS:
            raise UserError(f"node list {text!r}: the range {part} is empty or has more than {MAX_HOSTS} hosts")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
