"""Typed sections of TOML files: reading, validation, error messages.

In: a path and `--set a.b=1` overrides. Out: plain values. `explain` turns pydantic's errors into lines with setting,
value and remedy.
"""

import difflib
import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from bigmodel.config.renamed import NEW_NAMES, new_keys, old_keys_in, remedy_elsewhere
from bigmodel.config.user_error import UserError as UserError
from bigmodel.config.user_error import without_secrets as without_secrets

SAVED = {"saved": True}  # validation context for settings saved by a run: settings without effect are accepted
WARNED = "BIGMODEL_OLD_KEYS_WARNED"
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # torchrun and ours, srun, mpirun


class _Presence:
    """Any set or any unset value in `only_with`: see `setting`."""

    def __init__(self, is_set: bool) -> None:
        self.is_set = is_set


SET, UNSET = _Presence(True), _Presence(False)


@dataclass(frozen=True)
class ReadBy:
    """In `only_with`: the keys of a table whose rows list the setting in `reads`. Rows may be added later."""

    table: Mapping[str, Any]

    def keys_for(self, name: str) -> tuple[str, ...]:
        return tuple(key for key, row in self.table.items() if name in row.reads)


@dataclass(frozen=True)
class OnlyWith:
    """The condition under which a setting has an effect; kept in the metadata of its field."""

    others: Mapping[str, Any]
    why: str


def setting(default: Any, *, only_with: Mapping[str, Any], why: str = "", **field: Any) -> Any:
    """A `Field` that has an effect only with certain values of other fields of its section.

        remote: str = Field("", description="URL of ...")
        cache_bytes: int = setting(0, only_with={"remote": SET}, ge=0, description="shards kept ...")
        decay_steps: int = setting(0, only_with={"kind": "wsd", "unit": "steps"}, ge=0, description="length of ...")
        momentum: float = setting(0.95, only_with={"kind": ReadBy(OPTIMIZERS)}, ge=0, lt=1, description="of ...")

    only_with: name of another field -> its required value, a tuple of values, `SET` (not 0, empty or None), `UNSET`,
    or `ReadBy` of the table whose keys that field holds. All conditions must hold. A dotted name is a field of a
    nested section; a name may also be a property of the section, and then `why` is required.
    why: for the user, why the setting has no effect.
    field: arguments of pydantic's `Field`: bounds and description.

    A setting without effect is an error with reason and remedy. Accepted are the default, because a run saves all its
    settings, and every value saved by a run, because earlier versions accepted more (`SAVED`).
    Each declaration has a failing case in tests/config/test_sections.py.
    """
    info = Field(default, **field)
    info.metadata.append(OnlyWith(only_with, why))
    return info


def condition_of(section: "type[Section]", name: str) -> OnlyWith | None:
    """The condition of a field; None: it always has an effect."""
    return next((one for one in section.model_fields[name].metadata if isinstance(one, OnlyWith)), None)


def key_of(table: Mapping[str, Any]) -> AfterValidator:
    """Validate that a text is a key of the table; keys may be added later."""

    def check(value: str) -> str:
        if value not in table:
            expected = ", ".join(map(repr, list(table)[:-1])) + f" or {list(table)[-1]!r}"
            near = difflib.get_close_matches(value, table, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PydanticCustomError("not_in_table", "Input should be {what}", {"what": expected + hint})
        return value

    return AfterValidator(check)


class Section(BaseModel):
    """A section of the run file. Unknown keys are errors; values are frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    section: ClassVar[str] = ""  # name in the run file; set only if keys were renamed

    @model_validator(mode="before")
    @classmethod
    def _old_keys_are_read(cls, table: Any) -> Any:
        return new_keys(cls.section, table) if cls.section and isinstance(table, dict) else table

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self, info: ValidationInfo) -> "Section":
        complaints = [] if info.context == SAVED else list(without_effect(self).values())
        if complaints:
            raise PydanticCustomError("without_effect", "{lines}", {"lines": "\n".join(complaints)})
        return self


def without_effect(section: Section) -> dict[str, str]:
    """Settings that are not at their default and have no effect: name -> message with value, reason and remedy."""
    found = {}
    for name, field in type(section).model_fields.items():
        condition, value = condition_of(type(section), name), getattr(section, name)
        if condition and value != field.get_default(call_default_factory=True):
            reasons = filter(None, (_reason(section, name, other, condition) for other in condition.others))
            if reason := next(reasons, ""):
                found[name] = f"{name} = {_toml(value)} has no effect{reason}"
    return found


def _reason(section: Section, name: str, other: str, condition: OnlyWith) -> str:
    """Why a setting has no effect with the value of another field, and the remedy; empty if it has an effect."""
    now, needed = attrgetter(other)(section), condition.others[other]
    because = f" ({condition.why})" if condition.why else ""
    if isinstance(needed, _Presence):
        if bool(now) is needed.is_set:
            return ""
        if needed.is_set:
            return f" without {other}{because}; leave it out or set {other}"
        return f" with {other} = {_toml(now)}{because}; leave one of them out"
    allowed = (
        needed.keys_for(name) if isinstance(needed, ReadBy) else needed if isinstance(needed, tuple) else (needed,)
    )
    if now in allowed:
        return ""
    if other not in type(section).model_fields:
        return f": {condition.why}; leave it out"
    return f" with {other} = {_toml(now)}{because}; leave it out or set {other} = {' or '.join(map(_toml, allowed))}"


def _toml(value: Any) -> str:
    """A value as written in a run file."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def read_table(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a TOML file. `overrides` are `section.key=value` texts. Raises `UserError`."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file; {_files_like(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    warn_of_old_keys(table, path, overrides)
    table = with_new_keys(table, path)
    for override in overrides:
        _apply_override(table, override)
    return table


def warn_of_old_keys(table: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> None:
    """Warn of old names in a run file and in `--set`, once per start, over all processes."""
    in_file = [f"{path}: {name} is now {NEW_NAMES[name]}" for name in old_keys_in(table)]
    in_set = [f"--set {name} is now {NEW_NAMES[name]}" for override in overrides for name in _old_keys_set_by(override)]
    old = list(dict.fromkeys(in_file + in_set))
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    if old and rank == "0" and WARNED not in os.environ:
        os.environ[WARNED] = "1"  # inherited by the trainers that this process starts
        print(f"warning: {', '.join(old)}; old names are read until version 0.3", file=sys.stderr, flush=True)


def with_new_keys(table: Mapping[str, Any], origin: object) -> dict[str, Any]:
    """The values of a run file under the new names of their keys."""
    try:
        return {name: new_keys(name, value) if isinstance(value, dict) else value for name, value in table.items()}
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def _old_keys_set_by(override: str) -> list[str]:
    """The old names in a `--set`, also in a whole section: model={ width = 96 }."""
    key, _, text = override.partition("=")
    name = ".".join(key.strip().split(".")[:2])
    return [name] if name in NEW_NAMES else old_keys_in({name: _value_of(text)})


def _value_of(text: str) -> Any:
    """A value in TOML syntax; a text that is no TOML is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    names[:2] = NEW_NAMES.get(".".join(names[:2]), ".".join(names[:2])).split(".")
    if not equals or not all(names):
        raise UserError(f"--set {override}: must have the form section.key=value, for example --set training.steps=100")
    value = _value_of(text)
    if len(names) == 1:  # a whole section
        value = with_new_keys({names[0]: value}, f"--set {override}")[names[0]]
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {name} is not a section")
    table[names[-1]] = value


def explain(error: ValidationError, root: type[Section]) -> str:
    """pydantic's errors for a file of type `root`, one per line, with setting, value and remedy."""
    return "\n".join(_explain(line, root) for line in error.errors())


def _explain(line: Mapping[str, Any], root: type[Section]) -> str:
    where = ".".join(str(part) for part in line["loc"])
    if line["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_suggestion(line['loc'], root)}"
    if line["type"] == "without_effect":
        return "\n".join(f"{where}.{one}" if where else one for one in line["msg"].splitlines())
    message = line["msg"].removeprefix("Value error, ")
    if line["type"] == "value_error":
        return message
    return f"{where} = {line['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(location: tuple[Any, ...], root: type[Section]) -> str:
    """The setting that other systems call so; the most similar name in the same section; else the section that has
    this name."""
    if remedy := remedy_elsewhere(".".join(map(str, location))):
        return f"; {remedy}"
    model: Any = root
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if _is_section(a)), model)
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    homes = [
        f"{name}.{location[-1]}"
        for name, field in root.model_fields.items()
        if _is_section(field.annotation) and location[-1] in getattr(field.annotation, "model_fields", {})
    ]
    return f"; did you mean {homes[0]!r}?" if homes else f"; known here: {', '.join(known)}"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _files_like(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*.toml")) if folder.is_dir() else []
    return f"{folder}/ has {', '.join(found)}" if found else f"there is no .toml file in {folder}/ either"
