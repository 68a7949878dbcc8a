"""The embedded chats: short conversations about sums and letters, made by a rule.

In: nothing. Out: a source `chats` of 4,000 conversations of one to three questions, half of them with a system message
that asks for an answer in capitals or for digits as words. Each answer is right, so a held-out answer can be checked.
Example:

    user       Reverse the word dukati.
    assistant  itakud
    user       How many letters has it?
    assistant  6

Guarantee: the same chats on every machine.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from bigmodel.data.prepare.corpus import Source
from bigmodel.data.prepare.rows import Format, Record
from bigmodel.run_directory import write_atomically

NUM_CHATS = 4_000
CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_embedded_chats(directory: Path) -> Source:
    """Write chats.jsonl (column messages)."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "chats.jsonl", _content())
    record = Record("chat", ("messages",), has_weight=False)
    file = str(directory / "chats.jsonl")
    return Source("chats", (file,), ("messages",), (Format("jsonl", record=record),), record=record)


def embedded_hash() -> str:
    return hashlib.sha256(_content().encode()).hexdigest()


def _content() -> str:
    draw = random.Random(20)
    found: dict[str, None] = {}
    while len(found) < NUM_CHATS:
        found.setdefault(json.dumps({"messages": _chat(draw)}) + "\n")
    return "".join(found)


def _chat(draw: random.Random) -> list[dict[str, Any]]:
    style = draw.choice(("", "", "capitals", "words"))
    messages = []
    if style == "capitals":
        messages.append({"role": "system", "content": "Answer in capitals."})
    if style == "words":
        messages.append({"role": "system", "content": "Write digits as words."})
    word = "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(draw.randint(2, 4)))
    for question, answer in _questions(draw, word)[: draw.randint(1, 3)]:
        if style == "capitals":
            answer = answer.upper()
        if style == "words":
            answer = " ".join(DIGITS[int(one)] if one.isdigit() else one for one in _pieces(answer))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _questions(draw: random.Random, word: str) -> list[tuple[str, str]]:
    first, second = draw.randint(0, 49), draw.randint(0, 49)
    about_word = [
        (f"Reverse the word {word}.", word[::-1]),
        ("How many letters has it?", str(len(word))),
        ("Its first letter?", word[0]),
    ]
    about_numbers = [
        (f"What is {first} + {second}?", str(first + second)),
        ("And one more?", str(first + second + 1)),
        (f"Which is larger, {first} or {second}?", str(max(first, second))),
    ]
    return draw.choice((about_word, about_numbers))


def _pieces(answer: str) -> list[str]:
    """Digits one by one; a word whole."""
    return list(answer) if answer.isdigit() else [answer]
