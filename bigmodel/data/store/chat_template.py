"""Chat templates: messages to token ids, with the weight of each id in the loss.

In: a Jinja template and messages (`{"role": ..., "content": ...}`). Out: the ids of the rendered chat, and a weight for
each: that of its message for what the assistant says, its end-of-turn token included, 0 for all else. Example, ChatML:

    <|im_start|>user\\n 2 + 2?<|im_end|>\\n <|im_start|>assistant\\n 4<|im_end|>\\n
    -------------------------- weight 0 ---------------------------- -- 1 -- 0

transformers renders the template and the `tokenizers` library encodes the whole text, as `apply_chat_template` does.
The assistant's text is found by the first of these rules that fits:

1. `{% generation %}` marks it.
2. Each content is replaced by a mark. The text between the marks and the contents must give the chat again, contents
   as they are or stripped. A turn begins after the generation prompt and ends with the end-of-turn token, the one after
   the content of a chat of two messages. Tool calls before it belong to the turn.
3. The chat up to a turn, with the generation prompt, is the beginning of the whole chat; the turn ends with the next
   end-of-turn token.

Guarantees: where no rule fits, `UserError`, never a guess. The name of a special token inside a content stays text, in
another field of a message it is refused. Tokens that are added and not special, as <think>, are tokens anywhere. A
template that asks for today's date gets the same day always (`DAY`), so the same chat has the same ids.

Costs: rendering takes about 0.1 ms a message and rule; importing transformers a second, at the first chat.
"""

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigmodel.config.user_error import UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.run_directory import read_json

TEMPLATE_FILE = "chat_template.jinja"
# For a tokenizer whose only special tokens are its begin and end. The end ends each of the assistant's turns.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
ASSISTANT = "assistant"
DAY = datetime.datetime(2024, 7, 26)  # the one that Llama 3's template has where it cannot ask
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDY = "mark what the assistant says with {% generation %} in the template"
Message = Mapping[str, Any]


class Span(NamedTuple):
    """Characters, or ids, [start, end) and their weight."""

    start: int
    end: int
    weight: float


class Marked(NamedTuple):
    """A rendered chat: its text, what is trained, and the places of the contents (none if they are not known)."""

    text: str
    spans: list[Span]
    contents: list[tuple[int, int]]


def read_chat_template(folder: Path) -> str | None:
    """The template of a Hugging Face or prepared folder; None without one.

    A file chat_template.jinja counts before chat_template.json and tokenizer_config.json. Of several named templates
    the one named "default" is taken.
    """
    folder = Path(folder)
    if (folder / TEMPLATE_FILE).exists():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        table = read_json(folder / name) if (folder / name).exists() else {}
        found = table.get("chat_template") if isinstance(table, dict) else None
        if isinstance(found, list):
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
        if isinstance(found, str):
            return found
    return None


def render_chat(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> tuple[list[int], list[float]]:
    """The ids of a chat and the weight of each. With the generation prompt nothing is trained: all weights are 0.

    Raises `UserError` for a chat that the template refuses, or whose trained text cannot be found.
    """
    found = _template(template, tuple(sorted(tokenizer.special_names.items())), *added_tokens(tokenizer))
    return encode_marked(found.mark(messages, add_generation_prompt), tokenizer)


def added_tokens(tokenizer: Tokenizer) -> tuple[frozenset[str], frozenset[str]]:
    """The names of the tokens that are found in a rendered chat: the special ones, and all."""
    added = tokenizer.templated.get_added_tokens_decoder().values()
    return frozenset(token.content for token in added if token.special), frozenset(token.content for token in added)


def encode_marked(marked: Marked, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Ids and weights. An id with any character of a span has its weight."""
    encoding = tokenizer.templated.encode(marked.text, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    weights = np.zeros(len(ids))
    starts, ends = (np.array(side) for side in zip(*offsets, strict=True)) if ids else (np.zeros(0), np.zeros(0))
    for start, end, weight in marked.spans:
        weights[(starts < end) & (ends > start)] = weight
    inside = _special_inside(tokenizer, ids, starts, ends, marked.contents)
    if not inside:
        return ids, weights.tolist()
    spelled_ids: list[int] = []
    spelled_weights: list[float] = []
    for place, (one, weight) in enumerate(zip(ids, weights.tolist(), strict=True)):
        spelled = tokenizer.encode(marked.text[slice(*offsets[place])]).tolist() if place in inside else [one]
        spelled_ids += spelled
        spelled_weights += [weight] * len(spelled)
    return spelled_ids, spelled_weights


def _special_inside(
    tokenizer: Tokenizer, ids: list[int], starts: np.ndarray, ends: np.ndarray, contents: list[tuple[int, int]]
) -> set[int]:
    """Places of special tokens inside the contents, where they are text."""
    special = {one for one, token in tokenizer.templated.get_added_tokens_decoder().items() if token.special}
    places = [place for place, one in enumerate(ids) if one in special] if contents else []
    return {place for place in places if any(a <= starts[place] and ends[place] <= b for a, b in contents)}


@lru_cache(maxsize=4)
def _template(
    text: str, names: tuple[tuple[str, str], ...], special: frozenset[str], added: frozenset[str]
) -> "ChatTemplate":
    return ChatTemplate(text, dict(names), special, added)


@dataclass(frozen=True)
class ChatTemplate:
    """A template. `names`: of special tokens, by the template's variables (bos_token ...); `special`: all of them;
    `added`: also the tokens that are not special and may end a turn."""

    text: str
    names: Mapping[str, str]
    special: frozenset[str]
    added: frozenset[str]

    def mark(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Marked:
        """Render a chat and find what is trained. Raises `UserError`: see `render_chat`."""
        if named := self._first_named(_strings([{**message, "content": None} for message in messages])):
            raise UserError(
                f"a message holds {named!r}, the name of a special token, outside its content; remove it from the text"
            )
        text, marked_by_template = self._render(messages, add_generation_prompt)
        contents = self._place_contents(messages, text, add_generation_prompt)
        if contents is None and (named := self._named(messages)):
            raise UserError(
                f"a content holds {named!r}, the name of a special token, and the chat template changes the contents, "
                "so its place cannot be found; remove it from the text"
            )
        places = [(start, end) for start, end, _ in contents.values()] if contents else []
        if add_generation_prompt:
            return Marked(text, [], places)
        turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if self._has_marks:
            spans = marked_by_template
            if len(spans) != len(turns):
                raise UserError(
                    f"the chat template marks {len(spans)} texts with {{% generation %}}, the chat has {len(turns)} "
                    "turns of the assistant; mark each turn once"
                )
        elif contents is not None:
            starts = sorted(start for start, _, _ in contents.values())
            spans = [self._turn(text, contents[number], starts) for number in turns]
        else:
            spans = [self._turn_by_prefix(messages, number, text) for number in turns]
        weights = [float(messages[number].get("weight", 1.0)) for number in turns]
        return Marked(text, [Span(*span, weight) for span, weight in zip(spans, weights, strict=True)], places)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError

        try:
            texts, spans = self._rendered(messages, add_generation_prompt)
        except TemplateError as error:
            raise UserError(f"the chat template refuses it: {error}") from None
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # of an expression in the template
            raise UserError(f"the chat template fails: {type(error).__name__}: {error}") from None
        return texts[0], [(start, end) for start, end in spans[0]] if self._has_marks else []

    def syntax_error(self) -> str:
        """What is wrong with the template itself; empty: nothing."""
        from jinja2.exceptions import TemplateSyntaxError

        try:
            self._rendered([{"role": "user", "content": "?"}], False)
        except TemplateSyntaxError as error:
            return f"line {error.lineno}: {error.message}"
        except Exception:  # of its expressions; says nothing about other chats
            return ""
        return ""

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[list[str], list[Any]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
        return render_jinja_template(
            [plain],
            chat_template=self.text,
            return_assistant_tokens_mask=self._has_marks,
            add_generation_prompt=add_generation_prompt,
            strftime_now=DAY.strftime,
            **self.names,
        )

    def _named(self, messages: Sequence[Message]) -> str:
        """A special token whose name is in a content; empty: none."""
        return self._first_named(_strings([message.get("content") for message in messages]))

    def _first_named(self, texts: Iterable[str]) -> str:
        whole = "\0".join(texts)
        return next((name for name in sorted({*self.special, self.end_of_turn} - {""}) if name in whole), "")

    def _place_contents(
        self, messages: Sequence[Message], text: str, add_generation_prompt: bool
    ) -> dict[int, tuple[int, int, int]] | None:
        """By message: start and end of its content in the text, and the end of the text before it; None if the
        template changes a content or leaves one out."""
        contents = [one for message in messages if isinstance(one := message.get("content"), str)]
        if len(contents) < len(messages):
            return None
        marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
        replaced = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        try:
            frame, _ = self._render(replaced, add_generation_prompt)
        except UserError:  # of a template that reads the contents
            return None
        parts = re.split("\ue000(\\d+)\ue001", frame)
        between, order = parts[::2], [int(number) for number in parts[1::2]]
        if sorted(order) != list(range(len(messages))) or not text.startswith(between[0]):
            return None
        found, at = {}, len(between[0])
        for number, after in zip(order, between[1:], strict=True):
            forms = (contents[number], contents[number].strip(), contents[number].lstrip(), contents[number].rstrip())
            form = next((form for form in forms if text.startswith(form + after, at)), None)
            if form is None:
                return None
            found[number] = (at, at + len(form), at - len(between[order.index(number)]))
            at += len(form) + len(after)
        return found if at == len(text) else None

    def _turn(self, text: str, place: tuple[int, int, int], starts: Sequence[int]) -> tuple[int, int]:
        """A turn whose content is at `place`. `starts`: of all contents, rising."""
        start, end, before = place
        following = next((one for one in starts if one >= end and one > start), len(text))
        prompt = self._prompt
        if prompt:
            found = text.rfind(prompt, before, start)
            if found < 0:
                raise UserError(
                    f"the chat template does not begin the assistant's turn with its generation prompt {prompt!r}; "
                    + REMEDY
                )
            start = found + len(prompt)
        else:
            start = len(text[:start].rstrip())
        name = self.end_of_turn
        ending = self._special_at(text, end)  # of another name, as Llama's <|eom_id|>
        if name and name in text[end:following]:
            ending = text.index(name, end) + len(name)
        if not ending:
            raise UserError(
                f"the chat template ends the assistant's turn with {text[end : end + 20]!r}, which is no special "
                f"token; {REMEDY}"
            )
        return start, ending

    def _special_at(self, text: str, start: int) -> int:
        """The end of the special token at `start`, behind white space; 0: there is none."""
        at = start + len(text[start:]) - len(text[start:].lstrip())
        return max((at + len(name) for name in self.added if text.startswith(name, at)), default=0)

    def _turn_by_prefix(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        before, _ = self._render(messages[:number], True) if number else ("", [])
        end_of_turn = self.end_of_turn
        if not number or not text.startswith(before) or not end_of_turn or self._named(messages):
            raise UserError(
                f"the chat template changes or leaves out a text before the end of message {number + 1}, so what the "
                f"assistant says cannot be found; {REMEDY}"
            )
        found = text.find(end_of_turn, len(before))
        if found < 0:
            raise UserError(f"message {number + 1} has no end-of-turn token {end_of_turn!r}; {REMEDY}")
        return len(before), found + len(end_of_turn)

    @cached_property
    def _has_marks(self) -> bool:
        return bool(GENERATION.search(self.text))

    @cached_property
    def _prompt(self) -> str:
        """The generation prompt. Raises `UserError` for a template that changes the chat before it; an end token that
        only a chat without the prompt has, as Phi-3's, is no change."""
        probe = [{"role": "user", "content": "?"}]
        (without, _), (prompted, _) = (self._render(probe, add) for add in (False, True))
        if not prompted.startswith(without):
            without = without.removesuffix(self.names.get("eos_token") or "")
        if not prompted.startswith(without):
            raise UserError(f"the chat template changes the chat before its generation prompt; {REMEDY}")
        return prompted[len(without) :]

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that ends the assistant's turns; empty: not known."""
        probe = [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": "!"}]
        try:
            text, _ = self._render(probe, False)
        except UserError:
            return ""
        at = text.rfind("!") + 1
        end = self._special_at(text, at)
        return text[at:end].lstrip() if end else ""


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields too."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one


def end_of_turn(template: str, tokenizer: Tokenizer) -> int | None:
    """The id that ends the assistant's turns, where generation stops; None: not known."""
    found = _template(template, tuple(sorted(tokenizer.special_names.items())), *added_tokens(tokenizer))
    return tokenizer.templated.token_to_id(found.end_of_turn) if found.end_of_turn else None
