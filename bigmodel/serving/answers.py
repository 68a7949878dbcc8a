"""Steps of the engine as OpenAI's answers: whole, or in chunks.

Example of a chunk of `/v1/completions`; with `stream` off all chunks of a choice are joined:

    {"id": "cmpl-1f", "object": "text_completion", "created": 1, "model": "tiny",
     "choices": [{"index": 0, "text": "lo", "logprobs": null, "finish_reason": null}]}

Guarantees: the texts of a choice's chunks joined are the text of its whole answer; each choice has one finish reason.
"""

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from bigmodel.data.store.fast_tokenizer import bytes_of_token
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.generation.engine import Step


@dataclass
class Logprobs:
    """One token with its log-probability, the likeliest ones, and where in the choice's text it begins."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int


@dataclass
class Choice:
    """What a choice has so far."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, step: Step, with_logprobs: bool) -> "Choice":
        """Add a step; returns what is new."""
        one = Logprobs(step.token, step.logprob, list(step.top), len(self.text))
        new = Choice(step.text, 1, [one] if with_logprobs else [], step.finished)
        self.text += new.text
        self.num_tokens += 1
        self.logprobs += new.logprobs
        self.finish_reason = new.finish_reason
        return new


class Answer:
    """The choices of a request, in OpenAI's shape of completions."""

    OBJECT, CHUNK, PREFIX = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, texts: list[str], num_prompt_tokens: int, num_top: int | None):
        """texts: what each choice begins with (`echo`), else empty texts. num_top: None without log-probabilities."""
        self.choices = [Choice(text) for text in texts]
        self._head = {"id": f"{self.PREFIX}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._num_prompt_tokens, self._num_top = tokenizer, num_prompt_tokens, num_top

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._head, "object": self.OBJECT, "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """The prompts, if they are echoed."""
        return [self._chunk(index, Choice(one.text)) for index, one in enumerate(self.choices) if one.text]

    def take(self, index: int, step: Step) -> dict[str, Any] | None:
        """Add a step; returns its chunk, None where it says nothing."""
        new = self.choices[index].take(step, self._num_top is not None)
        return self._chunk(index, new) if new.text or new.logprobs or new.finish_reason else None

    def usage(self) -> dict[str, int]:
        generated = sum(choice.num_tokens for choice in self.choices)
        prompt = self._num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": self.CHUNK, "choices": [], "usage": self.usage()}

    def _chunk(self, index: int, new: Choice) -> dict[str, Any]:
        return {**self._head, "object": self.CHUNK, "choices": [self._delta(index, new)]}

    def _delta(self, index: int, new: Choice) -> dict[str, Any]:
        return self._choice(index, new)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": None if self._num_top is None else self._listed(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _listed(self, logprobs: list[Logprobs]) -> dict[str, Any]:
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._name(token): value for token, value in one.top} for one in logprobs],
            "text_offset": [one.offset for one in logprobs],
        }

    def _name(self, token: int) -> str:
        content = content_of(self._tokenizer, token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class ChatAnswer(Answer):
    """The choices of a chat: messages of the assistant."""

    OBJECT, CHUNK, PREFIX = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first_chunks(self) -> list[dict[str, Any]]:
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [
            {**self._head, "object": self.CHUNK, "choices": [{"index": index, **start}]}
            for index in range(len(self.choices))
        ]

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if self._num_top is None else self._listed(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _delta(self, index: int, new: Choice) -> dict[str, Any]:
        listed = None if self._num_top is None else self._listed(new.logprobs)
        delta = {"content": new.text} if new.text else {}
        return {"index": index, "delta": delta, "logprobs": listed, "finish_reason": new.finish_reason}

    def _listed(self, logprobs: list[Logprobs]) -> dict[str, Any]:
        listed = [
            self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*pair) for pair in one.top]}
            for one in logprobs
        ]
        return {"content": listed, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = content_of(self._tokenizer, token)
        return {"token": self._name(token), "logprob": logprob, "bytes": list(content)}


def content_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; of a special token those of its name, of an id without a token those of <id>."""
    name = tokenizer.token_of(token)
    if name is None:
        return f"<{token}>".encode()
    if tokenizer.gives_back_text:
        return bytes_of_token(name) or name.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", name):  # a byte, in tokenizers of sentencepiece
        return bytes.fromhex(name[3:5])
    return name.replace("\u2581", " ").encode()  # its mark of a space
