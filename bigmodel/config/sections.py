"""Typed tables in TOML files: reading them, and saying what is wrong in words that help.

Takes a path and `--set a.b=1` overrides, gives plain values; `explain` turns what pydantic complains of into lines that
name the setting, its value and the remedy. `UserError` is what everything a user can mend raises: the command line
prints it without a traceback and exits with code 2.
"""

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bigmodel.config.renamed import NEW_NAMES, new_keys, old_keys_in

WARNED = "BIGMODEL_OLD_KEYS_WARNED"


class UserError(ValueError):
    """Something the user can mend: printed without a traceback, exit code 2. Secrets inside URLs are not shown."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


def without_secrets(text: str) -> str:
    """A text with URLs, as it may be shown or stored: passwords and keys inside them become ***."""
    text = re.sub(r"(://[^/@?\s]*:)[^/@?\s]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:key|secret|token|password)[^=&\s]*=)[^&\s'\":;,]+", r"\1***", text)


class Section(BaseModel):
    """A table of the run file. Unknown keys are errors; values cannot be changed after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    section: ClassVar[str] = ""  # its name in the run file, where keys of it were renamed

    @model_validator(mode="before")
    @classmethod
    def _old_keys_are_read(cls, table: Any) -> Any:
        return new_keys(cls.section, table) if cls.section and isinstance(table, dict) else table


def read_table(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a TOML file. `overrides` are `section.key=value` texts. Raises `UserError`."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file; {_files_like(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    table = with_new_keys(table, path, overrides)
    for override in overrides:
        _apply_override(table, override)
    return table


def with_new_keys(table: dict[str, Any], path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a run file under the new names of their keys. One warning for all processes of a start."""
    old = [*old_keys_in(table), *(key for override in overrides if (key := override.partition("=")[0]) in NEW_NAMES)]
    if old and os.environ.get("RANK", "0") == "0" and WARNED not in os.environ:
        os.environ[WARNED] = "1"  # the trainers that this process starts do not say it again
        names = ", ".join(f"{name} is now {NEW_NAMES[name]}" for name in old)
        print(f"warning: {path}: {names}; old names are read until version 0.3", file=sys.stderr, flush=True)
    try:
        return {name: new_keys(name, value) if isinstance(value, dict) else value for name, value in table.items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = NEW_NAMES.get(key.strip(), key.strip()).split(".")
    if not equals or not all(names):
        raise UserError(f"--set {override}: needs the form section.key=value, for example --set training.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {name} is not a section")
    table[names[-1]] = value


def explain(error: ValidationError, root: type[Section]) -> str:
    """What pydantic complains of in a file that should be a `root`, a line each with setting, value and remedy."""
    return "\n".join(_explain(line, root) for line in error.errors())


def _explain(line: Mapping[str, Any], root: type[Section]) -> str:
    where = ".".join(str(part) for part in line["loc"])
    if line["type"] == "extra_forbidden":
        return f"{where}: unknown setting{_suggestion(line['loc'], root)}"
    message = line["msg"].removeprefix("Value error, ")
    if line["type"] == "value_error":
        return message
    return f"{where} = {line['input']!r}: {message[0].lower()}{message[1:]}"


def _suggestion(location: tuple[Any, ...], root: type[Section]) -> str:
    """The nearest known name in the section where the unknown one stands; else the section that knows it."""
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
