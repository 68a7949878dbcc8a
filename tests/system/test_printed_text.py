"""Text that is not ours (paths, documents, causes of an end) is printed as it is: nothing is read as rich's markup."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigmodel.checks import guarantees as check
from bigmodel.checks.audit import Finding

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("bigmodel", "launcher", "tools")


def complaints(source: str) -> Iterator[str]:
    """Every call of a file that could read markup, as a sentence."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        named = {word.arg: word.value for word in node.keywords}
        markup = named.get("markup")
        off = isinstance(markup, ast.Constant) and markup.value is False
        if name == "Console" and not off:
            yield f"line {node.lineno}: Console without markup=False"
        elif name == "Progress" and "console" not in named:
            yield f"line {node.lineno}: Progress without a console of its own"
        elif name in ("from_markup", "get_console", "print_json") or (markup is not None and not off):
            yield f"line {node.lineno}: {name} reads markup"
        elif name == "Panel" and not is_plain(named.get("title")):
            yield f"line {node.lineno}: the title of a Panel is markup; give it a Text"


def is_plain(title: ast.expr | None) -> bool:
    """Whether a title is none, a Text, or one of both."""
    if isinstance(title, ast.IfExp):
        return is_plain(title.body) and is_plain(title.orelse)
    return title is None or isinstance(title, ast.Constant) or ast.unparse(title).startswith("Text(")


def test_no_console_reads_markup() -> None:
    files = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert len(files) > 100
    assert [f"{path}: {one}" for path in files for one in complaints(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "line",
    [
        "Console()",
        "rich.console.Console(highlight=False, markup=True)",
        "Progress(*columns)",
        "Text.from_markup(f'[bold]{path}')",
        "console.print(path, markup=True)",
        "Panel(text, title=f'switch {switch}')",
    ],
)
def test_each_way_to_read_markup_is_seen(line: str) -> None:
    assert len(list(complaints(line))) == 1


@pytest.mark.parametrize(
    "line", ["Console(markup=False)", "Progress(console=console)", "Panel(text, title=Text(f'{a}'))"]
)
def test_what_prints_text_as_it_is_is_not_complained_of(line: str) -> None:
    assert list(complaints(line)) == []


def test_a_path_keeps_what_looks_like_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("a claim about run[x]", True, "in runs[bold]/my[/]")
    monkeypatch.setitem(check.GUARANTEES, "order", lambda run_file, overrides: [finding])
    monkeypatch.setenv("COLUMNS", "200")
    assert check.run_checks(Path("run.toml"), [], ["order"]) == 0
    assert "holds  order: a claim about run[x] (in runs[bold]/my[/])" in capsys.readouterr().out
