"""Names of special tokens in the files that Hugging Face puts beside a tokenizer.json.

Example: `{"bos_token": "<s>", "eos_token": "</s>"}`. Chat templates use them by these names.
"""

from pathlib import Path
from typing import Any

from bigmodel.run_directory import read_json


def read_special_names(folder: Path) -> dict[str, str]:
    """The names of special tokens in the files beside a tokenizer.json, by role; transformers' order of the files."""
    config, names = (_table(Path(folder) / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    table = config if "added_tokens_decoder" in config else config | names
    found = {}
    for role, token in table.items():
        content = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(content, str):
            found[role] = content
    return found


def _table(path: Path) -> dict[str, Any]:
    table = read_json(path) if path.exists() else {}
    return table if isinstance(table, dict) else {}
