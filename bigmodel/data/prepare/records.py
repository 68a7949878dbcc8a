"""Records of supervised sources: chats, and prompts with responses, as one text of JSON.

In: the values of a record's columns. Out: its text, which cleaning, duplicates and the split see, or the reason why the
record is malformed. Examples, of `messages` (also in the form of ShareGPT) and of prompt and response with a weight:

    [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
        -> {"messages":[{"role":"user","content":"2 + 2?"},{"role":"assistant","content":"4"}]}
    "2 + 2 = ", "4", 0.5
        -> {"prompt":"2 + 2 = ","response":"4","weight":0.5}

Fields of a message besides role and content stay as they are, for the chat template. Fields that are null are left out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel.data.prepare.rows import Record
from bigmodel.data.store.chat_template import ASSISTANT

ROLES = {  # of ShareGPT
    "human": "user", "user": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT, "bing": ASSISTANT,
    "model": ASSISTANT, "assistant": ASSISTANT, "system": "system", "tool": "tool", "function": "tool",
}  # fmt: skip
SMALLEST_WEIGHT = 2**-16


class MalformedRecord(ValueError):
    """Why a record cannot be used."""


def record_text(values: Sequence[Any], record: Record) -> tuple[str | None]:
    """The text of a record, None if a column is null. Raises `MalformedRecord`."""
    texts, weight = (values[:-1], values[-1]) if record.has_weight else (values, None)
    if any(value is None for value in texts):
        return (None,)
    if record.kind == "chat":
        table: dict[str, Any] = {"messages": messages_of(texts[0], record.columns[0])}
    else:
        for column, text in zip(record.columns, texts, strict=False):
            if not isinstance(text, str):
                raise MalformedRecord(f"{column!r} is {_kind(text)}, not text")
        table = dict(zip(("prompt", "response"), texts, strict=True))
    if weight is not None and _weight(weight, record.columns[-1]) != 1:
        table["weight"] = _weight(weight, record.columns[-1])
    return (encoded(table),)


def encoded(table: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":"), default=str)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRecord("it holds half of a surrogate pair, which UTF-8 cannot encode") from None
    return text


def messages_of(value: Any, column: str) -> list[dict[str, Any]]:
    """Messages with role and content, of a list or of the JSON of one. Raises `MalformedRecord`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise MalformedRecord(f"{column!r} is text that is no JSON, not a list of messages") from None
        except RecursionError:
            raise MalformedRecord(f"{column!r} is JSON that is nested too deep") from None
    if not isinstance(value, list):
        raise MalformedRecord(f"{column!r} is {_kind(value)}, not a list of messages")
    return [_message(one, number) for number, one in enumerate(value, 1)]


def _message(value: Any, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedRecord(f"message {number} is {_kind(value)}, not an object")
    table = {name: one for name, one in value.items() if one is not None}
    if "role" not in table and "from" in table:
        said = table.pop("from")
        if not isinstance(said, str) or said not in ROLES:
            raise MalformedRecord(f"message {number} is from {said!r}; known are {', '.join(ROLES)}")
        table = {"role": ROLES[said], "content": table.pop("value", None), **table}
    role, content = table.pop("role", None), _content(table.pop("content", None), number)
    if not isinstance(role, str) or not role:
        raise MalformedRecord(f"message {number} has no role")
    if content is None and not table.get("tool_calls"):
        raise MalformedRecord(f"message {number} has no content")
    if "weight" in table:
        table["weight"] = _weight(table["weight"], f"weight of message {number}")
    return {"role": role, "content": content, **table}


def _content(value: Any, number: int) -> str | None:
    """A text, or the texts of a list of parts, end to end."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
            if kind != "text" or not isinstance(part.get("text"), str):
                raise MalformedRecord(f"message {number} has a part that is {kind}, and only text is read")
        return "".join(part["text"] for part in value)
    if value is not None and not isinstance(value, str):
        raise MalformedRecord(f"the content of message {number} is {_kind(value)}, not text")
    return value


def _weight(value: Any, name: str) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None or not (number == 0 or SMALLEST_WEIGHT <= number <= 1):
        raise MalformedRecord(f"{name} is {value!r}; a weight is 0, or 1/65536 to 1")
    return float(number)


def _kind(value: Any) -> str:
    kinds = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true or false"}
    return kinds.get(type(value).__name__, "a number")


def contents(table: Mapping[str, Any]) -> list[str]:
    """The texts of a record."""
    messages: Iterable[Mapping[str, Any]] = table.get("messages", ())
    texts = [message["content"] for message in messages if message["content"] is not None]
    return [*texts, *(table[name] for name in ("prompt", "response") if name in table)]


def is_trained(table: Mapping[str, Any]) -> bool:
    """Whether anything of a record is trained."""
    if "messages" not in table:
        return bool(table.get("weight", 1.0))
    said = [message for message in table["messages"] if message["role"] == ASSISTANT]
    return bool(table.get("weight", 1.0)) and any(message.get("weight", 1.0) for message in said)
