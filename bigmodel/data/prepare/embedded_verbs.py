"""A labelled corpus on every machine with Python: functions of its standard library, each with the verb of its name.

In: the modules of `embedded.standard_library`. Out: a source of functions without documentation strings, whose own name
is replaced by `_` wherever it stands; the class is the first word of that name, one of `VERBS`. Example:

    def _(self):                      close
        self._file._()

Guarantees: the key of a function is the path of its module, as in the other embedded corpora, so that all of a module
is for training or for validation, there and here alike. A function that shares a run of `RUN_WORDS` words with the code
of another module is left out, so no such run is on both sides.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow

from bigmodel.data.prepare.cleaning import run_hashes
from bigmodel.data.prepare.corpus import Source
from bigmodel.data.prepare.embedded import decode_module, strip_docstrings
from bigmodel.data.prepare.rows import Format, LabelColumn

VERBS = (
    "add",
    "check",
    "close",
    "create",
    "find",
    "format",
    "get",
    "handle",
    "is",
    "load",
    "make",
    "open",
    "parse",
    "read",
    "remove",
    "run",
    "set",
    "start",
    "write",
)  # fmt: skip - every other first word has fewer functions
SHORTEST_WORDS = 8  # shorter functions only pass or raise
RUN_WORDS = 13
FIRST_WORD = re.compile(r"_*([a-z]+)(?=_|[A-Z]|$)")
WORD = re.compile(r"\w+")
NOT_PARSED, SHARED = "not_parsed", "shared_with_another_module"


def verb_sources(directory: Path) -> list[Source]:
    """The source in a folder of `write_embedded_verbs`."""
    columns = ("text", LabelColumn("verb"))
    return [Source("functions", (str(directory / "functions.parquet"),), columns, (Format("parquet"),), "key")]


def write_embedded_verbs(directory: Path, modules: Sequence[tuple[str, bytes]]) -> dict[str, dict[str, dict[str, int]]]:
    """Write functions.parquet (columns text, verb, key = module path); returns what was left out, by reason."""
    from pyarrow import parquet

    left_out = {reason: {"documents": 0, "bytes": 0} for reason in (NOT_PARSED, SHARED)}
    codes: dict[str, str] = {}
    for path, content in modules:
        try:
            codes[path] = strip_docstrings(decode_module(content))
        except (SyntaxError, ValueError):
            left_out[NOT_PARSED]["documents"] += 1
            left_out[NOT_PARSED]["bytes"] += len(content)
    shared = shared_runs(list(codes.values()))
    rows = []
    for path, code in codes.items():
        for name, source in functions_with_verb(code):
            if np.isin(run_hashes(source, RUN_WORDS), shared).any():
                left_out[SHARED]["documents"] += 1
                left_out[SHARED]["bytes"] += len(source.encode())
            else:
                rows.append({"text": without_name(source, name), "verb": verb_of(name), "key": path})
    directory.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "functions.parquet", row_group_size=1024)
    return {"functions": left_out}


def shared_runs(codes: Sequence[str]) -> np.ndarray:
    """Sorted hashes of the runs of words that occur in more than one of the codes."""
    runs = np.concatenate([np.unique(run_hashes(code, RUN_WORDS)) for code in codes])
    found, counts = np.unique(runs, return_counts=True)
    return found[counts > 1]


def functions_with_verb(code: str) -> Iterator[tuple[str, str]]:
    """(name, source) of the functions of a module that have a verb and a body."""
    lines = code.encode("utf-8").split(b"\n")
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not verb_of(node.name):
            continue
        indent = lines[node.lineno - 1][: node.col_offset]
        rows = [line.removeprefix(indent) for line in lines[node.lineno - 1 : node.end_lineno]]
        source = b"\n".join(rows).decode("utf-8") + "\n"
        if len(WORD.findall(source)) >= SHORTEST_WORDS:
            yield node.name, source


def verb_of(name: str) -> str:
    """
    >>> [verb_of(name) for name in ("get_name", "_closeAll", "settle", "__add__", "readline")]
    ['get', 'close', '', '', '']
    """
    found = FIRST_WORD.match(name)
    return found[1] if found and found[1] in VERBS and not name.endswith("__") else ""


def without_name(source: str, name: str) -> str:
    """The source with `_` for a function's own name.

    >>> without_name("def close(self):\\n    self.file.close()\\n", "close")
    'def _(self):\\n    self.file._()\\n'
    """
    return re.sub(rf"\b{re.escape(name)}\b", "_", source)
