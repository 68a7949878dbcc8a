"""The embedded corpus: text that every machine with Python has, its standard library.

In: the library's folder. Out: two sources: `code`, a module's program without documentation strings, and `docs`, these
strings and the topics of the language reference. Or one source of pairs, `summaries`: a function without documentation
strings, and its entry in a reference: name, arguments, and first paragraph of its documentation.

Guarantees: the key of a module's documents is its path (of a topic, also its name), so a module is wholly in train or
in validation.
"""

import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

import pyarrow

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.corpus import Source
from bigmodel.data.prepare.rows import Format

SHORTEST_DOCS_CHARACTERS = 200  # shorter documentation is a heading and a phrase, not a document
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
TOPICS = "pydoc_data/topics.py"  # one dict literal: the language reference, topic by topic


def standard_library() -> list[tuple[str, bytes]]:
    """(path below the library's folder, content) of every module, sorted by path.

    Left out: tests, third-party packages, and build settings (`config-*`, `_sysconfigdata*`), which differ between
    machines. Raises `UserError` if this Python has no library files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    modules = []
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder)
        private = path.parts[0].startswith(("config-", "_sysconfigdata"))
        if not private and EXCLUDED_FOLDERS.isdisjoint(path.parts):
            modules.append((path.as_posix(), file.read_bytes()))
    if len(modules) < 100:
        raise UserError(
            f"the embedded corpus needs Python's standard library as files, and {folder} has {len(modules)} modules; "
            "use a full Python, or name your own text in prepare.sources"
        )
    return sorted(modules)


def embedded_hash(modules: Sequence[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for path, content in modules:
        total.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    return total.hexdigest()


def embedded_sources(directory: Path) -> list[Source]:
    """The two sources in a folder of `write_embedded_corpus`."""
    files = {name: str(directory / f"{name}.parquet") for name in ("code", "docs")}
    return [Source(name, (file,), ("text",), (Format("parquet"),), "key") for name, file in files.items()]


def pair_sources(directory: Path) -> list[Source]:
    """The source of pairs in a folder of `write_embedded_pairs`."""
    file = str(directory / "summaries.parquet")
    return [Source("summaries", (file,), ("text", "target"), (Format("parquet"),), "key")]


def write_embedded_pairs(directory: Path, modules: Sequence[tuple[str, bytes]]) -> dict[str, dict[str, dict[str, int]]]:
    """Write summaries.parquet (columns text, target, key = module path); returns counts as `write_embedded_corpus`."""
    from pyarrow import parquet

    left_out = {"not_parsed": {"documents": 0, "bytes": 0}}
    rows = []
    for path, content in modules:
        try:
            pairs = function_pairs(decode_module(content))
        except (SyntaxError, ValueError):
            left_out["not_parsed"]["documents"] += 1
            left_out["not_parsed"]["bytes"] += len(content)
            continue
        rows += [{"text": source, "target": target, "key": path} for source, target in pairs]
    directory.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "summaries.parquet", row_group_size=1024)
    return {"summaries": left_out}


def function_pairs(text: str) -> list[tuple[str, str]]:
    """(source without documentation strings, `reference_entry`) of every documented function."""
    tree = ast.parse(text)
    code = strip_docstrings(text, tree)
    lines = code.encode("utf-8").split(b"\n")
    pairs = []
    for node, bare in zip(_functions(tree), _functions(ast.parse(code)), strict=True):
        entry = reference_entry(node)
        if entry and len(node.body) > 1 and ast.get_docstring(bare) is None:
            indent = lines[bare.lineno - 1][: bare.col_offset]
            source = b"\n".join(line.removeprefix(indent) for line in lines[bare.lineno - 1 : bare.end_lineno])
            pairs.append((source.decode("utf-8") + "\n", entry))
    return pairs


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(tree: ast.Module) -> list[_Function]:
    return [node for node in ast.walk(tree) if isinstance(node, _Function)]


def reference_entry(node: _Function) -> str:
    """`name(arguments): first paragraph of the documentation`, on one line; empty without documentation.

    Defaults, annotations, self and cls are left out.
    """
    paragraph = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    if not paragraph:
        return ""
    given = [*node.args.posonlyargs, *node.args.args, node.args.vararg, *node.args.kwonlyargs, node.args.kwarg]
    names = [one.arg for one in given if one and one.arg not in ("self", "cls")]
    return f"{node.name}({', '.join(names)}): {' '.join(paragraph.split())}"


def write_embedded_corpus(
    directory: Path, modules: Sequence[tuple[str, bytes]]
) -> dict[str, dict[str, dict[str, int]]]:
    """Write code.parquet and docs.parquet (columns text, key = module path) into `directory`.

    Documents: a module's code without documentation strings; its documentation strings, each under its qualified name;
    each topic of the language reference. Returns the documents and bytes left out, by source and reason.
    """
    from pyarrow import parquet

    rows: dict[str, list[tuple[str, str]]] = {"code": [], "docs": []}
    left_out: dict[str, dict[str, dict[str, int]]] = {
        name: {reason: {"documents": 0, "bytes": 0} for reason in ("not_parsed", "heading_only")} for name in rows
    }

    def leave_out(source: str, reason: str, num_bytes: int) -> None:
        left_out[source][reason]["documents"] += 1
        left_out[source][reason]["bytes"] += num_bytes

    for path, content in modules:
        documents = documents_of_module(path, content)
        if documents is None:
            leave_out("code", "not_parsed", len(content))
            leave_out("docs", "not_parsed", 0)  # the module's bytes count once
            continue
        for source, key, text in documents:
            if source == "docs" and len(text) < SHORTEST_DOCS_CHARACTERS:
                leave_out("docs", "heading_only", len(text.encode()))
            else:
                rows[source].append((text, key))
    directory.mkdir(parents=True, exist_ok=True)
    for name, pairs in rows.items():
        table = pyarrow.table({"text": [text for text, _ in pairs], "key": [key for _, key in pairs]})
        parquet.write_table(table, directory / f"{name}.parquet", row_group_size=128)
    return left_out


def documents_of_module(path: str, content: bytes) -> list[tuple[str, str, str]] | None:
    """(source, key, text) of a module's documents; None for invalid Python."""
    try:
        text = decode_module(content)
        tree = ast.parse(text)
        if path == TOPICS:
            return [("docs", f"{path}#{topic}", prose) for topic, prose in _topics(tree).items()]
        documentation = module_documentation(tree, path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        documentation.encode("utf-8")
        return [("code", path, strip_docstrings(text, tree)), ("docs", path, documentation)]
    except (SyntaxError, ValueError):  # UnicodeError and null bytes are ValueErrors
        return None


def decode_module(content: bytes) -> str:
    """A module's text, with "\\n" line ends."""
    lines = iter(content.splitlines(keepends=True))
    encoding, _ = tokenize.detect_encoding(lambda: next(lines, b""))
    text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    text.encode("utf-8")
    return text


def _topics(tree: ast.Module) -> dict[str, str]:
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    topics = ast.literal_eval(assignments[0].value) if assignments else {}
    return {str(name): prose.strip() for name, prose in topics.items()}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_documentation(tree: ast.Module, name: str) -> str:
    """The documentation strings of a module, its classes and functions in source order, each below its name."""
    sections: list[str] = []

    def visit(node: ast.AST, qualified_name: str) -> None:
        if isinstance(node, Documented):
            documentation = ast.get_docstring(node)
            if documentation and documentation.strip():
                sections.append(f"{qualified_name}\n\n{documentation.strip()}\n")
        for child in ast.iter_child_nodes(node):
            child_name = getattr(child, "name", None) if isinstance(child, Documented) else None
            visit(child, f"{qualified_name}.{child_name}" if child_name else qualified_name)

    visit(tree, name)
    return "\n".join(sections)


def strip_docstrings(text: str, tree: ast.Module | None = None) -> str:
    """The source text without documentation strings; a body of nothing else becomes `pass`.

    A documentation string that shares a line with code stays. `text` has "\\n" line ends.
    """
    tree = ast.parse(text) if tree is None else tree
    lines = text.encode("utf-8").split(b"\n")  # ast counts columns in UTF-8 bytes
    nodes = [node for node in ast.walk(tree) if isinstance(node, Documented) and ast.get_docstring(node) is not None]
    for node in sorted(nodes, key=lambda node: node.body[0].lineno, reverse=True):
        first, last = node.body[0].lineno - 1, (node.body[0].end_lineno or 0) - 1
        indent = lines[first][: node.body[0].col_offset]
        if indent.strip() or lines[last][node.body[0].end_col_offset :].strip():
            continue
        rest = [indent + b"pass"] if len(node.body) == 1 and not isinstance(node, ast.Module) else []
        if not rest and last + 1 < len(lines) and not lines[last + 1].strip():
            last += 1
        lines[first : last + 1] = rest
    return b"\n".join(lines).decode("utf-8").lstrip("\n")
