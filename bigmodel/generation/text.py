"""Text of tokens as they come: whole characters only, cut before a stop string.

In: one id after another, after a prompt. Out: the text that is certain. Guarantees: the pieces together are the text
that all ids add to the prompt's, up to the first stop string; no piece ends inside a character, and none holds a part
of a stop string. Costs: decodes the last few tokens again with each token.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from bigmodel.config.user_error import UserError

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
JOINING_IDS = 4  # of the prompt: a whole character, where each byte is a token


class Decoder(Protocol):
    """What is needed of a `Tokenizer`."""

    vocabulary: int

    def decode(self, ids: list[int]) -> str: ...


def readable(tokenizer: Decoder, ids: list[int]) -> str:
    """Text of the ids; special tokens of the objectives by number, as <61>."""
    parts = []
    for is_mark, group in groupby(ids, key=lambda token: token >= tokenizer.vocabulary):
        run = list(group)
        parts.append("".join(f"<{token}>" for token in run) if is_mark else tokenizer.decode(run))
    return "".join(parts)


def continuation(tokenizer: Decoder, prompt: Sequence[int], ids: list[int]) -> str:
    """What the ids add to the text of a prompt: some tokenizers write a space between two tokens."""
    before = _last_of(tokenizer, prompt)
    return readable(tokenizer, before + ids)[len(readable(tokenizer, before)) :]


def _last_of(tokenizer: Decoder, prompt: Sequence[int]) -> list[int]:
    """The ids that show how the next one joins; none, where the prompt ends inside a character."""
    last = list(prompt[-JOINING_IDS:])
    return [] if readable(tokenizer, last).endswith(UNFINISHED) else last


class TextStream:
    """The text of one answer. `prompt`: the ids before it. `stopped` is true from the end of a stop string on."""

    def __init__(self, tokenizer: Decoder, stop: tuple[str, ...] = (), prompt: Sequence[int] = ()) -> None:
        if "" in stop:
            raise UserError("a stop string is empty; leave it out, or give a text")
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = _last_of(tokenizer, prompt)
        self._before = 0  # ids whose text is known and shows how the next ones join
        self._known = len(self._ids)  # ids whose text is in `_held` or given, or of the prompt
        self._held = ""  # known text that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        before = readable(self._tokenizer, self._ids[self._before : self._known])
        text = readable(self._tokenizer, self._ids[self._before :])
        if text.endswith(UNFINISHED):
            return ""
        self._before, self._known = self._known, len(self._ids)
        return self._certain(self._held + text[len(before) :])

    def end(self) -> str:
        """The rest: held text and unfinished characters."""
        if self.stopped:
            return ""
        before = readable(self._tokenizer, self._ids[self._before : self._known])
        text = self._held + readable(self._tokenizer, self._ids[self._before :])[len(before) :]
        self._known = len(self._ids)
        return self._certain(text) + self._held if self._stop else text

    def _certain(self, text: str) -> str:
        found = [place for word in self._stop if (place := text.find(word)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, word: str) -> int:
    """The most last characters of the text that begin the word."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-size:])), 0)
