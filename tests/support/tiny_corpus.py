"""A small corpus on disk and settings to prepare it: two sources, 150 documents, about 15,000 tokens."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from bigmodel.config.settings import Settings
from bigmodel.data.prepare.pipeline import prepare, quiet

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


def text(number: int) -> str:
    """Document `number`: distinct, 3 to 150 words; some with an accent and the name of a special token."""
    words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(3 + (number * 37) % 148)]
    tail = " été <|eos|>" if number % 10 == 0 else ""
    return f"Document {number}: " + " ".join(words) + tail + "\n"


NEWS = [text(number) for number in range(100)]
LETTERS = [text(number) for number in range(100, 150)]


def write_sources(folder: Path) -> list[dict[str, Any]]:
    """Write news.jsonl and letters.parquet below `folder`; return their `prepare.sources`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "letters.parquet").exists():  # a rewritten file counts as changed
        lines = [json.dumps({"body": value}) for value in [*NEWS, None, "", NEWS[3]]]
        (folder / "news.jsonl").write_text("\n".join(lines) + "\n")
        table = pyarrow.table({"text": LETTERS})
        pyarrow.parquet.write_table(table, folder / "letters.parquet", row_group_size=20)
    return [
        {"name": "news", "files": [str(folder / "news.jsonl")], "column": "body"},
        {"name": "letters", "files": [str(folder / "letters.parquet")]},
    ]


def tiny_settings(folder: Path, **changes: Any) -> Settings:
    """Settings that prepare `folder`/data from `folder`/text; `changes` go into the prepare section."""
    section = {"validation_share": 0.2, "shard_tokens": 3000, "sources": write_sources(folder / "text")}
    section |= {} if "tokenizer" in changes else {"vocabulary": 300}
    section |= {} if "scheduler" in changes else {"workers": 1}
    section |= changes
    return Settings.model_validate({"prepare": section, "data": {"directory": str(folder / "data")}})


def prepared(folder: Path, **changes: Any) -> Path:
    """Prepare `tiny_settings` and return the folder."""
    return prepare(tiny_settings(folder, **changes), quiet())
