"""Writes the table of all DeepSpeed keys, docs/deepspeed-keys.md: `python -m tools.write_deepspeed_keys`.

In: `bigmodel.config.deepspeed_keys.KEYS`. Out: Markdown, a table per section. A test compares the page with the output.
"""

from pathlib import Path

from bigmodel.config.deepspeed_foreign import REASONS, SETTINGS
from bigmodel.config.deepspeed_keys import KEYS, VERSION
from bigmodel.config.deepspeed_row import REFUSED, Key

PAGE = Path(__file__).parents[1] / "docs" / "deepspeed-keys.md"
HEAD = f"""# Keys of a DeepSpeed JSON

<!-- Made by `python -m tools.write_deepspeed_keys`; a test keeps it current. -->

Every key that DeepSpeed {VERSION} reads, and what becomes of it. A test compares this list with the installed
DeepSpeed.

| here | meaning |
|---|---|
| given to DeepSpeed | DeepSpeed does what the value says |
| agrees with the run file | a setting means the same; an unset one follows the JSON, another value is an error |
| done by bigmodel | a setting or a part of bigmodel does it; DeepSpeed does not see the key |
| no effect here | accepted; a run names it at its start if it turns something on |
| refused | an error where it turns something on; `false`, `null`, `{{}}` and `{{"enabled": false}}` are accepted |

All values are checked by type and range before ranks start. `"auto"` is accepted for every key except a section: it
takes the value of the run file, or the default. A number in quotes is an error.
"""
FOREIGN = """## Keys of GPT-NeoX and Megatron

They are errors that name the setting with their meaning, with hyphens or underscores.

| key | here |
|---|---|
"""


def page() -> str:
    """The whole page."""
    sections: dict[str, list[str]] = {}
    for path, key in KEYS.items():
        home = path.split(".")[0] if path in _homes() or "." in path else ""
        sections.setdefault(home, []).extend(_rows(path, key))
    sections = {"": sections.pop(""), **sections}
    tables = [_table(name or "Top level", rows) for name, rows in sections.items()]
    foreign = {name: f"`{setting}`" for name, setting in SETTINGS.items()} | REASONS
    rows = [f"| `{name}` | {_cell(foreign[name])} |" for name in sorted(foreign)]
    return "\n".join([HEAD, *tables, FOREIGN + "\n".join(rows)]) + "\n"


def _homes() -> set[str]:
    return {path.split(".")[0] for path in KEYS if "." in path}


def _table(name: str, rows: list[str]) -> str:
    title = name if name == "Top level" else f"`{name}`"
    return "\n".join([f"## {title}", "", "| key | value | here |", "|---|---|---|", *rows, ""])


def _rows(path: str, key: Key) -> list[str]:
    inside = ", ".join(f"`{name}`" for name in key.inside.split())
    words = "" if key.fate == REFUSED else key.value.words + (", or null" if key.nullable else "")
    here = f"{key.fate}: {key.note}" if key.note else key.fate
    return [f"| `{path}` | {words} | {_cell(here)}{f'; with it {inside}' if inside else ''} |"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{...}", "`{...}`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
