"""Writes the reference of all settings, docs/settings.md: `python -m tools.write_settings_reference`.

In: the models of run files and cluster files. Out: Markdown, a table per section with type, default and meaning. A
test compares the page with the output, so a new setting must be in the reference.
"""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bigmodel.config.settings import Section, Settings
from bigmodel.launcher.cluster import Cluster

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

<!-- Made by `python -m tools.write_settings_reference`; a test keeps it current. -->

A run file is TOML. Every setting has a default, so a run file holds only what differs:

```toml
[training]
steps = 2000
global_batch_size = 64

[optimizer]
learning_rate = 6e-4
```

`--set training.steps=10` overrides one setting on the command line. A name that is unknown, a value of the wrong type
and a setting without an effect are errors: the message names the setting, its value and the remedy. Relative paths
start at the current folder, `training.deepspeed` at the run file.
"""
CLUSTER_HEAD = """# Cluster file

A cluster file describes machines. `bigmodel launch ... --cluster FILE` reads it; the run file stays the same on all
clusters. `configs/clusters/` has complete files.

```toml title="cluster.toml"
nodes = 4
gpus_per_node = 8
fabric = "infiniband"

[slurm]
partition = "gpu"
time_limit = "2-00:00:00"
```
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_sections(Settings, ""), CLUSTER_HEAD, *_tables(Cluster, "", "(top level)")])


def _sections(root: type[Section], path: str) -> Iterator[str]:
    for name, field in root.model_fields.items():
        section = section_of(field.annotation)
        assert section, f"{name} is a setting outside of a section"
        yield from _tables(section, f"{path}{name}", f"[{path}{name}]")


def _tables(section: type[Section], path: str, title: str) -> Iterator[str]:
    """The table of a section, then those of the sections inside it."""
    yield f"## `{title}`\n" if title.startswith("[") else f"## {title}\n"
    about = section.__doc__ if section.__doc__ and section.__doc__ != Section.__doc__ else ""
    if about:
        yield "\n".join(line.strip() for line in about.strip().splitlines()) + "\n"
    yield "| setting | type | default | meaning |\n|---|---|---|---|"
    inner = []
    for name, field in section.model_fields.items():
        nested = section_of(field.annotation)
        if nested:
            inner.append((nested, f"{path}.{name}".lstrip("."), get_origin(field.annotation) is list))
            if get_origin(field.annotation) is not list:
                continue
        cells = (type_of(field), default_of(field), meaning_of(section, name, field))
        yield f"| `{name}` | {' | '.join(map(_escaped, cells))} |"
    yield ""
    for nested, place, many in inner:
        yield from _tables(nested, place, f"[[{place}]]" if many else f"[{place}]")


def section_of(annotation: Any) -> type[Section] | None:
    """The section type of a field, or of the items of its list."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def type_of(field: FieldInfo) -> str:
    limits = {
        name: getattr(one, name)
        for one in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(one, name, None) is not None
    }
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    shown = [f"{words[name]} {_number(value)}" for name, value in limits.items() if (name, value) != ("ge", 0)]
    return ", ".join([_type(field.annotation), *shown])


def _number(value: Any) -> str:
    return {2**63: "2^63", 2**32 - 1: "2^32 - 1"}.get(value, f"{value:,}" if isinstance(value, int) else f"{value:g}")


def _type(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in inside)
    if origin is list:
        return "list of tables" if section_of(annotation) else f"list of {_type(inside[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(one) for one in inside)}]"
    if origin is dict:
        return f"table: name = {_type(inside[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in inside if one is not type(None))
    return NAMES.get(annotation, str(annotation))


def default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is PydanticUndefined:
        return "required"
    if default is None:
        return "absent"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, int):
        return f"`{default:_}`"
    if isinstance(default, float):
        return f"`{default:_g}`" if default >= 1 else f"`{default:g}`"
    return f'`"{default}"`' if isinstance(default, str | Path) else f"`{default}`".replace("'", '"')


def meaning_of(section: type[Section], name: str, field: FieldInfo) -> str:
    """The description, and the values of other settings with which it has an effect, if any are declared."""
    told = [field.description] if field.description else []
    for condition in field.metadata:
        for other, needed in getattr(
            condition, "others", {}
        ).items():  # `only_with` of bigmodel.config.sections.setting
            if other.partition(".")[0] in section.model_fields:  # else a property, explained in the description
                told.append(f"only {_condition(name, other, needed)}")
    return "; ".join(told)


def _condition(name: str, other: str, needed: Any) -> str:
    if hasattr(needed, "is_set"):
        return f"{'with' if needed.is_set else 'without'} `{other}`"
    if hasattr(needed, "keys_for"):
        needed = needed.keys_for(name)
    values = needed if isinstance(needed, tuple) else (needed,)
    return f"with `{other}` = {' or '.join(f'`{json.dumps(value)}`' for value in values)}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)
