"""Writes the messages of docs/troubleshooting.md from the source: `python -m tools.write_messages`.

In: the texts of all errors in the source. Out: the lists between the markers of the page,

    <!-- messages: bigmodel/data/plan/* launcher/hosts.py -->  ...  <!-- end -->

each with the messages of the files that match its patterns; values become an ellipsis. The text beside a marker is
written by hand. A file with messages but without a group is an error, so no message is missing. A test compares the
page with the output of this program.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
ROOTS = ("bigmodel", "launcher", "kernels")
ERRORS = re.compile(
    r"(UserError|MachineError|SaveError|NotFiniteError|ValueError|error|problem|contradiction)$"
)  # names of functions that make an error
GROUP = re.compile(r"(<!-- messages: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = "…"
MAX_DEPTH = 3  # of functions that return another function's message


def messages() -> dict[str, list[str]]:
    """File, from the repository -> the messages that it raises, in the order of the source."""
    paths = [path for root in ROOTS for path in sorted((REPOSITORY / root).rglob("*.py"))]
    trees = {
        path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if not any(parent.is_symlink() for parent in path.parents)
    }
    functions = {
        node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    found = {}
    for name, tree in trees.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ERRORS.search(_called(node))]
        calls.sort(key=lambda node: (node.lineno, node.col_offset))
        given = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        texts = [text for call in calls for argument in call.args[:1] for text in _texts(argument, functions, given)]
        told = [text for text in texts if len(re.sub(r"[^A-Za-z]", "", text)) >= 4]
        if told:
            found[name] = list(dict.fromkeys(told))
    return found


def _texts(
    node: ast.expr, functions: Mapping[str, ast.FunctionDef], given: Mapping[str, ast.expr], depth: int = 0
) -> Iterator[str]:
    """Possible texts of an expression: a literal, both branches of a choice, the results of a function of ours, or the
    value of a name in the same file."""
    if isinstance(node, ast.JoinedStr | ast.BinOp) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield re.sub(rf"{VALUE}(?:{VALUE})+", VALUE, " ".join(_text(node).split()))
    elif isinstance(node, ast.IfExp):
        yield from (*_texts(node.body, functions, given, depth), *_texts(node.orelse, functions, given, depth))
    elif isinstance(node, ast.Name) and depth < MAX_DEPTH and isinstance(given.get(node.id), ast.Call):
        yield from _texts(given[node.id], functions, given, depth)
    elif isinstance(node, ast.Call) and depth < MAX_DEPTH:
        function = functions.get(_called(node))
        for returned in ast.walk(function) if function else ():
            if isinstance(returned, ast.Return) and returned.value is not None:
                yield from _texts(returned.value, functions, given, depth + 1)


def _called(node: ast.Call) -> str:
    """The last name of the called function: `error` of `source.error(...)`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else VALUE
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return VALUE


def page(text: str) -> str:
    """The page with new lists. Raises `ValueError` if a file belongs to no group or to two."""
    found = messages()
    groups = [patterns.split() for _, patterns, _ in GROUP.findall(text)]
    for name in found:
        homes = [patterns for patterns in groups if _fits(name, patterns)]
        if len(homes) != 1:
            raise ValueError(f"{PAGE.name}: {name} is in {len(homes)} groups {homes}; name it in one")

    def fill(group: re.Match[str]) -> str:
        told = [text for name, texts in found.items() if _fits(name, group[2].split()) for text in texts]
        lines = "\n".join(f"- {_code(text)}" for text in dict.fromkeys(told))
        summary = f"<summary>{len(dict.fromkeys(told))} messages</summary>"
        return f"{group[1]}<details markdown>\n{summary}\n\n{lines}\n\n</details>\n{group[3]}"

    return GROUP.sub(fill, text)


def _fits(name: str, patterns: list[str]) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in patterns)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
