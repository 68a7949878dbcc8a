"""The user's DeepSpeed JSON: read and checked, not yet completed.

In: the file of `training.deepspeed`. Out: its content. Guarantees: a key that DeepSpeed does not know, that it has
removed or that is not supported here, and a value of a wrong type or out of its range, are errors with the remedy; all
of them are listed in one message. Written against DeepSpeed 0.19.8. Imports neither torch nor deepspeed.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.config.deepspeed_foreign import answer
from bigmodel.config.deepspeed_keys import KEYS, VERSION
from bigmodel.config.deepspeed_row import AUTO, IDLE, REFUSED, SETTING, USED, Key, turned_on
from bigmodel.config.deepspeed_values import OBJECT, shown, unquoted
from bigmodel.config.settings import Settings, UserError

SECRET = ("comet.api_key",)  # not to be printed


def device_of(section: Any) -> Any:
    """The device of an offload section."""
    return section.get("device", "none") if isinstance(section, dict) else section


@dataclass(frozen=True)
class Source:
    """The JSON's file, named in every message, and the problems found so far; they are raised together."""

    path: Path | None
    problems: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)  # setting -> what of the JSON sets it

    def error(self, *last: str) -> UserError:
        """An error with all problems so far, and `last`, a problem that ends the check."""
        found, name = [*self.problems, *last], self.path or "the run file, with the default DeepSpeed configuration"
        if len(found) == 1:
            return UserError(f"{name}: {found[0]}")
        return UserError(f"{name}:" + "".join(f"\n  {problem}" for problem in found))

    def problem(self, text: str) -> None:
        """Note a problem."""
        self.problems.append(text)

    def raise_problems(self) -> None:
        if self.problems:
            raise self.error()

    def tells_of(self, *keys: str) -> bool:
        """Whether a problem is about a key that begins so: what follows from its value is unknown."""
        return any(problem.startswith(keys) for problem in self.problems)

    def read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            config = json.loads(self.path.read_text(encoding="utf-8-sig"), object_pairs_hook=self._once)
        except FileNotFoundError:
            raise self.error("no such file; training.deepspeed is relative to the run file") from None
        except UserError:
            raise
        except json.JSONDecodeError as error:
            raise self.error(f"not valid JSON: {error} (comments and trailing commas are not JSON)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"cannot be read as text: {error}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise self.error(f"cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise self.error(
                f"contains a JSON {type(config).__name__}; a DeepSpeed configuration must be an object {{...}}"
            )
        return config

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise self.error(f"{name!r} occurs twice in one object; keep one of them")
        return dict(pairs)

    def check(self, config: dict[str, Any], section: str = "") -> None:
        """Note every key and value that cannot be used, and take it out, so that the check can go on. Reads 5e8 as a
        whole number, and null as an absent key where DeepSpeed does.
        """
        is_off = bool(section) and config.get("enabled") is False  # nothing inside is turned on then
        for name in list(config):
            path, value = section + name, config[name]
            key = KEYS.get(path)
            if key is None:
                self.refuse_unknown({name: value}, _names_in(section), section)
            elif value == AUTO and key.value is not OBJECT:
                continue
            elif key.asks(value) and (path in SECRET or not is_off):
                self.problem(f"{path} = {'...' if path in SECRET else shown(value)}: {key.reason}")
            elif value is not None or not key.nullable:
                try:
                    config[name] = key.value.read(value)
                except ValueError:
                    self.problem(f"{path} = {shown(value)} must be {key.value.words}{_remedy(value, key, path)}")
                else:
                    if isinstance(value, dict) and _has_rows(path):
                        self.check(value, f"{path}.")
                    continue
            del config[name]

    def refuse_unknown(self, section: dict[str, Any], known: Iterable[str], prefix: str) -> None:
        for key in section:
            path = prefix + key
            if key in known:
                continue
            if meant := answer(path):
                self.problem(f"{path} is not a key of DeepSpeed; {meant}")
                continue
            offered = [name for name in known if KEYS.get(prefix + name, KEYS["optimizer"]).fate != REFUSED]
            near = difflib.get_close_matches(key, offered, n=1, cutoff=0.75)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            self.problem(f"{path} is not a key that DeepSpeed {VERSION} knows{hint}")

    def agree(self, settings: Settings, setting: str, meant: Any, path: str, value: Any, wording: str = "") -> Settings:
        """Settings with `setting` = `meant`; a problem if the run file, or the JSON elsewhere, has another value.

        wording: names the JSON's side in the problem, where `path` = `value` is not written in it.
        """
        section_name, name = setting.split(".")
        section = getattr(settings, section_name)
        now, here = getattr(section, name), wording or f"{path} = {json.dumps(value)}"
        earlier = self.said.get(setting)
        self.said.setdefault(setting, here)
        if now == meant:
            return settings
        if earlier:
            self.problem(f"{here}, but {earlier}; make them equal")
            return settings
        if name in section.model_fields_set:
            self.contradiction(here, setting, now)
            return settings
        return settings.model_copy(update={section_name: section.model_copy(update={name: meant})})

    def contradiction(self, here: str, setting: str, other: Any) -> None:
        """here: the JSON's side, with its value."""
        self.problem(
            f"{here}, but the run file has {setting} = {json.dumps(other)}; "
            'make them equal, or write "auto" in the JSON to follow the run file'
        )


def value_at(config: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None if any part of the path is missing."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def written(config: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None if it is missing or "auto"."""
    value = value_at(config, path)
    return None if value == AUTO else value


def passed(config: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The part of a checked JSON that DeepSpeed gets: not what bigmodel does itself, nor what has no effect."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        key = KEYS.get(section + name)
        if key and key.fate in (USED, SETTING):
            inner = isinstance(value, dict) and _has_rows(section + name)
            kept[name] = passed(value, f"{section}{name}.") if inner else value
    return kept


def without_effect(config: dict[str, Any], section: str = "") -> Iterator[str]:
    """The keys of a checked JSON that turn something on and have no effect, with the reason."""
    for name, value in config.items():
        path, key = section + name, KEYS.get(section + name)
        if key and key.fate == IDLE and turned_on(value):
            yield f"{path} ({key.note})"
        elif isinstance(value, dict) and _has_rows(path):
            yield from without_effect(value, f"{path}.")


def _has_rows(path: str) -> bool:
    """Whether the table has rows for the keys inside; `optimizer.params` and refused sections have none."""
    return KEYS[path].fate != REFUSED and any(other.startswith(f"{path}.") for other in KEYS)


def _remedy(value: Any, key: Key, path: str) -> str:
    if key.value is OBJECT:
        inside = {"zero_optimization": ("stage", 1), "optimizer": ("type", "AdamW"), "scheduler": ("type", "WarmupLR")}
        name, usual = inside.get(path, ("enabled", True))
        asks = value not in (None, False, []) and f"{path}.{name}" in KEYS
        return f"; write {json.dumps({name: usual})}" if asks else "; or remove the key" if value is None else ""
    return ' (or "auto")' + (unquoted(value) or ("; or remove the key" if value is None else ""))


def _names_in(section: str) -> list[str]:
    """Names of the keys of a section."""
    return [path.removeprefix(section) for path in KEYS if path.startswith(section) and "." not in path[len(section) :]]
